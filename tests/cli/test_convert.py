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
    """Demand an exit code and the state of the disk as it was; the message, with all its lines."""
    before = snapshot()
    out = Path("refused" if to == "peft" else "refused.safetensors")
    result = run("convert", source, "--to", to, "-o", out, *options, "--json")
    assert result.exit_code == code, result.stderr
    assert not result.stdout
    assert snapshot() == before
    if not result.stderr.startswith('{"error"'):
        return result.stderr
    error = json.loads(result.stderr)["error"]
    first = ": ".join(part for part in (error["path"], error["key"], error["message"]) if part)
    return "\n".join([first, *(f"  {detail}" for detail in error["details"]), f"hint: {error['hint']}"])


def litter() -> list[str]:
    """Hidden files in the current folder."""
    return [path.name for path in Path().iterdir() if path.name.startswith(".")]


def snapshot() -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(Path().rglob("*")) if file.is_file()}


def named_in(message: str) -> set[str]:
    """The modules that an error lists."""
    return set(re.findall(r"^  (\S+): ", message, re.MULTILINE))


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


def lora_change(
    tensors: Tensors, name: str, up: str = "lora_up.weight", down: str = "lora_down.weight"
) -> Tensor:
    """``c · up @ down`` of a plain module, in float64."""
    high, low = tensors[f"{name}.{up}"].double(), tensors[f"{name}.{down}"].double()
    alpha = tensors.get(f"{name}.alpha")
    return high.flatten(1) @ low.flatten(1) * (1.0 if alpha is None else float(alpha) / len(low))


def rank_at(tensors: Tensors, name: str) -> int:
    return next(
        len(tensors[k]) for k in (f"{name}.lora_down.weight", f"{name}.lora_A.weight") if k in tensors
    )


# --- golden files: the same change by the programs themselves ------------------------------

GROUPS = {
    group["group"]: group
    for group in json.loads((GOLDEN / "convert" / "manifest.json").read_text())["groups"]
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
    outside = (
        dialect in WITHOUT_THEM and layer.family in UNETS and layer.parts[0][0].startswith(OUTSIDE_BLOCKS)
    )
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


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "sd2"])  # has SD 1's UNet
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
    _, back = convert(
        Path("there" if dialect == "peft" else "there.safetensors"), "lycoris.kohya", "--arch", family
    )
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


def test_names_with_an_empty_level_are_known() -> None:
    """As Wan-Fun's trainer writes them."""
    source = write(Path("a.safetensors"), slots("lora", name="lora_unet__blocks_3_self_attn_q"))
    _, out = convert(source, "comfyui", "--arch", "wan")
    assert {key.rpartition(".lora")[0] for key in read(out) if "lora_up" in key} == {
        "diffusion_model.blocks.3.self_attn.q"
    }


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
    "peft": LORA_FORMS | DORA_FORMS | {"loha"},
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
@pytest.mark.parametrize("known", [SPLIT_LAYERS, WHOLE_LAYERS[:1]], ids=["split", "swap"])
def test_form_split_and_swapped(known: tuple[Layer, ...], to: str, form: str) -> None:
    holds: bool | None = form in HOLDS[to]
    if known is SPLIT_LAYERS:
        holds = holds and form not in NOT_SPLIT | NOT_MOVED
    else:
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


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
        again = run(
            "convert", path, "--to", to, "-o", out, "--arch", family, "--from", source, "--drop", "--json"
        )
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


# --- another algorithm ---------------------------------------------------------------------

#: Rank of a linear module's exact LoRA: of (24, 10) with rank 3 factors, LoKr blocks of (4, 5).
EXACT_RANK = {
    "lora": 3, "lora + bias": 3, "lora + up bias": 3, "lora + sparse": 10, "loha": 9, "loha + bias": 9,
    "lokr": 2 * 3, "lokr (both)": 3 * 3, "lokr (full)": 2 * 4,
}  # fmt: skip
NEEDS_BASE = (
    "lora + dora (out)", "lora + dora (in)", "lora (cp) + dora (out)", "loha + dora (out)", "ia3 (out)", "ia3 (in)",
    "glora", "glora (old)", "diag-oft", "diag-oft (bound)", "diag-oft (rescale)", "diag-oft (old)", "boft", "tlora",
)  # fmt: skip

#: Changes that are differences of weights: float32 rounds the weights, which are up to a few
#: hundred times as large as a bounded rotation's change.
DIFFERENCES = 1e-4


def base_of(known: Iterable[Layer]) -> Path:
    """A checkpoint of Stable Diffusion 1 with these layers; its values are exact in float32."""
    prefix = "model.diffusion_model."
    return write(
        Path("base.safetensors"), {f"{prefix}{layer.native}.weight": layer.base.float() for layer in known}
    )


@pytest.mark.parametrize("form", [*EXACT_RANK, "lora (cp)", "loha (cp)", "lokr (cp)"])
def test_other_algorithms_become_lora_exactly(form: str) -> None:
    chosen = {layer: form for layer in SD1_LAYERS if fits(form, layer)}
    source = write(Path("a.safetensors"), tensors_of("lycoris.kohya", chosen))
    report, out = convert(source, "lycoris.kohya", "--algo", "lora", "--arch", "sd1")
    assert_same(effects(source, "lycoris.kohya", SD1_LAYERS), effects(out, "lycoris.kohya", SD1_LAYERS))
    written = read(out)
    assert not [
        key for key in written if "hada" in key or "lokr" in key or "lora_mid" in key or "bias_" in key
    ]
    assert {module["type"] for module in report["modules"]} == {"lora"}
    if form in EXACT_RANK:
        assert rank_at(written, ATTENTION) == EXACT_RANK[form]
    if form == "lora (cp)":  # folding the core keeps the rank, that of the up factor
        assert rank_at(written, CONV) == 4


@pytest.mark.parametrize("form", NEEDS_BASE)
def test_what_depends_on_the_base_is_approximated_with_it(form: str) -> None:
    layer = SD1_LAYERS[0 if form in CP_FORMS else 1]
    source = write(Path("a.safetensors"), tensors_of("lycoris.kohya", {layer: form}))
    base = base_of(SD1_LAYERS)
    expected = effects(source, "lycoris.kohya", [layer])
    change = expected[layer.title].weight
    values = np.linalg.svd(change.numpy(), compute_uv=False)
    options = ("--algo", "lora", "--arch", "sd1", "--base", base)
    # Every rank there is: nothing is lost.
    _, out = convert(source, "networks.lora", *options, "--rank", len(values))
    assert_same(expected, effects(out, "networks.lora", [layer]), DIFFERENCES)
    # Few: as little is lost as can be.
    _, out = convert(source, "networks.lora", *options, "--rank", 2)
    assert rank_at(read(out), ATTENTION if form not in CP_FORMS else CONV) == 2
    lost = expected[layer.title].distance(effects(out, "networks.lora", [layer])[layer.title])
    best = math.sqrt(float((values[2:] ** 2).sum() / (values**2).sum()))
    assert lost == pytest.approx(best, rel=1e-3, abs=DIFFERENCES)
    # An error: the smallest rank that keeps it.
    _, out = convert(source, "networks.lora", *options, "--error", 0.5)
    tails = [math.sqrt(float((values[n:] ** 2).sum() / (values**2).sum())) for n in range(len(values) + 1)]
    expected_rank = max(1, next(n for n, tail in enumerate(tails) if tail <= 0.5))
    assert min(abs(tail - 0.5) for tail in tails) > DIFFERENCES  # not a matter of rounding
    assert rank_at(read(out), ATTENTION if form not in CP_FORMS else CONV) == expected_rank


@pytest.mark.parametrize("form", NEEDS_BASE)
@pytest.mark.parametrize("algo", ["lora", "full"])
def test_without_its_base_it_is_refused(algo: str, form: str) -> None:
    chosen = {layer: form for layer in SD1_LAYERS if fits(form, layer)}
    tensors = tensors_of("lycoris.kohya", chosen)
    source = write(Path("a.safetensors"), tensors)
    message = refuse(source, "lycoris.kohya", "--algo", algo, "--arch", "sd1")
    assert named_in(message) == {name for layer in chosen for name, _ in layer.modules("lycoris.kohya")}
    assert "give `--base CHECKPOINT`" in message
    if algo == "lora":
        message = refuse(source, "lycoris.kohya", "--algo", algo, "--arch", "sd1", "--base", base_of(chosen))
        assert message.count("give `--rank` or `--error`") == len(chosen)


@pytest.mark.parametrize("form", FORMS)
def test_any_algorithm_becomes_a_full_difference(form: str) -> None:
    chosen = {layer: form for layer in SD1_LAYERS if fits(form, layer)}
    source = write(Path("a.safetensors"), tensors_of("lycoris.kohya", chosen))
    _, out = convert(
        source, "lycoris.kohya", "--algo", "full", "--arch", "sd1", "--base", base_of(SD1_LAYERS)
    )
    expected = effects(source, "lycoris.kohya", SD1_LAYERS)
    assert_same(expected, effects(out, "lycoris.kohya", SD1_LAYERS), DIFFERENCES)
    assert {key.rpartition(".")[2] for key in read(out)} <= {"diff", "diff_b", "w_norm", "b_norm"}
    shapes = {tuple(t.shape) for key, t in read(out).items() if key.endswith(".diff")}
    assert shapes <= {layer.shape for layer in chosen}


@pytest.mark.parametrize("algo", ["lora", "full"])
def test_norms_and_biases_stay_what_they_are(algo: str) -> None:
    kept = {**slots("norm", (24, 1), NORM), **slots("bias", (24, 1), CONV)}
    source = write(Path("a.safetensors"), {**kept, **slots("loha")})
    rank = ("--rank", 1) if algo == "lora" else ()
    _, out = convert(source, "lycoris.kohya", "--algo", algo, *rank, "--arch", "sd1")
    written = read(out)
    assert all(torch.equal(written[key], tensor) for key, tensor in kept.items())
    assert not any(key.startswith((NORM, CONV)) for key in written.keys() - kept.keys())


def test_dylora_is_a_lora_already() -> None:
    metadata = {"ss_network_module": "networks.dylora"}
    source = write(Path("a.safetensors"), slots("lora"), metadata)
    _, out = convert(source, "networks.lora", "--algo", "lora", "--arch", "sd1")
    assert_equal_tensors(read(out), slots("lora"))
    assert contents(out).metadata["ss_network_module"] == "networks.lora"


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({f"model.diffusion_model.{SD1_LAYERS[1].native}.weight": torch.ones(24, 11)}, "is made for a 24x10"),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4, 3, 3)}, "has no such layer"),
    ],
)
def test_a_base_that_does_not_fit(tensors: Tensors, reason: str) -> None:
    source = write(Path("a.safetensors"), slots("lora + dora (out)"))
    base = write(Path("base.safetensors"), tensors)
    message = refuse(source, "networks.lora", "--algo", "full", "--arch", "sd1", "--base", base)
    assert reason in message
    assert named_in(message) == {ATTENTION}


# --- there and back ------------------------------------------------------------------------


def assert_equal_tensors(found: Tensors, expected: Tensors) -> None:
    """The same keys, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        one, two = (t.reshape(-1).contiguous().view(torch.uint8) for t in (found[key], tensor))
        assert torch.equal(one, two), key


def there_and_back(tensors: Tensors, via: str, to: str, *options: object) -> Tensors:
    source = write(Path("a.safetensors"), tensors)
    _, out = convert(source, via, *options)
    there = out.rename("there" if via == "peft" else "there.safetensors")
    return read(convert(there, to, *options)[1])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
)
def test_kohya_comes_back_from_comfyui_bit_by_bit(dtype: torch.dtype) -> None:
    parts = {
        **slots("lora", (24, 10, 3, 3), CONV, alpha=1.3),
        **slots("lora", alpha=-0.7),
        **slots("lora", (12, 10), TEXT, alpha=0.0),
    }
    tensors = {key: tensor.to(dtype) for key, tensor in parts.items()}
    tensors[f"{CONV}.alpha"] = tensors[f"{CONV}.alpha"].reshape(1)  # as LyCORIS' extraction writes it
    assert_equal_tensors(there_and_back(tensors, "comfyui", "networks.lora", "--arch", "sd1"), tensors)


@pytest.mark.parametrize(
    "form", sorted(set(FORMS) - NOT_SPLIT - NOT_FUSED - NOT_MOVED - set(CP_FORMS) - {"lora + up bias"})
)
def test_flux_modules_come_back_bit_by_bit(form: str) -> None:
    """Names, splitting, fusing and swapped halves lose no bit of a form that both sides hold."""
    known = SPLIT_LAYERS + WHOLE_LAYERS
    tensors = tensors_of("lycoris.kohya", dict.fromkeys(known, form))
    assert_equal_tensors(there_and_back(tensors, "lycoris", "lycoris.kohya", "--arch", "flux1"), tensors)


@pytest.mark.parametrize("via", ["diffusers", "ai-toolkit", "peft", "bfl"])
def test_kohya_flux_comes_back_bit_by_bit_where_the_scale_is_1(via: str) -> None:
    tensors = tensors_of("lycoris.kohya", dict.fromkeys(SPLIT_LAYERS + WHOLE_LAYERS, "lora"), alpha=3.0)
    assert_equal_tensors(there_and_back(tensors, via, "networks.lora", "--arch", "flux1"), tensors)


@pytest.mark.parametrize("alpha", [0.75, 12.0, -1.5])
def test_a_scale_of_a_power_of_two_is_folded_without_loss(alpha: float) -> None:
    known = SPLIT_LAYERS + WHOLE_LAYERS
    tensors = tensors_of("lycoris.kohya", dict.fromkeys(known, "lora"), alpha=alpha, dtype=torch.bfloat16)
    found = there_and_back(tensors, "diffusers", "networks.lora", "--arch", "flux1")
    again = save(Path("again.safetensors"), found)
    before = effects(Path("a.safetensors"), "networks.lora", known)
    assert_same(before, effects(again, "networks.lora", known), 0.0)
    assert all(torch.equal(found[key], t) for key, t in tensors.items() if "lora_down" in key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_other_scale_is_rounded_once(dtype: torch.dtype) -> None:
    known = SPLIT_LAYERS + WHOLE_LAYERS
    tensors = tensors_of("lycoris.kohya", dict.fromkeys(known, "lora"), alpha=0.7, dtype=dtype)
    again = save(
        Path("again.safetensors"), there_and_back(tensors, "diffusers", "networks.lora", "--arch", "flux1")
    )
    before = effects(Path("a.safetensors"), "networks.lora", known)
    # Rounding one factor once is half an eps at most.
    assert_same(before, effects(again, "networks.lora", known), torch.finfo(dtype).eps / 2)


# --- splitting and fusing ------------------------------------------------------------------


def split_file(ranks: Iterable[int], parts: Iterable[str] = PARTS) -> Tensors:
    return {
        key: tensor
        for name, rank in zip(parts, ranks, strict=True)
        for key, tensor in peft_slots([name], 12, rank).items()
    }


def test_parts_get_their_own_ranks_back() -> None:
    tensors = split_file((2, 3, 4))
    source = write(Path("a.safetensors"), tensors)
    report, out = convert(source, "networks.lora", "--arch", "flux1")
    assert [(m["name"], m["rank"], m["sources"]) for m in report["modules"]] == [(QKV, 9, list(PARTS))]
    fused = read(out)
    change = torch.cat([lora_change(tensors, name, "lora_B.weight", "lora_A.weight") for name in PARTS])
    assert torch.equal(lora_change(fused, QKV), change)
    _, back = convert(out.rename("there.safetensors"), "diffusers", "--arch", "flux1")
    assert_equal_tensors(read(back), tensors)


def test_parts_with_one_down_are_fused_at_its_rank() -> None:
    tensors = split_file((3, 3, 3))
    for name in PARTS[1:]:
        tensors[f"{name}.lora_A.weight"] = tensors[f"{PARTS[0]}.lora_A.weight"].clone()
    _, out = convert(write(Path("a.safetensors"), tensors), "networks.lora", "--arch", "flux1")
    assert rank_at(read(out), QKV) == 3
    change = torch.cat([lora_change(tensors, name, "lora_B.weight", "lora_A.weight") for name in PARTS])
    assert torch.equal(lora_change(read(out), QKV), change)


def test_a_part_that_is_missing_stays_unchanged_and_missing() -> None:
    tensors = split_file((2, 4), (PARTS[0], PARTS[2]))
    _, out = convert(write(Path("a.safetensors"), tensors), "networks.lora", "--arch", "flux1")
    change = lora_change(read(out), QKV)
    assert rank_at(read(out), QKV) == 6
    assert not change[12:24].any()
    for name, rows in ((PARTS[0], change[:12]), (PARTS[2], change[24:])):
        assert torch.equal(rows, lora_change(tensors, name, "lora_B.weight", "lora_A.weight"))
    _, back = convert(out.rename("there.safetensors"), "diffusers", "--arch", "flux1")
    assert_equal_tensors(read(back), tensors)


def test_parts_with_scales_of_their_own_are_fused() -> None:
    names = [f"lora_transformer_transformer_blocks_0_attn_to_{part}" for part in "qkv"]
    alphas = (1.0, 0.4, -2.0)
    tensors = {
        key: tensor
        for name, alpha in zip(names, alphas, strict=True)
        for key, tensor in slots("lora", (12, 10), name, alpha=alpha, seed=name).items()
    }
    _, out = convert(write(Path("a.safetensors"), tensors), "networks.lora", "--arch", "flux1")
    change = torch.cat([lora_change(tensors, name) for name in names])
    assert (lora_change(read(out), QKV) - change).norm() <= ROUNDING * EPS * change.norm()


def test_a_faulty_part_is_named_with_those_it_would_be_fused_with() -> None:
    names = [f"lycoris_transformer_blocks_0_attn_to_{part}" for part in "qkv"]
    tensors = {**slots("lora", (12, 10), names[0]), **slots("loha", (12, 10), names[1])}
    tensors |= {**slots("lora", (12, 10), names[2]), **slots("lora", (12, 10), "lycoris_x_embedder")}
    source = write(Path("a.safetensors"), tensors)
    message = refuse(source, "networks.lora", "--arch", "flux1")
    assert named_in(message) == set(names)
    assert message.count("has no loha") == 1
    report, out = convert(source, "networks.lora", "--arch", "flux1", "--drop")
    assert report["dropped"].keys() == set(names)
    assert {key.split(".")[0] for key in read(out)} == {"lora_unet_img_in"}


def test_a_module_that_is_dropped_leaves_no_part_behind() -> None:
    """The bound of a rotation is in force for the queries' rows alone: the other parts could be written."""
    name = "lora_unet_single_blocks_0_linear1"
    blocks = torch.zeros(14, 4, 4)
    blocks[0, 0, 1] = 1.0
    rotation = {f"{name}.oft_blocks": blocks, f"{name}.alpha": torch.tensor(0.05)}
    source = write(Path("a.safetensors"), {**rotation, **slots("lora", name="lora_unet_img_in")})
    assert named_in(refuse(source, "lycoris", "--arch", "flux1")) == {name}
    report, out = convert(source, "lycoris", "--arch", "flux1", "--drop")
    assert report["dropped"].keys() == {name}
    assert {key.split(".")[0] for key in read(out)} == {"lycoris_x_embedder"}


def test_lokr_is_split_where_a_boundary_cuts_no_block() -> None:
    tensors = slots("lokr", (12, 10), QKV)  # blocks of four rows: one for each part
    _, out = convert(write(Path("a.safetensors"), tensors), "lycoris", "--arch", "flux1")
    for number, part in enumerate("qkv"):
        name = f"lycoris_transformer_blocks_0_attn_to_{part}"
        assert torch.equal(read(out)[f"{name}.lokr_w1"], tensors[f"{QKV}.lokr_w1"][number : number + 1])
    tensors = {f"{QKV}.lokr_w1": normal("w1", (2, 2)).float(), f"{QKV}.lokr_w2": normal("w2", (6, 5)).float()}
    source = write(Path("b.safetensors"), tensors)
    assert "lokr cannot be split exactly" in refuse(source, "lycoris", "--arch", "flux1")
    _, out = convert(source, "lycoris", "--arch", "flux1", "--algo", "lora")
    whole = torch.kron(tensors[f"{QKV}.lokr_w1"].double(), tensors[f"{QKV}.lokr_w2"].double())
    for rows, part in zip(whole.split(4), "qkv", strict=True):
        found = lora_change(read(out), f"lycoris_transformer_blocks_0_attn_to_{part}")
        assert (found - rows).norm() <= ROUNDING * EPS * rows.norm()


def test_the_halves_of_the_last_norm_change_places() -> None:
    tensors = slots("full + bias", (24, 10), ADAPTIVE)
    _, out = convert(write(Path("a.safetensors"), tensors), "lycoris", "--arch", "flux1")
    found = read(out)
    for slot in ("diff", "diff_b"):
        assert torch.equal(
            found[f"lycoris_norm_out_linear.{slot}"], tensors[f"{ADAPTIVE}.{slot}"].roll(12, 0)
        )


# --- scales, dtypes, shapes ----------------------------------------------------------------


def weight(path: Path, dialect: str, layer: Layer = SD1_LAYERS[1]) -> Tensor:
    return effects(path, dialect, [layer])[layer.title].weight


def test_a_missing_alpha_is_the_rank() -> None:
    tensors = slots("lora", alpha=None)
    source = write(Path("a.safetensors"), tensors)
    _, out = convert(source, "comfyui", "--arch", "sd1")
    assert float(read(out)[f"{COMFY}.alpha"]) == 3.0
    assert torch.equal(weight(out, "comfyui"), lora_change(tensors, ATTENTION))


@pytest.mark.parametrize("to", ["networks.lora", "diffusers", "hcp", "peft", "onetrainer"])
def test_alpha_zero_is_read_as_asked(to: str) -> None:
    tensors = slots("lora", alpha=0.0)
    source = write(Path("a.safetensors"), tensors)
    assert not weight(convert(source, to, "--arch", "sd1")[1], to).any()
    _, out = convert(source, to, "--arch", "sd1", "--alpha-zero", "rank")
    del tensors[f"{ATTENTION}.alpha"]
    assert torch.equal(weight(out, to), lora_change(tensors, ATTENTION))


def test_hcp_stores_the_scale_itself() -> None:
    source = write(Path("a.safetensors"), slots("lora", alpha=1.5))
    _, out = convert(source, "hcp", "--arch", "sd1")
    assert float(read(out)[f"{DOTTED.removeprefix('unet.')}.___.alpha"]) == 0.5
    _, back = convert(out.rename("hcp.safetensors"), "networks.lora", "--arch", "sd1")
    assert_equal_tensors(read(back), slots("lora", alpha=1.5))


def test_dylora_trained_by_blocks_has_its_scale() -> None:
    tensors = slots("lora", alpha=1.0)
    metadata = {"ss_network_args": '{"algo": "dylora"}'}
    source = write(Path("a.safetensors"), tensors, metadata)
    _, out = convert(source, "networks.lora", "--arch", "sd1", "--dylora-block-size", 2, "--verify")
    assert (weight(out, "networks.lora") - 2 * lora_change(tensors, ATTENTION)).norm() <= EPS


def test_dylora_of_lycoris_gets_the_ones_of_its_kernel() -> None:
    tensors = slots("lora", (24, 10, 3, 3), CONV)
    flat = {**tensors, f"{CONV}.lora_up.weight": tensors[f"{CONV}.lora_up.weight"].flatten(1)}
    source = write(Path("a.safetensors"), flat, {"ss_network_args": '{"algo": "dylora"}'})
    assert_equal_tensors(read(convert(source, "networks.lora", "--arch", "sd1")[1]), tensors)


def test_legacy_loha_is_written_with_the_core_it_is_read_with() -> None:
    tensors = slots("loha (cp)", (24, 10, 3, 3), CONV)
    source = write(Path("a.safetensors"), tensors)
    _, out = convert(source, "lycoris.kohya", "--arch", "sd1", "--legacy-loha-cp")
    expected = {**tensors, f"{CONV}.hada_t2": tensors[f"{CONV}.hada_t1"]}
    assert_equal_tensors(read(out), expected)


@pytest.mark.parametrize(("reading", "scale"), [("once", 0.5), ("twice", 0.25)])
def test_old_glora_is_written_so_that_all_read_it_alike(reading: str, scale: float) -> None:
    tensors = slots("glora (old)")
    source = write(Path("a.safetensors"), tensors)
    _, out = convert(source, "comfyui", "--arch", "sd1", "--glora-old-scale", reading, "--verify")
    written = {key.removeprefix(f"{COMFY}."): t for key, t in read(out).items()}
    assert float(written["alpha"]) == 3.0
    for slot in ("a1", "b1"):
        assert torch.equal(written[f"{slot}.weight"], tensors[f"{ATTENTION}.{slot}.weight"])
    for slot in ("a2", "b2"):
        assert torch.equal(written[f"{slot}.weight"], scale * tensors[f"{ATTENTION}.{slot}.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("to", ["networks.lora", "diffusers"])
def test_the_dtype_is_kept_or_what_was_asked_for(to: str, dtype: torch.dtype) -> None:
    source = write(
        Path("a.safetensors"), {k: t.to(dtype) for k, t in slots("lora (cp)", (24, 10, 3, 3), CONV).items()}
    )
    written = read(convert(source, to, "--arch", "sd1")[1])
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    for name, asked in names.items():
        written = read(convert(source, to, "--arch", "sd1", "--dtype", name)[1])
        assert {t.dtype for key, t in written.items() if not key.endswith("alpha")} == {asked}


def test_an_alpha_that_the_dtype_does_not_hold_is_float32() -> None:
    tensors = {key: tensor.bfloat16() for key, tensor in slots("lora", alpha=None, rank=3).items()}
    tensors[f"{ATTENTION}.alpha"] = torch.tensor(1.1)
    source = write(Path("a.safetensors"), tensors)
    _, out = convert(source, "hcp", "--arch", "sd1")
    found = read(out)[f"{DOTTED.removeprefix('unet.')}.___.alpha"]
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(torch.tensor(1.1)) / 3, rel=EPS)


def test_float64_keeps_its_digits() -> None:
    parts = {**slots("lora", alpha=0.7), **slots("lora (cp)", (24, 10, 3, 3), CONV, alpha=0.7)}
    tensors = {key: tensor.double() * (1 / 3) for key, tensor in parts.items()}
    source = write(Path("a.safetensors"), tensors)
    _, out = convert(source, "diffusers", "--arch", "sd1", "--verify")
    assert {tensor.dtype for tensor in read(out).values()} == {torch.float64}
    expected = effects(source, "lycoris.kohya", SD1_LAYERS)
    assert_same(expected, effects(out, "diffusers", SD1_LAYERS), ROUNDING * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize(
    ("to", "options", "tensors"),
    [
        ("networks.lora", ("--dtype", "fp16"), {**slots("lora"), f"{ATTENTION}.lora_up.weight": torch.full((24, 3), 1e6)}),
        ("diffusers", (), {k: t.half() for k, t in {**slots("lora", alpha=3e5)}.items() if "alpha" not in k}
         | {f"{ATTENTION}.alpha": torch.tensor(6e5)}),
        ("networks.lora", (), {**slots("lora"), f"{ATTENTION}.lora_up.weight": torch.full((24, 3), torch.nan)}),
        ("networks.lora", (), {**slots("lora"), f"{ATTENTION}.lora_up.weight": torch.full((24, 3), torch.inf)}),
        ("networks.lora", (), {**slots("lora"), f"{ATTENTION}.alpha": torch.tensor(torch.inf)}),
    ],
    ids=["dtype", "folded scale", "NaN", "infinity", "alpha"],
)  # fmt: skip
def test_numbers_that_do_not_fit(to: str, options: tuple[str, ...], tensors: Tensors) -> None:
    source = write(Path("a.safetensors"), tensors)
    message = refuse(source, to, "--arch", "sd1", *options, code=6)
    assert "lora_up" in message or "alpha" in message


@pytest.mark.parametrize(
    ("to", "suffix", "linear", "conv"),
    [
        ("lycoris.kohya", "dora_scale", (24, 1), (24, 1, 1, 1)),
        ("comfyui", "dora_scale", (24, 1), (24, 1, 1, 1)),
        ("diffusers", "lora_magnitude_vector", (24,), (1, 24, 1, 1)),
        ("peft", "lora_magnitude_vector", (24,), (1, 24, 1, 1)),
        ("ai-toolkit", "magnitude", (24,), (24,)),
    ],
)
@pytest.mark.parametrize("via", ["lycoris.kohya", "diffusers", "ai-toolkit"])
def test_magnitudes_have_the_shape_of_their_dialect(
    via: str, to: str, suffix: str, linear: tuple[int, ...], conv: tuple[int, ...]
) -> None:
    chosen = dict.fromkeys(SD1_LAYERS[:2], "lora + dora (out)")
    tensors = tensors_of(via, chosen)
    source = write(Path("a.safetensors"), tensors)
    _, out = convert(source, to, "--arch", "sd1")
    shapes = {tuple(t.shape) for key, t in contents(out).tensors.items() if key.endswith(f".{suffix}")}
    assert shapes == {linear, conv}
    assert_same(effects(source, via, SD1_LAYERS), effects(out, to, SD1_LAYERS))


def test_magnitudes_and_biases_keep_their_own_dtype() -> None:
    tensors = {k: t.half() for k, t in slots("lora + dora (out)").items()} | {
        key: tensor.half() for key, tensor in slots("lora + bias", (24, 10, 3, 3), CONV).items()
    }
    tensors[f"{ATTENTION}.dora_scale"] = slots("lora + dora (out)")[f"{ATTENTION}.dora_scale"]
    source = write(Path("a.safetensors"), tensors)
    assert_equal_tensors(there_and_back(read(source), "lycoris", "lycoris.kohya", "--arch", "sd1"), tensors)


@pytest.mark.parametrize("alpha", [3.0, 1.5])
def test_a_bias_is_scaled_where_the_dialect_scales_it(alpha: float) -> None:
    tensors = slots("lora + bias", alpha=alpha)
    source = write(Path("a.safetensors"), tensors)
    _, out = convert(source, "diffusers", "--arch", "sd1")
    assert torch.equal(read(out)[f"{DOTTED}.lora_B.bias"], tensors[f"{ATTENTION}.diff_b"])
    _, back = convert(out.rename("there.safetensors"), "lycoris.kohya", "--arch", "sd1")
    assert torch.equal(read(back)[f"{ATTENTION}.diff_b"], tensors[f"{ATTENTION}.diff_b"])
    source = write(Path("b.safetensors"), slots("lora + up bias", alpha=alpha))
    assert_same(
        effects(source, "lycoris.kohya", SD1_LAYERS),
        effects(convert(source, "comfyui", "--arch", "sd1")[1], "comfyui", SD1_LAYERS),
    )


def test_diffusers_looks_for_a_bias_on_every_module_of_a_component_or_on_none() -> None:
    tensors = {**slots("lora + bias"), **slots("lora", (24, 10, 3, 3), CONV), **slots("lora", (12, 10), TEXT)}
    _, out = convert(write(Path("a.safetensors"), tensors), "diffusers", "--arch", "sd1")
    biases = {key: tensor for key, tensor in read(out).items() if key.endswith("lora_B.bias")}
    conv = "unet.down_blocks.0.resnets.0.conv1.lora_B.bias"
    assert biases.keys() == {conv, f"{DOTTED}.lora_B.bias"}
    assert not biases[conv].any()


def test_diffusers_looks_for_dora_on_every_module_of_a_component_or_on_none() -> None:
    others = [ATTENTION.replace("to_q", f"to_{part}") for part in "kv"]
    tensors = {**slots("lora + dora (out)"), **slots("lora", (12, 10), TEXT)}
    tensors |= {key: t for name in others for key, t in slots("lora", name=name).items()}
    source = write(Path("a.safetensors"), tensors)
    assert named_in(refuse(source, "diffusers", "--arch", "sd1")) == {ATTENTION}
    _, out = convert(source, "diffusers", "--arch", "sd1", "--drop")
    assert not [key for key in read(out) if key.startswith(DOTTED) or "magnitude" in key]
    both = write(Path("b.safetensors"), slots("lora + dora (out)") | slots("lora", (12, 10), TEXT))
    convert(both, "diffusers", "--arch", "sd1")  # a text encoder is a component of its own


@pytest.mark.parametrize(("arch", "ones"), [("sd1", (1, 1)), ("sd2", ())])
def test_a_matrix_on_a_pointwise_convolution_gets_its_kernel(arch: str, ones: tuple[int, ...]) -> None:
    """LoHa stores such a layer of Stable Diffusion 1, which is linear in 2, without its ones."""
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    source = write(Path("a.safetensors"), slots("loha", name=name))
    _, out = convert(source, "networks.lora", "--arch", arch, "--algo", "lora")
    assert read(out)[f"{name}.lora_up.weight"].shape == (24, 9, *ones)
    assert read(out)[f"{name}.lora_down.weight"].shape == (9, 10, *ones)


# --- PEFT folders --------------------------------------------------------------------------


def peft_folder(tensors: Tensors, **config: object) -> Path:
    whole = {"peft_type": "LORA", "r": 4, "rank_pattern": {}, "alpha_pattern": {}}
    return save(
        Path("adapter"), {f"base_model.model.{key}": t for key, t in tensors.items()}, config=whole | config
    )


def test_ranks_and_alphas_of_a_folder_stand_in_its_configuration() -> None:
    layer, conv = SD1_LAYERS[1], SD1_LAYERS[0]
    tensors = {**slots("lora", rank=3, alpha=0.3), **slots("lora", (24, 10, 3, 3), CONV, rank=4, alpha=8.0)}
    source = write(Path("a.safetensors"), tensors)
    _, out = convert(source, "peft", "--arch", "sd1")
    file = contents(out)
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not [key for key in file.tensors if "alpha" in key]
    config = dict(file.config)
    assert {config["r"], *config["rank_pattern"].values()} == {3, 4}  # type: ignore[attr-defined]
    assert config["peft_type"] == "LORA"
    assert config["use_rslora"] is False
    assert config["use_dora"] is False
    assert sorted(str(config["target_modules"]).replace("\\", "").split("|")) == sorted(
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for key in file.tensors if key.endswith("lora_A.weight")
    )  # fmt: skip
    expected = effects(source, "networks.lora", [layer, conv])
    assert_same(expected, effects(out, "peft", [layer, conv]), 0.0)
    _, back = convert(out.rename("there"), "networks.lora", "--arch", "sd1")
    assert_same(expected, effects(back, "networks.lora", [layer, conv]), EPS)


def test_a_path_that_ends_another_has_a_pattern_of_its_own() -> None:
    """`proj_out` is a layer of Flux, and of each of its single blocks."""
    outer, inner = "lora_unet_final_layer_linear", "lora_unet_single_blocks_{}_linear2"
    tensors = slots("lora", (24, 10), outer, rank=2, alpha=1.0)
    for number in range(3):
        tensors |= slots("lora", (24, 10), inner.format(number), rank=4, alpha=6.0)
    _, out = convert(write(Path("a.safetensors"), tensors), "peft", "--arch", "flux1")
    known = [
        Layer("flux1", "unet", "final_layer.linear", None, (("proj_out", 24),), (24, 10)),
        *(
            Layer("flux1", "unet", f"single_blocks.{number}.linear2", None,
                  ((f"single_transformer_blocks.{number}.proj_out", 24),), (24, 10))
            for number in range(3)
        ),
    ]  # fmt: skip
    assert_same(effects(Path("a.safetensors"), "networks.lora", known), effects(out, "peft", known), 0.0)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"rank_pattern": {"attn1.to_q": 2}}, 4.0),
        ({"alpha_pattern": {"attn1.to_q": 1}}, 0.25),
        (
            {"alpha_pattern": {r"down_blocks.*to_\w": 2}, "rank_pattern": {"to_q": 16}, "use_rslora": True},
            0.5,
        ),
    ],
)
def test_the_scale_of_a_folder_is_in_its_configuration(config: dict[str, object], scale: float) -> None:
    path = DOTTED.removeprefix("unet.")
    tensors = peft_slots([path], rank=4)
    folder = peft_folder(tensors, lora_alpha=8, **config)
    plain = lora_change(tensors, path, "lora_B.weight", "lora_A.weight")
    for to in ("networks.lora", "diffusers", "peft"):
        found = weight(convert(folder, to, "--arch", "sd1")[1], to)
        assert torch.equal(found, scale * plain)


def test_peft_scales_two_whole_factors_of_lokr_and_nobody_else_does() -> None:
    path = DOTTED.removeprefix("unet.")
    factors = {f"{path}.lokr_w1": normal("1", (6, 2)).float(), f"{path}.lokr_w2": normal("2", (4, 5)).float()}
    folder = peft_folder(factors, peft_type="LOKR", r=8, alpha=2)
    product = torch.kron(*(t.double() for t in factors.values()))
    _, out = convert(folder, "lycoris.kohya", "--arch", "sd1")
    assert torch.equal(weight(out, "lycoris.kohya"), 0.25 * product)


@pytest.mark.parametrize(
    "forms",
    [("lora", "loha"), ("lora", "lora + dora (out)")],
    ids="+".join,
)
def test_a_folder_has_one_kind_of_module(forms: tuple[str, str]) -> None:
    source = write(Path("a.safetensors"), {**slots(forms[0]), **slots(forms[1], (24, 10, 3, 3), CONV)})
    message = refuse(source, "peft", "--arch", "sd1")
    assert "a PEFT folder has one kind of module for all" in message


def test_dora_over_loha_is_none_of_peft_s() -> None:
    source = write(Path("a.safetensors"), slots("loha + dora (out)"))
    assert named_in(refuse(source, "peft", "--arch", "sd1")) == {ATTENTION}


def test_a_folder_is_replaced_as_a_whole() -> None:
    source = write(Path("a.safetensors"), slots("lora"))
    Path("out").mkdir()
    Path("out/old.txt").write_text("old")
    assert run("convert", source, "--to", "peft", "-o", "out", "--arch", "sd1").exit_code == 7
    assert Path("out/old.txt").read_text() == "old"
    convert(source, "peft", "--arch", "sd1")
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


# --- metadata ------------------------------------------------------------------------------


def metadata_of(tensors: Tensors, to: str, arch: str = "sd1", **metadata: str) -> dict[str, str]:
    source = write(Path("a.safetensors"), tensors, metadata)
    return dict(contents(convert(source, to, "--arch", arch)[1]).metadata)


def test_metadata_says_what_sd_scripts_would() -> None:
    tensors = {
        **slots("lora (cp)", (24, 10, 3, 3), CONV, alpha=2.0),
        **slots("lora"),
        **slots("lora", (12, 10), TEXT),
    }
    arguments = {"algo": "loha", "conv_dim": "7", "preset": "full", "use_tucker": "True", "dropout": "0.1"}
    found = metadata_of(
        tensors, "networks.lora", ss_network_module="lycoris.kohya", ss_network_dim="7", ss_network_alpha="7",
        ss_network_args=json.dumps(arguments), ss_output_name="style", sshs_model_hash="0x00",
    )  # fmt: skip
    assert found["ss_network_module"] == "networks.lora"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("3", "1.5")
    # The core's rank was (4, 3): folded it is 4, and c = 2/3 stays.
    expected = {"conv_dim": "4", "conv_alpha": f"{8 / 3:g}", "dropout": "0.1"}
    assert json.loads(found["ss_network_args"]) == expected
    assert found["ss_base_model_version"] == "sd_v1"
    assert found["ss_output_name"] == "style"
    assert found["sshs_model_hash"] != "0x00"
    assert json.loads(found["lycotool.convert"]) == {"file": "a.safetensors", "to": "networks.lora"}


def test_different_ranks_are_dynamic() -> None:
    tensors = {**slots("lora", rank=2), **slots("lora", (12, 10), TEXT, rank=3)}
    found = metadata_of(tensors, "networks.lora")
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("Dynamic", "1.5")


@pytest.mark.parametrize(
    ("form", "algo"),
    [("lora", "locon"), ("loha", "loha"), ("lokr", "lokr"), ("ia3 (in)", "ia3"), ("full", "full"), ("boft", "boft"),
     ("diag-oft", "diag-oft"), ("glora", "glora"), ("tlora", "tlora")],
)  # fmt: skip
def test_lycoris_finds_its_algorithm_in_the_arguments(form: str, algo: str) -> None:
    found = metadata_of(slots(form), "lycoris.kohya")
    assert found["ss_network_module"] == "lycoris.kohya"
    assert json.loads(found["ss_network_args"])["algo"] == algo


def test_a_core_is_told_in_the_arguments() -> None:
    found = metadata_of(slots("lora (cp)", (24, 10, 3, 3), CONV), "lycoris.kohya")
    assert json.loads(found["ss_network_args"])["use_tucker"] == "True"


@pytest.mark.parametrize(
    ("arch", "network"),
    [("sd1", "networks.lora"), ("flux1", "networks.lora_flux"), ("chroma", "networks.lora_flux"),
     ("sd3", "networks.lora_sd3"), ("lumina2", "networks.lora_lumina"), ("wan", "networks.lora_wan")],
)  # fmt: skip
def test_sd_scripts_has_a_module_for_some_families(arch: str, network: str) -> None:
    layer = next(layer for layer in some_layers(arch) if room("networks.lora", layer))
    found = metadata_of(tensors_of("lycoris.kohya", {layer: "lora"}), "networks.lora", arch)
    assert found["ss_network_module"] == network


@pytest.mark.parametrize("to", ["diffusers", "comfyui", "peft", "ai-toolkit", "onetrainer"])
def test_other_programs_files_do_not_keep_kohya_s_ranks(to: str) -> None:
    found = metadata_of(
        slots("lora"), to, ss_network_module="networks.lora", ss_network_dim="3", ss_network_alpha="1.5",
        ss_network_args="{}", ss_output_name="style", lora_adapter_metadata='{"unet.r": 3, "unet.lora_alpha": 3}',
    )  # fmt: skip
    assert found["ss_output_name"] == "style"
    assert not {key for key in found if key.startswith("ss_network") or key == "lora_adapter_metadata"}


def test_diffusers_configuration_in_the_header_is_folded() -> None:
    tensors = peft_slots([DOTTED])
    said = {"unet.r": 3, "unet.lora_alpha": 6, "unet.alpha_pattern": {}, "unet.rank_pattern": {}}
    source = write(Path("a.safetensors"), tensors, {"lora_adapter_metadata": json.dumps(said)})
    plain = lora_change(tensors, DOTTED, "lora_B.weight", "lora_A.weight")
    for to in ("networks.lora", "diffusers"):
        assert torch.equal(weight(convert(source, to, "--arch", "sd1")[1], to), 2 * plain)


def test_embeddings_are_carried_along_or_named() -> None:
    keys = [f"bundle_emb.face.{name}" for name in ("string_to_param.*", "clip_l")]
    extra = {key: normal(key, (2, 8)).half() for key in keys}
    source = write(Path("a.safetensors"), {**slots("lora"), **extra})
    for to in ("lycoris.kohya", "onetrainer"):
        written = read(convert(source, to, "--arch", "sd1", "--dtype", "bf16")[1])
        assert_equal_tensors({key: written[key] for key in keys}, extra)
    for to in ("networks.lora", "comfyui", "peft"):
        assert named_in(refuse(source, to, "--arch", "sd1")) == set(keys)
        report, out = convert(source, to, "--arch", "sd1", "--drop")
        assert report["dropped"].keys() == set(keys)
        assert keys[0] not in contents(out).tensors


# --- verification --------------------------------------------------------------------------


def corrupt(monkeypatch: pytest.MonkeyPatch, key: str, change: Callable[[Tensor], Tensor]) -> None:
    """Let the renderer write a wrong tensor."""
    right = _converter.render

    def wrong(*arguments: object, **options: object) -> Rendered:
        rendered = right(*arguments, **options)  # type: ignore[arg-type]
        for name in [name for name in rendered.tensors if name.endswith(key)]:
            rendered.tensors[name] = change(rendered.tensors[name])
        return rendered

    monkeypatch.setattr(_converter, "render", wrong)


def one_element(tensor: Tensor) -> Tensor:
    wrong = tensor.clone()
    wrong.view(-1)[min(1, wrong.numel() - 1)] += 0.1  # not the first: that of a rotation is on its diagonal
    return wrong


@pytest.mark.parametrize(
    ("to", "form", "key", "options"),
    [
        ("diffusers", "lora", "lora_A.weight", ()),
        ("diffusers", "lora", "lora_B.weight", ()),
        ("diffusers", "lora + bias", "lora_B.bias", ()),
        ("diffusers", "lora + dora (out)", "lora_magnitude_vector", ()),
        ("networks.lora", "lora (cp)", "lora_down.weight", ()),
        ("networks.lora", "loha", "lora_up.weight", ("--algo", "lora")),
        ("comfyui", "lora", "lora_up.weight", ("--verify",)),
        ("comfyui", "lora", "alpha", ("--verify",)),
        ("comfyui", "lokr", "lokr_w2_b", ("--verify",)),
        ("comfyui", "loha", "hada_w2_a", ("--verify",)),
        ("comfyui", "full", "diff", ("--verify",)),
        ("comfyui", "norm", "b_norm", ("--verify",)),
        ("comfyui", "bias", "diff_b", ("--verify",)),
        ("comfyui", "glora", "a1.weight", ("--verify",)),
        ("comfyui", "diag-oft", "oft_blocks", ("--verify",)),
        ("lycoris", "ia3 (out)", ".weight", ("--verify",)),
        ("peft", "lora", "lora_B.weight", ()),
    ],
)
def test_a_file_that_says_something_else_is_not_published(
    monkeypatch: pytest.MonkeyPatch, to: str, form: str, key: str, options: tuple[str, ...]
) -> None:
    layer = SD1_LAYERS[0 if form in CP_FORMS else 1]
    source = write(Path("a.safetensors"), tensors_of("lycoris.kohya", {layer: form}))
    out = Path("out" if to == "peft" else "out.safetensors")
    arguments = ("convert", source, "--to", to, "-o", out, "--arch", "sd1", "--force", *options)
    succeed(*arguments)
    corrupt(monkeypatch, key, one_element)
    before = snapshot()
    result = run(*arguments)
    assert result.exit_code == 10
    assert not result.stdout
    assert len(re.findall(r"^  \S+: [\d.e-]+$", result.stderr, re.MULTILINE)) == 1
    assert snapshot() == before
    assert not litter()
    without = [argument for argument in arguments if argument != "--verify"]
    succeed(*without, "--no-verify")
    assert snapshot() != before


def test_a_small_part_s_error_is_not_hidden_by_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {key: tensor.bfloat16() for key, tensor in split_file((3, 3, 3)).items()}
    for name in PARTS:
        tensors[f"{name}.lora_A.weight"] = tensors[f"{PARTS[0]}.lora_A.weight"].clone()
    tensors[f"{PARTS[2]}.lora_B.weight"] *= 2**-10
    source = write(Path("a.safetensors"), tensors)

    def doubled(up: Tensor) -> Tensor:
        return torch.cat([up[:24], 2 * up[24:]])

    corrupt(monkeypatch, "lora_up.weight", doubled)
    assert QKV in refuse(source, "networks.lora", "--arch", "flux1", code=10)


def test_a_small_bias_s_error_is_not_hidden_by_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {key: tensor.bfloat16() for key, tensor in slots("lora + bias", alpha=3.0).items()}
    tensors[f"{ATTENTION}.diff_b"] *= 2**-10
    corrupt(monkeypatch, "lora_B.bias", lambda bias: 2 * bias)
    refuse(write(Path("a.safetensors"), tensors), "diffusers", "--arch", "sd1", code=10)


@pytest.mark.parametrize("form", FORMS)
def test_verification_holds_for_every_form_in_another_dtype(form: str) -> None:
    chosen = {layer: form for layer in SD1_LAYERS if fits(form, layer)}
    source = write(Path("a.safetensors"), tensors_of("lycoris.kohya", chosen))
    report, _ = convert(source, "lycoris.kohya", "--arch", "sd1", "--dtype", "bf16", "--verify")
    assert report["verified"]
    assert 0 < report["largest_difference"] < ROUNDING * torch.finfo(torch.bfloat16).eps
    assert all(module["difference"] is not None for module in report["modules"])


@pytest.mark.parametrize("length", range(20))
def test_no_header_of_the_written_file_is_taken_for_a_pickle(length: int) -> None:
    """Its first bytes are the header's length, which can be those of a pickle: 640, 896 and so on."""
    tensors = slots("lora")
    source = write(Path("a.safetensors"), tensors, {"ss_output_name": "n" * (8 * length)})
    convert(source, "diffusers", "--arch", "sd1")


# --- streams, names, reports ---------------------------------------------------------------


def test_standard_input_and_output() -> None:
    tensors = slots("lora")
    result = run("convert", "-", "--to", "comfyui", "-o", "-", "--arch", "sd1", input=to_bytes(tensors))
    assert result.exit_code == 0, result.stderr
    Path("piped.safetensors").write_bytes(result.stdout_bytes)
    source = write(Path("a.safetensors"), tensors)
    _, out = convert(source, "comfyui", "--arch", "sd1")
    assert_equal_tensors(read(Path("piped.safetensors")), read(out))
    assert not litter()


@pytest.mark.parametrize(("to", "name"), [("diffusers", "style.diffusers.safetensors"), ("peft", "style.peft"),
                                          ("locon.locon_kohya", "style.locon.locon_kohya.safetensors")])  # fmt: skip
def test_the_output_has_a_name(to: str, name: str) -> None:
    Path("there").mkdir()
    source = write(Path("there/style.safetensors"), slots("lora"))
    result = succeed("convert", source, "--to", to, "--arch", "sd1")
    assert result.stdout == f"{name}\n"
    assert sorted(path.name for path in Path().iterdir()) == sorted([name, "there"])


def test_the_report_in_json() -> None:
    source = write(Path("a.safetensors"), {**slots("lora"), **slots("norm", (24, 1), NORM)})
    report, out = convert(source, "diffusers", "--arch", "sd1", "--drop")
    assert report.keys() == {
        "schema_version", "output", "to", "family", "modules", "dropped", "verified", "largest_difference", "nbytes",
        "warnings", "dry_run",
    }  # fmt: skip
    assert report["schema_version"] == 1
    assert (report["output"], report["to"], report["family"]) == (str(out), "diffusers", "SD 1.x")
    assert report["modules"] == [
        {"name": DOTTED, "sources": [ATTENTION], "type": "lora", "rank": 3, "change": "", "difference": 0.0}
    ]
    assert report["dropped"] == {NORM: "diffusers has no norm"}
    assert (report["verified"], report["largest_difference"], report["dry_run"]) == (True, 0.0, False)
    assert report["nbytes"] == out.stat().st_size


def test_an_error_in_json() -> None:
    source = write(Path("a.safetensors"), slots("norm", (24, 1), NORM))
    result = run("convert", source, "--to", "diffusers", "--arch", "sd1", "--json")
    error = json.loads(result.stderr)["error"]
    assert (result.exit_code, error["exit_code"], error["class"]) == (5, 5, "IncompatibleError")
    assert error["details"] == [f"{NORM}: diffusers has no norm"]


def test_a_dry_run_writes_nothing_and_says_the_same() -> None:
    source = write(Path("a.safetensors"), slots("lora"))
    for to in ("diffusers", "peft"):
        before = snapshot()
        planned = json.loads(succeed("convert", source, "--to", to, "--arch", "sd1", "-n", "--json").stdout)
        assert snapshot() == before
        assert planned["dry_run"]
        assert not planned["verified"]
        done, _ = convert(source, to, "--arch", "sd1", "--no-verify")
        different = {"output", "dry_run"}
        assert {k: v for k, v in planned.items() if k not in different} == {
            k: v for k, v in done.items() if k not in different
        }
    assert not succeed("convert", source, "--to", "diffusers", "--arch", "sd1", "-n").stdout


def test_every_module_is_reported_on_request() -> None:
    tensors = {**slots("lora", (12, 10), QKV), **slots("lora", (24, 10), ADAPTIVE)}
    source = write(Path("a.safetensors"), tensors)
    text = succeed("convert", source, "--to", "diffusers", "--arch", "flux1", "--modules").stderr
    for name in PARTS:
        assert f"{name}: lora, split, from {QKV}" in text
    assert f"transformer.norm_out.linear: lora, given its halves in the other order, from {ADAPTIVE}" in text
    text = succeed("convert", source, "--to", "diffusers", "--arch", "flux1", "--force").stderr
    assert QKV not in text
    assert not succeed("convert", source, "--to", "diffusers", "--arch", "flux1", "--force", "-q").stderr


def test_what_is_left_aside_is_said() -> None:
    """sd-scripts' DyLoRA saves a copy of the base layer, which no dialect holds."""
    tensors = {**slots("lora"), f"{ATTENTION}.org_module.weight": torch.ones(24, 10)}
    report, out = convert(write(Path("a.safetensors"), tensors), "comfyui", "--arch", "sd1")
    assert [warning for warning in report["warnings"] if "a copy of the base layer" in warning]
    assert not [key for key in read(out) if "org_module" in key]


def test_same_input_gives_the_same_bytes() -> None:
    source = write(Path("a.safetensors"), slots("loha"), {"b": "2", "a": "1"})
    one = convert(source, "networks.lora", "--arch", "sd1", "--algo", "lora")[1].read_bytes()
    assert convert(source, "networks.lora", "--arch", "sd1", "--algo", "lora")[1].read_bytes() == one


# --- what it is for, and what it cannot be -------------------------------------------------

#: Cross-attention reads the text encoder, whose width tells Stable Diffusion 1 from 2.
CROSS = ATTENTION.replace("attn1_to_q", "attn2_to_k")


@pytest.mark.parametrize(("width", "encoder"), [(768, "clip_l"), (1024, "clip_h")])
def test_the_width_tells_the_model(width: int, encoder: str) -> None:
    tensors = {**slots("lora", (12, width), CROSS), **slots("lora", (12, 10), TEXT)}
    report, out = convert(write(Path("a.safetensors"), tensors), "comfyui")
    assert f"text_encoders.{encoder}.transformer.text_model.encoder.layers.0.self_attn.q_proj.alpha" in read(
        out
    )
    there = out.rename("there.safetensors")
    again, _ = convert(there, "comfyui")
    assert again["family"] == report["family"]


@pytest.mark.parametrize("encoder", ["clip_l", "clip_h"])
def test_comfyui_s_name_of_the_text_encoder_tells_the_model(encoder: str) -> None:
    name = f"text_encoders.{encoder}.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {**slots("lora", (12, 10), COMFY), **slots("lora", (12, 10), name)}
    source = write(Path("a.safetensors"), tensors)
    assert_equal_tensors(read(convert(source, "comfyui")[1]), tensors)


def test_a_model_that_names_alone_do_not_tell() -> None:
    tensors = {**slots("lora"), **slots("lora", (12, 10), TEXT)}
    source = write(Path("a.safetensors"), tensors)
    message = refuse(source, "comfyui")
    assert "sd1 or sd2" in message
    assert "--arch" in message
    report, _ = convert(source, "diffusers")  # which has the same names for both
    assert report["family"] == "SD 1.x or SD 2.x"
    convert(source, "comfyui", "--arch", "sd2")


def test_a_module_that_can_be_two_layers() -> None:
    """Without a prefix, two text encoders have the same names."""
    name = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
    source = write(Path("a.safetensors"), peft_slots([name]))
    message = refuse(source, "networks.lora", "--arch", "sdxl")
    assert named_in(message) == {name}
    assert "can be" in message


def mixed() -> Tensors:
    return {**slots("lora"), **peft_slots([DOTTED.replace("to_q", "to_k")])}


def test_mixed_dialects_are_reported_and_read_on_request() -> None:
    source = write(Path("a.safetensors"), mixed())
    message = refuse(source, "comfyui", "--arch", "sd1")
    assert "mixes dialects" in message
    assert "kohya" in message
    assert "diffusers" in message
    assert "--from" in message
    _, out = convert(source, "comfyui", "--arch", "sd1", "--from", "networks.lora")
    assert {key.rpartition(".lora")[0] for key in read(out) if "lora_up" in key} == {
        COMFY, COMFY.replace("to_q", "to_k"),
    }  # fmt: skip


def test_onetrainer_s_text_encoders_are_no_mixture() -> None:
    name = "lora_transformer_transformer_blocks_0_attn_to_out_0"
    tensors = {
        **slots("lora", (12, 10), name),
        **slots("lora", (12, 10), TEXT.replace("lora_te_", "lora_te1_")),
    }
    convert(write(Path("a.safetensors"), tensors), "networks.lora", "--arch", "flux1")
    stray = {**tensors, **slots("lora", (12, 10), QKV)}
    refuse(write(Path("b.safetensors"), stray), "networks.lora", "--arch", "flux1")


@pytest.mark.parametrize("options", [(), ("--drop",)])
def test_one_layer_in_two_dialects_is_refused(options: tuple[str, ...]) -> None:
    tensors = {**slots("lora"), **peft_slots([DOTTED])}
    source = write(Path("a.safetensors"), tensors)
    if options:  # the second one is what cannot be written
        report, _ = convert(source, "comfyui", "--arch", "sd1", "--from", "networks.lora", *options)
        assert len(report["dropped"]) == 1
        assert len(report["modules"]) == 1
        return
    refuse(source, "comfyui", "--arch", "sd1")
    message = refuse(source, "comfyui", "--arch", "sd1", "--from", "networks.lora")
    assert "is the same layer as" in message


@pytest.mark.parametrize("options", [(), ("--drop",)])
@pytest.mark.parametrize("to", ["networks.lora", "diffusers"])
def test_a_fused_layer_beside_its_parts_is_refused(to: str, options: tuple[str, ...]) -> None:
    part = "lora_unet_transformer_blocks_0_attn_to_q"
    tensors = {**slots("lora", (24, 10), QKV), **slots("lora", (8, 10), part)}
    source = write(Path("a.safetensors"), tensors)
    assert named_in(refuse(source, to, "--arch", "flux1", *options)) == {QKV, part}


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ({"something.else": torch.ones(3)}, "something.else"),
        ({f"{ATTENTION.replace('to_q', 'to_k')}.alpha": torch.tensor(1.0)},
         f"{ATTENTION.replace('to_q', 'to_k')}.alpha"),
    ],
    ids=["unknown", "orphan"],
)  # fmt: skip
def test_tensors_of_no_module_are_named(extra: Tensors, key: str) -> None:
    source = write(Path("a.safetensors"), {**slots("lora"), **extra})
    assert named_in(refuse(source, "comfyui", "--arch", "sd1")) == {key}
    report, out = convert(source, "comfyui", "--arch", "sd1", "--drop")
    assert report["dropped"].keys() == {key}
    assert all(name.startswith(COMFY) for name in read(out))


def test_modules_of_another_model_are_named() -> None:
    strangers = {**slots("lora", (12, 10), "lora_unet_nothing_1"), **slots("lora", (12, 10), QKV)}
    source = write(Path("a.safetensors"), {**slots("lora"), **strangers})
    message = refuse(source, "comfyui", "--arch", "sd1")
    assert named_in(message) == {"lora_unet_nothing_1", QKV}
    report, _ = convert(source, "comfyui", "--arch", "sd1", "--drop")
    assert report["dropped"].keys() == {"lora_unet_nothing_1", QKV}


def test_an_unknown_model_is_reported() -> None:
    source = write(Path("a.safetensors"), slots("lora", name="lora_unet_nothing_1"))
    message = refuse(source, "comfyui")
    assert "which model" in message
    assert "--arch" in message
    refuse(source, "comfyui", "--arch", "sd1", "--drop")  # nothing is left


@pytest.mark.parametrize("slot", ["dora_scale", "bias_size"])
def test_tensors_that_do_not_fit_their_module(slot: str) -> None:
    form = "lora + dora (out)" if slot == "dora_scale" else "lora + sparse"
    tensors = slots(form, (12, 10), QKV)
    wrong = {"dora_scale": torch.ones(9, 1), "bias_size": torch.tensor([9, 10]).short()}
    source = write(Path("a.safetensors"), {**tensors, f"{QKV}.{slot}": wrong[slot]})
    message = refuse(source, "lycoris", "--arch", "flux1")
    assert slot in message
    assert named_in(message) == {QKV}
    refuse(source, "networks.lora", "--arch", "flux1", "--algo", "lora", "--rank", 2)


def test_rows_that_do_not_split_are_named() -> None:
    source = write(Path("a.safetensors"), slots("lora", (13, 10), QKV))
    assert named_in(refuse(source, "diffusers", "--arch", "flux1")) == {QKV}
    tensors = {**peft_slots(PARTS[:2], 12), **peft_slots(PARTS[2:], 8)}
    source = write(Path("b.safetensors"), tensors)
    assert named_in(refuse(source, "networks.lora", "--arch", "flux1")) == set(PARTS)


@pytest.mark.parametrize(
    "options",
    [
        ("--rank", "0", "--algo", "lora"),
        ("--rank", "4"),
        ("--rank", "4", "--algo", "full"),
        ("--error", "1", "--algo", "lora"),
        ("--error", "-0.1", "--algo", "lora"),
        ("--error", "nan", "--algo", "lora"),
        ("--error", "0.1"),
        ("--base", "a.safetensors"),
        ("--arch", "sd9"),
        ("--from", "unheard-of"),
        ("--to", "unheard-of"),
        ("--algo", "loha"),
        ("-o", "out.ckpt"),
        ("--base", "absent.safetensors", "--algo", "full"),
    ],
    ids=" ".join,
)
def test_options_that_mean_nothing(options: tuple[str, ...]) -> None:
    source = write(Path("a.safetensors"), slots("lora"))
    refuse(source, "comfyui", *options, code=2)


def test_inputs_that_are_none() -> None:
    assert refuse(Path("absent.safetensors"), "comfyui", code=2)
    Path("torn.safetensors").write_bytes(to_bytes(slots("lora"))[:-20])
    refuse(Path("torn.safetensors"), "comfyui", code=3)
    torch.save(slots("lora"), "a.pt")
    refuse(Path("a.pt"), "comfyui", "--arch", "sd1", code=4)
    convert(Path("a.pt"), "comfyui", "--arch", "sd1", "--allow-pickle")
    refuse(DATA / "base.safetensors", "comfyui")
    cut = {**slots("lora")}
    del cut[f"{ATTENTION}.lora_down.weight"]
    refuse(write(Path("half.safetensors"), cut), "comfyui", "--arch", "sd1", code=3)


def test_standard_input_has_no_name() -> None:
    data = to_bytes(slots("lora"))
    assert run("convert", "-", "--to", "comfyui", "--arch", "sd1", input=data).exit_code == 2


def test_outputs_that_may_not_be_written() -> None:
    source = write(Path("a.safetensors"), slots("lora"))
    write(Path("old.safetensors"), slots("loha"))
    before = snapshot()
    for to, out, *force in (
        ("comfyui", "old.safetensors"),
        ("comfyui", "a.safetensors"),
        ("comfyui", "a.safetensors", "--force"),
        ("comfyui", "nowhere/out.safetensors"),
        ("peft", "old.safetensors", "--force"),
        ("peft", "-"),
        ("peft", ".", "--force"),
    ):
        result = run("convert", source, "--to", to, "-o", out, "--arch", "sd1", *force)
        assert result.exit_code == 7, (to, out, result.stderr)
        assert snapshot() == before
    convert(source, "peft", "--arch", "sd1")
    assert run("convert", "out", "--to", "peft", "-o", "out", "--arch", "sd1", "--force").exit_code == 7


def test_the_sample_files_convert() -> None:
    """One of each kind a user may have, without any option."""
    for name in ("lora.safetensors", "loha.safetensors", "peft_lora"):
        result = run("convert", DATA / name, "--to", "lycoris.kohya", "-o", f"{Path(name).stem}.safetensors")
        assert result.exit_code == 0, result.stderr
    assert Counter(key.rpartition(".")[2] for key in read(Path("loha.safetensors")))["hada_w1_a"] > 0
