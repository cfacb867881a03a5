"""Bytes of the tensors that operations make, while they are alive: a device's memory without the device.

On the meta device nothing is computed and nothing is held, yet autograd keeps what it would keep
and frees what it would free. So a whole step can be run there to see what it takes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from torch import Tensor

#: What CUDA's caching allocator rounds sizes up to.
BLOCK = 512


def blocks(nbytes: int) -> int:
    """Bytes of the whole blocks that so many bytes take."""
    return -(-nbytes // BLOCK) * BLOCK


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make, and takes them off when they are freed.

    Parameters
    ----------
    known
        Tensors that are there already and are not counted.
    copies_inputs
        Whether a convolution has a copy of its input beside it while it runs.

    Attributes
    ----------
    current, peak
        Bytes alive now, and the most there were.
    """

    def __init__(self, known: Iterable[Tensor] = (), *, copies_inputs: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current: int = 0
        self.peak: int = 0
        self._copies_inputs = copies_inputs
        self._sizes: dict[int, int] = {}
        self._watches: dict[int, weakref.ref[Any]] = {}
        self._known = [tensor.untyped_storage() for tensor in known]  # held, so that no address is used again
        for storage in self._known:
            self._sizes[storage._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - any operation's
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        if self._copies_inputs and func is torch.ops.aten.convolution.default:
            self.peak = max(self.peak, self.current + blocks(args[0].nbytes))
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._sizes:
            return
        size = self._sizes[place] = blocks(storage.nbytes())
        self.current += size
        self.peak = max(self.peak, self.current)
        self._watches[place] = weakref.ref(storage, lambda _: self._free(place))

    def _free(self, place: int) -> None:
        del self._watches[place]
        self.current -= self._sizes.pop(place)


@contextmanager
def flash_attention() -> Iterator[None]:
    """Attention as GPUs compute it: without the matrix of all pairs, which the meta device would make.

    It keeps the operands, the output and a number for each row. Replaced where libraries look it up:
    a mode of torch would not reach what is computed again in the backward pass.
    """
    before = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _flash  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **rest: object,
) -> Tensor:
    ops = torch.ops.aten
    if attn_mask is not None or query.dtype == torch.float32:  # the kernel that takes these
        mask = None
        if attn_mask is not None:
            mask = attn_mask.expand(*query.shape[:-1], key.shape[-2]).to(query.dtype)
        results = ops._scaled_dot_product_efficient_attention(
            query, key, value, mask, query.requires_grad, dropout_p, is_causal, scale=scale
        )
    else:
        results = ops._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
    output: Tensor = results[0]
    return output
