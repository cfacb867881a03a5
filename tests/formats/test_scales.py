"""Scales outside the tensors, against what PEFT itself computes."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lycotool.errors import BadInputError, IncompatibleError
from lycotool.formats.scales import PeftScales, scales_from_metadata


def scale(module: str = "x", **config: object) -> float:
    return PeftScales(config, "FILE").scale(module)


def test_alpha_over_r() -> None:
    assert scale(r=16, lora_alpha=4) == 0.25


def test_rslora_divides_by_the_root() -> None:
    assert scale(r=16, lora_alpha=4, use_rslora=True) == 1.0


def test_alpha_defaults_to_the_rank() -> None:
    assert scale(r=4) == 1.0


def test_loha_and_lokr_call_it_alpha() -> None:
    assert scale(peft_type="LOHA", r=8, alpha=2) == 0.25
    assert scale(peft_type="LOKR", r=8, alpha=2) == 0.25


@pytest.mark.parametrize(
    ("module", "expected"),
    [("a.to_q", 8 / 4), ("to_q", 8 / 4), ("a.xto_q", 8 / 16), ("a.to_q.b", 8 / 16), ("mid.to_k", 2 / 16)],
)
def test_patterns_match_whole_names_from_the_end(module: str, expected: float) -> None:
    config = {"r": 16, "lora_alpha": 8, "rank_pattern": {"to_q": 4}, "alpha_pattern": {"mid.to_.": 2}}

    assert scale(module, **config) == expected


class Model(nn.Module):
    """Layers whose names the patterns below tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(8, 8) for n in ("to_q", "to_k")}) for _ in range(2)
        )
        self.mid = nn.ModuleDict({n: nn.Linear(8, 8) for n in ("to_q", "proj")})


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    ("rank_pattern", "alpha_pattern"),
    [
        ({}, {}),
        ({"to_q": 2}, {"to_k": 3}),
        ({"down.0.to_q": 2, "to_q": 6}, {"mid.to_q": 1, "proj": 16}),
        ({"^mid.to_q": 2}, {r"down\.\d\.to_.": 5}),
    ],
)
def test_every_scale_is_pefts(
    tmp_path: Path, use_rslora: bool, rank_pattern: dict[str, int], alpha_pattern: dict[str, int]
) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["to_q", "to_k", "proj"],
        use_rslora=use_rslora,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )
    model = get_peft_model(Model(), config)
    model.save_pretrained(tmp_path)

    scales = PeftScales(json.loads((tmp_path / "adapter_config.json").read_text()), str(tmp_path))

    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == 6
    for name, layer in layers.items():
        # One division, and with rslora one root: at most one rounding apart.
        assert math.isclose(
            scales.scale(name), layer.scaling["default"], rel_tol=torch.finfo(torch.float64).eps
        )


@pytest.mark.parametrize("kind", ["IA3", "OFT", "BOFT", "VERA", "ADALORA", "PROMPT_TUNING"])
def test_other_kinds_of_adapters_are_refused(kind: str) -> None:
    with pytest.raises(IncompatibleError, match=f"type {kind} are not supported") as caught:
        PeftScales({"peft_type": kind}, "FILE")
    assert caught.value.path == "FILE"


def test_transposed_adapters_are_refused() -> None:
    with pytest.raises(IncompatibleError, match="fan_in_fan_out"):
        PeftScales({"peft_type": "LORA", "fan_in_fan_out": True}, "FILE")


@pytest.mark.parametrize(
    "config",
    [
        {"r": "four"},
        {"r": None},
        {"r": True},
        {"r": 4, "lora_alpha": []},
        {"r": 4, "rank_pattern": {"x": "2"}},
        {"r": 4, "alpha_pattern": {"x": {}}},
        {"r": float("nan")},
        {"r": 4, "lora_alpha": float("inf")},
    ],
    ids=json.dumps,
)
def test_numbers_that_are_none_are_bad_input(config: dict[str, object]) -> None:
    with pytest.raises(BadInputError, match="expected a number"):
        PeftScales(config, "FILE").scale("x")


@pytest.mark.parametrize("config", [{"r": 0}, {"r": -4}, {"r": 4, "rank_pattern": {"x": 0}}], ids=json.dumps)
def test_a_rank_is_positive(config: dict[str, object]) -> None:
    with pytest.raises(BadInputError, match=r"r is|x is"):
        PeftScales(config, "FILE").scale("x")


def test_a_pattern_that_is_no_expression_is_bad_input() -> None:
    with pytest.raises(BadInputError, match=r"\(\("):
        PeftScales({"r": 4, "rank_pattern": {"((": 2}}, "FILE").scale("x")


@pytest.mark.parametrize(
    ("init", "modifies"),
    [
        (True, False), ("gaussian", False), ("eva", False), ("pissa", True), ("pissa_niter_16", True),
        ("olora", True), ("PiSSA", True),
    ],
)  # fmt: skip
def test_initialisations_that_change_the_base(init: object, modifies: bool) -> None:
    assert PeftScales({"r": 4, "init_lora_weights": init}, "FILE").modifies_base == modifies


# --- diffusers' header metadata ------------------------------------------------------------


def test_without_the_entry_there_are_no_scales() -> None:
    assert scales_from_metadata({"ss_network_dim": "4"}, "FILE") == {}


def test_configurations_are_kept_by_component() -> None:
    document = {
        "unet.r": 8, "unet.lora_alpha": 4, "unet.rank_pattern": {"to_q": 2},
        "text_encoder.r": 4, "text_encoder.lora_alpha": 4,
    }  # fmt: skip

    found = scales_from_metadata({"lora_adapter_metadata": json.dumps(document)}, "FILE")

    assert found.keys() == {"unet.", "text_encoder."}
    assert found["unet."].scale("a.to_q") == 2.0
    assert found["unet."].scale("a.to_k") == 0.5
    assert found["text_encoder."].scale("a.q_proj") == 1.0


@pytest.mark.parametrize(("text", "words"), [("{", "JSON"), ("[]", "not an object"), ("5", "not an object")])
def test_malformed_metadata_is_bad_input(text: str, words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        scales_from_metadata({"lora_adapter_metadata": text}, "FILE")
