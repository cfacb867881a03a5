"""Errors as a set: each says what to do next, in one form, and names what was probably meant."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from helpers import DATA, run

import lycotool
from lycotool import errors
from lycotool.cli import app
from lycotool.cli._describe import commands
from lycotool.cli._errors import HINTS

PACKAGE = Path(lycotool.__file__).parent
CLASSES = {
    name for name, value in vars(errors).items() if isinstance(value, type) and "exit_code" in vars(value)
}


def raised() -> list[tuple[Path, ast.Call]]:
    """Every `raise SomeError(…)` of ours in the package."""
    return [
        (path, node.exc)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
        and node.exc.func.id in CLASSES
    ]


def texts(call: ast.Call) -> list[tuple[str, str]]:
    """The message and the hint, as far as they are written out: what is filled in is `{}`."""
    named = [("message", argument) for argument in call.args[:1]]
    named += [(k.arg, k.value) for k in call.keywords if k.arg == "hint"]
    found = []
    for name, value in named:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            found.append((name, value.value))
        elif isinstance(value, ast.JoinedStr):
            found.append(
                (name, "".join(p.value if isinstance(p, ast.Constant) else "{}" for p in value.values))
            )
    return found


def test_messages_have_one_form() -> None:
    """No period at the end, no capital at the start unless it is a name, no line breaks."""
    calls = raised()
    assert len(calls) > 300
    wrong = []
    for path, call in calls:
        for name, text in texts(call):
            names = (
                "LoRA",
                "LyCORIS",
                "LoKr",
                "LoHa",
                "SDXL",
                "PEFT",
                "DoRA",
                "DyLoRA",
                "GLoRA",
                "OFT",
                "NaN",
                "Missing argument",
                "T-LoRA",
                "A1111",
                "SD ",
            )
            start = text[:1].isupper() and not text.startswith(names) and not text.split(" ")[0].isupper()
            if text.endswith((".", "!")) or "\n" in text or start or "please" in text.lower():
                wrong.append((path.name, call.lineno, name, text))
    assert not wrong


def test_every_class_has_a_hint() -> None:
    """The hint of the class is for those that have none of their own; a usage error's is the command's help."""
    assert {value.__name__ for value in HINTS} | {"UsageError", "LycotoolError"} == CLASSES


@pytest.mark.parametrize(
    ("arguments", "code", "hint"),
    [
        (["merge", "bse.safetensors", "lora.safetensors"], 2, "did you mean base.safetensors?"),
        (["merge", "zzz", "lora.safetensors"], 2, "paths start at"),
        (["inspect", "no/such/folder/a.safetensors"], 2, "there is no folder no/such/folder here"),
        (["inspect", "notes.safetensors"], 3, "incomplete"),
        (["merge", "base.safetensors", "lora.safetensors", "--lbw", "MIDDD"], 2, "did you mean MIDD?"),
        (["resize", "lora.safetensors", "--rank", "0"], 2, "`lycotool resize --help`"),
        (["resize", "lora.safetensors", "--split", "--unit", "2", "-o", "a b"], 2, "mkdir -p 'a b'"),
        (["resize", "loha.safetensors", "--rank", "1"], 9, "--to lora"),
        (["bake", "lora.safetensors", "lora.safetensors"], 5, "hint: "),
        (
            ["merge", "base.safetensors", "lora.safetensors", "-o", "nowhere/o.safetensors"],
            7,
            "another place",
        ),
        (["inspect", "lora.safetensors", "--check", "--fail-on", "info"], 10, "exit code 10"),
    ],
)
def test_errors_say_what_to_do(
    arguments: list[str], code: int, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "lora", "loha"):
        (tmp_path / f"{name}.safetensors").symlink_to(DATA / f"{name}.safetensors")
    (tmp_path / "notes.safetensors").write_text("not a model at all")
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == code, result.stderr
    assert hint in result.stderr
    assert "hint: " in result.stderr
    as_json = run(*arguments, "--json")
    document = json.loads(as_json.stderr.splitlines()[-1])["error"]
    assert document["hint"]
    assert document["exit_code"] == code


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["merg"], "Did you mean 'merge'?"),
        (["merge", "a", "b", "--methd", "ties"], "--method"),
        (["merge", "a", "b", "--method", "tiess"], "Did you mean 'ties'?"),
        (["convert", "a", "--to", "diffuser"], "Did you mean 'diffusers'?"),
        (["bake", "a", "b", "--dtype", "fp-16"], "Did you mean 'fp16'?"),
        (["train", "a", "b", "--algo", "lokrr"], "Did you mean 'lokr'?"),
        (["train", "a", "b", "--network-arg", "conv_dm=4"], "conv_dim"),
    ],
)
def test_mistyped_names_suggest_the_nearest(arguments: list[str], meant: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert meant in " ".join(result.stderr.split())


def test_summaries_fit_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run("--help").stdout
    assert "..." not in text.split("Commands:")[1]
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize("command", commands(app), ids=lambda command: command.name)
def test_help_is_in_panels_with_examples(command: object) -> None:
    text = run(command.name, "--help", "-h").stdout
    for panel in {option.panel for option in command.options}:
        assert f"\n{panel}:\n" in text
    assert len(command.examples) >= 2
    assert text.rindex("Examples:") > text.rindex("\nReports:")
    for option in command.options:
        assert option.help, option.name
        assert not option.help.endswith(" "), option.name
