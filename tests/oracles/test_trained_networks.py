"""Whole networks as lycotool trains them, loaded by LyCORIS and by diffusers: the same UNet output.

A micro model with the block structure of SD 1; every layer of the preset `full` has an adapter.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights
from makers.bases import micro_base, write_folder
from makers.layers import relative_error, train_randomly
from safetensors.torch import save_file
from torch import Tensor

from lycotool.training.bases.load import load_base
from lycotool.training.bases.model import BaseModel
from lycotool.training.network import Network
from lycotool.training.network_options import NetworkOptions
from lycotool.training.presets import PRESETS
from lycotool.training.targets import find_targets

#: Arguments, and how far parameters move for outputs to change visibly. LyCORIS cannot load
#: its own (IA)³, DoRA on the input side, nor CP or unbalanced LoKr.
NETWORKS: dict[str, tuple[tuple[str, ...], float]] = {
    "lora": (("dim=4",), 0.2),
    "lora + dora": (("dim=4", "dora_wd=true"), 0.2),
    "loha": (("algo=loha", "dim=4", "use_scalar=true"), 0.5),
    "lokr": (("algo=lokr", "dim=2", "factor=4"), 0.3),
    "dylora": (("algo=dylora", "dim=4"), 0.2),
    "full and norm": (("algo=full", "train_norm=true"), 0.05),
    "glora": (("algo=glora", "dim=4"), 0.2),
    "diag-oft": (("algo=diag-oft", "dim=8", "rescaled=true"), 0.2),
}

# A chain of some 30 layers, each float32 sum in another order; measured: at most 5e-6.
TOLERANCE = 2e-5


def output(base: BaseModel) -> Tensor:
    """What the UNet gives for some input."""
    generator = torch.Generator().manual_seed(5)
    width = base.unet.config.cross_attention_dim
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, width, generator=generator)
    with torch.no_grad():
        found: Tensor = base.unet(x, torch.tensor([10, 700]), text).sample
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base") / "sd1"
    write_folder(micro_base("sd1"), path)
    return str(path)


def trained(folder: str, arguments: tuple[str, ...], std: float) -> tuple[BaseModel, Network]:
    base = load_base(folder)
    options = NetworkOptions().with_arguments(arguments)
    targets = find_targets(base, PRESETS["full"], train_norm=options.train_norm)
    network = Network.build(targets, options, seed=3)
    train_randomly(network.eval(), std)
    return base, network


@pytest.mark.parametrize("name", NETWORKS)
def test_lycoris_loads_the_network(
    name: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, std = NETWORKS[name]
    base, network = trained(folder, arguments, std)
    expected = output(base)
    network.detach()
    before = output(base)
    saved = network.export()
    save_file(saved, tmp_path / "a.safetensors")

    # LyCORIS 4's own preset has these twice on diffusers' UNets.
    monkeypatch.setattr(LycorisNetworkKohya, "UNET_TARGET_REPLACE_NAME", [])
    loaded, _ = create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, None, base.unet)
    for module in loaded.unet_loras:
        module.eval().apply_to()
    found = output(base)

    assert len(loaded.unet_loras) == sum(component == "unet" for component in network.components)
    assert (expected - before).norm() > 0.05 * before.norm()
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize(
    "arguments", [("dim=4",), ("dim=4", "alpha=1", "conv_dim=2"), ("algo=dylora", "dim=4")]
)
def test_diffusers_loads_the_network(arguments: tuple[str, ...], folder: str, tmp_path: Path) -> None:
    base, network = trained(folder, arguments, 0.2)
    expected = output(base)
    network.detach()
    before = output(base)
    saved = {key: tensor for key, tensor in network.export().items() if key.startswith("lora_unet")}
    from diffusers import StableDiffusionPipeline

    state, alphas = StableDiffusionPipeline.lora_state_dict(saved, unet_config=base.unet.config)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, base.unet)
    found = output(base)

    assert (expected - before).norm() > 0.05 * before.norm()
    assert relative_error(found, expected) < TOLERANCE
