"""What an algorithm declares, and how its tensors are recognised.

An :class:`Algorithm` is one frozen value: key layouts with symbolic shapes, the formula of
its weight change, exact low-rank factors where they exist, and the rules `merge` and
`resize` obey. Capabilities are data: ``None`` means "cannot".

Names used throughout: ``W`` the base weight of shape ``(out, in, *kernel)``, ``c`` the scale
``alpha / rank``, ``ΔW`` the change at strength 1. At strength ``s`` the weight becomes
``W + s·ΔW`` for every algorithm; for those that are not additive (DoRA, OFT, BOFT)
``ΔW = W'(1) - W``, which makes ``s = 0`` give ``W`` back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lycotool.algorithms.training import Training, Untrainable
    from lycotool.lazy import torch
    from lycotool.linalg.low_rank import LowRank

Shape = tuple[int, ...]

#: Slot name to shape: one module of an adapter file, before any data is read.
Header = Mapping[str, Shape]

#: Symbol to size; ``*symbol`` binds a tuple.
Sizes = Mapping[str, "int | Shape"]

#: Slot name to tensor, in the dtype the caller computes in.
Tensors = Mapping[str, "torch.Tensor"]


class MismatchError(ValueError):
    """A module's shapes do not fit a layout; the text names slots, found and expected."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of a module.

    Parameters
    ----------
    name
        The suffix the trainers of this field write, such as ``lora_up.weight``.
    axes
        Symbolic shape. A word binds one size, the same in the whole module; a number must
        match; ``a*b`` is the product of words bound by earlier slots; a last ``*word`` binds
        all remaining sizes, ``*1`` demands that they are 1. ``scalar`` accepts the shapes
        ``()`` and ``(1,)``.
    required
        Whether the layout is incomplete without it.
    unused
        Why lycotool leaves this tensor aside, if it does; becomes a warning.
    may_be_empty
        Whether a size may be 0.
    """

    name: str
    axes: str
    required: bool = True
    unused: str = ""
    may_be_empty: bool = False


#: The tensor most algorithms scale by.
ALPHA = Slot("alpha", "scalar", required=False)


@dataclass(frozen=True, slots=True)
class Layout:
    """One way an algorithm's tensors are stored.

    Parameters
    ----------
    name
        Shown by ``inspect``.
    slots
        Every tensor the layout may have.
    rows, columns
        The sizes of the flattened base weight ``(out, in·kernel)`` that the bound sizes
        imply; ``None`` where they imply none.
    linear_in
        The slots to multiply by ``s`` so that the whole change is multiplied by ``s``;
        empty when no such set exists without the base weight.
    use_conv_cp
        Whether this is the CP (Tucker) form, named ``use_conv_cp`` or ``use_tucker`` by
        trainers.
    accepts
        A condition on the sizes beyond the axes; the text says what it demands.
    prefers
        Which reading to take when the shapes fit this layout and another one of the
        algorithm: the one whose sizes meet this condition.
    """

    name: str
    slots: tuple[Slot, ...]
    rows: Callable[[Sizes], int | None]
    columns: Callable[[Sizes], int | None]
    linear_in: tuple[str, ...] = ()
    use_conv_cp: bool = False
    accepts: tuple[Callable[[Sizes], bool], str] | None = None
    prefers: Callable[[Sizes], bool] | None = None

    @property
    def required(self) -> frozenset[str]:
        """Names of the slots the layout cannot do without."""
        return frozenset(slot.name for slot in self.slots if slot.required)

    @property
    def names(self) -> frozenset[str]:
        """Names of all slots."""
        return frozenset(slot.name for slot in self.slots)

    def claims(self, header: Header) -> bool:
        """Whether the names alone fit: all required ones, and no others than declared."""
        return self.required <= header.keys() <= self.names

    def bind(self, header: Header) -> Sizes:
        """Give every symbol its size.

        Raises
        ------
        MismatchError
            If a shape contradicts the axes or another slot.
        """
        sizes: dict[str, int | Shape] = {}
        source: dict[str, str] = {}
        for slot in self.slots:
            if slot.name in header:
                _bind_slot(slot, header[slot.name], sizes, source)
        if self.accepts is not None and not self.accepts[0](sizes):
            raise MismatchError(self.accepts[1])
        return sizes


def _bind_slot(slot: Slot, shape: Shape, sizes: dict[str, int | Shape], source: dict[str, str]) -> None:
    def mismatch() -> MismatchError:
        return MismatchError(f"{slot.name} has shape {list(shape)}, expected ({slot.axes})")

    if slot.axes == "scalar":
        if shape not in ((), (1,)):
            raise MismatchError(f"{slot.name} has shape {list(shape)}, expected one number")
        return
    words, rest = _words_of(slot.axes)
    if len(shape) < len(words) or (rest is None and len(shape) != len(words)):
        raise mismatch()
    bound: list[tuple[str, int | Shape]] = list(zip(words, shape, strict=False))
    if rest == "*1":
        if any(size != 1 for size in shape[len(words) :]):
            raise mismatch()
    elif rest is not None:
        bound.append((rest[1:], shape[len(words) :]))
    if 0 in shape and not slot.may_be_empty:
        word = next((word for word, size in bound if size == 0), "size")
        raise MismatchError(f"{word} 0 in {slot.name}: an empty tensor changes nothing")
    for word, size in bound:
        if word.isdigit():
            if size != int(word):
                raise mismatch()
            continue
        if "*" in word:
            expected: int | Shape = size_of(*word.split("*"))(sizes)
        else:
            expected = sizes.setdefault(word, size)
        if expected != size:
            where = f" in {source[word]}" if word in source else ""
            raise MismatchError(f"{word} is {_text(expected)}{where} but {_text(size)} in {slot.name}")
        source.setdefault(word, slot.name)


@lru_cache(maxsize=256)
def _words_of(axes: str) -> tuple[tuple[str, ...], str | None]:
    """The words of a slot's axes, and the last one by itself where it takes the axes that are left."""
    words = axes.split()
    rest = words.pop() if words and words[-1].startswith("*") else None
    return tuple(words), rest


def _text(size: int | Shape) -> str:
    return str(size) if isinstance(size, int) else "x".join(map(str, size)) or "none"


@dataclass(frozen=True, slots=True)
class Rule:
    """Whether an operation is allowed, why, and the way on when it is not."""

    allowed: bool
    reason: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Advice:
    """A recommendation.

    Parameters
    ----------
    text
        In words.
    on
        The values it is about: ``dim``, ``alpha``, ``factor``, ``learning_rate``.
    holds
        Whether such values follow it; None where no value can tell.
    """

    text: str
    on: frozenset[str] = frozenset()
    holds: Callable[[Mapping[str, float]], bool] | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read what files leave open; the defaults are what `design` decided.

    Attributes
    ----------
    alpha_zero
        A stored alpha of 0 means a change of zero (samplers) or alpha = rank (trainers).
    dora_strength
        How DoRA follows a strength other than 1: linear interpolation, or the formula of
        LyCORIS or PEFT; see :mod:`lycotool.algorithms.dora`.
    dylora_block_size
        LyCORIS trains DyLoRA with ``alpha / (rank / block_size)``, which its file does not
        tell; 1 is what every loader assumes.
    loha_cp_shared_core
        LoHa-CP files trained before LyCORIS 2.0.0 used ``hada_t1`` for both factors.
    glora_old_scale
        LyCORIS 1.8 to 2.2 trained the old GLoRA layout with the scale applied twice; samplers
        apply it once.
    """

    alpha_zero: Literal["zero", "rank"] = "zero"
    dora_strength: Literal["linear", "lycoris", "peft"] = "linear"
    dylora_block_size: int = 1
    loha_cp_shared_core: bool = False
    glora_old_scale: Literal["once", "twice"] = "twice"


DEFAULT_READING = Reading()


@dataclass(frozen=True, slots=True)
class Dims:
    """A module's numbers: ``scale`` is what its formula multiplies by.

    ``rank`` is None where the algorithm has none; ``alpha`` is None where none is stored.
    """

    rank: int | None
    alpha: float | None
    scale: float


@dataclass(frozen=True, slots=True)
class Bound:
    """What a formula gets: the tensors of one module and the numbers that go with them.

    ``switches`` holds values of switch slots that the caller has read already, so that no
    formula waits for a tensor on the way. ``memory`` is a contiguous tensor of the weight's size
    where the change may be put; who gives it wants no gradient, and the change only once.
    """

    tensors: Tensors
    layout: Layout
    sizes: Sizes
    dims: Dims
    reading: Reading = DEFAULT_READING
    switches: Mapping[str, bool] = field(default_factory=dict)
    memory: torch.Tensor | None = None

    def __getitem__(self, slot: str) -> torch.Tensor:
        return self.tensors[slot]

    def __contains__(self, slot: str) -> bool:
        return slot in self.tensors

    def get(self, slot: str) -> torch.Tensor | None:
        """The slot's tensor, or None where the module does not have it."""
        return self.tensors.get(slot)

    def switch(self, slot: str) -> bool:
        """Whether a slot that holds a switch is on."""
        return self.switches[slot] if slot in self.switches else bool(self.tensors[slot].item())

    def size(self, symbol: str) -> int:
        """The size bound to a symbol."""
        size = self.sizes[symbol]
        if not isinstance(size, int):
            raise TypeError(symbol)
        return size


#: One part of a stack of rows: a module, or so many rows that do not change.
StackPart = Bound | int

DimsFn = Callable[[Layout, Sizes, "float | None", Reading], Dims]

#: ``(module, shape, base) -> ΔW``, of that shape. ``base`` is W where the algorithm needs
#: it, else it may be None.
DeltaFn = Callable[[Bound, Shape, "torch.Tensor | None"], "torch.Tensor"]

#: ``(module, index)`` to slots; see :attr:`Algorithm.take_rows`.
TakeRowsFn = Callable[[Bound, "torch.Tensor"], "dict[str, torch.Tensor] | None"]

#: Parts to slots and scale; see :attr:`Algorithm.stack_rows`.
StackRowsFn = Callable[[Sequence[StackPart]], "tuple[dict[str, torch.Tensor], float] | None"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """One entry of the registry; ``None`` says "cannot".

    Parameters
    ----------
    name, title, citation
        What users call it; what it stands for; where it was published or first written.
    layouts
        Every stored form. Detection, validation, documentation and test data come from it.
    dims
        Sizes and stored alpha to rank, alpha and scale.
    delta
        The change of the weight at strength 1: the only copy of the formula.
    needs_base
        Whether ``delta`` depends on the base weight.
    bias_delta
        The change of the bias at strength 1, or None when the module changes none.
    factors
        Exact low-rank factors of ΔW, scale inside; absent when there are none without the
        base. May return None for a module that has none (a sparse part).
    kronecker_parts
        For a change that is a Kronecker product: its two parts, scale in the first.
    concat
        Exact sum of modules of one layout in the same layout, from ``(bound, weight)``
        pairs, for algorithms whose structure is closed under addition. Returns None for
        modules that cannot be summed that way.
    take_rows
        ``(module, index)`` to the slots of the module, in the same layout and dtypes, whose
        change of the weight (of those rows of the base, where it needs the base) and of the
        bias consists of the rows ``index`` of this module's, in that order. ``index`` is int64
        and names no row twice. The result is read with this module's :class:`Dims`: its rank
        is the same, so a stored alpha stays as it is. Returns None where this layout cannot
        hold exactly those rows.
    stack_rows
        The slots of one module whose changes are those of the parts below each other, and the
        scale to read them with: that of the parts, or 1 where they differ. An int stands for
        so many rows that do not change; one part at least is a module. A dtype is kept; parts
        of different dtypes are promoted. Returns None where the parts' layout cannot hold them
        exactly.
    allows_dora
        Whether trainers put DoRA over it.
    merge, merge_conv_cp, resize, resize_conv_cp
        The rules; the ``conv_cp`` ones default to the plain ones.
    training
        How it is trained, or why it cannot be.
    advice
        What is recommended, and how that is checked: warn, never refuse.
    """

    name: str
    title: str
    citation: str
    layouts: tuple[Layout, ...]
    dims: DimsFn
    delta: DeltaFn
    merge: Rule
    resize: Rule
    training: Training | Untrainable
    needs_base: bool = False
    bias_delta: Callable[[Bound], torch.Tensor | None] | None = None
    factors: Callable[[Bound], LowRank | None] | None = None
    kronecker_parts: Callable[[Bound], tuple[LowRank, LowRank]] | None = None
    concat: Callable[[list[tuple[Bound, float]]], dict[str, torch.Tensor] | None] | None = None
    take_rows: TakeRowsFn | None = None
    stack_rows: StackRowsFn | None = None
    allows_dora: bool = False
    merge_conv_cp: Rule | None = None
    resize_conv_cp: Rule | None = None
    advice: tuple[Advice, ...] = ()

    @property
    def advice_text(self) -> str:
        """All advice, for `inspect`."""
        return "; ".join(advice.text for advice in self.advice)

    def warnings(self, values: Mapping[str, float]) -> list[str]:
        """The advice that these values do not follow; advice on other values is left out."""
        return [
            f"{self.name}: {advice.text}"
            for advice in self.advice
            if advice.holds is not None and advice.on <= values.keys() and not advice.holds(values)
        ]


def stored_bias(module: Bound) -> torch.Tensor | None:
    """``bias_delta`` of an algorithm with nothing but ``diff_b``."""
    return module.get("diff_b")


def alpha_over_rank(rank: int, alpha: float | None, reading: Reading) -> Dims:
    """``c = alpha / rank``; a missing alpha is the rank, a stored 0 is read as asked."""
    if alpha is None or (alpha == 0 and reading.alpha_zero == "rank"):
        return Dims(rank, alpha, 1.0)
    return Dims(rank, alpha, alpha / rank)


def rank_dims(symbol: str) -> DimsFn:
    """``dims`` of an algorithm whose rank is one of its symbols."""

    def dims(layout: Layout, sizes: Sizes, alpha: float | None, reading: Reading) -> Dims:
        rank = sizes[symbol]
        if not isinstance(rank, int):
            raise TypeError(symbol)
        return alpha_over_rank(rank, alpha, reading)

    return dims


def no_rank(layout: Layout, sizes: Sizes, alpha: float | None, reading: Reading) -> Dims:
    """``dims`` of an algorithm without rank and alpha."""
    return Dims(None, None, 1.0)


def size_of(*symbols: str) -> Callable[[Sizes], int]:
    """The product of these symbols' sizes; a tuple counts with its product."""

    def product(sizes: Sizes) -> int:
        total = 1
        for symbol in symbols:
            size = sizes[symbol]
            for factor in (size,) if isinstance(size, int) else size:
                total *= factor
        return total

    return product


def unknown(sizes: Sizes) -> None:
    """For :attr:`Layout.rows` and :attr:`Layout.columns` that the tensors do not tell."""
