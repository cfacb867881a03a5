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
from lycotool.lazy import torch
from lycotool.linalg.factorization import butterfly_factorization
from lycotool.linalg.rotations import butterfly_blocks, cayley_minus_identity, rotate_runs, rotate_stage

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.algorithms.layer import TrainableLayer


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


def delta(module: Bound, shape: Shape, base: Tensor | None) -> Tensor:
    """``rescale ∘ R_m … R_1 W - W``, stage by stage."""
    if base is None:
        raise ValueError("boft needs the base weight")
    rows = base.flatten(1)
    change = torch.zeros_like(rows)  # R_i … R_1 W - W, which keeps the digits of small turns
    for stage, turn in enumerate(_turns(module)):
        change = change + rotate_stage(turn, rows + change, stage)
    return with_gain(gain_of(module), change, rows).reshape(shape)


def _turns(module: Bound) -> Tensor:
    """``R_i - I`` by stages and blocks."""
    return cayley_minus_identity(module["oft_blocks"], bound_of(module, rows_of(module)))


def operands(module: Bound) -> Operands:
    """``R_k … R_1 - I`` and ``R_m … R_k+1 - I``, each by its blocks, and the gain of the rows.

    Every stage copies all it rotates, so training has two, of larger blocks, where the file has ``m``.
    With k about m / 2 the blocks stay small beside the weight: for 1280 rows in 8 stages
    of blocks of 10 they have 80 rows.
    """
    turns = _turns(module)
    first = _stages_at_once(turns.shape[0])
    found = {"near": butterfly_blocks(turns[:first], 0)}
    if first < turns.shape[0]:
        found["far"] = butterfly_blocks(turns[first:], first)
    return {**found, **gain_of(module)}


def _stages_at_once(stages: int) -> int:
    """How many of the first stages are one in training."""
    return (stages + 1) // 2


def change_of_rows(operands: Operands, rows: Tensor) -> Tensor:
    """``rescale ∘ R_m … R_1 rows - rows``, of :func:`operands`."""
    near = operands["near"]
    change = rotate_runs(near, rows, near.shape[-1])
    if "far" in operands:
        far = operands["far"]
        change = change + rotate_runs(far, rows + change, near.shape[-1] // far.shape[1])
    return with_gain(operands, change, rows)


def cost(sizes: Sizes, layer: TrainableLayer) -> int:
    """The elements of the blocks of :func:`operands`."""
    stages, half = size_of("stages")(sizes), size_of("block")(sizes) // 2
    first = _stages_at_once(stages)
    widths = [half << count for count in (first, stages - first) if count]
    return size_of("blocks", "block")(sizes) * sum(widths)


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
