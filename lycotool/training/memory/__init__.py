"""The memory of a training: what it takes, what there is, and what is chosen from the two."""
