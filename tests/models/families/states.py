"""State dicts of the published denoisers in diffusers' and in native names.

Every tensor has values of its own, so that a wrong row, a wrong half or a wrong name shows.
Two columns are enough: no converter looks at columns.
"""

from __future__ import annotations

import itertools

import torch
from models.families.published import parameter_shapes, sites

from lycotool.models.families.table import Rule

State = dict[str, torch.Tensor]


def diffusers_state(family: str, variant: str) -> State:
    start = itertools.count(0, 1_000_000)
    return {
        f"{path}.{name}": torch.arange(shape[0] * (1 if len(shape) == 1 else 2)).view(shape[0], -1).squeeze(1)
        + next(start)
        for path, parameters in parameter_shapes(family, variant).items()
        for name, shape in parameters.items()
        if name in ("weight", "bias")
    }


def native_state(family: str, variant: str, diffusers: State) -> State:
    """What the tables say was published, given what diffusers has."""
    shapes = parameter_shapes(family, variant)
    state = {}
    for path, site in sites(family, variant):
        if site.part not in (None, 0) or site.rule.native is None:
            continue
        native = site.rule.native.format(*site.indices)
        parts = [part.format(*site.indices) for part in site.rule.diffusers]
        for name in shapes[path]:
            whole = torch.cat([diffusers[f"{part}.{name}"] for part in parts])
            if _swaps(site.rule, shapes[path]["weight"]):
                whole = torch.cat(whole.chunk(2)[::-1])
            state[f"{native}.{_native_name(native, name)}"] = whole
    return state


def _swaps(rule: Rule, shape: tuple[int, ...]) -> bool:
    return rule.swaps_halves and rule.swaps_only_at_ratio in (0, shape[0] // shape[-1])


def _native_name(native: str, name: str) -> str:
    """BFL calls the weight of a root mean square norm its scale."""
    is_norm = native.endswith(("query_norm", "key_norm")) or native.startswith(
        "distilled_guidance_layer.norms"
    )
    return "scale" if is_norm else name
