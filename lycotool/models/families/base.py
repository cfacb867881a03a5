"""What a model family declares: its modules in each naming, its text encoders, its blocks.

A family is one frozen value in one file, data only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from lycotool.models.families.table import ModuleTable, Naming, Site


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A text encoder of a family, and what each program calls it.

    Parameters
    ----------
    table
        Its modules; ``diffusers`` there means transformers' naming without the outer
        ``text_model.`` of CLIP or ``model.`` of language models, ``native`` OpenCLIP's.
    inside
        The outer level that transformers 4 and every adapter file has, with its dot:
        ``text_model.`` for CLIP, empty for T5.
    kohya, diffusers, comfy
        Prefix of adapter modules: ``lora_te1_``, ``text_encoder.``,
        ``text_encoders.clip_l.transformer.``.
    beside
        Modules that stand beside ``inside``, not in it.
    """

    table: ModuleTable
    inside: str
    kohya: str
    diffusers: str
    comfy: str
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One kind of model that adapters are made for.

    Parameters
    ----------
    name
        What `inspect` prints: ``SDXL``.
    unet
        Modules of the denoiser, UNet or transformer.
    text_encoders
        By component, ``te1`` to ``te3``. Empty where no trainer is known to train one.
    kohya
        The naming that sd-scripts, musubi-tuner and LyCORIS' kohya module use for the
        denoiser of this family.
    diffusers_prefix
        ``unet.`` or ``transformer.``.
    beside
        Beginnings of paths in diffusers' naming that are components of their own there:
        they stand beside ``diffusers_prefix``, not under it.
    pointwise
        Endings of diffusers' paths, flattened, of layers that are 1x1 convolutions here and
        linear layers in families with the same names.
    partial
        Names that some program has for the first parts of a module: ending, ending of the
        module, number of parts.
    marks
        Pieces of flattened denoiser paths that no other family has.
    blocks
        Beginning of a flattened native path to block label (``IN{:02d}``), for layer-block
        weights; first match wins.
    metadata
        Beginnings of ``modelspec.architecture`` and ``ss_base_model_version`` for it.
    base_model_version, model_spec
        What adapters for it carry in these two entries; empty where the field has no custom.
    """

    name: str
    unet: ModuleTable
    text_encoders: Mapping[str, TextEncoder]
    kohya: Naming
    diffusers_prefix: str
    beside: tuple[str, ...] = ()
    pointwise: tuple[str, ...] = ()
    partial: tuple[tuple[str, str, int], ...] = ()
    marks: tuple[str, ...] = ()
    blocks: tuple[tuple[str, str], ...] = ()
    metadata: tuple[str, ...] = ()
    base_model_version: str = ""
    model_spec: str = ""

    def block(self, site: Site) -> str | None:
        """The label of the block a denoiser module is in; None outside of all blocks."""
        path = Site(site.rule, site.indices, None).path("native")
        if path is None:
            return None
        for beginning, label in self._block_patterns:
            if (match := beginning.match(path.replace(".", "_"))) is not None:
                return label.format(*map(int, match.groups()))
        return None

    @cached_property
    def _block_patterns(self) -> list[tuple[re.Pattern[str], str]]:
        return [(re.compile(path.replace("{}", r"(\d+)")), label) for path, label in self.blocks]
