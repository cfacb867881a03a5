"""The work of :mod:`lycotool.ops.extract`: read pairs ahead, subtract, store, account."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lycotool.devices import own_stream, ready_for_threads
from lycotool.distributed import World
from lycotool.errors import IncompatibleError, NumericError
from lycotool.io.dtypes import to_torch
from lycotool.io.prefetch import prefetched
from lycotool.io.store import TensorStore
from lycotool.io.writer import FilePlan, TensorPlan
from lycotool.lazy import torch
from lycotool.linalg import ranks
from lycotool.linalg.dense import exact
from lycotool.linalg.eigen import one_matrix_a_thread
from lycotool.linalg.finite import extremes, is_finite
from lycotool.linalg.underflow import Underflow
from lycotool.models.architecture import guess_checkpoint
from lycotool.models.layers import Param
from lycotool.ops._batches import Batches, in_background
from lycotool.ops._common import Progress, listed, provenance, saved_dtype
from lycotool.ops._forms import DEFAULT_RANK, Difference, Forms, Stored, save, square
from lycotool.ops._pairs import Pair, pair_layers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lycotool.ops.extract import ExtractOptions

#: Bytes of weights read ahead of the computation, and threads that read them. One thread is
#: as fast as most disks; a GPU is fed from the page cache by four, while it works on a batch.
_READ_AHEAD = {"cpu": (128 * 2**20, 1), "cuda": (512 * 2**20, 4)}

#: Bytes of an element that is computed with, float64 apart.
_COMPUTED_BYTES = 4

#: Bytes of differences held back to be decomposed together, on a CPU; enough to share the
#: overhead of small layers. A GPU holds back 1 GiB, and at most this share of its memory: what
#: is held back and two batches at work take about thirteen times as much.
_BATCH_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
_BATCH_SHARE = 1 / 32

#: Batches decomposed beside the reading and subtracting of the next: on a GPU one is computed
#: while the small eigenproblems of another are solved on the CPU. 0 is one after the other.
_AT_ONCE = {"cpu": 0, "cuda": 2}


@dataclass(frozen=True, slots=True)
class ModuleExtract:
    """One layer: what was stored, and the share of the difference's norm it captures."""

    name: str
    layer: str
    type: str
    rank: int | None
    norm: float
    captured: float


@dataclass(slots=True)
class Energy:
    """Squared norms of the differences, and of what is left of them, by component."""

    total: dict[str, float] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)

    def add(self, component: str, total: float, left: float) -> None:
        """Count one layer."""
        self.total[component] = self.total.get(component, 0.0) + total
        self.left[component] = self.left.get(component, 0.0) + left

    def captured(self) -> dict[str, float]:
        """Shares by component, and ``all``."""
        shares = {c: 1 - self.left[c] / total if total else 1.0 for c, total in self.total.items()}
        whole = sum(self.total.values())
        return {**shares, "all": 1 - sum(self.left.values()) / whole if whole else 1.0}


@dataclass(frozen=True, slots=True)
class _Raw:
    """One pair as stored: the two weights, the two biases where both have one."""

    base: Tensor
    tuned: Tensor
    bias: tuple[Tensor, Tensor] | None


@dataclass(slots=True)
class _Result:
    """What became of one pair, until all are done and can be reported in order.

    ``dropped`` is the squared norm of a difference that ``--min-diff`` leaves out.
    """

    largest: float = 0.0
    dropped: float = 0.0
    weight: Stored | None = None
    bias: Tensor | None = None
    saved_bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Waiting:
    """One pair's weights as matrices on the device, as stored, until their batch's turn."""

    pair: Pair
    base: Tensor
    tuned: Tensor
    result: _Result


@dataclass(slots=True)
class _Groups:
    """Pairs by number that are stored together; ``of`` is the group of a pair, where it has one."""

    members: list[list[int]] = field(default_factory=list)
    of: dict[int, int] = field(default_factory=dict)

    def add(self, group: list[int]) -> None:
        """Add a group."""
        self.of |= dict.fromkeys(group, len(self.members))
        self.members.append(group)


class Extractor:
    """One extraction, from the pairs to the adapter's tensors.

    Attributes
    ----------
    modules
        What was stored, in the order of the base checkpoint.
    energy
        How much of the difference that is.
    skipped
        Layers that are not in the adapter, by reason.
    warnings
        What was asked for and had no effect.
    underflow
        What became zero where it was stored, in all processes.
    """

    def __init__(
        self,
        base: TensorStore,
        tuned: TensorStore,
        options: ExtractOptions,
        progress: Progress,
        world: World,
    ) -> None:
        self._base, self._tuned = base, tuned
        self._options = options
        self._progress = progress
        self._world = world
        self._device = world.device
        self._pairs = pair_layers(base, tuned, include=options.include, exclude=options.exclude)
        self._forms = Forms(options)
        self.modules: list[ModuleExtract] = []
        self.energy = Energy()
        self.skipped = self._pairs.skipped
        self.warnings = self._pairs.warnings
        self.underflow = Underflow()

    def run(self) -> dict[str, Tensor] | None:
        """The adapter's tensors by key; None in a process that is not the first of several.

        Raises
        ------
        IncompatibleError
            If nothing differs, or a layer's difference has no such form.
        NumericError
            If a checkpoint has NaN or infinite values.
        """
        with one_matrix_a_thread() if self._device.type == "cuda" else nullcontext():
            return self._run(self._pairs.chosen)

    def _run(self, pairs: Sequence[Pair]) -> dict[str, Tensor] | None:
        if self._options.mode in ("size", "error"):
            self._allocate(pairs)
        groups = self._groups(pairs)
        own = self._own(pairs, groups)
        self._progress.start("extract", sum(self._nbytes(pairs[index]) for index in own))
        mine = {index: _Result() for index in own}
        ready_for_threads(self._device)
        with in_background(self._store_alike, _AT_ONCE[self._device.type]) as store:
            waiting: dict[int, list[_Waiting]] = {}
            for index, (pair, raw) in zip(own, self._read([pairs[index] for index in own]), strict=True):
                group = groups.of.get(index)
                held = self._compute(pair, raw, mine[index], is_held=group is not None)
                if group is not None and held is not None:
                    together = waiting.setdefault(group, [])
                    together.append(held)
                    if len(together) == len(groups.members[group]):
                        store(waiting.pop(group))
                self._progress.advance(self._nbytes(pair))
        self._forms.unfit = [one for found in self._world.gather(self._forms.unfit) for one in found]
        self._refuse_unfit()
        for vanished in self._world.gather(self._forms.underflow.found):
            self.underflow.found |= vanished
        everything = self._world.collect(mine)
        if everything is None:
            return None
        found = {index: result for part in everything for index, result in part.items()}
        results = [found[index] for index in range(len(pairs))]
        tensors: dict[str, Tensor] = {}
        for pair, result in zip(pairs, results, strict=True):
            slots = self._report(pair, result)
            tensors |= {f"{pair.name}.{slot}": tensor for slot, tensor in slots.items()}
        if not tensors:
            raise IncompatibleError(
                "the checkpoints do not differ in any layer", path=self._tuned.path,
                details=[f"{reason}: {len(names)}" for reason, names in self.skipped.items()],
                hint="name the base first, then the checkpoint that was tuned; `lycotool inspect FILE --hashes` tells equal files",
            )  # fmt: skip
        return tensors

    def _groups(self, pairs: Sequence[Pair]) -> _Groups:
        """Which pairs are stored together: the same whatever process does it."""
        groups = _Groups()
        batches: Batches[int] = Batches(groups.add, limit=self._world.share(self._batch_limit()))
        for index, pair in enumerate(pairs):
            stored = [store.info(side.weight.key).dtype for store, side in
                      ((self._base, pair.base), (self._tuned, pair.tuned))]  # fmt: skip
            kind = self._forms.kind(pair, saved_dtype(self._options.dtype, stored[1]))
            if kind is not None:
                batches.add((kind, *stored), index, math.prod(pair.base.weight.shape) * _COMPUTED_BYTES)
        batches.finish()
        return groups

    def _own(self, pairs: Sequence[Pair], groups: _Groups) -> list[int]:
        """The pairs of this process in their order: whole groups, the work being divided evenly."""
        units = [*groups.members, *([index] for index in range(len(pairs)) if index not in groups.of)]

        def work(unit: Sequence[int]) -> int:
            shapes = [pairs[index].base.weight.shape for index in unit]
            return sum(
                math.prod(shape) * min(shape[0], math.prod(shape[1:])) if shape else 1 for shape in shapes
            )

        loads = [0] * self._world.size
        own: list[int] = []
        for unit in sorted(units, key=work, reverse=True):
            rank = loads.index(min(loads))
            loads[rank] += work(unit)
            if rank == self._world.rank:
                own += unit
        return sorted(own)

    def metadata(self) -> dict[str, str]:
        """What loaders and people read."""
        options = self._options
        used = {m.rank for m in self.modules if m.rank is not None}
        dim = str(used.pop()) if len(used) == 1 else "Dynamic"
        if used and options.mode == "fixed" and options.algo in ("lora", "dora"):
            dim = str(options.rank or DEFAULT_RANK)  # layers too small for it have less
        algo = {"lora": "locon", "dora": "locon"}.get(options.algo, options.algo)
        arguments = {"algo": "full" if options.mode == "full" else algo}
        if options.algo == "dora":
            arguments |= {"dora_wd": "True", "wd_on_output": str(options.dora_axis == "out")}
        if options.conv_rank is not None:
            arguments |= {"conv_dim": str(options.conv_rank), "conv_alpha": str(options.conv_rank)}
        if options.use_conv_cp:
            arguments["use_tucker"] = "True"
        guess = guess_checkpoint(self._base.shapes, self._base.metadata).name
        versions = {"SD 1.x": "sd_v1", "SD 2.x": "sd_v2", "SDXL": "sdxl_base_v1-0"}
        metadata = {
            "ss_network_module": "lycoris.kohya",
            "ss_network_dim": dim,
            "ss_network_alpha": dim,
            "ss_network_args": json.dumps(arguments),
            "ss_training_comment": f"extracted by lycotool: {Path(self._tuned.path).name} - {Path(self._base.path).name}",
            "ss_v2": str(guess == "SD 2.x"),
        }
        if guess in versions:
            metadata["ss_base_model_version"] = versions[guess]
        recipe = {
            "base": Path(self._base.path).name, "tuned": Path(self._tuned.path).name,
            "algo": options.algo, "mode": options.mode, "seed": options.seed,
        }  # fmt: skip
        return metadata | provenance("extract", json.dumps(recipe))

    # --- reading -------------------------------------------------------------------------

    def _read(self, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, _Raw]]:
        window, workers = _READ_AHEAD[self._device.type]
        return prefetched(pairs, self._load, self._nbytes, window=window, workers=workers)

    def _nbytes(self, pair: Pair) -> int:
        return self._base.info(pair.base.weight.key).nbytes + self._tuned.info(pair.tuned.weight.key).nbytes

    def _load(self, pair: Pair) -> _Raw:
        pinned = self._device.type == "cuda"
        base = self._base.tensor(pair.base.weight.key, pinned=pinned)
        tuned = self._tuned.tensor(pair.tuned.weight.key, pinned=pinned)
        bias = None
        if pair.base.bias is not None and pair.tuned.bias is not None:
            bias = (self._base.tensor(pair.base.bias.key), self._tuned.tensor(pair.tuned.bias.key))
        return _Raw(base, tuned, bias)

    def _subtracted(self, base: Tensor, tuned: Tensor, params: tuple[Param, Param]) -> tuple[Tensor, float]:
        """``tuned - base`` and its largest absolute value, which is finite.

        Raises
        ------
        NumericError
            If either has NaN or infinite values, or the difference overflows.
        """
        delta = tuned - base
        largest = max(map(abs, extremes(delta))) if delta.numel() else 0.0
        if not math.isfinite(largest):
            self._refuse_not_finite(params)
        return delta, largest

    def _refuse_not_finite(self, params: tuple[Param, Param]) -> NoReturn:
        """Say which of two parameters is not finite."""
        for store, param in zip((self._base, self._tuned), params, strict=True):
            if not is_finite(store.tensor(param.key)):
                raise NumericError("has NaN or infinite values", path=store.path, key=param.key)
        raise NumericError("the difference overflows", path=self._tuned.path, key=params[1].key)

    # --- computing -----------------------------------------------------------------------

    def _batch_limit(self) -> int:
        limit = _BATCH_BYTES[self._device.type]
        if self._device.type == "cuda":
            memory = torch.cuda.get_device_properties(self._device).total_memory
            limit = min(limit, int(memory * _BATCH_SHARE))
        return limit

    def _compute(self, pair: Pair, raw: _Raw, result: _Result, *, is_held: bool) -> _Waiting | None:
        """Store one pair's weight, or give what is held back for its batch; subtract its bias."""
        dtype = saved_dtype(self._options.dtype, self._tuned.info(pair.tuned.weight.key).dtype)
        waiting = None
        if not is_held:
            layer, result.largest = self._difference(pair, raw)
            if result.largest > self._options.min_diff:
                result.weight = self._forms.store(layer)
            elif result.largest:
                result.dropped = square(layer.delta)
        else:
            base, tuned = (
                param.view(stored.to(self._device, non_blocking=True)).flatten(1)
                for stored, param in ((raw.base, pair.base.weight), (raw.tuned, pair.tuned.weight))
            )
            waiting = _Waiting(pair, base, tuned, result)
        result.bias = self._bias(pair, raw)
        if result.bias is not None:
            result.saved_bias = save(result.bias, dtype, pair, "diff_b", self._forms.underflow)
        return waiting

    def _store_alike(self, group: list[_Waiting]) -> None:
        """Subtract and store the pairs of one batch."""
        with own_stream(self._device):
            deltas = _stacked([one.tuned for one in group]) - _stacked([one.base for one in group])
            low, high = deltas.flatten(1).aminmax(dim=1)
            changed: list[int] = []
            for index, largest in enumerate(torch.maximum(low.abs(), high.abs()).tolist()):
                pair, result = group[index].pair, group[index].result
                if not math.isfinite(largest):
                    self._refuse_not_finite((pair.base.weight, pair.tuned.weight))
                result.largest = largest
                if largest > self._options.min_diff:
                    changed.append(index)
                elif largest:
                    result.dropped = square(deltas[index])
            if not changed:
                return
            pairs = [group[index].pair for index in changed]
            dtype = saved_dtype(self._options.dtype, self._tuned.info(pairs[0].tuned.weight.key).dtype)
            kept = deltas if len(changed) == len(group) else deltas[changed]
            for index, stored in zip(changed, self._forms.store_alike(pairs, kept, dtype), strict=True):
                group[index].result.weight = stored

    def _difference(self, pair: Pair, raw: _Raw) -> tuple[Difference, float]:
        """One pair's difference, and its largest absolute value."""
        base = self._compute_form(raw.base, pair.base.weight)
        tuned = self._compute_form(raw.tuned, pair.tuned.weight).reshape(base.shape)
        delta, largest = self._subtracted(base, tuned, (pair.base.weight, pair.tuned.weight))
        stored = self._tuned.info(pair.tuned.weight.key).dtype
        kept = base if self._forms.needs_base else None
        saved = saved_dtype(self._options.dtype, stored)
        rounding = torch.finfo(to_torch(stored)).eps
        return Difference(pair, delta, kept, saved, rounding, self._forms.underflow), largest

    def _compute_form(self, stored: Tensor, param: Param) -> Tensor:
        """A parameter in float32 (float64 if stored so) on the device."""
        return param.view(_computed(stored.to(self._device, non_blocking=True)))

    def _bias(self, pair: Pair, raw: _Raw) -> Tensor | None:
        """The bias's difference, or None where there is none."""
        if raw.bias is None or pair.base.bias is None or pair.tuned.bias is None:
            return None
        base, tuned = raw.bias
        dtype = torch.float64 if torch.float64 in (base.dtype, tuned.dtype) else torch.float32
        params = (pair.base.bias, pair.tuned.bias)
        delta, largest = self._subtracted(
            params[0].view(base.to(dtype)), params[1].view(tuned.to(dtype)), params
        )
        return delta if largest > self._options.min_diff else None

    def _allocate(self, pairs: Sequence[Pair]) -> None:
        """Ranks of all matrices together, from their whole spectra.

        The file at rank 1 is planned exactly, so that a size is spent to the last rank.
        """
        mine: dict[int, tuple[dict[str, TensorPlan], Tensor | None, int]] = {}
        own = range(self._world.rank, len(pairs), self._world.size)
        for index, (pair, raw) in zip(own, self._read([pairs[index] for index in own]), strict=True):
            layer, largest = self._difference(pair, raw)
            slots: dict[str, TensorPlan] = {}
            spectrum = None
            if largest > self._options.min_diff:
                slots = self._forms.slots_at_rank_1(layer)
                if pair.is_matrix:
                    spectrum = exact(layer.delta.flatten(1)).values.cpu()
            if (bias := self._bias(pair, raw)) is not None:
                slots["diff_b"] = TensorPlan(layer.dtype, tuple(bias.shape))
            cost = sum(layer.delta.flatten(1).shape) if pair.is_matrix else 0
            mine[index] = slots, spectrum, cost * TensorPlan(layer.dtype, (1,)).nbytes
        found = {index: one for part in self._world.gather(mine) for index, one in part.items()}
        chosen: list[Pair] = []
        values: list[Tensor] = []
        costs: list[int] = []
        plans: dict[str, TensorPlan] = {}
        for index, pair in enumerate(pairs):
            slots, spectrum, cost = found[index]
            plans |= {f"{pair.name}.{slot}": plan for slot, plan in slots.items()}
            if spectrum is not None:
                chosen.append(pair)
                values.append(spectrum)
                costs.append(cost)
        caps = [self._forms.cap(pair) for pair in chosen]
        if self._options.size is None:
            picked = ranks.allocate(values, costs, caps=caps, error=self._options.error)
        else:
            least = FilePlan(plans, self.metadata(), hashed=True).nbytes + 8 * len(plans)
            if least > self._options.size:
                raise IncompatibleError(
                    f"{self._options.size} bytes are too few: rank 1 of every layer needs {least}",
                    path=self._tuned.path,
                    hint=f"`--size {-(-least // 1000)}KB` is the least",
                )
            budget = sum(costs) + self._options.size - least
            picked = ranks.allocate(values, costs, caps=caps, budget=budget)
        self._forms.ranks = {pair.name: rank for pair, rank in zip(chosen, picked, strict=True)}

    # --- reporting -----------------------------------------------------------------------

    def _refuse_unfit(self) -> None:
        if self._forms.unfit:
            worst = sorted(self._forms.unfit, reverse=True)
            raise IncompatibleError(
                f"{len(worst)} layers are no scaling of rows or columns, the worst by {worst[0][0]:.1%} of its change",
                path=self._tuned.path,
                details=listed([f"{name}: {share:.1%} of the change is left" for share, name in worst]),
                hint="`--algo lora` takes any difference",
            )

    def _report(self, pair: Pair, result: _Result) -> dict[str, Tensor]:
        """Count what one pair's module captures; its slots, none where nothing differs."""
        slots: dict[str, Tensor] = {}
        if (stored := result.weight) is not None:
            self.energy.add(pair.component, stored.total, stored.left)
            captured = math.sqrt(max(0.0, 1 - stored.left / stored.total))
            self._list(pair, stored.type, stored.rank, math.sqrt(stored.total), captured)
            slots = dict(stored.slots)
        elif result.dropped:
            self.energy.add(pair.component, result.dropped, result.dropped)
        if result.bias is not None and result.saved_bias is not None:
            left = result.bias - result.saved_bias.to(result.bias)
            self.energy.add(pair.component, square(result.bias), square(left))
            if not slots:  # nothing of the weight to report
                self._list(pair, "full", None, 0.0, 1.0)
            slots["b_norm" if "w_norm" in slots else "diff_b"] = result.saved_bias
        if not slots:
            self._pairs.skip("no more than --min-diff" if result.largest else "unchanged", pair.base.path)
        return slots

    def _list(self, pair: Pair, kind: str, rank: int | None, norm: float, captured: float) -> None:
        self.modules.append(ModuleExtract(pair.name, pair.base.path, kind, rank, norm, captured))


def _computed(stored: Tensor) -> Tensor:
    """In float32; float64 if stored so."""
    return stored if stored.dtype == torch.float64 else stored.to(torch.float32)


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices of equal shapes and dtypes to compute with, ``(batch, m, n)``."""
    return _computed(torch.stack(list(matrices)))
