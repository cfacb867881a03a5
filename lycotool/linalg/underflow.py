"""What values too small for a dtype lose when they are rounded to it, and when that is worth a word.

A dtype with smallest normal number ``m`` and spacing ``eps`` at 1 moves a value of at least ``m``
by ``u = eps/2`` of it at most. Smaller values have the spacing ``m·eps`` whatever their size: each
is moved by up to ``u·m``, and what is not above that becomes zero. A tensor has lost more than
rounding takes from any tensor if the values below ``m`` alone are off by more than ``u`` of its
norm; float16, with a ``u`` eight times finer than bfloat16's, is given as much as that one::

    ‖fl(x) - x, where |x| < m‖ > max(u, 2⁻⁸) · ‖x‖

The left is at most ``√n · u·m``, so this cannot be where ``√n · m · u/max(u, 2⁻⁸) <= ‖x‖``, let
alone where ``max|x|`` is as large. The largest value is known from the check of the range; for
weights as they are in practice that decides, and nothing is read again. ``m`` is 1e-38 in bfloat16
and float32, 6e-5 in float16, 0.016 in float8_e4m3fn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: bfloat16's unit roundoff: the loss of a dtype that is in use for weights everywhere.
ACCEPTED = 2.0**-8


@dataclass(frozen=True, slots=True)
class Vanished:
    """What one tensor lost.

    Attributes
    ----------
    dtype
        What it was rounded to, by torch's name.
    zeros, nonzero
        How many values became zero, of how many that were not.
    share
        The norm of what the values below the dtype's normal ones are off by, over the tensor's.
    """

    key: str
    dtype: str
    zeros: int
    nonzero: int
    share: float


@dataclass(slots=True)
class Underflow:
    """The tensors of one output that lost more than rounding takes.

    Attributes
    ----------
    found
        By key: a tensor that is rounded again counts once.
    """

    found: dict[str, Vanished] = field(default_factory=dict)

    def look(self, exact: Tensor, saved: Tensor, largest: float, key: str) -> None:
        """Compare a tensor with what it was rounded to; see :func:`vanishing`."""
        vanished = vanishing(exact, saved, largest, key)
        if vanished is not None:
            self.found[key] = vanished

    def warnings(self) -> tuple[str, ...]:
        """One line, about the tensor that lost most; none where nothing was lost."""
        if not self.found:
            return ()
        worst = max(self.found.values(), key=lambda one: (one.share, one.key))
        others = len(self.found) - 1
        more = "" if not others else f", and {others} other tensor{'s' * (others > 1)} by less"
        text = (
            f"{worst.key}: underflow: off by {100 * worst.share:.3g} % of its norm in {worst.dtype}, where "
            f"{worst.zeros} of {worst.nonzero} values become 0{more}; bf16 and fp32 have the range"
        )
        return (text,)


def vanishing(exact: Tensor, saved: Tensor, largest: float, key: str) -> Vanished | None:
    """What a tensor lost, if that is more than rounding takes.

    Parameters
    ----------
    exact, saved
        Before and after, both floating and free of NaN and infinity.
    largest
        ``max|exact|``.
    """
    info = torch.finfo(saved.dtype)
    accepted = max(info.eps / 2, ACCEPTED)
    reach = math.sqrt(exact.numel()) * info.smallest_normal * (info.eps / 2 / accepted)
    if largest == 0 or largest >= reach or exact.dtype == saved.dtype:
        return None
    # Divided by the largest, no square overflows or vanishes, whatever the device's widest dtype.
    scaled = (exact if exact.dtype.itemsize >= 4 else exact.float()) / largest
    norm = float(torch.linalg.vector_norm(scaled))
    if norm * largest >= reach:
        return None
    error = (saved.to(scaled.dtype) / largest).sub_(scaled)
    error *= exact.abs() < info.smallest_normal
    share = float(torch.linalg.vector_norm(error)) / norm
    if share <= accepted:
        return None
    zeros, nonzero = int(((saved == 0) & (scaled != 0)).sum()), int((scaled != 0).sum())
    return Vanished(key, str(saved.dtype).removeprefix("torch."), zeros, nonzero, share)
