"""When the Triton kernels are used, and what is said where they cannot be."""

from __future__ import annotations

import sys

import pytest
import torch
from makers.layers import build, make_layer

from lycotool.training.kernels import install


def test_for_half_precision_on_a_gpu() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert install.are_for(cuda, torch.bfloat16)
    assert install.are_for(cuda, torch.float16)
    assert not install.are_for(cuda, torch.float32)
    assert not install.are_for(cpu, torch.bfloat16)
    assert not install.are_usable(cpu, torch.bfloat16)


def test_without_triton_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "lycotool.training.kernels.geglu", raising=False)
    found = install.fault.__wrapped__(torch.device("cuda"), torch.bfloat16)
    assert found is not None
    assert "triton" in found


def test_layers_use_them_when_told() -> None:
    network, adapter = build(make_layer("linear"), {"algo": "lora", "dora_wd": True})
    assert not adapter.uses_kernels
    network.use_kernels()
    assert adapter.uses_kernels
