"""Fewer layers, heads, neurons or non-zeros: what is chosen, what is cut, and a model of the new shape."""
