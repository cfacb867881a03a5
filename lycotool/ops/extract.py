"""extract: the difference of two checkpoints as an adapter.

Layer by layer: ``Δ = tuned - base`` in float32 (float64 where either is stored so), then the
best approximation of Δ that the chosen algorithm and rank allow. Layers are paired by what
they are, not by how they are called, so an LDM single file and a diffusers folder can be
subtracted. Two tensors are in memory at a time, besides the adapter that grows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lycotool.devices import resolve_device
from lycotool.errors import IncompatibleError, NumericError, UsageError
from lycotool.io.dtypes import from_torch, to_torch
from lycotool.io.open import open_store
from lycotool.io.store import TensorStore
from lycotool.io.writer import FilePlan, TensorPlan, prepare_output, write_file
from lycotool.lazy import torch
from lycotool.linalg import ranks
from lycotool.linalg.dense import exact
from lycotool.linalg.finite import is_finite
from lycotool.models.architecture import guess_checkpoint
from lycotool.models.layers import Param
from lycotool.ops._adapter import is_adapter
from lycotool.ops._common import (
    NoProgress,
    Progress,
    WriteOptions,
    as_bytes,
    check_suffix,
    default_name,
    listed,
    provenance,
    saved_dtype,
)
from lycotool.ops._forms import DEFAULT_RANK, MODE_RULES, Difference, Forms
from lycotool.ops._pairs import Pair, pair_layers

if TYPE_CHECKING:
    from torch import Tensor

Algo = Literal["lora", "lokr", "full", "dora", "ia3"]

MODES = (*MODE_RULES, "full", "size", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractOptions(WriteOptions):
    """What `extract` has beside the common options.

    ``rank`` and ``conv_rank`` are the target of mode fixed and the cap of the others.
    ``parameter`` and ``conv_parameter`` are the threshold, the ratio to the largest value,
    the share of the sum (quantile) or of the norm (fro). ``min_diff`` skips layers whose
    largest absolute difference does not exceed it.
    """

    algo: Algo = "lora"
    mode: str = "fixed"
    rank: int | None = None
    conv_rank: int | None = None
    parameter: float | None = None
    conv_parameter: float | None = None
    size: int | None = None
    error: float | None = None
    use_conv_cp: bool = False
    sparse_bias: bool = False
    sparsity: float = 0.98
    factor: int = -1
    dora_axis: Literal["out", "in"] = "out"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_diff: float = 0.0
    clamp_quantile: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ModuleExtract:
    """One layer: what was stored, and the share of the difference's norm it captures."""

    name: str
    layer: str
    type: str
    rank: int | None
    norm: float
    captured: float


@dataclass(frozen=True, slots=True)
class ExtractResult:
    """What was written, or would be.

    ``captured`` is the share of the squared norm of the whole difference that the adapter
    reproduces, by component and overall; ``relative_error`` is ``√(1 - captured)``.
    """

    output: str
    modules: tuple[ModuleExtract, ...]
    captured: dict[str, float]
    relative_error: float
    skipped: dict[str, tuple[str, ...]]
    nbytes: int
    warnings: tuple[str, ...]
    dry_run: bool


@dataclass(slots=True)
class _Energy:
    """Squared norms of the differences, and of what is left of them."""

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


def extract(
    base: str, tuned: str, options: ExtractOptions, *, progress: Progress | None = None
) -> ExtractResult:
    """Write the difference ``tuned - base`` as an adapter.

    Raises
    ------
    UsageError
        If options are out of range or contradict each other.
    IncompatibleError
        If the checkpoints are of different models (naming the first differing layers), are
        identical, or the difference has no form in the chosen algorithm.
    NumericError
        If either has NaN or infinite values.
    """
    _check_options(options)
    with ExitStack() as files:
        stores = [
            files.enter_context(open_store(name, allow_pickle=options.allow_pickle)) for name in (base, tuned)
        ]
        for store in stores:
            if is_adapter(store):
                raise IncompatibleError(
                    "this is an adapter; `extract` subtracts checkpoints", path=store.path
                )
        name = options.output or default_name([tuned], "-extracted.safetensors")
        check_suffix(name)
        inputs = [path for store in stores for path in store.files]
        target = None
        if not (name == "-" and options.dry_run):
            target = prepare_output(name, inputs=inputs, force=options.force)
        extractor = _Extractor(stores[0], stores[1], options, progress or NoProgress())
        tensors = extractor.run()
        plans = {key: TensorPlan(from_torch(t.dtype), tuple(t.shape)) for key, t in tensors.items()}
        plan = FilePlan(plans, extractor.metadata(), hashed=True)
        if not options.dry_run:
            write_file(target, plan, lambda key: [as_bytes(tensors[key])])
        return extractor.result(name, plan.nbytes)


def _check_options(options: ExtractOptions) -> None:
    if options.mode not in MODES:
        raise UsageError(f"no such mode: {options.mode}", hint="one of " + ", ".join(MODES))
    for name, rank in (("--rank", options.rank), ("--conv-rank", options.conv_rank)):
        if rank is not None and rank < 1:
            raise UsageError(f"{name} is {rank}, the smallest rank is 1")
    if options.mode in ("threshold", "ratio", "quantile", "fro"):
        high = math.inf if options.mode == "threshold" else 1.0
        for name, value in (("--param", options.parameter), ("--conv-param", options.conv_parameter)):
            if name == "--conv-param" and value is None:
                continue
            if value is None or not 0 < value <= high:
                raise UsageError(
                    f"{name} of mode {options.mode} is {value}, expected above 0, at most {high:g}"
                )
    if (options.mode == "size") != (options.size is not None) or (options.mode == "error") != (
        options.error is not None
    ):
        raise UsageError("modes size and error need their `--size` or `--error`, other modes take neither")
    if options.error is not None and not 0 <= options.error < 1:
        raise UsageError(f"--error is {options.error}, expected a share from 0 to 1")
    if options.size is not None and options.size < 1:
        raise UsageError(f"--size is {options.size} bytes")
    if options.sparse_bias and (options.use_conv_cp or options.algo != "lora"):
        raise UsageError("`--sparse-bias` goes with plain LoRA factors only")
    if options.sparse_bias and options.mode == "full":
        raise UsageError("mode full leaves nothing for `--sparse-bias`")
    if options.mode in ("fixed", "full", "size", "error") and (
        options.parameter is not None or options.conv_parameter is not None
    ):
        raise UsageError(f"mode {options.mode} takes no --param")
    if options.factor == 0 or options.factor < -1:
        raise UsageError(f"--factor is {options.factor}, expected -1 or at least 1")
    if not 0 < options.sparsity < 1:
        raise UsageError(f"--sparsity is {options.sparsity}, expected a share between 0 and 1")
    if options.use_conv_cp and (options.algo != "lora" or options.mode != "fixed"):
        raise UsageError("`--use-conv-cp` goes with `--algo lora --mode fixed` only")
    if options.algo in ("full", "ia3") and options.mode not in ("fixed", "full"):
        raise UsageError(f"{options.algo} has no rank for mode {options.mode} to choose")
    if options.algo == "dora" and options.mode != "fixed":
        raise UsageError("`--algo dora` takes `--mode fixed` only")
    if options.algo == "lokr" and options.mode != "fixed":
        raise UsageError("`--algo lokr` takes `--mode fixed` only: `--rank` is that of its second factor")
    if options.clamp_quantile is not None and not 0 < options.clamp_quantile <= 1:
        raise UsageError(f"--clamp-quantile is {options.clamp_quantile}, expected a share above 0, at most 1")
    if options.min_diff < 0 or not math.isfinite(options.min_diff):
        raise UsageError(f"--min-diff is {options.min_diff}, expected a finite number of at least 0")


class _Extractor:
    """One extraction, from the pairs to the adapter's tensors."""

    def __init__(
        self, base: TensorStore, tuned: TensorStore, options: ExtractOptions, progress: Progress
    ) -> None:
        self._base, self._tuned = base, tuned
        self._options = options
        self._progress = progress
        self._device = resolve_device(options.device)
        self._pairs = pair_layers(base, tuned, include=options.include, exclude=options.exclude)
        self._forms = Forms(options)
        self._modules: list[ModuleExtract] = []
        self._energy = _Energy()
        self._warnings: list[str] = [*base.warnings, *tuned.warnings]

    def run(self) -> dict[str, Tensor]:
        """The adapter's tensors by key."""
        pairs = self._pairs.chosen
        self._progress.start("extract", sum(self._nbytes(pair) for pair in pairs))
        if self._options.mode in ("size", "error"):
            self._allocate(pairs)
        tensors: dict[str, Tensor] = {}
        for pair in pairs:
            slots = self._layer(pair)
            tensors |= {f"{pair.name}.{slot}": tensor for slot, tensor in slots.items()}
            self._progress.advance(self._nbytes(pair))
        if self._forms.unfit:
            worst = sorted(self._forms.unfit, reverse=True)
            raise IncompatibleError(
                f"{len(worst)} layers are no scaling of rows or columns, the worst by {worst[0][0]:.1%} of its change",
                path=self._tuned.path,
                details=listed([f"{name}: {share:.1%} of the change is left" for share, name in worst]),
                hint="`--algo lora` takes any difference",
            )
        if not tensors:
            raise IncompatibleError(
                "the checkpoints do not differ in any layer", path=self._tuned.path,
                details=[f"{reason}: {len(names)} layers" for reason, names in self._pairs.skipped.items()],
            )  # fmt: skip
        return tensors

    def result(self, output: str, nbytes: int) -> ExtractResult:
        """The report."""
        captured = self._energy.captured()
        return ExtractResult(
            output=output,
            modules=tuple(self._modules),
            captured=captured,
            relative_error=math.sqrt(max(0.0, 1 - captured["all"])),
            skipped={reason: tuple(names) for reason, names in self._pairs.skipped.items()},
            nbytes=nbytes,
            warnings=tuple(self._warnings),
            dry_run=self._options.dry_run,
        )

    def metadata(self) -> dict[str, str]:
        """What loaders and people read."""
        options = self._options
        used = {m.rank for m in self._modules if m.rank is not None}
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

    def _nbytes(self, pair: Pair) -> int:
        return self._base.info(pair.base.weight.key).nbytes + self._tuned.info(pair.tuned.weight.key).nbytes

    def _layer(self, pair: Pair) -> dict[str, Tensor]:
        """The slots of one layer's module; empty where nothing differs."""
        layer = self._difference(pair)
        slots: dict[str, Tensor] = {}
        largest = _largest(layer.delta)
        if largest > self._options.min_diff:
            stored = self._forms.store(layer)
            self._account(pair, stored.type, stored.rank, layer.delta, stored.left)
            slots = dict(stored.slots)
        elif largest:
            self._energy.add(pair.component, _square(layer.delta), _square(layer.delta))
        bias = self._bias(pair)
        if bias is not None:
            saved = layer.save(bias)
            left = bias - saved.to(bias)
            self._energy.add(pair.component, _square(bias), _square(left))
            if not slots:  # nothing of the weight to report
                self._modules.append(ModuleExtract(pair.name, pair.base.path, "full", None, 0.0, 1.0))
            slots["b_norm" if "w_norm" in slots else "diff_b"] = saved
        if not slots:
            self._pairs.skip("no more than --min-diff" if largest else "unchanged", pair.base.path)
        return slots

    def _account(self, pair: Pair, kind: str, rank: int | None, delta: Tensor, left: Tensor) -> None:
        """Report one module: how much of its difference is captured."""
        total, rest = _square(delta), _square(left)
        self._energy.add(pair.component, total, rest)
        captured = math.sqrt(max(0.0, 1 - rest / total))
        self._modules.append(ModuleExtract(pair.name, pair.base.path, kind, rank, math.sqrt(total), captured))

    def _difference(self, pair: Pair) -> Difference:
        base = self._read(self._base, pair.base.weight)
        tuned = self._read(self._tuned, pair.tuned.weight).reshape(base.shape)
        stored = self._tuned.info(pair.tuned.weight.key).dtype
        rounding = torch.finfo(to_torch(stored)).eps
        dtype = saved_dtype(self._options.dtype, stored)
        return Difference(pair, base, tuned, tuned - base, dtype, rounding)

    def _bias(self, pair: Pair) -> Tensor | None:
        """The bias's difference, or None where there is none."""
        if pair.base.bias is None or pair.tuned.bias is None:
            return None
        delta = self._read(self._tuned, pair.tuned.bias) - self._read(self._base, pair.base.bias)
        return delta if _largest(delta) > self._options.min_diff else None

    def _allocate(self, pairs: Sequence[Pair]) -> None:
        """Ranks of all matrices together, from their whole spectra.

        The file at rank 1 is planned exactly, so that a size is spent to the last rank.
        """
        chosen: list[Pair] = []
        values: list[Tensor] = []
        costs: list[int] = []
        plans: dict[str, TensorPlan] = {}
        for pair in pairs:
            layer = self._difference(pair)
            slots = {}
            if _largest(layer.delta) > self._options.min_diff:
                slots = self._forms.slots_at_rank_1(layer)
                if pair.is_matrix:
                    chosen.append(pair)
                    values.append(exact(layer.delta.flatten(1)).values)
                    costs.append(sum(layer.delta.flatten(1).shape) * TensorPlan(layer.dtype, (1,)).nbytes)
            if (bias := self._bias(pair)) is not None:
                slots["diff_b"] = TensorPlan(layer.dtype, tuple(bias.shape))
            plans |= {f"{pair.name}.{slot}": plan for slot, plan in slots.items()}
        caps = [self._forms.cap(pair) for pair in chosen]
        if self._options.size is None:
            picked = ranks.allocate(values, costs, caps=caps, error=self._options.error)
        else:
            least = FilePlan(plans, self.metadata(), hashed=True).nbytes + 8 * len(plans)
            if least > self._options.size:
                raise IncompatibleError(
                    f"{self._options.size} bytes are too few: rank 1 of every layer needs {least}",
                    path=self._tuned.path,
                )
            budget = sum(costs) + self._options.size - least
            picked = ranks.allocate(values, costs, caps=caps, budget=budget)
        self._forms.ranks = {pair.name: rank for pair, rank in zip(chosen, picked, strict=True)}

    def _read(self, store: TensorStore, param: Param) -> Tensor:
        """A parameter in float32 (float64 if stored so) on the device.

        Raises
        ------
        NumericError
            If it has NaN or infinite values.
        """
        stored = store.tensor(param.key)
        dtype = torch.float64 if stored.dtype == torch.float64 else torch.float32
        tensor = stored.to(self._device, dtype)
        if not is_finite(tensor):
            raise NumericError("has NaN or infinite values", path=store.path, key=param.key)
        return param.view(tensor)


def _largest(delta: Tensor) -> float:
    return float(delta.abs().max()) if delta.numel() else 0.0


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())
