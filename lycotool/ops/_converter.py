"""The work of :mod:`lycotool.ops.convert`: forms, faults, the written file, its verification."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lycotool.algorithms.base import MismatchError
from lycotool.errors import IncompatibleError
from lycotool.formats.dialects import Dialect
from lycotool.io.dtypes import from_torch
from lycotool.io.folder import build_folder, prepare_folder, publish
from lycotool.io.nameless import temporary_beside
from lycotool.io.store import TensorStore
from lycotool.io.writer import FilePlan, TensorPlan, Written, prepare_output, write_file
from lycotool.lazy import torch
from lycotool.linalg.threads import side_by_side
from lycotool.linalg.underflow import Underflow
from lycotool.models.families import FAMILIES
from lycotool.models.layers import AmbiguousNameError, LayerIndex
from lycotool.ops._adapter import Adapter, AdapterModule
from lycotool.ops._common import Progress, as_bytes, refuse_warnings
from lycotool.ops._convert_forms import (
    Form,
    approximated,
    as_full,
    as_lora,
    is_zero,
    read_form,
    rows_of,
    stacked,
    swapped_halves,
    with_bias,
    without_core,
)
from lycotool.ops._convert_metadata import metadata_for, peft_config
from lycotool.ops._convert_plan import Plan, Target, obstacle
from lycotool.ops._convert_render import Rendered, render
from lycotool.ops._convert_verify import Made, differences

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.ops.convert import ConvertOptions

#: Slots of a LoRA that change a bias.
_LORA_BIASES = frozenset({"diff_b", "lora_up.bias"})

_PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True, slots=True)
class ModuleConvert:
    """One module of the result.

    ``change`` says what was done to it beside its name. ``difference`` is the relative
    difference of ΔW, None where it was not looked for.
    """

    name: str
    sources: tuple[str, ...]
    type: str
    rank: int | None
    change: str
    difference: float | None


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What was written, or would be.

    ``family`` is the model it is for, or several that have these names in common.
    """

    output: str
    to: str
    family: str
    modules: tuple[ModuleConvert, ...]
    dropped: dict[str, str]
    verified: bool
    largest_difference: float | None
    nbytes: int
    warnings: tuple[str, ...]
    dry_run: bool


@dataclass(frozen=True, slots=True)
class _Source:
    """A module of the input as read, and in the algorithm it is to have."""

    read: Form
    form: Form
    changes: list[str]
    fault: str | None
    is_exact: bool = True
    base: Tensor | None = None


class Converter:
    """One conversion."""

    def __init__(
        self,
        adapter: Adapter,
        families: Sequence[str],
        dialect: Dialect,
        options: ConvertOptions,
        base: TensorStore | None,
        progress: Progress,
    ) -> None:
        self._adapter, self._dialect = adapter, dialect
        self._families = [FAMILIES[short] for short in families]
        self._options, self._progress = options, progress
        self._base = base
        self._layers = None if base is None else LayerIndex(base.shapes)
        self._faults: dict[str, str] = {}
        self._forms: dict[str, _Source] = {}
        self._underflow = Underflow()

    def run(self, plan: Plan, output: str) -> ConvertResult:
        """Make every module, write, verify, and only then give the output its name."""
        refuse_warnings(self._warnings, strict=self._options.strict)
        target = self._prepare(output)
        self._faults |= plan.faults | self._left_over()
        self._progress.start("convert", self._adapter.store.nbytes)
        made = self._all(plan)
        refuse_warnings(self._underflow.warnings(), strict=self._options.strict)
        tensors = self._tensors(made)
        config = None
        if self._dialect.is_folder:
            config = peft_config(
                [(m.target.name, m.form, m.rendered) for m in made if m.rendered], self._adapter
            )
        metadata = metadata_for(
            self._adapter,
            self._families,
            self._dialect,
            [(m.form, m.rendered) for m in made if m.rendered],
        )
        plans = {key: TensorPlan(from_torch(t.dtype), tuple(t.shape)) for key, t in tensors.items()}
        file = FilePlan(plans, metadata, hashed=not self._dialect.is_folder)
        found: dict[str, float] | None = None
        if not self._options.dry_run:
            found = self._write(target, file, tensors, config, made)
        return self._result(output, made, file.nbytes, found)

    @property
    def _warnings(self) -> tuple[str, ...]:
        """Those of the adapter, but for tensors left aside, which are errors here."""
        adapter = self._adapter
        return (*(text for text in adapter.warnings if not text.endswith("left aside")), *adapter.notes)

    def tensors(self, plan: Plan) -> dict[str, Tensor]:
        """The modules' tensors by key, nothing written.

        Raises
        ------
        IncompatibleError
            If modules cannot be represented, naming each.
        """
        self._faults |= plan.faults
        return self._tensors(self._all(plan))

    def _all(self, plan: Plan) -> list[Made]:
        made = [one for target in plan.targets if (one := self._make(target)) is not None]
        made = [one for one in made if not self._faults.keys() & set(one.target.names)]
        if self._dialect.one_kind:
            made = self._alike(made)
        self._refuse_faults(made)
        dtype, path, underflow = self._options.dtype, self._adapter.path, self._underflow

        def rendered(one: Made) -> Rendered:
            return render(
                one.form, one.target.name, self._dialect, dtype=dtype, path=path, underflow=underflow
            )

        for one, found in zip(made, side_by_side(rendered, made), strict=True):
            one.rendered = found
        return made

    def _alike(self, made: list[Made]) -> list[Made]:
        """Modules of one component that readers configure alike: all with DoRA, and biases, or none.

        A bias that is missing becomes zero; the rarer of modules with and without DoRA are
        faults.
        """
        components: dict[str, list[Made]] = {}
        for one in made:
            components.setdefault(one.target.component, []).append(one)
        kept: list[Made] = []
        for group in components.values():
            with_dora = [one for one in group if one.form.detected.dora_slot is not None]
            without = [one for one in group if one.form.detected.dora_slot is None]
            rarer, usual = sorted((with_dora, without), key=len)
            for one in rarer:
                reason = f"{self._dialect.name} reads DoRA on all modules of a component or on none"
                self._faults |= dict.fromkeys(one.target.names, reason)
            if any(one.form.slots.keys() & _LORA_BIASES for one in usual):
                for one in usual:
                    one.form = with_bias(one.form)
            kept += usual
        return kept

    # --- what cannot be ------------------------------------------------------------------

    def _prepare(self, output: str) -> Path | None:
        if output == "-" and self._options.dry_run:
            return None
        inputs = self._adapter.store.files
        if self._dialect.is_folder:
            return prepare_folder(output, inputs, force=self._options.force)
        return prepare_output(output, inputs=inputs, force=self._options.force)

    def _left_over(self) -> dict[str, str]:
        """Tensors that belong to no module, and what is lost with them."""
        keys = self._adapter.keys
        found = dict.fromkeys(keys.unknown, "unknown tensor")
        found |= dict.fromkeys(keys.orphans, "alpha without a module")
        if not self._dialect.embeddings:
            found |= dict.fromkeys(keys.embeddings, f"{self._dialect.name} has no embeddings")
        return found

    def _refuse_faults(self, made: Sequence[Made]) -> None:
        names: dict[str, int] = {}
        for one in made:
            names[one.target.name] = names.get(one.target.name, 0) + 1
        twice = {name for name, count in names.items() if count > 1}
        for one in made:
            if one.target.name in twice:
                reason = f"another module becomes {one.target.name} too"
                self._faults |= dict.fromkeys(one.target.names, reason)
        if self._faults and (twice or not self._options.drop):
            raise IncompatibleError(
                f"{len(self._faults)} modules or tensors cannot be written as {self._dialect.name}",
                path=self._adapter.path,
                details=[f"{name}: {reason}" for name, reason in self._faults.items()],
                hint="`--drop` leaves them out; `--algo lora` writes other algorithms as LoRA",
            )
        if not made:
            raise IncompatibleError(f"nothing is left to write as {self._dialect.name}", path=self._adapter.path,
                                    details=[f"{name}: {reason}" for name, reason in self._faults.items()])  # fmt: skip

    # --- modules -------------------------------------------------------------------------

    def _make(self, target: Target) -> Made | None:
        """One module of the result, or None with a fault noted."""
        parts: list[Form | int] = []
        changes: list[str] = []
        exact, base = True, None
        faults: dict[str, str] = {}
        for source in target.sources:
            if isinstance(source, int):
                parts.append(source)
                continue
            if source.name not in self._forms:
                self._forms[source.name] = self._source(source)
                self._progress.advance(sum(self._adapter.store.info(k).nbytes for k in source.keys.values()))
            found = self._forms[source.name]
            if found.fault is not None:
                faults[source.name] = found.fault
                continue
            parts.append(found.form)
            changes += [change for change in found.changes if change not in changes]
            exact, base = exact and found.is_exact, found.base
        names = target.names
        if faults:
            reason = f"would be fused with {next(iter(faults))}"
            self._faults |= dict.fromkeys(names, reason) | faults
            return None
        form, misfit = None, ""
        try:
            form = self._shaped(target, parts, changes)
        except MismatchError as error:
            misfit = str(error)
        if form is None:
            reason = misfit or f"{parts_label(parts)} cannot be {changes[-1]} exactly; `--algo lora` can"
            self._faults |= dict.fromkeys(names, reason)
            return None
        if target.rows is not None and is_zero(form):
            return None  # a part that the fused module left alone
        before = [self._forms[name].read for name in names]
        sources = [part if isinstance(part, int) else before.pop(0) for part in parts]
        return Made(target, sources, form, changes, exact, base)

    def _shaped(self, target: Target, parts: list[Form | int], changes: list[str]) -> Form | None:
        """The parts stacked, split or swapped as the target asks."""
        if len(parts) > 1:
            changes.append("fused")
            return stacked(parts)
        form = parts[0]
        if isinstance(form, int):
            raise TypeError(target.name)
        if target.rows is not None:
            changes.append("split")
            return rows_of(form, torch.arange(*target.rows))
        if target.swaps_halves:
            changes.append("given its halves in the other order")
            return swapped_halves(form)
        return form

    def _source(self, module: AdapterModule) -> _Source:
        """A module of the input, in the algorithm it is to have."""
        read = read_form(self._adapter, module, pointwise=self._families[0].pointwise)
        try:
            read.check_magnitude()
            found = self._changed(module, read)
        except (AmbiguousNameError, MismatchError) as error:
            return _Source(read, read, [], str(error))
        if found.fault is None:
            fault = obstacle(self._dialect, found.form.detected, found.form.slots)
            found = replace(found, fault=fault)
        return found

    def _changed(self, module: AdapterModule, read: Form) -> _Source:
        found = _Source(read, read, [], None)
        if self._options.algo == "lora":
            found = self._to_lora(module, read)
        elif self._options.algo == "full":
            found = self._to_full(module, read)
        form = found.form
        if found.fault is None and "lora_mid.weight" in form.slots and not self._dialect.use_conv_cp:
            found = replace(found, form=without_core(form), changes=[*found.changes, "its core folded"])
        return found

    def _to_lora(self, module: AdapterModule, read: Form) -> _Source:
        if (
            "lora_up.weight" in read.slots
            and read.detected.dora_slot is None
            and not (read.slots.keys() & {"lora_mid.weight", "bias_indices"})
        ):
            return _Source(read, read, [], None)
        if read.has_no_matrix:
            return _Source(read, read, [], None)  # a norm or a bias: LoRA has no form for it
        form = as_lora(read)
        if form is not None:
            return _Source(read, form, ["written as LoRA"], None)
        layer, fault = self._layer(module)
        shape = read.shape if layer is None else tuple(layer.shape)
        if read.detected.needs_base and layer is None:
            return _Source(read, read, [], fault)
        if shape is None:
            return _Source(read, read, [], fault)
        if self._options.rank is None and self._options.error is None:
            label = read.detected.label
            return _Source(read, read, [], f"{label} has no exact LoRA form: give `--rank` or `--error`")
        options = self._options
        form = approximated(read, layer, rank=options.rank, error=options.error, shape=shape)
        return _Source(read, form, ["approximated by LoRA"], None, is_exact=False, base=layer)

    def _to_full(self, module: AdapterModule, read: Form) -> _Source:
        if "diff" in read.slots or read.has_no_matrix:
            return _Source(read, read, [], None)
        layer, fault = self._layer(module)
        shape = read.shape if layer is None else tuple(layer.shape)
        if shape is None or (read.detected.needs_base and layer is None):
            return _Source(read, read, [], fault)
        return _Source(read, as_full(read, layer, shape), ["written as full"], None, base=layer)

    def _layer(self, module: AdapterModule) -> tuple[Tensor | None, str]:
        """The base's weight under a module, or None and why there is none."""
        if self._base is None or self._layers is None:
            return None, f"{module.detected.label} depends on the base weight: give `--base CHECKPOINT`"
        layer = self._layers.find(module.name)
        if layer is None:
            return None, f"{self._base.path} has no such layer"
        return layer.weight.view(self._base.tensor(layer.weight.key).float()), ""

    # --- writing -------------------------------------------------------------------------

    def _tensors(self, made: Sequence[Made]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for one in made:
            if one.rendered is not None:
                tensors |= one.rendered.tensors
        if self._dialect.embeddings:
            for key in self._adapter.keys.embeddings:
                tensors[key] = self._adapter.store.tensor(key)
        return tensors

    def _write(
        self,
        target: Path | None,
        plan: FilePlan,
        tensors: Mapping[str, Tensor],
        config: str | None,
        made: Sequence[Made],
    ) -> dict[str, float] | None:
        """Write, verify what is there, then give it its name."""
        found: dict[str, float] | None = None

        def produce(key: str) -> list[memoryview]:
            return [as_bytes(tensors[key])]

        def check(written: Written) -> None:
            nonlocal found
            found = self._verify(written.path, made)

        if config is None or target is None:
            write_file(target, plan, produce, check=check)
            return found
        building = temporary_beside(target)
        try:
            build_folder(building, _PEFT_WEIGHTS, plan, produce, {_PEFT_CONFIG: config})
            found = self._verify(building, made)
            publish(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return found

    def _verify(self, path: Path, made: Sequence[Made]) -> dict[str, float] | None:
        """Relative difference of ΔW by module; None where nothing was looked at."""
        if self._options.verify is False:
            return None
        return differences(
            path, made, self._dialect, source=self._adapter.path, every=bool(self._options.verify)
        )

    def _result(
        self, output: str, made: Sequence[Made], nbytes: int, by_name: Mapping[str, float] | None
    ) -> ConvertResult:
        found = by_name or {}
        modules = tuple(
            ModuleConvert(
                one.target.name,
                tuple(one.target.names),
                one.form.detected.label,
                one.form.dims.rank,
                ", ".join(one.change),
                found.get(one.target.name),
            )
            for one in made
        )
        return ConvertResult(
            output=output,
            to=self._dialect.name,
            family=" or ".join(family.name for family in self._families),
            modules=modules,
            dropped=dict(self._faults),
            verified=by_name is not None,
            largest_difference=max(found.values()) if found else None,
            nbytes=nbytes,
            warnings=(*self._warnings, *self._underflow.warnings()),
            dry_run=self._options.dry_run,
        )


def parts_label(parts: Sequence[Form | int]) -> str:
    """The algorithms of some parts, for an error."""
    return " and ".join(dict.fromkeys(p.detected.label for p in parts if isinstance(p, Form)))
