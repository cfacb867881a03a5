"""Reading tensors and scalars out of an open store."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from examples import many
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from stored_tensors import DTYPES, bits, random_bits, state_dicts

from lycotool.errors import BadInputError, ResourceError
from lycotool.io import store as storing
from lycotool.io.open import open_store

NUMBERS = [dtype for dtype in DTYPES if dtype is not torch.complex64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a hypothesis test."""
    return tmp_path_factory.mktemp("stored")


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    path = folder / "x.safetensors"
    path.write_bytes(save(tensors))
    return str(path)


@settings(deadline=None, max_examples=50)
@given(state=state_dicts())
def test_tensors_are_read_bit_by_bit(folder: Path, state: dict[str, torch.Tensor]) -> None:
    with open_store(stored(folder, state)) as store:
        for name, tensor in state.items():
            read = store.tensor(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert bits(read) == bits(tensor)
            assert b"".join(bytes(piece) for piece in store.chunks(name)) == bits(tensor)


def test_a_tensor_may_be_written_to(tmp_path: Path) -> None:
    """It owns its memory, so that changing it changes neither the file nor the next read."""
    with open_store(stored(tmp_path, {"a": torch.ones(3)})) as store:
        store.tensor("a").add_(5)
        assert torch.equal(store.tensor("a"), torch.ones(3))


def test_large_tensors_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "CHUNK_BYTES", 8)
    tensor = torch.arange(5.0)  # 20 bytes

    with open_store(stored(tmp_path, {"a": tensor, "b": torch.ones(1)})) as store:
        pieces = [bytes(piece) for piece in store.chunks("a")]
        assert torch.equal(store.tensor("a"), tensor)

    assert [len(piece) for piece in pieces] == [8, 8, 4]
    assert b"".join(pieces) == bits(tensor)


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_a_scalar_is_what_torch_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    """Any dtype: trainers cast alpha like everything else."""
    generator = torch.Generator().manual_seed(1)
    candidates = [random_bits(dtype, shape, generator) for shape in [(), (1,), (1, 1)] * 20]
    candidates.append(torch.tensor(1).to(dtype))
    tensors = {str(i): tensor for i, tensor in enumerate(candidates)}

    with open_store(stored(tmp_path, tensors)) as store:
        for name, tensor in tensors.items():
            expected = float(tensor.reshape(()).item())
            found = store.scalar(name)
            assert found == expected or (found != found and expected != expected)


@many
@given(
    value=st.floats(width=32, allow_nan=False),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_a_scalar_of_any_value_is_what_torch_reads(folder: Path, value: float, dtype: torch.dtype) -> None:
    tensor = torch.tensor(value, dtype=torch.float64).to(dtype)

    with open_store(stored(folder, {"alpha": tensor})) as store:
        assert store.scalar("alpha") == tensor.item()


@pytest.mark.parametrize("shape", [(0,), (2,), (1, 2), (0, 1)], ids=str)
def test_a_scalar_has_one_element(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with (
        open_store(stored(tmp_path, {"alpha": torch.ones(shape)})) as store,
        pytest.raises(BadInputError, match="expected one number") as caught,
    ):
        store.scalar("alpha")
    assert caught.value.key == "alpha"


def test_a_complex_scalar_is_no_number(tmp_path: Path) -> None:
    with (
        open_store(stored(tmp_path, {"alpha": torch.ones((), dtype=torch.complex64)})) as store,
        pytest.raises(BadInputError, match="is C64, expected a number"),
    ):
        store.scalar("alpha")


@pytest.mark.parametrize("lost", [404, 202, 5], ids=["all data", "half the data", "the last bytes"])
def test_a_file_cut_short_after_opening_is_an_error(tmp_path: Path, lost: int) -> None:
    path = stored(tmp_path, {"a": torch.arange(100.0), "b": torch.tensor(1.0)})
    with open_store(path) as store:
        os.truncate(path, Path(path).stat().st_size - lost)

        for name, read in [("a", store.tensor), ("a", lambda n: list(store.chunks(n))), ("b", store.scalar)]:
            with pytest.raises(BadInputError, match="changed while it was read") as caught:
                read(name)
            assert (caught.value.path, caught.value.key) == (path, name)


def test_a_tensor_larger_than_memory_is_a_resource_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(nbytes: int, **options: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with open_store(stored(tmp_path, {"a": torch.ones(4)})) as store:
        monkeypatch.setattr(storing.torch, "empty", no_memory, raising=False)
        with pytest.raises(ResourceError, match="needs 16 bytes of memory at once"):
            store.tensor("a")


@pytest.mark.parametrize("positioned", [True, False])
def test_threads_may_read_one_file_together(
    positioned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``preadv``, and with the lock that stands in for it where there is none."""
    if not positioned:
        monkeypatch.delattr(storing.os, "preadv")
    tensors = {str(index): torch.full((5000,), float(index)) for index in range(40)}
    with open_store(stored(tmp_path, tensors)) as store, ThreadPoolExecutor(8) as pool:
        names = list(tensors) * 5
        for name, read in zip(names, pool.map(store.tensor, names), strict=True):
            assert torch.equal(read, tensors[name])


def test_leaving_the_store_closes_its_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with open_store(str(tmp_path / "x.safetensors")) as store:
        assert torch.equal(store.tensor("a"), torch.ones(1))

    with pytest.raises((ValueError, BadInputError)):
        store.tensor("a")


@pytest.mark.parametrize("edit", ["rewritten", "longer"])
def test_a_file_edited_while_open(edit: str, tmp_path: Path) -> None:
    """What is read is from the file that was opened, or an error."""
    path = Path(stored(tmp_path, {"a": torch.ones(4), "b": torch.ones(4)}))
    with open_store(str(path)) as store:
        assert torch.equal(store.tensor("a"), torch.ones(4))
        before = path.stat()
        with path.open("r+b") as file:
            file.seek(0 if edit == "longer" else -16, os.SEEK_END)
            file.write(bytes(16))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**6))
        with pytest.raises(BadInputError, match="changed while it was read"):
            store.tensor("b")
