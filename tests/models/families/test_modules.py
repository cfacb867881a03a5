"""Every module of diffusers' classes is in the tables, once, and the tables have no other."""

from __future__ import annotations

import re

import pytest
from models.families.published import MODELS, parameter_shapes, sites, variants_of

from lycotool.models.families import FAMILIES
from lycotool.models.naming import flat

#: Parameters that are no module's weight or bias, which no rule covers: module, indices out.
BARE = {
    "wan": {
        "": {"scale_shift_table"},
        "blocks.#": {"scale_shift_table"},
        "vace_blocks.#": {"scale_shift_table"},
    },
    "z-image": {"": {"x_pad_token", "cap_pad_token", "siglip_pad_token"}},
}
_WAN_FRAMES = {"condition_embedder.image_embedder": {"pos_embed"}}


@pytest.mark.parametrize(("family", "variant"), MODELS)
def test_every_module_is_found_once(family: str, variant: str) -> None:
    bare = BARE.get(family, {}) | (_WAN_FRAMES if family == "wan" else {})
    for path, parameters in parameter_shapes(family, variant).items():
        if (names := bare.get(re.sub(r"\d+", "#", path))) is not None:
            assert set(parameters) <= names, path
            assert FAMILIES[family].unet.find(path) == [], path
            continue
        assert set(parameters) <= {"weight", "bias"}, path
        dotted, flattened = FAMILIES[family].unet.find(path), FAMILIES[family].unet.find(flat(path))
        assert dotted == flattened, path
        assert [naming for naming, _ in dotted] == ["diffusers"], path
        assert [site.path("diffusers") for _, site in dotted] == [path]


@pytest.mark.parametrize(("family", "variant"), MODELS)
def test_flattened_paths_differ(family: str, variant: str) -> None:
    paths = parameter_shapes(family, variant)
    assert len({flat(path) for path in paths}) == len(paths)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_rule_is_for_a_module_that_no_model_has(family: str) -> None:
    used = {(site.rule, site.part) for variant in variants_of(family) for _, site in sites(family, variant)}
    rules = FAMILIES[family].unet.rules
    parts = {
        (rule, number if len(rule.diffusers) > 1 else None)
        for rule in rules
        for number in range(len(rule.diffusers))
    }
    assert parts - used == set()
    assert len(set(rules)) == len(rules)


@pytest.mark.parametrize(("family", "variant"), MODELS)
def test_heights_of_the_parts(family: str, variant: str) -> None:
    shapes = parameter_shapes(family, variant)
    for path, site in sites(family, variant):
        if site.part is not None:
            first = site.rule.diffusers[0].format(*site.indices)
            height, unit = shapes[path]["weight"][0], shapes[first]["weight"][0]
            assert height * site.rule.rows[0] == unit * site.rule.rows[site.part], path


@pytest.mark.parametrize("variant", variants_of("sd3"))
def test_only_the_last_context_block_of_sd3_is_twice_as_high_as_wide(variant: str) -> None:
    shapes = parameter_shapes("sd3", variant)
    ratios = [shapes[f"transformer_blocks.{block}.norm1_context.linear"]["weight"] for block in (0, 1)]
    rule = FAMILIES["sd3"].unet.find("transformer_blocks.1.norm1_context.linear")[0][1].rule
    assert [height // width == rule.swaps_only_at_ratio for height, width in ratios] == [False, True]
