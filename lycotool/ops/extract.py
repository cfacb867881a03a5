"""extract: the difference of two checkpoints as an adapter.

Layer by layer: ``Δ = tuned - base`` in float32 (float64 where either is stored so), then the
best approximation of Δ that the chosen algorithm and rank allow. Layers are paired by what
they are, not by how they are called, so an LDM single file and a diffusers folder can be
subtracted. Two tensors are in memory at a time, besides the adapter that grows.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lycotool.algorithms import lora
from lycotool.devices import resolve_device
from lycotool.errors import IncompatibleError, NumericError, UsageError
from lycotool.io.dtypes import FLOATING, from_torch
from lycotool.io.open import open_store
from lycotool.io.store import TensorStore
from lycotool.io.writer import FilePlan, TensorPlan, prepare_output, write_file
from lycotool.lazy import torch
from lycotool.linalg import ranks
from lycotool.linalg.dense import exact, leading, nearest_kronecker, tucker
from lycotool.linalg.direction import nearest_direction
from lycotool.linalg.low_rank import LowRank
from lycotool.models.architecture import guess_checkpoint
from lycotool.models.factorization import factorization
from lycotool.models.layers import AmbiguousNameError, Layer, LayerIndex, Param
from lycotool.models.module_names import KohyaNames
from lycotool.ops._adapter import is_adapter
from lycotool.ops._common import (
    NoProgress,
    Progress,
    WriteOptions,
    as_bytes,
    cast_checked,
    check_suffix,
    default_name,
    listed,
    provenance,
    saved_dtype,
)
from lycotool.ops._render import alpha_tensor

if TYPE_CHECKING:
    from torch import Tensor

Algo = Literal["lora", "lokr", "full", "dora", "ia3"]

#: Names of layers that look things up rather than multiply; stored as differences.
_EMBEDDINGS = ("embedding", "embeddings", "embed_tokens", "shared")

#: Rules for `--mode`, by the name of the rank rule.
_MODE_RULES: Mapping[str, str] = {
    "fixed": "fixed", "threshold": "threshold", "ratio": "sv_ratio", "quantile": "sv_cumulative", "fro": "sv_fro",
}  # fmt: skip

MODES = (*_MODE_RULES, "full", "size", "error")


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
class _Pair:
    """One layer of both checkpoints."""

    name: str
    component: str
    path: str
    base: Layer
    tuned: Layer

    @property
    def is_convolution(self) -> bool:
        """Whether the conv rank applies: kernels larger than 1."""
        return math.prod(self.base.weight.shape[2:]) > 1

    @property
    def is_matrix(self) -> bool:
        """Whether the weight multiplies (linear, convolution) rather than scales or looks up."""
        return len(self.base.weight.shape) > 1 and not self.path.endswith(_EMBEDDINGS)


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
        self._skipped: dict[str, list[str]] = {}
        self._modules: list[ModuleExtract] = []
        self._energy = _Energy()
        self._warnings: list[str] = [*base.warnings, *tuned.warnings]
        self._unfit: list[tuple[float, str]] = []
        self._ranks: dict[str, int] = {}

    def run(self) -> dict[str, Tensor]:
        """The adapter's tensors by key."""
        pairs = self._pairs()
        self._progress.start("extract", sum(self._nbytes(pair) for pair in pairs))
        if self._options.mode in ("size", "error"):
            self._allocate(pairs)
        tensors: dict[str, Tensor] = {}
        for pair in pairs:
            slots = self._layer(pair)
            tensors |= {f"{pair.name}.{slot}": tensor for slot, tensor in slots.items()}
            self._progress.advance(self._nbytes(pair))
        if self._unfit:
            worst = sorted(self._unfit, reverse=True)
            raise IncompatibleError(
                f"{len(worst)} layers are no scaling of rows or columns, the worst by {worst[0][0]:.1%} of its change",
                path=self._tuned.path,
                details=listed([f"{name}: {share:.1%} of the change is left" for share, name in worst]),
                hint="`--algo lora` takes any difference",
            )
        if not tensors:
            raise IncompatibleError(
                "the checkpoints do not differ in any layer", path=self._tuned.path,
                details=[f"{reason}: {len(names)} layers" for reason, names in self._skipped.items()],
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
            skipped={reason: tuple(names) for reason, names in self._skipped.items()},
            nbytes=nbytes,
            warnings=tuple(self._warnings),
            dry_run=self._options.dry_run,
        )

    def metadata(self) -> dict[str, str]:
        """What loaders and people read."""
        options = self._options
        used = sorted({m.rank for m in self._modules if m.rank is not None})
        dim = str(used[0]) if len(used) == 1 else "Dynamic"
        algo = {"lora": "locon", "dora": "locon"}.get(options.algo, options.algo)
        arguments = {"algo": "full" if options.mode == "full" else algo}
        if options.algo == "dora":
            arguments |= {"dora_wd": "True", "wd_on_output": str(options.dora_axis == "out")}
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

    # --- pairing ---------------------------------------------------------------------------

    def _pairs(self) -> list[_Pair]:
        """The layers of both checkpoints, matched by component and canonical path."""
        try:
            base, tuned = LayerIndex(self._base.shapes).places, LayerIndex(self._tuned.shapes).places
        except AmbiguousNameError as error:
            raise IncompatibleError(str(error), path=self._base.path) from None
        shared = {component for component, _ in base} & {component for component, _ in tuned}
        self._check_same_model(base, tuned, shared)
        names = KohyaNames.of(component for component, _ in base)
        pairs = []
        for place, layer in base.items():
            component, path = place
            if place not in tuned:
                self._skip("in one checkpoint only", layer.path)
                continue
            pair = _Pair(names.name(component, layer.path), component, path, layer, tuned[place])
            if component == "vae":
                self._skip("part of the VAE", layer.path)
            elif self._base.info(layer.weight.key).dtype not in FLOATING:
                self._skip("not a floating-point weight", layer.path)
            elif not self._chosen(pair):
                self._skip("left out by --include or --exclude", layer.path)
            else:
                pairs.append(pair)
        for place, layer in tuned.items():
            if place not in base:
                self._skip("in one checkpoint only", layer.path)
        return pairs

    def _check_same_model(
        self,
        base: Mapping[tuple[str, str], Layer],
        tuned: Mapping[tuple[str, str], Layer],
        shared: set[str],
    ) -> None:
        """Demand equal layers in every component both have, VAE and buffers aside.

        Raises
        ------
        IncompatibleError
            Naming the first layers that differ.
        """
        faults = []
        for ours, theirs, where in ((base, tuned, self._tuned), (tuned, base, self._base)):
            faults += [
                f"{layer.path}: not in {where.path}"
                for place, layer in ours.items()
                if place not in theirs and place[0] in shared - {"vae"} and _is_layer(layer)
            ]
        faults += [
            f"{layer.path}: shape {list(layer.weight.shape)} against {list(tuned[place].weight.shape)}"
            for place, layer in base.items()
            if place in tuned and layer.weight.shape != tuned[place].weight.shape
            and math.prod(layer.weight.shape) != math.prod(tuned[place].weight.shape)
        ]  # fmt: skip
        if not shared or faults:
            raise IncompatibleError(
                f"not the same model as {self._base.path}", path=self._tuned.path, details=listed(faults)
            )

    def _chosen(self, pair: _Pair) -> bool:
        """Whether ``--include`` and ``--exclude`` let a layer in, by module name or path."""
        names = (pair.name, pair.base.path)

        def hit(patterns: Sequence[str]) -> bool:
            return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)

        return (not self._options.include or hit(self._options.include)) and not hit(self._options.exclude)

    def _skip(self, reason: str, path: str) -> None:
        self._skipped.setdefault(reason, []).append(path)

    def _nbytes(self, pair: _Pair) -> int:
        return self._base.info(pair.base.weight.key).nbytes + self._tuned.info(pair.tuned.weight.key).nbytes

    # --- one layer -------------------------------------------------------------------------

    def _layer(self, pair: _Pair) -> dict[str, Tensor]:
        """The slots of one layer's module; empty where nothing differs."""
        base = self._read(self._base, pair.base.weight)
        tuned = self._read(self._tuned, pair.tuned.weight).reshape(base.shape)
        delta = tuned - base
        bias = self._bias(pair)
        largest = max(float(delta.abs().max()) if delta.numel() else 0.0, 0.0)
        slots: dict[str, Tensor] = {}
        if largest > self._options.min_diff:
            slots = self._weight(pair, base, tuned, delta)
        if bias is not None:
            slots[self._bias_slot(slots, pair)] = self._save(bias, pair)
            self._energy.add(
                pair.component, *_squares(bias, bias - slots[self._bias_slot(slots, pair)].to(bias))
            )
        if not slots:
            self._skip("unchanged", pair.base.path)
        return slots

    def _bias_slot(self, slots: Mapping[str, Tensor], pair: _Pair) -> str:
        return "b_norm" if len(pair.base.weight.shape) == 1 and "diff" not in slots else "diff_b"

    def _bias(self, pair: _Pair) -> Tensor | None:
        """The bias's difference, or None where there is none."""
        if pair.base.bias is None or pair.tuned.bias is None:
            return None
        delta = self._read(self._tuned, pair.tuned.bias) - self._read(self._base, pair.base.bias)
        return delta if float(delta.abs().max()) > self._options.min_diff else None

    def _weight(self, pair: _Pair, base: Tensor, tuned: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """Store one layer's difference as the chosen algorithm does, and account for it."""
        options = self._options
        if not pair.is_matrix:
            slot = "w_norm" if delta.ndim == 1 and pair.base.bias is not None else "diff"
            slots, label, rank = {slot: self._save(delta, pair)}, "norm" if slot == "w_norm" else "full", None
            left = delta - slots[slot].to(delta)
        elif options.algo == "full" or options.mode == "full":
            slots, label, rank = {"diff": self._save(delta, pair)}, "full", None
            left = delta - slots["diff"].to(delta)
        else:
            build: Callable[..., tuple[dict[str, Tensor], str, int | None, Tensor]] = {
                "lora": self._lora, "lokr": self._lokr, "dora": self._dora, "ia3": self._ia3,
            }[options.algo]  # fmt: skip
            slots, label, rank, left = build(pair, base, tuned, delta)
        total, rest = _squares(delta, left)
        self._energy.add(pair.component, total, rest)
        self._modules.append(
            ModuleExtract(pair.name, pair.base.path, label, rank, math.sqrt(total),
                          math.sqrt(max(0.0, 1 - rest / total)) if total else 1.0)
        )  # fmt: skip
        return slots

    def _lora(
        self, pair: _Pair, base: Tensor, tuned: Tensor, delta: Tensor
    ) -> tuple[dict[str, Tensor], str, int | None, Tensor]:
        options, kernel = self._options, tuple(delta.shape[2:])
        if options.use_conv_cp and pair.is_convolution:
            up, core, down = tucker(delta, self._cap(pair), seed=options.seed)
            low = LowRank(up, down, core.flatten(2))
        else:
            low = self._truncated(pair, delta.flatten(1))
        if options.clamp_quantile is not None and low.core is None:
            low = _clamped(low, options.clamp_quantile)
        slots = self._saved_factors(pair, low, kernel)
        approximation = _dense(slots).to(delta).reshape(delta.shape)
        if options.sparse_bias:
            sparse, matrix = self._sparse(pair, (delta - approximation).flatten(1))
            slots |= sparse
            approximation = approximation + matrix.reshape(delta.shape)
        label = "lora (cp)" if "lora_mid.weight" in slots else "lora"
        return slots, label, low.rank, delta - approximation

    def _saved_factors(self, pair: _Pair, low: LowRank, kernel: tuple[int, ...]) -> dict[str, Tensor]:
        factors = lora.from_factors(low, kernel, torch.float32)
        slots = {slot: self._save(tensor, pair) for slot, tensor in factors.items() if slot != "alpha"}
        slots["alpha"] = alpha_tensor(float(low.down.shape[0] if low.core is not None else low.rank), slots)
        return slots

    def _truncated(self, pair: _Pair, matrix: Tensor) -> LowRank:
        """The best approximation of the rank that mode and cap choose."""
        options = self._options
        if options.mode == "fixed":
            return leading(matrix, self._cap(pair), seed=options.seed)[0]
        spectrum = exact(matrix)
        if pair.name in self._ranks:
            return spectrum.truncated(self._ranks[pair.name], matrix)
        parameter = options.parameter
        if pair.is_convolution and options.conv_parameter is not None:
            parameter = options.conv_parameter
        value = 1 / (parameter or 1) if options.mode == "ratio" else parameter or 0
        rank = ranks.RULES[_MODE_RULES[options.mode]](spectrum.values, value)
        return spectrum.truncated(min(rank, self._cap(pair)), matrix)

    def _cap(self, pair: _Pair) -> int:
        """The rank of mode fixed, and the most that the others may choose."""
        options = self._options
        rank = options.rank
        if pair.is_convolution and options.conv_rank is not None:
            rank = options.conv_rank
        shape = pair.base.weight.shape
        most = min(shape[0], math.prod(shape[1:]))
        return min(rank if rank is not None else 32 if options.mode == "fixed" else most, most)

    def _sparse(self, pair: _Pair, residual: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The largest entries of what the factors leave, and the matrix they make."""
        if residual.shape[1] > 65536 or residual.shape[0] > 65536:
            raise IncompatibleError(
                f"a sparse part addresses 65536 columns at most, this layer has {residual.shape[1]}",
                key=pair.name,
            )
        count = max(1, round((1 - self._options.sparsity) * residual.numel()))
        flat = residual.flatten()
        chosen = flat.abs().topk(count, sorted=False).indices.sort().values
        rows, columns = chosen // residual.shape[1], chosen % residual.shape[1]
        values = self._save(flat[chosen], pair)
        matrix = torch.zeros_like(flat)
        matrix[chosen] = values.to(matrix)
        return {
            "bias_indices": _wrapped(torch.stack([rows, columns])),
            "bias_values": values,
            "bias_size": _wrapped(torch.tensor(residual.shape)),
        }, matrix

    def _lokr(
        self, pair: _Pair, base: Tensor, tuned: Tensor, delta: Tensor
    ) -> tuple[dict[str, Tensor], str, int | None, Tensor]:
        options, matrix = self._options, delta.flatten(1)
        a, b = factorization(delta.shape[0], options.factor)
        c, d = factorization(delta.shape[1], options.factor)
        w1, w2 = nearest_kronecker(matrix, (a, c))
        kernel = tuple(delta.shape[2:])
        rank = None
        if options.rank is None:
            slots = {"lokr_w1": self._save(w1, pair), "lokr_w2": self._save(w2.reshape(b, d, *kernel), pair)}
            slots["alpha"] = alpha_tensor(1.0, slots)
            second = slots["lokr_w2"].flatten(1)
        else:
            low, _ = leading(w2, self._cap(pair), seed=options.seed)
            rank = low.rank
            slots = {
                "lokr_w1": self._save(w1, pair),
                "lokr_w2_a": self._save(low.up, pair),
                "lokr_w2_b": self._save(low.down, pair),
            }
            slots["alpha"] = alpha_tensor(float(rank), slots)
            second = slots["lokr_w2_a"].to(delta) @ slots["lokr_w2_b"].to(delta)
        product = torch.kron(slots["lokr_w1"].to(delta).contiguous(), second.to(delta).contiguous())
        return slots, "lokr", rank, delta - product.reshape(delta.shape)

    def _dora(
        self, pair: _Pair, base: Tensor, tuned: Tensor, delta: Tensor
    ) -> tuple[dict[str, Tensor], str, int | None, Tensor]:
        axis = 0 if self._options.dora_axis == "out" else 1
        low, magnitude = nearest_direction(base, tuned, axis, self._cap(pair), seed=self._options.seed)
        slots = self._saved_factors(pair, low, tuple(delta.shape[2:]))
        slots["dora_scale"] = self._save(magnitude, pair)
        v = base + _dense(slots).to(delta).reshape(delta.shape)
        others = [dim for dim in range(v.ndim) if dim != axis]
        norm = torch.linalg.vector_norm(v, dim=others, keepdim=True).clamp_min(1e-38)
        rebuilt = slots["dora_scale"].to(delta) * v / norm
        return slots, f"lora + dora ({self._options.dora_axis})", low.rank, tuned - rebuilt

    def _ia3(
        self, pair: _Pair, base: Tensor, tuned: Tensor, delta: Tensor
    ) -> tuple[dict[str, Tensor], str, int | None, Tensor]:
        """A scaling of rows or columns, whichever leaves less; noted as unfit if it leaves much."""
        best: tuple[float, int, Tensor] | None = None
        for axis in (0, 1):
            others = [dim for dim in range(base.ndim) if dim != axis]
            power = (base * base).sum(others, keepdim=True)
            vector = torch.where(
                power > 0, (delta * base).sum(others, keepdim=True) / power.clamp_min(1e-38), 0
            )
            rest = float((delta - vector * base).double().square().sum())
            if best is None or rest < best[0]:
                best = (rest, axis, vector)
        if best is None:
            raise AssertionError
        rest, axis, vector = best
        # Rounding the scaled weights to the stored dtype leaves eps/2 of each element.
        eps = torch.finfo(self._tuned.tensor(pair.tuned.weight.key).dtype).eps
        rounding = float((eps * tuned).double().square().sum())
        if rest > rounding:
            self._unfit.append((math.sqrt(rest / float(delta.double().square().sum())), pair.name))
        shape = [1, -1] + [1] * (base.ndim - 2) if base.ndim > 2 else [-1]
        slots = {
            "weight": self._save(vector.reshape(shape), pair),
            "on_input": torch.tensor(axis, dtype=torch.int64),
        }
        back = [1] * base.ndim
        back[axis] = -1
        return slots, "ia3", None, delta - slots["weight"].to(delta).reshape(back) * base

    # --- budgets, tensors ------------------------------------------------------------------

    def _allocate(self, pairs: Sequence[_Pair]) -> None:
        """Ranks of all matrices together, from their whole spectra."""
        names, spectra, costs, fixed_bytes = [], [], [], 0
        for pair in pairs:
            base = self._read(self._base, pair.base.weight)
            delta = self._read(self._tuned, pair.tuned.weight).reshape(base.shape) - base
            width = TensorPlan(self._dtype(pair), (1,)).nbytes
            if pair.is_matrix and float(delta.abs().max()) > self._options.min_diff:
                names.append(pair.name)
                spectra.append(exact(delta.flatten(1)).values)
                costs.append(sum(delta.flatten(1).shape) * width)
            elif not pair.is_matrix:
                fixed_bytes += delta.numel() * width
        if self._options.error is not None:
            picked = ranks.allocate(spectra, costs, error=self._options.error)
        else:
            header = _header_bound([pair.name for pair in pairs])
            try:
                picked = ranks.allocate(
                    spectra, costs, budget=(self._options.size or 0) - fixed_bytes - header
                )
            except ValueError:
                least = fixed_bytes + header + sum(costs)
                raise IncompatibleError(
                    f"{self._options.size} bytes are too few: rank 1 of every layer needs {least}",
                    path=self._tuned.path,
                ) from None
        self._ranks = dict(zip(names, picked, strict=True))

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
        if not torch.isfinite(tensor).all():
            raise NumericError("has NaN or infinite values", path=store.path, key=param.key)
        return tensor if param.rows is None else tensor[slice(*param.rows)]

    def _dtype(self, pair: _Pair) -> str:
        """The dtype to save in: the option's, else the tuned checkpoint's."""
        stored = self._tuned.info(pair.tuned.weight.key).dtype
        return saved_dtype(self._options.dtype, stored)

    def _save(self, tensor: Tensor, pair: _Pair) -> Tensor:
        return cast_checked(tensor, self._dtype(pair), path=self._tuned.path, key=pair.name).cpu()


def _header_bound(names: Sequence[str]) -> int:
    """Bytes the header of a LoRA of these modules takes at most, metadata included."""
    wide = TensorPlan("F32", (10**5, 10**5, 1, 1))
    slots = ("lora_up.weight", "lora_down.weight", "alpha", "diff_b")
    plan = FilePlan({f"{name}.{slot}": wide for name in names for slot in slots}, {})
    return len(plan.header()) + 4096


def _is_layer(layer: Layer) -> bool:
    """Whether an entry is a weight of the model rather than a buffer beside it."""
    return layer.weight.key.endswith("weight") and len(layer.weight.shape) > 0


def _dense(slots: Mapping[str, Tensor]) -> Tensor:
    """The change the saved factors give, from what was really stored."""
    up, down = slots["lora_up.weight"].float().flatten(1), slots["lora_down.weight"].float().flatten(1)
    core = slots["lora_mid.weight"].float() if "lora_mid.weight" in slots else None
    return LowRank(up, down, core).dense()


def _squares(whole: Tensor, rest: Tensor) -> tuple[float, float]:
    return float(whole.double().square().sum()), float(rest.double().square().sum())


def _clamped(low: LowRank, quantile: float) -> LowRank:
    """Both factors cut at a quantile of their absolute values, as older tools do."""
    values = torch.cat([low.up.flatten(), low.down.flatten()]).abs()
    kept = max(1, math.ceil(quantile * values.numel()))
    limit = float(values.kthvalue(kept).values)
    return LowRank(low.up.clamp(-limit, limit), low.down.clamp(-limit, limit))


def _wrapped(values: Tensor) -> Tensor:
    """As int16 modulo 65536, which is how the format stores indices and sizes."""
    return ((values.cpu() + 32768) % 65536 - 32768).to(torch.int16)
