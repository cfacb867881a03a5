"""Prompts of sample images, in sd-scripts' formats.

One per line, with flags after the text: ``a cat --n blurry --w 512 --h 768 --d 1 --s 30 --l 7.5
--ss euler_a``: negative prompt, width, height, seed, steps, guidance scale, sampler. Or a TOML
file with ``[prompt]`` and ``[[prompt.subset]]``, or a JSON list of lines or objects.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lycotool.errors import BadInputError, UsageError
from lycotool.io.nearest import nearest_file
from lycotool.io.toml import read_toml
from lycotool.training.output_options import Sampler

#: Flag to field.
_FLAGS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "sample_steps",
    "l": "scale",
    "ss": "sample_sampler",
}
_NUMBERS = {"width": int, "height": int, "seed": int, "sample_steps": int, "scale": float}

#: What sd-scripts also calls the samplers.
SAMPLER_ALIASES = {
    "k_lms": "lms",
    "k_euler": "euler",
    "k_euler_a": "euler_a",
    "k_dpm_2": "dpm_2",
    "k_dpm_2_a": "dpm_2_a",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One image to make; None is the run's own size, seed or sampler."""

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    sample_steps: int = 30
    scale: float = 7.5
    sample_sampler: Sampler | None = None


def read_prompts(path: str) -> tuple[Prompt, ...]:
    """All prompts of a file.

    Raises
    ------
    UsageError
        If there is no such file, it has no prompt, or a flag or value is not understood.
    BadInputError
        If it cannot be read.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".toml":
        table = read_toml(path).get("prompt", {})
        subsets = table.pop("subset", [{}])
        prompts = [
            _from_table({**table, **subset}, f"{path}: prompt {n}") for n, subset in enumerate(subsets, 1)
        ]
    else:
        text = _text(path)
        if suffix == ".json":
            prompts = _from_json(text, path)
        else:
            lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1)]
            prompts = [parse_line(line, f"{path}: line {n}") for n, line in lines if line and line[0] != "#"]
    if not prompts:
        raise UsageError("has no prompt", path=path)
    return tuple(prompts)


def parse_line(line: str, place: str = "prompt") -> Prompt:
    """A prompt with its flags.

    Raises
    ------
    UsageError
        At a flag or value that is not understood.

    Examples
    --------
    >>> parse_line("a cat --w 640 --l 5").width
    640
    """
    text, *parts = line.split(" --")
    values: dict[str, object] = {"prompt": text.strip()}
    for part in parts:
        flag, _, value = part.strip().partition(" ")
        field = _FLAGS.get(flag.lower())
        if field is None or not value.strip():
            raise UsageError(
                f"{place}: --{part.strip()} is not understood",
                hint="flags are " + ", ".join(f"--{name}" for name in _FLAGS),
            )
        values[field] = value.strip()
    return _from_table(values, place)


def _from_table(table: Mapping[str, object], place: str) -> Prompt:
    values: dict[str, Any] = {name: _value(name, value, place) for name, value in table.items()}
    prompt = Prompt(**{"prompt": "", **values})
    for name in ("width", "height"):
        side = getattr(prompt, name)
        if side is not None and side < 8:
            raise UsageError(f"{place}: {name} is {side}, expected at least 8 pixels")
    if not 1 <= prompt.sample_steps <= 1000:
        raise UsageError(f"{place}: {prompt.sample_steps} steps, expected 1 to 1000")
    return prompt


def _value(name: str, value: object, place: str) -> object:
    if name not in Prompt.__dataclass_fields__:
        raise UsageError(f"{place}: {name} is not understood", hint=", ".join(Prompt.__dataclass_fields__))
    if (kind := _NUMBERS.get(name)) is not None:
        try:
            return kind(str(value))
        except ValueError:
            raise UsageError(f"{place}: {name} is {value!r}, expected a number") from None
    if not isinstance(value, str):
        raise UsageError(f"{place}: {name} is {value!r}, expected text")
    if name == "sample_sampler":
        value = SAMPLER_ALIASES.get(value, value)
        known = typing.get_args(Sampler)
        if value not in known:
            raise UsageError(f"{place}: no such sampler: {value}", hint="one of " + ", ".join(known))
    return value


def _from_json(text: str, path: str) -> list[Prompt]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"is no JSON: {error}", path=path) from None
    if not isinstance(entries, list):
        raise BadInputError("is no list of prompts", path=path)
    return [
        parse_line(entry, f"{path}: prompt {n}")
        if isinstance(entry, str)
        else _from_table(entry, f"{path}: prompt {n}")
        for n, entry in enumerate(entries, 1)
    ]


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError("no such file", path=path, hint=nearest_file(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"cannot be read: {error}", path=path) from None
