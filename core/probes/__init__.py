"""Read-only looks inside a model; one file per probe."""
