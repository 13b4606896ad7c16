"""What moves in a training: which parameters, how weights follow from them, and what is left in the model at the end."""
