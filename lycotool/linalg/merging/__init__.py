"""Published ways to combine the changes that several adapters make to one layer.

:data:`~lycotool.linalg.merging.methods.METHODS` is the registry; each entry is a pure function
of tensors with its citation, the options it takes and what it needs.
"""
