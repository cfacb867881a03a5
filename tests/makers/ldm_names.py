"""Rename state dicts of diffusers and transformers models to single-file names.

"Single-file" are the names of the original Stable Diffusion code (LDM, and SGM for SDXL),
as found in checkpoints such as v1-5-pruned-emaonly.  Only names change, with three
exceptions in the tensors: the VAE's attention is stored as 1x1 convolutions, OpenCLIP
fuses q, k and v, and OpenCLIP stores its text projection transposed.

This table is independent of the one in the package under test, and ``checks.py`` compares
it with the converter of diffusers.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

StateDict = dict[str, Tensor]

# A published UNet has two resnets per block, so three slots per block on both sides: the
# third is the downsampler going down and a third resnet going up.
SLOTS_PER_BLOCK = 3

UNET_ROOTS = {
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
}
UNET_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
VAE_ATTENTION = {
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}
VAE_CONVOLUTIONS = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")
OPENCLIP_LAYER = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}
OPENCLIP_ROOTS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}


def _swap_prefix(name: str, table: dict[str, str]) -> str:
    """Replace the first prefix of ``table`` that ``name`` has; keep other names."""
    for old, new in table.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _unet_name(name: str, blocks_with_attention: set[int], slots: int) -> str:
    """Give the LDM name of one diffusers UNet tensor."""
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
        side, block, kind, slot, rest = found.groups()
        index = slots * int(block) + int(slot)
        # input_blocks.0 is conv_in; output_blocks has nothing before its first block.
        place = f"input_blocks.{index + 1}" if side == "down" else f"output_blocks.{index}"
        if kind == "resnets":
            return f"{place}.0.{_swap_prefix(rest, UNET_RESNET)}"
        return f"{place}.1.{rest}"
    if found := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", name):
        return f"input_blocks.{slots * (int(found[1]) + 1)}.0.op.{found[2]}"
    if found := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)", name):
        block_index = int(found[1])
        # The upsampler follows the attention of the last slot, or the resnet if there is none.
        position = 2 if block_index in blocks_with_attention else 1
        last = slots * block_index + slots - 1
        return f"output_blocks.{last}.{position}.conv.{found[2]}"
    if found := re.match(r"mid_block\.resnets\.(\d+)\.(.+)", name):
        return f"middle_block.{2 * int(found[1])}.{_swap_prefix(found[2], UNET_RESNET)}"
    if found := re.match(r"mid_block\.attentions\.0\.(.+)", name):
        return f"middle_block.1.{found[1]}"
    return _swap_prefix(name, UNET_ROOTS)


def unet_to_ldm(state: StateDict, slots: int = SLOTS_PER_BLOCK) -> StateDict:
    """Rename a diffusers UNet of SD1, SD2 or SDXL; without the file's prefix."""
    found = (re.match(r"up_blocks\.(\d+)\.attentions\.", name) for name in state)
    with_attention = {int(match[1]) for match in found if match}
    return {_unet_name(name, with_attention, slots): tensor for name, tensor in state.items()}


def vae_to_ldm(state: StateDict) -> StateDict:
    """Rename a diffusers AutoencoderKL; without the file's prefix."""
    last_block = max(int(name.split(".")[2]) for name in state if "up_blocks" in name)

    def down(found: re.Match[str]) -> str:
        return f"down.{found[1]}.{_vae_part(found[2])}"

    def up(found: re.Match[str]) -> str:
        # LDM counts the decoder's blocks from the image, diffusers from the latent.
        return f"up.{last_block - int(found[1])}.{_vae_part(found[2])}"

    result: StateDict = {}
    for name, tensor in state.items():
        new = _replace(r"down_blocks\.(\d+)\.(\w+\.\d+)", down, name)
        new = _replace(r"up_blocks\.(\d+)\.(\w+\.\d+)", up, new)
        new = _replace(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", new)
        new = new.replace("conv_shortcut.", "nin_shortcut.").replace("conv_norm_out.", "norm_out.")
        before, attention, part = new.partition("mid_block.attentions.0.")
        if attention:
            new = f"{before}mid.attn_1.{_swap_prefix(part, VAE_ATTENTION)}"
            result[new] = tensor[:, :, None, None] if new.endswith(VAE_CONVOLUTIONS) else tensor
        else:
            result[new] = tensor
    return result


def _vae_part(part: str) -> str:
    """Give the LDM name of ``resnets.N``, ``downsamplers.0`` or ``upsamplers.0``."""
    kind, index = part.split(".")
    return {"downsamplers": "downsample", "upsamplers": "upsample"}.get(kind, f"block.{index}")


def _replace(pattern: str, new: Callable[[re.Match[str]], str], name: str) -> str:
    return re.sub(pattern, new, name)


def clip_to_ldm(state: StateDict) -> StateDict:
    """Give CLIP-L the int64 buffer of real files, which transformers no longer saves."""
    positions = state["text_model.embeddings.position_embedding.weight"].shape[0]
    result = dict(state)
    result["text_model.embeddings.position_ids"] = torch.arange(positions)[None]
    return result


def clip_to_openclip(state: StateDict) -> StateDict:
    """Rename an OpenCLIP text encoder in transformers form; without the file's prefix."""
    result: StateDict = {}
    for name, tensor in state.items():
        if name in OPENCLIP_ROOTS:
            result[OPENCLIP_ROOTS[name]] = tensor
        elif name == "text_projection.weight":
            result["text_projection"] = tensor.T.contiguous()
        elif found := re.match(r"text_model\.encoder\.layers\.(\d+)\.(.+)", name):
            place, rest = f"transformer.resblocks.{found[1]}", found[2]
            if rest.startswith("self_attn.q_proj."):
                parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                result[f"{place}.attn.in_proj_{rest.split('.')[-1]}"] = torch.cat(parts)
            elif not rest.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
                result[f"{place}.{_swap_prefix(rest, OPENCLIP_LAYER)}"] = tensor
        else:
            raise KeyError(name)
    return result


def with_prefix(prefix: str, state: StateDict) -> StateDict:
    """Put ``prefix`` before every name."""
    return {prefix + name: tensor for name, tensor in state.items()}
