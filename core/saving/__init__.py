"""A variant on its way to disk: which tensors, in which layout, whole or not at all, and proved by a reload."""
