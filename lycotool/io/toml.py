"""TOML files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lycotool.errors import BadInputError, UsageError
from lycotool.io.nearest import nearest_file


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as a dict.

    Raises
    ------
    UsageError
        If there is no such file.
    BadInputError
        If it cannot be read or is not TOML, with the place of the fault.
    """
    if sys.version_info >= (3, 11):  # pragma: no branch - each Python goes one way
        import tomllib
    else:  # pragma: no cover - Python 3.10
        import tomli as tomllib  # the same, before it came into the language

    try:
        document: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
        return document
    except FileNotFoundError:
        raise UsageError("no such file", path=path, hint=nearest_file(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"cannot be read: {error}", path=path) from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadInputError(f"is no TOML: {error}", path=path) from None
