"""Folders as outputs: a small one that is made, and a diffusers folder made from another."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from stored_tensors import bits

from lycotool.errors import BadInputError, LycotoolError, OutputError
from lycotool.io import folder as folders
from lycotool.io import nameless, tree
from lycotool.io.folder import build_folder, prepare_folder, publish
from lycotool.io.open import open_store
from lycotool.io.shards import OutputFile
from lycotool.io.tree import prepare_tree, replace_folder, weight_files, write_tree
from lycotool.io.writer import FilePlan, TensorPlan

WEIGHT = torch.arange(6.0).reshape(2, 3)
PLAN = FilePlan({"w": TensorPlan("F32", (2, 3))}, {})


def produce(name: str) -> list[memoryview]:
    return [memoryview(bits(WEIGHT))]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def failing(number: int) -> Callable[..., object]:
    def call(*arguments: object, **more: object) -> object:
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture(params=["exchanged", "put aside"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Systems that let two folders change names in one step, and those that do not."""
    if request.param == "put aside":
        monkeypatch.setattr(tree, "exchange", lambda first, second: False)
    return request.param


# --- what is refused before any work -------------------------------------------------------


@pytest.fixture(params=["folder", "tree"])
def prepare(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """Either kind of folder; the source of a tree is ``tmp_path / source``."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "x").write_bytes(b"x")

    def either(output: str, *, force: bool = False) -> Path:
        if request.param == "tree":
            return prepare_tree(output, source, force=force).path
        return prepare_folder(output, [source / "x"], force=force)

    return either


def test_a_new_name_is_accepted(prepare: Callable[..., Path], tmp_path: Path) -> None:
    assert prepare(str(tmp_path / "out")) == tmp_path / "out"


def test_an_existing_folder_needs_force(prepare: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    with pytest.raises(OutputError, match="exists already") as caught:
        prepare(str(tmp_path / "out"))
    assert "--force" in (caught.value.hint or "")
    assert prepare(str(tmp_path / "out"), force=True) == tmp_path / "out"


@pytest.mark.parametrize("output", ["source", "."])
def test_the_inputs_folder_is_never_replaced(
    output: str, prepare: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=r"holds the input|overlaps the input"):
        prepare(str(tmp_path / output), force=True)


def test_a_file_is_no_folder(prepare: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"")

    with pytest.raises(OutputError, match="is not a folder"):
        prepare(str(tmp_path / "out"), force=True)


def test_a_missing_parent_is_named_with_the_way_to_make_it(
    prepare: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="does not exist") as caught:
        prepare(str(tmp_path / "no where" / "out"))
    assert caught.value.hint is not None
    assert f"mkdir -p '{tmp_path / 'no where'}'" in caught.value.hint


def test_standard_output_is_no_folder(prepare: Callable[..., Path]) -> None:
    with pytest.raises(OutputError, match="standard output"):
        prepare("-")


def test_a_parent_without_permission(
    prepare: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Simulated: for root, as whom tests may run, every folder is writable.
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    with pytest.raises(OutputError, match="no permission"):
        prepare(str(tmp_path / "out"))


# --- a small folder ------------------------------------------------------------------------


def test_a_small_folder_reads_back(tmp_path: Path, way: str) -> None:
    for existing in (False, True):
        build_folder(tmp_path / "building", "w.safetensors", PLAN, produce, {"config.json": "{}"})
        assert (tmp_path / "out").exists() is existing
        publish(tmp_path / "building", tmp_path / "out")
        assert sorted(contents(tmp_path)) == ["out/config.json", "out/w.safetensors"]
        assert torch.equal(load_file(tmp_path / "out" / "w.safetensors")["w"], WEIGHT)
        (tmp_path / "out" / "older").write_bytes(b"not to be kept")
        (tmp_path / "out" / "older").unlink()


@pytest.mark.parametrize("name", ["flush_files", "write_file"])
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["full", "interrupted"],
)
def test_what_was_built_is_gone_after_a_fault(
    name: str,
    fault: BaseException,
    kind: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def call(*arguments: object, **more: object) -> None:
        raise fault

    monkeypatch.setattr(folders, name, call)
    with pytest.raises(kind):
        build_folder(tmp_path / "building", "w.safetensors", PLAN, produce, {"config.json": "{}"})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_bytes(b"old")
    (tmp_path / "building").mkdir()
    real, failed = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        if self.name == "building":
            failed.append(self)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    if way == "exchanged":
        monkeypatch.setattr(tree, "exchange", failing(errno.EIO))
    with pytest.raises(OutputError, match="input/output error"):
        publish(tmp_path / "building", tmp_path / "out")
    assert contents(tmp_path) == {"out/old": b"old"}


def test_an_older_folder_that_cannot_be_removed_is_said(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one has its name by then."""
    for name in ("out", "building"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(b"")
    monkeypatch.setattr(tree.shutil, "rmtree", failing(errno.EACCES))

    with pytest.raises(OSError, match=r"was written, but the older .* cannot be removed: permission denied"):
        replace_folder(tmp_path / "building", tmp_path / "out")
    assert "out/building" in contents(tmp_path)


# --- two names that change places ----------------------------------------------------------


def test_two_files_change_names(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)

    assert nameless.exchange(tmp_path / "a", tmp_path / "b")
    assert contents(tmp_path) == {"a": b"b", "b": b"a"}


def test_names_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        nameless.exchange(tmp_path / "a", tmp_path / "b")


class Library:
    """A C library whose ``renameat2`` cannot."""

    def __init__(self, *arguments: object, **more: object) -> None:
        self.renameat2 = lambda *arguments: -1


@pytest.mark.parametrize("library", [Library, lambda *a, **m: object()], ids=["refuses", "has none"])
def test_a_system_that_cannot_exchange(
    library: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nameless.ctypes, "CDLL", library)
    monkeypatch.setattr(nameless.ctypes, "get_errno", lambda: errno.EINVAL)

    assert not nameless.exchange(tmp_path / "a", tmp_path / "b")


# --- a diffusers folder --------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """Two components, one of them with other copies of its weights, one a pickle."""
    source = tmp_path / "source"
    (source / "unet").mkdir(parents=True)
    (source / "text_encoder").mkdir()
    (source / "tokenizer").mkdir()
    (source / "model_index.json").write_text("{}")
    (source / "tokenizer" / "vocab.json").write_text("{}")
    (source / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(save({"w": WEIGHT}))
    (source / "unet" / "diffusion_pytorch_model.fp16.bin").write_bytes(b"old values")
    (source / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")
    (source / "unet" / "config.json").write_text('{"quantization_config": {"a": 1}, "kept": true}')
    torch.save({"t": WEIGHT}, source / "text_encoder" / "pytorch_model.bin")
    return source


def outputs(source: Path) -> list[OutputFile]:
    with open_store(str(source), allow_pickle=True) as store:
        names = weight_files(store)
    assert names == {
        "unet.w": "unet/diffusion_pytorch_model.safetensors",
        "text_encoder.t": "text_encoder/model.safetensors",
    }
    return [
        OutputFile(name, FilePlan({key[-1]: TensorPlan("F32", (2, 3))}, {}), {key[-1]: key})
        for key, name in names.items()
    ]


def test_pickles_of_diffusers_become_its_safetensors(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    torch.save({"t": WEIGHT}, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    with open_store(str(tmp_path), allow_pickle=True) as store:
        assert weight_files(store) == {"vae.t": "vae/diffusion_pytorch_model.safetensors"}


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over a folder"])
def test_a_tree_has_the_new_weights_and_all_else(
    existing: bool, pipeline: Path, tmp_path: Path, way: str
) -> None:
    if existing:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "older").write_bytes(b"")
    before = contents(pipeline)
    target = prepare_tree(str(tmp_path / "out"), pipeline, force=existing)
    write_tree(
        target,
        outputs(pipeline),
        {"unet/extra.json": "[]"},
        produce,
        plain=frozenset(["unet", "text_encoder"]),  # the second has no configuration
    )

    found = contents(tmp_path / "out")
    assert sorted(found) == [
        "model_index.json", "text_encoder/model.safetensors", "tokenizer/vocab.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "unet/extra.json",
    ]  # fmt: skip
    assert json.loads(found["unet/config.json"]) == {"kept": True}
    assert torch.equal(load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")["w"], WEIGHT)
    assert contents(pipeline) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_a_configuration_without_quantisation_is_copied(pipeline: Path, tmp_path: Path) -> None:
    config = pipeline / "unet" / "config.json"
    config.write_text('{"a":   1}')
    target = prepare_tree(str(tmp_path / "out"), pipeline, force=False)
    write_tree(target, outputs(pipeline), {}, produce, plain=frozenset(["unet"]))

    assert (tmp_path / "out" / "unet" / "config.json").read_text() == '{"a":   1}'


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000])
def test_a_configuration_that_cannot_be_read(text: str, pipeline: Path, tmp_path: Path) -> None:
    (pipeline / "unet" / "config.json").write_text(text)
    target = prepare_tree(str(tmp_path / "out"), pipeline, force=False)

    with pytest.raises(BadInputError, match="JSON"):
        write_tree(target, outputs(pipeline), {}, produce, plain=frozenset(["unet"]))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["flush_files", "replace_folder"])
def test_a_disk_that_fails_at_the_end_leaves_the_old_tree(
    name: str, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    target = prepare_tree(str(tmp_path / "out"), pipeline, force=True)
    monkeypatch.setattr(tree, name, failing(errno.EIO))

    with pytest.raises(OutputError, match="input/output error"):
        write_tree(target, outputs(pipeline), {}, produce)
    assert contents(tmp_path / "out") == {}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (OSError(errno.EIO, "Input/output error"), OutputError),
        (OutputError("no space: need 1 bytes", path="hidden", hint="a way out"), OutputError),
        (BadInputError("the file changed"), BadInputError),
    ],
    ids=["system", "output", "input"],
)
def test_a_fault_leaves_the_old_tree(
    fault: Exception,
    kind: type[LycotoolError],
    pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_bytes(b"old")
    target = prepare_tree(str(tmp_path / "out"), pipeline, force=True)

    def broken(name: str) -> Iterator[memoryview]:
        raise fault

    with pytest.raises(kind) as caught:
        write_tree(target, outputs(pipeline), {}, broken)
    if kind is OutputError:
        assert caught.value.path == str(tmp_path / "out")  # not the hidden name it was built under
    assert contents(tmp_path / "out") == {"old": b"old"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
