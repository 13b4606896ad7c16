"""Number formats and their packing, in plain torch; knows nothing of models."""
