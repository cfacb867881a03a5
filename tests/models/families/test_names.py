"""Paths and sites, marks, and the choice of a family."""

from __future__ import annotations

import subprocess
import sys

import pytest
from examples import many
from hypothesis import given
from hypothesis import strategies as st

from lycotool.models.families import FAMILIES, families_of
from lycotool.models.families.table import Naming, Rule, Site
from lycotool.models.families.text_encoders import CLIP, DECODER, T5
from lycotool.models.naming import flat

NAMINGS: tuple[Naming, ...] = ("native", "diffusers", "comfy")

TABLES = {name: family.unet for name, family in FAMILIES.items()} | {
    "clip": CLIP,
    "t5": T5,
    "decoder": DECODER,
}


def _sites(rule: Rule, index: int) -> list[Site]:
    """The whole and the parts of a rule, at one index everywhere."""
    paths = [*rule.diffusers, rule.native or "", rule.comfy or ""]
    indices = (index,) * max(path.count("{}") for path in paths)
    parts = range(len(rule.diffusers)) if len(rule.diffusers) > 1 else ()
    return [Site(rule, indices, None), *(Site(rule, indices, part) for part in parts)]


def _paths(name: str, naming: Naming, indices: tuple[int, ...] = (0, 1)) -> list[str]:
    return [
        path
        for rule in FAMILIES[name].unet.rules
        for index in indices
        for site in _sites(rule, index)
        if (path := site.path(naming)) is not None
    ]


@pytest.mark.parametrize("name", TABLES)
def test_path_and_find_are_inverse(name: str) -> None:
    table = TABLES[name]

    @many
    @given(st.sampled_from(table.rules), st.integers(min_value=0, max_value=999))
    def check(rule: Rule, index: int) -> None:
        for site in _sites(rule, index):
            for naming in NAMINGS:
                if (path := site.path(naming)) is not None:
                    for form in (path, flat(path)):
                        assert [found for _, found in table.find(form)] == [site]

    check()


def test_naming_that_is_told() -> None:
    find = FAMILIES["flux1"].unet.find
    assert [naming for naming, _ in find("double_blocks_3_img_attn_qkv")] == ["native"]
    assert [(naming, site.part) for naming, site in find("transformer_blocks.3.attn.to_k")] == [
        ("diffusers", 1)
    ]
    assert [naming for naming, _ in FAMILIES["hunyuan-image"].unet.find("double_blocks_3_img_mlp_0")] == [
        "comfy"
    ]


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "_",
        "double_blocks_._linear",
        "double_blocks_03_img_attn_qkv",
        "double_blocks_-1_img_attn_qkv",
        "double_blocks_²_img_attn_qkv",
        f"double_blocks_{'9' * 5000}_img_attn_qkv",
        "double_blocks_{}_img_attn_qkv",
    ],
)
def test_what_is_no_path(path: str) -> None:
    assert all(table.find(path) == [] for table in TABLES.values())
    assert families_of([path]) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_marks_are_the_family_s_own(name: str) -> None:
    paths = {
        other: [flat(path) for naming in NAMINGS for path in _paths(other, naming)] for other in FAMILIES
    }
    for mark in FAMILIES[name].marks:
        assert [other for other, known in paths.items() if any(mark in path for path in known)] == [name], (
            mark
        )
    for naming in ("native", "diffusers") if FAMILIES[name].marks else ():
        assert any(mark in flat(path) for path in _paths(name, naming) for mark in FAMILIES[name].marks)


@pytest.mark.parametrize(
    ("name", "natives"),
    [
        ("sd1", ["output_blocks.2.1.conv", "output_blocks.5.2.conv", "output_blocks.8.2.conv"]),
        ("sdxl", ["output_blocks.2.2.conv", "output_blocks.5.2.conv"]),
    ],
)
def test_upsampler_comes_after_the_attention_where_there_is_one(name: str, natives: list[str]) -> None:
    find = FAMILIES[name].unet.find
    upsamplers = [f"up_blocks.{level}.upsamplers.0.conv" for level in range(len(natives))]
    assert [site.path("native") for path in upsamplers for _, site in find(path)] == natives


@pytest.mark.parametrize("name", FAMILIES)
def test_own_metadata_tell_the_family(name: str) -> None:
    family = FAMILIES[name]
    for said in (*family.metadata, family.base_model_version, family.model_spec):
        told = [other for other, one in FAMILIES.items() if said.startswith(one.metadata)]
        assert said == "" or told[0] == name


@pytest.mark.parametrize("naming", ["native", "diffusers"])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_modules_of_a_family_tell_it(name: str, naming: Naming) -> None:
    alike = {"sd1": ["sd1", "sd2"], "sd2": ["sd1", "sd2"]}
    paths = _paths(name, naming, (0,))
    for form in (paths, [flat(path) for path in paths]):
        assert families_of(form) == alike.get(name, [name])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (
            ["double_blocks_0_img_attn_qkv", "double_blocks_0_img_mod_lin", "single_blocks_0_linear1"],
            ["flux1"],
        ),
        (
            ["double_blocks_0_img_attn_qkv", "double_blocks_0_img_mod_linear", "single_blocks_0_linear1"],
            ["hunyuan-image", "hunyuan-video"],
        ),
        (["blocks.0.self_attn.q", "blocks.0.ffn.0"], ["wan"]),
        (["layers_0_attention_qkv"], ["z-image", "lumina2"]),
        (["input_blocks_4_1_transformer_blocks_1_attn1_to_q"], ["sdxl"]),
        (["no_such_module"], []),
        ([], []),
    ],
)
def test_a_few_modules(paths: list[str], names: list[str]) -> None:
    assert families_of(paths) == names


def test_import_writes_no_rules_and_loads_no_torch() -> None:
    code = (
        "import sys; from lycotool.models.families import FAMILIES as f;"
        "print('torch' in sys.modules, any('rules' in vars(x.unet) or '_block_patterns' in vars(x) for x in f.values()))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", "False"]
