"""What a model will need and reach on a device that nobody here has measured, and how far such sayings were off."""
