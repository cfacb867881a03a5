"""Puts the kernels in the place of frozen layers of a diffusers UNet."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def are_for(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for these: half precision on a GPU."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def are_usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for these, and they work."""
    return are_for(device, dtype) and fault(device, dtype) is None


@cache
def fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels do not work on a GPU, found by running one; None where they do."""
    try:
        from lycotool.training.kernels.geglu import geglu

        geglu(torch.zeros(2, 2, dtype=dtype, device=device))
    except Exception as error:  # noqa: BLE001 - no Triton, no C compiler, another GPU, ...
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


def install(unet: nn.Module) -> int:
    """Replace the forward of what is not trained and has the usual form. Gives the number of places.

    Layers that already have a forward of their own, such as those with an adapter, are left as
    they are, and so is every block that does more than the kernels know.
    """
    from diffusers.models.activations import GEGLU
    from diffusers.models.resnet import ResnetBlock2D

    places: list[tuple[Any, Any]] = []
    for module in unet.modules():
        if "forward" in module.__dict__:
            continue
        if isinstance(module, GEGLU):
            places.append((module, partial(_geglu, module)))
        elif isinstance(module, ResnetBlock2D) and _is_plain(module):
            places.append((module, partial(_resnet, module)))
        elif isinstance(module, torch.nn.GroupNorm) and _is_frozen(module):
            places.append((module, partial(_norm, module, silu=False)))
    for module, forward in places:
        module.forward = forward
    return len(places)


def _is_frozen(norm: nn.Module) -> bool:
    return "forward" not in norm.__dict__ and norm.weight is not None and norm.bias is not None


def _is_plain(block: Any) -> bool:  # noqa: ANN401 - diffusers' class
    return (
        block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm == "default"
        and block.output_scale_factor == 1
        and block.dropout.p == 0
        and isinstance(block.nonlinearity, torch.nn.SiLU)
        and (block.time_emb_proj is None or not block.skip_time_act)
        and _is_frozen(block.norm1)
        and _is_frozen(block.norm2)
    )


def _norm(norm: Any, x: Tensor, *, silu: bool) -> Tensor:  # noqa: ANN401 - a GroupNorm
    from lycotool.training.kernels.group_norm import group_norm

    if x.ndim == 4:
        return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu)
    y = torch.nn.functional.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return torch.nn.functional.silu(y) if silu else y


def _resnet(block: Any, x: Tensor, time: Tensor | None = None) -> Tensor:  # noqa: ANN401 - diffusers' class
    """``shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time)))``, as diffusers' ResnetBlock2D."""
    hidden = block.conv1(_norm(block.norm1, x, silu=True))
    if block.time_emb_proj is not None and time is not None:
        hidden = hidden + block.time_emb_proj(torch.nn.functional.silu(time))[:, :, None, None]
    hidden = block.conv2(_norm(block.norm2, hidden, silu=True))
    total: Tensor = hidden + (x if block.conv_shortcut is None else block.conv_shortcut(x))
    return total


def _geglu(module: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - diffusers' class
    from lycotool.training.kernels.geglu import geglu

    return geglu(module.proj(x))
