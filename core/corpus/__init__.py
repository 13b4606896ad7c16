"""Rows to train on: read, split, tokenized and packed into batches. Knows no model."""
