"""The job queue, its supervisor and its workers."""
