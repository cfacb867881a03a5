"""Write the sample files of tests/data: ``python tests/makers/make_samples.py``.

===================== ==========================================================
base.safetensors      SD 1.x single-file checkpoint, fp16: all 1145 tensors of
                      v1-5-pruned-emaonly (UNet, CLIP-L, VAE, noise schedule in
                      fp32, int64 position ids), narrow, random weights.  Built
                      from the model classes of diffusers and transformers; the
                      LDM names are those of ``ldm_names.py``, checked with
                      diffusers' converter.
loha.safetensors      LoHa for that model, written by LyCORIS (``lycoris.kohya``):
                      UNet and text encoder, linear and convolution layers, dim 2,
                      alpha 1, fp16, without Tucker cores (``sd1_preset.toml``).
lora.safetensors      LoRA for the same layers, written by LyCORIS (algo "locon"):
                      dim 4, alpha 2; 3x3 convolutions dim 2, alpha 1; fp16.
peft_lora/            LoRA of the UNet's attention, written by PEFT's
                      ``save_pretrained``: r 2, lora_alpha 4, fp32.
===================== ==========================================================

The files in the repository were made with lycoris-lora 4.1.3, peft 0.21.2, diffusers 0.42.1,
transformers 5.23.0, torch 2.13.0, safetensors 0.8.0 and numpy 2.4.6.  With the same versions the
program gives the same bytes each time.  The libraries do not promise that by themselves:
safetensors writes metadata in random order, and PEFT writes a set into its configuration;
both are sorted here after the libraries have written them.  No tensor is touched.
"""

import json
import logging
import shutil
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lycoris.kohya import create_network
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

# As a program, this file is not part of a package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from makers import architectures as arch
from makers.checks import check_sd1, check_sd2, check_sdxl

TESTS = Path(__file__).resolve().parents[1]
DATA = TESTS / "data"
PRESET = TESTS / "makers" / "sd1_preset.toml"

# A CLIP-L layer has six linear modules; SD 1.x has twelve layers.
TEXT_MODULES = 72
# Sixteen transformers of 12 modules, 22 resnets of 3, 14 shortcuts, 3 + 3 resampling
# convolutions, conv_in, conv_out and 2 of the time embedding.
UNET_MODULES = 16 * 12 + 22 * 3 + 14 + 6 + 4


def sort_metadata(path: Path) -> None:
    """Rewrite the header of a safetensors file with its metadata sorted by key."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    header = {"__metadata__": dict(sorted(metadata.items()))} | header
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def training_metadata(name: str, algo: str, dims: tuple[int, int, int, int]) -> dict[str, str]:
    """Give the ``ss_*`` entries that kohya's trainer would save; every value is a string."""
    dim, alpha, conv_dim, conv_alpha = dims
    arguments = {
        "algo": algo,
        "preset": PRESET.name,
        "conv_dim": str(conv_dim),
        "conv_alpha": str(conv_alpha),
    }
    return {
        "ss_base_model_version": "sd_v1",
        "ss_clip_skip": "2",
        "ss_dataset_dirs": json.dumps({"2_lighthouse": {"n_repeats": 2, "img_count": 12}}),
        "ss_epoch": "5",
        "ss_learning_rate": "0.0001",
        "ss_lr_scheduler": "cosine",
        "ss_max_train_steps": "60",
        "ss_mixed_precision": "fp16",
        "ss_network_alpha": str(float(alpha)),
        "ss_network_args": json.dumps(arguments),
        "ss_network_dim": str(dim),
        "ss_network_dropout": "None",
        "ss_network_module": "lycoris.kohya",
        "ss_num_train_images": "24",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.01)",
        "ss_output_name": name,
        "ss_resolution": "(512, 512)",
        "ss_sd_model_name": "base.safetensors",
        "ss_seed": "1234",
        "ss_steps": "60",
        "ss_tag_frequency": json.dumps({"2_lighthouse": {"lighthouse": 12, "sea": 7}}),
        "ss_text_encoder_lr": "5e-05",
        "ss_training_comment": "None",
        "ss_unet_lr": "0.0001",
        "ss_v2": "False",
    }


@torch.no_grad()
def fill(module: nn.Module, std: float, seed: int) -> None:
    """Give all factors random values: as initialised, an adapter changes nothing."""
    for name, parameter in module.named_parameters():
        parameter.copy_(arch.random_values(name, tuple(parameter.shape), std, seed))


def write_lycoris(path: Path, algo: str, dims: tuple[int, int, int, int], std: float, seed: int) -> None:
    """Let LyCORIS make and save an adapter of the narrow SD 1.x UNet and text encoder."""
    # sd1_text_encoder() wraps transformers' model below ``text_model``: LyCORIS takes names
    # from module paths, and those of transformers 5 would give lora_te_encoder_layers_...
    # instead of the lora_te_text_model_encoder_layers_... of all published files.
    unet, text_encoder = arch.sd1_unet(), arch.sd1_text_encoder()
    dim, alpha, conv_dim, conv_alpha = dims
    network = create_network(
        1.0,
        dim,
        alpha,
        None,
        text_encoder,
        unet,
        algo=algo,
        preset=str(PRESET),
        conv_dim=conv_dim,
        conv_alpha=conv_alpha,
    )
    # Only this registers the modules, and save_weights saves registered modules.
    network.apply_to(text_encoder, unet, apply_text_encoder=True, apply_unet=True)
    fill(network, std, seed)

    modules = {name.split(".")[0] for name in network.state_dict()}
    text = sum(name.startswith("lora_te_text_model_encoder_layers_") for name in modules)
    if (text, len(modules) - text) != (TEXT_MODULES, UNET_MODULES):
        raise AssertionError(f"LyCORIS found {text} text and {len(modules) - text} UNet modules")

    metadata = training_metadata(path.stem, algo, dims)
    network.save_weights(str(path), torch.float16, metadata)
    sort_metadata(path)


def write_peft(folder: Path) -> None:
    """Let PEFT make and save a LoRA of the attention layers of the narrow SD 1.x UNet."""
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    model = get_peft_model(arch.sd1_unet(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(arch.random_values(name, tuple(parameter.shape), 0.1, 63))
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        folder.mkdir()
        # The third file is a model card to be filled in.
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(Path(temporary, name), folder / name)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["target_modules"].sort()
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Write all sample files, after comparing the single files with diffusers' converter."""
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    DATA.mkdir(exist_ok=True)

    base = arch.sd1_single_file()
    check_sd1(base)
    check_sd2(arch.sd2_single_file())
    check_sdxl(arch.sdxl_single_file())
    save_file(base, DATA / "base.safetensors", {"format": "pt"})

    # The standard deviations give changes about a tenth of the weights.
    write_lycoris(DATA / "loha.safetensors", "loha", (2, 1, 2, 1), std=0.3, seed=61)
    write_lycoris(DATA / "lora.safetensors", "locon", (4, 2, 2, 1), std=0.1, seed=62)
    write_peft(DATA / "peft_lora")

    for path in sorted(DATA.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:9,d}  {path.relative_to(DATA)}")


if __name__ == "__main__":
    main()
