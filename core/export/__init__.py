"""Models written for other runtimes: one file per format, each held against the model it was made from."""
