"""Small adapters of every dialect, and what any such file changes, worked out a second time.

Prefixes, suffixes, scales and formulas are written here from the specification of the formats,
not from the package, in float64. Only the layers of a model family come from its tables.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lycotool.models.families import FAMILIES
from lycotool.models.families.table import Rule

Tensors = dict[str, Tensor]
Shape = tuple[int, ...]

#: Families whose trainers name the denoiser's modules as diffusers does; the others' as published.
_NAMED_AS_IN_DIFFUSERS = {"sd1", "sd2", "qwen-image", "z-image"}

UNETS = ("sd1", "sd2", "sdxl")

#: By family and component: prefixes in kohya's, diffusers' and ComfyUI's files.
_TEXT_ENCODERS: Mapping[str, Mapping[str, tuple[str, str, str]]] = {
    "sd1": {"te1": ("lora_te_", "text_encoder.", "text_encoders.clip_l.transformer.")},
    "sd2": {"te1": ("lora_te_", "text_encoder.", "text_encoders.clip_h.transformer.")},
    "sdxl": {
        "te1": ("lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer."),
        "te2": ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer."),
    },
    "flux1": {
        "te1": ("lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer."),
        "te2": ("lora_te3_", "text_encoder_2.", "text_encoders.t5xxl.transformer."),
    },
    "sd3": {
        "te1": ("lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer."),
        "te2": ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer."),
        "te3": ("lora_te3_", "text_encoder_3.", "text_encoders.t5xxl.transformer."),
    },
    "chroma": {"te1": ("lora_te3_", "text_encoder.", "text_encoders.t5xxl.transformer.")},
    "lumina2": {"te1": ("lora_te_", "text_encoder.", "text_encoders.gemma2_2b.transformer.model.")},
    "anima": {"te1": ("lora_te_", "text_encoder.", "text_encoders.qwen3_06b.transformer.model.")},
}
_TEXT_PATHS = {
    "clip": ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.1.mlp.fc1"),
    "t5": ("encoder.block.2.layer.0.SelfAttention.q", "encoder.block.0.layer.1.DenseReluDense.wo"),
    "model": ("layers.3.self_attn.k_proj", "layers.0.mlp.gate_proj"),
}

_PEFT = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "lora_up.bias": "lora_B.bias",
}


@dataclass(frozen=True)
class Manner:
    """How a dialect writes: names, suffixes, where the scale is.

    ``text`` counts the prefixes of :data:`_TEXT_ENCODERS`; None has no room for text encoders.
    ``scale`` says where ``c`` is: in alpha and the rank, nowhere, in the configuration of a
    folder, or in alpha alone.
    """

    naming: str
    unet: str
    transformer: str
    text: int | None = None
    dotted: bool = False
    suffixes: Mapping[str, str] | None = None
    scale: str = "alpha"
    magnitude: str = "dora_scale"
    families: tuple[str, ...] | None = None


MANNERS: Mapping[str, Manner] = {
    "networks.lora": Manner("kohya", "lora_unet_", "lora_unet_", text=0),
    "lycoris.kohya": Manner("kohya", "lora_unet_", "lora_unet_", text=0),
    "locon.locon_kohya": Manner("kohya", "lora_unet_", "lora_unet_", text=0, families=UNETS),
    "lycoris": Manner("diffusers", "lycoris_", "lycoris_"),
    "diffusers": Manner("diffusers", "unet.", "transformer.", 1, True, _PEFT, "none", "lora_magnitude_vector"),
    "diffusers-legacy": Manner("diffusers", "unet.", "", 1, True, {}, "none", families=UNETS),
    "peft": Manner(
        "diffusers", "base_model.model.", "base_model.model.", None, True, _PEFT, "config", "lora_magnitude_vector"
    ),
    "comfyui": Manner("comfy", "diffusion_model.", "diffusion_model.", 2, True),
    "onetrainer": Manner("diffusers", "lora_unet_", "lora_transformer_", text=0),
    "ai-toolkit": Manner("diffusers", "unet.", "transformer.", None, True, _PEFT, "none", "magnitude"),
    "bfl": Manner("native", "", "", None, True, _PEFT, "none", families=("flux1",)),
    "hcp": Manner(
        "diffusers", "", "", None, True,
        {"lora_down.weight": "___.layer.W_down", "lora_up.weight": "___.layer.W_up", "alpha": "___.alpha"},
        "alpha alone", families=UNETS,
    ),
    "kohya-oft": Manner("kohya", "oft_unet_", "oft_unet_"),
}  # fmt: skip


# --- layers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer of a model as published, with diffusers' paths of its rows.

    ``shape`` is that of the published weight; ``parts`` are diffusers' paths with the rows each
    has there; ``swapped`` says that diffusers has the halves of the rows in the other order.
    """

    family: str
    component: str
    native: str | None
    comfy: str | None
    parts: tuple[tuple[str, int], ...]
    shape: Shape
    swapped: bool = False

    @property
    def title(self) -> str:
        """A name for errors, and a seed."""
        return f"{self.family}/{self.component}/{self.native or self.parts[0][0]}/{self.shape}"

    @property
    def base(self) -> Tensor:
        """The published weight, in float64."""
        return normal(f"{self.title}/base", self.shape)

    def paths(self, naming: str) -> list[tuple[str, Tensor]]:
        """Its modules in a naming, each with the published rows that it has, in their order."""
        rows = torch.arange(self.shape[0])
        if naming == "kohya":
            naming = "diffusers" if self.family in _NAMED_AS_IN_DIFFUSERS else "native"
        if naming != "diffusers" and self.component == "unet":
            whole = self.comfy if naming == "comfy" and self.comfy else self.native
            return [] if whole is None else [(whole, rows)]
        if self.swapped:
            rows = rows.roll(self.shape[0] // 2)
        heights = [height for _, height in self.parts]
        return list(zip([path for path, _ in self.parts], rows.split(heights), strict=True))

    def modules(self, dialect: str) -> list[tuple[str, Tensor]]:
        """What a dialect calls its modules; none where it has no room for them."""
        manner = MANNERS[dialect]
        if self.component != "unet" and manner.text is None:
            return []
        return [(self._prefixed(manner, path), rows) for path, rows in self.paths(manner.naming)]

    def _prefixed(self, manner: Manner, path: str) -> str:
        if self.component != "unet" and manner.text is not None:
            prefix = _TEXT_ENCODERS[self.family][self.component][manner.text]
        else:
            prefix = manner.unet if self.family in UNETS else manner.transformer
            # A component of its own in diffusers' pipeline.
            if prefix == "transformer." and path.startswith("text_conditioner."):
                prefix = ""
        return prefix + (path if manner.dotted else path.replace(".", "_"))


def layers(family: str, *, unit: int = 8, columns: int = 10) -> list[Layer]:
    """One layer of every kind a family has, all of them narrow, and two of each text encoder."""
    kinds: dict[str, Rule] = {}
    for rule in FAMILIES[family].unet.rules:
        kinds.setdefault(re.sub(r"\d+", "#", f"{rule.native} {rule.diffusers}"), rule)
    found = [_layer(family, rule, unit, columns) for rule in kinds.values() if rule.diffusers]
    for component, prefixes in _TEXT_ENCODERS.get(family, {}).items():
        kind = "t5" if "t5xxl" in prefixes[2] else "clip" if "clip" in prefixes[2] else "model"
        found += [
            Layer(family, component, None, None, ((path, 3 * unit),), (3 * unit, columns))
            for path in _TEXT_PATHS[kind]
        ]
    return found


def _layer(family: str, rule: Rule, unit: int, columns: int) -> Layer:
    heights = [unit * share for share in rule.rows] if len(rule.diffusers) > 1 else [3 * unit]
    index = 4 if "{}" in str(rule.native) else None

    def path(pattern: str) -> str:
        return pattern if index is None else pattern.format(*[index] * pattern.count("{}"))

    whole = sum(heights)
    if rule.swaps_only_at_ratio:
        columns = whole // rule.swaps_only_at_ratio
    return Layer(
        family,
        "unet",
        None if rule.native is None else path(rule.native),
        None if rule.comfy is None else path(rule.comfy),
        tuple((path(name), height) for name, height in zip(rule.diffusers, heights, strict=True)),
        (whole, columns, *kernel_of(rule.diffusers[0]) * (family in UNETS)),
        rule.swaps_halves,
    )


def kernel_of(path: str) -> Shape:
    """The kernel of a layer of Stable Diffusion's UNets, by its name in diffusers."""
    if re.search(r"(?:^|\.)(?:conv_in|conv_out|conv1|conv2|conv)$", path):
        return (3, 3)
    return (1, 1) if path.endswith("conv_shortcut") else ()


# --- modules -------------------------------------------------------------------------------


def normal(name: str, shape: Shape) -> Tensor:
    """Normal values that depend on the arguments alone, exact in float32, in float64."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}{shape}".encode()))
    return torch.randn(shape, generator=generator).double()


#: Every form a module can have: its slots with their shapes, from the layer's sizes.
#: ``o`` rows, ``i`` columns, ``k`` the kernel, ``1`` as many ones, ``r`` the rank.
_FORMS: Mapping[str, Mapping[str, str]] = {
    "lora": {"lora_up.weight": "o r 1", "lora_down.weight": "r i k", "alpha": ""},
    "lora + bias": {"lora_up.weight": "o r 1", "lora_down.weight": "r i k", "alpha": "", "diff_b": "o"},
    "lora + up bias": {"lora_up.weight": "o r 1", "lora_down.weight": "r i k", "alpha": "", "lora_up.bias": "o"},
    "lora + dora (out)": {
        "lora_up.weight": "o r 1", "lora_down.weight": "r i k", "alpha": "", "dora_scale": "o 1x 1",
    },
    "lora + dora (in)": {
        "lora_up.weight": "o r 1", "lora_down.weight": "r i k", "alpha": "", "dora_scale": "1x i 1",
    },
    "lora + sparse": {
        "lora_up.weight": "o r 1", "lora_down.weight": "r i k", "alpha": "",
        "bias_indices": "sparse", "bias_values": "n", "bias_size": "sparse",
    },
    "lora (cp)": {"lora_up.weight": "o R 1", "lora_mid.weight": "R r k", "lora_down.weight": "r i 1", "alpha": ""},
    "lora (cp) + dora (out)": {
        "lora_up.weight": "o R 1", "lora_mid.weight": "R r k", "lora_down.weight": "r i 1", "alpha": "",
        "dora_scale": "o 1x 1",
    },
    "loha": {
        "hada_w1_a": "o r", "hada_w1_b": "r ik", "hada_w2_a": "o r", "hada_w2_b": "r ik", "alpha": "",
    },
    "loha + bias": {
        "hada_w1_a": "o r", "hada_w1_b": "r ik", "hada_w2_a": "o r", "hada_w2_b": "r ik", "alpha": "", "diff_b": "o",
    },
    "loha + dora (out)": {
        "hada_w1_a": "o r", "hada_w1_b": "r ik", "hada_w2_a": "o r", "hada_w2_b": "r ik", "alpha": "",
        "dora_scale": "o 1x 1",
    },
    "loha (cp)": {
        "hada_w1_a": "r o", "hada_w1_b": "r i", "hada_t1": "r r k",
        "hada_w2_a": "r o", "hada_w2_b": "r i", "hada_t2": "r r k", "alpha": "",
    },
    "lokr": {"lokr_w1": "O I", "lokr_w2_a": "b r", "lokr_w2_b": "r dk", "alpha": ""},
    "lokr (both)": {"lokr_w1_a": "O r", "lokr_w1_b": "r I", "lokr_w2_a": "b r", "lokr_w2_b": "r dk", "alpha": ""},
    "lokr (full)": {"lokr_w1": "O I", "lokr_w2": "b d k", "alpha": ""},
    "lokr (cp)": {"lokr_w1": "O I", "lokr_w2_a": "r b", "lokr_w2_b": "r d", "lokr_t2": "r r k", "alpha": ""},
    "full": {"diff": "o i k"},
    "full + bias": {"diff": "o i k", "diff_b": "o"},
    "bias": {"diff_b": "o"},
    "norm": {"w_norm": "o", "b_norm": "o"},
    "ia3 (out)": {"weight": "o", "on_input": "0"},
    "ia3 (in)": {"weight": "i", "on_input": "1"},
    "glora": {"a1.weight": "i r 1", "a2.weight": "r i 1", "b1.weight": "o r 1", "b2.weight": "r i k", "alpha": ""},
    "glora (old)": {
        "a1.weight": "r i 1", "a2.weight": "i r 1", "b1.weight": "r i k", "b2.weight": "o r 1", "alpha": "",
    },
    "diag-oft": {"oft_blocks": "B 4 4", "alpha": "0"},
    "diag-oft (bound)": {"oft_blocks": "B 4 4", "alpha": "bound"},
    "diag-oft (rescale)": {"oft_blocks": "B 4 4", "alpha": "0", "rescale": "o 1x 1"},
    "diag-oft (old)": {"oft_diag": "B 4 4"},
    "boft": {"oft_blocks": "2 B 4 4", "alpha": "0"},
    "tlora": {"q_layer.weight": "r i 1", "p_layer.weight": "o r 1", "lambda_layer": "1x r", "alpha": ""},
}  # fmt: skip

FORMS = tuple(_FORMS)

#: Forms that only layers with a kernel have, only layers without, and that take no matrix.
CP_FORMS = tuple(form for form in FORMS if "(cp)" in form)
VECTOR_FORMS = ("norm", "bias")
LINEAR_FORMS = ("tlora",)

#: What a LoKr's second factor and a rotation's blocks have: rows that every layer here divides into.
_BLOCK, _LOKR_ROWS, _LOKR_COLUMNS, _NONZERO = 4, 4, 5, 6


def module(form: str, shape: Shape, *, rank: int = 3, alpha: float | None = 1.5, seed: object = 0) -> Tensors:
    """The slots of one module for a layer of this shape, float32."""
    rows, columns, *kernel = shape
    volume = math.prod(kernel)
    sizes: dict[str, Shape] = {
        "o": (rows,), "i": (columns,), "k": tuple(kernel), "1": (1,) * len(kernel), "1x": (1,),
        "r": (rank,), "R": (rank + 1,), "ik": (columns * volume,), "n": (_NONZERO,),
        "O": (rows // _LOKR_ROWS,), "I": (columns // _LOKR_COLUMNS,), "b": (_LOKR_ROWS,),
        "d": (_LOKR_COLUMNS,), "dk": (_LOKR_COLUMNS * volume,),
        "B": (rows // _BLOCK,), "4": (_BLOCK,), "2": (2,),
    }  # fmt: skip
    slots: Tensors = {}
    for slot, axes in _FORMS[form].items():
        if slot == "alpha":
            value = {"": alpha, "0": 0.0, "bound": 0.5 / rows}[axes]
            slots |= {} if value is None else {slot: torch.tensor(value)}
        elif slot == "on_input":
            slots[slot] = torch.tensor(int(axes))
        elif slot == "bias_indices":
            where = torch.arange(_NONZERO)
            slots[slot] = torch.stack([where * 5 % rows, where * 7 % (columns * volume)]).short()
        elif slot == "bias_size":
            slots[slot] = torch.tensor([rows, columns * volume]).short()
        else:
            size = tuple(n for word in axes.split() for n in sizes[word])
            values = normal(f"{form}/{slot}/{seed}", size).float()
            slots[slot] = values.abs() + 0.5 if slot in ("dora_scale", "rescale") else values
    return slots


# --- what a module does --------------------------------------------------------------------


def rank_of(slots: Mapping[str, Tensor]) -> int | None:
    """The rank that ``c = alpha / rank`` is computed from."""
    if "b1.weight" in slots:
        a1, a2 = slots["a1.weight"], slots["a2.weight"]
        return a2.shape[0] if a1.shape[0] > a1.shape[1] else a2.shape[1]
    for slot in ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "q_layer.weight"):
        if slot in slots:
            return slots[slot].shape[0]
    return None


def weight_change(slots: Mapping[str, Tensor], scale: float, base: Tensor) -> Tensor:
    """``W' - W`` of one module, ``(rows, columns · kernel)``, by the formulas of the formats."""
    change = _plain_change({slot: tensor.double() for slot, tensor in slots.items()}, scale, base)
    change = change.reshape(base.shape)
    for slot in ("dora_scale", "lora_magnitude_vector", "magnitude"):
        if slot in slots:
            magnitude = slots[slot].double()
            axis = 1 if slot == "dora_scale" and magnitude.ndim > 1 and magnitude.shape[0] == 1 else 0
            others = [dim for dim in range(base.ndim) if dim != axis]
            v = base + change
            norm = v.square().sum(others, keepdim=True).sqrt()
            change = (
                magnitude.reshape([-1 if dim == axis else 1 for dim in range(base.ndim)]) * v / norm - base
            )
    return change.flatten(1)


def _plain_change(slots: Tensors, scale: float, base: Tensor) -> Tensor:
    flat = {slot: tensor.flatten(1) if tensor.ndim > 1 else tensor for slot, tensor in slots.items()}
    if "lora_down.weight" in slots:
        return scale * _lora(slots, flat)
    if "hada_w1_a" in slots:
        return scale * _half(slots, flat, "1") * _half(slots, flat, "2")
    if "lokr_w1" in slots or "lokr_w1_a" in slots:
        return scale * _lokr(slots, flat)
    if "diff" in slots:
        return slots["diff"]
    if "w_norm" in slots:
        return slots["w_norm"]
    if "on_input" in slots:
        axis = int(slots["on_input"])
        return slots["weight"].reshape([-1 if dim == axis else 1 for dim in range(base.ndim)]) * base
    if "b1.weight" in slots:
        left_a, right_a, left_b, right_b = (flat[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
        if left_a.shape[0] < left_a.shape[1]:
            left_a, right_a, left_b, right_b = right_a, left_a, right_b, left_b
        prompted = torch.einsum("oi..., ir, rj -> oj...", base, left_a, right_a)
        return scale * (prompted + (left_b @ right_b).reshape(base.shape))
    if "oft_blocks" in slots or "oft_diag" in slots:
        return _rotated(slots, base) - base
    if "p_layer.weight" in slots:
        p, q = flat["p_layer.weight"], flat["q_layer.weight"]
        u, s, v = np.linalg.svd(base.flatten(1).numpy(), full_matrices=False)
        start = torch.from_numpy((u[:, : len(q)] * s[: len(q)]) @ v[: len(q)])
        return scale * ((p * slots["lambda_layer"]) @ q - start)
    return torch.zeros_like(base)


def _lora(slots: Tensors, flat: Tensors) -> Tensor:
    up, down = flat["lora_up.weight"], flat["lora_down.weight"]
    if "lora_mid.weight" in slots:
        return torch.einsum("pq..., op, qi -> oi...", slots["lora_mid.weight"], up, down).flatten(1)
    change = up @ down
    if "bias_values" in slots:
        rows, columns = slots["bias_indices"].long()
        change[rows, columns] += slots["bias_values"]
    return change


def _half(slots: Tensors, flat: Tensors, number: str) -> Tensor:
    first, second = flat[f"hada_w{number}_a"], flat[f"hada_w{number}_b"]
    if f"hada_t{number}" in slots:
        return torch.einsum("pq..., po, qi -> oi...", slots[f"hada_t{number}"], first, second).flatten(1)
    return first @ second


def _lokr(slots: Tensors, flat: Tensors) -> Tensor:
    first = slots["lokr_w1"] if "lokr_w1" in slots else slots["lokr_w1_a"] @ slots["lokr_w1_b"]
    if "lokr_w2" in slots:
        second = flat["lokr_w2"]
    elif "lokr_t2" in slots:
        second = torch.einsum(
            "pq..., pb, qd -> bd...", slots["lokr_t2"], flat["lokr_w2_a"], flat["lokr_w2_b"]
        )
    else:
        second = flat["lokr_w2_a"] @ flat["lokr_w2_b"]
    return torch.from_numpy(np.kron(first.numpy(), second.flatten(1).numpy()))


def _rotated(slots: Tensors, base: Tensor) -> Tensor:
    """The rotated weight: Diag-OFT turns by ``Rᵀ``, BOFT by every stage's ``R``."""
    rows = base.flatten(1)
    if "oft_diag" in slots:
        rows = torch.block_diag(*slots["oft_diag"]).T @ rows
    else:
        blocks = slots["oft_blocks"]
        turn = blocks - blocks.mT
        bound = float(slots.get("alpha", torch.tensor(0.0))) * len(rows)
        if 0 < bound < turn.norm():
            turn = turn * (bound / turn.norm())
        eye = torch.eye(_BLOCK, dtype=torch.float64)
        turns = (eye + turn) @ torch.linalg.inv(eye - turn)
        if blocks.ndim == 3:
            rows = torch.block_diag(*turns).T @ rows
        else:
            for stage, stage_turns in enumerate(turns):
                # "(c g k) i -> (c k g) i" with g = 2 halves that lie k rows apart
                k = 2**stage * _BLOCK // 2
                order = torch.arange(len(rows)).reshape(-1, 2, k).mT.flatten()
                rows = (torch.block_diag(*stage_turns) @ rows[order])[order.argsort()]
    if "rescale" in slots:
        rows = slots["rescale"].reshape(-1, 1) * rows
    return rows.reshape(base.shape)


def bias_change(slots: Mapping[str, Tensor], scale: float, rows: int) -> Tensor:
    """The change of the bias of one module."""
    total = torch.zeros(rows, dtype=torch.float64)
    for slot, factor in (("diff_b", 1.0), ("b_norm", 1.0), ("lora_up.bias", scale)):
        if slot in slots:
            total += factor * slots[slot].double()
    return total


# --- whole files ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """An adapter as it lies on the disk."""

    tensors: Tensors
    metadata: Mapping[str, str]
    config: Mapping[str, object]


def contents(path: Path) -> Contents:
    """A file, or the two files of a PEFT folder."""
    weights = path / "adapter_model.safetensors" if path.is_dir() else path
    config = json.loads((path / "adapter_config.json").read_text()) if path.is_dir() else {}
    with safe_open(weights, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        return Contents(tensors, file.metadata() or {}, config)


def key_of(dialect: str, name: str, slot: str) -> str:
    """The key of a module's slot in a dialect."""
    manner = MANNERS[dialect]
    if slot in ("dora_scale", "lora_magnitude_vector", "magnitude"):
        return f"{name}.{manner.magnitude}"
    if dialect == "diffusers-legacy" and slot in ("lora_up.weight", "lora_down.weight"):
        side = slot.removeprefix("lora_")
        if match := re.fullmatch(r"(.*\.attn\d)\.to_(q|k|v|out)(?:\.0)?", name):
            return f"{match[1]}.processor.to_{match[2]}_lora.{side}"
        if match := re.fullmatch(r"(.*\.self_attn)\.(q|k|v|out)_proj", name):
            return f"{match[1]}.to_{match[2]}_lora.{side}"
        if re.search(r"\.mlp\.fc\d$", name):
            return f"{name}.lora_linear_layer.{side}"
        return f"{name}.lora.{side}"
    return f"{name}.{(manner.suffixes or {}).get(slot, slot)}"


#: Every slot a module of a file may have, however its dialect calls it.
_SLOTS = {slot for form in _FORMS.values() for slot in form}


def slots_in(file: Contents, dialect: str, name: str) -> dict[str, str]:
    """The slots that a file has of a module, and their keys."""
    magnitude = MANNERS[dialect].magnitude
    keys = {magnitude if slot == "dora_scale" else slot: key_of(dialect, name, slot) for slot in _SLOTS}
    return {slot: key for slot, key in keys.items() if key in file.tensors}


def scale_of(file: Contents, dialect: str, name: str, slots: Mapping[str, Tensor]) -> float:
    """``c`` of a module as its trainers take it: twice in the old layout of GLoRA."""
    rank, kind = rank_of(slots), MANNERS[dialect].scale
    if kind == "config":
        return _peft_scale(file.config, name.removeprefix("base_model.model."))
    if rank is None:
        return 1.0
    if "alpha" not in slots:
        return 1.0
    scale = float(slots["alpha"]) / (1 if kind == "alpha alone" else rank)
    is_old_glora = "b1.weight" in slots and slots["b1.weight"].shape[0] == rank
    return scale**2 if is_old_glora else scale


def _peft_scale(config: Mapping[str, object], path: str) -> float:
    """As PEFT finds it: the first pattern that the end of the path matches."""

    def looked_up(patterns: object, default: object) -> float:
        assert isinstance(patterns, dict)
        found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path))
        return float(next(found, default))

    alpha = looked_up(config["alpha_pattern"], config.get("lora_alpha", config.get("alpha")))
    return alpha / looked_up(config["rank_pattern"], config["r"])


@dataclass(frozen=True)
class Effect:
    """What a file does to one published layer: weight and bias, in float64."""

    weight: Tensor
    bias: Tensor

    def distance(self, other: Effect) -> float:
        """The difference of two effects, relative to this one."""
        lost = (self.weight - other.weight).square().sum() + (self.bias - other.bias).square().sum()
        size = self.weight.square().sum() + self.bias.square().sum()
        return math.sqrt(lost / size) if size else math.inf if lost else 0.0


def effects(path: Path, dialect: str, known: Iterable[Layer]) -> dict[str, Effect]:
    """What a file does to every layer that it changes, each key of it accounted for."""
    file = contents(path)
    left = set(file.tensors)
    found: dict[str, Effect] = {}
    for layer in known:
        weight = torch.zeros(layer.shape, dtype=torch.float64).flatten(1)
        bias = torch.zeros(layer.shape[0], dtype=torch.float64)
        touched = False
        for name, rows in layer.modules(dialect):
            keys = slots_in(file, dialect, name)
            if not keys:
                continue
            assert left.issuperset(keys.values()), f"{name} is there twice"
            left -= set(keys.values())
            slots = {slot: file.tensors[key] for slot, key in keys.items()}
            scale = scale_of(file, dialect, name, slots)
            vector = "w_norm" in slots
            base = layer.base[rows, 0] if vector else layer.base[rows]
            change = weight_change(slots, scale, base) if not vector else slots["w_norm"].double()[:, None]
            weight[rows] = change
            bias[rows] = bias_change(slots, scale, len(rows))
            touched = True
        if touched:
            found[layer.title] = Effect(weight, bias)
    assert not left, f"unexpected keys: {sorted(left)}"
    return found


def tensors_of(
    dialect: str,
    chosen: Mapping[Layer, str],
    *,
    rank: int = 3,
    alpha: float | None = 1.5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensors:
    """The tensors of an adapter in a dialect, with one form on every module of each layer.

    ``alpha`` is left out where the dialect has none; ``c`` is 1 then, or what the folder's
    configuration says.
    """
    manner = MANNERS[dialect]
    tensors: Tensors = {}
    for layer, form in chosen.items():
        for name, rows in layer.modules(dialect):
            has_alpha = manner.scale in ("alpha", "alpha alone") or not form.startswith("lora")
            stored = alpha if has_alpha and manner.scale != "config" else None
            shape = (len(rows), *layer.shape[1:])
            for slot, tensor in module(form, shape, rank=rank, alpha=stored, seed=(name, seed)).items():
                value = tensor.to(dtype) if tensor.is_floating_point() else tensor
                if slot == "dora_scale" and manner.magnitude != slot:
                    conv = layer.shape[2:] and manner.magnitude == "lora_magnitude_vector"
                    value = value.reshape(1, -1, *[1] * len(layer.shape[2:])) if conv else value.flatten()
                tensors[key_of(dialect, name, slot)] = value
    return tensors


def save(
    path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None, config: object = None
) -> Path:
    """Write a file, or with a configuration a PEFT folder."""
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    if config is None:
        save_file(whole, path, dict(metadata or {}) or None)
        return path
    path.mkdir()
    save_file(whole, path / "adapter_model.safetensors", dict(metadata or {}) or None)
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
