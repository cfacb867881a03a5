"""How much memory a training takes, before it is tried."""

from __future__ import annotations

from dataclasses import dataclass

from lycotool.training.setup import Trainable

#: Bytes of activations of one image at so many pixels: SD 1.x and SDXL with LoRA on every layer,
#: in 16 bits on one H100 (the difference between batch sizes 8 and 1, and 2 and 1).
_MEASURED = {
    "sd1": (0.96 * 2**30, 512 * 512),
    "sd2": (0.96 * 2**30, 512 * 512),
    "sdxl": (6.7 * 2**30, 1024 * 1024),
}

#: Parameters of the UNets that was measured with.
_UNET_PARAMETERS = {"sd1": 859.5e6, "sd2": 865.9e6, "sdxl": 2567e6}

#: What gradient checkpointing leaves of them: SDXL 13.0 GiB to 6.5 with 5.1 GiB of weights.
_CHECKPOINTED = 0.2

#: Tensors of the parameters' size an optimizer keeps; a guess for others.
_MOMENTS = {
    "adamw": 2.0,
    "lion": 1.0,
    "prodigy": 4.0,
    "sgd": 0.0,
    "sgdnesterov": 1.0,
    "adafactor": 0.1,
    "adamw8bit": 0.5,
}


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on the device, by what takes them.

    Attributes
    ----------
    activations
        Of the largest batch, from measurements at real size; the rest is counted.
    """

    base: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.base + self.parameters + self.gradients + self.optimizer + self.activations


def estimate_memory(ready: Trainable) -> MemoryEstimate:
    """Count weights, parameters and optimizer state; estimate activations.

    Activations grow with the images of a batch, their area, the bytes of a number, and the
    width of the model, which is the root of its parameters.
    """
    base, options = ready.base, ready.options
    trained = sum(row.parameters for row in ready.network.table())
    models = [base.unet, base.vae, *base.text_encoders]
    weights = sum(
        p.numel() * p.element_size() for model in models for p in model.parameters() if not p.requires_grad
    )
    unet = sum(p.numel() for p in base.unet.parameters() if not p.requires_grad)
    per_image, area = _MEASURED[base.family]
    pixels = max(
        width * height * min(count, ready.dataset.batch_size_of(group))
        for (group, (width, height)), count in ready.dataset.buckets.items()
    )
    width = (unet / _UNET_PARAMETERS[base.family]) ** 0.5
    activations = per_image * pixels / area * width * (2 if options.compute.precision == "fp32" else 1)
    if options.compute.gradient_checkpointing:
        activations *= _CHECKPOINTED
    moments = _MOMENTS.get(options.optimizer.optimizer.lower(), 2.0)
    return MemoryEstimate(weights, 4 * trained, 4 * trained, int(4 * trained * moments), int(activations))
