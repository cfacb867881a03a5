"""How far two evaluations of one formula may lie apart.

A formula is a chain of sums; each product or addition in it rounds by at most ``eps / 2`` of
the largest value it meets. With ``n`` operations on the way to one element, two evaluations
differ by at most ``n · eps`` of that value. Small modules (:mod:`conformance.samples`) have
chains of at most five sums of at most 40 terms, hence :data:`OPERATIONS`; the largest value
on the way is bounded by the caller, who knows the operands.
"""

from __future__ import annotations

import torch

OPERATIONS = 5 * 40


def assert_equal_up_to_rounding(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    largest: float = 0.0,
    operations: int = OPERATIONS,
) -> None:
    """Compare in float64 what was computed in ``dtype``.

    Parameters
    ----------
    largest
        The largest value on the way, where it may exceed the result's.
    """
    assert actual.shape == expected.shape
    if not actual.numel():
        return
    magnitude = max(largest, float(expected.abs().max()))
    allowed = operations * torch.finfo(dtype).eps * magnitude
    difference = float((actual.double() - expected.double()).abs().max())
    assert difference <= allowed, f"differs by {difference:.3g}, {allowed:.3g} is rounding"
