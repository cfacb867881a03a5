"""Narrow diffusion transformers of diffusers, and their layers in the published names.

Widths are small and there is one block of a kind, or two where the last one differs. The
tables follow the original repositories' modules, not lycotool's tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
from torch import nn

from .architectures import randomise

#: Published path of a layer to the paths of its rows in diffusers' class, in their order.
Layers = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Denoiser:
    """A denoiser.

    Parameters
    ----------
    build
        Makes the model, without values.
    pipeline
        diffusers' pipeline for it.
    layers
        Its linear layers and convolutions.
    swapped
        Published paths of the layers whose halves diffusers has in the other order.
    """

    build: Callable[[], nn.Module]
    pipeline: Any
    layers: Layers
    swapped: frozenset[str] = frozenset()

    def model(self, seed: int = 40) -> nn.Module:
        """The model with random values."""
        return randomise(self.build(), seed)


def _same(*paths: str) -> Iterator[tuple[str, tuple[str]]]:
    for path in paths:
        yield path, (path,)


def _renamed(names: Mapping[str, str]) -> Iterator[tuple[str, tuple[str]]]:
    for native, path in names.items():
        yield native, (path,)


def _embedder(native: str, path: str) -> Iterator[tuple[str, tuple[str]]]:
    return _renamed({f"{native}.in_layer": f"{path}.linear_1", f"{native}.out_layer": f"{path}.linear_2"})


def _mlp_embedder(native: str, path: str) -> Iterator[tuple[str, tuple[str]]]:
    return _renamed({f"{native}.mlp.0": f"{path}.linear_1", f"{native}.mlp.2": f"{path}.linear_2"})


def _qkv(native: str, path: str, names: str = "to_q to_k to_v") -> tuple[str, tuple[str, ...]]:
    return native, tuple(f"{path}.{name}" for name in names.split())


_ADDED = "add_q_proj add_k_proj add_v_proj"


# --- Flux.1, Chroma and Flux.2 -------------------------------------------------------------


def _double_attention(double: str, block: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield _qkv(f"{double}.img_attn.qkv", f"{block}.attn")
    yield _qkv(f"{double}.txt_attn.qkv", f"{block}.attn", _ADDED)
    yield f"{double}.img_attn.proj", (f"{block}.attn.to_out.0",)
    yield f"{double}.txt_attn.proj", (f"{block}.attn.to_add_out",)


def _flux_and_chroma_layers() -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from _renamed(
        {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    )
    double, block = "double_blocks.0", "transformer_blocks.0"
    yield from _double_attention(double, block)
    for stream, path in (("img", "ff"), ("txt", "ff_context")):
        yield f"{double}.{stream}_mlp.0", (f"{block}.{path}.net.0.proj",)
        yield f"{double}.{stream}_mlp.2", (f"{block}.{path}.net.2",)
    single, block = "single_blocks.0", "single_transformer_blocks.0"
    yield f"{single}.linear1", (*_qkv("", f"{block}.attn")[1], f"{block}.proj_mlp")
    yield f"{single}.linear2", (f"{block}.proj_out",)


def _flux_layers() -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from _flux_and_chroma_layers()
    yield from _embedder("time_in", "time_text_embed.timestep_embedder")
    yield from _embedder("vector_in", "time_text_embed.text_embedder")
    yield from _embedder("guidance_in", "time_text_embed.guidance_embedder")
    yield from _renamed(
        {
            "double_blocks.0.img_mod.lin": "transformer_blocks.0.norm1.linear",
            "double_blocks.0.txt_mod.lin": "transformer_blocks.0.norm1_context.linear",
            "single_blocks.0.modulation.lin": "single_transformer_blocks.0.norm.linear",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        }
    )


def _chroma_layers() -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from _flux_and_chroma_layers()
    guidance = "distilled_guidance_layer"
    yield from _same(f"{guidance}.in_proj", f"{guidance}.out_proj")
    yield from _embedder(f"{guidance}.layers.0", f"{guidance}.layers.0")


def _flux2_layers() -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from _double_attention("double_blocks.0", "transformer_blocks.0")
    for stream, path in (("img", "ff"), ("txt", "ff_context")):
        yield f"double_blocks.0.{stream}_mlp.0", (f"transformer_blocks.0.{path}.linear_in",)
        yield f"double_blocks.0.{stream}_mlp.2", (f"transformer_blocks.0.{path}.linear_out",)
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        yield f"{name}.lin", (f"{name}.linear",)
    yield from _embedder("time_in", "time_guidance_embed.timestep_embedder")
    yield from _embedder("guidance_in", "time_guidance_embed.guidance_embedder")
    yield from _renamed(
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "single_blocks.0.linear1": "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
            "single_blocks.0.linear2": "single_transformer_blocks.0.attn.to_out",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        }
    )


def _flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


def _chroma() -> nn.Module:
    return diffusers.ChromaTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=8,
        approximator_layers=1,
    )


def _flux2() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
    )


# --- HunyuanVideo --------------------------------------------------------------------------


def _hunyuan_layers() -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from _mlp_embedder("time_in", "time_text_embed.timestep_embedder")
    yield from _mlp_embedder("guidance_in", "time_text_embed.guidance_embedder")
    yield from _embedder("vector_in", "time_text_embed.text_embedder")
    yield from _mlp_embedder("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder")
    for name in ("linear_1", "linear_2"):
        yield f"txt_in.c_embedder.{name}", (f"context_embedder.time_text_embed.text_embedder.{name}",)
    refiner, path = (
        "txt_in.individual_token_refiner.blocks.0",
        "context_embedder.token_refiner.refiner_blocks.0",
    )
    yield _qkv(f"{refiner}.self_attn_qkv", f"{path}.attn")
    double, block = "double_blocks.0", "transformer_blocks.0"
    yield _qkv(f"{double}.img_attn_qkv", f"{block}.attn")
    yield _qkv(f"{double}.txt_attn_qkv", f"{block}.attn", _ADDED)
    single, alone = "single_blocks.0", "single_transformer_blocks.0"
    yield f"{single}.linear1", (*_qkv("", f"{alone}.attn")[1], f"{alone}.proj_mlp")
    yield from _renamed(
        {
            "img_in.proj": "x_embedder.proj",
            "txt_in.input_embedder": "context_embedder.proj_in",
            f"{refiner}.self_attn_proj": f"{path}.attn.to_out.0",
            f"{refiner}.mlp.fc1": f"{path}.ff.net.0.proj",
            f"{refiner}.mlp.fc2": f"{path}.ff.net.2",
            f"{refiner}.adaLN_modulation.1": f"{path}.norm_out.linear",
            f"{double}.img_mod.linear": f"{block}.norm1.linear",
            f"{double}.img_attn_proj": f"{block}.attn.to_out.0",
            f"{double}.img_mlp.fc1": f"{block}.ff.net.0.proj",
            f"{double}.img_mlp.fc2": f"{block}.ff.net.2",
            f"{double}.txt_mod.linear": f"{block}.norm1_context.linear",
            f"{double}.txt_attn_proj": f"{block}.attn.to_add_out",
            f"{double}.txt_mlp.fc1": f"{block}.ff_context.net.0.proj",
            f"{double}.txt_mlp.fc2": f"{block}.ff_context.net.2",
            f"{single}.linear2": f"{alone}.proj_out",
            f"{single}.modulation.linear": f"{alone}.norm.linear",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        }
    )


def _hunyuan() -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=12,
        pooled_projection_dim=6,
        rope_axes_dim=(2, 2, 4),
    )


# --- Stable Diffusion 3 --------------------------------------------------------------------


def _sd3_layers() -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from _renamed({"x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder"})
    yield from _mlp_embedder("t_embedder", "time_text_embed.timestep_embedder")
    yield from _mlp_embedder("y_embedder", "time_text_embed.text_embedder")
    for number in (0, 1):
        joint, block = f"joint_blocks.{number}", f"transformer_blocks.{number}"
        yield _qkv(f"{joint}.x_block.attn.qkv", f"{block}.attn")
        yield _qkv(f"{joint}.context_block.attn.qkv", f"{block}.attn", _ADDED)
        yield from _renamed(
            {
                f"{joint}.x_block.adaLN_modulation.1": f"{block}.norm1.linear",
                f"{joint}.x_block.attn.proj": f"{block}.attn.to_out.0",
                f"{joint}.x_block.mlp.fc1": f"{block}.ff.net.0.proj",
                f"{joint}.x_block.mlp.fc2": f"{block}.ff.net.2",
                f"{joint}.context_block.adaLN_modulation.1": f"{block}.norm1_context.linear",
            }
        )
    yield _qkv("joint_blocks.0.x_block.attn2.qkv", "transformer_blocks.0.attn2")
    # The last block has no outputs for the text.
    yield from _renamed(
        {
            "joint_blocks.0.x_block.attn2.proj": "transformer_blocks.0.attn2.to_out.0",
            "joint_blocks.0.context_block.attn.proj": "transformer_blocks.0.attn.to_add_out",
            "joint_blocks.0.context_block.mlp.fc1": "transformer_blocks.0.ff_context.net.0.proj",
            "joint_blocks.0.context_block.mlp.fc2": "transformer_blocks.0.ff_context.net.2",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        }
    )


def _sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
    )


# --- Wan -----------------------------------------------------------------------------------


def _wan_layers() -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from _same("patch_embedding")
    condition = "condition_embedder"
    yield from _renamed(
        {
            "time_embedding.0": f"{condition}.time_embedder.linear_1",
            "time_embedding.2": f"{condition}.time_embedder.linear_2",
            "time_projection.1": f"{condition}.time_proj",
            "text_embedding.0": f"{condition}.text_embedder.linear_1",
            "text_embedding.2": f"{condition}.text_embedder.linear_2",
            "img_emb.proj.1": f"{condition}.image_embedder.ff.net.0.proj",
            "img_emb.proj.3": f"{condition}.image_embedder.ff.net.2",
            "head.head": "proj_out",
        }
    )
    for native, attention in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for letter, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
            yield f"blocks.0.{native}.{letter}", (f"blocks.0.{attention}.{name}",)
    yield from _renamed(
        {
            "blocks.0.cross_attn.k_img": "blocks.0.attn2.add_k_proj",
            "blocks.0.cross_attn.v_img": "blocks.0.attn2.add_v_proj",
            "blocks.0.ffn.0": "blocks.0.ffn.net.0.proj",
            "blocks.0.ffn.2": "blocks.0.ffn.net.2",
        }
    )


def _wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=8,
        ffn_dim=32,
        num_layers=1,
        image_dim=10,
        added_kv_proj_dim=16,
    )


# --- Qwen-Image: published with diffusers' names -------------------------------------------


def _qwen_layers() -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from _same("img_in", "txt_in", "norm_out.linear", "proj_out")
    yield from _same(*(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)))
    for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out", *_ADDED.split()):
        yield from _same(f"transformer_blocks.0.attn.{name}")
    for stream in ("img", "txt"):
        for name in ("mod.1", "mlp.net.0.proj", "mlp.net.2"):
            yield from _same(f"transformer_blocks.0.{stream}_{name}")


def _qwen() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
    )


# --- Lumina 2 and Z-Image ------------------------------------------------------------------


def _lumina_layers() -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from _same("x_embedder")
    yield from _mlp_embedder("t_embedder", "time_caption_embed.timestep_embedder")
    for stack in ("noise_refiner.0", "context_refiner.0", "layers.0"):
        yield _qkv(f"{stack}.attention.qkv", f"{stack}.attn")
        yield f"{stack}.attention.out", (f"{stack}.attn.to_out.0",)
        for number in (1, 2, 3):
            yield f"{stack}.feed_forward.w{number}", (f"{stack}.feed_forward.linear_{number}",)
        if stack != "context_refiner.0":
            yield f"{stack}.adaLN_modulation.1", (f"{stack}.norm1.linear",)
    yield from _renamed(
        {
            "cap_embedder.1": "time_caption_embed.caption_embedder.1",
            "final_layer.adaLN_modulation.1": "norm_out.linear_1",
            "final_layer.linear": "norm_out.linear_2",
        }
    )


def _lumina() -> nn.Module:
    return diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        ffn_dim_multiplier=1.0,
        cap_feat_dim=12,
        axes_dim_rope=(2, 2, 4),
        axes_lens=(8, 8, 8),
    )


def _z_image_layers() -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from _same("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1")
    for stack in ("noise_refiner.0", "context_refiner.0", "layers.0"):
        yield _qkv(f"{stack}.attention.qkv", f"{stack}.attention")
        yield f"{stack}.attention.out", (f"{stack}.attention.to_out.0",)
        yield from _same(*(f"{stack}.feed_forward.w{number}" for number in (1, 2, 3)))
        if stack != "context_refiner.0":
            yield from _same(f"{stack}.adaLN_modulation.0")
    yield from _renamed(
        {
            "x_embedder": "all_x_embedder.2-1",
            "final_layer.linear": "all_final_layer.2-1.linear",
            "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        }
    )


def _z_image() -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=12,
        axes_dims=[2, 2, 4],
        axes_lens=[8, 8, 8],
    )


_FINAL_NORM = frozenset({"final_layer.adaLN_modulation.1"})

#: By lycotool's name of the family.
TRANSFORMERS: Mapping[str, Denoiser] = {
    "flux1": Denoiser(_flux, diffusers.FluxPipeline, dict(_flux_layers()), _FINAL_NORM),
    "chroma": Denoiser(_chroma, diffusers.ChromaPipeline, dict(_chroma_layers())),
    "flux2": Denoiser(_flux2, diffusers.Flux2Pipeline, dict(_flux2_layers()), _FINAL_NORM),
    "hunyuan-video": Denoiser(_hunyuan, diffusers.HunyuanVideoPipeline, dict(_hunyuan_layers()), _FINAL_NORM),
    "sd3": Denoiser(
        _sd3,
        diffusers.StableDiffusion3Pipeline,
        dict(_sd3_layers()),
        # Of the context blocks the last has one scale and one shift, like the final layer.
        _FINAL_NORM | {"joint_blocks.1.context_block.adaLN_modulation.1"},
    ),
    "wan": Denoiser(_wan, diffusers.WanPipeline, dict(_wan_layers())),
    "qwen-image": Denoiser(_qwen, diffusers.QwenImagePipeline, dict(_qwen_layers())),
    "lumina2": Denoiser(_lumina, diffusers.Lumina2Pipeline, dict(_lumina_layers())),
    "z-image": Denoiser(_z_image, diffusers.ZImagePipeline, dict(_z_image_layers())),
}
