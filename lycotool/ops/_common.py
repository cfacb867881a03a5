"""What the commands that write share: options, progress, naming, checked casts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lycotool import __version__
from lycotool.algorithms.base import DEFAULT_READING, Reading
from lycotool.errors import IncompatibleError, NumericError, UsageError
from lycotool.errors import listed as listed
from lycotool.io.dtypes import FLOATING, OPTION_DTYPES, to_torch
from lycotool.io.dtypes import as_bytes as as_bytes
from lycotool.lazy import torch
from lycotool.linalg.finite import extremes
from lycotool.linalg.underflow import Underflow

if TYPE_CHECKING:
    from lycotool.ops._adapter import Adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """Options every writing command has; see ``cli.md``.

    ``output`` None picks the command's default name in the current folder, ``-`` is
    standard output. ``dtype`` ``keep`` stores each tensor as its input did.
    """

    output: str | None = None
    force: bool = False
    dtype: str = "keep"
    device: str = "auto"
    strict: bool = False
    dry_run: bool = False
    allow_pickle: bool = False
    reading: Reading = DEFAULT_READING


def refuse_warnings(warnings: Sequence[str], *, strict: bool, path: str | None = None) -> None:
    """What ``--strict`` means: a warning is an error.

    Raises
    ------
    IncompatibleError
        With ``strict``, naming every warning.
    """
    if strict and warnings:
        raise IncompatibleError(
            "`--strict` makes warnings errors",
            path=path,
            details=listed(warnings),
            hint="leave `--strict` out to go on all the same",
        )


class Progress(Protocol):
    """Told how far a command is; the default ignores it."""

    def start(self, label: str, total: int) -> None:
        """A phase of ``total`` bytes begins."""

    def advance(self, nbytes: int) -> None:
        """So many bytes more are done."""


class NoProgress:
    """Shows nothing."""

    def start(self, label: str, total: int) -> None:
        """Ignore it."""

    def advance(self, nbytes: int) -> None:
        """Ignore it."""


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """What a command made of one adapter."""

    path: str
    strength: float
    modules: int
    matched: int
    unmatched: tuple[str, ...]
    algorithms: dict[str, int]
    recut: int = 0


def count_labels(adapter: Adapter) -> dict[str, int]:
    """Modules by algorithm, commonest first."""
    counts: dict[str, int] = {}
    for module in adapter.modules.values():
        counts[module.detected.label] = counts.get(module.detected.label, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def saved_dtype(option: str, stored: str) -> str:
    """The dtype a floating tensor is saved in; others keep theirs.

    Raises
    ------
    UsageError
        If the option is no dtype name.
    """
    if option == "keep":
        return stored
    if option not in OPTION_DTYPES:
        raise UsageError(f"no such dtype: {option}", hint="one of keep, " + ", ".join(OPTION_DTYPES))
    return OPTION_DTYPES[option] if stored in FLOATING else stored


def cast_checked(
    tensor: torch.Tensor,
    dtype: str,
    *,
    path: str,
    key: str,
    underflow: Underflow,
    memory: torch.Tensor | None = None,
) -> torch.Tensor:
    """Round to a saved dtype, refusing what it cannot hold, and note what becomes zero.

    Overflow is looked for before the cast: float8 saturates silently.

    Parameters
    ----------
    memory
        A tensor of that dtype and shape to put a floating result in; None is a new one.

    Raises
    ------
    NumericError
        If a value is NaN, infinite, or beyond the dtype's range.
    """
    target = to_torch(dtype)
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return tensor.to(target)
    low, high = extremes(tensor)
    check_range(low, high, dtype, path=path, key=key)
    saved = tensor.to(target) if memory is None else memory.copy_(tensor)
    underflow.look(tensor, saved, max(-low, high), key)
    return saved


def check_range(low: float, high: float, dtype: str, *, path: str, key: str) -> None:
    """Refuse a tensor with these extremes that a saved dtype cannot hold.

    Raises
    ------
    NumericError
        If an extreme is NaN, infinite, or beyond the dtype's range.
    """
    limit = torch.finfo(to_torch(dtype)).max
    if low >= -limit and high <= limit:
        return
    if low != low or high != high:
        raise NumericError("the result has NaN values", path=path, key=key)
    raise NumericError(
        f"the result has values up to {max(-low, high):.6g}, {dtype} holds up to {limit:.6g}",
        path=path,
        key=key,
        hint="`--dtype fp32` or `--dtype bf16` has the range",
    )


def cast_batch_checked(
    batch: torch.Tensor, dtype: str, *, path: str, keys: Sequence[str], underflow: Underflow
) -> torch.Tensor:
    """:func:`cast_checked` of floating tensors stacked along the first axis, one key each."""
    flat = batch.flatten(1)
    found = list(zip(flat.amin(1).tolist(), flat.amax(1).tolist(), keys, strict=True))
    for low, high, key in found:
        check_range(low, high, dtype, path=path, key=key)
    saved = batch.to(to_torch(dtype))
    for exact, rounded, (low, high, key) in zip(batch, saved, found, strict=True):
        underflow.look(exact, rounded, max(-low, high), key)
    return saved


def to_cpu(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors on the CPU; those of one dtype in one transfer."""
    if all(tensor.device.type == "cpu" for tensor in tensors) or len({t.dtype for t in tensors}) > 1:
        return [tensor.cpu() for tensor in tensors]
    flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def default_name(parts: Iterable[str], ending: str) -> str:
    """``A+B….safetensors`` in the current folder, from the inputs' stems.

    Raises
    ------
    UsageError
        If an input is standard input, which has no name.
    """
    stems = []
    for part in parts:
        if part == "-":
            raise UsageError("standard input has no name to derive the output's from", hint="add `-o`")
        name = Path(part).resolve().name
        for suffix in (".safetensors.index.json", ".safetensors", ".ckpt", ".pt", ".bin"):
            if name.lower().endswith(suffix):
                name = name[: -len(suffix)]
                break
        stems.append(name)
    return "+".join(stems) + ending


def check_suffix(output: str) -> None:
    """Refuse output names that promise another format.

    Raises
    ------
    UsageError
        If the name has a suffix other than ``.safetensors``.
    """
    if output != "-" and not output.lower().endswith(".safetensors"):
        if Path(output).is_dir():
            name = Path(output) / "NAME.safetensors"
            raise UsageError(
                "is a folder, and the output format one file", path=output, hint=f"name it: {name}"
            )
        raise UsageError(
            f"unknown output format: {Path(output).suffix or 'no suffix'}",
            hint="outputs are .safetensors files",
        )


def provenance(command: str, recipe: str) -> dict[str, str]:
    """The metadata that says which command made a file, and from what."""
    return {"lycotool.version": __version__, f"lycotool.{command}": recipe}
