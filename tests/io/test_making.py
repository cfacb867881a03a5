"""Folders for outputs: made when files are, and taken away again if these fail."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lycotool.errors import OutputError
from lycotool.io import making
from lycotool.io.making import check_folder, made_folder


def test_what_is_there_or_can_be_made_is_accepted(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "a" / "b"):
        check_folder(folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_file_is_no_folder(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="is not a folder") as caught:
        check_folder(tmp_path / "file" / below)
    assert caught.value.path == str(tmp_path / "file")


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_folder_without_permission(below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Simulated: for root, as whom tests may run, every folder is writable.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="no permission to write in the folder"):
        check_folder(tmp_path / below)


@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_it_is_there_meanwhile_and_afterwards(below: str, tmp_path: Path) -> None:
    with made_folder(tmp_path / below):
        (tmp_path / below / "x").write_bytes(b"x")
    assert (tmp_path / below / "x").read_bytes() == b"x"


@pytest.mark.parametrize("fault", [OutputError("no space"), KeyboardInterrupt()], ids=repr)
def test_a_fault_takes_away_what_was_made_and_nothing_else(fault: BaseException, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()

    def fails() -> None:
        with made_folder(tmp_path / "a" / "b" / "c"):
            assert (tmp_path / "a" / "b" / "c").is_dir()
            raise fault

    with pytest.raises(type(fault)):
        fails()
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]


def test_what_others_have_written_stays(tmp_path: Path) -> None:

    def fails() -> None:
        with made_folder(tmp_path / "a" / "b"):
            (tmp_path / "a" / "other").write_bytes(b"")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "other"]


def test_another_run_that_makes_it_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is there; it is that run's, and stays if this one fails."""
    real = Path.mkdir

    def second(self: Path) -> None:
        real(self)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(Path, "mkdir", second)
    with pytest.raises(KeyboardInterrupt), made_folder(tmp_path / "a"):
        raise KeyboardInterrupt
    assert (tmp_path / "a").is_dir()


@pytest.mark.parametrize("call", ["mkdir", "fsync_folder"])
def test_a_folder_that_cannot_be_made(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or not be flushed; those above it, which were made, are taken away."""
    real, owner = getattr(Path, call, making.fsync_folder), Path if call == "mkdir" else making

    def fail(place: Path) -> None:
        if place.name == ("b" if call == "mkdir" else "a"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(place)

    monkeypatch.setattr(owner, call, fail)
    with (
        pytest.raises(OutputError, match="no space left on device") as caught,
        made_folder(tmp_path / "a" / "b"),
    ):
        raise AssertionError("nothing is written")
    assert caught.value.path == str(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
