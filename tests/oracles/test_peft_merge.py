"""`merge` against PEFT's ``add_weighted_adapter``, on the layers of one PEFT model.

``cat`` and the ``*_svd`` combinations work on weight changes and are compared. ``linear``,
``ties``, ``dare_*`` and ``magnitude_prune`` combine factors, A with A and B with B, which is
another thing (cross terms); the random ``dare_*_svd`` draw from the global generator and are
compared function by function in ``tests/linalg/merging``. Signs are elected before strengths
are applied there, so TIES is compared where they are equal.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import read, succeed
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

LAYERS = ("fc", "head", "conv")
EPS = torch.finfo(torch.float32).eps


class Network(nn.Module):
    """Two linear layers and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(20, 24), nn.Linear(24, 16)
        self.conv = nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(x))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PeftModel:
    """A PEFT model with adapters one (rank 3) and two (rank 5), saved in folders of their names."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(11)
    config = {name: LoraConfig(r=rank, lora_alpha=alpha, target_modules=["fc", "head", "conv"])
              for name, rank, alpha in (("one", 3, 6), ("two", 5, 2))}  # fmt: skip
    made = get_peft_model(Network(), config["one"], adapter_name="one")
    made.add_adapter("two", config["two"])
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    made.save_pretrained(str(tmp_path))
    return made


def delta(model: PeftModel, layer: str, adapter: str) -> Tensor:
    return model.base_model.model.get_submodule(layer).get_delta_weight(adapter).detach().double()


def merged(*arguments: object) -> dict[str, Tensor]:
    """ΔW by layer of what `merge` writes, in float64."""
    succeed("merge", *arguments, "-f", "-o", "out.safetensors")
    tensors = read(Path("out.safetensors"))
    found = {}
    for layer in LAYERS:
        name = f"base_model.model.{layer}"
        if f"{name}.diff" in tensors:
            found[layer] = tensors[f"{name}.diff"].double()
            continue
        up, down = (tensors[f"{name}.lora_{side}.weight"].double() for side in "BA")
        found[layer] = (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
    return found


def assert_near(found: dict[str, Tensor], model: PeftModel, adapter: str, share: float = 64 * EPS) -> None:
    for layer, change in found.items():
        expected = delta(model, layer, adapter)
        assert (change - expected).abs().max() <= share * float(expected.abs().max()), layer


@pytest.mark.parametrize("weights", [(0.7, 0.4), (1.5, -0.5)], ids=str)
def test_cat(weights: tuple[float, float], model: PeftModel) -> None:
    model.add_weighted_adapter(["one", "two"], list(weights), "mix", combination_type="cat")

    assert_near(merged(f"one:{weights[0]}", f"two:{weights[1]}"), model, "mix")


@pytest.mark.parametrize("rank", [2, 6])
def test_svd(rank: int, model: PeftModel) -> None:
    """The best approximation is unique; PEFT decomposes the dense change in float32."""
    model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "mix", combination_type="svd", svd_rank=rank,
                               svd_full_matrices=False)  # fmt: skip

    assert_near(merged("one:0.7", "two:0.4", "--rank", rank), model, "mix", 1024 * EPS)


@pytest.mark.parametrize(("name", "weights"), [("magnitude_prune", (0.7, -0.4)), ("ties", (0.5, 0.5))])
@pytest.mark.parametrize("density", [0.3, 0.8])
def test_methods_on_weight_changes(
    name: str, weights: tuple[float, float], density: float, model: PeftModel
) -> None:
    """PEFT can only write factors: both are the best of one rank, which is the convolution's whole."""
    model.add_weighted_adapter(["one", "two"], list(weights), "mix", combination_type=f"{name}_svd", svd_rank=6,
                               density=density, svd_full_matrices=False)  # fmt: skip
    options = ("--method", name.replace("_", "-"), "--density", density, "--rank", 6)

    assert_near(merged(f"one:{weights[0]}", f"two:{weights[1]}", *options), model, "mix", 1024 * EPS)
