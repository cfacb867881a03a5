"""Write a checkpoint as several files and an index, whole or not at all.

Names and index are those of transformers and diffusers:
``NAME-00001-of-0000N.safetensors`` and ``NAME.safetensors.index.json``. Every shard is
complete on disk before the first gets its name, and the index, by which readers find them,
gets its own last.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lycotool.errors import OutputError
from lycotool.io.nameless import NamelessFile, fsync_folder, nameless_file, temporary_beside, uninterrupted
from lycotool.io.preflight import check_space, prepare_output, reason_of
from lycotool.io.writer import Check, FilePlan, Producer, staged_file

INDEX_SUFFIX = ".safetensors.index.json"

#: What transformers and diffusers shard at when they are asked for nothing else: 5 GB.
DEFAULT_SHARD_BYTES = 5 * 10**9

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file of several.

    Attributes
    ----------
    name
        Its path below the folder.
    plan
        What is in it.
    keys
        Name in the file to the producer's key.
    """

    name: str
    plan: FilePlan
    keys: Mapping[str, str]

    def producer(self, produce: Producer) -> Producer:
        """The producer, asked by the names in the file."""
        return lambda name: produce(self.keys[name])


@dataclass(frozen=True, slots=True)
class SetTarget:
    """Where a sharded checkpoint goes: the folder, and the NAME of its files."""

    folder: Path
    stem: str

    @property
    def index(self) -> Path:
        """The file that readers are given."""
        return self.folder / f"{self.stem}{INDEX_SUFFIX}"

    def members(self) -> list[Path]:
        """The files there now that are a checkpoint of this name, in one piece or several."""
        shards = re.compile(re.escape(self.stem) + r"-\d{5}-of-\d{5}\.safetensors")
        found = [self.index, self.folder / f"{self.stem}.safetensors"]
        found += sorted(path for path in self.folder.iterdir() if shards.fullmatch(path.name))
        return [path for path in found if os.path.lexists(path)]


def stem_of(name: str) -> str:
    """NAME of a shard, an index or a whole file.

    >>> stem_of("model-00001-of-00002.safetensors")
    'model'
    """
    for suffix in (INDEX_SUFFIX, ".safetensors", ".bin"):
        if name.lower().endswith(suffix):
            return _SHARD.sub("", name[: -len(suffix)])
    return name


def index_name(stem: str) -> str:
    """The index of shards named so; a variant such as ``model.fp16`` goes where diffusers looks for it."""
    base, dot, variant = stem.partition(".")
    return f"{base}{INDEX_SUFFIX}" if not dot else f"{base}.safetensors.index.{variant}.json"


def partition(sizes: Mapping[str, int], limit: int, together: Mapping[str, str]) -> list[list[str]]:
    """Tensors in shards of at most ``limit`` bytes of data, in the order of their names.

    Parameters
    ----------
    together
        Tensor to the one whose shard it shares; larger groups and tensors have a shard alone.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(sizes, key=_natural):
        groups.setdefault(together.get(name, name), []).append(name)
    shards: list[list[str]] = []
    filled = limit
    for names in groups.values():
        nbytes = sum(sizes[name] for name in names)
        if not shards or filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1] += names
        filled += nbytes
    return shards


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts block 2 before block 10."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in _NUMBER.split(name)]


def shard_names(stem: str, count: int) -> list[str]:
    """The names of so many shards."""
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_text(files: Iterable[OutputFile]) -> str:
    """The index of some shards, which it names relative to its own folder."""
    weights: dict[str, str] = {}
    total = 0
    for file in files:
        weights |= dict.fromkeys(file.plan.tensors, Path(file.name).name)
        total += sum(tensor.nbytes for tensor in file.plan.tensors.values())
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def prepare_set(output: str, inputs: Iterable[Path], *, force: bool) -> SetTarget:
    """Check that a sharded checkpoint can be written, before any work is done.

    Parameters
    ----------
    output
        ``NAME.safetensors`` or ``NAME.safetensors.index.json``.

    Raises
    ------
    OutputError
        If a file of that name exists (without ``force``), is an input, or cannot be made.
    """
    if output == "-":
        raise OutputError("a sharded checkpoint cannot be written to standard output", path=output)
    path, inputs = Path(output), list(inputs)
    target = SetTarget(Path(os.path.realpath(path.parent)), stem_of(path.name))
    longest = target.folder / shard_names(target.stem, 1)[0]
    prepare_output(str(target.index), inputs=inputs, force=force)
    prepare_output(str(longest), inputs=inputs, force=force)
    for member in target.members():
        prepare_output(str(member), inputs=inputs, force=force)
    return target


def write_set(
    target: SetTarget,
    files: Sequence[OutputFile],
    produce: Producer,
    *,
    advance: Callable[[int], None] = lambda nbytes: None,
    check: Check | None = None,
) -> None:
    """Write shards and their index; older files of the same name make way for them.

    One file called ``NAME.safetensors`` has no index.

    Raises
    ------
    OutputError
        If anything fails. The folder then is as it was.
    """
    check_space(target.index, sum(file.plan.nbytes for file in files))
    with contextlib.ExitStack() as stack:
        finished: list[tuple[Path, NamelessFile]] = []
        for file in files:
            path = target.folder / file.name
            shard = staged_file(path, file.plan, file.producer(produce), advance=advance, check=check)
            finished.append((path, stack.enter_context(shard)))
        try:
            if [file.name for file in files] != [f"{target.stem}.safetensors"]:
                index = stack.enter_context(nameless_file(target.index))
                _write_text(index.descriptor, index_text(files))
                finished.append((target.index, index))
            publish_all(finished, target.members())
        except OSError as error:
            raise OutputError(reason_of(error), path=target.index) from error


def _write_text(descriptor: int, text: str) -> None:
    data = text.encode()
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)


def publish_all(finished: Sequence[tuple[Path, NamelessFile]], old: Sequence[Path]) -> None:
    """Give finished files of one folder their names, in this order, in place of older ones.

    Raises
    ------
    OSError
        If anything fails. The folder is then as it was, unless the message says that all was written.
    """
    with uninterrupted(), _replacing(old) as published:
        for path, file in finished:
            published.append(path)  # it may have its name and publishing fail all the same
            file.publish(flushed=False)
        for folder in {path.parent for path, _ in finished}:
            fsync_folder(folder)


@contextlib.contextmanager
def _replacing(old: Sequence[Path]) -> Iterator[list[Path]]:
    """Put files out of the way; if what follows fails, take what was published away and put them back."""
    aside: dict[Path, Path] = {}
    published: list[Path] = []
    try:
        for path in old:
            aside[path] = temporary_beside(path, "old")
            path.rename(aside[path])
        yield published
    except BaseException:
        for path in published:
            path.unlink(missing_ok=True)
        for path, hidden in aside.items():
            if os.path.lexists(hidden):
                hidden.replace(path)
        raise
    for hidden in aside.values():
        try:
            hidden.unlink()
        except OSError as error:
            reason = f"was written, but the older {hidden} cannot be removed: {reason_of(error)}"
            raise OSError(error.errno, reason) from error
