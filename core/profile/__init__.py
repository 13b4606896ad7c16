"""Measuring speed and memory of artifacts, under a stated protocol."""
