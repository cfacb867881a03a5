"""What a step, an encoding or a decoding takes besides the weights, by running it on the meta device."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from lycotool.lazy import torch
from lycotool.training.bases.images import encode_images
from lycotool.training.bases.model import BaseModel
from lycotool.training.bases.predict import predict
from lycotool.training.bases.text import WINDOW, Conditioning, encode_text
from lycotool.training.checkpointing import checkpointing
from lycotool.training.kernels.meta import installed
from lycotool.training.memory.shadow import on_meta
from lycotool.training.memory.tracker import Tracker, flash_attention
from lycotool.training.network import Network

if TYPE_CHECKING:
    from torch import Tensor

#: Prompt states besides the window's first and last.
_INNER = WINDOW - 2


def step_bytes(
    base: BaseModel,
    network: Network,
    size: tuple[int, int],
    batch: int,
    *,
    tokens: int,
    trained: Collection[str],
    checkpoint: bool,
    fused_backward: bool = False,
    kernels: bool = False,
) -> int:
    """Most bytes alive in one step, without weights, parameters and their gradients.

    Without checkpointing that is what the forward pass has made at its end, all that is kept for
    the gradient, so the backward pass is not run.

    Parameters
    ----------
    size
        Width and height in pixels.
    batch
        Images.
    tokens
        Of a caption: 75, 150 or 225.
    trained
        Components with adapters.
    checkpoint
        Whether blocks are computed again for the gradient.
    kernels
        Whether the UNet's norms and gates are our own kernels.
    fused_backward
        Whether a parameter's gradient is there only until it is complete.
    """
    windows = tokens // _INNER
    width, height = (side // base.pixels_per_latent for side in size)
    meta = torch.device("meta")
    there = replace(base, device=meta)
    is_training = network.training
    with ExitStack() as stack:
        stack.enter_context(checkpointing(base, trained, enabled=checkpoint))
        models = [base.unet, network, *(base.text_encoders if _texts(trained) else ())]
        known = stack.enter_context(on_meta(*models, channels_last=base.device.type != "cpu"))
        if kernels:
            stack.enter_context(installed(base.unet))
        network.train()
        stack.callback(network.train, is_training)
        network.draw(0)
        for parameter in network.parameters():
            if fused_backward:
                parameter.register_post_accumulate_grad_hook(_forget)  # type: ignore[no-untyped-call]
            else:
                parameter.grad = torch.empty_like(parameter)
                known.append(parameter.grad)
        noisy = torch.empty(batch, base.unet.config.in_channels, height, width, device=meta)
        times = torch.empty(batch, dtype=torch.int64, device=meta)
        ids = [
            torch.empty(batch, windows, WINDOW, dtype=torch.int64, device=meta) for _ in base.text_encoders
        ]
        cached = None if _texts(trained) else _conditioning(base, batch, windows)
        stack.enter_context(flash_attention())
        with Tracker([*known, noisy, times]) as tracker, ExitStack() as step:
            if not fused_backward:
                step.enter_context(network.prepared())
            text = encode_text(there, ids) if cached is None else cached
            prediction = predict(there, noisy, times, text, torch.empty(batch, 6, device=meta))
            loss = (prediction.float() - noisy).pow(2).mean()
            if checkpoint:
                torch.autograd.backward(loss)
            peak = tracker.peak  # before operands take gradients that are not there
    return int(peak)


def encoding_bytes(base: BaseModel, size: tuple[int, int]) -> int:
    """Most bytes alive while one image of so many pixels is encoded, without the VAE's weights.

    On a GPU with cuDNN's working space, which in a model that is not laid out channels-last is taken to be
    a copy of a convolution's input: 0.58 GiB were seen for SDXL's VAE at 1024², whose largest is 0.50.
    """
    width, height = size
    there = replace(base, device=torch.device("meta"))
    with on_meta(base.vae) as known, flash_attention():
        pixels = torch.empty(1, 3, height, width, device="meta")
        with Tracker([*known, pixels], copies_inputs=base.device.type == "cuda") as tracker:
            encode_images(there, pixels)
    return int(tracker.peak)


def _forget(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _texts(trained: Collection[str]) -> bool:
    return any(component != "unet" for component in trained)


def _conditioning(base: BaseModel, batch: int, windows: int) -> Conditioning:
    states = _INNER * windows + 2
    pooled: Tensor | None = None
    if base.family == "sdxl":
        times = 6 * base.unet.config.addition_time_embed_dim
        width = base.unet.config.projection_class_embeddings_input_dim - times
        pooled = torch.empty(batch, width, dtype=base.unet_dtype, device="meta")
    hidden = torch.empty(
        batch, states, base.unet.config.cross_attention_dim, dtype=base.unet_dtype, device="meta"
    )
    return Conditioning(hidden, pooled)
