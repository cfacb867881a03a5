"""``lycotool convert`` as users type it.

What a file says is worked out a second time, in float64, from the tensors that were written
(:mod:`makers.adapters`); no test here asks lycotool's own verification.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DATA, GOLDEN, read, run, succeed, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from makers.adapters import (
    CP_FORMS,
    FORMS,
    MANNERS,
    UNETS,
    Effect,
    Layer,
    Tensors,
    contents,
    effects,
    layers,
    module,
    normal,
    save,
    tensors_of,
)
from safetensors.torch import save as to_bytes
from torch import Tensor

from lycotool.models.families import FAMILIES
from lycotool.ops import _converter
from lycotool.ops._convert_render import Rendered

EPS = torch.finfo(torch.float32).eps

#: Factors are rounded to the stored dtype at most twice (a scale folded in, products added up);
#: their product is off by as much, and four times that leaves a margin.
ROUNDING = 4.0

ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
NORM = "lora_unet_down_blocks_0_resnets_0_norm1"
DOTTED = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
COMFY = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
PARTS = tuple(f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv")
ADAPTIVE = "lora_unet_final_layer_adaLN_modulation_1"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- running it ----------------------------------------------------------------------------


def convert(source: Path, to: str, *options: object) -> tuple[dict, Path]:
    """Convert a file; the report and where the result is."""
    out = Path("out" if to == "peft" else "out.safetensors")
    result = succeed("convert", source, "--to", to, "-o", out, "--force", "--json", *options)
    assert not litter()
    return json.loads(result.stdout), out


def refuse(source: Path, to: str, *options: object, code: int = 5) -> str:
    """Demand an exit code and the state of the disk as it was; the message."""
    before = snapshot()
    out = Path("refused" if to == "peft" else "refused.safetensors")
    result = run("convert", source, "--to", to, "-o", out, *options)
    assert result.exit_code == code, result.stderr
    assert not result.stdout
    assert "Traceback" not in result.stderr
    assert snapshot() == before
    return result.stderr


def litter() -> list[str]:
    """Hidden files in the current folder."""
    return [path.name for path in Path().iterdir() if path.name.startswith(".")]


def snapshot() -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(Path().rglob("*")) if file.is_file()}


def named_in(message: str) -> set[str]:
    """The modules that an error lists, or the warnings about what was dropped."""
    found = re.findall(r"^  (\S+): ", message, re.M)
    return {*found, *re.findall(r"warning: (\S+): dropped: ", message)}


def slots(form: str, shape: tuple[int, ...] = (24, 10), name: str = ATTENTION, **options: object) -> Tensors:
    """The tensors of one module by key, canonical suffixes."""
    return {f"{name}.{slot}": t for slot, t in module(form, shape, **options).items()}  # type: ignore[arg-type]


def peft_slots(names: Iterable[str], out: int = 24, rank: int = 3) -> Tensors:
    """LoRA modules with PEFT's suffixes and downs of their own."""
    return {
        f"{name}.lora_{side}.weight": normal(f"{name}{side}", shape).float()
        for name in names
        for side, shape in (("A", (rank, 10)), ("B", (out, rank)))
    }


def assert_same(
    expected: Mapping[str, Effect], found: Mapping[str, Effect], allowed: float = ROUNDING * EPS
) -> None:
    assert found.keys() == expected.keys()
    for layer, effect in expected.items():
        assert effect.distance(found[layer]) <= allowed, layer


def lora_change(tensors: Tensors, name: str, up: str = "lora_up.weight", down: str = "lora_down.weight") -> Tensor:
    """``c · up @ down`` of a plain module, in float64."""
    high, low = tensors[f"{name}.{up}"].double(), tensors[f"{name}.{down}"].double()
    alpha = tensors.get(f"{name}.alpha")
    return high.flatten(1) @ low.flatten(1) * (1.0 if alpha is None else float(alpha) / len(low))


def rank_at(tensors: Tensors, name: str) -> int:
    return next(len(tensors[k]) for k in (f"{name}.lora_down.weight", f"{name}.lora_A.weight") if k in tensors)


# --- golden files: the same change by the programs themselves ------------------------------

GROUPS = {
    group["group"]: group for group in json.loads((GOLDEN / "convert" / "manifest.json").read_text())["groups"]
}
DIALECT_OF = {
    "sd1_kohya_lora": "networks.lora",
    "sd1_lycoris_tucker": "lycoris.kohya",
    "sd1_locon_old": "locon.locon_kohya",
    "sd1_diffusers_legacy": "diffusers-legacy",
    "sd1_diffusers_peft": "diffusers",
    "sd1_comfy": "comfyui",
    "sdxl_kohya_sgm": "networks.lora",
    "sdxl_kohya_diffusers_names": "onetrainer",
    "sdxl_diffusers_peft": "diffusers",
    "sdxl_comfy": "comfyui",
    "flux_kohya": "networks.lora",
    "flux_split": "ai-toolkit",
    "flux_comfy_subset": "comfyui",
    "flux_fuse_kohya": "networks.lora",
    "flux_fuse_split": "diffusers",
}
ARCHITECTURE = {"sd1": "sd1", "sdxl": "sdxl", "flux": "flux1", "flux_fuse": "flux1"}

#: ``up`` suffixes of every program, longest first, and the ``down`` beside each.
UP_SUFFIXES = {
    ".lora_linear_layer.up.weight": ".lora_linear_layer.down.weight",
    ".lora.up.weight": ".lora.down.weight",
    "_lora.up.weight": "_lora.down.weight",
    ".lora_up.weight": ".lora_down.weight",
    ".lora_B.weight": ".lora_A.weight",
}


def factors(tensors: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
    """``c · up`` and ``down`` with the core folded in, by module, in float64."""
    found = {}
    for key, tensor in tensors.items():
        for up_suffix, down_suffix in UP_SUFFIXES.items():
            if key.endswith(up_suffix):
                name = key.removesuffix(up_suffix)
                down = tensors[name + down_suffix].double()
                alpha = tensors.get(f"{name}.alpha")
                scale = 1.0 if alpha is None else float(alpha) / len(down)
                if (core := tensors.get(f"{name}.lora_mid.weight")) is not None:
                    down = torch.einsum("pq..., qi -> pi...", core.double(), down.flatten(1))
                found[name] = scale * tensor.double().flatten(1), down.flatten(1)
                break
    return found


def low_rank_norm(up: Tensor, down: Tensor) -> float:
    """``‖up @ down‖`` without the product, which is large for real widths."""
    return float((torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T).norm())


@pytest.mark.parametrize(
    ("group", "source", "target"),
    [
        (name, source["file"], target["file"])
        for name, group in GROUPS.items()
        for source, target in product(group["files"], group["files"])
    ],
    ids=lambda value: value.removeprefix("convert/").removesuffix(".safetensors"),
)
def test_golden_file_becomes_the_other_program_s(group: str, source: str, target: str) -> None:
    to = DIALECT_OF[Path(target).stem]
    _, out = convert(GOLDEN / source, to, "--arch", ARCHITECTURE[group])
    covered = {
        file["file"]: set(file["module_map"].values()) for file in GROUPS[group]["files"]
    }  # as the reference names them
    found, expected = factors(read(out)), factors(read(GOLDEN / target))
    assert found.keys() <= expected.keys() or covered[source] - covered[target]
    assert expected.keys() <= found.keys() or covered[target] - covered[source]
    common = found.keys() & expected.keys()
    assert common
    dtype = next(iter(read(GOLDEN / source).values())).dtype
    for name in common:
        (up, down), (their_up, their_down) = found[name], expected[name]
        lost = low_rank_norm(torch.cat([up, -their_up], 1), torch.cat([down, their_down]))
        # The golden files were themselves folded and rounded once.
        assert lost <= 2 * ROUNDING * torch.finfo(dtype).eps * low_rank_norm(their_up, their_down)


# --- names: every kind of layer of every family, in every dialect and back -----------------

#: Layers that the networks of sd-scripts (and LoCon) do not have.
OUTSIDE_BLOCKS = ("conv_in", "conv_out", "time_embedding.", "add_embedding.")
WITHOUT_THEM = ("networks.lora", "locon.locon_kohya", "kohya-oft")


def room(dialect: str, layer: Layer) -> bool:
    """Whether a dialect has a name for a layer."""
    outside = dialect in WITHOUT_THEM and layer.family in UNETS and layer.parts[0][0].startswith(OUTSIDE_BLOCKS)
    return bool(layer.modules(dialect)) and not outside


@cache
def some_layers(family: str) -> tuple[Layer, ...]:
    return tuple(layers(family))


@cache
def kohya_file(family: str) -> tuple[Tensors, dict[str, Effect]]:
    """A LoRA on every layer, ``c = 1/2``, and what it says."""
    known = some_layers(family)
    tensors = tensors_of("lycoris.kohya", dict.fromkeys(known, "lora"))
    path = write(Path("first.safetensors"), tensors)
    return tensors, effects(path, "lycoris.kohya", known)


def exists_for(dialect: str, family: str) -> bool:
    families = MANNERS[dialect].families
    return families is None or family in families


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dialect", [name for name in MANNERS if name != "kohya-oft"])
def test_every_layer_is_named_and_found_again(dialect: str, family: str) -> None:
    known = some_layers(family)
    tensors, said = kohya_file(family)
    source = write(Path("source.safetensors"), tensors)
    if not exists_for(dialect, family):
        assert family in refuse(source, dialect, "--arch", family)
        return
    kept = [layer for layer in known if room(dialect, layer)]
    lost = {name for layer in known if layer not in kept for name, _ in layer.modules("lycoris.kohya")}
    if lost:
        assert named_in(refuse(source, dialect, "--arch", family)) == lost
    report, out = convert(source, dialect, "--arch", family, *["--drop"] * bool(lost))
    assert report["dropped"].keys() == lost
    expected = {layer.title: said[layer.title] for layer in kept}
    # A scale of 1/2 folds without rounding, and rows are taken and put together, not computed.
    assert_same(expected, effects(out, dialect, known), 0.0)
    out.rename("there" if dialect == "peft" else "there.safetensors")
    _, back = convert(Path("there" if dialect == "peft" else "there.safetensors"), "lycoris.kohya", "--arch", family)
    assert_same(expected, effects(back, "lycoris.kohya", known), 0.0)


def test_the_last_context_block_of_sd3_has_two_halves_and_the_others_six() -> None:
    """Its scale and shift change places; six times as high as wide is left in its order."""
    name = "lora_unet_joint_blocks_{}_context_block_adaLN_modulation_1"
    tall, last = slots("full", (24, 4), name.format(0)), slots("full", (24, 12), name.format(23))
    source = write(Path("a.safetensors"), {**tall, **last})
    _, out = convert(source, "ai-toolkit", "--arch", "sd3")
    found = read(out)
    path = "transformer.transformer_blocks.{}.norm1_context.linear.diff"
    assert torch.equal(found[path.format(0)], tall[f"{name.format(0)}.diff"])
    assert torch.equal(found[path.format(23)], last[f"{name.format(23)}.diff"].roll(12, 0))


def test_xlabs_processors_become_fused_modules() -> None:
    up, down = normal("up", (24, 2)).float(), normal("down", (2, 10)).float()
    block = "double_blocks.3.processor.{}_lora{}.{}.weight"
    source = write(
        Path("xlabs.safetensors"),
        {
            block.format("qkv", number, side): tensor * number
            for number in (1, 2)
            for side, tensor in (("up", up), ("down", down))
        },
    )
    _, out = convert(source, "networks.lora", "--arch", "flux1")
    found = read(out)
    for number, stream in ((1, "img"), (2, "txt")):
        name = f"lora_unet_double_blocks_3_{stream}_attn_qkv"
        assert torch.equal(lora_change(found, name), number * number * (up.double() @ down.double()))
    assert len(found) == 6


# --- algorithms: what each dialect holds, and the same change in it ------------------------

LORA_FORMS = {"lora", "lora (cp)"}
DORA_FORMS = {"lora + dora (out)", "lora (cp) + dora (out)"}
LOKR_FORMS = {"lokr", "lokr (both)", "lokr (full)"}

#: What readers of each dialect understand; a core is folded where they know none.
HOLDS: Mapping[str, set[str]] = {
    "networks.lora": LORA_FORMS,
    "lycoris.kohya": set(FORMS),
    "locon.locon_kohya": LORA_FORMS,
    "lycoris": set(FORMS),
    "diffusers": LORA_FORMS | DORA_FORMS | {"lora + bias", "lora + up bias"},
    "diffusers-legacy": LORA_FORMS,
    "peft": LORA_FORMS | DORA_FORMS | LOKR_FORMS | {"loha"},
    "comfyui": set(FORMS)
    - {"lora + sparse", "ia3 (out)", "ia3 (in)", "tlora", "diag-oft (rescale)", "diag-oft (old)"},
    "onetrainer": LORA_FORMS | DORA_FORMS | {"lora + dora (in)", "loha", "loha + dora (out)"},
    "ai-toolkit": LORA_FORMS | DORA_FORMS | LOKR_FORMS | {"full", "full + bias"},
    "bfl": LORA_FORMS | {"lora + bias", "lora + up bias"},
    "hcp": LORA_FORMS,
    "kohya-oft": {"diag-oft", "diag-oft (bound)"},
}

#: What cannot be cut into rows, or be put together from modules with nothing in common.
NOT_SPLIT = {"lora + dora (in)", "diag-oft (bound)", "boft", "tlora"}
NOT_FUSED = NOT_SPLIT | LOKR_FORMS | {
    "lora + sparse", "glora", "glora (old)", "diag-oft", "diag-oft (rescale)", "diag-oft (old)",
}  # fmt: skip
#: (IA)³ does not tell which of its axes is the output before its switch is read.
NOT_MOVED = {"ia3 (out)", "ia3 (in)"}

SD1 = {layer.parts[0][0]: layer for layer in some_layers("sd1")}
FLUX = {layer.native: layer for layer in some_layers("flux1")}
SD1_LAYERS = tuple(
    SD1[path]
    for path in (
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.1.resnets.0.conv_shortcut",
    )
)
SPLIT_LAYERS = (FLUX["double_blocks.4.img_attn.qkv"], FLUX["single_blocks.4.linear1"])
WHOLE_LAYERS = (FLUX["final_layer.adaLN_modulation.1"], FLUX["img_in"])


def fits(form: str, layer: Layer) -> bool:
    """Whether a layer can have a form: cores are for kernels, T-LoRA for matrices."""
    kernel = layer.shape[2:]
    return bool(kernel) if form in CP_FORMS else not (form == "tlora" and kernel)


def assert_converts_or_names_all(
    source: str, form: str, known: tuple[Layer, ...], to: str, *, holds: bool | None
) -> None:
    """Either the same change is written, or every module is named; ``holds`` says which."""
    chosen = {layer: form for layer in known if fits(form, layer)}
    tensors = tensors_of(source, chosen)
    path = write(Path("a.safetensors"), tensors)
    options = ("--arch", known[0].family, "--from", source)
    out = Path("out" if to == "peft" else "out.safetensors")
    result = run("convert", path, "--to", to, "-o", out, *options)
    if result.exit_code == 5:
        assert not holds, result.stderr
        assert named_in(result.stderr) == {name for layer in chosen for name, _ in layer.modules(source)}
        return
    assert result.exit_code == 0, result.stderr
    assert holds is not False
    assert_same(effects(path, source, known), effects(out, to, known))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("to", MANNERS)
def test_form_in_dialect(to: str, form: str) -> None:
    if exists_for(to, "sd1"):
        assert_converts_or_names_all("lycoris.kohya", form, SD1_LAYERS, to, holds=form in HOLDS[to])


@pytest.mark.parametrize("form", [form for form in FORMS if form not in CP_FORMS])
@pytest.mark.parametrize("to", ["lycoris", "diffusers", "peft", "onetrainer", "ai-toolkit"])
@pytest.mark.parametrize("known", [SPLIT_LAYERS, WHOLE_LAYERS[:1], WHOLE_LAYERS[1:]], ids=["split", "swap", "name"])
def test_form_split_and_swapped(known: tuple[Layer, ...], to: str, form: str) -> None:
    holds: bool | None = form in HOLDS[to]
    if known is SPLIT_LAYERS:
        holds = holds and form not in NOT_SPLIT | NOT_MOVED
    elif known[0].swapped:
        holds = holds and form not in NOT_MOVED | {"boft"}
    assert_converts_or_names_all("lycoris.kohya", form, known, to, holds=holds)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in CP_FORMS])
@pytest.mark.parametrize("to", ["lycoris.kohya", "networks.lora", "comfyui", "bfl"])
def test_form_fused(to: str, form: str) -> None:
    holds = form in HOLDS[to] and form not in NOT_FUSED | NOT_MOVED
    assert_converts_or_names_all("lycoris", form, SPLIT_LAYERS, to, holds=holds)


# --- any file ------------------------------------------------------------------------------

SMALL = {family: [layer for layer in some_layers(family) if "norm" not in layer.title] for family in FAMILIES}


@st.composite
def files(draw: st.DrawFn) -> tuple[str, str, dict[Layer, str], int, float, torch.dtype]:
    """Family, source dialect, forms by layer, rank, alpha, dtype."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    source = draw(st.sampled_from([name for name in MANNERS if exists_for(name, family)]))
    possible = [layer for layer in SMALL[family] if room(source, layer)]
    chosen = draw(st.lists(st.sampled_from(possible), min_size=1, max_size=3, unique=True))
    forms = sorted(HOLDS[source] - set(CP_FORMS) - {"tlora"})
    if source == "peft":  # one configuration for all
        forms = [draw(st.sampled_from(forms))]
    by_layer = {layer: draw(st.sampled_from(forms)) for layer in chosen}
    rank, alpha = draw(st.integers(1, 4)), draw(st.sampled_from([None, -2.0, 0.3, 1.0, 4.0]))
    return source, family, by_layer, rank, alpha, draw(st.sampled_from([torch.float32, torch.bfloat16]))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files(), st.data())
def test_any_file_converts_or_every_module_is_named(
    file: tuple[str, str, dict[Layer, str], int, float, torch.dtype], data: st.DataObject
) -> None:
    source, family, chosen, rank, alpha, dtype = file
    known = tuple(chosen)
    to = data.draw(st.sampled_from([name for name in MANNERS if exists_for(name, family)]))
    folder = Path(f"{len(list(Path().iterdir()))}")
    folder.mkdir()
    tensors = tensors_of(source, chosen, rank=rank, alpha=alpha, dtype=dtype)
    config = None
    if source == "peft":
        kind = next((kind for kind in ("loha", "lokr") if kind in next(iter(chosen.values()))), "lora")
        key = "lora_alpha" if kind == "lora" else "alpha"
        config = {"peft_type": kind.upper(), "r": rank, key: rank if alpha is None else alpha,
                  "rank_pattern": {}, "alpha_pattern": {}}  # fmt: skip
    path = save(folder / ("a" if config else "a.safetensors"), tensors, config=config)
    out = folder / ("out" if to == "peft" else "out.safetensors")
    result = run("convert", path, "--to", to, "-o", out, "--arch", family, "--from", source)
    if result.exit_code == 5:
        possible = {name for layer in known for name, _ in layer.modules(source)}
        mixed = to == "peft" and "one kind of module" in result.stderr
        assert mixed or (named_in(result.stderr) and named_in(result.stderr) <= possible), result.stderr
        again = run("convert", path, "--to", to, "-o", out, "--arch", family, "--from", source, "--drop", "--json")
        if again.exit_code == 0:
            dropped = set(json.loads(again.stdout)["dropped"])
            assert dropped == named_in(result.stderr)
            left = [layer for layer in known if not dropped & {name for name, _ in layer.modules(source)}]
            expected = effects(path, source, known)
            kept = {layer.title: expected[layer.title] for layer in left}
            assert_same(kept, effects(out, to, known), ROUNDING * torch.finfo(dtype).eps)
        return
    assert result.exit_code == 0, result.stderr
    assert_same(effects(path, source, known), effects(out, to, known), ROUNDING * torch.finfo(dtype).eps)
