"""Models without their weights for a while: their parameters and buffers on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def on_meta(*models: nn.Module, channels_last: bool = False) -> Iterator[list[Tensor]]:
    """Put tensors of the meta device in the place of all parameters and buffers; gives them.

    What is trained has a gradient, as in a run.

    Parameters
    ----------
    channels_last
        Lay out weights of convolutions as a run on CUDA does.
    """
    held: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    made: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            layout = torch.channels_last if channels_last and tensor.ndim == 4 else torch.preserve_format
            empty = torch.empty_like(tensor, device="meta", memory_format=layout)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            made[id(tensor)] = empty
        return made[id(tensor)]

    try:
        for module in dict.fromkeys(inner for model in models for inner in model.modules()):
            for owned in (module._parameters, module._buffers):
                for name, tensor in owned.items():
                    if tensor is not None:
                        held.append((owned, name, tensor))  # type: ignore[arg-type]
                        owned[name] = stand_in(tensor)  # type: ignore[assignment]
        yield list(made.values())
    finally:
        for owned, name, tensor in held:
            owned[name] = tensor
