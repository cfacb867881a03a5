"""Slice a DyLoRA into one file for each multiple of its unit; see :mod:`lycotool.ops.resize`.

DyLoRA is trained so that the first rows and columns of its factors work alone; slicing is
exact, where a truncated SVD would mix them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lycotool.algorithms import lora
from lycotool.errors import OutputError, RefusedError, UsageError
from lycotool.io.dtypes import from_torch
from lycotool.io.making import check_folder, made_folder
from lycotool.io.nameless import NamelessFile
from lycotool.io.preflight import prepare_output, reason_of
from lycotool.io.shards import publish_all
from lycotool.io.writer import FilePlan, TensorPlan, staged_file
from lycotool.linalg.underflow import Underflow
from lycotool.ops._adapter import Adapter
from lycotool.ops._common import (
    as_bytes,
    cast_checked,
    count_labels,
    default_name,
    provenance,
    refuse_warnings,
    saved_dtype,
)
from lycotool.ops._render import STALE_METADATA, alpha_tensor, spelled

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.ops.resize import ResizeOptions


def split(adapter: Adapter, options: ResizeOptions) -> tuple[list[str], int, list[str]]:
    """Write one file for each multiple of the unit.

    Returns
    -------
    list of str
        The files, smallest rank first.
    int
        Their bytes together.
    list of str
        Warnings: what became zero, one line for each file.

    Raises
    ------
    RefusedError
        If a module is no plain LoRA.
    UsageError
        If the unit does not divide a rank, or ``-o`` is no folder.
    OutputError
        If a file cannot be written; a folder that was made for them is taken away again.
    """
    unit = options.unit or 1
    modules = list(adapter.modules.values())
    if any(m.detected.layout is not lora.PLAIN or m.detected.dora_slot for m in modules):
        raise RefusedError("`--split` slices plain LoRA factors, and this file has others", path=adapter.path,
                           details=[f"{count} {label}" for label, count in count_labels(adapter).items()],
                           hint="`--rank` truncates by SVD")  # fmt: skip
    largest = max(m.dims.rank or 1 for m in modules)
    odd = [m.name for m in modules if (m.dims.rank or 1) % unit]
    if odd:
        raise UsageError(f"--unit {unit} does not divide the rank of {len(odd)} modules", path=adapter.path)
    folder = _folder(options.output)
    names = [str(folder / default_name([adapter.path], f"-r{rank}.safetensors"))
             for rank in range(unit, largest + 1, unit)]  # fmt: skip
    check_folder(folder)
    nbytes = 0
    warnings: list[str] = []
    with ExitStack() as stack:
        targets: list[Path | None] = [None] * len(names)
        if not options.dry_run:
            stack.enter_context(made_folder(folder))
        if folder.is_dir():
            targets = [
                prepare_output(name, inputs=adapter.store.files, force=options.force) for name in names
            ]
        finished: list[tuple[Path, NamelessFile]] = []
        for target, rank in zip(targets, range(unit, largest + 1, unit), strict=True):
            underflow = Underflow()
            tensors = dict(_sliced(adapter, rank, options, underflow))
            refuse_warnings(lost := underflow.warnings(), strict=options.strict, path=adapter.path)
            warnings += [f"rank {rank}: {text}" for text in lost]
            plans = {key: TensorPlan(from_torch(t.dtype), tuple(t.shape)) for key, t in tensors.items()}
            metadata = {k: v for k, v in adapter.store.metadata.items() if k not in STALE_METADATA}
            alphas = {float(t) for key, t in tensors.items() if key.endswith(".alpha")}
            metadata |= {"ss_network_dim": str(rank)}
            if len(alphas) == 1:
                metadata["ss_network_alpha"] = f"{alphas.pop():g}"
            metadata |= provenance("resize", json.dumps({"file": Path(adapter.path).name, "sliced": rank}))
            plan = FilePlan(plans, metadata, hashed=True)
            nbytes += plan.nbytes
            if not options.dry_run and target is not None:
                produce = partial(_bytes_of, tensors)
                finished.append((target, stack.enter_context(staged_file(target, plan, produce))))
        if finished:
            _publish(finished)
    return names, nbytes, warnings


def _folder(output: str | None) -> Path:
    """Where the files go.

    Raises
    ------
    UsageError
        If the name is that of a file, or of standard output.
    """
    folder = Path(output or ".")
    is_file = output == "-" or folder.suffix.lower() == ".safetensors" or os.path.lexists(folder)
    if is_file and not (output != "-" and folder.is_dir()):
        raise UsageError("`--split` writes several files: `-o` names a folder", path=output)
    return folder


def _bytes_of(tensors: Mapping[str, Tensor], key: str) -> list[memoryview]:
    return [as_bytes(tensors[key])]


def _publish(finished: Sequence[tuple[Path, NamelessFile]]) -> None:
    """All slices appear, or none."""
    try:
        publish_all(finished, [path for path, _ in finished if path.exists()])
    except OSError as error:
        raise OutputError(reason_of(error), path=finished[0][0].parent) from error


def _sliced(
    adapter: Adapter, rank: int, options: ResizeOptions, underflow: Underflow
) -> Iterator[tuple[str, Tensor]]:
    """The first ranks of every module; the scale stays (``--compat kohya``: alpha stays)."""
    for module in adapter.modules.values():
        keep = min(rank, module.dims.rank or 1)
        slots: dict[str, Tensor] = {}
        for slot, key in module.keys.items():
            tensor = adapter.store.tensor(key)
            if slot == "lora_up.weight":
                tensor = tensor[:, :keep].contiguous()
            elif slot == "lora_down.weight":
                tensor = tensor[:keep].contiguous()
            elif slot.startswith("org_module"):
                continue
            dtype = saved_dtype(options.dtype, adapter.store.info(key).dtype)
            slots[slot] = cast_checked(tensor, dtype, path=adapter.path, key=key, underflow=underflow)
        if options.compat != "kohya":
            slots["alpha"] = alpha_tensor(module.dims.scale * keep, slots)
        yield from spelled(adapter, module, slots, underflow).items()
    keys = adapter.keys
    for key in (*keys.embeddings, *keys.unknown, *keys.orphans):
        yield key, adapter.store.tensor(key)
