"""The two hashes of adapter metadata, against their definition on the reference's bytes."""

import hashlib
import json
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from examples import many
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from stored_tensors import DTYPES, bits, state_dicts

from lycotool.io.hashes import DataHasher, legacy_hash
from lycotool.io.writer import FilePlan, TensorPlan, write_file

State = dict[str, torch.Tensor]
TRAINING = {"ss_network_dim": "4", "ss_output_name": "näme", "ss_tag_frequency": json.dumps({"a": 1})}
OTHERS = {"lycotool.merge": "x" * 100, "modelspec.title": "t", "format": "pt"}


def defined_hashes(state: State, metadata: dict[str, str]) -> dict[str, str]:
    """sd-scripts' ``precalculate_safetensors_hashes``."""
    content = save(state, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    (length,) = struct.unpack("<Q", content[:8])
    return {
        "sshs_model_hash": hashlib.sha256(content[8 + length :]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }


def written_metadata(path: Path, state: State, metadata: dict[str, str]) -> dict[str, str]:
    """Write with the hashes computed on the way; give the metadata that is in the file."""
    plans = {name: TensorPlan(DTYPES[t.dtype], tuple(t.shape)) for name, t in state.items()}

    def produce(name: str) -> Iterator[memoryview]:
        data = memoryview(bits(state[name]))
        for start in range(0, len(data), 300_007):
            yield data[start : start + 300_007]

    write_file(path, FilePlan(plans, metadata, hashed=True), produce)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])["__metadata__"]


def state_of(nbytes: int) -> State:
    """Three tensors with this many bytes in all."""
    generator = torch.Generator().manual_seed(nbytes)
    sizes = (nbytes // 2, nbytes // 3, nbytes - nbytes // 2 - nbytes // 3)
    return {
        f"{i}.weight": torch.randint(0, 256, (size,), generator=generator).to(torch.uint8)
        for i, size in enumerate(sizes)
    }


@pytest.mark.parametrize(
    "nbytes",
    # Well below 1 MiB; ending in, at and after the window of the legacy hash.
    [0, 1000, 0x100000 - 600, 0x100000, 0x108000, 0x110000 - 500, 0x110000, 0x130000, 0x300000],
    ids=hex,
)
def test_the_hashes_are_the_defined_ones(tmp_path: Path, nbytes: int) -> None:
    state = state_of(nbytes)

    found = written_metadata(tmp_path / "x.safetensors", state, TRAINING | OTHERS)

    assert found == TRAINING | OTHERS | defined_hashes(state, TRAINING)


@pytest.mark.parametrize("nbytes", [1000, 0x130000], ids=hex)
def test_old_hashes_give_way(tmp_path: Path, nbytes: int) -> None:
    state = state_of(nbytes)
    stale = {"sshs_model_hash": "0x" + "ab" * 32, "sshs_legacy_hash": "deadbeef"}

    found = written_metadata(tmp_path / "x.safetensors", state, TRAINING | stale)

    assert found == TRAINING | defined_hashes(state, TRAINING)


@pytest.mark.parametrize("nbytes", [1000, 0x130000], ids=hex)
def test_without_training_metadata_the_definition_still_holds(tmp_path: Path, nbytes: int) -> None:
    """The reference writes an empty ``__metadata__`` then, which moves the legacy window."""
    state = state_of(nbytes)

    assert written_metadata(tmp_path / "x.safetensors", state, {}) == defined_hashes(state, {})


def test_a_file_below_one_mebibyte_has_the_hash_of_nothing(tmp_path: Path) -> None:
    found = written_metadata(tmp_path / "x.safetensors", state_of(5000), TRAINING)

    assert found["sshs_legacy_hash"] == "e3b0c442"


@settings(deadline=None, max_examples=50)
@given(state=state_dicts(min_size=1))
def test_tensors_of_any_dtypes_are_hashed_in_the_references_order(
    tmp_path_factory: pytest.TempPathFactory, state: State
) -> None:
    path = tmp_path_factory.getbasetemp() / "hashed.safetensors"

    found = written_metadata(path, state, TRAINING)

    assert found == TRAINING | defined_hashes(state, TRAINING)


@many
@given(cuts=st.lists(st.integers(0, 0x120000), max_size=6))
def test_the_pieces_do_not_matter(cuts: list[int]) -> None:
    header, data = b"H" * 1000, bytes(range(256)) * (0x120000 // 256)
    hasher = DataHasher(header)

    edges = [0, *sorted(cuts), len(data)]
    for start, stop in pairwise(edges):
        hasher.update(memoryview(data)[start:stop])

    assert hasher.metadata() == {
        "sshs_model_hash": hashlib.sha256(data).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256((header + data)[0x100000:0x110000]).hexdigest()[:8],
        "modelspec.hash_sha256": "0x" + hashlib.sha256(data).hexdigest(),
    }


@many
@given(
    nbytes=st.sampled_from([0, 0x100000 - 400, 0x108000, 0x110000 - 400, 0x110000, 0x200000]),
    piece=st.integers(50_000, 2**21),
)
def test_the_legacy_hash_alone_reads_no_further_than_it_has_to(nbytes: int, piece: int) -> None:
    """The same as of the whole file, from the pieces up to the window's end."""
    header, data = bytes(range(200)) * 2, bytes(range(251)) * (nbytes // 251 + 1)
    read: list[int] = []

    def pieces() -> Iterator[memoryview]:
        for start in range(0, nbytes, piece):
            read.append(start)
            yield memoryview(data[start : min(start + piece, nbytes)])

    whole = header + data[:nbytes]
    assert legacy_hash(header, pieces()) == hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]
    assert all(len(header) + start < 0x110000 for start in read)
