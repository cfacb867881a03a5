"""Hostile bytes and texts for everything that parses: mutations of sound ones, and keys of the registry.

Each target takes a source of randomness and one input's worth of work; what it raises other than
a :class:`LycotoolError` is a find, and so is more time or memory than :data:`LONGEST` and
:data:`MOST_MEMORY`. Deterministic: the seed and the number of an execution give it again.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from PIL import Image

from lycotool.algorithms import ALGORITHMS, SLOT_NAMES
from lycotool.algorithms.base import MismatchError
from lycotool.algorithms.detection import detect
from lycotool.cli._text import clean
from lycotool.errors import BadInputError, LycotoolError
from lycotool.formats.keys import parse_keys
from lycotool.io.header import DTYPE_BITS, read_header
from lycotool.io.open import open_store
from lycotool.ops._recipe import read_recipe
from lycotool.ops.inspect import InspectOptions, inspect
from lycotool.training.data.dataset_file import file_sources
from lycotool.training.data.faults import Findings
from lycotool.training.data.options import DataOptions
from lycotool.training.kohya_config import read_kohya_config
from reliability.tensors import stored

Random = random.Random

#: Seconds of the processor that no execution may take: waiting for others on a busy machine is no fault.
LONGEST = 2.0

#: Bytes that the process may grow by, over all executions.
MOST_MEMORY = 256 * 2**20

#: What is refused although the reference takes it, by what the message says.
_STRICTER = ("duplicate", "limit is", "number of dimensions", "overflows", "is not a list of sizes")

MODULES = (
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    "transformer.single_transformer_blocks.0.attn.to_q",
    "base_model.model.unet.mid_block.resnets.0.conv1",
    "diffusion_model.input_blocks.1.1.proj_in",
    "lycoris_a_b",
    "",
    "..",
    "a.b" * 40,
)
_SLOTS = tuple(
    sorted({slot.name for algorithm in ALGORITHMS for layout in algorithm.layouts for slot in layout.slots})
)
ENDINGS = (
    *_SLOTS,
    "lora_A.weight",
    "lora_B.weight",
    "lora.down.weight",
    "dora_scale",
    "magnitude",
    "alpha",
    "weight",
)
_SIZES = (0, 1, 2, 3, 4, 8, 16, 2**31, 2**62, 2**63)
TOKENS = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"null", b"true", b"-1", b"1e9", b"NaN",
    b"0.5", b"18446744073709551616", b"9223372036854775807", b'"__metadata__"', b'"dtype"', b'"shape"',
    b'"data_offsets"', b"F32", b"F4", b"\xff", b"\x00", b"\x1b[31m", b"\xe2\x80\xae", b"[" * 500,
)  # fmt: skip


def mutated(data: bytes, draw: Random) -> bytes:
    """Some bytes flipped, cut out, doubled, or replaced by tokens of the grammar."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        place = draw.randint(0, len(out)) if out else 0
        match draw.randint(0, 5):
            case 0 if out:
                out[place % len(out)] ^= 1 << draw.randint(0, 7)
            case 1:
                out[place : place + draw.randint(0, 12)] = b""
            case 2:
                out[place:place] = draw.choice(TOKENS)
            case 3:
                out[place:place] = out[place : place + draw.randint(0, 40)]
            case 4:
                numbers = list(re.finditer(rb"\d+", out))
                if numbers:
                    found = draw.choice(numbers)
                    out[found.start() : found.end()] = str(draw.choice((*_SIZES, -1, 2**64))).encode()
            case _:
                out[place:] = out[place:][: draw.randint(0, len(out))]
    return bytes(out)


def shapes(draw: Random) -> dict[str, tuple[int, ...]]:
    """A module of the registry: the slots of one layout with sizes that agree, or nearly."""
    layout = draw.choice(draw.choice(ALGORITHMS).layouts)
    sizes: dict[str, int] = {}
    is_odd = draw.random() < 0.4
    found = {
        slot.name: _shape(slot.axes, sizes, draw)
        for slot in layout.slots
        if slot.required or draw.random() < 0.3
        if not (is_odd and draw.random() < 0.1)
    }
    if is_odd and found:
        name = draw.choice(list(found))
        found[name] = tuple(draw.choice(_SIZES) for _ in range(draw.randint(0, 5)))
        if draw.random() < 0.5:
            found[draw.choice(ENDINGS)] = tuple(draw.choice(_SIZES) for _ in range(draw.randint(0, 4)))
    return found


def _shape(axes: str, sizes: dict[str, int], draw: Random) -> tuple[int, ...]:
    """The sizes that a slot's symbolic shape stands for; words keep theirs within a module."""
    shape: list[int] = []
    for axis in axes.split():
        if axis == "scalar":
            return draw.choice(((), (1,)))
        if axis.startswith("*"):
            rest = 1 if axis == "*1" else sizes.setdefault(axis, draw.choice((1, 3)))
            shape += [rest] * draw.choice((0, 0, 2))
            continue
        size = 1
        for word in axis.split("*"):
            size *= int(word) if word.isdecimal() else sizes.setdefault(word, draw.choice((1, 2, 4, 6)))
        shape.append(size)
    return tuple(shape)


def container(draw: Random, *, data: Callable[[int], bytes] = bytes) -> bytes:
    """A file of a few modules whose header is sound; its data is zeros, or what ``data`` makes."""
    header: dict[str, object] = {}
    start = 0
    if draw.random() < 0.5:
        header["__metadata__"] = {text(draw): text(draw) for _ in range(draw.randint(0, 4))}
    for _ in range(draw.randint(0, 3)):
        module = draw.choice(MODULES)
        for name, shape in shapes(draw).items():
            count = 1
            for size in shape:
                count *= size
            dtype = draw.choice(("F32", "F16", "BF16", "F8_E4M3", "I8", "BOOL", "I64"))
            nbytes = count * DTYPE_BITS[dtype] // 8
            if nbytes > 4096:
                continue
            header[f"{module}.{name}"] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [start, start + nbytes],
            }
            start += nbytes
    body = json.dumps(header).encode()
    return struct.pack("<Q", len(body)) + body + data(start)


def text(draw: Random) -> str:
    """Text with whatever a terminal could mind, and words that metadata has."""
    words = ("ss_network_args", "ss_tag_frequency", "ss_datasets", "lora_adapter_metadata", "lycotool.merge",
             '{"algo":"lokr"}', "[" * 40, "{}", "null", "nan", "1e999", "[/bold]", "\x1b[2J", "\u202e", "\ud7ff")  # fmt: skip
    if draw.random() < 0.5:
        return draw.choice(words)
    return "".join(chr(draw.choice((draw.randint(0, 0x9F), draw.randint(0, 0xD7FF), draw.randint(0xE000, 0x1FFFF))))
                   for _ in range(draw.randint(0, 30)))  # fmt: skip


_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ud800-\udfff]"
)
TOML = b"""[general]
resolution = [512, 512]
enable_bucket = true
[[datasets]]
batch_size = 2
  [[datasets.subsets]]
  image_dir = "x"
  num_repeats = 2
  caption_extension = ".txt"
"""

INDEX = b'{"metadata": {"total_size": 4}, "weight_map": {"a": "s.safetensors"}}'

RECIPE = b"""base = "base.safetensors"
method = "ties"
density = 0.5
[[inputs]]
file = "a.safetensors"
strength = 0.7
"""
CONFIG = b"""pretrained_model_name_or_path = "model.safetensors"
network_dim = 16
network_args = ["algo=lokr", "factor=8"]
learning_rate = 1e-4
[additional]
optimizer_type = "AdamW8bit"
"""


#: The targets.
NAMES = (
    "header",
    "dialects",
    "terminal",
    "report",
    "measured",
    "index",
    "dataset",
    "recipe",
    "configuration",
)


class Targets:
    """Everything that parses; ``folder`` holds the files of targets that need one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / "x.safetensors"
        (folder / "s.safetensors").write_bytes(stored({"a": torch.ones(1)}, None))
        (folder / "x").mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(folder / "x" / "a.png")

    def header(self, draw: Random) -> None:
        """The header of a container."""
        data = container(draw)
        if draw.random() < 0.9:
            (length,) = struct.unpack("<Q", data[:8])
            body = mutated(data[8 : 8 + length], draw)
            data = struct.pack("<Q", len(body)) + body + data[8 + length :]
        else:
            data = mutated(data, draw)
        agrees_with_the_reference(data)

    def dialects(self, draw: Random) -> None:
        """Names into modules, and modules into algorithms."""
        names = [f"{draw.choice(MODULES)}.{draw.choice(ENDINGS)}" for _ in range(draw.randint(0, 12))]
        if draw.random() < 0.3:
            names.append(text(draw))
        check_names(names)
        with contextlib.suppress(MismatchError):
            detect(shapes(draw), algorithm_hint=draw.choice((None, "dylora", "tlora", "x")))

    def terminal(self, draw: Random) -> None:
        """Text on its way to a terminal."""
        check_clean(text(draw) + text(draw))

    def report(self, draw: Random) -> None:
        """A whole file, inspected: modules, metadata, blocks."""
        self.report_of(container(draw))

    def report_of(self, data: bytes) -> None:
        """A file with these bytes, inspected."""
        self._file.write_bytes(data)
        inspect(str(self._file))

    def measured(self, draw: Random) -> None:
        """A whole file of any numbers, checked: every module's change is computed and measured."""
        self._file.write_bytes(container(draw, data=draw.randbytes))
        inspect(str(self._file), InspectOptions(check="all"))

    def index(self, draw: Random) -> None:
        """The index of a sharded checkpoint."""
        self.index_of(mutated(INDEX, draw) if draw.random() < 0.9 else INDEX)

    def index_of(self, data: bytes) -> None:
        """An index with these bytes."""
        index = self._folder / "x.safetensors.index.json"
        index.write_bytes(data)
        with open_store(str(index)):
            pass

    def dataset(self, draw: Random) -> None:
        """A dataset file."""
        self.dataset_of(mutated(TOML, draw))

    def dataset_of(self, data: bytes) -> None:
        """A dataset file with these bytes."""
        file = self._folder / "dataset.toml"
        file.write_bytes(data)
        file_sources(file, DataOptions(), Findings())

    def recipe(self, draw: Random) -> None:
        """A recipe of merge, as a file."""
        self.recipe_of(mutated(RECIPE, draw))

    def recipe_of(self, data: bytes) -> None:
        """A recipe with these bytes."""
        file = self._folder / "recipe.toml"
        file.write_bytes(data)
        read_recipe(str(file))

    def configuration(self, draw: Random) -> None:
        """A configuration of sd-scripts."""
        self.configuration_of(mutated(CONFIG, draw))

    def configuration_of(self, data: bytes) -> None:
        """A configuration with these bytes."""
        file = self._folder / "config.toml"
        file.write_bytes(data)
        read_kohya_config(str(file))

    def all(self) -> Mapping[str, Callable[[Random], None]]:
        """By name."""
        return {name: getattr(self, name) for name in NAMES}


def check_names(names: Sequence[str]) -> None:
    """Sort names into modules: each belongs to one, or is left over."""
    keys = parse_keys(dict.fromkeys(names), SLOT_NAMES)
    sorted_out = [key for module in keys.modules.values() for key in module.slots.values()]
    sorted_out += [*keys.orphans, *keys.unknown, *keys.embeddings, *(key for _, key in keys.clashes)]
    assert set(sorted_out) == set(names), "a name is lost"


def check_clean(characters: str) -> None:
    """What is shown of a text has nothing in it that a terminal could mind."""
    shown = clean(characters)
    assert not _UNSAFE.search(shown), repr(shown)


def agrees_with_the_reference(data: bytes) -> None:
    """Read a header; what is taken is taken by the reference too, for the same, and what is not is not.

    Raises
    ------
    BadInputError
        If the header is refused, by both.
    AssertionError
        If they differ, but for what :data:`_STRICTER` names.
    """
    try:
        reference = {
            name: (entry["dtype"], tuple(entry["shape"])) for name, entry in safetensors.deserialize(data)
        }
    except (safetensors.SafetensorError, UnicodeError) as error:
        reference, reason = None, str(error)
    try:
        header = read_header(io.BytesIO(data), len(data), "x")
    except BadInputError as refusal:
        if reference is not None and not any(words in str(refusal) for words in _STRICTER):
            raise AssertionError(f"refused alone: {refusal}") from refusal
        raise
    assert reference is not None, f"taken alone; the reference says: {reason}"
    found = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
    assert found == reference, f"{found} where the reference has {reference}"


class _TooLongError(BaseException):
    """An execution takes too long; no `except Exception` keeps it."""


@contextlib.contextmanager
def _timed() -> Iterator[None]:
    """Stop what takes too much time, which may be for ever."""

    def stop(*_: object) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def memory() -> int:
    """The most memory the process has had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Tally:
    """What came of some executions."""

    executions: int = 0
    accepted: int = 0
    refused: int = 0
    longest: float = 0.0
    seconds: float = 0.0
    grown: int = 0

    def __str__(self) -> str:
        return (
            f"{self.executions} executions, {self.accepted} accepted, {self.refused} refused, longest "
            f"{self.longest * 1000:.0f} ms, grown by {self.grown / 2**20:.0f} MiB"
        )

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.executions + other.executions,
            self.accepted + other.accepted,
            self.refused + other.refused,
            max(self.longest, other.longest),
            self.seconds + other.seconds,
            self.grown + other.grown,
        )


def execute(target: Callable[[Random], None], seeds: Sequence[str], finds: list[str]) -> Tally:
    """Run a target once for each seed; finds are described in the list.

    The seed of a find repeats it.
    """
    tally = Tally()
    begin, before = time.process_time(), memory()
    for seed in seeds:
        start = time.process_time()
        try:
            with _timed():
                target(Random(seed))
            tally.accepted += 1
        except LycotoolError:
            tally.refused += 1
        except _TooLongError:
            finds.append(f"{target.__name__} {seed}: more than {LONGEST} s")
        except Exception as error:  # noqa: BLE001 - a find is whatever nobody raised on purpose
            finds.append(f"{target.__name__} {seed}: {type(error).__name__}: {str(error)[:200]}")
        tally.longest = max(tally.longest, time.process_time() - start)
        tally.executions += 1
        grown = memory() - before
        if grown > MOST_MEMORY and tally.grown <= MOST_MEMORY:
            finds.append(f"{target.__name__} {seed}: {grown} bytes more than at the start")
        tally.grown = grown
    tally.seconds = time.process_time() - begin
    return tally
