"""What a merge method gets and declares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lycotool.linalg.philox import uniform

if TYPE_CHECKING:
    from torch import Tensor

#: What the sum of agreeing changes is divided by, element by element: nothing, how many of
#: them there are, or the sum of their weights.
Normalize = Literal["none", "count", "weight"]

#: Whose sign wins an element: that of the sum, or that of the majority.
Consensus = Literal["total", "frequency"]

#: Which vectors are interpolated on a sphere.
Along = Literal["whole", "rows", "columns"]


@dataclass(frozen=True, slots=True)
class Stream:
    """An unlimited sequence of random numbers of its own."""

    key: int
    number: int

    def uniform(self, like: Tensor) -> Tensor:
        """Numbers in [0, 1), one for each element of ``like``."""
        flat = uniform(like.numel(), key=self.key, stream=self.number, device=like.device)
        return flat.reshape(like.shape)


@dataclass(frozen=True, slots=True)
class Change:
    """One adapter's change of a layer, and how it takes part.

    Attributes
    ----------
    tensor
        ``w·ΔW``; ΔW itself for a method whose :attr:`Method.strengths` are ratios.
    weight
        ``w``.
    density
        Share of the elements to keep.
    gamma
        Share of the largest elements to drop.
    epsilon
        How far the probability to keep an element departs from ``density``.
    stream
        For random methods.
    """

    tensor: Tensor
    weight: float = 1.0
    density: float = 1.0
    gamma: float = 0.0
    epsilon: float = 0.0
    stream: Stream = Stream(0, 0)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a method is told beside the changes.

    Attributes
    ----------
    scale
        λ: factor of the combined change.
    t
        Where to interpolate, from 0 (the first) to 1 (the second).
    """

    scale: float = 1.0
    normalize: Normalize = "none"
    consensus: Consensus = "total"
    t: float = 0.5
    along: Along = "whole"


#: ``(changes, settings) -> ΔW``. Changes have one shape, dtype and device, and so has the result.
CombineFn = Callable[[Sequence[Change], Settings], "Tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One entry of the registry.

    Parameters
    ----------
    name, title
        What users call it; what it stands for.
    summary
        What it computes, in a line.
    citation
        The paper, and the implementation that was read beside it.
    combine
        The formula, on dense changes; None for the plain sum, which factors express exactly.
    needs_rank
        Whether the result is to be truncated.
    options
        Names of the options it takes, without dashes; the rest do not go with it.
    needs
        Those of them without a default.
    normalize
        What it divides by unless told otherwise.
    adapters
        How many adapters it combines: at least, and at most (None for any number).
    is_random
        Whether it takes a seed.
    strengths
        Whether a strength scales its adapter's change, or only its share of the mixture.
    """

    name: str
    title: str
    summary: str
    citation: str
    combine: CombineFn | None = None
    needs_rank: bool = False
    options: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    normalize: Normalize = "none"
    adapters: tuple[int, int | None] = (1, None)
    is_random: bool = False
    strengths: Literal["scale", "ratio"] = "scale"
