"""Trained instruments: what a probe needs and has to learn first, stored as artifacts."""
