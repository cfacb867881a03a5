"""How an entry of the registry is trained: where it starts, and its faster forward.

The truth of training is the same :attr:`Algorithm.delta` that merging uses: the generic
forward is ``op(x, W) + op(x, ΔW)``. A :attr:`Training.structured` form computes the same
without ΔW where that is cheaper; the conformance tests hold the two equal in output and in
every gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lycotool.algorithms.layer import TrainableLayer
from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.algorithms.base import Bound, DeltaFn, Layout, Shape, Sizes
    from lycotool.algorithms.dora import Axis
    from lycotool.linalg.low_rank import LowRank


class CannotTrainError(ValueError):
    """A layer that an algorithm cannot train with these arguments; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """What one layer is trained with, everything decided.

    ``alpha`` is never 0 (that is the rank); ``dora`` is the axis that keeps its own norms.
    The names that users know these by are in :mod:`lycotool.training.network_options`.
    """

    rank: int = 4
    alpha: float = 1.0
    rs_lora: bool = False
    use_conv_cp: bool = False
    use_scalar: bool = False
    dora: Axis | None = None
    factor: int = -1
    decompose_both: bool = False
    full_matrix: bool = False
    unbalanced_factorization: bool = False
    block_size: int = 4
    constraint: float = 0.0
    rescaled: bool = False
    train_on_input: bool = False

    @property
    def stored_alpha(self) -> float:
        """The alpha that makes ``alpha / rank`` the scale: rs_lora's is ``alpha / √rank``."""
        return self.alpha * math.sqrt(self.rank) if self.rs_lora else self.alpha


@dataclass(frozen=True, slots=True)
class Start:
    """A module before its first step: ΔW = 0.

    Attributes
    ----------
    trained
        Slots to train, float32.
    fixed
        Slots the file has and training does not touch.
    alpha
        As it is stored; None where none is.
    """

    layout: Layout
    trained: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None


#: ``(layer, arguments, generator) -> start``. Without a device of its own: on the CPU.
InitFn = Callable[[TrainableLayer, Arguments, "torch.Generator"], Start]

#: The layer's weight as a function: ``x -> op(x, W)``, without the bias.
BaseFn = Callable[["Tensor"], "Tensor"]

#: ``(module, layer, x, base) -> op(x, W')``, without the bias.
OutputFn = Callable[["Bound", TrainableLayer, "Tensor", BaseFn], "Tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Structured:
    """A forward that does not build ΔW, for layers of one group of channels.

    Exactly one of the three functions is there.

    Parameters
    ----------
    factors
        Exact low-rank factors of ΔW: down, core and up are applied in a row. DoRA over these
        needs no ΔW either.
    change
        ``(module, layer, x) -> op(x, ΔW)``, for a change that is added to the weight.
    output
        ``(module, layer, x, base) -> op(x, W')`` from ``base(x) = op(x, W)``, both without
        the bias, for one that multiplies the weight.
    cost
        Multiply-adds for each position of the output, besides those of the base. Applying ΔW
        costs the number of the weight's elements.
    """

    cost: Callable[[Sizes, TrainableLayer], int]
    factors: Callable[[Bound], LowRank | None] | None = None
    change: Callable[[Bound, TrainableLayer, Tensor], Tensor] | None = None
    output: OutputFn | None = None


#: How `scale_weight_norms` shrinks a module: every factor of a product by the same ratio, the
#: slots ΔW is linear in, or every trained slot by its own norm (rotations).
Shrinking = Literal["product", "linear", "parameters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How an algorithm is trained.

    Parameters
    ----------
    arguments
        The network arguments that apply, by the names users give them; those for every
        algorithm (:data:`COMMON_ARGUMENTS`) not among them.
    kinds
        The layers it can train.
    init
        Where training starts.
    layouts
        The forms it can start with, and that training can go on from.
    optional
        Slots of those that are trained where they are there.
    structured
        The faster forward, or None where building ΔW is the only one.
    up
        Slots whose inputs are the rank: the factors that LoRA+ trains faster.
    rank_axes
        Slots and axes that `rank_dropout` drops; empty: it drops rows of ΔW.
    nested_axes
        Slots and axes whose ranks are trained in blocks of `block_size`: each step one block
        and, held still, those before it.
    shrinking
        See :data:`Shrinking`.
    learning_rate
        A usual one, the default of `train`.
    rank
        A usual one, the default of `train`; the default alpha is half of it.
    """

    arguments: frozenset[str]
    init: InitFn
    learning_rate: float
    layouts: tuple[Layout, ...]
    optional: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset({"linear", "conv"})
    structured: Structured | None = None
    up: frozenset[str] = frozenset()
    rank_axes: tuple[tuple[str, int], ...] = ()
    nested_axes: tuple[tuple[str, int], ...] = ()
    shrinking: Shrinking = "product"
    rank: int = 16


@dataclass(frozen=True, slots=True)
class Untrainable:
    """Why an algorithm cannot be trained."""

    reason: str


#: Arguments that any trained module takes.
COMMON_ARGUMENTS = frozenset({"dropout", "rank_dropout", "rank_dropout_scale", "module_dropout"})
#: Those of an algorithm with a rank and a scale.
RANK_ARGUMENTS = frozenset({"dim", "alpha", "conv_dim", "conv_alpha", "rs_lora", "use_scalar"})
#: Those of the three that take CP cores and DoRA.
FACTOR_ARGUMENTS = RANK_ARGUMENTS | {"use_conv_cp", "dora_wd", "wd_on_output"}
#: Those that say which factors LoRA+ trains faster.
LORA_PLUS_ARGUMENTS = frozenset(
    {"loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"}
)


# --- initial values ------------------------------------------------------------------------


def kaiming(shape: Shape, generator: torch.Generator) -> Tensor:
    """Uniform in ``±1/√fan_in``: `kaiming_uniform_(a=√5)`, what `nn.Linear` starts from."""
    fan_in = math.prod(shape[1:])
    return torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)


def normal(shape: Shape, generator: torch.Generator, *, std: float) -> Tensor:
    """Normal around 0."""
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def zeros(*shape: int) -> Tensor:
    """Zeros."""
    return torch.zeros(shape)


# --- structured forms ----------------------------------------------------------------------


def on_rows(delta: DeltaFn) -> OutputFn:
    """``output`` of a change ``ΔW = M W`` that works on the rows of the weight.

    ``op(x, M W) = M op(x, W)``: the formula for the weight is the formula for the output.
    """

    def output(module: Bound, layer: TrainableLayer, x: Tensor, base: BaseFn) -> Tensor:
        unchanged = base(x)
        rows = layer.rows(unchanged)
        return unchanged + layer.from_rows(delta(module, tuple(rows.shape), rows), unchanged)

    return output
