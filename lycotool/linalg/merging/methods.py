"""The registry of merge methods.

``xᵢ = wᵢ·ΔWᵢ`` throughout: a strength is its adapter's weight, so a negative one votes with
the opposite sign. Where papers or programs differ, the docstring says what is done here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lycotool.linalg.merging.base import Change, Method, Settings
from lycotool.linalg.merging.consensus import agreeing, total
from lycotool.linalg.merging.sparsify import drop_and_rescale, drop_by_rank, largest, without_extremes
from lycotool.linalg.merging.spherical import NEARLY_COLLINEAR, slerp

if TYPE_CHECKING:
    from torch import Tensor

_PEFT = "PEFT 0.21 peft/utils/merge_utils.py"
_MERGEKIT = "mergekit a6e4028"

#: The density that keeps everything is given by name, never by default: it would turn each
#: of these methods into another one.
_SPARSE = frozenset({"density"})
_SUM = frozenset({"lambda", "normalize"})
_VOTE = _SUM | {"consensus"}


def ties(changes: Sequence[Change], settings: Settings) -> Tensor:
    """Trim to the largest elements, elect a sign for each, and average what agrees with it.

    ``x̂ᵢ`` keeps the ``density`` largest elements of ``xᵢ``; ``γ = sgn(Σ x̂ᵢ)``; the result is
    λ times the mean of the ``x̂ᵢ`` with sign ``γ``. Yadav, Tam, Choshen, Raffel and Bansal,
    "TIES-Merging: Resolving Interference When Merging Models" (NeurIPS 2023, arXiv
    2306.01708), §4; trimmed layer by layer as PEFT and mergekit do, where the paper trims the
    whole model at once. An element whose votes cancel is taken as positive, as there.
    """
    pruned = [largest(change.tensor, change.density) for change in changes]
    return agreeing(pruned, _weights(changes), settings)


def dare(changes: Sequence[Change], settings: Settings) -> Tensor:
    """Drop elements at random, divide the rest by the share that stays, and add up.

    Yu, Yu, Yu, Huang and Li, "Language Models are Super Mario: Absorbing Abilities from
    Homologous Models as a Free Lunch" (ICML 2024, arXiv 2311.03099), with drop rate
    ``1 - density``. mergekit rescales to the L1 norm from before instead.
    """
    return total(_dropped(changes), _weights(changes), settings)


def dare_ties(changes: Sequence[Change], settings: Settings) -> Tensor:
    """DARE's random dropping in place of the trimming of :func:`ties`; arXiv 2311.03099, §3."""
    return agreeing(_dropped(changes), _weights(changes), settings)


def magnitude_prune(changes: Sequence[Change], settings: Settings) -> Tensor:
    """The sum of the largest elements of each change; PEFT's ``magnitude_prune``."""
    pruned = [largest(change.tensor, change.density) for change in changes]
    return total(pruned, _weights(changes), settings)


def della(changes: Sequence[Change], settings: Settings) -> Tensor:
    """Drop elements at random, small ones rather than large ones, then elect and average.

    MAGPRUNE: within each row, the probability to keep an element rises evenly with the rank
    of its magnitude, from ``density - epsilon`` to ``density + epsilon``, and what stays is
    divided by its own probability. Deep, Bhardwaj and Poria, "DELLA-Merging: Reducing
    Interference in Model Merging through Magnitude-Based Sampling" (arXiv 2406.11617);
    ``epsilon`` is mergekit's, half the width of the paper's. mergekit rescales to the L1 norm
    from before instead.
    """
    dropped = [
        drop_by_rank(change.tensor, change.density, change.epsilon, change.stream) for change in changes
    ]
    return agreeing(dropped, _weights(changes), settings)


def breadcrumbs(changes: Sequence[Change], settings: Settings) -> Tensor:
    """The sum of the elements that are neither among the largest nor among the smallest.

    In each layer the ``gamma`` largest elements go first, then the smallest until ``density``
    of all are left. Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model
    Merging with Sparse Masks" (ECCV 2024, arXiv 2312.06795), counted as mergekit does.
    """
    masked = [without_extremes(change.tensor, change.density, change.gamma) for change in changes]
    return total(masked, _weights(changes), settings)


def spherical(changes: Sequence[Change], settings: Settings) -> Tensor:
    """From the first change (``t = 0``) to the second (``t = 1``) along the arc between them."""
    first, second = changes
    return slerp(first.tensor, second.tensor, settings.t, collinear=NEARLY_COLLINEAR)


def nuslerp(changes: Sequence[Change], settings: Settings) -> Tensor:
    """Along the arc between two changes, to the share ``w₂ / (w₁ + w₂)`` of the second.

    mergekit's NuSLERP on task vectors: strengths are ratios and scale nothing, opposite ones
    meet in the middle, and single rows or columns can be turned instead of the whole.
    """
    first, second = changes
    weight = first.weight + second.weight
    t = 0.5 if abs(weight) < 1e-6 else second.weight / weight
    return slerp(first.tensor, second.tensor, t, along=settings.along, collinear=1 - 1e-15)


def _weights(changes: Sequence[Change]) -> list[float]:
    return [change.weight for change in changes]


def _dropped(changes: Sequence[Change]) -> list[Tensor]:
    return [drop_and_rescale(change.tensor, change.density, change.stream) for change in changes]


def _registered(*methods: Method) -> Mapping[str, Method]:
    return {method.name: method for method in methods}


#: Merge methods by the names of ``--method``.
METHODS: Mapping[str, Method] = _registered(
    Method(
        name="exact",
        title="weighted sum",
        summary="Σ w·ΔW, from the factors where they are exact",
        citation="Ilharco et al., Editing Models with Task Arithmetic, arXiv 2212.04089",
    ),
    Method(
        name="svd",
        title="weighted sum, truncated",
        summary="the best approximation of Σ w·ΔW at a rank, size or error",
        citation="Eckart and Young, Psychometrika 1, 1936",
        needs_rank=True,
    ),
    Method(
        name="ties",
        title="TIES-Merging",
        summary="trim to the largest elements, elect signs, average what agrees",
        citation=f"Yadav et al., arXiv 2306.01708; read: {_PEFT} ties, {_MERGEKIT}",
        combine=ties,
        options=_SPARSE | _VOTE,
        needs=_SPARSE,
        normalize="count",
    ),
    Method(
        name="dare",
        title="DARE (Drop And REscale)",
        summary="drop elements at random, rescale the rest, add up",
        citation=f"Yu et al., arXiv 2311.03099; read: {_PEFT} dare_linear, {_MERGEKIT}",
        combine=dare,
        options=_SPARSE | _SUM | {"seed"},
        needs=_SPARSE,
        is_random=True,
    ),
    Method(
        name="dare-ties",
        title="DARE with sign election",
        summary="drop elements at random, rescale the rest, average what agrees in sign",
        citation=f"Yu et al., arXiv 2311.03099; read: {_PEFT} dare_ties, {_MERGEKIT}",
        combine=dare_ties,
        options=_SPARSE | _VOTE | {"seed"},
        needs=_SPARSE,
        normalize="count",
        is_random=True,
    ),
    Method(
        name="magnitude-prune",
        title="magnitude pruning",
        summary="keep the largest elements of each change, add up",
        citation=f"{_PEFT} magnitude_prune",
        combine=magnitude_prune,
        options=_SPARSE | _SUM,
        needs=_SPARSE,
    ),
    Method(
        name="della",
        title="DELLA-Merging (Drop and rEscaLe via sampLing with mAgnitude)",
        summary="drop small elements at random rather than large ones, average what agrees in sign",
        citation=f"Deep et al., arXiv 2406.11617; read: {_MERGEKIT}",
        combine=della,
        options=_SPARSE | _VOTE | {"epsilon", "seed"},
        needs=_SPARSE,
        normalize="count",
        is_random=True,
    ),
    Method(
        name="breadcrumbs",
        title="Model Breadcrumbs",
        summary="leave out the largest and the smallest elements, add up",
        citation=f"Davari and Belilovsky, arXiv 2312.06795; read: {_MERGEKIT}",
        combine=breadcrumbs,
        options=_SPARSE | _SUM | {"gamma"},
        needs=_SPARSE,
    ),
    Method(
        name="slerp",
        title="spherical linear interpolation",
        summary="between two changes along the arc from the first (t = 0) to the second (t = 1)",
        citation=f"Shoemake, SIGGRAPH 1985; read: {_MERGEKIT}",
        combine=spherical,
        options=frozenset({"t"}),
        adapters=(2, 2),
    ),
    Method(
        name="nuslerp",
        title="NuSLERP",
        summary="along the arc between two changes, the strengths being the shares",
        citation=f"{_MERGEKIT} merge_methods/nuslerp.py",
        combine=nuslerp,
        options=frozenset({"along"}),
        adapters=(2, 2),
        strengths="ratio",
    ),
)

#: Every option that belongs to some method, in the order of ``--help``.
OPTIONS: Sequence[str] = (
    "density", "gamma", "epsilon", "lambda", "normalize", "consensus", "t", "along", "seed",
)  # fmt: skip

#: Values of options that are left out.
DEFAULTS: Mapping[str, float] = {"gamma": 0.01, "epsilon": 0.15, "lambda": 1.0, "t": 0.5, "seed": 0}


def methods_with(option: str) -> list[str]:
    """Names of the methods that take an option."""
    return [method.name for method in METHODS.values() if option in method.options]
