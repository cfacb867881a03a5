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
from lycotool.linalg.low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.algorithms.base import Bound, Layout, Shape, Sizes
    from lycotool.algorithms.dora import Axis


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

#: Small tensors made of the slots alone.
Operands = Mapping[str, "Tensor"]

#: ``(operands, layer, x) -> op(x, ΔW)``.
ChangeFn = Callable[[Operands, TrainableLayer, "Tensor"], "Tensor"]

#: ``(operands, layer, x, base) -> op(x, W')``, without the bias.
OutputFn = Callable[[Operands, TrainableLayer, "Tensor", BaseFn], "Tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Structured:
    """A forward that does not build ΔW, for layers of one group of channels.

    Of ``change`` and ``output`` one is there, or neither: the operands are then the exact
    low-rank factors of ΔW, applied in a row (:func:`low_rank_form`), over which DoRA needs no ΔW
    either.

    Parameters
    ----------
    operands
        What the layer's input meets, from the slots. It reads neither x nor W and works under
        `torch.func.vmap`: a step makes the operands of all equal layers in one go.
    change
        For a change that is added to the weight.
    output
        From ``base(x) = op(x, W)``, both without the bias, for a change that multiplies the weight.
    on_gpu
        ``(operands, layer) -> operands`` that a GPU is faster with, none where it has no better ones:
        ``{"up", "down"}``, factors of ΔW; ``{"up", "down", "mixing"}`` or ``{"first", "second"}``, of
        a Kronecker product, see :mod:`lycotool.training.kronecker`.
    cost
        Multiply-adds for each position of the output, besides those of the base. Applying ΔW
        costs the number of the weight's elements.
    """

    cost: Callable[[Sizes, TrainableLayer], int]
    operands: Callable[[Bound], Operands]
    change: ChangeFn | None = None
    output: OutputFn | None = None
    on_gpu: Callable[[Operands, TrainableLayer], Operands] | None = None

    @property
    def is_low_rank(self) -> bool:
        """Whether the operands are factors of ΔW: see :func:`low_rank_of`."""
        return self.change is None and self.output is None


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


def low_rank_form(
    factors: Callable[[Bound], LowRank | None], cost: Callable[[Sizes, TrainableLayer], int]
) -> Structured:
    """The form of a change with exact low-rank factors."""

    def operands(module: Bound) -> Operands:
        low = factors(module)
        if low is None:
            raise ValueError("the change has a part besides its factors")
        return operands_of(low)

    return Structured(operands=operands, cost=cost)


#: Operands that are nothing but factors of ΔW.
FACTORS = frozenset({"up", "down", "core"})


def operands_of(low: LowRank) -> Operands:
    """Factors by name."""
    found = {"up": low.up, "down": low.down}
    return found if low.core is None else {**found, "core": low.core}


def low_rank_of(operands: Operands) -> LowRank:
    """The inverse of :func:`operands_of`; other operands beside them stay away."""
    return LowRank(operands["up"], operands["down"], operands.get("core"))


def on_rows(change: Callable[[Operands, Tensor], Tensor]) -> OutputFn:
    """``output`` of a change ``ΔW = M W`` that works on the rows of the weight.

    ``op(x, M W) = M op(x, W)``: the formula for the weight is the formula for the output.

    Parameters
    ----------
    change
        ``(operands, rows) -> M rows``.
    """

    def output(operands: Operands, layer: TrainableLayer, x: Tensor, base: BaseFn) -> Tensor:
        unchanged = base(x)
        return unchanged + layer.from_rows(change(operands, layer.rows(unchanged)), unchanged)

    return output
