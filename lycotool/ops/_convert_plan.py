"""Which modules a converted adapter has, and which of the input's each is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lycotool.algorithms.detection import Detected
from lycotool.formats.dialects import Dialect, DialectNaming
from lycotool.models.families.base import Family
from lycotool.models.families.locate import Locator, Place
from lycotool.models.families.table import Naming, Rule, Site
from lycotool.models.naming import flat
from lycotool.ops._adapter import AdapterModule

#: Where a part has no module in the input: so many rows stay as they are.
Unchanged = int


@dataclass(frozen=True, slots=True)
class Target:
    """One module of the result.

    Attributes
    ----------
    sources
        The input's modules whose rows it has, in order; an int is so many unchanged rows.
    rows
        Which rows of the one source it takes: ``(start, stop)``; None is all.
    swaps_halves
        Whether the halves of the rows change places.
    """

    name: str
    component: str
    sources: tuple[AdapterModule | Unchanged, ...]
    rows: tuple[int, int] | None = None
    swaps_halves: bool = False

    @property
    def names(self) -> list[str]:
        """Names of the input's modules that it is made of."""
        return [source.name for source in self.sources if isinstance(source, AdapterModule)]

    @property
    def is_whole(self) -> bool:
        """Whether it is one module of the input, only called otherwise."""
        return len(self.sources) == 1 and self.rows is None and not self.swaps_halves


@dataclass(slots=True)
class Plan:
    """What becomes of every module of the input."""

    targets: list[Target] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the result's modules; two plans with the same ones are the same."""
        return [target.name for target in self.targets]


def make_plan(
    modules: Iterable[AdapterModule], family: Family, dialect: Dialect, *, reads: DialectNaming | None = None
) -> Plan:
    """Name every module in another dialect; split and fuse where the naming does.

    What cannot be named is in :attr:`Plan.faults`, with the reason.

    Parameters
    ----------
    reads
        The naming the modules are in; None is the one that most of them are in.
    """
    return _Planner(family, dialect).plan(list(modules), reads)


class _Planner:
    def __init__(self, family: Family, dialect: Dialect) -> None:
        self._family, self._dialect = family, dialect
        self._locator = Locator(family)
        self._plan = Plan()
        self._placed: dict[tuple[str, Site], str] = {}
        #: Parts to be fused: rule and indices to part number and module.
        self._parts: dict[tuple[str, Rule, tuple[int, ...]], dict[int, AdapterModule]] = {}

    def plan(self, modules: list[AdapterModule], reads: DialectNaming | None) -> Plan:
        located = {module.name: self._locator.locate(module.name) for module in modules}
        usual = _commonest(located.values()) if reads is None else reads
        if usual == "kohya":
            usual = self._family.kohya
        for module in modules:
            places = located[module.name]
            places = [place for place in places if place.naming == usual] or places
            if not places:
                self._plan.faults[module.name] = f"is no module of {self._family.name}"
            elif len(places) > 1:
                names = " or ".join(str(place.site.path(place.naming)) for place in places)
                self._plan.faults[module.name] = f"can be {names}"
            else:
                self._place_once(module, places[0])
        for (component, rule, indices), parts in self._parts.items():
            self._fuse(component, Site(rule, indices, None), parts)
        return self._plan

    def _place_once(self, module: AdapterModule, place: Place) -> None:
        """Place a module, unless another one is the same layer."""
        first = self._placed.setdefault((place.component, place.site), module.name)
        if first != module.name:
            self._plan.faults[module.name] = f"is the same layer as {first}"
        else:
            self._place(module, place)

    def _naming(self, component: str) -> Naming:
        if component != "unet":
            return "diffusers"  # every dialect has transformers' names there
        return self._family.kohya if self._dialect.naming == "kohya" else self._dialect.naming

    def _place(self, module: AdapterModule, place: Place) -> None:
        fault = self._unknown(place)
        if fault is not None:
            self._plan.faults[module.name] = fault
            return
        naming, site = self._naming(place.component), place.site
        path = site.path(naming)
        if place.parts:
            self._partial(place, naming, module)
        elif path is not None:
            swaps = _swaps(site.rule, module) and (place.naming == "diffusers") != (naming == "diffusers")
            self._add(place.component, path, (module,), swaps_halves=swaps)
        elif site.part is not None:
            self._parts.setdefault((place.component, site.rule, site.indices), {})[site.part] = module
        elif len(site.rule.diffusers) > 1 and naming == "diffusers":
            self._split(place.component, site, module, site.rule.rows)
        else:
            self._plan.faults[module.name] = f"{self._dialect.name} has no such module"

    def _unknown(self, place: Place) -> str | None:
        """Why the dialect has no room for this place, if it has none."""
        dialect = self._dialect
        if place.component != "unet" and dialect.text is None:
            return f"{dialect.name} has no room for text encoders"
        path = place.site.path("diffusers") or ""
        if place.component == "unet" and path.startswith(dialect.unknown_modules):
            return f"{dialect.name} does not train {path}"
        return None

    def _partial(self, place: Place, naming: Naming, module: AdapterModule) -> None:
        """A module that is the first parts of a fused one."""
        site = place.site
        shares = site.rule.rows[: place.parts]
        path, height = site.path(naming), _height(module)
        if path is None:
            self._split(place.component, site, module, shares)
        elif height is None or height % sum(shares):
            self._plan.faults[module.name] = f"{height} rows do not split into parts of {shares}"
        else:
            unit = height // sum(shares)
            rest = unit * (sum(site.rule.rows) - sum(shares))
            self._add(place.component, path, (module, rest))

    def _split(self, component: str, site: Site, module: AdapterModule, shares: tuple[int, ...]) -> None:
        height = _height(module)
        if height is None or height % sum(shares):
            self._plan.faults[module.name] = f"{height} rows do not split into parts of {shares}"
            return
        unit, start = height // sum(shares), 0
        for part, share in enumerate(shares):
            stop = start + unit * share
            path = Site(site.rule, site.indices, part).path("diffusers")
            self._add(component, str(path), (module,), rows=(start, stop))
            start = stop

    def _fuse(self, component: str, site: Site, parts: Mapping[int, AdapterModule]) -> None:
        path = site.path(self._naming(component))
        heights = {part: _height(module) for part, module in parts.items()}
        units = {
            None if height is None or height % site.rule.rows[part] else height // site.rule.rows[part]
            for part, height in heights.items()
        }
        unit = units.pop()
        if path is None or units or unit is None:
            for part, module in parts.items():
                self._plan.faults[module.name] = (
                    f"{self._dialect.name} has no such module"
                    if path is None
                    else f"{heights[part]} rows do not fit the other parts of {path}"
                )
            return
        sources = [
            parts[part] if part in parts else unit * share for part, share in enumerate(site.rule.rows)
        ]
        self._add(component, path, tuple(sources))

    def _add(
        self,
        component: str,
        path: str,
        sources: tuple[AdapterModule | Unchanged, ...],
        *,
        rows: tuple[int, int] | None = None,
        swaps_halves: bool = False,
    ) -> None:
        name = module_name(self._dialect, self._family, component, path)
        self._plan.targets.append(Target(name, component, sources, rows, swaps_halves))


def module_name(dialect: Dialect, family: Family, component: str, path: str) -> str:
    """What a dialect calls a module.

    Parameters
    ----------
    path
        Dotted path inside the component, in the dialect's naming.
    """
    if component != "unet" and dialect.text is not None:
        encoder = family.text_encoders[component]
        prefix = str(getattr(encoder, dialect.text))
        path = path if path.startswith(encoder.beside or ("\0",)) else encoder.inside + path
    else:
        prefix = _denoiser_prefix(dialect, family, path)
    return prefix + (path if dialect.dotted else flat(path))


def _denoiser_prefix(dialect: Dialect, family: Family, path: str) -> str:
    if dialect.denoiser is None:
        return "" if path.startswith(family.beside or ("\0",)) else family.diffusers_prefix
    if dialect.transformer is not None and family.diffusers_prefix == "transformer.":
        return dialect.transformer
    return dialect.denoiser


def obstacle(dialect: Dialect, detected: Detected, slots: Iterable[str]) -> str | None:
    """Why readers of a dialect do not understand a module, if they do not."""
    present = set(slots)
    if detected.algorithm.name not in dialect.algorithms:
        return f"{dialect.name} has no {detected.algorithm.name}"
    if lost := sorted(present & dialect.unread):
        return f"readers of {dialect.name} ignore {', '.join(lost)}"
    if detected.dora_slot and dialect.dora_slot != "dora_scale" and "lora_up.weight" not in present:
        return f"{dialect.name} has no DoRA over {detected.algorithm.name}"
    if detected.dora_axis is not None and detected.dora_axis not in dialect.dora_axes:
        return f"{dialect.name} has no DoRA" + (
            f" over the {detected.dora_axis} axis" if dialect.dora_axes else ""
        )
    if detected.layout.use_conv_cp and not dialect.use_conv_cp:
        return f"{dialect.name} has no CP core"
    if "bias_indices" in present and not dialect.sparse:
        return f"{dialect.name} has no sparse part"
    if dialect.one_kind and detected.dora_axis is not None and present & {"diff_b", "lora_up.bias"}:
        return f"{dialect.name} has no DoRA with a bias change"
    if present & {"diff_b", "lora_up.bias"} and dialect.bias_slot is None and "diff" not in present:
        return f"{dialect.name} has no bias changes"
    return None


def _swaps(rule: Rule, module: AdapterModule) -> bool:
    if not rule.swaps_halves:
        return False
    if not rule.swaps_only_at_ratio:
        return True
    layout, sizes = module.detected.layout, module.detected.sizes
    rows, columns = layout.rows(sizes), layout.columns(sizes)
    return rows is not None and columns is not None and rows == rule.swaps_only_at_ratio * columns


def _height(module: AdapterModule) -> int | None:
    return module.detected.layout.rows(module.detected.sizes)


def _commonest(places: Iterable[list[Place]]) -> DialectNaming | None:
    """The naming of most modules that are in one only."""
    counts: dict[Naming, int] = {}
    for found in places:
        if len(found) == 1 and found[0].component == "unet":
            counts[found[0].naming] = counts.get(found[0].naming, 0) + 1
    if not counts:
        return None
    best: Naming = max(counts, key=lambda naming: counts[naming])
    return best
