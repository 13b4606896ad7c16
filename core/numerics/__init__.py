"""Number formats: integer grids, narrow floats, bit packing, stored sizes. Knows tensors, not models."""
