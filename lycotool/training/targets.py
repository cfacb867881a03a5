"""From a preset and a base model to the layers that are trained, each with its name in files."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lycotool.errors import BadInputError, LycotoolError, UsageError
from lycotool.lazy import torch
from lycotool.models.families import FAMILIES
from lycotool.models.families.base import TextEncoder
from lycotool.models.families.table import ModuleTable, Naming, Site
from lycotool.models.naming import flat
from lycotool.training.bases.build import inside_text_model
from lycotool.training.bases.model import BaseModel
from lycotool.training.presets import ELSEWHERE, Overrides, Preset

Kind = Literal["linear", "conv", "norm"]

_UNET_PREFIX = "lora_unet_"


@dataclass(frozen=True, slots=True)
class Target:
    """A layer that is trained.

    Attributes
    ----------
    component
        ``unet``, ``te1`` or ``te2``.
    path
        Of the module in the live model.
    name
        Of the adapter's module in files, from static tables: ``lora_unet_mid_block_…``.
    module
        The layer itself.
    kind
        What it is; a norm is trained by the algorithm ``norm``, whatever the others are.
    overrides
        What the preset says for this layer alone: ``algo`` and its arguments.
    """

    component: str
    path: str
    name: str
    module: torch.nn.Module
    kind: Kind
    overrides: Mapping[str, object] = field(default_factory=dict)


def find_targets(
    base: BaseModel,
    preset: Preset,
    *,
    train_unet: bool = True,
    train_te: bool = True,
    train_norm: bool = False,
    conv: bool = True,
    names: Literal["kohya", "diffusers"] = "kohya",
) -> tuple[Target, ...]:
    """The layers a preset selects, the text encoders' first.

    Parameters
    ----------
    train_norm
        Take the norms too.
    conv
        Take convolutions with a kernel larger than one element, if the preset does. Those the
        preset gives a ``dim`` of their own are taken in any case.
    names
        ``kohya``: as the field's files have them, SDXL's UNet in LDM's names; ``diffusers``:
        all of them after diffusers' paths.

    Raises
    ------
    UsageError
        If nothing is selected.
    BadInputError
        If a class or a pattern of a user's preset selects nothing.
    """
    networks = [*_text_encoders(base), _unet(base, names)]
    finder = _Finder(preset, train_norm=train_norm, conv=conv and preset.enable_conv)
    # A preset is checked against the whole model, whichever part of it is trained.
    found = [target for network in networks for target in finder.find(network)]
    finder.check_use(networks)
    targets = [target for target in found if (train_unet if target.component == "unet" else train_te)]
    if not targets:
        parts = " and ".join(["the UNet"] * train_unet + ["the text encoders"] * train_te) or "nothing"
        raise UsageError(
            f"the preset {preset.name} selects no layer in {parts}",
            hint="choose another preset, or train the other part too",
        )
    return tuple(targets)


# --- networks --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Network:
    """One network of a base, and how the layers in it are called."""

    component: str
    root: torch.nn.Module
    table: ModuleTable
    naming: Naming
    encoder: TextEncoder | None

    @property
    def part(self) -> str:
        """What a preset calls it: ``unet`` or ``text_encoder``."""
        return "unet" if self.encoder is None else "text_encoder"

    def aliases(self, path: str) -> tuple[str, ...]:
        """Every path a preset's pattern may mean a module by.

        Text encoders have an outer level in some versions of transformers and in all files;
        SDXL's UNet has LDM's paths in sd-scripts.
        """
        if self.encoder is not None:
            inner = inside_text_model(path)
            return (inner,) if inner in self.encoder.beside else (self.encoder.inside + inner, inner)
        if self.naming != "native" or (site := self._site(path)) is None:
            return (path,)
        return path, site.path("native") or path

    def name(self, path: str) -> str:
        """The adapter's module name in files."""
        if self.encoder is not None:
            inner = inside_text_model(path)
            outer = "" if inner in self.encoder.beside else self.encoder.inside
            if self._site(inner) is not None:
                return self.encoder.kohya + flat(outer + inner)
        elif (site := self._site(path)) is not None and (own := site.path(self.naming)) is not None:
            return _UNET_PREFIX + flat(own)
        raise BadInputError(f"the layer {path} of this model has no name in adapters")

    def _site(self, path: str) -> Site | None:
        found = [site for naming, site in self.table.find(path) if naming == "diffusers"]
        return found[0] if found else None


def _unet(base: BaseModel, names: str) -> _Network:
    naming = FAMILIES[base.family].kohya if names == "kohya" else "diffusers"
    return _Network("unet", base.unet, base.unet_table, naming, None)


def _text_encoders(base: BaseModel) -> Iterator[_Network]:
    declared = FAMILIES[base.family].text_encoders
    for (component, encoder), model in zip(declared.items(), base.text_encoders, strict=True):
        yield _Network(component, model, encoder.table, "diffusers", encoder)


# --- finding ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer and the modules it is in, outermost first and itself last, as (path, class)."""

    path: str
    module: torch.nn.Module
    kind: Kind
    inside: tuple[tuple[str, str], ...]


def _layers(root: torch.nn.Module) -> Iterator[_Layer]:
    classes = {path: type(module).__name__ for path, module in root.named_modules()}
    for path, module in root.named_modules():
        kind = _kind(module)
        if kind is not None:
            pieces = path.split(".")
            above = [".".join(pieces[:depth]) for depth in range(1, len(pieces) + 1)]
            yield _Layer(path, module, kind, tuple((place, classes[place]) for place in above))


def _kind(module: torch.nn.Module) -> Kind | None:
    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
        return "conv"
    if isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm) and module.weight is not None:
        return "norm"
    return None


class _Finder:
    """Finds layers, and remembers which classes and patterns of the preset were of use."""

    def __init__(self, preset: Preset, *, train_norm: bool, conv: bool) -> None:
        self._preset = preset
        self._train_norm = train_norm
        self._conv = conv
        self._used: set[tuple[str, str]] = set()

    def find(self, network: _Network) -> Iterator[Target]:
        for layer in _layers(network.root):
            if layer.kind == "norm" and not self._train_norm:
                continue
            aliases = network.aliases(layer.path)
            if self._is_excluded(aliases):
                continue
            inside = self._selected(layer, aliases, network)
            if inside is None:
                continue
            overrides = self._overrides(inside, aliases)
            if layer.kind == "norm":
                overrides = {}
            elif layer.kind == "conv" and not self._conv and not overrides.get("dim"):
                kernel = layer.module.kernel_size
                assert isinstance(kernel, tuple)
                if any(size != 1 for size in kernel):
                    continue
            yield Target(
                network.component, layer.path, network.name(layer.path), layer.module, layer.kind, overrides
            )

    def _selected(self, layer: _Layer, aliases: Sequence[str], network: _Network) -> tuple[str, ...] | None:
        """The classes around the layer that count, outermost first; None if it is not selected."""
        where = self._preset.unet if network.encoder is None else self._preset.text
        by_name = [pattern for pattern in where.names if self._fits(pattern, aliases)]
        self._used |= {(network.part, pattern) for pattern in by_name}
        selected = None
        for depth, (place, name) in enumerate(layer.inside):
            if name in where.modules and not self._is_excluded(network.aliases(place)):
                self._used.add((network.part, name))
                if selected is None:
                    selected = tuple(class_name for _, class_name in layer.inside[depth:])
        if selected is None and by_name:
            return (layer.inside[-1][1],)
        return selected

    def _overrides(self, inside: Sequence[str], aliases: Sequence[str]) -> Overrides:
        """What the preset's maps say: a path before patterns before classes, inner classes before outer.

        An inner class's values replace an outer's; only its algorithm is inherited.
        """
        found: dict[str, object] = {}
        for name in inside:
            values = self._preset.module_algo_map.get(name)
            if values is not None:
                self._used.add(("module_algo_map", name))
                found = {**({"algo": found["algo"]} if "algo" in found else {}), **values}
        fitting = [pattern for pattern in self._preset.name_algo_map if self._fits(pattern, aliases)]
        self._used |= {("name_algo_map", pattern) for pattern in fitting}
        exact = [pattern for pattern in fitting if pattern in aliases]
        return self._preset.name_algo_map[(exact or fitting)[0]] if fitting else found

    def _fits(self, pattern: str, aliases: Sequence[str]) -> bool:
        return any(self._preset.matches(pattern, alias) for alias in aliases)

    def _is_excluded(self, aliases: Sequence[str]) -> bool:
        found = [pattern for pattern in self._preset.exclude if self._fits(pattern, aliases)]
        self._used |= {("exclude_name", pattern) for pattern in found}
        return bool(found)

    # --- what was of no use --------------------------------------------------------------

    def check_use(self, networks: Sequence[_Network]) -> None:
        """Refuse what selected nothing in the networks that are trained.

        Raises
        ------
        BadInputError
            With what comes near.
        """
        if not self._preset.is_file:
            return
        classes = sorted({type(m).__name__ for network in networks for m in network.root.modules()})
        paths = [alias for n in networks for layer in _layers(n.root) for alias in n.aliases(layer.path)]
        for key, text, places in self._asked():
            if any((place, text) in self._used for place in places):
                continue
            if not key.endswith(("_module", "module_algo_map")):
                raise self._useless_pattern(key, text, paths)
            if text not in ELSEWHERE:
                raise self._useless_class(key, text, classes)

    def _asked(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """Key, class or pattern, and the places where it may have been of use."""
        preset = self._preset
        for part, own in (("unet", preset.unet), ("text_encoder", preset.text)):
            for kind, texts in (("module", own.modules), ("name", own.names)):
                for text in texts:
                    # What is given for every network need be of use in one.
                    places = ("unet", "text_encoder") if text in preset.shared else (part,)
                    yield f"{part}_target_{kind}", text, places
        for key, asked in (
            ("module_algo_map", preset.module_algo_map),
            ("name_algo_map", preset.name_algo_map),
            ("exclude_name", preset.exclude),
        ):
            for text in asked:
                yield key, text, (key,)

    def _useless_class(self, key: str, name: str, classes: Sequence[str]) -> LycotoolError:
        if name in classes:
            return BadInputError(f"no layer in a {name} is selected", path=self._preset.name, key=key)
        near = difflib.get_close_matches(name, classes, n=1)
        return BadInputError(
            f"no module of this model is a {name}",
            path=self._preset.name,
            key=key,
            hint=f"did you mean {near[0]!r}?" if near else f"its classes: {', '.join(classes)}",
        )

    def _useless_pattern(self, key: str, pattern: str, paths: Sequence[str]) -> LycotoolError:
        near = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"paths look like {paths[-1]!r}"
        anywhere = ("*" if self._preset.use_fnmatch else ".*") + pattern
        if any(self._preset.matches(pattern, path) for path in paths):
            is_target = key.endswith("target_name")
            hint = "it fits norms only, see train_norm" if is_target else "nothing selects the layers it fits"
        elif any(self._preset.matches(anywhere, path) for path in paths):
            hint = f"patterns fit from the start of a path; did you mean {anywhere!r}?"
        return BadInputError(
            f"the pattern {pattern!r} fits no layer that is selected",
            path=self._preset.name,
            key=key,
            hint=hint,
        )


# --- the table -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TableRow:
    """One line of the module type table."""

    component: str
    algo: str
    modules: int
    parameters: int


def module_table(modules: Iterable[tuple[str, str, int]]) -> tuple[TableRow, ...]:
    """How many modules and parameters each algorithm has in each component.

    Parameters
    ----------
    modules
        Component, algorithm and number of trained parameters of each module.
    """
    count: Counter[tuple[str, str]] = Counter()
    parameters: Counter[tuple[str, str]] = Counter()
    for component, algo, number in modules:
        count[component, algo] += 1
        parameters[component, algo] += number
    return tuple(TableRow(*key, number, parameters[key]) for key, number in sorted(count.items()))
