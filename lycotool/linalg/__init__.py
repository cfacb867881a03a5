"""Tensors in, tensors out: low-rank algebra, Kronecker and Khatri-Rao products, rotations.

Knows no key names and no files. Computes in the dtype and on the device it is given, except
where a docstring says that a small core is worth float64.
"""
