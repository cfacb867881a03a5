"""`bake` reads, computes, hashes and writes at the same time: each waits here for what another does next."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import lora, succeed, write

from lycotool.io import writer
from lycotool.io.store import SafetensorsFile
from lycotool.ops import _bake_tensors

#: Seconds to wait for another thread; only work that is done one after the other takes them.
_PATIENCE = 20

#: So that a tensor is worth another thread.
_SIZE = 256

_LAYERS = ("a", "b", "c")


def checkpoint(kind: str) -> dict[str, torch.Tensor]:
    """Three layers of one size."""
    tensors = {f"unet.{layer}.weight": torch.randn(_SIZE, _SIZE) for layer in _LAYERS}
    if kind == "float16":
        return {key: tensor.half() for key, tensor in tensors.items()}
    weights = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in tensors.items()}
    scales = {key.replace("weight", "scale_weight"): torch.tensor(0.01) for key in tensors}
    return weights | scales


class Watched:
    """Calls of a function: how many have begun, and what they wait for before they do their work."""

    def __init__(self) -> None:
        self.begun = 0
        self.waited = True
        self._change = threading.Condition()

    def begins(self) -> None:
        """One more."""
        with self._change:
            self.begun += 1
            self._change.notify_all()

    def reaches(self, number: int) -> None:
        """Wait for so many calls."""
        with self._change:
            self.waited &= self._change.wait_for(lambda: self.begun >= number, _PATIENCE)


@pytest.mark.parametrize("kind", ["float16", "float8 with scales"])
def test_reading_computing_hashing_and_writing_overlap(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write(tmp_path / "base.safetensors", checkpoint(kind), {"modelspec.architecture": "x"})
    modules = [lora(out=_SIZE, width=_SIZE, module=f"lora_unet_{layer}") for layer in _LAYERS]
    adapter = write(tmp_path / "a.safetensors", {k: t for module in modules for k, t in module.items()})
    read, computed = Watched(), Watched()
    outputs: list[str] = []

    def watch(owner: object, name: str, before: Callable[..., None]) -> None:
        real = getattr(owner, name)

        def watched(*arguments: object, **named: object) -> object:
            before(*arguments)
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, watched)

    def reading(file: SafetensorsFile, name: str, offset: int, buffer: memoryview) -> None:
        if file.path.name == "base.safetensors" and len(buffer) >= _SIZE * _SIZE:
            read.begins()

    def computing(*arguments: object) -> None:
        computed.begins()
        read.reaches(min(computed.begun + 1, len(_LAYERS)))  # the next one is read meanwhile

    def putting(what: str) -> Callable[..., None]:
        def put(_: object, piece: memoryview) -> None:
            if len(piece) >= _SIZE * _SIZE:
                outputs.append(what)
                computed.reaches(min(outputs.count(what) + 1, len(_LAYERS)))

        return put

    is_scaled = kind != "float16"
    watch(SafetensorsFile, "_read", reading)
    watch(_bake_tensors, "requantise_" if is_scaled else "cast_checked", computing)
    watch(writer, "_write_all", putting("written"))
    watch(writer.DataHasher, "update", putting("hashed"))
    succeed("bake", base, adapter, "-o", tmp_path / "out.safetensors")

    assert read.waited
    assert computed.waited
    assert computed.begun == len(_LAYERS)
    assert outputs.count("written") == len(_LAYERS)
    # New scales stand before the weights they come from, so that is hashed when it is complete.
    assert outputs.count("hashed") == (1 if is_scaled else len(_LAYERS))
