"""convert: an adapter in another program's dialect, with proof that ΔW is the same.

Modules are found in the tables of the model's family, never by turning underscores into dots.
Where two namings cut a matrix differently the module is split or fused, exactly; what the
target cannot hold is an error that names every module.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from lycotool.errors import IncompatibleError, UsageError
from lycotool.formats.dialects import DIALECTS, Dialect
from lycotool.formats.keys import dialects
from lycotool.io.open import open_store
from lycotool.models.families import FAMILIES
from lycotool.models.families.locate import guess_families
from lycotool.ops._adapter import Adapter, read_adapter
from lycotool.ops._common import NoProgress, Progress, WriteOptions, check_suffix, default_name
from lycotool.ops._convert_plan import Plan, make_plan
from lycotool.ops._converter import Converter, ConvertResult
from lycotool.ops._quantised import dequantised
from lycotool.ops._render import outline

__all__ = ["ConvertOptions", "ConvertResult", "convert"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions(WriteOptions):
    """What `convert` has beside the common options.

    ``to`` and ``from_`` are names of :data:`lycotool.formats.dialects.DIALECTS`; ``arch`` is
    one of :data:`lycotool.models.families.FAMILIES` where the file does not tell it. ``algo``
    also changes the algorithm: exactly where that is possible, else with ``rank`` or ``error``
    and, where the change depends on it, the ``base`` checkpoint. ``drop`` leaves out what
    cannot be represented. ``verify`` None verifies whatever changes tensors.
    """

    to: str
    from_: str | None = None
    arch: str | None = None
    algo: Literal["keep", "lora", "full"] = "keep"
    rank: int | None = None
    error: float | None = None
    base: str | None = None
    drop: bool = False
    verify: bool | None = None


def convert(adapter: str, options: ConvertOptions, *, progress: Progress | None = None) -> ConvertResult:
    """Write an adapter in another dialect.

    Raises
    ------
    UsageError
        If options are out of range or name nothing.
    IncompatibleError
        If the model is unknown or ambiguous, or modules cannot be represented.
    CheckError
        If verification finds a difference beyond rounding.
    """
    _check_options(options)
    dialect = DIALECTS[options.to]
    with ExitStack() as files:
        store = files.enter_context(open_store(adapter, allow_pickle=options.allow_pickle))
        opened = read_adapter(store, reading=options.reading)
        opened.require_sound()
        _refuse_mixed(opened, options)
        ending = f".{dialect.name}" + ("" if dialect.is_folder else ".safetensors")
        name = options.output or default_name([adapter], ending)
        if not dialect.is_folder:
            check_suffix(name)
        families, plan = _plan(opened, dialect, options)
        base = None
        if options.base is not None:
            base = files.enter_context(open_store(options.base, allow_pickle=options.allow_pickle))
            base = dequantised(base)
        converter = Converter(opened, families, dialect, options, base, progress or NoProgress())
        return converter.run(plan, name)


def _check_options(options: ConvertOptions) -> None:
    for option, value, known in (
        ("--to", options.to, DIALECTS), ("--from", options.from_, DIALECTS), ("--arch", options.arch, FAMILIES),
    ):  # fmt: skip
        if value is not None and value not in known:
            raise UsageError(f"{option}: no such name: {value}", hint="one of " + ", ".join(known))
    if options.drop and options.strict:
        raise UsageError("`--drop` leaves out what `--strict` makes an error", hint="give one of them")
    if options.rank is not None and options.rank < 1:
        raise UsageError(f"--rank is {options.rank}, the smallest rank is 1")
    if options.error is not None and not (0 <= options.error < 1 and math.isfinite(options.error)):
        raise UsageError(f"--error is {options.error}, expected a share from 0 to 1")
    if options.algo != "lora" and (options.rank, options.error) != (None, None):
        raise UsageError("`--rank` and `--error` go with `--algo lora`")
    if options.algo == "keep" and options.base is not None:
        raise UsageError("`--base` goes with `--algo`: names alone need no checkpoint")


def _refuse_mixed(adapter: Adapter, options: ConvertOptions) -> None:
    """Demand one dialect, unless the user says which it is.

    Raises
    ------
    IncompatibleError
        With the number of modules in each.
    """
    found = dialects(adapter.keys)
    if options.from_ is None and (len(found) > 1 or len(adapter.keys.spellings) > 1):
        spellings = [f"{count} factors spelled as {name}" for name, count in adapter.keys.spellings.items()]
        raise IncompatibleError(
            "mixes dialects, and nothing says how to read it",
            path=adapter.path,
            details=[f"module names of {name}" for name in found] + spellings,
            hint="`--from` names the dialect to read all of it as",
        )


def _plan(adapter: Adapter, dialect: Dialect, options: ConvertOptions) -> tuple[list[str], Plan]:
    """What becomes of each module, and the families it can be for, which all agree on that.

    Raises
    ------
    IncompatibleError
        If no family has these modules, or several do and the names depend on which.
    """
    modules = adapter.modules
    if options.arch is not None:
        candidates = [options.arch]
    else:
        widths = {
            name: columns for name, module in modules.items() if (columns := outline(module)[1]) is not None
        }
        candidates = guess_families(modules, widths, adapter.store.metadata)
    if not candidates:
        raise IncompatibleError(
            "which model this adapter is for is not known: no family has its modules",
            path=adapter.path,
            details=list(modules)[:5],
            hint="`--arch` names it: " + ", ".join(FAMILIES),
        )
    if dialect.families is not None and not dialect.families & set(candidates):
        raise IncompatibleError(
            f"{dialect.name} exists for {', '.join(sorted(dialect.families))} only",
            path=adapter.path,
            details=[f"this adapter is for {' or '.join(candidates)}"],
        )
    candidates = [short for short in candidates if dialect.families is None or short in dialect.families]
    naming = None if options.from_ is None else DIALECTS[options.from_].naming
    plans = {
        short: make_plan(modules.values(), FAMILIES[short], dialect, reads=naming) for short in candidates
    }
    best = min(len(plan.faults) for plan in plans.values())
    plans = {short: plan for short, plan in plans.items() if len(plan.faults) == best}
    first = next(iter(plans))
    if any(sorted(plan.names) != sorted(plans[first].names) for plan in plans.values()):
        raise IncompatibleError(
            f"can be for {' or '.join(plans)}, whose names in {dialect.name} differ",
            path=adapter.path,
            hint="`--arch` says which",
        )
    return list(plans), plans[first]
