"""The SQLite catalog of variants, runs and measurements, and the store of artifacts."""
