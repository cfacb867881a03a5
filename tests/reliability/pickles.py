"""Group D: pickles, which are never trusted."""

from __future__ import annotations

import argparse
import functools
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from reliability.cases import Case, Elsewhere, Expected, Maker, Row
from reliability.container import content, torch_saved
from reliability.lab import BAD_INPUT, INCOMPATIBLE, OK, RESOURCE, UNSAFE, Setting
from reliability.tensors import good

_VERBS = ("inspect", "resize", "merge", "bake", "base", "convert", "extract")


class Evil:
    """Runs a command when it is unpickled by anything that runs what a pickle says.

    The command would also be seen by the audit hook of the child.
    """

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, ("touch executed",)


def _evil() -> object:
    return {"a": torch.zeros(2), "x": Evil()}


def _lightning() -> object:
    return {
        "epoch": 3,
        "state_dict": OrderedDict(good()),
        "hparams": argparse.Namespace(lr=1e-4),
        "callbacks": {},
    }


def _laughs() -> object:
    layer: list[object] = ["lol"] * 10
    for _ in range(8):
        layer = [layer] * 10
    return {"a": torch.zeros(2), "x": layer}


Member = tuple[str, bytes]


def _rezipped(
    value: Callable[[], object],
    *,
    compression: int = zipfile.ZIP_STORED,
    change: Callable[[Member], Member] = lambda member: member,
    more: tuple[Member, ...] = (),
) -> Maker:
    """A PyTorch archive with its members changed."""

    @functools.cache
    def made() -> bytes:
        saved, changed = io.BytesIO(), io.BytesIO()
        torch.save(value(), saved)
        with zipfile.ZipFile(saved) as old, zipfile.ZipFile(changed, "w", compression) as new:
            for name in old.namelist():
                new.writestr(*change((name, old.read(name))))
            for member in more:
                new.writestr(*member)
        return changed.getvalue()

    return content(made, "x.pt")


def _storage_cut(member: Member) -> Member:
    name, data = member
    return name, data[:4] if "/data/" in name else data


def _claims_a_gigabyte(member: Member) -> Member:
    """Four elements in the storage, 2^28 in what the pickle says of it."""
    name, data = member
    if name.endswith("data.pkl"):
        data = data.replace(b"K\x04t", b"J\0\0\0\x10t").replace(b"K\x04\x85", b"J\0\0\0\x10\x85")
    return name, data


def _cut(folder: Path) -> str:
    torch.save(good(), folder / "x.pt")
    whole = (folder / "x.pt").read_bytes()
    (folder / "x.pt").write_bytes(whole[:-200])
    return "x.pt"


def _raw(folder: Path) -> str:
    (folder / "x.bin").write_bytes(pickle.dumps(Evil()))
    return "x.bin"


def _case(id: str, what: str, make: Maker, code: int | tuple[int, ...], message: str, **more: object) -> Case:
    codes = code if isinstance(code, tuple) else (code,)
    return Case(id=id, what=what, make=make, expected=Expected(codes, message),
                **{"verbs": _VERBS, "options": ("--allow-pickle",), "seconds": 10, **more})  # fmt: skip


_READ = {verb: Expected.of(INCOMPATIBLE) for verb in ("base", "extract")}

ROWS: tuple[Row, ...] = (
    _case("D01", "a zip that runs a command", torch_saved(_evil, "x.pt"), UNSAFE, r"posix.system"),
    _case("D01r", "the same without --allow-pickle", torch_saved(_evil, "x.pt"), UNSAFE, "pickle", options=()),
    _case("D02", "the same in a checkpoint", torch_saved(lambda: {"state_dict": _evil()}, "x.ckpt"), UNSAFE,
          r"posix.system"),
    _case("D03", "the same named .safetensors", torch_saved(_evil, "x.safetensors"), BAD_INPUT, "PyTorch"),
    _case("D04", "a file of the older format that runs a command", torch_saved(_evil, "x.pt", zipped=False), UNSAFE,
          r"posix.system"),
    _case("D05", "a sound zip", torch_saved(good, "x.pt"), OK, "", by_verb=_READ),
    _case("D06", "a sound file of the older format", torch_saved(good, "x.pt", zipped=False), OK, "", by_verb=_READ),
    _case("D07", "64 MiB of zeros, compressed",
          _rezipped(lambda: {"a": torch.zeros(2**24)}, compression=zipfile.ZIP_DEFLATED), (BAD_INPUT, RESOURCE),
          "compressed"),
    _case("D08", "a storage shorter than the pickle says", _rezipped(lambda: {"a": torch.ones(4)}, change=_storage_cut),
          BAD_INPUT, "storage|damaged"),
    _case("D08b", "a pickle that claims a gigabyte",
          _rezipped(lambda: {"a": torch.ones(4)}, change=_claims_a_gigabyte), (BAD_INPUT, RESOURCE), "storage|damaged"),
    _case("D09", "a zip cut short", _cut, BAD_INPUT, "truncated|damaged"),
    _case("D10", "a list of 10^8 shared items", torch_saved(_laughs, "x.pt"), (OK, BAD_INPUT, INCOMPATIBLE), ""),
    _case("D11", "a zip member that leaves the folder",
          _rezipped(good, more=(("../../../../executed", b"x"),)), BAD_INPUT, "archive"),
    _case("D12", "a Lightning checkpoint with argparse.Namespace", torch_saved(_lightning, "x.ckpt"), UNSAFE,
          r"argparse.Namespace"),
    _case("D13", "NumPy scalars", torch_saved(lambda: {"state_dict": good(), "best": np.float64(0.1)}, "x.ckpt"), UNSAFE,
          "numpy"),
    _case("D14", "a list", torch_saved(lambda: [1, 2, 3], "x.pt"), BAD_INPUT, "not a state dict"),
    _case("D15", "a bare pickle that runs a command", _raw, UNSAFE, r"posix.system"),
    _case("D16", "torch told not to be safe", torch_saved(_evil, "x.pt"), UNSAFE, r"posix.system",
          setting=Setting(env={"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"})),
    Elsewhere("D17", "no retry when the safe load fails", "reliability/test_offline.py::test_one_place_reads_pickles"),
)  # fmt: skip
