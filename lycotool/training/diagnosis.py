"""Where a number stopped being finite: the step is run again, watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def first_non_finite(models: dict[str, nn.Module], loss: Callable[[], Tensor]) -> str:
    """Name the layer where a non-finite number first appears.

    Parameters
    ----------
    models
        By component, such as ``unet``.
    loss
        Runs the forward pass again; its result is differentiated.

    Returns
    -------
    str
        ``the output of unet.conv_in``, ``the gradient of …``, or that it did not happen again.
    """
    found: list[str] = []
    with _watched(models, found):
        value = loss()
        if not found and not _finite(value):
            found.append("the loss itself")
        if not found:
            torch.autograd.backward(value)
    if not found:
        found += [
            f"the gradient of {component}.{name}"
            for component, model in models.items()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not _finite(parameter.grad)
        ]
    return found[0] if found else "no layer: it did not happen again when the step was repeated"


@contextmanager
def _watched(models: dict[str, nn.Module], found: list[str]) -> Iterator[None]:
    handles = []

    def forward(name: str) -> Callable[..., None]:
        def look(module: nn.Module, arguments: Any, output: Any) -> None:  # noqa: ANN401 - any module's
            if not found and not _all_finite(output):
                found.append(f"the output of {name}")

        return look

    def backward(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, outputs: Any) -> None:  # noqa: ANN401 - any module's
            if not found and not _all_finite(inputs):
                found.append(f"the gradient through {name}")

        return look

    for component, model in models.items():
        for name, module in model.named_modules():
            if name and not any(True for _ in module.children()):
                handles.append(module.register_forward_hook(forward(f"{component}.{name}")))
                handles.append(module.register_full_backward_hook(backward(f"{component}.{name}")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _all_finite(value: Any) -> bool:  # noqa: ANN401 - any module's
    if isinstance(value, torch.Tensor):
        return _finite(value)
    if isinstance(value, tuple | list):
        return all(_all_finite(item) for item in value)
    return True


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
