"""Which model an adapter was made for, from its module names and a few widths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from lycotool.models.naming import split_name


@dataclass(frozen=True, slots=True)
class Guess:
    """An architecture and the evidence for it."""

    name: str
    evidence: str


#: Width of the text context cross-attention reads -> family, for the SD UNet.
_CONTEXT_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}

#: A piece of a canonical denoiser path -> family. First match wins.
_MARKS: tuple[tuple[str, str], ...] = (
    ("joint_blocks_", "SD 3"),
    ("double_stream_modulation", "Flux.2"),
    ("distilled_guidance_layer", "Chroma"),
    ("img_attn_qkv", "Flux.1 or HunyuanVideo"),
    ("double_blocks_", "Flux.1"),
    ("single_transformer_blocks_", "Flux.1 (diffusers)"),
    ("img_mlp_net_", "Qwen-Image"),
    ("llm_adapter", "Anima"),
    ("noise_refiner_", "Z-Image or Lumina 2"),
    ("feed_forward_w1", "Z-Image or Lumina 2"),
    ("cross_attn_k_img", "Wan"),
    ("_ffn_0", "Wan"),
)

_METADATA_NAMES: tuple[tuple[str, str], ...] = (
    ("sdxl", "SDXL"),
    ("stable-diffusion-xl", "SDXL"),
    ("sd_v1", "SD 1.x"),
    ("stable-diffusion-v1", "SD 1.x"),
    ("sd_v2", "SD 2.x"),
    ("stable-diffusion-v2", "SD 2.x"),
)


def guess_architecture(
    modules: Iterable[str], input_widths: Mapping[str, int], metadata: Mapping[str, str]
) -> Guess:
    """Guess from module names first, then widths, then metadata.

    Parameters
    ----------
    modules
        Adapter module names.
    input_widths
        Input width by module name, where the tensors tell it.
    metadata
        The file's metadata.
    """
    places, paths, marked = _placed(tuple(modules))
    if marked is not None:
        return marked
    if any("transformer_blocks_0_attn" in path and "blocks_" in path for path in paths):
        for name, (_, path) in places.items():
            if path.endswith("attn2_to_k") and input_widths.get(name) in _CONTEXT_WIDTHS:
                width = input_widths[name]
                return Guess(_CONTEXT_WIDTHS[width], f"cross-attention width {width}")
    if any(component == "te2" for component, _ in places.values()) or any(
        path.startswith(("down_blocks_2_attentions_0_transformer_blocks_9", "add_embedding"))
        for path in paths
    ):
        return Guess("SDXL", "a second text encoder, or ten transformer layers in one block")
    said = metadata.get("modelspec.architecture", "") or metadata.get("ss_base_model_version", "")
    for start, family in _METADATA_NAMES:
        if said.startswith(start):
            return Guess(family, f"metadata says {said}")
    if said:
        return Guess(said, "metadata")
    if any(path.startswith(("down_blocks_", "up_blocks_", "mid_block_")) for path in paths):
        return Guess("SD UNet", "block names")
    return Guess("unknown", "no known module names")


@lru_cache(maxsize=16)
def _placed(names: tuple[str, ...]) -> tuple[dict[str, tuple[str, str]], list[str], Guess | None]:
    """Where modules are, their paths outside text encoders, and what these paths alone tell.

    Once for files with the same modules; a folder has many of those.
    """
    places = {name: split_name(name).place for name in names}
    paths = [path for component, path in places.values() if component not in ("te1", "te2", "te3")]
    for mark, family in _MARKS:
        if any(mark in path for path in paths):
            return places, paths, Guess(family, f"module names with {mark.strip('_')}")
    return places, paths, None


#: Text-encoder prefixes of single-file checkpoints -> family.
_CHECKPOINT_PREFIXES: tuple[tuple[str, str], ...] = (
    ("conditioner.embedders.1.", "SDXL"),
    ("conditioner.embedders.0.", "SDXL refiner"),
    ("cond_stage_model.model.", "SD 2.x"),
    ("cond_stage_model.transformer.", "SD 1.x"),
)


def guess_checkpoint(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> Guess:
    """Guess a checkpoint's architecture from its keys, then as :func:`guess_architecture`."""
    for prefix, family in _CHECKPOINT_PREFIXES:
        if any(key.startswith(prefix) for key in shapes):
            return Guess(family, f"keys under {prefix.rstrip('.')}")
    weights = {key.removesuffix(".weight"): shape for key, shape in shapes.items() if key.endswith(".weight")}
    widths = {path: shape[1] for path, shape in weights.items() if len(shape) > 1}
    return guess_architecture(weights, widths, metadata)
