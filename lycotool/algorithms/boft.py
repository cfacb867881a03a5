"""BOFT: ``W' = rescale ∘ R_m … R_1 W``, each ``R`` block-diagonal in a butterfly order.

Blocks are rotations as in Diag-OFT (``R``, not ``Rᵀ``); stage ``i`` first reorders the rows
so that partners ``2^i · b/2`` apart meet in one block. A positive alpha bounds the norm of
all ``Q`` of all stages together by ``alpha · out``. [BOFT, arXiv 2311.06243]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lycotool.algorithms.base import Algorithm, Bound, Layout, Rule, Shape, Sizes, Slot, size_of, unknown
from lycotool.algorithms.oft import (
    CONSTRAINT,
    ORTHOGONAL_ARGUMENTS,
    RESCALE,
    bound_of,
    cost,
    dims,
    gain_of,
    orthogonal_rule,
    start_rotations,
    with_gain,
)
from lycotool.algorithms.rows import rows_of
from lycotool.algorithms.training import (
    Arguments,
    CannotTrainError,
    Operands,
    Start,
    Structured,
    Training,
    on_rows,
    zeros,
)
from lycotool.linalg.factorization import butterfly_factorization
from lycotool.linalg.rotations import cayley_minus_identity, from_butterfly, rotate_blocks, to_butterfly

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.algorithms.layer import TrainableLayer
    from lycotool.lazy import torch


def _stages_fit(sizes: Sizes) -> bool:
    block, stages = size_of("block")(sizes), size_of("stages")(sizes)
    rows = size_of("blocks", "block")(sizes)
    if stages > rows.bit_length():  # more than any rows have; 2**stages could be of any length
        return False
    return block % 2 == 0 and rows % (2**stages * (block // 2)) == 0


BUTTERFLY = Layout(
    name="butterfly",
    slots=(Slot("oft_blocks", "stages blocks block block"), CONSTRAINT, RESCALE),
    rows=size_of("blocks", "block"),
    columns=unknown,
    accepts=(_stages_fit, "oft_blocks: the rows do not divide into that many butterfly stages"),
)


def operands(module: Bound) -> Operands:
    """``R_i - I`` by stages and blocks, and the gain of the rows."""
    turns = cayley_minus_identity(module["oft_blocks"], bound_of(module, rows_of(module)))
    return {"turns": turns, **gain_of(module)}


def change_of_rows(operands: Operands, rows: Tensor) -> Tensor:
    """``rescale ∘ R_m … R_1 rows - rows``."""
    change: Tensor | None = None  # R_i … R_1 rows - rows, which keeps the digits of small turns
    for stage, turn in enumerate(operands["turns"]):
        block = turn.shape[-1]
        turned = rows if change is None else rows + change
        step = from_butterfly(rotate_blocks(turn, to_butterfly(turned, block, stage)), block, stage)
        change = step if change is None else change + step
    if change is None:
        raise ValueError("a butterfly has stages")
    return with_gain(operands, change, rows)


def delta(module: Bound, shape: Shape, base: Tensor | None) -> Tensor:
    """``rescale ∘ R_m … R_1 W - W``."""
    if base is None:
        raise ValueError("boft needs the base weight")
    return change_of_rows(operands(module), base.flatten(1)).reshape(shape)


def init(layer: TrainableLayer, arguments: Arguments, generator: torch.Generator) -> Start:
    """``B = 0`` in as many stages as mix all rows; ``dim`` bounds the block.

    Source: LyCORIS ``modules/boft.py``.
    """
    found = butterfly_factorization(layer.out, arguments.rank)
    if found is None:
        raise CannotTrainError(
            f"{layer.out} rows have no butterfly with even blocks up to dim {arguments.rank}"
        )
    block, blocks = found
    stages = blocks.bit_length()  # log2(blocks) + 1
    return start_rotations(BUTTERFLY, zeros(stages, blocks, block, block), layer, arguments)


BOFT = Algorithm(
    name="boft",
    title="BOFT (butterfly of block-diagonal rotations)",
    citation="BOFT, arXiv 2311.06243",
    layouts=(BUTTERFLY,),
    dims=dims,
    delta=delta,
    needs_base=True,
    merge=orthogonal_rule("BOFT"),
    resize=Rule(False, "a rotation has no rank"),
    training=Training(
        arguments=ORTHOGONAL_ARGUMENTS,
        init=init,
        layouts=(BUTTERFLY,),
        optional=frozenset({"rescale"}),
        learning_rate=2e-4,
        structured=Structured(operands=operands, output=on_rows(change_of_rows), cost=cost),
        shrinking="parameters",
    ),
)
