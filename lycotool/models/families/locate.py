"""Find an adapter's modules in a model family, and guess the family from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lycotool.models.families import FAMILIES, families_of
from lycotool.models.families.base import Family, TextEncoder
from lycotool.models.families.table import Naming, Site
from lycotool.models.naming import ANY, flat, split_name

#: Width of the text encoder, which cross-attention reads, where families share all names.
_TEXT_WIDTHS = {"sd1": 768, "sd2": 1024}
_OF_THAT_WIDTH = ("attn2_to_k", "attn2_to_v", "self_attn_q_proj", "self_attn_k_proj", "mlp_fc1")

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module is: component (``unet`` for any denoiser), naming it was found in, site.

    ``parts`` not 0 says that it is so many of the site's first parts only.
    """

    component: str
    naming: Naming
    site: Site
    parts: int = 0


class Locator:
    """Finds modules of one family by the names that adapters give them."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def locate(self, name: str) -> list[Place]:
        """Every place that a module's name can mean; none if the family has no such module."""
        for component, encoder in self._family.text_encoders.items():
            for prefix in (encoder.kohya, encoder.diffusers, encoder.comfy):
                if name.startswith(prefix):
                    return _inside(component, encoder, name.removeprefix(prefix))
        part = split_name(name)
        if part.component in ("unet", ANY):
            found = self._denoiser(part.path)
            if found or part.component == "unet":
                return found
        encoders = self._family.text_encoders
        components = encoders if part.component == ANY else [part.component]
        return [
            place
            for component in components
            if component in encoders
            for place in _inside(component, encoders[component], part.path)
        ]

    def _denoiser(self, path: str) -> list[Place]:
        for ending, whole, parts in self._family.partial:
            if path.endswith(ending):
                path = path.removesuffix(ending) + whole
                return [Place("unet", naming, site, parts) for naming, site in self._family.unet.find(path)]
        return [Place("unet", naming, site) for naming, site in self._family.unet.find(path)]


def _inside(component: str, encoder: TextEncoder, path: str) -> list[Place]:
    for outer in (encoder.inside, flat(encoder.inside)):
        path = path.removeprefix(outer) if outer else path
    return [Place(component, naming, site) for naming, site in encoder.table.find(path)]


def guess_families(
    modules: Iterable[str], input_widths: Mapping[str, int], metadata: Mapping[str, str]
) -> list[str]:
    """Short names of the families that an adapter can be for, best guess first.

    Names decide as far as they can, then the width cross-attention reads, then the metadata.

    Parameters
    ----------
    modules
        Adapter module names.
    input_widths
        Input width by module name, where the tensors tell it.
    """
    parts = {name: split_name(name) for name in modules}
    said = metadata.get("modelspec.architecture", "") or metadata.get("ss_base_model_version", "")
    claimed = [
        short for short, family in FAMILIES.items() if said and said.startswith(tuple(family.metadata))
    ]
    denoiser = [part.path for part in parts.values() if part.component in ("unet", ANY)]
    found = families_of(denoiser) if denoiser else []
    if not found:
        found = _by_text_encoders([*parts], claimed)
    if len(found) > 1:
        comfy = [name for name in parts if name.startswith("text_encoders.")]
        found = [short for short in found if _has_encoders_of(FAMILIES[short], comfy)] or found
    if len(found) > 1:
        widths = {
            input_widths[name]
            for name, part in parts.items()
            if name in input_widths and flat(part.path).endswith(_OF_THAT_WIDTH)
        }
        found = [short for short in found if _TEXT_WIDTHS.get(short) in widths] or found
    return [short for short in claimed if short in found] or found


def _has_encoders_of(family: Family, names: list[str]) -> bool:
    """Whether it has the text encoders of these names in ComfyUI."""
    return all(name.startswith(tuple(e.comfy for e in family.text_encoders.values())) for name in names)


def _by_text_encoders(names: list[str], claimed: list[str]) -> list[str]:
    """Families whose text encoders have all of these names; those the metadata names, if any."""
    if not names:
        return []
    fitting = [short for short, family in FAMILIES.items() if _all_inside(family, names)]
    return [short for short in claimed if short in fitting] or fitting


def _all_inside(family: Family, names: list[str]) -> bool:
    locator = Locator(family)
    own = tuple(
        prefix
        for encoder in family.text_encoders.values()
        for prefix in (encoder.kohya, encoder.diffusers, encoder.comfy, _PEFT_PREFIX)
    )
    return bool(own) and all(name.startswith(own) and locator.locate(name) for name in names)
