"""The work of :mod:`lycotool.ops.resize`: spectra, ranks, truncations, the written file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lycotool.algorithms import lora
from lycotool.devices import resolve_device
from lycotool.errors import IncompatibleError, RefusedError
from lycotool.io.dtypes import from_torch
from lycotool.io.writer import FilePlan, TensorPlan, prepare_output, write_file
from lycotool.lazy import torch
from lycotool.linalg import ranks
from lycotool.linalg.finite import is_finite
from lycotool.linalg.low_rank import LowRank
from lycotool.linalg.spectra import (
    FactorSpectrum,
    Grams,
    KroneckerSpectrum,
    spectra,
    spectrum_of_kronecker,
    stacked_grams,
    truncated_stack,
)
from lycotool.linalg.underflow import Underflow
from lycotool.models.naming import split_name
from lycotool.ops._adapter import Adapter, AdapterModule
from lycotool.ops._budget import ranks_for_size
from lycotool.ops._common import (
    Progress,
    as_bytes,
    cast_batch_checked,
    cast_checked,
    check_suffix,
    count_labels,
    provenance,
    refuse_warnings,
    saved_dtype,
)
from lycotool.ops._render import (
    STALE_METADATA,
    alpha_tensor,
    common_dtype,
    kept_form,
    kernel_of,
    network_arguments,
    outline,
    spelled,
)

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.algorithms.base import Bound
    from lycotool.ops.resize import ResizeOptions

#: LoRA factors and what is recomputed with them; a module's other tensors are carried over.
_FACTOR_SLOTS = frozenset({"lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha"})

#: The factors of a plain LoRA.
_TWO_FACTORS = ("lora_up.weight", "lora_down.weight")

#: Bytes of float32 factors that are worked on as one stack.
_STACK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20, "mps": 64 * 2**20}

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class ModuleResize:
    """One module before and after.

    ``kept_fro`` and ``kept_sum`` are the shares of the Frobenius norm and of the sum of the
    singular values that remain; ``max_ratio`` is the largest value over the smallest kept, None if that is 0.
    """

    name: str
    type: str
    old_rank: int
    new_rank: int
    kept_fro: float
    kept_sum: float
    max_ratio: float | None


@dataclass(frozen=True, slots=True)
class ResizeResult:
    """What was written, or would be."""

    outputs: tuple[str, ...]
    modules: tuple[ModuleResize, ...]
    carried: dict[str, int]
    ranks: dict[str, int]
    relative_error: float
    bytes_before: int
    bytes_after: int
    warnings: tuple[str, ...]
    dry_run: bool


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A module that can be truncated, with its spectrum (scale included)."""

    module: AdapterModule
    spectrum: FactorSpectrum | KroneckerSpectrum
    values: Tensor
    kernel: tuple[int, ...]
    cost: int
    count: int

    @property
    def is_convolution(self) -> bool:
        """Whether the conv rank applies: kernels larger than 1."""
        return math.prod(self.kernel) > 1

    def keeps_form_at(self, rank: int) -> bool:
        """Whether the module is one of that rank already."""
        module = self.module
        return _is_lora(module) and rank == module.dims.rank and not module.detected.layout.use_conv_cp


def ending(options: ResizeOptions) -> str:
    """``-r8``, ``-r8-c4``, ``-sv_fro0.9``, ``-32000000B``, ``-error0.05``."""
    if options.size is not None:
        return f"-{options.size}B"
    if options.error is not None:
        return f"-error{options.error:g}"
    if options.method == "fixed":
        conv = f"-c{options.conv_rank}" if options.conv_rank not in (None, options.rank) else ""
        return f"-r{options.rank}{conv}"
    parameter = "" if options.parameter is None else f"{options.parameter:g}"
    return f"-{options.method}{parameter}"


def _obey_rules(adapter: Adapter, options: ResizeOptions) -> list[AdapterModule]:
    """The modules to truncate; the rest is carried over, or refused.

    Raises
    ------
    RefusedError
        Naming each rule, the number of modules it refuses, and the way on.
    """
    chosen: list[AdapterModule] = []
    refused: dict[str, list[AdapterModule]] = {}
    for module in adapter.modules.values():
        detected = module.detected
        has_factors = detected.algorithm.factors is not None and detected.dora_slot is None
        if detected.resize_rule.allowed or (has_factors and options.to == "lora"):
            chosen.append(module)
        elif _has_rank(module) and not options.keep_refused:
            refused.setdefault(detected.label, []).append(module)
    if refused:
        details = [
            f"{label}: {len(group)} modules: {group[0].detected.resize_rule.reason}"
            for label, group in refused.items()
        ]
        remedies = dict.fromkeys(
            group[0].detected.resize_rule.remedy
            for group in refused.values()
            if group[0].detected.resize_rule.remedy
        )
        raise RefusedError(
            f"{sum(map(len, refused.values()))} of {len(adapter.modules)} modules cannot be resized",
            path=adapter.path,
            details=details,
            hint="; ".join([*remedies, "`--keep-refused` carries them over unchanged"]),
        )
    if not chosen:
        raise IncompatibleError(
            "no module in this file has a rank to resize",
            path=adapter.path,
            details=[f"{count} {label}" for label, count in count_labels(adapter).items()],
        )
    return chosen


def _has_rank(module: AdapterModule) -> bool:
    """Whether leaving a module as it is would surprise: full, norm and rotations have none."""
    detected = module.detected
    return module.dims.rank is not None or detected.algorithm.factors is not None or bool(detected.dora_slot)


def _is_lora(module: AdapterModule) -> bool:
    """Whether the module's factors are a LoRA's already, its scale in alpha."""
    return module.detected.algorithm.factors is lora.LORA.factors


class Resizer:
    """One resize, from spectra to the written file."""

    def __init__(self, adapter: Adapter, options: ResizeOptions, progress: Progress) -> None:
        self._adapter = adapter
        self._options = options
        self._progress = progress
        # Unknown tensors stay in the file: here they are only left alone.
        self._warnings = [w.replace(", left aside", ", carried over unchanged") for w in adapter.warnings]
        self._warnings += adapter.notes
        self._underflow = Underflow()

    def run(self, output: str) -> ResizeResult:
        """Choose the ranks and write."""
        check_suffix(output)
        options, adapter = self._options, self._adapter
        target = None
        if not (output == "-" and options.dry_run):
            target = prepare_output(output, inputs=adapter.store.files, force=options.force)
        chosen = _obey_rules(adapter, options)
        self._device = resolve_device(
            options.device, float64=True
        )  # takes seconds: what is wrong was said before
        self._progress.start("resize", 2 * adapter.store.nbytes)
        candidates = self._candidates(chosen)
        names = {module.name for module in chosen}
        carried = [module for module in adapter.modules.values() if module.name not in names]
        picked = self._ranks(candidates, carried)
        reports = tuple(_report(candidate, rank) for candidate, rank in zip(candidates, picked, strict=True))
        refuse_warnings(self._warnings, strict=options.strict)
        tensors, plan = self._build(candidates, picked, carried)
        refuse_warnings(lost := self._underflow.warnings(), strict=options.strict)
        if not options.dry_run:
            write_file(target, plan, lambda key: [as_bytes(tensors[key])])
        labels: dict[str, int] = {}
        for module in carried:
            labels[module.detected.label] = labels.get(module.detected.label, 0) + 1
        return ResizeResult(
            outputs=(output,),
            modules=reports,
            carried=labels,
            ranks=distribution(picked),
            relative_error=_relative_error(candidates, picked),
            bytes_before=sum(path.stat().st_size for path in adapter.store.files),
            bytes_after=plan.nbytes,
            warnings=(*self._warnings, *lost),
            dry_run=options.dry_run,
        )

    def _build(
        self, candidates: Sequence[_Candidate], picked: Sequence[int], carried: Sequence[AdapterModule]
    ) -> tuple[dict[str, Tensor], FilePlan]:
        """The new file's tensors and plan at these ranks."""
        tensors: dict[str, Tensor] = {}
        kept = [c.keeps_form_at(rank) for c, rank in zip(candidates, picked, strict=True)]
        changed = [
            pair for pair, keeps in zip(zip(candidates, picked, strict=True), kept, strict=True) if not keeps
        ]
        for group in self._stacks(changed, lambda pair: pair[0].module, lambda pair: pair[1]):
            tensors |= self._resized([candidate for candidate, _ in group], group[0][1])
        carried = [*carried, *(c.module for c, keeps in zip(candidates, kept, strict=True) if keeps)]
        for module in carried:
            tensors |= self._carried(module)
        keys = self._adapter.keys
        for key in (*keys.embeddings, *keys.unknown, *keys.orphans):
            tensors[key] = self._adapter.store.tensor(key)
        plans = {key: TensorPlan(from_torch(t.dtype), tuple(t.shape)) for key, t in tensors.items()}
        return tensors, FilePlan(plans, self._metadata(candidates, picked), hashed=True)

    def _candidates(self, modules: Sequence[AdapterModule]) -> list[_Candidate]:
        """Spectra of all modules; equal ranks are decomposed in one batch."""
        parts: dict[str, Grams] = {}
        found: dict[str, FactorSpectrum | KroneckerSpectrum] = {}
        for group in self._stacks(modules, lambda module: module):
            if group[0].detected.algorithm.kronecker_parts is not None:
                bound = self._load(group[0], check=True)
                first, second = group[0].detected.algorithm.kronecker_parts(bound)
                found[group[0].name] = spectrum_of_kronecker(first, second.folded())
            else:
                small = stacked_grams(*self._load_factors(group, check=True))
                parts |= {module.name: part for module, part in zip(group, small, strict=True)}
            for module in group:
                self._advance(module)
        found |= dict(zip(parts, spectra(list(parts.values())), strict=True))
        return [self._candidate(module, found[module.name]) for module in modules]

    def _stacks(
        self,
        items: Iterable[Item],
        module_of: Callable[[Item], AdapterModule],
        kind_of: Callable[[Item], Hashable] = lambda item: None,
    ) -> Iterator[list[Item]]:
        """Items whose modules' factors have equal shapes and dtypes, as many as make one stack.

        A module that is more than two factors stands alone.
        """
        limit = _STACK_BYTES[self._device.type]
        waiting: dict[Hashable, list[Item]] = {}
        for item in items:
            module = module_of(item)
            if not _is_two_factors(module):
                yield [item]
                continue
            infos = [self._adapter.store.info(module.keys[slot]) for slot in _TWO_FACTORS]
            kind = (kind_of(item), *((info.shape, info.dtype) for info in infos))
            group = waiting.setdefault(kind, [])
            group.append(item)
            if (len(group) + 1) * 4 * sum(info.numel for info in infos) > limit:
                yield waiting.pop(kind)
        yield from waiting.values()

    def _candidate(self, module: AdapterModule, spectrum: FactorSpectrum | KroneckerSpectrum) -> _Candidate:
        kernel = kernel_of(split_name(module.name).place, [module])
        rows, columns = outline(module)
        if rows is None or columns is None:
            raise IncompatibleError("its shape is unknown", path=self._adapter.path, key=module.name)
        if columns % math.prod(kernel):
            kernel = ()
        dtype = saved_dtype(self._options.dtype, common_dtype([(self._adapter, module)]))
        cost = (rows + columns) * TensorPlan(dtype, (1,)).nbytes
        scale = abs(module.dims.scale) if _is_lora(module) else 1.0
        return _Candidate(module, spectrum, spectrum.values * scale, kernel, cost, min(rows, columns))

    def _ranks(self, candidates: Sequence[_Candidate], carried: Sequence[AdapterModule]) -> list[int]:
        """The new rank of every module."""
        options = self._options
        caps = [self._cap(candidate) for candidate in candidates]
        values, costs = [c.values for c in candidates], [c.cost for c in candidates]
        if options.error is not None:
            return ranks.allocate(values, costs, caps=caps, error=options.error)
        if options.size is not None:
            at_rank_1 = self._build(candidates, [1] * len(candidates), carried)[1].nbytes
            return ranks_for_size(
                values, costs, caps=caps, size=options.size, at_rank_1=at_rank_1, path=self._adapter.path
            )
        rule = ranks.RULES[options.method]
        picked = []
        for candidate, limit in zip(candidates, caps, strict=True):
            if options.compat == "kohya" and options.method != "fixed":
                rank = ranks.kohya_rank(
                    options.method, candidate.values, options.parameter or 0, count=candidate.count, cap=limit
                )
            elif options.method == "fixed":
                rank = ranks.fixed(candidate.values, limit)
            else:
                rank = min(rule(candidate.values, options.parameter or 0), limit)
            picked.append(rank)
        if options.method == "fixed":
            for asked in sorted(set(caps)):
                clamped = sum(cap == asked > rank for cap, rank in zip(caps, picked, strict=True))
                if clamped:
                    self._warnings.append(
                        f"{self._adapter.path}: rank {asked} is more than {clamped} of {caps.count(asked)} "
                        "modules have; clamped there"
                    )
        return picked

    def _cap(self, candidate: _Candidate) -> int:
        """The rank of method fixed, and the most that other methods may choose."""
        options = self._options
        if candidate.is_convolution and options.conv_rank is not None:
            return options.conv_rank
        return options.rank if options.rank is not None else candidate.count

    def _resized(self, group: Sequence[_Candidate], rank: int) -> dict[str, Tensor]:
        """The tensors of one stack of modules at their new rank, by key."""
        first, path = group[0], self._adapter.path
        if isinstance(first.spectrum, KroneckerSpectrum):
            low = first.spectrum.truncated(rank)
            ups, downs = low.up[None], low.down[None]
        else:
            factors = self._load_factors([candidate.module for candidate in group], check=False)
            found = [c.spectrum for c in group if isinstance(c.spectrum, FactorSpectrum)]
            ups, downs = truncated_stack(found, rank, *factors)
        dtype = saved_dtype(self._options.dtype, common_dtype([(self._adapter, first.module)]))
        names = [candidate.module.name for candidate in group]
        saved = [
            cast_batch_checked(
                side, dtype, path=path, keys=[f"{name}.{slot}" for name in names], underflow=self._underflow
            ).cpu()
            for slot, side in zip(_TWO_FACTORS, (ups, downs), strict=True)
        ]
        tensors: dict[str, Tensor] = {}
        for candidate, up, down in zip(group, *saved, strict=True):
            low = LowRank(up, down).padded(rank)  # only `--compat kohya` asks for more than there is
            slots = lora.from_factors(low, candidate.kernel, torch.float32)
            del slots["alpha"]
            tensors |= self._with_companions(candidate.module, rank, slots)
            self._advance(candidate.module)
        return tensors

    def _with_companions(
        self, module: AdapterModule, rank: int, slots: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """New factors with alpha and what else stands beside them, by key."""
        store = self._adapter.store
        unused = {slot.name for slot in module.detected.layout.slots if slot.unused}
        if _is_lora(module):  # biases, a sparse part
            for slot in module.keys.keys() - _FACTOR_SLOTS - unused:
                key = module.keys[slot]
                slots[slot] = self._save(store.tensor(key), store.info(key).dtype, key)
        # LoRA keeps its scale in alpha; LoHa and LoKr have theirs folded into the factors.
        slots["alpha"] = alpha_tensor((module.dims.scale if _is_lora(module) else 1.0) * rank, slots)
        return spelled(self._adapter, module, slots, self._underflow)

    def _carried(self, module: AdapterModule) -> dict[str, Tensor]:
        """A module as it is."""
        slots = kept_form(self._adapter, module, weight=1.0, save=self._save)
        return spelled(self._adapter, module, slots, self._underflow)

    def _save(self, tensor: Tensor, stored: str, key: str) -> Tensor:
        dtype = saved_dtype(self._options.dtype, stored)
        return cast_checked(tensor, dtype, path=self._adapter.path, key=key, underflow=self._underflow).cpu()

    def _load(self, module: AdapterModule, *, check: bool) -> Bound:
        """The module in float32; LoRA without its scale, which alpha carries."""
        if _is_lora(module):
            module = replace(module, dims=replace(module.dims, scale=1.0))
        return self._adapter.load(module, self._device, torch.float32, check=check)

    def _load_factors(self, group: Sequence[AdapterModule], *, check: bool) -> tuple[Tensor, Tensor]:
        """The exact factors of some modules in float32, stacked; see :meth:`_stacks`."""
        if not _is_two_factors(group[0]):
            low = _factors(group[0], self._load(group[0], check=check))
            return low.up[None], low.down[None]
        store = self._adapter.store
        ups, downs = (
            torch.stack([store.tensor(module.keys[slot]) for module in group])
            .to(device=self._device)
            .to(torch.float32)
            .flatten(2)
            for slot in _TWO_FACTORS
        )
        if check and not (is_finite(ups) and is_finite(downs)):
            for module in group:  # one of these says which
                self._load(module, check=True)
        return ups, downs

    def _advance(self, module: AdapterModule) -> None:
        self._progress.advance(sum(self._adapter.store.info(key).nbytes for key in module.keys.values()))

    def _metadata(self, candidates: Sequence[_Candidate], picked: Sequence[int]) -> dict[str, str]:
        """The adapter's metadata, true for the new ranks."""
        kept = {k: v for k, v in self._adapter.store.metadata.items() if k not in STALE_METADATA}
        old = distribution([c.module.dims.rank or len(c.values) for c in candidates])
        new = distribution(picked)
        text = ", ".join(f"{rank}: {count}" for rank, count in new.items())
        comment = (
            f"resized by lycotool from {'/'.join(old)} ({ending(self._options)[1:]}; modules by rank {text})"
        )
        before = kept.get("ss_training_comment", "None")
        kept["ss_training_comment"] = comment if before == "None" else f"{comment}; {before}"
        linear = [rank for c, rank in zip(candidates, picked, strict=True) if not c.is_convolution]
        main = set(linear or picked)
        kept["ss_network_dim"] = str(main.pop()) if len(main) == 1 else "Dynamic"
        scales = {c.module.dims.scale if _is_lora(c.module) else 1.0 for c in candidates}
        kept["ss_network_alpha"] = "Dynamic"
        if kept["ss_network_dim"] != "Dynamic" and len(scales) == 1:
            kept["ss_network_alpha"] = f"{int(kept['ss_network_dim']) * scales.pop():g}"
        kept |= _conv_arguments(
            kept, [(c, r) for c, r in zip(candidates, picked, strict=True) if c.is_convolution]
        )
        if not all(_is_lora(candidate.module) for candidate in candidates):
            kept |= network_arguments(kept, {"lora"})
        recipe = {"file": Path(self._adapter.path).name, "rule": ending(self._options)[1:], "ranks": new}
        return kept | provenance("resize", json.dumps(recipe))


def _conv_arguments(metadata: Mapping[str, str], convs: Sequence[tuple[_Candidate, int]]) -> dict[str, str]:
    """``ss_network_args`` with the convolutions' rank and alpha, where it has any."""
    try:
        arguments = json.loads(metadata.get("ss_network_args", "null"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(arguments, dict) or not convs:
        return {}
    dims = {rank for _, rank in convs}
    alphas = {rank * (c.module.dims.scale if _is_lora(c.module) else 1.0) for c, rank in convs}
    arguments["conv_dim"] = str(dims.pop()) if len(dims) == 1 else "Dynamic"
    arguments["conv_alpha"] = f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic"
    return {"ss_network_args": json.dumps(arguments)}


def _is_two_factors(module: AdapterModule) -> bool:
    """Whether a module is nothing but ``up @ down``."""
    return _is_lora(module) and module.keys.keys() - {"alpha"} == set(_TWO_FACTORS)


def _factors(module: AdapterModule, bound: Bound) -> LowRank:
    """The module's exact factors without a core (a sparse part stays beside them)."""
    compute = module.detected.algorithm.factors
    if compute is None:
        raise TypeError(module.detected.label)
    low = lora.low_rank(bound) if _is_lora(module) else compute(bound)
    if low is None:
        raise TypeError(module.detected.label)
    return low.folded()


def _report(candidate: _Candidate, rank: int) -> ModuleResize:
    values = candidate.values.numpy()  # a few numbers each, for which torch's calls are slow
    total, kept = float(values @ values), float(values[:rank] @ values[:rank])
    total_sum = float(values.sum())
    smallest = float(values[rank - 1]) if rank <= len(values) else 0.0
    return ModuleResize(
        name=candidate.module.name,
        type=candidate.module.detected.label,
        old_rank=candidate.module.dims.rank or len(values),
        new_rank=rank,
        kept_fro=math.sqrt(kept / total) if total else 1.0,
        kept_sum=float(values[:rank].sum()) / total_sum if total_sum else 1.0,
        max_ratio=float(values[0]) / smallest if smallest else None,
    )


def _relative_error(candidates: Sequence[_Candidate], picked: Sequence[int]) -> float:
    """``√(Σ σ²_discarded / Σ σ²)`` over all modules, scales included."""
    lost = total = 0.0
    for candidate, rank in zip(candidates, picked, strict=True):
        values = candidate.values.numpy()
        lost += float(values[rank:] @ values[rank:])
        total += float(values @ values)
    return math.sqrt(lost / total) if total else 0.0


def distribution(picked: Sequence[int]) -> dict[str, int]:
    """Modules by rank, in the order of the ranks."""
    return {str(rank): list(picked).count(rank) for rank in sorted(set(picked))}
