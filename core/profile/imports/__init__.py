"""Readers of other programs' reports, one file per format; ``core.importing`` enters what they found."""
