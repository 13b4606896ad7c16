"""Statistics of what a model's matrices read, gathered block by block over calibration text."""
