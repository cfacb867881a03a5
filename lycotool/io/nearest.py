"""What to say of a file that is not there."""

from __future__ import annotations

from pathlib import Path


def nearest_file(name: str | Path) -> str:
    """A hint with the name beside a missing file that is most like its own."""
    path = Path(name)
    if any(character in path.name for character in "*?"):
        return (
            "a shell fills a pattern in only where it fits a file, with nothing such as a strength behind it"
        )
    import difflib

    try:
        names = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return f"there is no folder {path.parent} here"
    near = difflib.get_close_matches(path.name, names, 1)
    return f"did you mean {path.with_name(near[0])}?" if near else f"paths start at {Path.cwd()}"
