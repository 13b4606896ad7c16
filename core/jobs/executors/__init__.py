"""Where workers run: one file per place."""
