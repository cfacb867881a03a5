"""Images and captions in folders.

A folder's own images are read with ``num_repeats``. A subfolder named ``10_cat`` is read with
10 repeats and the class tokens ``cat``, as in sd-scripts; the name of the folder that was
given is not looked at. Other subfolders are named in a warning, or read with ``recursive``.
Hidden files and folders are never read. Files are taken in the order of their names.

The caption of ``cat.png`` is in ``cat.txt``, or ``cat.caption``; if both exist ``.txt`` is read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lycotool.errors import BadInputError, UsageError
from lycotool.training.data.faults import Findings
from lycotool.training.data.images import EXTENSIONS, FOREIGN_EXTENSIONS
from lycotool.training.data.options import DataOptions
from lycotool.training.data.sources import Entry, Source

#: Suffixes of caption files, best first.
CAPTION_SUFFIXES = (".txt", ".caption")

#: `10_cat`, `10`.
_REPEATS = re.compile(r"(\d+)(?:_(.*))?", re.DOTALL)


def folder_sources(folder: Path, options: DataOptions, findings: Findings) -> list[Source]:
    """The images of a folder and of its repeat folders.

    Raises
    ------
    UsageError
        If it is no folder, or ``num_repeats`` is set where only repeat folders have images.
    """
    own, subfolders = _listing(folder)
    found = []
    plain = []
    for subfolder in subfolders:
        match = _REPEATS.fullmatch(subfolder.name)
        if match is None:
            plain.append(subfolder)
        elif int(match[1]) < 1:
            findings.warnings.append(f"{subfolder} is left out: its name says 0 repeats")
        else:
            tokens = (match[2] or "").strip() or options.class_tokens
            named = replace(options, num_repeats=int(match[1]), class_tokens=tokens)
            images = [*_listing(subfolder)[0], *_nested(_listing(subfolder)[1], options, findings)]
            found.append(source_of(subfolder, images, named, findings))
    own.extend(_nested(plain, options, findings))
    if own or not found:
        found.insert(0, source_of(folder, own, options, findings))
    elif options.num_repeats != 1:
        raise UsageError(
            "`num_repeats` would have no effect: every folder's name has a number of its own", path=folder
        )
    return found


def source_of(
    folder: Path, images: Sequence[Path], options: DataOptions, findings: Findings, *, group: int = 0
) -> Source:
    """A source of these files, with their captions."""
    captions = _Captions(options)
    entries = []
    for path in images:
        try:
            entries.append(Entry(path, captions.read(path)))
        except BadInputError as error:
            findings.fault(
                ("unreadable caption", "unreadable captions"), Path(error.path or path), error.message
            )
    captions.report(findings)
    stems = defaultdict(list)
    for path in images:
        stems[path.with_suffix("")].append(path.name)
    doubles = [" and ".join(names) for names in stems.values() if len(names) > 1]
    findings.warn(("name is", "names are"), doubles, " shared by several images, and so are their captions")
    return Source(folder, options, tuple(entries), group)


def images_in(folder: Path, options: DataOptions, findings: Findings) -> list[Path]:
    """The folder's own images, whatever its name; those below it with ``recursive``."""
    own, subfolders = _listing(folder)
    return own + _nested(subfolders, options, findings)


def _listing(folder: Path) -> tuple[list[Path], list[Path]]:
    """Images and subfolders, each sorted by name.

    Raises
    ------
    UsageError
        If there is no such folder, or it may not be read.
    """
    try:
        # By name and not by path: paths of Windows are compared without regard to case.
        inside = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
    except OSError as error:
        raise UsageError(
            f"cannot be read as a folder: {(error.strerror or str(error)).lower()}", path=folder
        ) from None
    images = [path for path in inside if path.suffix.lower() in EXTENSIONS and path.is_file()]
    return images, [path for path in inside if path.is_dir()]


def _nested(folders: Sequence[Path], options: DataOptions, findings: Findings) -> list[Path]:
    """Images in these folders and below; without ``recursive`` they are only counted."""
    images: list[Path] = []
    for folder in folders:
        inside = [
            path
            for path in sorted(folder.rglob("*"), key=lambda p: p.relative_to(folder).as_posix())
            if path.suffix.lower() in EXTENSIONS and path.is_file() and not _hidden(path, folder)
        ]
        if inside and not options.recursive:
            count = "1 image" if len(inside) == 1 else f"{len(inside)} images"
            verb = "is" if len(inside) == 1 else "are"
            findings.warnings.append(f"{count} in {folder} {verb} not used; `recursive` reads subfolders")
        elif inside:
            images.extend(inside)
    return images


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def note_foreign_files(folder: Path, findings: Findings) -> None:
    """Name pictures of kinds that are not read."""
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in FOREIGN_EXTENSIONS)
    findings.warn(("file", "files"), names, f" in {folder} cannot be read as images")


def _is_file(path: Path) -> bool:
    """Whether there is such a file; none has a name too long or too odd to ask for."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


@dataclass
class _Captions:
    """Reads caption files, and remembers what is worth a warning."""

    options: DataOptions

    def __post_init__(self) -> None:
        given = self.options.caption_extension
        self.suffixes = CAPTION_SUFFIXES if given is None else ("." + given.strip().lstrip("."),)
        self.doubled: list[str] = []
        self.cut: list[str] = []

    def read(self, image: Path) -> str | None:
        """The caption of an image, or None if it has no file.

        Raises
        ------
        BadInputError
            If the file cannot be read, or is not UTF-8.
        """
        files = [path for path in (image.with_suffix(suffix) for suffix in self.suffixes) if _is_file(path)]
        if not files:
            return None
        texts = [_text(path) for path in files]
        if len(texts) > 1 and texts[0].strip() != texts[1].strip():
            self.doubled.append(image.name)
        lines = [line.strip() for line in texts[0].splitlines() if line.strip()]
        if len(lines) > 1 and not self.options.enable_wildcard:
            self.cut.append(files[0].name)
            return lines[0]
        return "\n".join(lines)

    def report(self, findings: Findings) -> None:
        """Warn of what was noticed."""
        findings.warn(
            ("image has", "images have"), self.doubled, " both a .txt and a .caption; .txt was read"
        )
        findings.warn(
            ("caption has", "captions have"),
            self.cut,
            " several lines, of which the first is used; `enable_wildcard` draws one",
        )


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise BadInputError("is not UTF-8", path=path) from None
    except OSError as error:
        raise BadInputError((error.strerror or str(error)).lower(), path=path) from None
