"""PEFT adapter folders: `bake` gives the plain model the outputs of the PEFT model.

Not tested, because PEFT itself is inconsistent there: LoKr on Conv1d with a whole second
factor (it multiplies a matrix by a 3-D tensor with `torch.kron`, which aligns the wrong
axes), convolutions in groups (PEFT cannot merge them either).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from makers.architectures import random_values
from peft import KasaConfig, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lycotool.errors import IncompatibleError
from lycotool.ops._adapter import AdapterInput
from lycotool.ops.bake import BakeOptions
from lycotool.ops.bake import bake as run_bake
from oracles.support import assert_near, bake, effective, randomise, randomise_base

# Weights, in roundings of the largest element: sums of at most 64 products on both sides,
# as in test_lycoris.py.
WEIGHT = 8
# Outputs, in roundings of the largest: PEFT adds the outputs of base and adapter where the
# baked layer has one sum, of up to 216 terms, and later layers pass the difference on.
# Measured: at most 25.
OUTPUT = 128


class Network(nn.Module):
    """Every kind of layer PEFT adapts, with names that need care.

    ``conv1`` and ``block.conv1`` share a suffix, as ``fc`` and ``block.fc`` do: PEFT's
    patterns match ends of names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 24, 3, padding=1)
        self.block = nn.Sequential()
        self.block.add_module("conv1", nn.Conv2d(24, 24, 3, stride=2, padding=1, bias=False))
        self.block.add_module("shortcut", nn.Conv2d(24, 32, 1))
        self.block.add_module("flatten", nn.Flatten(2))
        self.block.add_module("conv1d", nn.Conv1d(32, 24, 3, padding=1))
        self.block.add_module("fc", nn.Linear(16, 24))
        self.norm = nn.LayerNorm(24)
        self.fc = nn.Linear(24, 64)
        self.head = nn.Linear(64, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.block(torch.tanh(self.conv1(x)))))
        return self.head(torch.tanh(self.fc(hidden)))


LAYERS = ["conv1", "block.conv1", "block.shortcut", "block.conv1d", "block.fc", "fc", "head"]
#: Targets by name: a list means ends of names, so each list finds both of a pair.
ALL = ["conv1", "shortcut", "conv1d", "fc", "head"]
PATTERNS = {
    "rank_pattern": {"block.conv1": 2, "^fc": 6, "head|shortcut": 1},
    "alpha_pattern": {"conv1": 3.5, "^fc": 9},
}


@dataclass(frozen=True)
class Case:
    id: str
    config: Callable[..., Any]
    options: dict[str, Any]
    is_dora: bool = False


CASES = [
    Case("lora", LoraConfig, {"r": 4, "lora_alpha": 6}),
    Case("lora linear", LoraConfig, {"r": 4, "lora_alpha": 6, "target_modules": ["fc", "head"]}),
    Case("lora by regular expression", LoraConfig, {"r": 4, "target_modules": r"block\.(conv1|fc)"}),
    Case("rank above the width", LoraConfig, {"r": 32, "lora_alpha": 8}),
    Case("rslora", LoraConfig, {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    Case("rank and alpha patterns", LoraConfig, {"r": 4, "lora_alpha": 6, **PATTERNS}),
    Case("rslora with patterns", LoraConfig, {"r": 4, "lora_alpha": 6, "use_rslora": True, **PATTERNS}),
    Case("lora_bias", LoraConfig,
         {"r": 4, "lora_alpha": 6, "lora_bias": True, "target_modules": ["conv1", "shortcut", "conv1d", "fc"],
          "exclude_modules": ["block.conv1"]}),
    Case("dora", LoraConfig, {"r": 4, "lora_alpha": 6, "use_dora": True}, is_dora=True),
    Case("dora, rslora, patterns", LoraConfig,
         {"r": 4, "lora_alpha": 6, "use_dora": True, "use_rslora": True, **PATTERNS}, is_dora=True),
    Case("loha", LoHaConfig, {"r": 3, "alpha": 5}),
    Case("loha cp", LoHaConfig, {"r": 3, "alpha": 5, "use_effective_conv2d": True}),
    Case("loha with patterns", LoHaConfig, {"r": 3, "alpha": 5, **PATTERNS}),
    Case("lokr", LoKrConfig, {"r": 2, "alpha": 5}),
    Case("lokr cp", LoKrConfig, {"r": 2, "alpha": 5, "use_effective_conv2d": True}),
    Case("lokr decompose_both", LoKrConfig, {"r": 1, "alpha": 5, "decompose_both": True}),
    Case("lokr factor", LoKrConfig, {"r": 2, "alpha": 5, "decompose_factor": 2}),
    # Both factors whole: PEFT still multiplies by alpha/r, other trainers' files mean 1.
    Case("lokr whole", LoKrConfig,
         {"r": 64, "alpha": 8, "target_modules": ["conv1", "shortcut", "fc", "head"]}),
    Case("lokr with patterns", LoKrConfig,
         {"r": 2, "alpha": 5, "rank_pattern": {"^fc": 64}, "alpha_pattern": {"fc": 16, "head": 3}}),
]  # fmt: skip


def build() -> Network:
    network = Network()
    randomise_base(network, seed=5, std=0.2)
    return network.eval()


def trained(case: Case) -> PeftModel:
    config = case.config(**{"target_modules": ALL, **case.options})
    model = get_peft_model(build(), config)
    randomise(model, seed=6, std=0.3, marks=("lora_", "hada_", "lokr_"))
    return model.eval()


def bake_into_base(adapter: Path, folder: Path) -> dict[str, Tensor]:
    """Fold the adapter into the file of the plain network."""
    checkpoint, output = folder / "base.safetensors", folder / "baked.safetensors"
    save_file(build().state_dict(), checkpoint)
    bake(checkpoint, adapter, output)
    return load_file(output)


# False alarm of PEFT's own: it takes the biases of `lora_bias` for parts of sharded factors.
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_baked_as_peft(case: Case, tmp_path: Path) -> None:
    model = trained(case)
    model.save_pretrained(tmp_path / "adapter")
    baked = bake_into_base(tmp_path / "adapter", tmp_path)

    plain = build()
    plain.load_state_dict(baked)
    x = random_values("x", (2, 4, 8, 8), 1.0, seed=7)
    with torch.no_grad():
        expected, before, found = model(x), build()(x), plain(x)
    assert (expected - before).norm() > 0.05 * before.norm()
    assert_near(found, expected, OUTPUT)

    adapted = dict(model.base_model.model.named_modules())
    for name in LAYERS:
        layer = adapted[name]
        if not isinstance(layer, BaseTunerLayer):
            continue
        weight, bias = effective(layer, layer.base_layer)
        assert_near(baked[f"{name}.weight"], weight, WEIGHT)
        if f"{name}.bias" in baked:
            assert_near(baked[f"{name}.bias"], bias, WEIGHT)
        if not case.is_dora:
            delta = layer.get_delta_weight("default")
            assert_near(baked[f"{name}.weight"], layer.base_layer.weight + delta, WEIGHT)


def test_layers_without_adapter_keep_their_bytes(tmp_path: Path) -> None:
    model = trained(Case("", LoraConfig, {"r": 4, "target_modules": ["block.conv1", "head"]}))
    model.save_pretrained(tmp_path / "adapter")
    baked = bake_into_base(tmp_path / "adapter", tmp_path)
    changed = {name for name, tensor in build().state_dict().items() if not torch.equal(tensor, baked[name])}
    assert changed == {"block.conv1.weight", "head.weight"}


def test_named_adapter(tmp_path: Path) -> None:
    """Adapters not called "default" are saved in a folder of their name."""
    model = get_peft_model(build(), LoraConfig(r=4, lora_alpha=6, target_modules=ALL), adapter_name="style")
    randomise(model, seed=6, std=0.3, marks=("lora_",))
    model.eval().save_pretrained(tmp_path / "adapter")
    baked = bake_into_base(tmp_path / "adapter" / "style", tmp_path)
    for name in LAYERS:
        layer = model.base_model.model.get_submodule(name)
        assert_near(
            baked[f"{name}.weight"], layer.base_layer.weight + layer.get_delta_weight("style"), WEIGHT
        )


def test_strength(tmp_path: Path) -> None:
    """PEFT scales a layer's change linearly, except with DoRA."""
    model = trained(Case("", LoraConfig, {"r": 4, "lora_alpha": 6}))
    model.save_pretrained(tmp_path / "adapter")
    checkpoint, output = tmp_path / "base.safetensors", tmp_path / "baked.safetensors"
    save_file(build().state_dict(), checkpoint)
    bake(checkpoint, tmp_path / "adapter", output, strength=-0.7)
    baked = load_file(output)
    for name in LAYERS:
        layer = model.base_model.model.get_submodule(name)
        layer.scale_layer(-0.7)
        weight, _ = effective(layer, layer.base_layer)
        assert_near(baked[f"{name}.weight"], weight, WEIGHT)


@pytest.mark.parametrize(
    "options", [{"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["norm"]}], ids=str
)
def test_other_trained_tensors_are_named(options: dict[str, Any], tmp_path: Path) -> None:
    """PEFT saves trained biases and whole modules beside the factors; bake cannot apply them."""
    model = trained(Case("", LoraConfig, {"r": 4, "target_modules": ["block.fc"], **options}))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(IncompatibleError) as raised:
        bake_into_base(tmp_path / "adapter", tmp_path)
    others = [key for key in load_file(tmp_path / "adapter/adapter_model.safetensors") if "lora_" not in key]
    assert others
    for key in others:
        assert any(key in detail for detail in raised.value.details)


def test_kasa_is_refused(tmp_path: Path) -> None:
    """KaSA has LoRA's factors, a diagonal between them, and removes a part of the base weight."""
    config = LoraConfig(r=4, target_modules=["fc", "head"], kasa_config=KasaConfig())
    model = get_peft_model(build(), config)
    randomise(model, seed=6, std=0.3, marks=("lora_",))
    model.save_pretrained(tmp_path / "adapter")
    save_file(build().state_dict(), tmp_path / "base.safetensors")
    options = BakeOptions(output=str(tmp_path / "baked.safetensors"), device="cpu")  # not strict
    with pytest.raises(IncompatibleError):
        run_bake(str(tmp_path / "base.safetensors"), [AdapterInput(str(tmp_path / "adapter"))], options)
