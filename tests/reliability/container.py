"""Group A: damaged and hostile containers."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from reliability.cases import CONTAINER, OUT, Case, Expected, Maker, Row
from reliability.lab import BAD_INPUT, CHECK, INCOMPATIBLE, OK, OUTPUT, RESOURCE
from reliability.tensors import UNET, State, entry, good, header_of, raw, rewritten, stored

#: Verbs for files that are an adapter, whole.
_ADAPTER = ("inspect", "json", "check", "resize", "merge", "fold", "bake", "convert")


def content(data: Callable[[], bytes], name: str = "x.safetensors") -> Maker:
    """A maker of one file."""

    def make(folder: Path) -> str:
        (folder / name).write_bytes(data())
        return name

    return make


def tensors(state: Callable[[], State], metadata: dict[str, str] | None = None) -> Maker:
    """A maker of a safetensors file."""
    return content(lambda: stored(state(), metadata) if metadata else stored(state()))


def sparse(head: bytes, size: int) -> Maker:
    """A maker of a file that takes no space."""

    def make(folder: Path) -> str:
        with (folder / "x.safetensors").open("wb") as file:
            file.write(head)
            file.truncate(size)
        return "x.safetensors"

    return make


def torch_saved(value: Callable[[], object], name: str, *, zipped: bool = True) -> Maker:
    """A maker of a PyTorch pickle."""

    def make(folder: Path) -> str:
        torch.save(value(), folder / name, _use_new_zipfile_serialization=zipped)
        return name

    return make


def bad(id: str, what: str, make: Maker, message: str, *, seconds: float = 60.0, decision: str = "") -> Case:
    """A file nothing can be made of."""
    return Case(id=id, what=what, make=make, expected=Expected.of(BAD_INPUT, message), verbs=CONTAINER,
                seconds=seconds, decision=decision)  # fmt: skip


def fine(id: str, what: str, make: Maker, message: str = "", **more: object) -> Case:
    """A file that is read in spite of it."""
    return Case(id=id, what=what, make=make, expected=Expected.of(OK, message), verbs=_ADAPTER, **more)


def _one(dtype: str, shape: list[int], start: int, stop: int, body: int) -> Maker:
    return content(lambda: raw({"a": entry(dtype, shape, start, stop)}, bytes(body)))


def _text(header: bytes, body: int = 4) -> Maker:
    return content(lambda: raw(header, bytes(body)))


_A = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def _good() -> bytes:
    return stored(good())


def _flipped() -> bytes:
    data = bytearray(_good())
    data[-3] ^= 0x40
    return bytes(data)


def _half_zero() -> bytes:
    data = _good()
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def _blanks_before() -> bytes:
    data = _good()
    (length,) = struct.unpack("<Q", data[:8])
    return rewritten(data, b"   " + data[8 : 8 + length])


def _unknown_field() -> bytes:
    data = _good()
    header = header_of(data)
    header[f"{UNET}.alpha"]["foo"] = "bar"
    return rewritten(data, json.dumps(header).encode())


def _stored_hash() -> bytes:
    """A bit that flipped after the hash was stored."""
    data = _good()
    header = header_of(data)
    (length,) = struct.unpack("<Q", data[:8])
    header["__metadata__"]["sshs_model_hash"] = hashlib.sha256(data[8 + length :]).hexdigest()
    return rewritten(_flipped(), json.dumps(header).encode())


def _huge_lora() -> Maker:
    """A LoRA whose factors claim a terabyte; the file is sparse."""
    width = 2**36
    header = {
        f"{UNET}.lora_down.weight": entry("F32", [4, width], 0, 16 * width),
        f"{UNET}.lora_up.weight": entry("F32", [16, 4], 16 * width, 16 * width + 256),
    }
    head = raw(header)
    return sparse(head, len(head) + 16 * width + 256)


def _empty_and_scalar() -> State:
    return {**good(), "nothing": torch.zeros(0, 4), "one": torch.tensor(1.0)}


@functools.cache
def _too_many() -> bytes:
    return raw({f"t{i}": entry("F32", [0], 0, 0) for i in range(200_001)})


def _kept_bit_for_bit(folder: Path) -> None:
    written, before = load_file(folder / OUT), load_file(folder / "x.safetensors")
    for name in written.keys() & before.keys():
        assert written[name].dtype == before[name].dtype
        assert written[name].shape[1:] == before[name].shape[1:] or name.startswith("lora")


HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>You must log in</body></html>\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 151108831\n"

_NO_MODULES = Expected.of(INCOMPATIBLE, "no adapter modules")
_NOTHING = {
    "inspect": Expected.of(OK),
    "json": Expected.of(OK),
    "check": Expected((OK, CHECK)),
    "edit": Expected.of(OK),
    "base": Expected.of(INCOMPATIBLE),
    "extract": Expected.of(INCOMPATIBLE),
}

ROWS: tuple[Row, ...] = (
    fine("A00", "a good file", tensors(good)),
    bad("A01", "0 bytes", content(lambda: b""), "empty file"),
    bad("A02", "7 bytes", content(lambda: b"\x10" + bytes(6)), "too short"),
    bad("A03", "header length 0", content(lambda: bytes(8)), "header length 0"),
    Case(id="A04", what="no tensors at all", make=content(lambda: raw({})), expected=_NO_MODULES,
         by_verb=_NOTHING, verbs=CONTAINER),
    bad("A05", "header length 2^63", content(lambda: raw({}, length=2**63)), "header says"),
    bad("A06", "header length past the end",
        content(lambda: raw({"a": entry("F32", [1], 0, 4)}, bytes(4), length=4096)), "header says"),
    bad("A07", "a header of 100 000 001 bytes", sparse(struct.pack("<Q", 100_000_001) + b"{}", 100_000_017),
        "header"),
    bad("A08", "last byte cut off", content(lambda: _good()[:-1]), r"truncated.*expected \d+.*found \d+"),
    bad("A09", "cut inside the header", content(lambda: _good()[:120]), "truncated"),
    bad("A10", "one byte after the last tensor", content(lambda: _good() + b"\0"), "1 byte"),
    bad("A11", "overlapping spans",
        content(lambda: raw({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12))),
        r"\bb\b"),
    bad("A12", "a hole between tensors",
        content(lambda: raw({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, bytes(12))),
        r"\bb\b"),
    bad("A13", "end before begin", _one("F32", [1], 4, 0, 4), r"\ba\b"),
    bad("A14", "offset past the end", _one("F32", [1024], 0, 4096, 4), r"\ba\b"),
    bad("A15", "negative offset", _one("F32", [1], -4, 0, 4), r"\ba\b"),
    bad("A16", "dtype and shape against span", _one("F32", [4], 0, 8, 8), r"\ba\b"),
    bad("A17", "shape product overflows", _one("F32", [2**32, 2**32], 0, 0, 0), r"\ba\b"),
    bad("A18", "unknown dtype", _one("F128", [1], 0, 16, 16), "F128"),
    bad("A19", "duplicate name, same span, other dtype",
        _text(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
              b'"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}', 8), "duplicate"),
    bad("A20", "duplicate name, two spans",
        _text(b"{" + _A + b',"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', 8), "duplicate"),
    bad("A21", "header not UTF-8", _text(b"{" + _A.replace(b'"a"', b'"\xff\xfe"') + b"}"), "UTF-8"),
    bad("A22", "trailing comma", _text(b"{" + _A + b",}"), "JSON"),
    bad("A23", "header is an array", _text(b"[1,2,3] ", 0), "JSON"),
    fine("A24", "blanks before the brace", content(_blanks_before)),
    bad("A25", "header padded with NUL", _text(b"{" + _A + b"}\0\0"), "JSON"),
    bad("A26", "a metadata value that is no string",
        content(lambda: raw({"__metadata__": {"epoch": 3}, "a": entry("F32", [1], 0, 4)}, bytes(4))), "epoch"),
    bad("A27", "a tensor called __metadata__",
        content(lambda: raw({"__metadata__": entry("F32", [1], 0, 4)}, bytes(4))), "__metadata__|metadata"),
    bad("A28", "a size of 1.0", _text(b"{" + _A.replace(b"[1]", b"[1.0]") + b"}"), r"\ba\b"),
    bad("A29", "a lone surrogate in a name", _text(b"{" + _A.replace(b'"a"', b'"\\ud800"') + b"}"), "name"),
    Case(id="A30", what="names empty, with NUL, of a megabyte, with a line break", verbs=CONTAINER,
         make=content(lambda: raw({"": entry("F32", [1], 0, 4), "nul\0key": entry("F32", [1], 4, 8),
                                   "x" * 1_000_000: entry("F32", [1], 8, 12),
                                   "line\nbreak": entry("F32", [1], 12, 16)}, bytes(16))),
         expected=_NO_MODULES, by_verb=_NOTHING),
    bad("A31", "200 000 nested arrays", _text(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", 0), "JSON"),
    bad("A32", "more tensors than any model has",
        content(_too_many), "too many tensors",
        seconds=10, decision="one tensor beyond the limit instead of 10^6: the limit is exact"),
    fine("A33", "tensors of no element and of no dimension", tensors(_empty_and_scalar),
         by_verb={"check": Expected((OK, CHECK)), "convert": Expected.of(INCOMPATIBLE, "nothing")},
         after=_kept_bit_for_bit),
    fine("A34", "an unknown field in a tensor's entry", content(_unknown_field), "",
         decision="read as the reference reads it, without a word: the format lets writers add fields"),
    bad("A35", "an offset written 4e0", _text(b"{" + _A.replace(b"4]", b"4e0]") + b"}"), r"\ba\b"),
    bad("A36", "an HTML log-in page", content(lambda: HTML), "HTML"),
    bad("A37", "a Git LFS pointer", content(lambda: LFS), "Git LFS pointer"),
    bad("A38", "a PyTorch zip named .safetensors", torch_saved(good, "x.safetensors"), "PyTorch"),
    fine("A39", "a safetensors file named .ckpt", content(_good, "x.ckpt")),
    bad("A40", "a GGUF file", content(lambda: b"GGUF" + struct.pack("<IQQ", 3, 0, 0)), "GGUF"),
    bad("A41", "100 000 dimensions", content(lambda: raw({"a": entry("F32", [1] * 100_000, 0, 4)}, bytes(4))),
        "dimensions", seconds=5),
    fine("A42", "second half zeros, as of a broken download", content(_half_zero),
         by_verb={"check": Expected.of(CHECK, "zero|dead")}),
    fine("A43", "an upper-case suffix", content(_good, "x.SAFETENSORS")),
    Case(id="A44", what="a LoRA that claims a terabyte", make=_huge_lora(), verbs=("inspect", "resize", "convert"),
         expected=Expected((RESOURCE, OUTPUT), "need"), by_verb={"inspect": Expected.of(OK)}, seconds=10,
         decision="where the bytes are only copied, the disk's room is what lacks"),
    fine("A45", "one flipped bit", content(_flipped), by_verb={"check": Expected((OK, CHECK))}),
    bad("A46", "a metadata key twice", _text(b'{"__metadata__":{"k":"1","k":"2"},' + _A + b"}"), "duplicate"),
    bad("A47", "__metadata__ twice", _text(b'{"__metadata__":{"k":"1"},"__metadata__":{"k":"2"},' + _A + b"}"),
        "duplicate"),
    bad("A48", "F4 that fills no whole byte", _one("F4", [1, 3], 0, 1, 1), "F4",
        decision="the elements together must fill bytes; the study wanted the last dimension to"),
    bad("A49", "shape [0, 2^62, 2^62]", _one("F32", [0, 2**62, 2**62], 0, 0, 0), r"\ba\b"),
    bad("A50", "shape [2^62, 2^62, 0]", _one("F32", [2**62, 2**62, 0], 0, 0, 0), r"\ba\b"),
    Case(id="A51", what="a name of 100 000 parts", verbs=CONTAINER,
         make=content(lambda: raw({"a." * 100_000 + "lora_down.weight": entry("F32", [1], 0, 4)}, bytes(4))),
         expected=Expected((BAD_INPUT, INCOMPATIBLE)), by_verb=_NOTHING | {"base": Expected((BAD_INPUT, INCOMPATIBLE))},
         seconds=10),
    bad("A52", "a dimension of 2^63", _one("F32", [0, 2**63], 0, 0, 0), r"\ba\b"),
    fine("A53", "a flipped bit under a stored hash", content(_stored_hash),
         by_verb={"check": Expected.of(CHECK, "hash")},
         decision="`inspect --check` and `--hashes` find it; the other commands do not hash what they read,"
         " because tools that edit files leave stale hashes in sound ones"),
)  # fmt: skip
