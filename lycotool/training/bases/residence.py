"""Which networks of a base are on the device: those at work, where memory is scarce.

Where a GPU does not hold all of them, VAE, text encoders and UNet come one after another. While adapters of the UNet alone are trained on cached inputs, VAE and text encoders have nothing to
do. On a GPU they wait in the machine's memory, and come back when an image or caption is to be
encoded or a sample to be made. Elsewhere everything stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lycotool.lazy import torch
from lycotool.training.bases.model import BaseModel


def bring(base: BaseModel, *networks: torch.nn.Module) -> None:
    """Put networks on the device, if they are not there."""
    for network in networks:
        if is_away(base, network):
            network.to(base.device)


def is_away(base: BaseModel, network: torch.nn.Module) -> bool:
    """Whether a network is not on the base's device."""
    return _place(network) != base.device.type


def send_away(base: BaseModel, *networks: torch.nn.Module) -> None:
    """Let networks wait in the machine's memory, if the device is a GPU, and free theirs there."""
    moved = [network for network in networks if base.device.type == "cuda" and _place(network) == "cuda"]
    for network in moved:
        network.to("cpu")
    if moved:
        torch.cuda.empty_cache()


@contextmanager
def visiting(base: BaseModel) -> Iterator[None]:
    """Send VAE and text encoders away again that were brought meanwhile."""
    networks = [base.vae, *base.text_encoders]
    away = [network for network in networks if is_away(base, network)]
    try:
        yield
    finally:
        send_away(base, *away)


def _place(network: torch.nn.Module) -> str:
    return next(network.parameters()).device.type
