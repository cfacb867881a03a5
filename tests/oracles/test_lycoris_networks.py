"""Whole LyCORIS networks over SD 2.x: the applied network and the baked checkpoint agree.

SD 2.x has all the hard places: LDM names in the UNet, linear ``proj_in``, and a text encoder
whose q, k and v are thirds of one tensor. The kohya entry point of LyCORIS makes, applies
and saves the network; diffusers' converter reads the baked file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_open_clip_checkpoint
from lycoris.kohya import create_network
from lycoris.modules.full import FullModule
from makers import architectures as arch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oracles.support import assert_near, bake, randomise

PRESET = Path(__file__).resolve().parents[1] / "makers" / "sd1_preset.toml"

# Outputs in roundings of the largest element, as in test_diffusers.py. Measured: at most 40.
OUTPUT = 128

#: Arguments of the network, and a size of its parameters that changes outputs visibly.
NETWORKS: dict[str, tuple[dict[str, Any], float]] = {
    "locon": ({"algo": "locon", "use_tucker": True}, 0.2),
    "locon + dora": ({"algo": "locon", "dora_wd": True}, 0.2),
    "locon + dora on the input": ({"algo": "locon", "dora_wd": True, "wd_on_output": False}, 0.2),
    "loha": ({"algo": "loha"}, 0.5),
    "lokr": ({"algo": "lokr", "factor": 4}, 0.4),
    "ia3": ({"algo": "ia3"}, 0.2),
    "glora": ({"algo": "glora", "conv_dim": 3}, 0.2),
    "full and norm": ({"algo": "full", "train_norm": True}, 0.05),
    "diag-oft": ({"algo": "diag-oft", "rescaled": True}, 0.2),
    "boft": ({"algo": "boft", "constraint": 0.05}, 0.2),
}


def outputs(unet: nn.Module, text: nn.Module) -> tuple[Tensor, Tensor]:
    sample = arch.random_values("sample", (2, 4, 8, 8), 1.0, seed=1)
    context = arch.random_values("context", (2, 7, arch.CLIP_H_WIDTH), 1.0, seed=2)
    with torch.no_grad():
        image: Tensor = unet(sample, torch.tensor([10, 700]), context).sample
        return image, text(torch.arange(10, 30)[None])


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str, tmp_path: Path) -> None:
    options, std = NETWORKS[name]
    unet, text = arch.sd2_unet(), arch.sd2_text_encoder()
    before = outputs(unet, text)
    sizes = {"conv_dim": 8, "conv_alpha": 4, "preset": str(PRESET)}
    network = create_network(1.0, 6, 4.5, None, text, unet, **(sizes | options))
    network.apply_to(text, unet, apply_text_encoder=True, apply_unet=True)
    originals = {
        module: (module.weight.clone(), None if module.bias is None else module.bias.clone())
        for module in network.modules()
        if isinstance(module, FullModule)
    }
    randomise(network.eval(), seed=9, std=std)
    with torch.no_grad():
        for module, (weight, bias) in originals.items():
            # `full` keeps the changed weight, not the change.
            module.weight.add_(weight)
            if bias is not None:
                module.bias.add_(bias)
    expected = outputs(unet, text)
    network.save_weights(str(tmp_path / "network.safetensors"), torch.float32, {})

    save_file(arch.sd2_single_file(torch.float32), tmp_path / "base.safetensors")
    bake(tmp_path / "base.safetensors", tmp_path / "network.safetensors", tmp_path / "baked.safetensors")
    baked = load_file(tmp_path / "baked.safetensors")
    # The converters change the dictionaries that they are given.
    plain_unet, plain_text = arch.sd2_unet(), arch.sd2_text_encoder()
    plain_unet.load_state_dict(convert_ldm_unet_checkpoint(dict(baked), plain_unet.config))
    plain_text.load_state_dict(
        convert_open_clip_checkpoint(plain_text, dict(baked), prefix=arch.SD2_CLIP_PREFIX)
    )
    for found, wanted, old in zip(outputs(plain_unet, plain_text), expected, before, strict=True):
        assert (wanted - old).norm() > 0.1 * old.norm()
        assert_near(found, wanted, OUTPUT)
