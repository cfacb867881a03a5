"""How programs write adapter files: one value per dialect, data only.

A dialect is what the modules are called (prefix, naming, separator), what their tensors are
called (suffixes), how the scale is told, and what its readers understand. Which of a model's
names "native" and "diffusers" are is data of :mod:`lycotool.models.families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

#: The naming of the denoiser's modules. ``kohya`` is what sd-scripts uses for the family.
DialectNaming = Literal["kohya", "native", "diffusers", "comfy"]

#: Which program's prefixes a text encoder's modules have.
TextPrefix = Literal["kohya", "diffusers", "comfy"]

#: How ``c`` is told: by a stored alpha, not at all (it is in the up factor), by PEFT's
#: configuration, or by a stored alpha that is ``c`` itself.
Alpha = Literal["stored", "folded", "config", "is the scale"]

#: Names of the registry's algorithms whose file is a plain LoRA.
_LORA = frozenset({"lora", "dylora"})

_EVERYTHING = frozenset({
    "lora", "dylora", "loha", "lokr", "ia3", "full", "norm", "glora", "diag-oft", "boft", "tlora",
})  # fmt: skip

#: What sd-scripts' networks do not train in a UNet, in diffusers' naming: its layers outside of
#: the blocks. They look into attentions, resnets, down- and upsamplers.
_OUTSIDE_BLOCKS = ("conv_in", "conv_out", "time_embedding.", "add_embedding.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One way of writing adapters.

    Parameters
    ----------
    name
        What ``--to`` and ``--from`` call it.
    title
        Whose it is, for help and reports.
    naming
        Naming of the denoiser's modules.
    denoiser
        Prefix of the denoiser's modules; None is the one diffusers gives the family
        (``unet.`` or ``transformer.``).
    transformer
        Prefix where the denoiser is a transformer and that has another one.
    text
        Whose prefixes text encoders have; None where the dialect has no room for them.
    dotted
        Whether names keep their dots.
    suffixes
        Canonical slot to the suffix written; others are written as they are.
    infix
        What stands between a module's name and the suffix beside the dot.
    respelled
        Patterns on whole keys and what replaces them, for modules with suffixes of their own.
    alpha
        How the scale is told.
    algorithms
        Names of the registry's algorithms that readers of this dialect understand.
    use_conv_cp
        Whether they understand a CP core.
    sparse
        Whether they understand LyCORIS' sparse remainder.
    unread
        Slots that its readers ignore or fail on, whatever the algorithm.
    dora_axes
        Axes of DoRA they understand.
    dora_slot
        What the magnitude is called.
    bias_slot
        What the change of a LoRA's bias is called: ``diff_b``, or ``lora_up.bias`` which is
        scaled like the weight; None where readers know neither.
    one_kind
        Whether readers configure all modules of a component alike: a bias change or DoRA on
        one is looked for on all.
    embeddings
        Whether textual inversions (``bundle_emb``) may be carried along.
    is_folder
        Whether it is a folder with a configuration rather than a file.
    families
        Short names of the model families it exists for; None is all.
    unknown_modules
        Beginnings of a UNet's paths in diffusers' naming that its network does not have.
    network_module
        ``ss_network_module`` of files it writes.
    """

    name: str
    title: str
    naming: DialectNaming
    denoiser: str | None
    transformer: str | None = None
    text: TextPrefix | None
    dotted: bool
    suffixes: Mapping[str, str]
    infix: str = ""
    respelled: tuple[tuple[str, str], ...] = ()
    alpha: Alpha
    algorithms: frozenset[str]
    use_conv_cp: bool = False
    sparse: bool = False
    unread: frozenset[str] = frozenset()
    dora_axes: frozenset[str] = frozenset()
    dora_slot: str = "dora_scale"
    bias_slot: str | None = None
    one_kind: bool = False
    embeddings: bool = False
    is_folder: bool = False
    families: frozenset[str] | None = None
    unknown_modules: tuple[str, ...] = ()
    network_module: str = ""


_PEFT_SUFFIXES = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "lora_up.bias": "lora_B.bias",
}
_BOTH_AXES = frozenset({"out", "in"})
_UNETS = frozenset({"sd1", "sd2", "sdxl"})

DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            name="networks.lora",
            title="sd-scripts and musubi-tuner",
            naming="kohya",
            denoiser="lora_unet_",
            text="kohya",
            dotted=False,
            suffixes={},
            alpha="stored",
            algorithms=_LORA,
            unknown_modules=_OUTSIDE_BLOCKS,
            network_module="networks.lora",
        ),
        Dialect(
            name="lycoris.kohya",
            title="LyCORIS",
            naming="kohya",
            denoiser="lora_unet_",
            text="kohya",
            dotted=False,
            suffixes={},
            alpha="stored",
            algorithms=_EVERYTHING,
            use_conv_cp=True,
            sparse=True,
            dora_axes=_BOTH_AXES,
            bias_slot="diff_b",
            embeddings=True,
            network_module="lycoris.kohya",
        ),
        Dialect(
            name="locon.locon_kohya",
            title="LoCon before LyCORIS",
            naming="kohya",
            denoiser="lora_unet_",
            text="kohya",
            dotted=False,
            suffixes={},
            alpha="stored",
            algorithms=_LORA,
            families=_UNETS,
            unknown_modules=_OUTSIDE_BLOCKS,
            network_module="locon.locon_kohya",
        ),
        Dialect(
            name="lycoris",
            title="LyCORIS' wrapper, SimpleTuner",
            naming="diffusers",
            denoiser="lycoris_",
            text=None,
            dotted=False,
            suffixes={},
            alpha="stored",
            algorithms=_EVERYTHING,
            use_conv_cp=True,
            sparse=True,
            dora_axes=_BOTH_AXES,
            bias_slot="diff_b",
        ),
        Dialect(
            name="diffusers",
            title="diffusers",
            naming="diffusers",
            denoiser=None,
            text="diffusers",
            dotted=True,
            suffixes=_PEFT_SUFFIXES,
            alpha="folded",
            algorithms=_LORA,
            dora_axes=frozenset({"out"}),
            dora_slot="lora_magnitude_vector",
            bias_slot="lora_up.bias",
            one_kind=True,
        ),
        Dialect(
            name="diffusers-legacy",
            title="diffusers before 0.22 (attention processors)",
            naming="diffusers",
            denoiser="unet.",
            text="diffusers",
            dotted=True,
            suffixes={"lora_down.weight": "lora.down.weight", "lora_up.weight": "lora.up.weight"},
            respelled=(
                (r"\.(attn\d)\.to_(q|k|v)\.lora\.", r".\1.processor.to_\2_lora."),
                (r"\.(attn\d)\.to_out\.0\.lora\.", r".\1.processor.to_out_lora."),
                (r"\.self_attn\.(q|k|v|out)_proj\.lora\.", r".self_attn.to_\1_lora."),
                (r"\.mlp\.(fc[12])\.lora\.", r".mlp.\1.lora_linear_layer."),
            ),
            alpha="folded",
            algorithms=_LORA,
            families=_UNETS,
        ),
        Dialect(
            name="peft",
            title="PEFT (a folder)",
            naming="diffusers",
            denoiser="base_model.model.",
            text=None,
            dotted=True,
            suffixes=_PEFT_SUFFIXES,
            alpha="config",
            algorithms=_LORA | {"loha"},  # LoKr's shapes follow from options that no file tells
            dora_axes=frozenset({"out"}),
            dora_slot="lora_magnitude_vector",
            is_folder=True,
        ),
        Dialect(
            name="comfyui",
            title="ComfyUI",
            naming="comfy",
            denoiser="diffusion_model.",
            text="comfy",
            dotted=True,
            suffixes={},
            alpha="stored",
            algorithms=_EVERYTHING - {"ia3", "tlora"},
            use_conv_cp=True,
            unread=frozenset({"oft_diag", "rescale"}),
            dora_axes=_BOTH_AXES,
            bias_slot="diff_b",
        ),
        Dialect(
            name="onetrainer",
            title="OneTrainer",
            naming="diffusers",
            denoiser="lora_unet_",
            transformer="lora_transformer_",
            text="kohya",
            dotted=False,
            suffixes={},
            alpha="stored",
            algorithms=_LORA | {"loha"},
            dora_axes=_BOTH_AXES,
            embeddings=True,
        ),
        Dialect(
            name="ai-toolkit",
            title="ai-toolkit, for transformers",
            naming="diffusers",
            denoiser=None,
            text=None,
            dotted=True,
            suffixes=_PEFT_SUFFIXES,
            alpha="folded",
            algorithms=_LORA | {"lokr", "full"},
            dora_axes=frozenset({"out"}),
            dora_slot="magnitude",
        ),
        Dialect(
            name="bfl",
            title="Black Forest Labs' Flux tools",
            naming="native",
            denoiser="",
            text=None,
            dotted=True,
            suffixes=_PEFT_SUFFIXES,
            alpha="folded",
            algorithms=_LORA,
            bias_slot="lora_up.bias",
            families=frozenset({"flux1"}),
        ),
        Dialect(
            name="hcp",
            title="HCP-Diffusion",
            naming="diffusers",
            denoiser="",
            text=None,
            dotted=True,
            suffixes={"lora_down.weight": "layer.W_down", "lora_up.weight": "layer.W_up"},
            infix="___.",
            alpha="is the scale",
            algorithms=_LORA,
            families=_UNETS,
        ),
        Dialect(
            name="kohya-oft",
            title="sd-scripts' OFT",
            naming="kohya",
            denoiser="oft_unet_",
            text=None,
            dotted=False,
            suffixes={},
            alpha="stored",
            algorithms=frozenset({"diag-oft"}),
            unread=frozenset({"oft_diag", "rescale"}),
            unknown_modules=_OUTSIDE_BLOCKS,
            network_module="networks.oft",
        ),
    )
}
