"""What a file that a command wrote must be: read by the reference, canonical, finite, and as announced.

The reference reads the tensors and writes them again; what it makes is compared byte for byte,
but for the order of metadata, which it shuffles.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save

State = Mapping[str, torch.Tensor]
Document = Mapping[str, object]

#: ``--dtype`` and what the reference calls it.
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

#: The first axis of which slot is a module's rank, in every spelling the table has.
_DOWN = ("lora_down.weight", "lora_A.weight", "lora.down.weight")


def check_file(path: Path, *, is_canonical: bool = True) -> None:
    """The invariants of one file, or of every file in a folder.

    Parameters
    ----------
    is_canonical
        Whether its tensors must be in the library's own order; an edit leaves them in theirs.

    Raises
    ------
    AssertionError
        If the reference cannot read it, a value is not finite, a hash is another file's, or the
        bytes are not those of the reference.
    """
    if path.is_dir():
        for file in path.rglob("*"):
            check_file(file)
        return
    if path.name.endswith(".index.json"):
        _check_index(path)
    if path.suffix != ".safetensors":
        return
    content = path.read_bytes()
    state = load(content)
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel():
            assert torch.isfinite(tensor.float()).all(), f"{name} is not finite"
    (length,) = struct.unpack("<Q", content[:8])
    text, data = content[8 : 8 + length], content[8 + length :]
    assert length % 8 == 0
    header = json.loads(text)
    metadata = header.pop("__metadata__", {})
    assert list(metadata) == sorted(metadata)
    if (stored := metadata.get("sshs_model_hash")) is not None:
        assert stored == hashlib.sha256(data).hexdigest(), "the hash is of other data"
    if is_canonical:
        _check_bytes(state, metadata, text, data)
    else:
        starts = [entry["data_offsets"] for entry in header.values()]
        assert sorted(starts) == starts
    _check_metadata(metadata)


def _check_bytes(state: State, metadata: Mapping[str, str], text: bytes, data: bytes) -> None:
    """The header and the data are what the reference writes for these tensors."""
    reference = save(dict(state))
    (length,) = struct.unpack("<Q", reference[:8])
    expected = reference[8 : 8 + length].rstrip(b" ")
    if metadata:
        said = json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode()
        rest = expected[1:] if state else b"}"
        expected = b'{"__metadata__":' + said + (b"," if state else b"") + rest
    assert text.rstrip(b" ") == expected
    assert len(text) - len(expected) < 8
    assert data == reference[8 + length :]


def _check_metadata(metadata: Mapping[str, str]) -> None:
    """What wrote it is said in JSON, with the version."""
    said = [name for name in metadata if name.startswith("lycotool.") and name != "lycotool.version"]
    assert bool(said) == ("lycotool.version" in metadata)
    for name in said:
        json.loads(metadata[name])


def _check_index(path: Path) -> None:
    """Every tensor is in the shard it is said to be in, and none is missing."""
    index = json.loads(path.read_bytes())
    found: dict[str, str] = {}
    nbytes = 0
    for shard in sorted(set(index["weight_map"].values())):
        for name, tensor in load((path.parent / shard).read_bytes()).items():
            assert name not in found
            found[name] = shard
            nbytes += tensor.nbytes
    assert found == index["weight_map"]
    assert index["metadata"]["total_size"] == nbytes


def not_announced(
    verb: str, options: Sequence[str], inputs: Sequence[State], path: Path, document: Document
) -> list[str]:
    """Names, shapes, dtypes and sizes of an output that are not as options and report say; one line each.

    Parameters
    ----------
    verb
        Of :data:`reliability.cases.VERBS`.
    inputs
        The tensors of each, in the order of the command line.
    document
        What ``--json`` gave.
    """
    output = load(path.read_bytes())
    asked = _DTYPES.get(options[options.index("--dtype") + 1]) if "--dtype" in options else None
    wrong = []
    if verb == "edit":
        wrong += [
            f"{name}: {tensor.dtype}"
            for name, tensor in output.items()
            if tensor.dtype != inputs[0][name].dtype
        ]
    elif verb in ("fold", "bake", "base"):
        wrong += _of_checkpoint(inputs[0], output, asked)
        wrong += _count("tensors", len(output), document["tensors"])
        wrong += _count("bytes", sum(tensor.nbytes for tensor in output.values()), document["nbytes"])
    else:
        wrong += _of_adapter(inputs, output, asked)
        wrong += _count(
            "bytes", path.stat().st_size, document["bytes_after" if verb == "resize" else "nbytes"]
        )
        modules = document["modules"]
        for module in modules if isinstance(modules, list) else ():
            wrong += _of_module(module, output)
    return wrong


def _of_checkpoint(before: State, after: State, asked: torch.dtype | None) -> list[str]:
    """Names and shapes stay; dtypes too, unless another is asked for weights."""
    wrong = []
    for name, tensor in before.items():
        dtype = asked if asked is not None and tensor.is_floating_point() else tensor.dtype
        found = after.get(name)
        if found is None or (found.shape, found.dtype) != (tensor.shape, dtype):
            wrong.append(f"{name}: {'missing' if found is None else (found.shape, found.dtype)}")
    return wrong + [f"{name} is new" for name in after.keys() - before.keys()]


def _of_adapter(inputs: Sequence[State], output: State, asked: torch.dtype | None) -> list[str]:
    """Weights have the dtype that was asked for, or one an input has; alphas may need float32."""
    stored = {tensor.dtype for state in inputs for tensor in state.values() if tensor.is_floating_point()}
    allowed = stored if asked is None else {asked}
    if asked is None and {torch.float16, torch.bfloat16} <= stored:
        allowed = allowed | {torch.float32}  # what holds both
    if asked is None and any(dtype.itemsize == 1 for dtype in stored):
        allowed = allowed | {torch.float16}  # factors that were float8 are not computed into it
    return [
        f"{name}: {tensor.dtype}"
        for name, tensor in output.items()
        if tensor.is_floating_point() and tensor.dtype not in allowed
        if not (tensor.numel() == 1 and tensor.dtype == torch.float32)
    ]


def _of_module(module: Document, output: State) -> list[str]:
    """A module that is listed with a rank has factors of it."""
    rank = module.get("new_rank", module.get("rank"))
    found = [output[name] for end in _DOWN if (name := f"{module['name']}.{end}") in output]
    return [] if rank is None or not found else _count(f"ranks of {module['name']}", found[0].shape[0], rank)


def _count(what: str, found: int, told: object) -> list[str]:
    return [] if found == told else [f"{found} {what}, {told} in the report"]
