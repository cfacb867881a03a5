"""Faster forms of what a frozen UNet does between its matrix products, in Triton.

The group norms and gated activations of these models are limited by memory traffic, and
PyTorch's kernels for them move every image several times: a group norm of channels-last images
is transposed, normalised and transposed back. :func:`install` puts one kernel in the place of
several, where a GPU, Triton and the layers allow it; the numbers are those of the same formula
in float32, rounded once.
"""
