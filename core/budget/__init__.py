"""Bytes to spend: what each part of a model loses in each format, and the best choice that a budget allows."""
