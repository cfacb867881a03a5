"""resize: smaller ranks, chosen by rule or by budget, from the factors and never from ΔW.

For each module the truncated change is the best of its rank (Eckart-Young), and the scale
``alpha / rank`` stays what it was. The first pass reads each module for its Gram matrices;
the ranks are chosen when all spectra are known; the second pass writes the truncations.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lycotool.errors import IncompatibleError, UsageError
from lycotool.io.open import open_store
from lycotool.linalg import ranks
from lycotool.ops._adapter import Adapter, read_adapter
from lycotool.ops._common import (
    NoProgress,
    Progress,
    WriteOptions,
    default_name,
    refuse_warnings,
)
from lycotool.ops._naming import shared_layers
from lycotool.ops._resizer import ModuleResize, Resizer, ResizeResult, distribution, ending
from lycotool.ops._slices import split

if TYPE_CHECKING:
    pass

__all__ = ["ModuleResize", "ResizeOptions", "ResizeResult", "resize"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizeOptions(WriteOptions):
    """What `resize` has beside the common options.

    ``rank`` is the target of ``method="fixed"`` and the cap of the other methods; None is
    no cap. ``conv_rank`` is the same for kernels larger than 1. ``size`` (bytes of the
    file) and ``error`` (relative, over the whole file) choose all ranks together.
    ``to="lora"`` converts LoHa and LoKr exactly first. ``keep_refused`` carries modules
    that the rules refuse over unchanged. ``split`` slices a DyLoRA at multiples of ``unit``.
    """

    rank: int | None = None
    conv_rank: int | None = None
    method: str = "fixed"
    parameter: float | None = None
    size: int | None = None
    error: float | None = None
    to: Literal["keep", "lora"] = "keep"
    keep_refused: bool = False
    split: bool = False
    unit: int | None = None
    compat: Literal["none", "kohya"] = "none"


def resize(adapter: str, options: ResizeOptions, *, progress: Progress | None = None) -> ResizeResult:
    """Resize one adapter.

    Raises
    ------
    UsageError
        If ranks or parameters are out of range, or options contradict each other.
    RefusedError
        If a rule refuses a module and neither ``to`` nor ``keep_refused`` overrides it.
    IncompatibleError
        If nothing can be resized, the budget is too small, or two modules are for one layer.
    """
    _check_options(options)
    with ExitStack() as files:
        store = files.enter_context(open_store(adapter, allow_pickle=options.allow_pickle))
        opened = read_adapter(store, reading=options.reading)
        opened.require_sound()
        refuse_warnings((*opened.warnings, *opened.notes), strict=options.strict)
        _check_layers(opened)
        if options.split:
            return _split(opened, options)
        name = options.output or default_name([adapter], ending(options) + ".safetensors")
        return Resizer(opened, options, progress or NoProgress()).run(name)


def _check_layers(adapter: Adapter) -> None:
    """A rank is a layer's: what two modules do to it together has no rank of its own."""
    shared = shared_layers(adapter.modules)
    if shared:
        raise IncompatibleError(
            f"{len(shared)} layers have several modules each",
            path=adapter.path,
            details=["both " + " and ".join(names) for names in shared],
            hint="programs add both or take one of them; keep one",
        )


def _check_options(options: ResizeOptions) -> None:
    for name, rank in (("--rank", options.rank), ("--conv-rank", options.conv_rank)):
        if rank is not None and rank < 1:
            raise UsageError(f"{name} is {rank}, the smallest rank is 1")
    if options.split:
        if options.unit is None or options.unit < 1:
            raise UsageError("`--split` needs `--unit N`, the DyLoRA's unit, of at least 1")
        others = [options.rank, options.conv_rank, options.parameter, options.size, options.error]
        if any(value is not None for value in others) or options.method != "fixed" or options.to != "keep":
            raise UsageError(
                "`--split` slices at every multiple of `--unit`; it takes no rank, rule or budget"
            )
        return
    if options.unit is not None:
        raise UsageError("`--unit` goes with `--split`")
    if options.method not in ranks.RULES:
        raise UsageError(f"no such method: {options.method}", hint="one of " + ", ".join(ranks.RULES))
    budgets = [options.size is not None, options.error is not None]
    if sum(budgets) == 2 or (any(budgets) and options.method != "fixed"):
        raise UsageError("`--size`, `--error` and `--method` exclude each other")
    if options.size is not None and options.size < 1:
        raise UsageError(f"--size is {options.size} bytes")
    if options.error is not None and not 0 <= options.error < 1:
        raise UsageError(f"--error is {options.error}, expected a share from 0 to 1")
    if options.method == "fixed" and options.parameter is not None:
        raise UsageError("fixed takes no --param", hint="it goes with another `--method`, such as sv_fro")
    if options.method == "fixed" and options.rank is None and not any(budgets):
        raise UsageError(
            "nothing says which rank to resize to", hint="give `--rank`, `--method`, `--size` or `--error`"
        )
    if options.method in ranks.PARAMETERS:
        expected, low, high = ranks.PARAMETERS[options.method]
        if options.parameter is None:
            raise UsageError(f"`--method {options.method}` needs `--param`", hint=expected)
        if not low < options.parameter <= high:
            raise UsageError(f"--param of {options.method} is {options.parameter}, expected {expected}")
    elif options.parameter is not None:
        raise UsageError(f"{options.method} takes no --param")
    if options.compat == "kohya" and options.method not in ("fixed", "sv_ratio", "sv_cumulative", "sv_fro"):
        raise UsageError(f"sd-scripts has no method {options.method}", hint="leave `--compat kohya` out")


def _split(adapter: Adapter, options: ResizeOptions) -> ResizeResult:
    names, nbytes, lost = split(adapter, options)
    return ResizeResult(
        outputs=tuple(names),
        modules=(),
        carried={},
        ranks=distribution([module.dims.rank or 1 for module in adapter.modules.values()]),
        relative_error=0.0,
        bytes_before=sum(path.stat().st_size for path in adapter.store.files),
        bytes_after=nbytes,
        warnings=(*adapter.warnings, *adapter.notes, *lost),
        dry_run=options.dry_run,
    )
