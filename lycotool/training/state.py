"""The state of a run on disk: what a resume needs, and nothing of what is exported.

A folder holds ``state.json`` and the tensor file it names. The tensor file is written first,
under a name of its own; replacing the JSON is what makes it the state. So the folder holds a
whole state at every moment, the old one or the new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lycotool.errors import BadInputError, OutputError, UsageError
from lycotool.io.dtypes import as_bytes, from_torch
from lycotool.io.nameless import temporary_beside
from lycotool.io.writer import FilePlan, TensorPlan, write_file

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

_VERSION = 1
_JSON = "state.json"


@dataclass(frozen=True, slots=True)
class State:
    """A run after ``step`` optimizer steps.

    Attributes
    ----------
    tensors
        Raw parameters and the optimizer's, by name, in the dtypes they are computed in.
    rest
        Everything else: JSON.
    """

    step: int
    tensors: Mapping[str, Tensor]
    rest: Mapping[str, Any]


def write_state(folder: Path, state: State) -> None:
    """Make ``state`` what the folder holds.

    Raises
    ------
    OutputError
        If it cannot be written; the folder then holds what it held.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be made: {error.strerror}", path=folder) from None
    name = f"step{state.step:08d}-{secrets.token_hex(4)}.safetensors"
    plans = {key: TensorPlan(from_torch(t.dtype), tuple(t.shape)) for key, t in state.tensors.items()}

    def produce(key: str) -> Iterable[memoryview]:
        return [as_bytes(state.tensors[key])]

    write_file(folder / name, FilePlan(plans, {}), produce)
    document = {"version": _VERSION, "step": state.step, "tensors": name, **state.rest}
    _replace(folder / _JSON, json.dumps(document, indent=1, ensure_ascii=False))
    for other in folder.glob("*.safetensors"):
        if other.name != name:
            with contextlib.suppress(OSError):
                other.unlink()


def read_state(folder: Path) -> State:
    """The state a folder holds.

    Raises
    ------
    UsageError
        If it holds none.
    BadInputError
        If it is damaged or of another version.
    """
    try:
        document = json.loads((folder / _JSON).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError("holds no state of a run", path=folder) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"{_JSON} cannot be read: {error}", path=folder) from None
    if not isinstance(document, dict) or document.pop("version", None) != _VERSION:
        raise BadInputError("is the state of another version of lycotool", path=folder)
    try:
        step, name = int(document.pop("step")), Path(document.pop("tensors")).name
        with safe_open(folder / name, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise BadInputError(f"the state is damaged: {error}", path=folder) from None
    return State(step, tensors, document)


def has_state(folder: Path) -> bool:
    """Whether the folder holds a state."""
    return (folder / _JSON).is_file()


def remove_state(folder: Path) -> None:
    """Remove what :func:`write_state` wrote; anything else stays."""
    with contextlib.suppress(FileNotFoundError):
        (folder / _JSON).unlink()
    for tensors in folder.glob("step*.safetensors"):
        with contextlib.suppress(OSError):
            tensors.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _replace(path: Path, text: str) -> None:
    temporary = temporary_beside(path, "json")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", path=path) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
