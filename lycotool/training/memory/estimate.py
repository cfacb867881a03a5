"""How much of a GPU's memory a training takes, before it is tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.training.kernels.install import are_usable
from lycotool.training.memory.activations import encoding_bytes, step_bytes
from lycotool.training.memory.tracker import blocks
from lycotool.training.optimizers.flat import padded
from lycotool.training.optimizers.state_size import state_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lycotool.lazy import torch
    from lycotool.training.data.options import Size
    from lycotool.training.setup import Trainable

#: What libraries take for themselves through torch's allocator: cuBLAS 32 MiB for each of its two
#: handles on recent GPUs, cuDNN's working space of convolutions. The context of CUDA is not in it,
#: and not in what is free either.
WORKSPACE = 160 * 2**20


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on the device at the fullest moment, by what takes them.

    Attributes
    ----------
    base
        Frozen weights that stay while training: of the UNet, and of text encoders and VAE
        where these are at work.
    parameters, gradients, optimizer
        Of the adapters.
    activations
        What the largest batch keeps for its gradient, and scratch space.
    caches
        Latents that are held on the device.
    workspace
        Of libraries: an assumption, :data:`WORKSPACE`.
    encoding
        The fullest moment before training, where networks come one after another: images through the VAE, mostly.
    total
        The larger of the two moments.
    gradient_checkpointing
        Whether it is of blocks that are computed again.
    """

    base: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    caches: int
    workspace: int
    encoding: int
    total: int
    gradient_checkpointing: bool


def estimate_memory(ready: Trainable, *, checkpoint: bool) -> MemoryEstimate:
    """Count weights, parameters, gradients and states; run the step and the VAE without numbers.

    The optimizer's own scratch space lies where the activations were, and is not counted.
    """
    base, options = ready.base, ready.options
    parameters = [parameter for parameter in ready.network.parameters() if parameter.requires_grad]
    trained = sum(padded(parameter.numel()) * parameter.element_size() for parameter in parameters)
    fused = options.optimizer.fused_backward
    optimizer = state_bytes(
        options.optimizer.optimizer,
        options.optimizer.optimizer_arg,
        [tuple(parameter.shape) for parameter in parameters],
        parameters[0].dtype,
    )
    if options.compute.shard_optimizer:
        optimizer = -(-optimizer // ready.world.size)
    network = sum(buffer.nbytes for buffer in ready.network.buffers())
    staying = [
        base.unet,
        *(base.text_encoders if ready.keeps_text else ()),
        *([base.vae] if ready.keeps_vae else ()),
    ]
    weights = sum(map(frozen_bytes, staying)) + network
    caches = _latent_bytes(ready)
    (size, batch) = max(_batches(ready), key=lambda shape: shape[0][0] * shape[0][1] * shape[1])
    step = step_bytes(
        base, ready.network, size, batch,
        tokens=options.data.max_token_length, trained=ready.lrs, checkpoint=checkpoint, fused_backward=fused,
        kernels=options.compute.triton and are_usable(ready.device, base.unet_dtype),
    )  # fmt: skip
    while_encoding = encoding_bytes(
        base, max(ready.dataset.buckets, key=lambda key: key[1][0] * key[1][1])[1]
    )
    gradients = max(parameter.nbytes for parameter in parameters) if fused else trained
    kept = weights + trained + gradients + optimizer + caches + WORKSPACE
    if ready.keeps_vae:
        step = max(step, while_encoding)
    texts = sum(map(frozen_bytes, base.text_encoders))
    encoding = trained + caches + WORKSPACE + max(frozen_bytes(base.vae) + while_encoding, texts)
    return MemoryEstimate(
        base=weights,
        parameters=trained,
        gradients=gradients,
        optimizer=optimizer,
        activations=step,
        caches=caches,
        workspace=WORKSPACE,
        encoding=encoding,
        total=max(kept + step, encoding),
        gradient_checkpointing=checkpoint,
    )


def frozen_bytes(model: torch.nn.Module) -> int:
    """Bytes of a network's weights, adapters not among them."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return sum(blocks(tensor.nbytes) for tensor in (*frozen, *model.buffers()))


def _batches(ready: Trainable) -> Iterable[tuple[Size, int]]:
    """Size and number of images of the largest batch of every bucket."""
    for (group, size), count in ready.dataset.buckets.items():
        yield size, min(count, ready.dataset.batch_size_of(group))


def _latent_bytes(ready: Trainable) -> int:
    """Mean and deviation of every image, and of its mirror image where that is used."""
    if ready.options.data.cache_latents != "memory":
        return 0
    base = ready.base
    datasets = [ready.dataset, *([] if ready.dataset.validation is None else [ready.dataset.validation])]
    total = 0
    for dataset in datasets:
        for index, example in enumerate(dataset.examples):
            options = dataset.options_of(index)
            if not options.random_crop:
                width, height = (side // base.pixels_per_latent for side in example.bucket)
                one = blocks(4 * base.vae.config.latent_channels * width * height)
                total += 2 * one * (1 + options.flip_aug)
    return total
