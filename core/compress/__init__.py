"""Making a model smaller; one file per method, and the store and proof they share."""
