"""Group C: what stands where the output is to go."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from reliability.cases import OUT, WRITING, Case, Elsewhere, Expected, Row
from reliability.lab import OK, OUTPUT, USAGE, Setting
from reliability.tensors import good, stored

OLD = b"what was there before"


def _arranged(arrange: Callable[[Path], object]) -> Callable[[Path], str]:
    """An adapter to work on, and what is in the way of the output."""

    def make(folder: Path) -> str:
        (folder / "x.safetensors").write_bytes(stored(good()))
        arrange(folder)
        return "x.safetensors"

    return make


def _old(folder: Path) -> None:
    (folder / OUT).write_bytes(OLD)


def _nothing(folder: Path) -> None:
    pass


def _link(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "real.safetensors").write_bytes(OLD)
    (folder / OUT).symlink_to("elsewhere/real.safetensors")


def _link_is_kept(folder: Path) -> None:
    assert str((folder / OUT).readlink()) == "elsewhere/real.safetensors"
    assert sorted(p.name for p in (folder / "elsewhere").iterdir()) == ["real.safetensors"]


def _second_name(folder: Path) -> None:
    _old(folder)
    os.link(folder / OUT, folder / "other")


def _other_name_is_old(folder: Path) -> None:
    assert (folder / "other").read_bytes() == OLD


def _input_by_link(folder: Path) -> None:
    (folder / OUT).symlink_to("x.safetensors")


def _input_by_hard_link(folder: Path) -> None:
    os.link(folder / "x.safetensors", folder / OUT)


def _dangling(folder: Path) -> None:
    (folder / OUT).symlink_to("nowhere.safetensors")


def _directory(folder: Path) -> None:
    (folder / OUT).mkdir()
    (folder / OUT / "kept").write_text("kept")


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / OUT)


def _closed_folder(folder: Path) -> None:
    (folder / "closed").mkdir(mode=0o555)


def _read_only(folder: Path) -> None:
    _old(folder)
    (folder / OUT).chmod(0o444)


def _own_mode(folder: Path) -> None:
    _old(folder)
    (folder / OUT).chmod(0o640)


def _mode_is_kept(folder: Path) -> None:
    assert stat.S_IMODE((folder / OUT).stat().st_mode) == 0o640


def _mode_is_new(folder: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((folder / OUT).stat().st_mode) == 0o666 & ~umask


def _is_new(folder: Path) -> None:
    assert (folder / OUT).read_bytes() != OLD


def _case(id: str, what: str, arrange: Callable[[Path], object], options: tuple[str, ...], code: int,
          message: str = "", **more: object) -> Case:  # fmt: skip
    return Case(id=id, what=what, make=_arranged(arrange), expected=Expected.of(code, message), options=options,
                **{"verbs": WRITING, **more})  # fmt: skip


_INPUT = ("edit", "resize", "merge", "bake", "convert")
_FORCE = ("--force",)
_FAULTS = "reliability/test_faults.py"

ROWS: tuple[Row, ...] = (
    _case("C01", "the output exists", _old, (), OUTPUT, "exists"),
    _case("C01f", "the output exists, --force", _old, _FORCE, OK, after=_is_new),
    _case("C02", "the output is the input", _nothing, ("-o", "x.safetensors", "--force"), OUTPUT, "same file|input",
          verbs=_INPUT),
    _case("C02l", "the output is a link to the input", _input_by_link, _FORCE, OUTPUT, "same file|input", verbs=_INPUT),
    _case("C02h", "the output is another name of the input", _input_by_hard_link, _FORCE, OUTPUT, "same file|input",
          verbs=_INPUT),
    _case("C03", "the output is a symlink", _link, _FORCE, OK, after=_link_is_kept,
          output="elsewhere/real.safetensors"),
    _case("C04", "the output has a second name", _second_name, _FORCE, OK, after=_other_name_is_old),
    _case("C05", "the output is a symlink that leads nowhere", _dangling, _FORCE, OUTPUT, "symlink"),
    _case("C06", "the folder does not exist", _nothing, ("-o", "absent/out.safetensors"), OUTPUT, "folder", seconds=10),
    _case("C07", "the output is a directory", _directory, _FORCE, OUTPUT, "directory|folder"),
    _case("C08", "the output is a FIFO", _fifo, _FORCE, OUTPUT, "not a regular file"),
    _case("C08d", "the output is a device", _nothing, ("-o", "/dev/full", "--force"), USAGE, "format",
          decision="a device has no suffix this program writes; C08 is the same check by another kind of node",
          by_verb={"edit": Expected((USAGE, OUTPUT))}),
    _case("C09", "the folder is not writable", _closed_folder, ("-o", "closed/out.safetensors"), OUTPUT, "permission",
          setting=Setting(unprivileged=True), seconds=10),
    _case("C10", "the output is read-only", _read_only, _FORCE, OUTPUT, "read-only"),
    _case("C11", "a new file's mode", _nothing, (), OK, after=_mode_is_new),
    _case("C11k", "an old file's mode", _own_mode, _FORCE, OK, after=_mode_is_kept),
    Elsewhere("C12", "a full disk", "reliability/test_full_disk.py::test_disk_that_fills_up"),
    _case("C13", "a limit on file sizes", _nothing, (), OUTPUT, "too large", setting=Setting(limits={"FSIZE": 512})),
    Elsewhere("C14", "an error at each call", f"{_FAULTS}::test_error_at_every_call"),
    Elsewhere("C15", "an error of close", f"{_FAULTS}::test_error_at_every_call"),
    Elsewhere("C16", "an interrupted call", f"{_FAULTS}::test_error_at_every_call"),
    Elsewhere("C17", "SIGKILL at each call", f"{_FAULTS}::test_kill_at_every_call"),
    Elsewhere("C18", "SIGKILL at random times of a large write", f"{_FAULTS}::test_kill_at_random_times"),
    Elsewhere("C19", "SIGINT in every phase", f"{_FAULTS}::test_interrupt_at_every_call"),
    Elsewhere("C20", "SIGTERM in the write", "cli/test_process.py::test_signal_during_the_write_leaves_nothing"),
    Elsewhere("C21", "several writers of one output", f"{_FAULTS}::test_writers_of_one_output"),
    Elsewhere("C22", "standard output closed early", "cli/test_process.py::test_reader_that_goes_away_is_no_error"),
    _case("C23", "an unknown suffix", _nothing, ("-o", "out.foo"), USAGE, "format"),
    _case("C24", "a name of 260 bytes", _nothing, ("-o", "x" * 248 + ".safetensors"), OUTPUT, "too long"),
    Elsewhere("C25", "a header readers refuse", "io/test_writer.py::test_a_header_readers_would_refuse_is_not_written"),
    Elsewhere("C26", "the same command twice", "reliability/test_cases.py::test_case"),
    Elsewhere("C27", "the order of the calls", f"{_FAULTS}::test_order_of_calls"),
    Elsewhere("C28", "an error half way through shards", f"{_FAULTS}::test_error_at_every_call"),
    Elsewhere("C29", "shards over older ones", "cli/test_bake_shards.py::test_existing_files_are_kept_unless_forced"),
    Elsewhere("C30", "a file system without rename", f"{_FAULTS}::test_error_at_every_call"),
    Elsewhere("C31", "another program has the output open, or mapped", f"{_FAULTS}::test_output_in_use"),
    Elsewhere("C32", "the written file is read back", "io/test_writer.py::test_a_file_that_does_not_read_back_is_not_published"),
    Elsewhere("C33", "inputs are as before", "reliability/test_cases.py::test_case"),
)  # fmt: skip
