"""extract: the difference of two checkpoints as an adapter.

Layer by layer: ``Δ = tuned - base`` in float32 (float64 where either is stored so), then the
best approximation of Δ that the chosen algorithm and rank allow. Layers are paired by what
they are, not by how they are called, so an LDM single file and a diffusers folder can be
subtracted. In memory are the layers read ahead (128 MiB, 512 for a GPU), those of a batch (of
three on a GPU), and the adapter that grows.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from lycotool.devices import resolve_device
from lycotool.distributed import World, joined, launched
from lycotool.errors import IncompatibleError, UsageError
from lycotool.io.dtypes import from_torch
from lycotool.io.open import open_store
from lycotool.io.writer import FilePlan, TensorPlan, prepare_output, write_file
from lycotool.ops._adapter import is_adapter
from lycotool.ops._common import (
    NoProgress,
    Progress,
    WriteOptions,
    as_bytes,
    check_suffix,
    default_name,
    refuse_warnings,
)
from lycotool.ops._extractor import Extractor, ModuleExtract
from lycotool.ops._forms import MODE_RULES
from lycotool.ops._quantised import dequantised, packed_in, require_readable

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


def extract(
    base: str, tuned: str, options: ExtractOptions, *, progress: Progress | None = None
) -> ExtractResult:
    """Write the difference ``tuned - base`` as an adapter.

    Several processes that were started as one job, as ``torchrun`` does it, divide the layers; the
    first of them writes. What it writes does not depend on how many there are.

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
    with ExitStack() as files:
        world = None if launched() is None else files.enter_context(joined(options.device))
        _check_options(options)
        if world is not None and world.size > 1 and "-" in (base, tuned):
            raise UsageError("several processes cannot share standard input", hint="name files")
        stores = [
            files.enter_context(open_store(name, allow_pickle=options.allow_pickle)) for name in (base, tuned)
        ]
        for store in stores:
            if is_adapter(store):
                raise IncompatibleError(
                    "this is an adapter; `extract` subtracts checkpoints",
                    path=store.path,
                    hint="`lycotool bake` makes the checkpoint that has it, `lycotool inspect --stats` measures it",
                )
            for key in packed_in(store):
                require_readable(store, {}, key)
        name = options.output or default_name([tuned], "-extracted.safetensors")
        check_suffix(name)
        inputs = [path for store in stores for path in store.files]
        target = None
        if not (name == "-" and options.dry_run):
            target = prepare_output(name, inputs=inputs, force=options.force)
        if world is None:  # alone; finding a device takes seconds, and what is wrong was said before
            world = World(0, 1, resolve_device(options.device, float64=True))
        before, after = (dequantised(store) for store in stores)
        shown = progress if progress is not None and world.is_main else NoProgress()
        extractor = Extractor(before, after, options, shown, world)
        tensors = extractor.run()
        if tensors is None:  # the first process has the result
            return _received(world)
        warnings = (
            *(warning for store in stores for warning in store.warnings),
            *extractor.warnings,
            *extractor.underflow.warnings(),
        )
        refuse_warnings(warnings, strict=options.strict)
        plans = {key: TensorPlan(from_torch(t.dtype), tuple(t.shape)) for key, t in tensors.items()}
        plan = FilePlan(plans, extractor.metadata(), hashed=True)
        if not options.dry_run:
            write_file(target, plan, lambda key: [as_bytes(tensors[key])])
        captured = extractor.energy.captured()
        result = ExtractResult(
            output=name,
            modules=tuple(extractor.modules),
            captured=captured,
            relative_error=math.sqrt(max(0.0, 1 - captured["all"])),
            skipped={reason: tuple(names) for reason, names in extractor.skipped.items()},
            nbytes=plan.nbytes,
            warnings=warnings,
            dry_run=options.dry_run,
        )
        world.share(result)
        return result


def _received(world: World) -> ExtractResult:
    nothing: ExtractResult | None = None
    result = world.share(nothing)
    if not isinstance(result, ExtractResult):
        raise TypeError(type(result).__name__)
    return result


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
            if value is None:
                raise UsageError(
                    f"`--mode {options.mode}` needs `--param`", hint=f"a number above 0, at most {high:g}"
                )
            if not 0 < value <= high:
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
    if options.algo in ("full", "ia3") and (options.rank, options.conv_rank) != (None, None):
        raise UsageError(f"{options.algo} has no rank to choose")
    if options.algo == "lokr" and options.conv_rank is not None and options.rank is None:
        raise UsageError("`--conv-rank` of lokr goes with `--rank`: without it the second factor is whole")
    if options.clamp_quantile is not None and (options.algo != "lora" or options.use_conv_cp):
        raise UsageError("`--clamp-quantile` goes with plain LoRA factors only")
    if options.clamp_quantile is not None and not 0 < options.clamp_quantile <= 1:
        raise UsageError(f"--clamp-quantile is {options.clamp_quantile}, expected a share above 0, at most 1")
    if options.min_diff < 0 or not math.isfinite(options.min_diff):
        raise UsageError(f"--min-diff is {options.min_diff}, expected a finite number of at least 0")
