"""Where `bake` writes: one file, a sharded checkpoint, or a diffusers folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from lycotool.errors import UsageError
from lycotool.formats.quantisation import Scaled
from lycotool.io.shards import (
    DEFAULT_SHARD_BYTES,
    INDEX_SUFFIX,
    OutputFile,
    SetTarget,
    index_name,
    index_text,
    partition,
    prepare_set,
    shard_names,
    stem_of,
    write_set,
)
from lycotool.io.store import TensorStore
from lycotool.io.tree import TreeTarget, prepare_tree, weight_files, write_tree
from lycotool.io.writer import Check, FilePlan, Producer, TensorPlan, prepare_output, write_file
from lycotool.ops._common import check_suffix

#: None is standard output.
Target = Path | None | SetTarget | TreeTarget


@dataclass(frozen=True, slots=True)
class Contents:
    """What is to be written, before it is divided into files.

    Attributes
    ----------
    metadata
        Of a checkpoint that is no diffusers folder.
    provenance
        What files of a diffusers folder carry beside their own metadata, when they change.
    settle
        What of that is known only when the data has been written; see :class:`FilePlan`.
    changed
        The tensors that change.
    late
        The tensors that are known after others only.
    scaled
        The weights that stay with their scales.
    dequantised
        The weights that lose them.
    """

    plans: Mapping[str, TensorPlan]
    metadata: Mapping[str, str]
    provenance: Mapping[str, str]
    changed: frozenset[str]
    late: frozenset[str]
    scaled: Mapping[str, Scaled]
    dequantised: frozenset[str]
    hashed: bool
    spec_hashed: bool
    settle: Callable[[], Mapping[str, str]] | None = None

    @property
    def together(self) -> dict[str, str]:
        """Scales and what else belongs to a weight, to that weight."""
        return {key: s.weight for s in self.scaled.values() for key in (s.scale, *s.beside)}


@dataclass(frozen=True, slots=True)
class Layout:
    """The files to be written, the texts beside them, and components no longer quantised."""

    target: Target
    output: str
    files: tuple[OutputFile, ...]
    texts: Mapping[str, str]
    plain: frozenset[str] = frozenset()


def prepare(
    store: TensorStore, output: str, inputs: Sequence[Path], shard_size: int | None, *, force: bool, dry: bool
) -> Target:
    """Check that the output can be written, before anything is read.

    Raises
    ------
    UsageError
        If the name promises another format, shards go to standard output, or hold nothing.
    OutputError
        If something stands in the way.
    """
    if shard_size is not None and shard_size < 1:
        raise UsageError(f"`--shard-size` is {shard_size} bytes")
    if store.kind == "diffusers":
        return prepare_tree(output, Path(store.path), force=force)
    if output.lower().endswith(INDEX_SUFFIX):
        return prepare_set(output, inputs, force=force)
    check_suffix(output)
    if shard_size is not None:
        if output == "-":
            raise UsageError("`--shard-size` writes several files: `-o` names one or its index", path=output)
        return prepare_set(output, inputs, force=force)
    if dry and output == "-":
        return None
    return prepare_output(output, inputs=inputs, force=force)


def lay_out(
    target: Target, output: str, store: TensorStore, contents: Contents, shard_size: int | None
) -> Layout:
    """Divide the tensors into files.

    Parameters
    ----------
    store
        The checkpoint as it was opened; its files are kept where no shard size is given.
    """
    if isinstance(target, TreeTarget):
        files, texts = _tree(store, contents, shard_size)
        names = weight_files(store)
        plain = frozenset(str(PurePosixPath(names[key]).parent) for key in contents.dequantised)
        return Layout(target, output, tuple(files), texts, plain)
    if not isinstance(target, SetTarget):
        return Layout(target, output, (_whole(output, contents),), {})
    groups = _groups(store, contents, shard_size)
    named_index = output.lower().endswith(INDEX_SUFFIX)
    if len(groups) == 1 and not named_index:
        return Layout(target, output, (_whole(f"{target.stem}.safetensors", contents),), {})
    metadata = {"format": "pt", **contents.metadata}  # transformers demands it of every shard
    shards = [
        _file(name, {key: key for key in keys}, contents, metadata)
        for name, keys in zip(shard_names(target.stem, len(groups)), groups, strict=True)
    ]
    shown = output if named_index else output[: -len(".safetensors")] + INDEX_SUFFIX
    return Layout(target, shown, tuple(shards), {})


def write(layout: Layout, produce: Producer, advance: Callable[[int], None], check: Check | None) -> None:
    """Write the files, all or none.

    Raises
    ------
    OutputError
        If a write fails.
    """
    target = layout.target
    if isinstance(target, TreeTarget):
        write_tree(
            target, layout.files, layout.texts, produce, plain=layout.plain, advance=advance, check=check
        )
    elif isinstance(target, SetTarget):
        write_set(target, layout.files, produce, advance=advance, check=check)
    else:
        (file,) = layout.files
        write_file(target, file.plan, produce, advance=advance, check=check)


def _file(name: str, keys: Mapping[str, str], contents: Contents, metadata: Mapping[str, str]) -> OutputFile:
    """One file of several, without hashes: those are of a whole checkpoint."""
    plans = {inside: contents.plans[key] for inside, key in keys.items()}
    last = frozenset(inside for inside, key in keys.items() if key in contents.late)
    settle = contents.settle if contents.provenance.keys() <= metadata.keys() else None
    return OutputFile(name, FilePlan(plans, metadata, last=last, settle=settle), keys)


def _whole(name: str, contents: Contents) -> OutputFile:
    file = _file(name, {key: key for key in contents.plans}, contents, contents.metadata)
    plan = replace(file.plan, hashed=contents.hashed, spec_hashed=contents.spec_hashed)
    return replace(file, plan=plan)


def _groups(store: TensorStore, contents: Contents, shard_size: int | None) -> list[list[str]]:
    """The tensors of each shard: as the input has them, or of a size."""
    if shard_size is None and store.kind == "sharded":
        files: dict[str, list[str]] = {}
        for key in contents.plans:
            files.setdefault(store.entries[key].file.path.name, []).append(key)
        return [files[name] for name in sorted(files)]
    sizes = {key: plan.nbytes for key, plan in contents.plans.items()}
    return partition(sizes, shard_size or DEFAULT_SHARD_BYTES, contents.together)


def _tree(
    store: TensorStore, contents: Contents, shard_size: int | None
) -> tuple[list[OutputFile], dict[str, str]]:
    """The files of a diffusers folder: the input's, or of a size in each component."""
    names = weight_files(store)
    components: dict[str, dict[str, list[str]]] = {}
    for key in contents.plans:
        component = str(PurePosixPath(names[key]).parent)
        components.setdefault(component, {}).setdefault(names[key], []).append(key)
    files: list[OutputFile] = []
    texts: dict[str, str] = {}
    for members in components.values():
        first = PurePosixPath(next(iter(members)))
        stem = stem_of(first.name)
        parts = members if shard_size is None else _resharded(first, stem, members, contents, shard_size)
        made = [_component_file(store, name, keys, contents) for name, keys in parts.items()]
        if len(made) > 1 or PurePosixPath(made[0].name).stem != stem:
            texts[str(first.with_name(index_name(stem)))] = index_text(made)
        files += made
    return files, texts


def _resharded(
    first: PurePosixPath, stem: str, members: Mapping[str, list[str]], contents: Contents, shard_size: int
) -> dict[str, list[str]]:
    """A component's tensors in files of a size; one file has no number and no index."""
    sizes = {key: contents.plans[key].nbytes for keys in members.values() for key in keys}
    groups = partition(sizes, shard_size, contents.together)
    names = shard_names(stem, len(groups)) if len(groups) > 1 else [f"{stem}.safetensors"]
    return {str(first.with_name(name)): keys for name, keys in zip(names, groups, strict=True)}


def _component_file(store: TensorStore, name: str, members: Sequence[str], contents: Contents) -> OutputFile:
    inside = {store.entries[key].name: key for key in members}
    metadata = {"format": "pt", **store.entries[members[0]].file.metadata}
    if contents.changed & frozenset(members):
        metadata |= contents.provenance
    return _file(name, inside, contents, metadata)
