"""Diag-OFT: ``W' = rescale ∘ Rᵀ W``, ``R`` block-diagonal and orthogonal.

Each block of ``b`` output rows is rotated by ``R = (I + Q)(I - Q)⁻¹``, ``Q = B - Bᵀ``. A
positive alpha bounds the Frobenius norm of all ``Q`` together by ``alpha · out`` (COFT); it
is not a scale. The ``oft_diag`` form of LyCORIS 2.0 stores ``R`` itself. sd-scripts' OFT
(``oft_unet_`` names) has the same tensors and formula.
[OFT, arXiv 2306.07280]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lycotool.algorithms.base import (
    Algorithm,
    Bound,
    Dims,
    Layout,
    Reading,
    Rule,
    Shape,
    Sizes,
    Slot,
    size_of,
    unknown,
)
from lycotool.algorithms.rows import is_permutation, rows_of, take_along, whole_blocks
from lycotool.algorithms.training import Arguments, Operands, Start, Structured, Training, on_rows, zeros
from lycotool.lazy import torch
from lycotool.linalg.factorization import factorization
from lycotool.linalg.rotations import cayley_minus_identity, rotate_blocks

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.algorithms.layer import TrainableLayer

#: Next to ``oft_blocks`` alpha is the constraint.
CONSTRAINT = Slot("alpha", "scalar", required=False)
RESCALE = Slot("rescale", "blocks*block *1", required=False)

BLOCKS = Layout(
    name="blocks",
    slots=(Slot("oft_blocks", "blocks block block"), CONSTRAINT, RESCALE),
    rows=size_of("blocks", "block"),
    columns=unknown,
)

ROTATIONS = Layout(
    name="old",
    slots=(Slot("oft_diag", "blocks block block"), CONSTRAINT, RESCALE),
    rows=size_of("blocks", "block"),
    columns=unknown,
)


def dims(layout: Layout, sizes: Sizes, alpha: float | None, reading: Reading) -> Dims:
    """No rank; ``scale`` is 1 because alpha is a bound."""
    return Dims(None, alpha, 1.0)


def bound_of(module: Bound, rows: int) -> float:
    """``alpha · out``, the bound on ``‖Q‖``; 0 for none."""
    return (module.dims.alpha or 0.0) * rows


def gain_of(module: Bound) -> Operands:
    """``rescale - 1`` of each row, which keeps the digits that half precision has no room for."""
    return {"gain": module["rescale"].flatten() - 1} if "rescale" in module else {}


def with_gain(operands: Operands, turned: Tensor, rows: Tensor) -> Tensor:
    """``rescale ∘ R rows - rows``, from ``turned = R rows - rows``."""
    if "gain" not in operands:
        return turned
    gain = operands["gain"].to(rows.dtype).reshape(-1, 1)
    return turned + gain * (rows + turned)


def operands(module: Bound) -> Operands:
    """``Rᵀ - I`` by blocks, and the gain of the rows."""
    if "oft_diag" in module:
        stored = module["oft_diag"]
        turn = stored - torch.eye(stored.shape[-1], dtype=stored.dtype, device=stored.device)
    else:
        turn = cayley_minus_identity(module["oft_blocks"], bound_of(module, rows_of(module)))
    return {"turn": turn.transpose(-1, -2), **gain_of(module)}


def change_of_rows(operands: Operands, rows: Tensor) -> Tensor:
    """``rescale ∘ Rᵀ rows - rows``."""
    return with_gain(operands, rotate_blocks(operands["turn"], rows), rows)


def delta(module: Bound, shape: Shape, base: Tensor | None) -> Tensor:
    """``rescale ∘ Rᵀ W - W``."""
    if base is None:
        raise ValueError("diag-oft needs the base weight")
    return change_of_rows(operands(module), base.flatten(1)).reshape(shape)


def take_rows(module: Bound, index: Tensor) -> dict[str, Tensor] | None:
    """``rescale[index] ∘ Rᵀ[blocks] W[index]``: each block rotates its own rows.

    The bound is one for all blocks and grows with the rows, so some of them keep their
    rotations only where it shrinks neither them nor the whole.
    """
    blocks = whole_blocks(index, module.size("block"))
    if blocks is None:
        return None
    taken = take_along(module, {"blocks": blocks, "blocks*block": index})
    rows = rows_of(module)
    if "oft_diag" in module or is_permutation(index, rows):
        return taken
    if _shrinks(module["oft_blocks"], bound_of(module, rows)):
        return None
    return None if _shrinks(taken["oft_blocks"], bound_of(module, index.numel())) else taken


def _shrinks(blocks: Tensor, bound: float) -> bool:
    """Whether the bound changes these rotations."""
    exact = blocks.double()
    return not torch.equal(cayley_minus_identity(exact, bound), cayley_minus_identity(exact, 0.0))


def init(layer: TrainableLayer, arguments: Arguments, generator: torch.Generator) -> Start:
    """``B = 0``, so ``R = I``; ``dim`` bounds the block. Source: LyCORIS ``modules/diag_oft.py``."""
    block, blocks = factorization(layer.out, arguments.rank)
    return start_rotations(BLOCKS, zeros(blocks, block, block), layer, arguments)


def start_rotations(layout: Layout, blocks: Tensor, layer: TrainableLayer, arguments: Arguments) -> Start:
    """The blocks, and a rescale of 1 where it is trained; alpha is the constraint."""
    trained = {"oft_blocks": blocks}
    if arguments.rescaled:
        trained["rescale"] = torch.ones(layer.out, *[1] * (len(layer.shape) - 1))
    return Start(layout, trained, alpha=arguments.constraint)


def cost(sizes: Sizes, layer: TrainableLayer) -> int:
    """The elements of the blocks, of all stages."""
    stages = size_of("stages")(sizes) if "stages" in sizes else 1
    return stages * size_of("blocks", "block", "block")(sizes)


#: Network arguments of rotations; ``dim`` bounds the size of a block.
ORTHOGONAL_ARGUMENTS = frozenset({"dim", "conv_dim", "constraint", "rescaled"})


def orthogonal_rule(title: str) -> Rule:
    """The refusal all orthogonal methods share."""
    return Rule(
        False,
        f"{title} is not mergeable: it multiplies the base weight",
        "`--rebuild --base CHECKPOINT` merges the rebuilt weight change; "
        "`lycotool bake` folds it into a checkpoint",
    )


DIAG_OFT = Algorithm(
    name="diag-oft",
    title="Diag-OFT (block-diagonal rotation of the output)",
    citation="OFT, arXiv 2306.07280",
    layouts=(BLOCKS, ROTATIONS),
    dims=dims,
    delta=delta,
    needs_base=True,
    take_rows=take_rows,
    merge=orthogonal_rule("Diag-OFT"),
    resize=Rule(False, "a rotation has no rank"),
    training=Training(
        arguments=ORTHOGONAL_ARGUMENTS,
        init=init,
        layouts=(BLOCKS,),
        optional=frozenset({"rescale"}),
        learning_rate=2e-4,
        structured=Structured(operands=operands, output=on_rows(change_of_rows), cost=cost),
        shrinking="parameters",
    ),
)
