"""From token ids to what the UNet's cross-attention reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lycotool.errors import UsageError
from lycotool.lazy import torch
from lycotool.training.bases.eight_bit import rebuilt_for_gradients
from lycotool.training.bases.model import BaseModel
from lycotool.training.bases.residence import bring

#: Tokens of one window, its first and last included.
WINDOW = 77


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What a caption becomes.

    Parameters
    ----------
    hidden
        ``(B, T, C)`` for cross-attention; SDXL's two encoders side by side in C.
    pooled
        ``(B, C')``, SDXL only.
    """

    hidden: torch.Tensor
    pooled: torch.Tensor | None = None

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Conditioning:
        """The same, cast or moved."""
        pooled = None if self.pooled is None else self.pooled.to(dtype=dtype, device=device)
        return Conditioning(self.hidden.to(dtype=dtype, device=device), pooled)


class _Output(Protocol):
    """What transformers' text encoders return."""

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...]
    text_embeds: torch.Tensor


def encode_text(
    base: BaseModel, token_ids: Sequence[torch.Tensor], *, clip_skip: int | None = None
) -> Conditioning:
    """Run the text encoders; differentiable.

    SD 1.x and 2.x: the final norm of the last hidden state, or of ``hidden_states[-clip_skip]``.
    SDXL: both encoders' state before their last layer, without a norm, and the second
    encoder's projection at the end token. Source: sd-scripts ``strategy_sd.py``,
    ``strategy_sdxl.py``.

    Parameters
    ----------
    token_ids
        One tensor per text encoder, ``(B, 77)`` or ``(B, windows, 77)``. Of several windows
        the result has the first token of the first, 1 to 75 of each and the last of the
        last: 77, 152 or 227 states. The pooled state is the first window's.
    clip_skip
        1 is the last layer. SDXL has its own rule, so it takes none.

    Raises
    ------
    UsageError
        If ``clip_skip`` is given for SDXL or there are not so many layers.
    """
    if base.family == "sdxl":
        if clip_skip is not None:
            raise UsageError(
                "SDXL always reads its text encoders before their last layer; it takes no clip skip"
            )
        return _encode_sdxl(base, token_ids)
    encoder, (ids,) = base.text_encoders[0], token_ids
    output = _run(base, encoder, ids, states=clip_skip not in (None, 1))
    if clip_skip in (None, 1):
        hidden = output.last_hidden_state  # the class itself has applied the final norm
    else:
        layers = len(output.hidden_states) - 1
        if not 1 <= clip_skip <= layers:
            raise UsageError(f"clip skip {clip_skip}: the text encoder has {layers} layers")
        inner = getattr(encoder, "text_model", encoder)
        hidden = inner.final_layer_norm(output.hidden_states[-clip_skip])
    return Conditioning(_joined(hidden, _windows(ids)))


def _encode_sdxl(base: BaseModel, token_ids: Sequence[torch.Tensor]) -> Conditioning:
    states, pooled = [], None
    for encoder, ids in zip(base.text_encoders, token_ids, strict=True):
        output = _run(base, encoder, ids, states=True)
        windows = _windows(ids)
        states.append(_joined(output.hidden_states[-2], windows))
        if hasattr(encoder, "text_projection"):
            pooled = output.text_embeds[::windows]
    return Conditioning(torch.cat(states, dim=-1), pooled)


def _windows(ids: torch.Tensor) -> int:
    return ids.shape[1] if ids.dim() == 3 else 1


def _run(base: BaseModel, encoder: torch.nn.Module, ids: torch.Tensor, *, states: bool) -> _Output:
    bring(base, encoder)
    flat = ids.reshape(-1, ids.shape[-1]).to(base.device)
    with rebuilt_for_gradients(encoder):
        output: _Output = encoder(flat, output_hidden_states=states)
    return output


def _joined(hidden: torch.Tensor, windows: int) -> torch.Tensor:
    """``(B·windows, 77, C)`` to ``(B, 75·windows + 2, C)``."""
    if windows == 1:
        return hidden
    apart = hidden.reshape(-1, windows, *hidden.shape[1:])
    middle = apart[:, :, 1:-1].flatten(1, 2)
    return torch.cat([apart[:, 0, :1], middle, apart[:, -1, -1:]], dim=1)
