"""The name sd-scripts and LyCORIS give a layer: what `extract` writes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lycotool.models.naming import ANY, canonical, flat, split_name

#: What stands inside `text_model` in transformers' CLIP; the projection stands beside it.
_TEXT_MODEL = ("embeddings_", "encoder_", "final_layer_norm")


@dataclass(frozen=True, slots=True)
class KohyaNames:
    """kohya's names for the layers of one checkpoint.

    SD 1.x and 2.x adapters have diffusers' UNet names, SDXL's have the checkpoint's own
    (SGM) names, text encoders transformers' names; other models keep their own paths. With
    two text encoders they are ``lora_te1_`` and ``lora_te2_``, else ``lora_te_``.
    """

    two_text_encoders: bool

    @classmethod
    def of(cls, components: Iterable[str]) -> KohyaNames:
        """The names for a checkpoint with these components."""
        return cls("te2" in set(components))

    def name(self, component: str, layer_path: str) -> str:
        """The module name of a layer.

        Parameters
        ----------
        layer_path
            The layer's dotted path in the checkpoint, prefix included.
        """
        own = flat(split_name(layer_path).path)
        if component in ("te1", "te2"):
            number = component.removeprefix("te") if self.two_text_encoders else ""
            path = canonical(component, own)
            inside = "text_model_" if path.startswith(_TEXT_MODEL) else ""
            return f"lora_te{number}_{inside}{path}"
        if component in ("unet", ANY):
            return "lora_unet_" + (own if self.two_text_encoders else canonical("unet", own))
        return f"lora_{component}_{own}"
