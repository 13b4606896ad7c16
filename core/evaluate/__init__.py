"""Quality of a variant against its base; one file per protocol."""
