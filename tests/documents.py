"""Documents whose generated parts and examples are made again and compared.

``<!-- generated: NAME ARGUMENTS -->`` … ``<!-- end -->`` holds what a function here returns, and the
console block after ``<!-- run -->`` what its commands print in a copy of the sample files.
``python tests/makers/make_docs.py`` writes the documents; a test fails when they are stale.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import tempfile
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path

from lycotool import errors, ops
from lycotool.algorithms import ALGORITHMS, dora
from lycotool.algorithms.base import Algorithm, Layout
from lycotool.cli import app
from lycotool.cli._describe import CommandLine, Parameter, commands
from lycotool.formats.dialects import DIALECTS
from lycotool.formats.loaders import LOADERS
from lycotool.linalg.merging.methods import METHODS, OPTIONS
from lycotool.ops._findings import CHECKS

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
DOCS = ROOT / "lycotool" / "docs"
PAGES = (ROOT / "README.md", ROOT / "README.ja.md", *sorted(DOCS.glob("*.md")))

_GENERATED = re.compile(r"(<!-- generated: ([a-z-]+) ?([^\n]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
#: A command of a console block, and what it printed.
_COMMAND = re.compile(r"^\$ (.*(?:\\\n.*)*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
#: Programs in examples that a system may lack.
TOOLS = ("jq", "parallel")
_RUN = re.compile(r"(<!-- run -->\n```console\n)(.*?)(```)", re.DOTALL)


def generated(text: str) -> str:
    """The text with its generated parts made again."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{GENERATORS[match[2]](*match[3].split())}\n{match[4]}"

    return _GENERATED.sub(fill, text)


def executed(text: str, environment: Mapping[str, str]) -> str:
    """The text with the output of its commands made again, all in one folder, in order."""
    if not _RUN.search(text):
        return text
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "lycotool"
        shutil.copytree(DATA, folder / "tests" / "data")
        environment = {**environment, "NO_COLOR": "1", "COLUMNS": "110"}
        return _RUN.sub(lambda match: match[1] + _executed(match[2], folder, environment) + match[3], text)


def _executed(block: str, folder: Path, environment: Mapping[str, str]) -> str:
    parts = []
    for command, output in _COMMAND.findall(block):
        if any(shutil.which(tool) is None for tool in TOOLS if re.search(rf"\b{tool} ", command)):
            parts.append(f"$ {command}\n{output}")  # as it was: the header of the test run names the tool
            continue
        found = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=120, check=False,
        )  # fmt: skip
        parts.append("".join(f"{line.rstrip()}\n" for line in [f"$ {command}", *found.stdout.splitlines()]))
    return "".join(parts)


def comparable(text: str) -> str:
    """The text without what differs between machines: errors of rounding."""
    text = re.sub(r"\b\d(?:\.\d+)?e-\d+\b", "…", text)
    return re.sub(r"(?<=within |t most )0\.\d+|0\.\d+(?= on average)", "…", text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _table(head: str, rows: list[list[str]]) -> str:
    titles = head.split(" | ")
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows)])


def _command(name: str) -> CommandLine:
    return next(command for command in commands(app) if command.name == name)


def usage(name: str) -> str:
    """How a command is called, and what it says of itself."""
    command = _command(name)
    arguments = " ".join(map(_argument, command.arguments))
    body = command.text.split("\n\n", 1)[1] if "\n\n" in command.text else ""
    return f"```\nlycotool {name} [OPTIONS] {arguments}\n```\n\n{command.summary}\n\n{body}".rstrip()


def _argument(argument: Parameter) -> str:
    several = argument.metavar + "..." * argument.several
    return several if argument.required else f"[{several}]"


def options(name: str) -> str:
    """Every option, by panel."""
    command = _command(name)
    panels: dict[str, list[Parameter]] = {}
    for option in command.options:
        panels.setdefault(option.panel, []).append(option)
    parts = []
    if command.arguments:
        parts.append(_table("argument | what", [[f"`{_argument(a)}`", a.help] for a in command.arguments]))
    for panel, members in panels.items():
        rows = [[_flags(option), option.default or "–", option.help] for option in members]
        parts.append(f"### {panel}\n\n{_table('option | default | what', rows)}")
    return "\n\n".join(parts)


def _flags(option: Parameter) -> str:
    value = "" if option.is_flag else f" {option.metavar}"
    flags = ", ".join((*option.flags, *option.negative))
    return f"`{flags}{value}`"


def examples(name: str) -> str:
    """The examples of `--help`."""
    return "```sh\n" + "\n".join(_command(name).examples) + "\n```"


def command_table() -> str:
    """The commands and their pages."""
    return _table(
        "command | what it does", [[f"[`lycotool {c.name}`]({c.name}.md)", c.summary] for c in commands(app)]
    )


def exit_codes() -> str:
    """The exit codes, from the errors that have them."""
    classes = [
        value for value in vars(errors).values() if inspect.isclass(value) and "exit_code" in vars(value)
    ]
    rows = [["0", "done"], ["1", "internal error: a bug in lycotool, never expected"]]
    rows += [
        [str(error.exit_code), (error.__doc__ or "").split("\n")[0].rstrip(".")]
        for error in classes
        if error is not errors.LycotoolError
    ]
    rows += [["130", "interrupted (Ctrl-C)"], ["143", "terminated (SIGTERM)"]]
    return _table("code | meaning", rows)


def algorithm_table() -> str:
    """What the registry says of each algorithm."""
    rows = []
    for algorithm in ALGORITHMS:
        loaders = [loader.name for loader in LOADERS if algorithm.name in loader.algorithms]
        rows.append(
            [
                f"[`{algorithm.name}`](#{algorithm.name})",
                algorithm.title,
                _yes(algorithm.merge.allowed),
                _yes(algorithm.resize.allowed),
                "needs the base" if algorithm.needs_base else "exact" if algorithm.factors else "no",
                _yes(algorithm.allows_dora),
                ", ".join(loaders) or "–",
            ]
        )
    return _table("algorithm | name | merge | resize | as LoRA | DoRA | loads in", rows)


def algorithm_sections() -> str:
    """One section per algorithm: its source, stored forms, rules and advice."""
    return "\n\n".join(map(_section, ALGORITHMS))


def rules() -> str:
    """Which algorithms `merge` and `resize` take."""
    refused = _yes(dora.MERGE_RULE.allowed)
    rows = []
    for algorithm in ALGORITHMS:
        has_cp = any(layout.use_conv_cp for layout in algorithm.layouts)
        cp = _yes((algorithm.merge_conv_cp or algorithm.merge).allowed) if has_cp else "–"
        rows.append([algorithm.name, _yes(algorithm.merge.allowed), cp, _yes(algorithm.resize.allowed)])
    rows.append(["anything with DoRA", refused, refused, _yes(dora.RESIZE_RULE.allowed)])
    return _table("algorithm | merge | merge with use_conv_cp | resize by SVD", rows)


def merge_methods() -> str:
    """The methods of `merge`, their options and sources."""
    rows = []
    for method in METHODS.values():
        taken = ", ".join(f"`--{option}`" for option in OPTIONS if option in method.options)
        count = "two" if method.adapters == (2, 2) else "any"
        rows.append([f"`{method.name}`", method.summary, count, taken or "–", method.citation])
    return _table("`--method` | what it does with `w·ΔW` | adapters | options | source", rows)


def checks() -> str:
    """What `inspect --check` looks for."""
    rows = [[f"`{id}`", check.severity, check.reads, check.finds] for id, check in CHECKS.items()]
    return _table("finding | severity | reads | what", rows)


def formats() -> str:
    """What `convert` writes."""
    names = [algorithm.name for algorithm in ALGORITHMS]
    rows = []
    for dialect in DIALECTS.values():
        algorithms = ", ".join(sorted(dialect.algorithms, key=names.index))
        axes = ", ".join(sorted(dialect.dora_axes, reverse=True)) or "no"
        rows.append([f"`{dialect.name}`", dialect.title, algorithms, _yes(dialect.use_conv_cp), axes])
    return _table("`--to` | whose | algorithms | CP cores | DoRA axes", rows)


def _section(algorithm: Algorithm) -> str:
    rows = [
        [layout.name, _yes(layout.use_conv_cp), ", ".join(f"`{key}`" for key in _keys(layout))]
        for layout in algorithm.layouts
    ]
    rules = [("merge", algorithm.merge), ("merge with use_conv_cp", algorithm.merge_conv_cp), ("resize", algorithm.resize),
             ("resize with use_conv_cp", algorithm.resize_conv_cp)]  # fmt: skip
    said = [
        f"* {name}: {_yes(rule.allowed)}: {rule.reason}."
        + (f" {rule.remedy[0].upper()}{rule.remedy[1:]}." if rule.remedy else "")
        for name, rule in rules
        if rule is not None
    ]
    said += [f"* recommended: {advice.text}." for advice in algorithm.advice]
    head = f"### {algorithm.name}\n\n{algorithm.title}. Source: {algorithm.citation}."
    return "\n\n".join([head, _table("stored form | CP core | keys", rows), "\n".join(said)])


def _keys(layout: Layout) -> list[str]:
    return [slot.name for slot in layout.slots]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def json_keys(module: str, name: str) -> str:
    """The keys of a `--json` document, from the dataclass it is made of."""
    cls = getattr(importlib.import_module(f"lycotool.ops.{module}"), name)
    # Some types are imported for type checkers alone: whatever module of ops has them.
    known: dict[str, object] = {}
    for entry in pkgutil.iter_modules(ops.__path__):
        known |= {
            key: value
            for key, value in vars(importlib.import_module(f"lycotool.ops.{entry.name}")).items()
            if isinstance(value, type)
        }
    hints = typing.get_type_hints(cls, localns=known)
    rows = [[f"`{field.name}`", _json_type(hints[field.name])] for field in dataclasses.fields(cls)]
    return _table("key | value", rows)


def _json_type(hint: object) -> str:
    plain = {
        str: "string",
        int: "integer",
        float: "number",
        bool: "boolean",
        type(None): "null",
        object: "anything",
    }
    if hint in plain:
        return plain[hint]  # type: ignore[index]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_json_type, arguments))
    if origin is typing.Literal:
        return " or ".join(f'"{argument}"' for argument in arguments)
    if origin in (tuple, list):
        return f"array of {_json_type(arguments[0])}"
    if origin in (dict, Mapping):
        return f"object of {_json_type(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        keys = ", ".join(f"`{field.name}`" for field in dataclasses.fields(hint))
        return f"object ({keys})"
    raise TypeError(hint)


GENERATORS: Mapping[str, Callable[..., str]] = {
    "usage": usage,
    "options": options,
    "examples": examples,
    "commands": command_table,
    "exit-codes": exit_codes,
    "algorithms": algorithm_table,
    "algorithm-sections": algorithm_sections,
    "rules": rules,
    "methods": merge_methods,
    "checks": checks,
    "formats": formats,
    "json": json_keys,
}
