"""Captions in one file: the Hub's ``metadata.jsonl``, and sd-scripts' ``in_json`` metadata.

* A line ``{"file_name": "a.png", "text": "..."}`` is the Hub's image folder; names are relative
  to the file. ``caption`` is read where there is no ``text``.
* A line ``{"image_path": "a.png", "caption": "...", "tags": "..."}``, or one JSON object
  ``{"a.png": {"caption": "...", "tags": "..."}}``, is sd-scripts'. Names are relative to
  ``image_dir``, or to the file; a name may lack its suffix. Tags follow the caption after the
  caption separator; with wildcards they follow every line of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from lycotool.errors import BadInputError, UsageError
from lycotool.training.data.faults import Findings
from lycotool.training.data.images import EXTENSIONS
from lycotool.training.data.options import DataOptions
from lycotool.training.data.sources import Entry, Source

_USED = frozenset({"file_name", "image_path", "text", "caption", "tags", "image_size", "train_resolution"})


def metadata_source(
    path: Path, options: DataOptions, findings: Findings, *, folder: Path | None = None, group: int = 0
) -> Source:
    """The images a metadata file names, with their captions.

    Parameters
    ----------
    folder
        What names are relative to; default the file's own.

    Raises
    ------
    UsageError
        If there is no such file.
    BadInputError
        If it is not JSON of one of these shapes.
    """
    root = path.parent if folder is None else folder
    entries = []
    columns: set[str] = set()
    missing = []
    for name, record in _records(path):
        columns |= record.keys() - _USED
        image = _found(root / name)
        if image is None:
            missing.append(root / name)
        else:
            entries.append(Entry(image, _caption(record, options, path, name)))
    for image in missing:
        findings.fault(("missing image", "missing images"), image, f"named in {path.name}")
    findings.warn(("column", "columns"), sorted(columns), f" of {path.name} not used")
    if len({entry.path for entry in entries}) < len(entries):
        raise BadInputError("names an image twice", path=path)
    if folder is None and path.name == "metadata.jsonl":
        _note_unnamed(path, entries, findings)
    return Source(path, options, tuple(entries), group)


def _note_unnamed(path: Path, entries: list[Entry], findings: Findings) -> None:
    named = {entry.path for entry in entries}
    images = sorted(p for p in path.parent.iterdir() if p.suffix.lower() in EXTENSIONS)
    left = [image.name for image in images if image not in named]
    findings.warn(("image is", "images are"), left, f" not named in {path.name} and not used")


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Image name and record of every entry, in the file's order."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise BadInputError("is not UTF-8", path=path) from None
        raise UsageError(f"cannot be read: {(error.strerror or str(error)).lower()}", path=path) from None
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield _line(_json(line, path, f"line {number}"), path, number)
        return
    document = _json(text, path, "the file")
    if not isinstance(document, dict):
        raise BadInputError("is no metadata: expected an object of image names", path=path)
    for name, record in document.items():
        if not isinstance(record, dict):
            raise BadInputError("is no metadata: expected an object per image", path=path, key=name)
        yield name, record


def _json(text: str, path: Path, place: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{place} is not JSON: {error}", path=path) from None


def _line(record: object, path: Path, number: int) -> tuple[str, Mapping[str, object]]:
    if isinstance(record, dict):
        for column in ("file_name", "image_path"):
            if isinstance(record.get(column), str):
                return record[column], record
    raise BadInputError(f"line {number} names no image: expected `file_name` or `image_path`", path=path)


def _found(path: Path) -> Path | None:
    if path.is_file():
        return path
    for suffix in sorted(EXTENSIONS):
        candidate = path.with_name(path.name + suffix)
        if candidate.is_file():
            return candidate
    return None


def _caption(record: Mapping[str, object], options: DataOptions, path: Path, name: str) -> str | None:
    texts = {column: record.get(column) for column in ("text", "caption", "tags")}
    for column, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise BadInputError(f"`{column}` is no text", path=path, key=name)
        if text is not None and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise BadInputError(f"`{column}` has half of a surrogate pair", path=path, key=name)
    caption, tags = texts["text"] if texts["text"] is not None else texts["caption"], texts["tags"]
    if tags is None or not str(tags).strip():
        return None if caption is None else str(caption).strip()
    separator = options.caption_separator
    extra = str(tags).strip().replace("\n", separator)
    lines = [line.strip() for line in str(caption or "").split("\n") if line.strip()]
    if not lines:
        return extra
    if not options.enable_wildcard:
        return lines[0] + separator + extra
    return "\n".join(line + separator + extra for line in lines)
