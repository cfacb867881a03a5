"""Name the modules of a merged adapter the way its first adapter names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lycotool.errors import IncompatibleError
from lycotool.models.naming import ANY, ModuleName, flat, split_name

#: What sd-scripts writes for components that the first adapter does not have.
_KOHYA_PREFIXES: Mapping[str, str] = {
    "unet": "lora_unet_", "te1": "lora_te_", "te2": "lora_te2_", "te3": "lora_te3_", ANY: "lora_",
}  # fmt: skip


class NamingStyle:
    """The prefixes and separators of one adapter's module names."""

    def __init__(self, names: Iterable[str]) -> None:
        parts = [split_name(name) for name in names]
        self._dotted = sum(part.is_dotted for part in parts) * 2 > len(parts)
        self._prefixes: dict[str, str] = {}
        for part in parts:
            if part.is_dotted == self._dotted:
                self._prefixes.setdefault(part.component, part.prefix)

    def rename(self, name: str, *, path: str) -> str:
        """``name`` in this style.

        Parameters
        ----------
        path
            The file the name comes from, for the error.

        Raises
        ------
        IncompatibleError
            If the name has underscores where this style has dots: they cannot be told
            apart without the model.
        """
        part = split_name(name)
        prefix = self._prefix(part)
        if part.prefix == prefix:
            return name
        if not self._dotted:
            return prefix + flat(part.path)
        if part.is_dotted:
            return prefix + part.path
        raise IncompatibleError(
            "the first adapter names modules with dots, this one with underscores",
            path=path,
            key=name,
            hint="name this file first",
        )

    def _prefix(self, part: ModuleName) -> str:
        if part.component in self._prefixes:
            return self._prefixes[part.component]
        if self._dotted:
            return part.prefix
        return _KOHYA_PREFIXES.get(part.component, part.prefix)


def places(names: Iterable[str], known: Iterable[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Each module's place, so that names of one layer in different dialects meet.

    A name without a component (``lycoris_…``, bare paths) takes the component of the one
    known place with its path, else it stays without.
    """
    components: dict[str, set[str]] = {}
    for component, path in known:
        components.setdefault(path, set()).add(component)
    found = {}
    for name in names:
        component, path = split_name(name).place
        candidates = components.get(path, set()) - {ANY}
        if component == ANY and len(candidates) == 1:
            component = next(iter(candidates))
        found[name] = (component, path)
    return found


def shared_layers(names: Iterable[str]) -> list[list[str]]:
    """The modules of one file that change the same layer, under names of several dialects."""
    names = list(names)
    own = places(names, ())
    layers: dict[tuple[str, str], list[str]] = {}
    for name, place in places(names, own.values()).items():
        layers.setdefault(place, []).append(name)
    return [group for group in layers.values() if len(group) > 1]
