"""Pictures and labelled sets of pictures, for vision models."""
