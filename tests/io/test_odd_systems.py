"""Systems that lack a call, refuse one, or answer oddly; signals and threads where they matter."""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from stored_tensors import bits

from lycotool.errors import BadInputError, OutputError, UsageError
from lycotool.io import dtypes, nameless, preflight, store
from lycotool.io.nearest import nearest_file
from lycotool.io.open import exists, open_component, open_store, read_json
from lycotool.io.store import SafetensorsFile
from lycotool.io.writer import FilePlan, TensorPlan, prepare_output, write_file

STATE = {"a": torch.arange(40.0), "b": torch.ones(3)}
PLAN = FilePlan({name: TensorPlan("F32", tuple(tensor.shape)) for name, tensor in STATE.items()}, {})


def produce(name: str) -> list[memoryview]:
    return [memoryview(bits(STATE[name]))]


def failing(number: int) -> Callable[..., object]:
    def call(*arguments: object, **more: object) -> object:
        raise OSError(number, os.strerror(number))

    return call


def failing_on(
    is_wanted: Callable[[int], bool], real: Callable[..., object], number: int
) -> Callable[..., object]:
    """A call that fails for files or folders alone."""

    def call(descriptor: int, *arguments: object) -> object:
        if is_wanted(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        return real(descriptor, *arguments)

    return call


# --- writing -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["posix_fallocate", "posix_fadvise", "O_TMPFILE"])
def test_a_system_without_a_call(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, name)
    monkeypatch.setattr("lycotool.io.writer._FLUSH_BYTES", 8)
    write_file(tmp_path / "x.safetensors", PLAN, produce)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], STATE["a"])
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL], ids=errno.errorcode.get)
def test_a_file_system_that_cannot_reserve_space(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(number))
    write_file(tmp_path / "x.safetensors", PLAN, produce)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["b"], STATE["b"])


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR, errno.EACCES], ids=errno.errorcode.get)
def test_a_file_system_without_nameless_files(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hidden name stands in, unless it is the folder that refuses."""
    real = os.open

    def opened(path: object, flags: int, *more: object, **options: object) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", opened)
    if number == errno.EACCES:
        with pytest.raises(OutputError, match="permission denied"):
            write_file(tmp_path / "x.safetensors", PLAN, produce)
        assert not list(tmp_path.iterdir())
    else:
        write_file(tmp_path / "x.safetensors", PLAN, produce)
        assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EIO], ids=errno.errorcode.get)
def test_a_folder_that_cannot_be_flushed(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems have no such thing; a disk that fails is told of, after the file has its name."""
    monkeypatch.setattr(os, "fsync", failing_on(stat.S_ISDIR, os.fsync, number))
    if number == errno.EIO:
        with pytest.raises(OutputError, match="was written, but its folder cannot be flushed to disk"):
            write_file(tmp_path / "x.safetensors", PLAN, produce)
    else:
        write_file(tmp_path / "x.safetensors", PLAN, produce)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], STATE["a"])


def test_a_thread_writes_too(tmp_path: Path) -> None:
    """Signal handlers are the main thread's alone."""
    thread = threading.Thread(target=write_file, args=(tmp_path / "x.safetensors", PLAN, produce))
    thread.start()
    thread.join()
    assert (tmp_path / "x.safetensors").exists()


class StopError(Exception):
    """What a handler raises."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["raises", "ignored", "not python's"])
def test_a_signal_waits_for_steps_that_belong_together(
    number: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(number: int, frame: object) -> None:
        raise StopError

    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(number, raising if kind == "raises" else signal.SIG_IGN)
    if kind == "not python's":  # what a C library installed; the interpreter cannot put that back
        monkeypatch.setattr(signal, "getsignal", lambda number: None)
    raised: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    steps: list[int] = []

    def body() -> None:
        with nameless.uninterrupted():
            os.kill(os.getpid(), number)
            steps.append(1)

    try:
        if kind == "raises":
            with pytest.raises(StopError):
                body()
        else:
            body()
            assert raised == [number]
        assert steps == [1]
    finally:
        monkeypatch.undo()
        for (
            each,
            handler,
        ) in before.items():  # what is not Python's is given back for both as the system's default
            signal.signal(each, handler)


@pytest.mark.parametrize("how", ["missing", "refuses"])
def test_a_limit_of_names_that_nobody_tells(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "missing":
        monkeypatch.delattr(os, "pathconf")
    else:
        monkeypatch.setattr(os, "pathconf", failing(errno.EINVAL))
    assert preflight._name_limit(tmp_path) == 255
    assert prepare_output(str(tmp_path / "x"), inputs=[], force=False) == tmp_path / "x"


@pytest.mark.parametrize(("limit", "is_long"), [(3, True), (4, False)])
def test_names_up_to_the_limit(
    limit: int, is_long: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes count, not characters."""
    monkeypatch.setattr(os, "pathconf", lambda folder, name: limit)
    if is_long:
        with pytest.raises(OutputError, match="too long"):
            prepare_output(str(tmp_path / "äö"), inputs=[], force=False)
    else:
        assert prepare_output(str(tmp_path / "äö"), inputs=[], force=False)


def test_an_output_beside_other_inputs(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "out").write_bytes(b"")
    inputs = [tmp_path / "a", tmp_path / "b"]
    assert prepare_output(str(tmp_path / "out"), inputs=inputs, force=True) == tmp_path / "out"


# --- reading -------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(STATE, {"k": "v"}))
    return path


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO], ids=errno.errorcode.get)
def test_a_file_that_cannot_be_opened(number: int, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", failing(number))
    with pytest.raises(
        BadInputError, match=r"permission denied|cannot be read: input/output error"
    ) as caught:
        open_store(str(stored))
    assert caught.value.path == str(stored)


def test_a_name_that_cannot_be_looked_at(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.stat

    def refused(self: Path, **options: object) -> os.stat_result:
        if sys._getframe(1).f_code.co_name == "_open_file":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", refused)
    with pytest.raises(BadInputError, match="cannot be read: input/output error"):
        open_store(str(stored))


def test_a_disk_that_fails_at_the_header(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        if sys._getframe(1).f_code.co_name == "_look":
            closed.append(descriptor)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor)

    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.raises(BadInputError, match="cannot be read: input/output error"):
        open_store(str(stored))
    with pytest.raises(OSError, match="Bad file descriptor"):
        real(closed[0])


def test_a_disk_that_fails_at_a_tensor(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(str(stored)) as opened:
        monkeypatch.setattr(os, "preadv", failing(errno.EIO))
        with pytest.raises(BadInputError, match="cannot be read: input/output error") as caught:
            opened.tensor("a")
        assert (caught.value.path, caught.value.key) == (str(stored), "a")


def test_closing_never_fails(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SafetensorsFile(stored)
    descriptor = file._file.fileno()

    class Refusing:
        def close(self) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    inner, file._file = file._file, Refusing()  # type: ignore[assignment]
    file.close()
    inner.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize("kept", [False, True], ids=["from the file", "kept"])
@pytest.mark.parametrize("lost", [1, 100])
def test_small_values_of_a_file_that_changes(lost: int, kept: bool, stored: Path) -> None:
    file = SafetensorsFile(stored)
    if kept:
        file.keep()
    os.truncate(stored, stored.stat().st_size - lost)
    with pytest.raises(BadInputError, match="changed while it was read"):
        file.read_small(["b", "a"])
    file.close()


@pytest.mark.parametrize("hashed", [False, True])
def test_small_values_are_the_tensors(hashed: bool, stored: Path) -> None:
    file = SafetensorsFile(stored)
    if hashed:
        file.hash_in_passing(with_data=True)
    assert file.read_small(["b", "a"]) == [bits(STATE["b"]), bits(STATE["a"])]
    file.close()


def test_a_file_cut_while_it_is_kept(stored: Path) -> None:
    file = SafetensorsFile(stored)
    os.truncate(stored, stored.stat().st_size - 1)
    with pytest.raises(BadInputError, match="changed while it was read"):
        file.keep()
    file.close()


def test_a_file_cut_while_it_is_hashed(stored: Path) -> None:
    file = SafetensorsFile(stored)
    os.truncate(stored, stored.stat().st_size - 1)
    with pytest.raises(BadInputError, match="changed while it was read: it is shorter"):
        file.sha256()
    file.close()


def test_a_large_file_is_not_kept(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "KEPT_BYTES", 10)
    file = SafetensorsFile(stored)
    file.keep()
    assert not file.is_read
    file.close()


def test_names_that_no_file_has(tmp_path: Path) -> None:
    assert not exists("a\0b")
    assert not exists("x" * 5000)
    assert exists(tmp_path)


def test_a_folder_of_weights_is_a_component(tmp_path: Path, stored: Path) -> None:
    """Such as a VAE's, which is no pipeline."""
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "model.safetensors").write_bytes(stored.read_bytes())
    for name in (tmp_path / "vae", stored):
        with open_component(str(name)) as opened:
            assert opened.shapes == {"a": (40,), "b": (3,)}
    with open_component(str(tmp_path)) as opened:  # a pipeline of one model
        assert opened.shapes == {"vae.a": (40,), "vae.b": (3,)}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO], ids=errno.errorcode.get)
def test_a_configuration_that_cannot_be_read(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.json").write_text("{}")
    monkeypatch.setattr(Path, "read_text", failing(number))
    with pytest.raises(BadInputError, match=r"permission denied|cannot be read"):
        read_json(tmp_path / "a.json")


# --- what is said of files that are not there ----------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("*.safetensors", "a shell fills a pattern in"),
        ("nowhere/x.safetensors", "there is no folder .*nowhere here"),
        ("lorra.safetensors", "did you mean .*lora.safetensors"),
        ("quite different", "paths start at "),
    ],
)
def test_nearest(name: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=hint):
        raise UsageError(nearest_file(tmp_path / name))


# --- numbers -------------------------------------------------------------------------------


def test_dtypes_torch_has_not() -> None:
    for name in ("F4", "F6_E2M3", "nothing"):
        with pytest.raises(UsageError, match=f"has no dtype for {name}"):
            dtypes.to_torch(name)


def test_the_other_byte_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    for call in (lambda: dtypes.to_torch("F32"), lambda: dtypes.as_bytes(torch.ones(1))):
        with pytest.raises(UsageError, match="big-endian"):
            call()
