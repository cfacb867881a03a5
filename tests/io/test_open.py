"""Whatever a user may name: files, sharded checkpoints, folders, and hostile ones of each."""

import argparse
import errno
import io
import json
import os
import pickle
import random
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from lycotool.errors import (
    BadInputError,
    IncompatibleError,
    LycotoolError,
    ResourceError,
    UnsafeError,
    UsageError,
)
from lycotool.io import open as opening
from lycotool.io.open import open_store

State = dict[str, torch.Tensor]

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
ONES, TWOS = {"a.weight": torch.ones(4)}, {"b.weight": torch.full((4,), 2.0)}


def values(name: Path | str, *, allow_pickle: bool = False) -> State:
    """Everything a store holds."""
    with open_store(str(name), allow_pickle=allow_pickle) as store:
        return {key: store.tensor(key) for key in store.entries}


def assert_same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


def refusal(name: Path | str, kind: type[LycotoolError], words: str, **options: bool) -> LycotoolError:
    """The error that opening ends with: of this very class, saying these words somewhere."""
    with pytest.raises(LycotoolError) as caught:
        open_store(str(name), **options)
    assert type(caught.value) is kind, caught.value
    text = "\n".join([caught.value.headline, *caught.value.details, caught.value.hint or ""])
    with pytest.raises(kind, match=words):
        raise kind(text)
    return caught.value


# --- single files --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.safetensors", "x.SAFETENSORS", "x.ckpt", "x.pt", "x.bin", "x"])
def test_safetensors_content_is_read_whatever_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(save(ONES, {"k": "v"}))

    with open_store(str(tmp_path / name)) as store:
        assert store.kind == "file"
        assert store.metadata == {"k": "v"}
        assert store.shapes == {"a.weight": (4,)}
        assert store.files == [tmp_path / name]
        assert store.nbytes == 16
        assert torch.equal(store.tensor("a.weight"), ONES["a.weight"])


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    refusal(tmp_path / "nothing.safetensors", UsageError, "no such file")


def test_a_name_too_long_for_any_file_is_a_usage_error(tmp_path: Path) -> None:
    refusal(tmp_path / ("x" * 300), UsageError, "no such file|too long")


def test_a_dangling_symlink_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nothing")

    refusal(tmp_path / "link", UsageError, "leads nowhere")


def test_a_symlink_to_a_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(save(ONES))
    (tmp_path / "link.safetensors").symlink_to("real")

    assert_same(values(tmp_path / "link.safetensors"), ONES)


def test_a_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")

    refusal(tmp_path / "fifo.safetensors", BadInputError, "not a regular file")


def test_a_device_is_refused() -> None:
    refusal("/dev/zero", BadInputError, "not a regular file")


def test_an_empty_folder_is_a_usage_error(tmp_path: Path) -> None:
    refusal(tmp_path, UsageError, "neither a diffusers folder, a PEFT folder nor a sharded checkpoint")


def test_a_damaged_file_is_named_as_the_user_named_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.safetensors").write_bytes(save(ONES)[:-1])
    monkeypatch.chdir(tmp_path)

    assert refusal("x.safetensors", BadInputError, "truncated").path == "x.safetensors"


# --- pickles -------------------------------------------------------------------------------


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.marker),))


def zipped(path: Path, content: object) -> None:
    torch.save(content, path)


def legacy(path: Path, content: object) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def bare(path: Path, content: object) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    "named", [b"cposix\nsystem\n", b"\x8c\x05posix\x8c\x06system\x93"], ids=["old", "new"]
)
@pytest.mark.parametrize("cut", [b"", b"\xff"], ids=["whole", "cut"])
def test_what_a_pickle_would_import_is_named_whatever_stops_the_reader_first(
    named: bytes, cut: bytes, tmp_path: Path
) -> None:
    """Here an instruction that the reader of tensors does not know; the rest is looked at, not run."""
    (tmp_path / "x.bin").write_bytes(b"\x80\x04" + b"F1.5\n" + named + cut + b".")

    refusal(tmp_path / "x.bin", UnsafeError, r"posix\.system", allow_pickle=True)


def test_instructions_that_import_nothing_are_unsupported(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\x80\x04F1.5\n.")

    refusal(tmp_path / "x.bin", UnsafeError, "unsupported instructions", allow_pickle=True)


WRITERS = pytest.mark.parametrize("write", [zipped, legacy], ids=["zip", "legacy"])
EVIL_WRITERS = pytest.mark.parametrize("write", [zipped, legacy, bare], ids=["zip", "legacy", "bare"])


def test_the_evil_pickle_of_these_tests_works(tmp_path: Path) -> None:
    """Otherwise that nothing ran would prove nothing."""
    bare(tmp_path / "x.bin", Evil(tmp_path / "pwned"))

    pickle.loads((tmp_path / "x.bin").read_bytes())

    assert (tmp_path / "pwned").exists()


@EVIL_WRITERS
@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".PT", ""])
def test_a_pickle_that_runs_code_is_unsafe_and_does_not_run(
    tmp_path: Path, write: Callable[[Path, object], None], allow_pickle: bool, suffix: str
) -> None:
    path = tmp_path / f"x{suffix}"
    write(path, {"state_dict": {"a": torch.zeros(2), "x": Evil(tmp_path / "pwned")}})

    refusal(path, UnsafeError, "mkdir" if allow_pickle else "pickle", allow_pickle=allow_pickle)
    assert not (tmp_path / "pwned").exists()


@EVIL_WRITERS
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_a_pickle_named_safetensors_is_never_unpickled(
    tmp_path: Path, write: Callable[[Path, object], None], allow_pickle: bool
) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {"a": torch.zeros(2), "x": Evil(tmp_path / "pwned")})

    refusal(path, BadInputError, "PyTorch", allow_pickle=allow_pickle)
    assert not (tmp_path / "pwned").exists()


@EVIL_WRITERS
def test_the_environment_cannot_switch_safety_off(
    tmp_path: Path, write: Callable[[Path, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    write(tmp_path / "x.pt", {"x": Evil(tmp_path / "pwned")})

    refusal(tmp_path / "x.pt", UnsafeError, "mkdir", allow_pickle=True)
    assert not (tmp_path / "pwned").exists()


@WRITERS
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "state_dict"])
def test_a_plain_pickle_is_read_on_request(
    tmp_path: Path, write: Callable[[Path, object], None], nested: bool
) -> None:
    state = {
        "w": torch.arange(12.0).reshape(3, 4).T,  # not contiguous
        "half": torch.ones(2, dtype=torch.bfloat16),
        "alpha": torch.tensor(4.0),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "steps": torch.tensor(7),
    }
    write(tmp_path / "x.pt", {"state_dict": state, "epoch": 3} if nested else state)

    refusal(tmp_path / "x.pt", UnsafeError, "--allow-pickle")
    assert_same(values(tmp_path / "x.pt", allow_pickle=True), state)
    with open_store(str(tmp_path / "x.pt"), allow_pickle=True) as store:
        assert b"".join(bytes(piece) for piece in store.chunks("w")) == state["w"].numpy().tobytes()
        assert list(store.chunks("empty")) == []
        assert store.scalar("alpha") == 4.0


@pytest.mark.parametrize(
    ("extra", "words"),
    [(argparse.Namespace(lr=1), "argparse.Namespace"), (np.float64(0.1), "numpy")],
    ids=["Lightning", "numpy"],
)
def test_a_pickle_with_other_objects_names_them(tmp_path: Path, extra: object, words: str) -> None:
    zipped(tmp_path / "x.ckpt", {"state_dict": {"a": torch.zeros(2)}, "hparams": extra})

    refusal(tmp_path / "x.ckpt", UnsafeError, words, allow_pickle=True)


@pytest.mark.parametrize("content", [[1, 2, 3], {}, {"epoch": 3}, "text"], ids=repr)
def test_a_pickle_without_tensors_is_no_state_dict(tmp_path: Path, content: object) -> None:
    zipped(tmp_path / "x.pt", content)

    refusal(tmp_path / "x.pt", BadInputError, "not a state dict", allow_pickle=True)


def test_a_pickle_with_a_dtype_no_file_has_is_refused(tmp_path: Path) -> None:
    zipped(tmp_path / "x.pt", {"a": torch.zeros(2, dtype=torch.complex128)})

    refusal(tmp_path / "x.pt", BadInputError, "complex128", allow_pickle=True)


def rezip(
    path: Path, *, compression: int = zipfile.ZIP_STORED, cut_storage: bool = False, extra: str = ""
) -> None:
    """Rewrite a PyTorch zip with something wrong about it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data[:16] if cut_storage and "/data/" in name else data)
        if extra:
            archive.writestr(extra, b"x")


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    zipped(tmp_path / "x.ckpt", {"a": torch.zeros(2**20)})
    rezip(tmp_path / "x.ckpt", compression=zipfile.ZIP_DEFLATED)

    refusal(tmp_path / "x.ckpt", BadInputError, "compressed", allow_pickle=True)


def test_a_storage_shorter_than_it_says_is_refused(tmp_path: Path) -> None:
    zipped(tmp_path / "x.pt", {"a": torch.zeros(2**20)})
    rezip(tmp_path / "x.pt", cut_storage=True)

    refusal(tmp_path / "x.pt", BadInputError, "damaged", allow_pickle=True)


def test_an_archive_writes_nothing_outside(tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    zipped(folder / "x.pt", {"a": torch.zeros(4)})
    rezip(folder / "x.pt", extra="../escaped")

    refusal(folder / "x.pt", BadInputError, "damaged", allow_pickle=True)
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]


@WRITERS
def test_a_truncated_pickle_is_refused(tmp_path: Path, write: Callable[[Path, object], None]) -> None:
    path = tmp_path / "x.pt"
    write(path, {"a": torch.arange(20.0)})
    whole = path.read_bytes()

    for stop in range(2, len(whole) - 30, 23):
        path.write_bytes(whole[:stop])
        with pytest.raises((BadInputError, UnsafeError)):  # half a name may look like an unsafe one
            open_store(str(path), allow_pickle=True)


@WRITERS
def test_a_pickle_with_damaged_bytes_is_read_or_refused(
    tmp_path: Path, write: Callable[[Path, object], None]
) -> None:
    """Whatever torch and zipfile make of them, it ends in one of lycotool's errors."""
    path = tmp_path / "x.pt"
    write(path, {"a": torch.arange(20.0), "b": torch.ones(2, dtype=torch.bfloat16)})
    whole = path.read_bytes()

    refused = 0
    for seed in range(300):
        damaged = bytearray(whole)
        generator = random.Random(seed)
        for _ in range(3):
            damaged[generator.randrange(2, len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            open_store(str(path), allow_pickle=True)
        except (BadInputError, UnsafeError):
            refused += 1
    assert refused > 0


def test_a_damaged_zip_directory_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    zipped(path, {"a": torch.arange(10.0)})
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x01\xff"))

    refusal(path, BadInputError, "truncated or damaged", allow_pickle=True)


# --- sharded checkpoints -------------------------------------------------------------------


def sharded(folder: Path, weight_map: object, *, shards: dict[str, State] | None = None) -> Path:
    """Two shards and an index that says this of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in ({A: ONES, B: TWOS} if shards is None else shards).items():
        save_file(state, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map}))
    return index


GOOD_MAP = {"a.weight": A, "b.weight": B}


def test_a_sharded_checkpoint_is_one_store(tmp_path: Path) -> None:
    index = sharded(tmp_path, GOOD_MAP)

    with open_store(str(index)) as store:
        assert store.kind == "sharded"
        assert store.warnings == ()
        assert store.files == [tmp_path / A, tmp_path / B]
    assert_same(values(index), ONES | TWOS)


def test_a_folder_with_one_index_is_that_checkpoint(tmp_path: Path) -> None:
    sharded(tmp_path, GOOD_MAP)

    assert_same(values(tmp_path), ONES | TWOS)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    index = sharded(tmp_path, GOOD_MAP)
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())

    assert_same(values(index), ONES | TWOS)


def test_a_wrong_total_size_is_a_warning(tmp_path: Path) -> None:
    index = sharded(tmp_path, GOOD_MAP)
    index.write_text(index.read_text().replace("32", "33"))

    with open_store(str(index)) as store:
        (warning,) = store.warnings
    assert "total_size is 33, the tensors have 32 bytes" in warning


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("../secret/s.safetensors", "outside"),
        ("..\\secret\\s.safetensors", "outside"),
        ("sub/../../secret/s.safetensors", "outside"),
        ("\0.safetensors", "outside"),
        ("{root}/secret/s.safetensors", "absolute"),
        ("C:\\secret\\s.safetensors", "absolute"),
        ("\\\\server\\share\\s.safetensors", "absolute"),
        ("http://127.0.0.1:9/x.safetensors", "URL"),
        ("file:///secret/s.safetensors", "URL"),
        ("evil.bin", "not a .safetensors"),
        ("../secret/evil.bin", "outside"),
        ("link.safetensors", "symlink"),
        ("folder/s.safetensors", "symlink"),
    ],
)
def test_a_shard_outside_the_folder_is_unsafe(tmp_path: Path, entry: str, words: str) -> None:
    (tmp_path / "secret").mkdir()
    save_file({"a.weight": torch.full((4,), 42.0)}, tmp_path / "secret" / "s.safetensors")
    bare(tmp_path / "secret" / "evil.bin", Evil(tmp_path / "pwned"))
    folder = tmp_path / "checkpoint"
    index = sharded(folder, {"a.weight": entry.replace("{root}", str(tmp_path)), "b.weight": B})
    bare(folder / "evil.bin", Evil(tmp_path / "pwned"))
    (folder / "link.safetensors").symlink_to("../secret/s.safetensors")
    (folder / "folder").symlink_to("../secret")

    refusal(index, UnsafeError, words, allow_pickle=True)
    assert not (tmp_path / "pwned").exists()


def test_the_hugging_face_caches_links_are_followed(tmp_path: Path) -> None:
    """``snapshots/REVISION`` holds links into ``blobs``, and into no other place."""
    root = tmp_path / "models--owner--name"
    (root / "blobs").mkdir(parents=True)
    snapshot = root / "snapshots" / "0123abc"
    index = sharded(snapshot, GOOD_MAP)
    for name in (A, B, index.name):
        blob = root / "blobs" / f"hash-of-{name}"
        (snapshot / name).rename(blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")

    assert_same(values(snapshot), ONES | TWOS)

    (snapshot / A).unlink()
    (tmp_path / "other.safetensors").write_bytes(save(ONES))
    (snapshot / A).symlink_to(tmp_path / "other.safetensors")
    refusal(snapshot, UnsafeError, "symlink")


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a.weight": A, "b.weight": "model-00003-of-00003.safetensors"}, "model-00003-of-00003"),
        ({"a.weight": A, "b.weight": A}, r"b\.weight"),
        ({"a.weight": B, "b.weight": A}, r"a\.weight.*not in"),
        ({"a.weight": A, "b.weight": B, "c.weight": B}, r"c\.weight: not in"),
        ({"a.weight": 5, "b.weight": B}, "weight_map"),
        ({"a.weight": "model.safetensors.index.json", "b.weight": B}, "index.json"),
        ([], "weight_map"),
        (None, "weight_map"),
    ],
)
def test_an_index_that_is_wrong_about_its_shards_is_bad_input(
    tmp_path: Path, weight_map: object, words: str
) -> None:
    refusal(sharded(tmp_path, weight_map), BadInputError, words)


def test_a_shard_with_a_tensor_the_index_does_not_list_is_bad_input(tmp_path: Path) -> None:
    index = sharded(tmp_path, {"a.weight": A}, shards={A: ONES | TWOS})

    refusal(index, BadInputError, r"b\.weight.*does not list it")


def test_one_tensor_in_two_shards_is_bad_input(tmp_path: Path) -> None:
    index = sharded(tmp_path, GOOD_MAP, shards={A: ONES, B: ONES | TWOS})

    refusal(index, BadInputError, rf"a\.weight: in {B}, but the index says {A}")


def test_a_damaged_shard_is_bad_input(tmp_path: Path) -> None:
    index = sharded(tmp_path, GOOD_MAP)
    (tmp_path / B).write_bytes((tmp_path / B).read_bytes()[:-1])

    refusal(index, BadInputError, f"{B}.*truncated")


def test_an_empty_index_fits_nothing(tmp_path: Path) -> None:
    refusal(sharded(tmp_path, {}), IncompatibleError, "no tensors")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"weight_map":', "JSON"),
        ("[]", "JSON"),
        ('{"metadata":{}}', "weight_map"),
        ("[" * 200_000, "JSON"),
        (
            f'{{"weight_map":{{"a.weight":"{A}","a.weight":"../s.safetensors","b.weight":"{B}"}}}}',
            "duplicate",
        ),
    ],
    ids=["cut", "list", "no weight_map", "deep", "duplicate key"],
)
def test_a_malformed_index_is_bad_input(tmp_path: Path, text: str, words: str) -> None:
    index = sharded(tmp_path, {})
    index.write_text(text)

    refusal(index, BadInputError, words)


def test_an_index_that_is_not_text_is_bad_input(tmp_path: Path) -> None:
    index = sharded(tmp_path, {})
    index.write_bytes(b"\xff\xfe\0")

    refusal(index, BadInputError, "JSON")


def test_a_huge_index_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_MAX_INDEX_BYTES", 50)

    refusal(sharded(tmp_path, GOOD_MAP), BadInputError, "larger than 50 bytes")


# --- diffusers and PEFT folders ------------------------------------------------------------


def test_a_diffusers_folder_names_tensors_by_component(tmp_path: Path) -> None:
    for name in ("unet", "text_encoder", "text_encoder_2", "vae", "scheduler"):
        (tmp_path / name).mkdir()
    save_file(ONES, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(TWOS, tmp_path / "text_encoder" / "model.safetensors")
    sharded(tmp_path / "text_encoder_2", GOOD_MAP)
    save_file({"c": torch.zeros(2)}, tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors")

    with open_store(str(tmp_path)) as store:
        assert store.kind == "diffusers"
    assert_same(
        values(tmp_path),
        {
            "unet.a.weight": ONES["a.weight"],
            "text_encoder.b.weight": TWOS["b.weight"],
            "text_encoder_2.a.weight": ONES["a.weight"],
            "text_encoder_2.b.weight": TWOS["b.weight"],
            "vae.c": torch.zeros(2),
        },
    )


def test_the_full_precision_weights_of_a_component_are_read(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    save_file(ONES, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(TWOS, tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors")

    assert_same(values(tmp_path), {"unet.a.weight": ONES["a.weight"]})


def test_a_component_without_weights_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()

    refusal(tmp_path, BadInputError, "unet.*no weights file")


def test_a_component_that_is_a_pickle_is_unsafe(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    zipped(tmp_path / "unet" / "diffusion_pytorch_model.bin", ONES)

    refusal(tmp_path, UnsafeError, "pickle")
    assert_same(values(tmp_path, allow_pickle=True), {"unet.a.weight": ONES["a.weight"]})


def peft_folder(folder: Path, config: str = '{"peft_type": "LORA", "r": 8}') -> Path:
    (folder / "adapter_config.json").write_text(config)
    return folder


def test_a_peft_folder_carries_its_configuration(tmp_path: Path) -> None:
    save_file(ONES, tmp_path / "adapter_model.safetensors")

    with open_store(str(peft_folder(tmp_path))) as store:
        assert store.kind == "peft"
        assert store.config == {"peft_type": "LORA", "r": 8}
    assert_same(values(tmp_path), ONES)


@pytest.mark.parametrize("config", ["", "[]", '{"r": 8, "r": 16}', '{"r": 8'], ids=repr)
def test_a_malformed_configuration_is_bad_input(tmp_path: Path, config: str) -> None:
    save_file(ONES, tmp_path / "adapter_model.safetensors")

    refusal(peft_folder(tmp_path, config), BadInputError, r"adapter_config\.json")


def test_a_peft_folder_without_weights_is_bad_input(tmp_path: Path) -> None:
    refusal(peft_folder(tmp_path), BadInputError, "no weights file")


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_an_evil_peft_pickle_does_not_run(tmp_path: Path, allow_pickle: bool) -> None:
    zipped(tmp_path / "adapter_model.bin", {"x": Evil(tmp_path / "pwned")})

    refusal(peft_folder(tmp_path), UnsafeError, "pickle", allow_pickle=allow_pickle)
    assert not (tmp_path / "pwned").exists()


def test_a_header_with_a_lying_length_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 10**7) + b"{}" * 8)

    refusal(tmp_path / "x.safetensors", BadInputError, "header says")


# --- standard input ------------------------------------------------------------------------


class Pipe(io.TextIOWrapper):
    """Standard input as a pipe's end, or a terminal."""

    def __init__(self, content: bytes, *, is_terminal: bool = False) -> None:
        super().__init__(io.BytesIO(content))
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def test_standard_input_is_a_file_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one is another."""
    for number in (1.0, 2.0):
        monkeypatch.setattr(sys, "stdin", Pipe(save({"a": torch.tensor(number)})))
        assert_same(values("-"), {"a": torch.tensor(number)})
        assert "one file" in refusal("-", UsageError, "was read already").message


@pytest.mark.parametrize("stdin", [None, Pipe(b"", is_terminal=True)], ids=["closed", "a terminal"])
def test_a_terminal_is_no_file(stdin: Pipe | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)

    refusal("-", UsageError, "which is a terminal here")


def test_standard_input_that_fits_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdin", Pipe(save(ONES)))
    monkeypatch.setattr("shutil.copyfileobj", full)

    refusal("-", ResourceError, "cannot be kept in .*: no space left on device")
