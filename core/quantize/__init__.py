"""How weights are put on grids: scales, order, folds and rotations; knows tensors and blocks, no recipes."""
