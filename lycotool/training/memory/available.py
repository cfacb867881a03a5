"""What memory of a device a run can have."""

from __future__ import annotations

from lycotool.lazy import torch


def available_memory(device: torch.device) -> int | None:
    """Bytes that tensors may take on a GPU, this process's own included; None on other devices.

    What others use is not available, nor what is above
    ``torch.cuda.set_per_process_memory_fraction``.
    """
    if device.type != "cuda":
        return None
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    free, total = torch.cuda.mem_get_info(device)
    usable = int(free) + int(torch.cuda.memory_reserved(device))
    if hasattr(torch.cuda, "get_per_process_memory_fraction"):  # since torch 2.8
        usable = min(usable, int(torch.cuda.get_per_process_memory_fraction(device) * total))
    return usable
