"""Merged changes as LoRA factors of chosen ranks; see :mod:`lycotool.ops.merge`.

Where the sum has exact factors that are thin their small Gram matrices give its spectrum, else the
dense change does, one layer at a time. Ranks that depend on all layers together (a size, an error)
are chosen when every spectrum is known; only singular values are kept until then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.errors import UsageError
from lycotool.io.writer import TensorPlan
from lycotool.lazy import torch
from lycotool.linalg import ranks
from lycotool.linalg.dense import best_approximation, exact, leading
from lycotool.linalg.low_rank import LowRank
from lycotool.linalg.spectra import FactorSpectrum, Grams, grams, spectra
from lycotool.ops._budget import ranks_for_size
from lycotool.ops._merge_parts import Group
from lycotool.ops._merger import Merged, Merger

if TYPE_CHECKING:
    from torch import Tensor

#: Share of a layer's shorter side up to which factors are thin: nine matrices ``(r, r)`` in float64, as many
#: as there are of each layer at once, then take 3.6 times what the factors of a square layer take in float32.
_THIN = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOptions:
    """How far to truncate a merged adapter; all None leaves it as it is.

    ``rank`` and ``conv_rank`` (for kernels larger than 1; None is ``rank``) are ranks, or the
    most that ``size`` (bytes of the file) or ``error`` (relative, over the whole file) choose.
    """

    rank: int | None = None
    conv_rank: int | None = None
    size: int | None = None
    error: float | None = None

    @property
    def truncates(self) -> bool:
        """Whether any is given."""
        return any(value is not None for value in (self.rank, self.conv_rank, self.size, self.error))

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises
        ------
        UsageError
            If a value is out of range, or two of them contradict each other.
        """
        for name, rank in (("--rank", self.rank), ("--conv-rank", self.conv_rank)):
            if rank is not None and rank < 1:
                raise UsageError(f"{name} is {rank}, the smallest rank is 1")
        if self.size is not None and self.error is not None:
            raise UsageError("`--size` and `--error` exclude each other")
        if self.size is not None and self.size < 1:
            raise UsageError(f"--size is {self.size} bytes")
        if self.error is not None and not 0 <= self.error < 1:
            raise UsageError(f"--error is {self.error}, expected a share from 0 to 1")
        if self.rank is None and self.conv_rank is not None and self.size is None and self.error is None:
            raise UsageError("`--conv-rank` needs `--rank` for the other layers")

    def cap(self, kernel: Sequence[int], most: int) -> int:
        """The rank of a layer with this kernel, ``most`` where none is given."""
        rank = self.rank
        if math.prod(kernel) > 1 and self.conv_rank is not None:
            rank = self.conv_rank
        return most if rank is None else min(rank, most)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A layer to truncate.

    Attributes
    ----------
    values
        Singular values: all of them, or as many as the cap where ``made`` is known already.
    total
        ``‖ΔW‖²``.
    spectrum
        None where the change has no factors.
    made
        The result, where the options alone give the rank and the change has no factors.
    """

    group: Group
    values: Tensor
    total: float
    cost: int
    cap: int
    spectrum: FactorSpectrum | None = None
    made: Merged | None = None


class Truncation:
    """Merges layers into factors of the ranks that the options choose.

    Attributes
    ----------
    relative_error
        ``√(Σ σ²_discarded / Σ σ²)`` over the truncated layers.
    left
        ``Σ σ²_discarded`` of each.
    """

    def __init__(self, merger: Merger, options: RankOptions) -> None:
        self._merger = merger
        self._options = options
        self.relative_error = 0.0
        self.left: dict[tuple[str, str], float] = {}

    def merge(
        self,
        groups: Sequence[Group],
        *,
        size_of: Callable[[Sequence[tuple[Group, Merged]]], int],
        path: str,
        advance: Callable[[int], None],
    ) -> list[tuple[Group, Merged]]:
        """Every layer as it will be written, in the order of ``groups``.

        Parameters
        ----------
        size_of
            Gives the bytes of the file that some modules make.
        """
        candidates = self._candidates(groups, advance)
        chosen = {c.group.place: c for c in candidates}
        carried = {g.place: self._merger.merge(g) for g in groups if g.place not in chosen}
        picked = self._ranks(
            candidates,
            lambda: size_of([(g, carried.get(g.place) or self._at_rank_1(g)) for g in groups]),
            path,
        )
        for candidate, rank in zip(candidates, picked, strict=True):
            kept = float(candidate.values[:rank].square().sum())
            self.left[candidate.group.place] = max(0.0, candidate.total - kept)
        total = sum(candidate.total for candidate in candidates)
        self.relative_error = math.sqrt(sum(self.left.values()) / total) if total else 0.0
        made: dict[tuple[str, str], Merged] = dict(carried)
        for candidate, rank in zip(candidates, picked, strict=True):
            made[candidate.group.place] = self._truncated(candidate, rank)
            advance(candidate.group.nbytes)
        return [(group, made[group.place]) for group in groups]

    def _candidates(self, groups: Sequence[Group], advance: Callable[[int], None]) -> list[_Candidate]:
        """Everything that is a matrix, with its spectrum; equal ranks are decomposed in one batch."""
        found: dict[str, _Candidate] = {}
        waiting: dict[str, tuple[Group, Grams]] = {}
        for group in groups:
            if not group.has_weight or len(self._merger.shape(group)) < 2:
                continue
            factors = self._merger.factors(group)
            if factors is None or self._is_thick(factors, group):
                found[group.name] = self._from_dense(group)
            else:
                waiting[group.name] = group, grams(factors.folded())
            advance(group.nbytes)
        decomposed = spectra([small for _, small in waiting.values()])
        for (group, _), spectrum in zip(waiting.values(), decomposed, strict=True):
            found[group.name] = self._candidate(group, spectrum.values, spectrum=spectrum)
        return [found[group.name] for group in groups if group.name in found]

    def _is_thick(self, factors: LowRank, group: Group) -> bool:
        """Whether Gram matrices, which are kept for all layers, would be large beside the factors themselves.

        Never where the rank that is asked for keeps them as they are.
        """
        if self._options.size is None and self._options.error is None:
            shape = self._merger.shape(group)
            if factors.rank <= self._options.cap(shape[2:], min(factors.shape)):
                return False
        return factors.rank > _THIN * min(factors.shape)

    def _from_dense(self, group: Group) -> _Candidate:
        """A layer whose change has no factors; truncated at once where the rank is known."""
        weight, bias = self._merger.change(group)
        if weight is None:
            raise TypeError(group.name)
        matrix = weight.flatten(1)
        total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
        if self._options.size is not None or self._options.error is not None:
            return self._candidate(group, exact(matrix).values, total=total)
        cap = self._options.cap(weight.shape[2:], min(matrix.shape))
        best = leading(matrix[None], cap, seed=0)
        made = self._merger.as_lora(group, LowRank(best.up[0], best.down[0]), bias)
        return self._candidate(group, best.values[0].cpu(), total=total, made=made)

    def _candidate(
        self,
        group: Group,
        values: Tensor,
        *,
        total: float | None = None,
        spectrum: FactorSpectrum | None = None,
        made: Merged | None = None,
    ) -> _Candidate:
        shape = self._merger.shape(group)
        rows, columns = shape[0], math.prod(shape[1:])
        cost = TensorPlan(self._merger.dtype(group), (rows + columns,)).nbytes
        cap = self._options.cap(shape[2:], min(rows, columns))
        if total is None:
            total = float(values.square().sum())
        return _Candidate(group, values, total, cost, cap, spectrum, made)

    def _ranks(self, candidates: Sequence[_Candidate], at_rank_1: Callable[[], int], path: str) -> list[int]:
        options = self._options
        values, costs = [c.values for c in candidates], [c.cost for c in candidates]
        caps = [c.cap for c in candidates]
        if options.error is not None:
            return ranks.allocate(values, costs, caps=caps, error=options.error)
        if options.size is not None:
            return ranks_for_size(
                values, costs, caps=caps, size=options.size, at_rank_1=at_rank_1(), path=path
            )
        return [ranks.fixed(v, cap) for v, cap in zip(values, caps, strict=True)]

    def _at_rank_1(self, group: Group) -> Merged:
        """What :meth:`_truncated` gives at rank 1, as plans alone."""
        shape, dtype = self._merger.shape(group), self._merger.dtype(group)
        ones = (1,) * (len(shape) - 2)
        plans = {
            "lora_up.weight": TensorPlan(dtype, (shape[0], 1, *ones)),
            "lora_down.weight": TensorPlan(dtype, (1, *shape[1:])),
            "alpha": TensorPlan("F32", ()),
        }
        if self._merger.has_bias(group):
            plans["diff_b"] = TensorPlan(dtype, (shape[0],))
        return Merged(plans, dict, "lora", 1)

    def _truncated(self, candidate: _Candidate, rank: int) -> Merged:
        group = candidate.group
        if candidate.made is not None:
            return candidate.made
        factors = self._merger.factors(group)
        if factors is not None and rank >= factors.rank:
            return self._merger.as_lora(group, factors, self._merger.bias(group))
        if factors is not None and candidate.spectrum is not None:
            truncated = candidate.spectrum.truncated(rank, factors.folded())
            return self._merger.as_lora(group, truncated, self._merger.bias(group))
        weight, bias = self._merger.change(group)
        if weight is None:
            raise TypeError(group.name)
        return self._merger.as_lora(group, best_approximation(weight.flatten(1), rank, seed=0), bias)
