"""Optimizers: which there are, how their arguments are read, and one step of training."""
