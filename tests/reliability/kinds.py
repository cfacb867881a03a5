"""Group K: what kind of file it is."""

from __future__ import annotations

import os
from pathlib import Path

from reliability.cases import CHECKPOINT, Case, Elsewhere, Expected, Row
from reliability.container import content, torch_saved
from reliability.lab import BAD_INPUT, CHECK, OK, UNSAFE, USAGE, Setting
from reliability.tensors import State, checkpoint, good, numbers, stored

_VERBS = ("inspect", "check", "edit", "resize", "merge", "bake", "base", "convert", "extract")


def _missing(folder: Path) -> str:
    return "absent.safetensors"


def _directory(folder: Path) -> str:
    (folder / "x").mkdir()
    (folder / "x" / "notes.txt").write_text("nothing here")
    return "x"


def _fifo(folder: Path) -> str:
    os.mkfifo(folder / "x.safetensors")
    return "x.safetensors"


def _device(folder: Path) -> str:
    return "/dev/zero"


def _unreadable(folder: Path) -> str:
    (folder / "x.safetensors").write_bytes(stored(good()))
    (folder / "x.safetensors").chmod(0)
    return "x.safetensors"


def _dangling(folder: Path) -> str:
    (folder / "x.safetensors").symlink_to("nowhere.safetensors")
    return "x.safetensors"


def _loop(folder: Path) -> str:
    (folder / "x.safetensors").symlink_to("x.safetensors")
    return "x.safetensors"


def _tuned() -> State:
    return {name: tensor + numbers(*tensor.shape, seed=22) for name, tensor in checkpoint().items()}


def _nul(folder: Path) -> str:
    return "x" * 5000 + ".safetensors"


ROWS: tuple[Row, ...] = (
    Case(id="K01", what="the input is missing", make=_missing, expected=Expected.of(USAGE, "no such file"), verbs=_VERBS),
    Case(id="K02", what="the input is a directory", make=_directory, verbs=_VERBS,
         expected=Expected.of(USAGE, "directory|folder|safetensors files")),
    Case(id="K03", what="the input is a FIFO", make=_fifo, expected=Expected.of(BAD_INPUT, "not a regular file"),
         verbs=_VERBS, seconds=10),
    Case(id="K04", what="the input is a device", make=_device, expected=Expected.of(BAD_INPUT, "not a regular file"),
         verbs=_VERBS, seconds=10),
    Case(id="K05", what="no permission to read", make=_unreadable, expected=Expected.of(BAD_INPUT, "permission"),
         verbs=_VERBS, setting=Setting(unprivileged=True)),
    Case(id="K06", what="a symlink that leads nowhere", make=_dangling, expected=Expected.of(USAGE, "symlink"),
         verbs=_VERBS),
    Case(id="K06b", what="a symlink that leads to itself", make=_loop, expected=Expected.of(USAGE, "symlink"),
         verbs=_VERBS),
    Elsewhere("K07", "the file is cut short while it is read", "reliability/test_faults.py::test_source_cut_short"),
    Elsewhere("K08", "the file is edited while it is read", "io/test_store.py::test_a_file_edited_while_open"),
    Case(id="K09", what="a file system without mmap", make=content(lambda: stored(good())), expected=Expected.of(OK),
         verbs=("inspect", "check", "edit", "resize", "merge", "fold", "bake", "convert", "subtract"),
         by_verb={"check": Expected((OK, CHECK))}, setting=Setting(maps=False)),
    Case(id="K09b", what="a checkpoint on such a file system", make=content(lambda: stored(_tuned(), None)),
         expected=Expected.of(OK), verbs=("inspect", "base", "extract"), setting=Setting(maps=False)),
    Case(id="K10", what="a pickle without --allow-pickle", make=torch_saved(good, "x.pt"), verbs=CHECKPOINT,
         expected=Expected.of(UNSAFE, "pickle"),
         decision="pickles are refused unless --allow-pickle asks for them, so 4 instead of 0 or 2"),
    Case(id="K11", what="a name too long for any file", make=_nul, expected=Expected.of(USAGE, "no such file|name"),
         verbs=_VERBS),
)  # fmt: skip
