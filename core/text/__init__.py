"""Evaluation and calibration text, named and fingerprinted."""
