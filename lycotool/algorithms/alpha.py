"""How an alpha is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def alpha_tensor(value: float, slots: Mapping[str, Tensor]) -> Tensor:
    """A stored alpha: in the factors' dtype if that holds it exactly, else in float32."""
    dtype = next(tensor.dtype for tensor in slots.values() if tensor.is_floating_point())
    exact = torch.tensor(value, dtype=torch.float64)
    if torch.finfo(dtype).bits == 8 or exact.to(dtype).double() != exact:
        dtype = torch.float32
    return exact.to(dtype)
