"""The modules that several adapters have for one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lycotool.errors import IncompatibleError
from lycotool.ops._adapter import Adapter, AdapterModule
from lycotool.ops._naming import places
from lycotool.ops._strengths import Weighted


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter's module at one layer, with its weight and the adapter's position."""

    adapter: Adapter
    module: AdapterModule
    weight: float
    index: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """Everything that changes one layer.

    Attributes
    ----------
    parts
        In the adapters' order; an adapter that has nothing here, or weight 0, is left out.
    weights
        Of every adapter, also of those without a part.
    """

    place: tuple[str, str]
    parts: tuple[Part, ...]
    weights: tuple[float, ...]

    @property
    def name(self) -> str:
        """The first part's name for the layer."""
        return self.parts[0].module.name

    @property
    def is_vector(self) -> bool:
        """Whether the weight it changes is a norm's."""
        return all(part.module.detected.algorithm.name == "norm" for part in self.parts)

    @property
    def has_weight(self) -> bool:
        """Whether it changes more than a bias."""
        return any(part.module.keys.keys() != {"diff_b"} for part in self.parts)

    @property
    def needs_base(self) -> bool:
        """Whether the change depends on the base weight."""
        return any(part.module.detected.needs_base for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Of the stored tensors."""
        return sum(p.adapter.store.info(key).nbytes for p in self.parts for key in p.module.keys.values())


def by_layer(adapters: Sequence[Weighted]) -> list[Group]:
    """Modules by the layer they change, in the order in which the adapters name it.

    Raises
    ------
    IncompatibleError
        If one adapter names a layer twice.
    """
    known = [place for a in adapters for place in places(a.adapter.modules, ()).values()]
    found: dict[tuple[str, str], list[Part]] = {}
    for index, weighted in enumerate(adapters):
        adapter = weighted.adapter
        for name, place in places(adapter.modules, known).items():
            weight = weighted.of(name)
            if weight == 0 and weighted.strength != 0:
                continue  # a block that is left out
            parts = found.setdefault(place, [])
            if any(part.index == index for part in parts):
                raise IncompatibleError(
                    f"names the same layer as {parts[-1].module.name}", path=adapter.path, key=name
                )
            parts.append(Part(adapter, adapter.modules[name], weight, index))
    return [
        Group(place, tuple(parts), tuple(weighted.of(parts[0].module.name) for weighted in adapters))
        for place, parts in found.items()
    ]


def keeps_form(part: Part) -> bool:
    """Whether a module alone at its layer can be scaled without leaving its form."""
    if part.adapter.reading.loha_cp_shared_core and part.module.detected.layout.use_conv_cp:
        return False
    if part.weight == 1.0:
        return True
    return part.module.detected.dora_slot is None and bool(part.module.detected.layout.linear_in)


def is_baseless(parts: Sequence[Part]) -> bool:
    """Whether the sum can be written down without the base weight."""
    if len(parts) == 1 and keeps_form(parts[0]):
        return True
    if not any(part.module.detected.needs_base for part in parts):
        return True
    first = parts[0].module.detected
    if first.algorithm.concat is None or any(part.module.detected.dora_slot for part in parts):
        return False
    if any(part.module.detected.layout is not first.layout for part in parts):
        return False
    if first.algorithm.name == "ia3":
        return len({(_on_input(part), _elements(part)) for part in parts}) == 1
    ranks = [part.module.dims.rank or 0 for part in parts]
    width = first.sizes.get("in")
    return not isinstance(width, int) or sum(ranks) < width


def _on_input(part: Part) -> float:
    return part.adapter.store.scalar(part.module.keys["on_input"])


def _elements(part: Part) -> int:
    return part.adapter.store.info(part.module.keys["weight"]).numel
