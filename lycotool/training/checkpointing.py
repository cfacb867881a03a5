"""Gradient checkpointing: blocks are computed again for the gradient instead of being kept.

Nothing of a step draws from torch's generators (dropouts are hashes of the step), so no generator's
state is kept with a block; a CUDA graph could not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from lycotool.lazy import torch
from lycotool.training.bases.model import BaseModel

_HOW = {"use_reentrant": False, "preserve_rng_state": False}


def set_checkpointing(base: BaseModel, trained: Collection[str], *, enabled: bool) -> None:
    """Have a model compute its blocks again, or keep them.

    Parameters
    ----------
    trained
        The components with adapters: a text encoder without any keeps nothing anyway.
    """
    if enabled:
        base.unet.enable_gradient_checkpointing(gradient_checkpointing_func=_again)
    else:
        base.unet.disable_gradient_checkpointing()
    base.unet.train(enabled)
    for number, encoder in enumerate(base.text_encoders, 1):
        if f"te{number}" in trained:
            _set_encoder(encoder, enabled=enabled)


@contextmanager
def checkpointing(base: BaseModel, trained: Collection[str], *, enabled: bool) -> Iterator[None]:
    """The same for a while, of a model that keeps its blocks."""
    set_checkpointing(base, trained, enabled=enabled)
    try:
        yield
    finally:
        set_checkpointing(base, trained, enabled=False)


def _again(module: torch.nn.Module, *inputs: Any) -> Any:  # noqa: ANN401 - any block's
    from torch.utils.checkpoint import checkpoint

    return checkpoint(module, *inputs, **_HOW)  # type: ignore[arg-type]


def _set_encoder(encoder: Any, *, enabled: bool) -> None:  # noqa: ANN401 - of any version of transformers
    kind = "activation" if hasattr(encoder, "activation_checkpointing_enable") else "gradient"  # since 5.24
    if enabled:
        getattr(encoder, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": _HOW})
    else:
        getattr(encoder, f"{kind}_checkpointing_disable")()
        if getattr(encoder, "_require_grads_hooks", None):  # what enabling has added
            encoder.disable_input_require_grads()
    encoder.train(enabled)
