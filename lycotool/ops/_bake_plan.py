"""What `bake` is to change: the modules of adapters, matched with a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lycotool.algorithms.base import MismatchError
from lycotool.errors import IncompatibleError, LycotoolError
from lycotool.io.store import TensorStore
from lycotool.models.layers import AmbiguousNameError, Layer, LayerIndex, Param
from lycotool.ops._adapter import Adapter, AdapterModule
from lycotool.ops._common import AdapterReport, count_labels, listed, refuse_warnings
from lycotool.ops._strengths import Weighted


@dataclass(frozen=True, slots=True)
class Edit:
    """One module's change to one checkpoint tensor."""

    adapter: Adapter
    module: AdapterModule
    part: Literal["weight", "bias"]
    param: Param
    strength: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Every change, by the checkpoint tensor it is made to, and what became of each adapter."""

    edits: Mapping[str, Sequence[Edit]]
    reports: tuple[AdapterReport, ...]
    warnings: tuple[str, ...]


@dataclass(slots=True)
class _Matcher:
    """Collects the changes of adapter after adapter."""

    store: TensorStore
    index: LayerIndex
    edits: dict[str, list[Edit]] = field(default_factory=dict)


def make_plan(store: TensorStore, adapters: Sequence[Weighted], *, sign: float, strict: bool) -> Plan:
    """Find the layer of each module, check that it fits, and note the changes.

    Parameters
    ----------
    store
        The checkpoint as numbers; see :func:`lycotool.ops._quantised.dequantised`.
    sign
        Factor of every strength.

    Raises
    ------
    IncompatibleError
        Listing every module that does not fit its layer; if none of an adapter's has one; with
        ``strict`` if any has none, or for any other warning.
    """
    matcher = _Matcher(store, LayerIndex(store.shapes))
    reports = tuple(_match(weighted, sign, matcher) for weighted in adapters)
    warnings = [warning for a in adapters for warning in a.warnings]
    warnings += store.warnings
    warnings += _check_matches(reports, strict)
    warnings += [note for a in adapters for note in a.adapter.notes]
    refuse_warnings(warnings, strict=strict)
    return Plan(matcher.edits, reports, tuple(warnings))


def _match(weighted: Weighted, sign: float, matcher: _Matcher) -> AdapterReport:
    adapter = weighted.adapter
    unmatched: list[str] = []
    faults: list[LycotoolError] = []
    taken: dict[tuple[str, tuple[int, int] | None], str] = {}
    for module in adapter.modules.values():
        try:
            layer = matcher.index.find(module.name)
            if layer is None:
                unmatched.append(module.name)
                continue
            place = (layer.weight.key, layer.weight.rows)
            if (other := taken.setdefault(place, module.name)) != module.name:
                raise MismatchError(f"changes the same layer as {other}")
            module.detected.check_fits(layer.weight.shape)
            found = _edits_of(adapter, module, layer, sign * weighted.of(module.name))
        except (AmbiguousNameError, MismatchError) as error:
            faults.append(IncompatibleError(str(error), path=adapter.path, key=module.name))
            continue
        for edit in found:
            if edit.strength != 0:  # the rest of the tensor is copied byte for byte
                matcher.edits.setdefault(edit.param.key, []).append(edit)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise IncompatibleError(
            f"{len(faults)} modules do not fit {matcher.store.path}",
            path=adapter.path,
            details=[f"{fault.key}: {fault.message}" for fault in faults],
        )
    return AdapterReport(
        path=adapter.path,
        strength=weighted.strength,
        modules=len(adapter.modules),
        matched=len(adapter.modules) - len(unmatched),
        unmatched=tuple(unmatched),
        algorithms=count_labels(adapter),
        recut=adapter.recut,
    )


def _edits_of(adapter: Adapter, module: AdapterModule, layer: Layer, strength: float) -> list[Edit]:
    edits = [Edit(adapter, module, "weight", layer.weight, strength)]
    bias_slots = [slot for slot in ("diff_b", "b_norm", "lora_up.bias") if slot in module.keys]
    if not bias_slots:
        return edits
    if layer.bias is not None:
        return [*edits, Edit(adapter, module, "bias", layer.bias, strength)]
    for slot in bias_slots:  # LyCORIS writes zeros for layers without a bias
        if adapter.store.tensor(module.keys[slot]).float().abs().max() > 0:
            raise MismatchError(f"{slot} changes a bias, but {layer.path} has none")
    return edits


def _check_matches(reports: Sequence[AdapterReport], strict: bool) -> list[str]:
    """Zero matches are an error; unmatched modules are one with ``--strict``."""
    warnings = []
    for report in reports:
        if report.matched == 0:
            raise IncompatibleError(
                f"0 of {report.modules} modules match a layer of the checkpoint",
                path=report.path,
                details=listed(report.unmatched),
                hint="is the adapter for another model, or named for another program? `lycotool inspect` says, "
                "`lycotool convert` renames",
            )
        if report.unmatched:
            message = f"{len(report.unmatched)} of {report.modules} modules match no layer"
            if strict:
                raise IncompatibleError(message, path=report.path, details=report.unmatched)
            warnings.append(f"{report.path}: {message}: {', '.join(listed(report.unmatched))}")
    return warnings
