"""What looks at outputs sees what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save

from reliability.outputs import check_file, not_announced
from reliability.tensors import METADATA, UNET, checkpoint, good, header_of, raw, rewritten, stored


def compact(header: dict[str, object], data: bytes) -> bytes:
    """A file with this header as this program writes it, over the data of another."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return rewritten(data, text + b" " * (-len(text) % 8))


def sound() -> bytes:
    """A file as this program writes it."""
    data = save(good())
    return compact({"__metadata__": dict(sorted(METADATA.items())), **header_of(data)}, data)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "padding": lambda data: rewritten(data, json.dumps(header_of(data), separators=(",", ":")).encode() + b" " * 64),
    "blanks": lambda data: stored(good()),
    "order of metadata": lambda data: compact(
        {"__metadata__": dict(sorted(METADATA.items(), reverse=True)),
         **{name: entry for name, entry in header_of(data).items() if name != "__metadata__"}}, data),
    "order of tensors": lambda data: compact(dict(reversed(header_of(save(good())).items())), data),
    "a hash": lambda data: compact(
        {"__metadata__": {"sshs_model_hash": "0" * 64}, **header_of(save(good()))}, data),
    "infinity": lambda data: save({"a": torch.tensor([torch.inf])}),
    "who wrote it": lambda data: save({"a": torch.ones(2)}, {"lycotool.merge": "{}"}),
    "a byte more": lambda data: data + b"\0",
    "no tensor": lambda data: raw(b"[]"),
}  # fmt: skip


def test_a_sound_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(sound())
    check_file(tmp_path)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_seen(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(DAMAGE[name](sound()))
    with pytest.raises((AssertionError, SafetensorError)):
        check_file(tmp_path)


@pytest.mark.parametrize(
    ("verb", "options", "inputs", "output", "document", "expected"),
    [
        ("bake", (), checkpoint(), checkpoint(), {"tensors": 3, "nbytes": 2060}, []),
        ("bake", (), checkpoint(), checkpoint(), {"tensors": 2, "nbytes": 2060}, ["3 tensors, 2 in the report"]),
        ("bake", ("--dtype", "fp16"), {"a": torch.ones(2)}, {"a": torch.ones(2)}, {"tensors": 1, "nbytes": 8}, ["a: "]),
        ("bake", (), {"a": torch.ones(2)}, {"b": torch.ones(2)}, {"tensors": 1, "nbytes": 8}, ["a: missing", "b is new"]),
        ("bake", (), {"a": torch.ones(2)}, {"a": torch.ones(2, 1)}, {"tensors": 1, "nbytes": 8}, ["a: "]),
        ("edit", (), {"a": torch.ones(2)}, {"a": torch.ones(2).half()}, {}, ["a: torch.float16"]),
        ("merge", (), {"a": torch.ones(2).half()}, {"a": torch.ones(2)}, {"modules": 1}, ["a: torch.float32"]),
        ("merge", (), {"a": torch.ones(2)}, {"a": torch.ones(2)}, {"modules": 1, "nbytes": 1}, ["72 bytes, 1 in the"]),
        ("resize", (), good(), good(), {"modules": [{"name": UNET, "new_rank": 3}]}, [f"4 ranks of {UNET}, 3"]),
    ],
)  # fmt: skip
def test_what_was_not_announced_is_seen(
    verb: str,
    options: tuple[str, ...],
    inputs: dict[str, torch.Tensor],
    output: dict[str, torch.Tensor],
    document: dict[str, object],
    expected: list[str],
    tmp_path: Path,
) -> None:
    path = tmp_path / "out.safetensors"
    path.write_bytes(save(output))
    document = {"bytes_after" if verb == "resize" else "nbytes": path.stat().st_size, **document}
    found = not_announced(verb, options, [inputs], path, document)
    assert len(found) == len(expected)
    assert all(one.startswith(start) for one, start in zip(found, expected, strict=True)), found
