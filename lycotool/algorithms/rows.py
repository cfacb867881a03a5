"""Output rows of a module: pick some of them, or put modules below each other.

What the entries of the registry build their :attr:`Algorithm.take_rows` and
:attr:`Algorithm.stack_rows` from. ``(up @ down)[index] = up[index] @ down``, and modules
below each other are one product ``diag(up₁, up₂, …) @ [down₁; down₂; …]``, in which equal
``down`` need to stand only once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING

from lycotool.algorithms.base import Bound, StackPart
from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def take_along(module: Bound, indices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every slot, with only these entries of the axes that carry these words.

    Parameters
    ----------
    indices
        Word of :attr:`Slot.axes` to the numbers of its entries.
    """
    taken: dict[str, Tensor] = {}
    for slot in module.layout.slots:
        if slot.name in module:
            tensor = module[slot.name]
            for axis, word in enumerate(slot.axes.split()):
                if word in indices:
                    tensor = tensor.index_select(axis, indices[word].to(tensor.device))
            taken[slot.name] = tensor
    return taken


def take_axis(symbol: str) -> Callable[[Bound, Tensor], dict[str, Tensor]]:
    """``take_rows`` of an algorithm in which one symbol's axes are the output rows."""

    def take_rows(module: Bound, index: Tensor) -> dict[str, Tensor]:
        return take_along(module, {symbol: index})

    return take_rows


def whole_blocks(index: Tensor, size: int) -> Tensor | None:
    """The numbers of the blocks of ``size`` rows that ``index`` consists of; None if it cuts one."""
    if index.numel() % size:
        return None
    runs = index.reshape(-1, size)
    blocks = runs[:, 0] // size
    whole = blocks[:, None] * size + torch.arange(size, device=index.device)
    return blocks if torch.equal(runs, whole) else None


def is_permutation(index: Tensor, rows: int) -> bool:
    """Whether ``index`` names each of so many rows once."""
    return torch.equal(index.sort().values, torch.arange(rows, device=index.device))


def modules_of(parts: Sequence[StackPart]) -> list[Bound]:
    """The parts that are modules."""
    return [part for part in parts if not isinstance(part, int)]


def rows_of(module: Bound) -> int:
    """The rows that the sizes tell."""
    rows = module.layout.rows(module.sizes)
    if rows is None:
        raise TypeError(f"{module.layout.name} does not tell its rows")
    return rows


def are_equal(tensors: Sequence[Tensor]) -> bool:
    """Whether all are the same bit for bit, 8-bit floats too, which torch does not compare."""
    if len({(tensor.dtype, tensor.shape) for tensor in tensors}) != 1:
        return False
    first, *others = (tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors)
    return all(torch.equal(first, other) for other in others)


def agree(tensors: Sequence[Tensor]) -> bool:
    """Whether they can stand below each other: every axis but the first is the same."""
    return len({tensor.shape[1:] for tensor in tensors}) <= 1


def stack(parts: Sequence[Tensor | int]) -> Tensor:
    """Tensors that :func:`agree` below each other, an int for so many rows of zeros."""
    tensors = [part for part in parts if not isinstance(part, int)]
    first, dtype = tensors[0], _common_dtype(tensors)
    return torch.cat(
        [
            first.new_zeros((part, *first.shape[1:]), dtype=dtype)
            if isinstance(part, int)
            else part.to(dtype)
            for part in parts
        ]
    )


def stack_slots(
    parts: Sequence[StackPart], *slots: str, rows: Callable[[Bound], int] = rows_of
) -> dict[str, Tensor]:
    """Each of these slots that some part has; it is zero in the parts that lack it.

    Parameters
    ----------
    slots
        Vectors, or slots whose tensors :func:`agree`.
    rows
        How many rows a module has.
    """
    return {
        slot: stack(
            [part if isinstance(part, int) else part[slot] if slot in part else rows(part) for part in parts]
        )
        for slot in slots
        if any(slot in module for module in modules_of(parts))
    }


def stack_products(parts: Sequence[StackPart], *pairs: tuple[str, str]) -> dict[str, Tensor] | None:
    """The products ``up @ down`` of each part below each other, as one product.

    Each ``up`` stands in the columns of its own ``down``. Parts with equal downs share them:
    thirds of one module give back its rank. None where the tensors do not fit together.

    Parameters
    ----------
    pairs
        The slots ``(up, down)`` of each product. Parts share columns in all products or in
        none, which keeps their ranks equal.
    """
    modules = modules_of(parts)
    if not all(
        agree([module[down] for module in modules]) and len({module[up].shape[2:] for module in modules}) == 1
        for up, down in pairs
    ):
        return None
    distinct: list[Bound] = []
    columns: list[int] = []  # for each module, the number of the distinct one it shares with
    for module in modules:
        shared = (
            number
            for number, other in enumerate(distinct)
            if all(are_equal([module[down], other[down]]) for _, down in pairs)
        )
        columns.append(next(shared, len(distinct)))
        if columns[-1] == len(distinct):
            distinct.append(module)
    stacked: dict[str, Tensor] = {}
    for up, down in pairs:
        ranks = [module[down].shape[0] for module in distinct]
        places = iter(columns)
        wide = [part if isinstance(part, int) else _widened(part[up], ranks, next(places)) for part in parts]
        stacked |= {up: stack(wide), down: stack([module[down] for module in distinct])}
    return stacked


def _widened(up: Tensor, ranks: Sequence[int], place: int) -> Tensor:
    """``up`` in its place among zero columns for the other ranks."""
    wide = up.new_zeros((up.shape[0], sum(ranks), *up.shape[2:]))
    start = sum(ranks[:place])
    wide[:, start : start + ranks[place]] = up
    return wide


def with_one_scale(parts: Sequence[StackPart], *slots: str) -> tuple[list[StackPart], float]:
    """The parts and the scale ``c`` to read all of them with.

    Where their scales differ, each is folded into ``slots``, and 1 is left.
    """
    modules = modules_of(parts)
    scales = {module.dims.scale for module in modules}
    if len(scales) == 1:
        return list(parts), scales.pop()
    dtypes = {
        slot: _common_dtype([module[slot] for module in modules if slot in module])
        for slot in slots
        if any(slot in module for module in modules)
    }

    def folded(module: Bound) -> Bound:
        scaled = {
            slot: (_computable(module[slot]) * module.dims.scale).to(dtype)
            for slot, dtype in dtypes.items()
            if slot in module
        }
        return replace(module, tensors={**module.tensors, **scaled})

    return [part if isinstance(part, int) else folded(part) for part in parts], 1.0


def _computable(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The narrowest dtype that holds them all; torch promotes no 8-bit floats."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return dtypes.pop()
    return reduce(torch.promote_types, (torch.float32 if dtype.itemsize == 1 else dtype for dtype in dtypes))
