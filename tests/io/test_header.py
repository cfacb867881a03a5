"""The strict header parser: what it refuses, in which words, and what it must accept."""

import io
import json
import struct

import pytest
import torch
from examples import many
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import save
from stored_tensors import DTYPES, bits, names, state_dicts, text

from lycotool.errors import BadInputError
from lycotool.io import header as parser
from lycotool.io.header import MAX_HEADER_BYTES, MAX_TENSORS, Header, read_header, read_split_header

LIMIT = MAX_HEADER_BYTES


def container(header: bytes | dict[str, object], data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header, however wrong; ``length`` lies about the header's size."""
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[int], start: int, stop: int, **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop], **more}


def parse(content: bytes, size: int | None = None) -> Header:
    """Read a header; ``size`` lies about the file's, so that no gigabytes are needed."""
    return read_header(io.BytesIO(content), len(content) if size is None else size, "FILE")


ONE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
FOUR = b"\0" * 4
GOOD = save({"a": torch.ones(3), "b": torch.ones(2, 2)}, {"k": "v"})

#: What is wrong -> the file, and words of the message: the fault, or the tensor's name.
MALFORMED: dict[str, tuple[bytes, str]] = {
    "zero bytes": (b"", "empty file"),
    "half of a surrogate pair in metadata": (
        container(b'{"__metadata__":{"k":"\\ud800"},' + ONE[1:], FOUR),
        "not valid Unicode",
    ),
    "half of a surrogate pair in a metadata key": (
        container(b'{"__metadata__":{"\\udc00":"v"},' + ONE[1:], FOUR),
        "not valid Unicode",
    ),
    "metadata and a comma alone": (container(b'{"__metadata__":{},}'), "JSON"),
    "no comma after metadata": (container(b'{"__metadata__":{}' + ONE[1:], FOUR), "JSON"),
    "seven bytes": (b"\x10\0\0\0\0\0\0", "too short"),
    "header length 0": (struct.pack("<Q", 0), "header length 0"),
    "header length 2^63": (container({}, length=2**63), "header says"),
    "header length past the end": (container(ONE, FOUR, length=4096), "header says"),
    "last byte cut off": (GOOD[:-1], r"truncated.*expected \d+.*found \d+"),
    "cut inside the header": (GOOD[:60], r"truncated.*expected at least \d+.*found 60"),
    "one byte too many": (GOOD + b"\0", "1 byte after"),
    "many bytes too many": (GOOD + b"\0" * 8, "8 bytes after"),
    "data and no tensors": (container({}, FOUR), "4 bytes after"),
    "overlapping spans": (
        container({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, b"\0" * 12),
        r"\bb\b.*overlaps",
    ),
    "one span twice": (
        container({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, FOUR),
        r"\bb\b.*overlaps",
    ),
    "a hole": (
        container({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, b"\0" * 12),
        r"\bb\b.*hole",
    ),
    "a hole at the start": (container({"a": entry("F32", [1], 4, 8)}, b"\0" * 8), r"\ba\b.*hole"),
    "end before begin": (container({"a": entry("F32", [1], 4, 0)}, FOUR), r"\ba\b.*offsets"),
    "offset past the end": (container({"a": entry("F32", [1024], 0, 4096)}, FOUR), r"\ba\b"),
    "negative offset": (container({"a": entry("F32", [1], -4, 0)}, FOUR), r"\ba\b.*offsets"),
    "three offsets": (
        container({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, FOUR),
        r"\ba\b.*offsets",
    ),
    "no offsets": (container({"a": {"dtype": "F32", "shape": [1]}}, FOUR), r"\ba\b.*offsets"),
    "dtype and span disagree": (container({"a": entry("F32", [4], 0, 8)}, b"\0" * 8), r"\ba\b.*16 bytes"),
    "shape overflows": (container({"a": entry("F32", [2**32, 2**32], 0, 0)}), r"\ba\b"),
    "zero times huge": (container({"a": entry("F32", [0, 2**62, 2**62], 0, 0)}), r"\ba\b.*overflows"),
    "huge times zero": (container({"a": entry("F32", [2**62, 2**62, 0], 0, 0)}), r"\ba\b.*overflows"),
    "a dimension of 2^63": (container({"a": entry("F32", [0, 2**63], 0, 0)}), r"\ba\b"),
    "negative dimension": (container({"a": entry("F32", [-1], 0, 4)}, FOUR), r"\ba\b.*shape"),
    "true as a dimension": (
        container(b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', FOUR),
        r"\ba\b.*shape",
    ),
    "100 000 dimensions": (container({"a": entry("F32", [1] * 100_000, 0, 4)}, FOUR), "dimensions"),
    "unknown dtype": (container({"a": entry("F128", [1], 0, 16)}, b"\0" * 16), "F128"),
    "no dtype": (container({"a": {"shape": [1], "data_offsets": [0, 4]}}, FOUR), r"\ba\b.*dtype"),
    "half bytes of another count": (container({"a": entry("F4", [2, 3], 0, 2)}, b"\0" * 2), r"\ba\b"),
    "half a byte left over": (
        container({"a": entry("F4", [3], 0, 1)}, b"\0"),
        r"\ba\b.*F4.*whole bytes",
    ),
    "duplicate name, one span": (
        container(ONE[:-1] + b',"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}', FOUR),
        "duplicate",
    ),
    "duplicate name, two spans": (
        container(ONE[:-1] + b',"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"\0" * 8),
        "duplicate",
    ),
    "duplicate metadata key": (
        container(b'{"__metadata__":{"k":"1","k":"2"},' + ONE[1:], FOUR),
        "duplicate",
    ),
    "metadata twice": (
        container(b'{"__metadata__":{"k":"1"},"__metadata__":{"k":"2"},' + ONE[1:], FOUR),
        "duplicate",
    ),
    "duplicate field": (
        container(b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', FOUR),
        "duplicate",
    ),
    "not UTF-8": (container(ONE.replace(b'"a"', b'"\xff\xfe"'), FOUR), "UTF-8"),
    "a comma too many": (container(ONE[:-1] + b",}", FOUR), "JSON"),
    "an array": (container(b"[1,2,3] "), "JSON"),
    "padded with NUL": (container(ONE + b"\0\0", FOUR), "JSON"),
    "200 000 nested arrays": (container(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "JSON"),
    "a number of 5000 digits": (container(b'{"a":' + b"1" * 5000 + b"}"), "JSON"),
    "metadata with a number": (container({"__metadata__": {"epoch": 3}}), "epoch"),
    "metadata with an object": (container({"__metadata__": {"nested": {"x": "1"}}}), "nested"),
    "metadata is a list": (container({"__metadata__": []}), "__metadata__"),
    "a tensor called __metadata__": (
        container({"__metadata__": entry("F32", [1], 0, 4)}, FOUR),
        "metadata",
    ),
    "fractional dimension": (
        container(b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', FOUR),
        r"\ba\b",
    ),
    "offset with an exponent": (
        container(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4e0]}}', FOUR),
        r"\ba\b",
    ),
    "an entry that is a number": (container({"a": 5}), r"\ba\b.*not an object"),
    "lone surrogate": (container(ONE.replace(b'"a"', b'"\\ud800"'), FOUR), "name"),
    "an HTML page": (b"<!DOCTYPE html><html><body>You must log in</body></html>\n", "HTML"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 151108831\n",
        "Git LFS pointer",
    ),
    "a zip archive": (b"PK\x03\x04" + b"\0" * 60, "PyTorch"),
    "a bare pickle": (b"\x80\x02}q\0." + b"\0" * 60, "PyTorch pickle"),
    "GGUF": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "GGUF"),
}


@pytest.mark.parametrize(("content", "words"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_refused_with_its_fault(content: bytes, words: str) -> None:
    with pytest.raises(BadInputError) as caught:
        parse(content)

    assert caught.value.path == "FILE"
    assert_matches(caught.value, words)


def assert_matches(error: BadInputError, words: str) -> None:
    text = "\n".join([error.headline.removeprefix("FILE: "), error.hint or ""])
    with pytest.raises(BadInputError, match=words):
        raise BadInputError(text)
    assert not error.message.endswith(".")


def test_every_truncation_of_a_file_is_refused() -> None:
    for stop in range(len(GOOD)):
        with pytest.raises(BadInputError):
            parse(GOOD[:stop])


def test_a_header_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(BadInputError, match=f"header says it is {LIMIT + 1} bytes long; the limit is"):
        parse(struct.pack("<Q", LIMIT + 1) + b"{}", size=LIMIT + 17)


def test_a_file_that_shrinks_while_it_is_read_is_an_error() -> None:
    with pytest.raises(BadInputError, match="changed while it was read"):
        parse(GOOD[:40], size=len(GOOD))


def test_too_many_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_TENSORS < 1_000_000  # of which the reference takes 45 seconds to read
    monkeypatch.setattr(parser, "MAX_TENSORS", 10)
    entries = {str(i): entry("F32", [0], 0, 0) for i in range(11)}

    with pytest.raises(BadInputError, match="too many tensors: 11, the limit is 10"):
        parse(container(entries))
    del entries["0"]
    assert len(parse(container(entries)).tensors) == 10


# --- files that are odd and sound ----------------------------------------------------------


def test_no_tensors_are_no_fault_of_the_container() -> None:
    assert parse(container({})).tensors == {}


def test_blanks_before_the_header_are_skipped() -> None:
    assert list(parse(container(b"   " + ONE, FOUR)).tensors) == ["a"]


def test_an_unknown_field_is_ignored() -> None:
    header = parse(container({"a": entry("F32", [1], 0, 4, foo="bar")}, FOUR))

    assert header.tensors["a"].shape == (1,)


def test_odd_names_are_names() -> None:
    names = ["", "nul\0key", "x" * 1_000_000, "line\nbreak", "a." * 1000 + "b", "\U0001f600"]
    entries = {name: entry("U8", [1], i, i + 1) for i, name in enumerate(names)}

    assert list(parse(container(entries, b"\0" * len(names))).tensors) == names


def test_empty_and_scalar_tensors_have_sizes() -> None:
    header = parse(save({"empty": torch.zeros(0, 4), "scalar": torch.tensor(3.0)}))

    assert {name: info.shape for name, info in header.tensors.items()} == {"empty": (0, 4), "scalar": ()}
    assert header.tensors["empty"].nbytes == 0
    assert header.tensors["scalar"].numel == 1


def test_half_bytes_that_fill_whole_ones_are_read() -> None:
    info = parse(container({"a": entry("F4", [2, 3], 0, 3)}, b"\x12\x34\x56")).tensors["a"]

    assert (info.nbytes, info.numel) == (3, 6)


def test_a_terabyte_is_described_without_being_read() -> None:
    content = container({"a": entry("U8", [2**40], 0, 2**40)})

    assert parse(content, size=len(content) + 2**40).tensors["a"].nbytes == 2**40


def test_tensors_come_in_the_order_of_their_data() -> None:
    content = container({"a": entry("U8", [2], 1, 3), "b": entry("U8", [1], 0, 1)}, b"\0" * 3)

    assert list(parse(content).tensors) == ["b", "a"]


# --- against the reference writer ----------------------------------------------------------


@many
@given(stored=state_dicts(), metadata=st.none() | st.dictionaries(names, text, max_size=4))
def test_what_the_reference_writes_is_read(
    stored: dict[str, torch.Tensor], metadata: dict[str, str] | None
) -> None:
    assume(stored or metadata != {})  # safetensors 0.8.0 writes invalid JSON for this one
    content = save(stored, metadata)

    header = parse(content)

    assert header.metadata == (metadata or {})
    assert header.tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        info = header.tensors[name]
        assert (info.dtype, info.shape) == (DTYPES[tensor.dtype], tuple(tensor.shape))
        assert content[header.data_start + info.start : header.data_start + info.stop] == bits(tensor)


# --- the quick ways, which say nothing where they are not sure -----------------------------


def test_too_many_tensors_are_refused_however_they_are_spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first look counts words; escapes get past it, and the entries themselves are counted."""
    monkeypatch.setattr(parser, "MAX_TENSORS", 3)
    text = json.dumps({str(n): entry("U8", [1], n, n + 1) for n in range(4)})
    content = container(text.replace("data_offsets", "data_offset\\u0073").encode(), bytes(4))
    with pytest.raises(BadInputError, match="too many tensors: 4, the limit is 3"):
        parse(content)


@pytest.mark.parametrize("size", [True, 1.0, "1", None])
def test_sizes_are_whole_numbers(size: object) -> None:
    with pytest.raises(BadInputError, match="is not a list of sizes") as caught:
        parse(container({"a": {**entry("U8", [1], 0, 1), "shape": [size]}}, b"x"))
    assert caught.value.key == "a"


@pytest.mark.parametrize("metadata", [{}, {"k": "v"}])
def test_columns_are_the_tensors(metadata: dict[str, str]) -> None:
    content = save(
        {"b": torch.ones(2, 3), "a": torch.ones(2, dtype=torch.int64), "c": torch.ones(())}, metadata
    )
    split = read_split_header(io.BytesIO(content), len(content), "x")
    assert split is not None
    found, whole = split.columns(), parse(content)
    assert found is not None
    assert dict(zip(found.names, zip(found.dtypes, map(tuple, found.shapes), strict=True), strict=True)) == {
        name: (info.dtype, info.shape) for name, info in whole.tensors.items()
    }
    assert split.tensors() == whole.tensors
    assert (split.metadata, split.data_start) == (whole.metadata, whole.data_start)


@pytest.mark.parametrize("content", [*(content for content, _ in MALFORMED.values())])
def test_a_quick_way_never_takes_what_the_whole_one_refuses(content: bytes) -> None:
    try:
        split = read_split_header(io.BytesIO(content), len(content), "x")
    except BadInputError:
        return
    assert split is None or (split.columns() is None and split.tensors() is None)


def test_strings_too_many_here_do_not_make_up_for_those_that_lack_there() -> None:
    """The quick way counts them, over all entries."""
    odd = {"a": 1, "b": entry("F32", [1], 0, 4, x="y", z="w")}
    assert json.dumps(odd).count('"') == 10 * len(odd)
    with pytest.raises(BadInputError, match="is not an object") as caught:
        parse(container(odd, FOUR))
    assert caught.value.key == "a"
