"""An adapter file as modules of the registry, before and after its tensors are read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lycotool.algorithms import SLOT_NAMES
from lycotool.algorithms.base import DEFAULT_READING, Bound, Dims, MismatchError, Reading
from lycotool.algorithms.detection import Detected, detect
from lycotool.errors import BadInputError, IncompatibleError, LycotoolError, NumericError
from lycotool.formats.keys import AdapterKeys, ModuleKeys, parse_keys
from lycotool.formats.scales import PeftScales, scales_from_metadata
from lycotool.io.dtypes import FLOATING
from lycotool.io.store import TensorStore
from lycotool.lazy import torch
from lycotool.linalg.finite import is_finite

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: Slots that hold counts and switches rather than weights.
_INTEGER_SLOTS = frozenset({"on_input", "bias_indices", "bias_size"})
#: dtypes they have, or have after a whole file was cast.
_COUNTS = frozenset({"BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64"})
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class AdapterInput:
    """An adapter as the user names it, with its strength.

    ``te``, ``unet`` and ``lbw`` are factors of its own beside those of the command: for text
    encoders, the denoiser, and its blocks; see :mod:`lycotool.ops._strengths`. ``density``,
    ``gamma`` and ``epsilon`` are its own values for a merge method that takes them.
    """

    path: str
    strength: float = 1.0
    te: float | None = None
    unet: float | None = None
    lbw: str | None = None
    density: float | None = None
    gamma: float | None = None
    epsilon: float | None = None


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """One recognised module: where its tensors are and the numbers of its formula."""

    name: str
    keys: Mapping[str, str]
    detected: Detected
    dims: Dims


@dataclass(frozen=True)
class Adapter:
    """An adapter file, sorted into modules.

    Attributes
    ----------
    faults
        What is wrong with single modules. `inspect` shows them; every command that
        computes calls :meth:`require_sound` first.
    warnings
        What is left aside, and why; ``--strict`` makes these errors.
    notes
        What is read in one of several possible ways; ``--strict`` makes these errors too.
    recut
        Modules that were named and cut for a checkpoint's layers, exactly.
    """

    store: TensorStore
    keys: AdapterKeys
    modules: Mapping[str, AdapterModule]
    reading: Reading
    faults: tuple[LycotoolError, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    recut: int = 0

    @property
    def path(self) -> str:
        """What the user named."""
        return self.store.path

    def require_sound(self) -> None:
        """Raise the faults, all together.

        Raises
        ------
        BadInputError, IncompatibleError, NumericError
            The class of the first fault; every fault is listed.
        """
        if not self.keys.modules:
            raise IncompatibleError(
                "no adapter modules in this file",
                path=self.path,
                hint="`lycotool inspect FILE` shows what it holds; a checkpoint stands first, adapters after it",
            )
        if len(self.faults) == 1:
            raise self.faults[0]
        if self.faults:
            first = self.faults[0]
            raise type(first)(
                f"{len(self.faults)} modules are damaged",
                path=self.path,
                details=[f"{fault.key}: {fault.message}" for fault in self.faults],
                hint="`lycotool inspect FILE` shows the whole file",
            )

    def load(
        self, module: AdapterModule, device: torch.device, dtype: torch.dtype, *, check: bool = True
    ) -> Bound:
        """Read a module's tensors and make them ready to compute with.

        Parameters
        ----------
        check
            Whether to look for values that are not finite; False when it was done before.

        Raises
        ------
        NumericError
            If a tensor has NaN or infinite values.
        """
        unused = {slot.name for slot in module.detected.layout.slots if slot.unused}
        tensors: dict[str, torch.Tensor] = {}
        for slot, key in module.keys.items():
            if slot in unused or slot == "alpha":
                continue
            tensor = self.store.tensor(key)
            is_count = slot in _INTEGER_SLOTS
            if not is_count:
                tensor = tensor.to(device=device, dtype=dtype)
            if (check or is_count) and tensor.is_floating_point() and not is_finite(tensor):
                kind = "NaN" if torch.isnan(tensor).any() else "Inf"
                raise NumericError(f"has {kind} values", path=self.path, key=key)
            tensors[slot] = tensor if slot == "on_input" else tensor.to(device)
        return Bound(tensors, module.detected.layout, module.detected.sizes, module.dims, self.reading)


def read_adapter(store: TensorStore, *, reading: Reading = DEFAULT_READING) -> Adapter:
    """Recognise every module of an open file, without torch.

    Raises
    ------
    IncompatibleError
        If a module is given twice in two spellings, or a PEFT folder is of an unreadable kind.
    BadInputError
        If a configuration is damaged.
    """
    keys = parse_keys(store.entries, SLOT_NAMES)
    if keys.clashes:
        raise IncompatibleError(
            "the same tensor is given twice, in two spellings",
            path=store.path,
            details=[f"both {first} and {second}" for first, second in keys.clashes],
        )
    scales = _scales(store)
    modules: dict[str, AdapterModule] = {}
    faults: list[LycotoolError] = []
    recogniser = _Recogniser(store, keys, scales, reading)
    for module in keys.modules.values():
        try:
            found = recogniser.recognise(module)
            if keys.spelling == "hcp" and found.dims.alpha is not None:  # what it stores is c itself
                found = replace(found, dims=replace(found.dims, scale=found.dims.alpha))
            modules[module.name] = found
        except MismatchError as error:
            faults.append(BadInputError(str(error), path=store.path, key=module.name))
        except LycotoolError as error:
            faults.append(error)
    warnings = (*store.warnings, *_left_aside(store, keys, modules))
    notes = tuple(_readings(store, keys, modules, scales))
    return Adapter(store, keys, modules, reading, tuple(faults), warnings, notes)


def is_adapter(store: TensorStore) -> bool:
    """Whether a file holds adapter modules rather than a model's own weights."""
    if store.kind in ("peft", "diffusers", "sharded"):
        return store.kind == "peft"
    # GLoRA's suffixes and `magnitude` could be layers of a model; a module must be whole.
    keys = parse_keys(store.entries, SLOT_NAMES)
    return len(keys.unknown) < len(store.entries) / 2 and bool(keys.modules)


def algorithm_in_metadata(metadata: Mapping[str, str]) -> str | None:
    """What the trainer says it trained: the name in ``ss_network_args`` or the module's."""
    if metadata.get("ss_network_module") == "networks.dylora":
        return "dylora"
    try:
        arguments = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return None
    algo = arguments.get("algo") if isinstance(arguments, dict) else None
    return algo.lower() if isinstance(algo, str) else None


def _scales(store: TensorStore) -> Mapping[str, PeftScales]:
    """Scales outside the tensors, by the prefix of the module names they are for."""
    if store.kind == "peft":
        return {_PEFT_PREFIX: PeftScales(store.config, store.path)}
    return scales_from_metadata(store.metadata, store.path)


def _alphas(store: TensorStore, keys: AdapterKeys) -> Mapping[str, float]:
    """Stored alphas by key, without those that a module by itself has to complain about."""
    names = [key for module in keys.modules.values() if (key := module.slots.get("alpha")) is not None]
    try:
        return store.scalars(names)
    except BadInputError:  # every module says so
        return {}


class _Recogniser:
    """The modules of a file, of which hundreds have the same form: each form is looked at once."""

    def __init__(
        self, store: TensorStore, keys: AdapterKeys, scales: Mapping[str, PeftScales], reading: Reading
    ) -> None:
        self._store, self._scales, self._reading = store, scales, reading
        self._hint = algorithm_in_metadata(store.metadata)
        self._alphas = _alphas(store, keys)
        self._infos = {key: file.tensors[name] for key, (file, name) in store.entries.items()}
        #: By slots, and their dtypes and shapes.
        self._forms: dict[tuple[object, ...], Detected] = {}
        #: By the number of the form, which is held so that it is not used again, and alpha.
        self._dims: dict[tuple[int, float | None], tuple[Detected, Dims]] = {}

    def recognise(self, module: ModuleKeys) -> AdapterModule:
        """One module."""
        slots = module.slots
        infos = [self._infos[key] for key in slots.values()]
        form = (*slots, *[info[:2] for info in infos])
        detected = self._forms.get(form)
        if detected is None:
            for slot, key in slots.items():
                _check_dtype(self._store, slot, key)
            shapes = {slot: info.shape for slot, info in zip(slots, infos, strict=True)}
            detected = self._forms[form] = detect(shapes, algorithm_hint=self._hint)
        alpha = None
        if (key_of_alpha := slots.get("alpha")) is not None:
            alpha = self._alphas.get(key_of_alpha)
            if alpha is None:
                alpha = self._store.scalar(key_of_alpha)
            if not math.isfinite(alpha):
                raise NumericError(f"alpha is {alpha}", path=self._store.path, key=key_of_alpha)
        dims = self._numbers(detected, alpha)
        if alpha is None:
            for prefix, configured in self._scales.items():
                if module.name.startswith(prefix):
                    dims = replace(dims, scale=configured.scale(module.name.removeprefix(prefix)))
        return AdapterModule(module.name, slots, detected, dims)

    def _numbers(self, detected: Detected, alpha: float | None) -> Dims:
        same = id(detected), alpha
        found = self._dims.get(same)
        if found is None:
            dims = detected.algorithm.dims(detected.layout, detected.sizes, alpha, self._reading)
            found = self._dims[same] = detected, dims
        return found[1]


def _check_dtype(store: TensorStore, slot: str, key: str) -> None:
    dtype = store.info(key).dtype
    if slot in _INTEGER_SLOTS and dtype not in _COUNTS:
        raise BadInputError(f"has {dtype} values, expected whole numbers", path=store.path, key=key)
    if dtype in FLOATING or slot in _INTEGER_SLOTS or slot == "alpha":
        return
    if dtype in ("BOOL", "C64"):
        name = {"BOOL": "bool", "C64": "complex"}[dtype]
        raise BadInputError(f"has {name} values, expected weights", path=store.path, key=key)
    raise IncompatibleError(
        f"has {dtype.replace('I', 'int').replace('U', 'uint')} values with no scale to read them by",
        path=store.path,
        key=key,
    )


def _left_aside(store: TensorStore, keys: AdapterKeys, modules: Mapping[str, AdapterModule]) -> list[str]:
    """Warnings on everything that has no part in the result."""
    path = store.path
    warnings = [f"{path}: {key}: unknown tensor, left aside" for key in keys.unknown]
    warnings += [f"{path}: {key}: alpha without a module, left aside" for key in keys.orphans]
    if keys.embeddings:
        warnings.append(
            f"{path}: {len(keys.embeddings)} tensors of packed embeddings (bundle_emb) are no modules"
        )
    unused = _group(
        (slot.unused, module.name)
        for module in modules.values()
        for slot in module.detected.layout.slots
        if slot.unused and slot.name in module.keys
    )
    warnings += [f"{path}: {_first_of(names)}: left aside: {reason}" for reason, names in unused.items()]
    return warnings


def _readings(
    store: TensorStore,
    keys: AdapterKeys,
    modules: Mapping[str, AdapterModule],
    scales: Mapping[str, PeftScales],
) -> list[str]:
    """Notes on what is read in one of several possible ways."""
    notes = []
    if len(keys.spellings) > 1:
        notes.append(f"{store.path}: mixes the key names of " + " and ".join(sorted(keys.spellings)))
    ranked = [module for module in modules.values() if module.dims.rank is not None]
    zero = [module.name for module in ranked if module.dims.alpha == 0]
    if zero:
        notes.append(
            f"{store.path}: {_first_of(zero)}: alpha 0 is read as no change"
            " (`--alpha-zero rank` reads it as the rank)"
        )
    configured = tuple(scales)  # prefixes of modules whose scale a configuration gives
    missing = [m.name for m in ranked if m.dims.alpha is None and not m.name.startswith(configured)]
    if missing and keys.spelling == "kohya":
        notes.append(f"{store.path}: {_first_of(missing)}: alpha is missing, read as the rank")
    if any(scale.modifies_base for scale in scales.values()):
        notes.append(f"{store.path}: its initialisation changed the base weights; it fits only those")
    return notes


def _group(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for reason, name in pairs:
        names = grouped.setdefault(reason, [])
        if name not in names:
            names.append(name)
    return grouped


def _first_of(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
