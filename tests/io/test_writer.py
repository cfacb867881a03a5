"""The writer: the reference's bytes, whole or not at all, and nothing left behind."""

import errno
import hashlib
import json
import os
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from stored_tensors import DTYPES, bits, names, state_dicts, text

from lycotool.errors import OutputError
from lycotool.io import nameless, writer
from lycotool.io.header import read_header
from lycotool.io.store import SafetensorsFile, Stored
from lycotool.io.writer import FilePlan, Producer, TensorPlan, prepare_output, write_file

State = dict[str, torch.Tensor]

OLD = b"what was there before"


def plan_of(state: State, metadata: dict[str, str] | None = None, *, hashed: bool = False) -> FilePlan:
    plans = {name: TensorPlan(DTYPES[t.dtype], tuple(t.shape)) for name, t in state.items()}
    return FilePlan(plans, metadata or {}, hashed)


def producer(state: State) -> Producer:
    """The tensors' bytes, in two pieces."""

    def produce(name: str) -> Iterator[memoryview]:
        data = memoryview(bits(state[name]))
        yield data[: len(data) // 2]
        yield data[len(data) // 2 :]

    return produce


def written(path: Path, state: State, metadata: dict[str, str] | None = None) -> bytes:
    write_file(path, plan_of(state, metadata), producer(state))
    return path.read_bytes()


@pytest.fixture(params=["nameless", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of temporary file: ``O_TMPFILE``, and where it does not exist."""
    if request.param == "named":
        monkeypatch.setattr(nameless, "_open_tmpfile", lambda folder: None)
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a hypothesis test."""
    return tmp_path_factory.mktemp("written")


STATE = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}


# --- bytes ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(state=state_dicts(), metadata=st.none() | st.dictionaries(names, text, min_size=1, max_size=1))
def test_the_bytes_are_the_references(folder: Path, state: State, metadata: dict[str, str] | None) -> None:
    """With one metadata key at most: the reference's order of several is not fixed."""
    assert written(folder / "x.safetensors", state, metadata) == save(state, metadata)


def test_tensors_of_all_dtypes_stand_in_the_references_order(tmp_path: Path) -> None:
    """By dtype, then by name; the order within one width matters for the hash of the data."""
    state = {f"{i % 3}{DTYPES[d]}": torch.zeros(1).to(d) for i, d in enumerate(reversed(DTYPES))}

    assert written(tmp_path / "x.safetensors", state) == save(state)


def test_the_planned_size_is_the_files(tmp_path: Path) -> None:
    plan = plan_of(STATE, {"k": "v"})

    assert plan.nbytes == len(written(tmp_path / "x.safetensors", STATE, {"k": "v"}))


@settings(deadline=None, max_examples=50)
@given(state=state_dicts(), metadata=st.dictionaries(names, text, max_size=5), seed=st.randoms())
def test_the_bytes_do_not_depend_on_any_order(
    folder: Path, state: State, metadata: dict[str, str], seed: "st.random"
) -> None:
    first = written(folder / "x.safetensors", state, metadata)
    tensors, entries = list(state.items()), list(metadata.items())
    seed.shuffle(tensors)
    seed.shuffle(entries)

    assert written(folder / "y.safetensors", dict(tensors), dict(entries)) == first
    with (folder / "y.safetensors").open("rb") as file:
        header = read_header(file, len(first), "y")
    assert list(header.metadata.items()) == sorted(metadata.items())


def test_the_header_ends_on_a_multiple_of_eight() -> None:
    for length in range(1, 17):
        (stated,) = struct.unpack("<Q", plan_of({"x" * length: torch.ones(1)}).header()[:8])
        assert stated % 8 == 0


def test_a_header_readers_would_refuse_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MAX_HEADER_BYTES", 1000)

    with pytest.raises(OutputError, match="the header would have"):
        written(tmp_path / "x.safetensors", STATE, {"k": "v" * 1000})
    assert not list(tmp_path.iterdir())


def test_progress_counts_the_data(tmp_path: Path) -> None:
    steps: list[int] = []
    write_file(tmp_path / "x.safetensors", plan_of(STATE), producer(STATE), advance=steps.append)

    assert sum(steps) == 6 * 4 + 4 * 2


def test_standard_output_gets_the_same_bytes(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    write_file(None, plan_of(STATE), producer(STATE))

    assert capsysbinary.readouterr().out == written(tmp_path / "x.safetensors", STATE)


# --- whole or not at all -------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [ValueError("no such tensor"), KeyboardInterrupt(), SystemExit(143)], ids=repr
)
@pytest.mark.parametrize("existing", [True, False], ids=["over a file", "new"])
def test_a_fault_midway_leaves_the_folder_as_it_was(
    tmp_path: Path, way: str, fault: BaseException, existing: bool
) -> None:
    target = tmp_path / "x.safetensors"
    if existing:
        target.write_bytes(OLD)

    def produce(name: str) -> Iterator[memoryview]:
        if name == "b":  # the second in file order
            raise fault
        yield memoryview(bits(STATE[name]))

    with pytest.raises(type(fault)):
        write_file(target, plan_of(STATE), produce)

    assert list(tmp_path.iterdir()) == ([target] if existing else [])
    assert not existing or target.read_bytes() == OLD


@pytest.mark.parametrize("call", ["write", "fsync", "posix_fallocate", "close", "link", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_failing_call_leaves_the_folder_as_it_was(
    tmp_path: Path, way: str, call: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if call == "link" and way == "named":
        call = "replace"  # a named file is not linked
    target = tmp_path / "x.safetensors"
    target.write_bytes(OLD)
    owner, attribute = (Path, call) if call == "replace" else (os, call)
    monkeypatch.setattr(owner, attribute, failing(owner, attribute, number))

    with pytest.raises(OutputError, match=os.strerror(number).lower()):
        write_file(target, plan_of(STATE), producer(STATE))

    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_bytes() == OLD


def failing(owner: object, name: str, number: int) -> Callable[..., object]:
    """A call that fails once.

    ``close`` fails on the file alone, and does its work all the same, as the kernel's does.
    """
    real, failed = getattr(owner, name), False

    def call(*arguments: object, **more: object) -> object:
        nonlocal failed
        if failed or (name == "close" and not stat.S_ISREG(os.fstat(arguments[0]).st_mode)):
            return real(*arguments, **more)
        failed = True
        if name == "close":
            real(*arguments)
        raise OSError(number, os.strerror(number))

    return call


def test_too_few_bytes_are_our_own_mistake(tmp_path: Path, way: str) -> None:
    with pytest.raises(AssertionError, match="produced 0 of 24 bytes"):
        write_file(tmp_path / "x.safetensors", plan_of(STATE), lambda name: [])

    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_read_back_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x.safetensors"
    target.write_bytes(OLD)
    other = plan_of({"other": torch.ones(8)})
    monkeypatch.setattr(FilePlan, "header", lambda self, hashes=None: FilePlan._encode(other, {}))

    with pytest.raises(OutputError, match="does not read back as planned"):
        write_file(target, plan_of(STATE), producer(STATE))

    assert list(tmp_path.iterdir()) == [target]
    assert target.read_bytes() == OLD


def test_without_space_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage)

    def produce(name: str) -> Iterator[memoryview]:
        raise AssertionError("nothing must be computed")

    with pytest.raises(OutputError, match=r"no space: need \d+ bytes, 10 are free"):
        write_file(tmp_path / "x.safetensors", plan_of(STATE), produce)
    assert not list(tmp_path.iterdir())


def test_data_is_on_disk_before_it_has_a_name(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append("fsync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    written(tmp_path / "x.safetensors", STATE)

    assert calls == ["fsync file", "rename", "fsync folder"]


# --- the file itself -----------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_usual_permissions(tmp_path: Path, way: str, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        written(tmp_path / "x.safetensors", STATE)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_a_replaced_file_keeps_its_permissions(tmp_path: Path, way: str, mode: int) -> None:
    target = tmp_path / "x.safetensors"
    target.write_bytes(OLD)
    target.chmod(mode)

    written(target, STATE)

    assert stat.S_IMODE(target.stat().st_mode) == mode


def test_a_symlink_stays_and_its_target_is_written(tmp_path: Path, way: str) -> None:
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    real.write_bytes(OLD)
    link.symlink_to(real.name)

    resolved = prepare_output(str(link), inputs=[], force=True)
    write_file(resolved, plan_of(STATE), producer(STATE))

    assert link.is_symlink()
    assert torch.equal(load_file(real)["w"], STATE["w"])


def test_another_hard_link_keeps_the_old_file(tmp_path: Path, way: str) -> None:
    target, other = tmp_path / "x.safetensors", tmp_path / "other.safetensors"
    target.write_bytes(OLD)
    other.hardlink_to(target)

    written(target, STATE)

    assert other.read_bytes() == OLD


# --- what is refused before any work -------------------------------------------------------


def refused(
    path: Path | str, words: str, *, inputs: list[Path] | None = None, force: bool = True
) -> OutputError:
    with pytest.raises(OutputError, match=words) as caught:
        prepare_output(str(path), inputs=inputs or [], force=force)
    assert caught.value.path == str(path)
    return caught.value


def test_a_new_name_is_accepted(tmp_path: Path) -> None:
    assert prepare_output(str(tmp_path / "x"), inputs=[], force=False) == tmp_path / "x"


def test_an_existing_file_needs_force(tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    target.write_bytes(OLD)

    assert "--force" in (refused(target, "exists already", force=False).hint or "")
    assert prepare_output(str(target), inputs=[], force=True) == target
    assert target.read_bytes() == OLD


@pytest.mark.parametrize("kind", ["same name", "hard link", "symlink"])
def test_the_output_is_never_an_input(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "in.safetensors"
    source.write_bytes(OLD)
    target = tmp_path / "out.safetensors"
    if kind == "hard link":
        target.hardlink_to(source)
    elif kind == "symlink":
        target.symlink_to(source)
    else:
        target = source

    refused(target, "the same file as the input", inputs=[source])


def test_a_folder_is_no_output(tmp_path: Path) -> None:
    refused(tmp_path, "is a directory")


def test_a_fifo_is_no_output(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")

    refused(tmp_path / "fifo", "not a regular file")
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_a_device_is_no_output() -> None:
    refused("/dev/null", "not a regular file")


@pytest.mark.parametrize("mode", [0o444, 0o000])
def test_a_read_only_file_is_not_replaced(tmp_path: Path, mode: int) -> None:
    target = tmp_path / "x.safetensors"
    target.write_bytes(OLD)
    target.chmod(mode)

    refused(target, "read-only")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere" / "x", f"the folder {tmp_path / 'nowhere'} does not exist")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)

    refused(tmp_path / "file" / "x", "not a directory|does not exist")


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Simulated: for root, as whom tests may run, every folder is writable.
    monkeypatch.setattr(writer.os, "access", lambda path, mode: Path(path) != tmp_path)

    refused(tmp_path / "x", "no permission to write in the folder")


def test_a_name_too_long_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 300), "file name.*too long")


def test_a_symlink_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")

    refused(tmp_path / "link", "symlink that leads nowhere")


def test_a_symlink_loop_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")

    refused(tmp_path / "a", "symlink|too many levels")


def test_a_terminal_gets_no_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)

    refused("-", "binary file to a terminal")


def test_a_pipe_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)

    assert prepare_output("-", inputs=[], force=False) is None


def test_metadata_is_readable_by_the_reference(tmp_path: Path) -> None:
    metadata = {"b": "line\nbreak", "a": "\U0001f600 \u2028 \x7f", "": '"\\'}
    content = written(tmp_path / "x.safetensors", STATE, metadata)
    (length,) = struct.unpack("<Q", content[:8])

    assert json.loads(content[8 : 8 + length])["__metadata__"] == metadata
    assert torch.equal(load_file(tmp_path / "x.safetensors")["b"], STATE["b"])


# --- what is written later, and what stands in a file already ------------------------------


def test_tensors_that_are_known_last_stand_where_they_belong(tmp_path: Path, way: str) -> None:
    """Asked for after all others; the bytes are the same, hashes and settled metadata included."""
    files, asked = [], []

    def noted(name: str) -> Iterator[memoryview]:
        asked.append(name)
        yield from producer(STATE)(name)

    for number, last in enumerate([frozenset(), frozenset(["w"]), frozenset(["b", "w"])]):
        path = tmp_path / f"{number}.safetensors"
        settled = {"loss": "0.25"} if number else None
        plan = FilePlan(
            plan_of(STATE).tensors,
            {"loss": "?" * 4 if number else "0.25"},
            hashed=True,
            spec_hashed=True,
            last=last,
            settle=None if settled is None else lambda settled=settled: settled,
        )
        write_file(path, plan, noted)
        files.append(path.read_bytes())
    assert len(set(files)) == 1
    assert asked == ["w", "b", "b", "w", "w", "b"]


def test_settled_metadata_alone(tmp_path: Path) -> None:
    plan = FilePlan(plan_of(STATE).tensors, {"loss": "????"}, settle=lambda: {"loss": "0.25"})
    write_file(tmp_path / "x.safetensors", plan, producer(STATE))

    assert (tmp_path / "x.safetensors").read_bytes() == save(STATE, {"loss": "0.25"})


def test_settled_metadata_of_another_length_are_our_own_mistake(tmp_path: Path) -> None:
    plan = FilePlan(plan_of(STATE).tensors, {"loss": "?"}, settle=lambda: {"loss": "0.25" * 10})
    with pytest.raises(AssertionError, match="were left for it"):
        write_file(tmp_path / "x.safetensors", plan, producer(STATE))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("checked", [False, True])
def test_what_stands_in_a_file_is_copied(hashed: bool, checked: bool, tmp_path: Path) -> None:
    """By the system, or through memory where a hash is wanted: the same file."""
    source = tmp_path / "source.safetensors"
    source.write_bytes(save({**STATE, "large": torch.arange(20_000.0), "none": torch.zeros(0)}))
    file = SafetensorsFile(source)
    plans = {name: TensorPlan(info.dtype, info.shape) for name, info in file.tensors.items()}
    seen: list[dict[str, bytes]] = []

    def check(written: writer.Written) -> None:
        assert written.path.exists()
        seen.append(dict(written.digests))

    outcomes = []
    for number, produce in enumerate([lambda name: [Stored(file, name)], file.chunks]):
        target = tmp_path / f"{number}.safetensors"
        write_file(target, FilePlan(plans, {}, hashed), produce, check=check if checked else None)
        outcomes.append(target.read_bytes())
    file.close()
    assert outcomes[0] == outcomes[1]
    data = source.read_bytes()
    expected = {
        name: hashlib.sha256(data[file.data_start + info.start : file.data_start + info.stop]).digest()
        for name, info in file.tensors.items()
    }
    assert seen == [expected, expected] * checked
