"""Change a file's metadata; the tensors stay byte for byte what they are. For `inspect --set` and so on."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lycotool.errors import IncompatibleError, OutputError, UsageError
from lycotool.io.hashes import LEGACY_HASH, MODEL_HASH, SPEC_HASH, legacy_hash
from lycotool.io.open import open_store
from lycotool.io.rewrite import header_with, rewrite
from lycotool.io.store import SafetensorsFile, TensorStore
from lycotool.io.writer import FilePlan, TensorPlan, prepare_output
from lycotool.ops._common import check_suffix, default_name, listed
from lycotool.ops._metadata_keys import stripped


@dataclass(frozen=True, slots=True, kw_only=True)
class EditOptions:
    """What to change, and where to write.

    Attributes
    ----------
    set
        Keys to their new values.
    unset
        Keys to take out, or shell patterns of them.
    strip_training_data
        Take out what :func:`lycotool.ops._metadata_keys.is_training_data` names.
    output
        None is ``STEM-edited.safetensors`` in the current folder.
    in_place
        Replace the file itself, at once and whole.
    """

    set: Mapping[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    strip_training_data: bool = False
    output: str | None = None
    in_place: bool = False
    force: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class EditResult:
    """What was written, or would be; ``changed`` has the old and the new value of each key."""

    path: str
    output: str
    added: dict[str, str]
    changed: dict[str, tuple[str, str]]
    removed: tuple[str, ...]
    header_bytes_before: int
    header_bytes_after: int
    dry_run: bool


def edit_metadata(name: str, options: EditOptions) -> EditResult:
    """Edit the metadata of one safetensors file.

    ``sshs_model_hash`` is of the data alone and stays; ``sshs_legacy_hash`` depends on the ``ss_*``
    metadata and is computed again when those change.

    Raises
    ------
    UsageError
        If options contradict each other, or a key cannot be set.
    IncompatibleError
        If the input is not one safetensors file, or has none of the keys to take out.
    OutputError
        If the output cannot be written.
    """
    _check_options(name, options)
    with open_store(name) as store:
        file = _single_file(store)
        metadata = _edited(store, options)
        if LEGACY_HASH in metadata and _ss(metadata) != _ss(store.metadata):
            metadata[LEGACY_HASH] = _legacy_hash(store, metadata)
        header = header_with(file, metadata)
        output, target = _target(name, file, options)
        before = store.metadata
        result = EditResult(
            path=name,
            output=output,
            added={key: value for key, value in sorted(metadata.items()) if key not in before},
            changed={
                key: (before[key], value)
                for key, value in sorted(metadata.items())
                if key in before and before[key] != value
            },
            removed=tuple(sorted(before.keys() - metadata.keys())),
            header_bytes_before=file.data_start,
            header_bytes_after=len(header),
            dry_run=options.dry_run,
        )
        is_idle = not (result.added or result.changed or result.removed)
        if not options.dry_run and not (options.in_place and is_idle):
            rewrite(file, header, target)
        return result


def _check_options(name: str, options: EditOptions) -> None:
    if options.in_place and options.output is not None:
        raise UsageError("`--in-place` and `-o` exclude each other")
    if options.output == "-" or (name == "-" and options.in_place):
        raise UsageError("metadata is edited in files; standard input and output have none to replace",
                         hint="`-o FILE` names the new file")  # fmt: skip
    for key, value in options.set.items():
        if not key or key == "__metadata__":
            raise UsageError(f"{key!r} cannot be a metadata key")
        if key in (MODEL_HASH, LEGACY_HASH, SPEC_HASH):
            raise UsageError(
                f"{key} is computed from the file, not set", hint=f"`--unset {key}` takes it out"
            )
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in options.unset):
            raise UsageError(f"{key} is both set and unset")
        try:
            f"{key}{value}".encode()
        except UnicodeEncodeError:
            raise UsageError(f"{key!r} or its value is not valid Unicode") from None


def _single_file(store: TensorStore) -> SafetensorsFile:
    file = store.opened[0] if len(store.opened) == 1 and store.kind in ("file", "peft") else None
    if not isinstance(file, SafetensorsFile) or store.kind != "file":
        kinds = {
            "sharded": "a sharded checkpoint",
            "diffusers": "a diffusers folder",
            "peft": "a PEFT folder",
        }
        raise IncompatibleError(
            f"is {kinds.get(store.kind, 'no safetensors file')}, and metadata is edited in one .safetensors file",
            path=store.path,
            hint="name one of its .safetensors files",
        )
    return file


def _edited(store: TensorStore, options: EditOptions) -> dict[str, str]:
    metadata = stripped(store.metadata) if options.strip_training_data else dict(store.metadata)
    for pattern in options.unset:
        found = [key for key in store.metadata if key == pattern or fnmatch.fnmatchcase(key, pattern)]
        if not found:
            raise IncompatibleError(
                f"has no metadata key {pattern}", path=store.path, details=listed(sorted(store.metadata))
            )
        for key in found:
            metadata.pop(key, None)
    return {**metadata, **options.set}


def _ss(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key.startswith("ss_")}


def _legacy_hash(store: TensorStore, metadata: Mapping[str, str]) -> str:
    plan = FilePlan(
        {key: TensorPlan(entry.info.dtype, entry.info.shape) for key, entry in store.entries.items()},
        metadata,
    )

    def pieces() -> Iterator[memoryview]:
        for key in plan.tensors:
            yield from store.chunks(key)

    return legacy_hash(plan.legacy_header(), pieces())


def _target(name: str, file: SafetensorsFile, options: EditOptions) -> tuple[str, Path]:
    """The output's name, and where it really is.

    Raises
    ------
    OutputError
        If it cannot be written, or is a link into somebody else's folder.
    """
    if not options.in_place:
        output = options.output or default_name([name], "-edited.safetensors")
        check_suffix(output)
        target = prepare_output(output, inputs=[file.path], force=options.force)
        if target is None:
            raise TypeError(output)
        return output, target
    if file.path.is_symlink():
        raise OutputError(
            "is a symlink; `--in-place` would change the file it leads to, which others may know by its hash",
            path=name,
            hint=f"name {os.path.realpath(file.path)} itself, or write a new file with `-o`",
        )
    if not os.access(file.path, os.W_OK) or not os.access(file.path.parent or ".", os.W_OK | os.X_OK):
        raise OutputError("is read-only, or in a folder that is", path=name)
    return name, Path(os.path.realpath(file.path))
