"""The adapter file that training starts from (``network_weights``)."""

from __future__ import annotations

from dataclasses import replace

from lycotool.io.open import open_store
from lycotool.lazy import torch
from lycotool.ops._adapter import read_adapter
from lycotool.training.weights import Loaded


def load_network_weights(path: str) -> dict[str, Loaded]:
    """Every module of an adapter file by its name in the file, in float32 on the CPU.

    Raises
    ------
    LycotoolError
        If the file cannot be read or a module is damaged.
    """
    loaded = {}
    with open_store(path) as store:
        adapter = read_adapter(store)
        adapter.require_sound()
        for name, module in adapter.modules.items():
            bound = adapter.load(module, torch.device("cpu"), torch.float32)
            # Copies, because the file is closed.
            tensors = {slot: tensor.clone() for slot, tensor in bound.tensors.items()}
            loaded[name] = Loaded(module.detected, replace(bound, tensors=tensors))
    return loaded
