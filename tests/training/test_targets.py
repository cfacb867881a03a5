"""What presets select: counts on the published models, names, and a user's file against LyCORIS."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lycoris.config
import lycoris.kohya
import pytest
import torch
from helpers import GOLDEN
from makers.ldm_names import unet_to_ldm
from safetensors import safe_open
from training.published_bases import published_base

from lycotool.errors import BadInputError, UsageError
from lycotool.models.naming import flat
from lycotool.training.bases.configs import FamilyName
from lycotool.training.presets import PRESETS, Preset, read_preset
from lycotool.training.targets import TableRow, Target, find_targets, module_table

#: Linear, 1x1 and 3x3 layers of the UNet, its norms, and layers of the text encoders. The first
#: three and the last are what LyCORIS 3.4 selects, or was meant to; norms are for `train_norm`.
COUNTS: Mapping[tuple[str, FamilyName], tuple[int, int, int, int, int]] = {
    ("full", "sd1"): (184, 46, 52, 108, 72),
    ("full", "sd2"): (216, 14, 52, 108, 138),
    ("full", "sdxl"): (741, 11, 40, 255, 264),
    ("full-lin", "sd1"): (184, 46, 0, 108, 72),
    ("full-lin", "sd2"): (216, 14, 0, 108, 138),
    ("full-lin", "sdxl"): (741, 11, 0, 255, 264),
    ("attn-mlp", "sd1"): (160, 32, 0, 64, 72),
    ("attn-mlp", "sd2"): (192, 0, 0, 64, 138),
    ("attn-mlp", "sdxl"): (722, 0, 0, 221, 264),
    ("attn-only", "sd1"): (128, 0, 0, 0, 48),
    ("attn-only", "sd2"): (128, 0, 0, 0, 92),
    ("attn-only", "sdxl"): (560, 0, 0, 0, 176),
    ("unet-only", "sd1"): (184, 46, 52, 108, 0),
    ("unet-only", "sd2"): (216, 14, 52, 108, 0),
    ("unet-only", "sdxl"): (741, 11, 40, 255, 0),
    ("unet-transformer-only", "sd1"): (160, 32, 0, 64, 0),
    ("unet-transformer-only", "sd2"): (192, 0, 0, 64, 0),
    ("unet-transformer-only", "sdxl"): (722, 0, 0, 221, 0),
    ("unet-convblock-only", "sd1"): (22, 14, 52, 44, 0),
    ("unet-convblock-only", "sd2"): (22, 14, 52, 44, 0),
    ("unet-convblock-only", "sdxl"): (17, 11, 40, 34, 0),
    ("ia3", "sd1"): (80, 0, 0, 0, 36),
    ("ia3", "sd2"): (80, 0, 0, 0, 69),
    ("ia3", "sdxl"): (350, 0, 0, 0, 132),
}
#: UNet and text encoder in the field's tables: 282 + 72 and so on.
TOTALS = {
    ("full", "sd1"): (282, 72), ("full", "sd2"): (282, 138), ("full", "sdxl"): (792, 264),
    ("attn-only", "sd1"): (128, 48), ("attn-only", "sdxl"): (560, 176), ("ia3", "sdxl"): (350, 132),
}  # fmt: skip


def _size(target: Target) -> str:
    if target.kind != "conv":
        return target.kind
    kernel = target.module.kernel_size
    assert isinstance(kernel, tuple)
    return f"conv{kernel[0]}"


@pytest.mark.parametrize(("preset", "family"), COUNTS)
@pytest.mark.parametrize("train_norm", [False, True])
def test_counts(preset: str, family: FamilyName, train_norm: bool) -> None:
    targets = find_targets(published_base(family), PRESETS[preset], train_norm=train_norm)
    unet = Counter(_size(target) for target in targets if target.component == "unet")
    text = Counter(_size(target) for target in targets if target.component != "unet")
    linear, pointwise, conv, norms, encoders = COUNTS[preset, family]
    assert unet == Counter(linear=linear, conv1=pointwise, conv3=conv, norm=norms if train_norm else 0)
    assert text == Counter(linear=encoders)
    if not train_norm and (preset, family) in TOTALS:
        assert (unet.total(), text.total()) == TOTALS[preset, family]


def test_every_preset_is_counted() -> None:
    assert {preset for preset, _ in COUNTS} == set(PRESETS)


@pytest.mark.parametrize(
    ("family", "unet", "text"), [("sd1", 859.5, 85.0), ("sdxl", 2562, 714.5), ("sd2", 865.9, 289.6)]
)
def test_parameters_of_full(family: FamilyName, unet: float, text: float) -> None:
    """What LyCORIS trains with algo=full and train_norm, in millions."""
    targets = find_targets(published_base(family), PRESETS["full"], train_norm=True)
    sums: Counter[bool] = Counter()
    for target in targets:
        sums[target.component == "unet"] += sum(value.numel() for value in target.module.parameters())
    assert sums[True] / 1e6 == pytest.approx(unet, abs=0.5 if unet > 1000 else 0.05)
    assert sums[False] / 1e6 == pytest.approx(text, abs=0.05)


def _write(folder: Path, text: str) -> Preset:
    path = folder / "preset.toml"
    path.write_text(text)
    return read_preset(str(path))


def test_published_table_without_resnets(tmp_path: Path) -> None:
    """The known line {'FullModule': 274, 'NormModule': 64}."""
    preset = _write(tmp_path, 'unet_target_module = ["Transformer2DModel", "Downsample2D", "Upsample2D"]')
    targets = find_targets(published_base("sd1"), preset, train_norm=True)
    assert Counter(target.kind == "norm" for target in targets) == {False: 274, True: 64}


def test_switches() -> None:
    base, full = published_base("sd1"), PRESETS["full"]
    everything = find_targets(base, full)
    unet = find_targets(base, full, train_te=False)
    text = find_targets(base, full, train_unet=False)
    assert text + unet == everything
    assert {target.component for target in unet} == {"unet"}
    small = find_targets(base, full, conv=False)
    assert small == find_targets(base, PRESETS["full-lin"])
    with pytest.raises(UsageError, match="unet-only selects no layer in the text encoders"):
        find_targets(base, PRESETS["unet-only"], train_unet=False)
    with pytest.raises(UsageError, match="selects no layer in nothing"):
        find_targets(base, full, train_unet=False, train_te=False)


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_names_in_files(family: FamilyName) -> None:
    """SD 1 and 2 after diffusers' paths; SDXL after SGM's, as an independent table has them."""
    base = published_base(family)
    targets = find_targets(base, PRESETS["full"], train_norm=True)
    assert len({target.name for target in targets}) == len(targets)
    natives = {path: name.removesuffix(".weight") for name, path in _native_paths(base.unet).items()}
    plain = find_targets(base, PRESETS["full"], train_norm=True, names="diffusers")
    for target, other in zip(targets, plain, strict=True):
        root = base.unet if target.component == "unet" else base.text_encoders[int(target.component[2]) - 1]
        assert root.get_submodule(target.path) is target.module
        if target.component == "unet":
            own = natives[target.path] if family == "sdxl" else target.path
            assert target.name == f"lora_unet_{flat(own)}"
            assert other.name == f"lora_unet_{flat(target.path)}"
        else:
            prefix = "lora_te_" if family != "sdxl" else f"lora_{target.component}_"
            inner = target.path.removeprefix("text_model.")
            assert other.name == target.name == f"{prefix}text_model_{flat(inner)}"


def _native_paths(unet: torch.nn.Module) -> dict[str, str]:
    names = {name: name for name in unet.state_dict() if name.endswith(".weight")}
    return {native: path.removesuffix(".weight") for native, path in unet_to_ldm(names).items()}  # type: ignore[arg-type]


def test_known_names() -> None:
    """A few names as published files have them."""
    sdxl = {target.name for target in find_targets(published_base("sdxl"), PRESETS["full"])}
    assert {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k",
        "lora_unet_middle_block_1_proj_in",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_input_blocks_0_0",
        "lora_unet_time_embed_0",
        "lora_unet_out_2",
        "lora_te1_text_model_encoder_layers_11_mlp_fc1",
        "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
    } <= sdxl
    sd1 = {target.name for target in find_targets(published_base("sd1"), PRESETS["full"])}
    assert {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_mid_block_resnets_1_time_emb_proj",
        "lora_unet_time_embedding_linear_1",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    } <= sd1


@pytest.mark.parametrize(
    ("file", "family", "names"),
    [
        ("sd1_kohya_lora", "sd1", "kohya"),
        ("sd1_lycoris_tucker", "sd1", "kohya"),
        ("sdxl_kohya_sgm", "sdxl", "kohya"),
        ("sdxl_kohya_diffusers_names", "sdxl", "diffusers"),
    ],
)
def test_names_in_golden_files(file: str, family: FamilyName, names: Any) -> None:
    with safe_open(GOLDEN / "convert" / f"{file}.safetensors", "pt") as golden:
        stored = {key.split(".")[0] for key in golden.keys()}  # noqa: SIM118 - not a mapping
    targets = find_targets(published_base(family), PRESETS["full"], names=names)
    assert len(stored) >= 16
    assert stored <= {target.name for target in targets}


# --- a user's file, also read by LyCORIS -----------------------------------------------------

#: LyCORIS' own example, without what it lists for other architectures but one.
EXAMPLE = """
enable_conv = true
unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D", "HunYuanDiTBlock"]
unet_target_name = ["conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"]
text_encoder_target_module = ["CLIPAttention", "CLIPSdpaAttention", "CLIPMLP", "MT5Block"]
text_encoder_target_name = []

[module_algo_map.Attention]
algo = "lokr"
dim = 10000000000000
factor = 64

[module_algo_map.FeedForward]
algo = "lokr"
dim = 100000000000
factor = 12

[module_algo_map.ResnetBlock2D]
algo = "lora"
dim = 4
alpha = 1
use_tucker = true

[module_algo_map.CLIPAttention]
algo = "lora"
dim = 8
alpha = 1

[module_algo_map.CLIPMLP]
algo = "lokr"
dim = 100000000000
"""

FILES = {
    "example": EXAMPLE,
    "names by regular expression": """
enable_conv = false
unet_target_module = []
unet_target_name = ["(down|up)_blocks.*attn2.to_[kv]", "mid_block.*proj"]
text_encoder_target_module = []
text_encoder_target_name = [".*fc1$"]
[name_algo_map."mid_block.*"]
algo = "loha"
dim = 2
""",
    "names by shell pattern": """
use_fnmatch = true
unet_target_module = ["Transformer2DModel"]
unet_target_name = ["*.resnets.0.conv?", "conv_out"]
text_encoder_target_module = ["CLIPMLP"]
text_encoder_target_name = []
[name_algo_map."*.conv2"]
algo = "lokr"
""",
    "exclusion": r"""
unet_target_module = ["Transformer2DModel", "ResnetBlock2D"]
unet_target_name = []
text_encoder_target_module = ["CLIPAttention"]
text_encoder_target_name = []
exclude_name = ["down_blocks.0", ".*to_out", ".*layers.1\\."]
""",
    "exclusion of a block by its path": """
use_fnmatch = true
unet_target_module = ["Transformer2DModel", "ResnetBlock2D"]
unet_target_name = []
text_encoder_target_module = []
text_encoder_target_name = []
exclude_name = ["mid_block.attentions.0", "*.to_v"]
""",
    "the innermost class counts": """
unet_target_module = ["Transformer2DModel"]
unet_target_name = []
text_encoder_target_module = []
text_encoder_target_name = []
[module_algo_map.Transformer2DModel]
algo = "loha"
[module_algo_map.BasicTransformerBlock]
dim = 3
[module_algo_map.Attention]
algo = "lokr"
""",
    "a rank of its own takes convolutions all the same": """
enable_conv = false
unet_target_module = ["ResnetBlock2D", "Downsample2D"]
unet_target_name = []
text_encoder_target_module = []
text_encoder_target_name = []
[module_algo_map.Downsample2D]
dim = 2
""",
}
ALGOS = {"LoConModule": "lora", "LohaModule": "loha", "LokrModule": "lokr"}


@pytest.fixture
def network_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    """LyCORIS keeps presets in class attributes, where they would stay for other tests."""
    kind = lycoris.kohya.LycorisNetworkKohya
    for name in dir(kind):
        if name.isupper():
            monkeypatch.setattr(kind, name, getattr(kind, name))
    return kind


@pytest.mark.parametrize("name", FILES)
def test_files_as_lycoris_reads_them(name: str, tmp_path: Path, network_class: Any) -> None:
    from makers import bases

    from lycotool.io.toml import read_toml
    from lycotool.training.bases import load_base

    made = bases.micro_base("sd1")
    base = load_base(str(bases.write_file(made, tmp_path / "base.safetensors")))
    preset = _write(tmp_path, FILES[name])
    network_class.apply_preset(read_toml(tmp_path / "preset.toml"))
    network = network_class(
        made.text_encoders[0], made.unet, lora_dim=4, conv_lora_dim=4, warn_on_unmatched=False
    )
    theirs = {
        # It takes the names of text encoders from the library, where the level is not there any more.
        lora.lora_name.replace("lora_te_text_model_", "lora_te_"): ALGOS[type(lora).__name__]
        for lora in network.unet_loras + network.text_encoder_loras
    }
    ours = {
        target.name.replace("lora_te_text_model_", "lora_te_"): target.overrides.get("algo", "lora")
        for target in find_targets(base, preset)
    }
    assert len(ours) > 1
    assert ours == theirs


def _toml(preset: Mapping[str, Any]) -> str:
    """JSON's lists, texts and booleans are TOML's."""
    return "\n".join(
        f"{key} = {json.dumps(value)}" for key, value in preset.items() if key != "name_algo_map"
    )


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "ia3"])
def test_presets_of_lycoris_as_files(name: str, tmp_path: Path) -> None:
    """As LyCORIS 4.1.3 lists them, with classes of every architecture, they select what is meant.

    It lists TimestepEmbedding for one of the others, and stumbles over the two layers that
    are then in both of its lists; where they are in one, there are these two more.
    """
    preset = _write(tmp_path, _toml(lycoris.config.PRESET[name]))
    base = published_base("sd1")
    ours = {target.name for target in find_targets(base, PRESETS[name])}
    theirs = {target.name for target in find_targets(base, preset)}
    time = {f"lora_unet_time_embedding_linear_{number}" for number in (1, 2)}
    assert theirs - time == ours - time
    assert time <= theirs or name in ("attn-only", "unet-convblock-only")


def test_ia3_of_lycoris_as_a_file(tmp_path: Path) -> None:
    """Its patterns fit no path from the start, so it selects nothing there without a word."""
    preset = _write(tmp_path, _toml(lycoris.config.PRESET["ia3"]))
    with pytest.raises(BadInputError, match="the pattern 'to_k' fits no layer"):
        find_targets(published_base("sd1"), preset)


def test_values_of_maps(tmp_path: Path) -> None:
    base = published_base("sd1")
    text = EXAMPLE.replace("[module_algo_map.Attention]", "[module_algo_map.CrossAttention]")
    text += '[name_algo_map."down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]\ndim = 5\n'
    text += '[name_algo_map.".*attn1.to_q"]\ndim = 6\n'
    targets = {target.path: target for target in find_targets(base, _write(tmp_path, text), train_norm=True)}
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    lokr = {"algo": "lokr", "dim": 10000000000000, "factor": 64}
    assert targets[f"{block}.attn1.to_k"].overrides == lokr
    assert targets[f"{block}.attn1.to_q"].overrides == {"dim": 5}
    assert targets["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"].overrides == {"dim": 6}
    assert targets["down_blocks.0.attentions.0.proj_in"].overrides == {}
    norm = targets["down_blocks.0.resnets.0.norm1"]
    assert (norm.kind, norm.overrides) == ("norm", {})
    assert targets["down_blocks.0.resnets.0.conv1"].overrides["use_tucker"] is True


def test_ia3_scales_inputs_of_the_second_layers() -> None:
    for target in find_targets(published_base("sdxl"), PRESETS["ia3"]):
        is_second = target.path.endswith((".ff.net.2", ".mlp.fc2"))
        assert target.overrides == ({"train_on_input": True} if is_second else {})


def test_sdxl_patterns_in_both_namings(tmp_path: Path) -> None:
    base = published_base("sdxl")
    found = [
        find_targets(
            base,
            _write(tmp_path, f'unet_target_module = []\nunet_target_name = ["{pattern}"]'),
            train_te=False,
        )
        for pattern in ("input_blocks.4.1.*attn2", "down_blocks.1.attentions.0.*attn2")
    ]
    assert len(found[0]) == 8
    assert found[0] == found[1]


def test_text_encoder_patterns_with_and_without_the_outer_level(tmp_path: Path) -> None:
    base = published_base("sdxl")
    found = [
        find_targets(
            base,
            _write(
                tmp_path,
                f'text_encoder_target_module = []\ntext_encoder_target_name = ["{prefix}encoder.layers.3.mlp"]',
            ),
            train_unet=False,
        )
        for prefix in ("text_model.", "")
    ]
    assert [target.component for target in found[0]] == ["te1", "te1", "te2", "te2"]
    assert found[0] == found[1]


def test_what_a_file_leaves_out_is_as_in_full(tmp_path: Path) -> None:
    base = published_base("sd1")
    assert find_targets(base, _write(tmp_path, "")) == find_targets(base, PRESETS["full"])
    assert find_targets(base, _write(tmp_path, "use_fnmatch = true")) == find_targets(base, PRESETS["full"])
    small = find_targets(base, _write(tmp_path, "enable_conv = false"))
    assert not any(_size(target) == "conv3" for target in small)


def test_targets_of_every_network(tmp_path: Path) -> None:
    """`target_module` and `target_name` stand for UNet and text encoders alike."""
    preset = _write(tmp_path, 'target_module = ["CLIPMLP", "FeedForward"]\ntarget_name = ["conv_in"]')
    targets = find_targets(published_base("sd1"), preset)
    assert Counter(target.component for target in targets) == {"te1": 24, "unet": 33}


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('unet_target_modul = ["Attention"]', "unet_target_modul: no such key", "unet_target_module"),
        ("xyz = 1", "xyz: no such key", "known keys"),
        ('lora_prefix = "lora_x"', "names of an adapter's modules are fixed", "take it out"),
        ('enable_conv = "no"', "is 'no', expected true or false", ""),
        ("unet_target_module = [3]", "expected a list of texts", ""),
        ('unet_target_name = "conv_in"', "expected a list of texts", ""),
        ('unet_target_name = ["*.to_k"]', "is no regular expression", "use_fnmatch"),
        ('exclude_name = ["(a"]', "is no regular expression", "use_fnmatch"),
        ("[name_algo_map]\nconv_in = 3", "is no table of tables", "[name_algo_map.NAME]"),
        ("[module_algo_map.Attention]\n[module_algo_map.CrossAttention]", "are one class", ""),
        ('target_module = ["A"]\nunet_target_module = ["B"]', "stands beside unet_target_module", ""),
        ("a = ", "is no TOML", ""),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str, message: str, hint: str) -> None:
    with pytest.raises(BadInputError) as caught:
        _write(tmp_path, text)
    assert message in caught.value.headline
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            'unet_target_module = ["Atention"]',
            "no module of this model is a Atention",
            "did you mean 'Attention'?",
        ),
        ('unet_target_module = ["CLIPMLP"]', "no layer in a CLIPMLP is selected", ""),
        ('unet_target_module = ["SiLU"]', "no layer in a SiLU is selected", ""),
        ('unet_target_name = ["to_k"]', "the pattern 'to_k' fits no layer", "did you mean '.*to_k'?"),
        (
            'unet_target_name = ["conv_inn"]',
            "the pattern 'conv_inn' fits no layer",
            "did you mean 'conv_in'?",
        ),
        ('unet_target_name = ["conv_norm_out"]', "fits no layer", "train_norm"),
        ('text_encoder_target_name = [".*token_embedding"]', "fits no layer", ""),
        ('exclude_name = ["nothing"]', "exclude_name: the pattern 'nothing'", ""),
        ("[module_algo_map.Attenton]\ndim = 1", "module_algo_map: no module", "did you mean 'Attention'?"),
        ("[module_algo_map.Timesteps]\ndim = 1", "no layer in a Timesteps is selected", ""),
        ('[name_algo_map."conv_norm"]\ndim = 1', "name_algo_map: the pattern", "nothing selects"),
        (
            'use_fnmatch = true\nunet_target_name = ["to_k"]',
            "the pattern 'to_k' fits no layer",
            "did you mean '*to_k'?",
        ),
    ],
)
def test_what_selects_nothing_is_an_error(tmp_path: Path, text: str, message: str, hint: str) -> None:
    preset = _write(tmp_path, text)
    with pytest.raises(BadInputError) as caught:
        find_targets(published_base("sd1"), preset)
    assert message in caught.value.headline
    assert hint in (caught.value.hint or "")


def test_a_file_is_checked_whole_whichever_part_is_trained(tmp_path: Path) -> None:
    preset = _write(tmp_path, EXAMPLE)
    assert find_targets(published_base("sd1"), preset, train_te=False)
    assert find_targets(published_base("sd1"), preset, train_unet=False)


def test_zero_layers(tmp_path: Path) -> None:
    preset = _write(tmp_path, 'unet_target_module = ["FinalLayer"]\nunet_target_name = []')
    with pytest.raises(UsageError, match="selects no layer in the UNet"):
        find_targets(published_base("sd1"), preset, train_te=False)


def test_names_of_presets() -> None:
    assert read_preset("attn-mlp") is PRESETS["attn-mlp"]
    with pytest.raises(UsageError) as caught:
        read_preset("attn-mpl")
    assert caught.value.hint == "did you mean 'attn-mlp'?"
    with pytest.raises(UsageError, match="no such file"):
        read_preset("missing.toml")


def test_module_table() -> None:
    rows = module_table([("unet", "lora", 10), ("te1", "lora", 1), ("unet", "lora", 5), ("unet", "norm", 2)])
    assert rows == (
        TableRow("te1", "lora", 1, 1),
        TableRow("unet", "lora", 2, 15),
        TableRow("unet", "norm", 1, 2),
    )
