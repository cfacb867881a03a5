"""Architectures: where a module's name points in a checkpoint. Names and shapes only."""
