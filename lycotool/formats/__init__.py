"""Key dialects: how the tensors of an adapter file are named, as tables."""
