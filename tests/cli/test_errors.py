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
from lycotool.cli._errors import HINTS, report

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
        (["resize", "loha.safetensors", "--rank", "1"], 9, "--to lora"),
        (["bake", "lora.safetensors", "lora.safetensors"], 5, "hint: "),
        (
            ["merge", "base.safetensors", "lora.safetensors", "-o", "nowhere/o.safetensors"],
            7,
            "another place",
        ),
        (["inspect", "lora.safetensors", "--check", "--fail-on", "info"], 10, "exit code 10"),
        (["merge", "base.safetensors", "lora.safetensors", "-o", "my out/o.safetensors"], 7, "mkdir -p '"),
        (["merge", "base.safetensors", "lora.safetensors", "-o", "."], 2, "name it: NAME.safetensors"),
        (["merge", "lora.safetensors", "base.safetensors"], 5, "a checkpoint stands first"),
        (["extract", "base.safetensors", "lora.safetensors"], 5, "`lycotool bake`"),
        (["extract", "base.safetensors", "base.safetensors", "--include", "*zzz*"], 2, "layers are named as"),
        (
            ["extract", "base.safetensors", "base.safetensors", "--mode", "fro"],
            2,
            "a number above 0, at most 1",
        ),
        (["resize", "lora.safetensors", "--method", "sv_fro"], 2, "a share above 0 and at most 1"),
        (["resize", "lora.safetensors", "--param", "2"], 2, "another `--method`"),
        (["resize", "lora.safetensors", "--size", "100"], 5, "KB` is the least"),
        (["bake", "base.safetensors", "--shard-size", "5"], 2, "did you mean 5GB?"),
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
        (["merg"], "merge"),
        (["MERGE", "a"], "merge"),
        (["--hlep"], "--help"),
        (["merge", "a", "b", "--methd", "ties"], "--method"),
        (["merge", "a", "b", "--ouptut", "c"], "--output"),
        (["train", "a", "b", "--resolutoin", "512"], "--resolution"),
        (["merge", "a", "b", "--method", "tiess"], "ties"),
        (["merge", "a", "b", "--method", "linear"], "exact"),
        (["resize", "a", "--method", "sv_rato"], "sv_ratio"),
        (["extract", "a", "b", "--mode", "quantil"], "quantile"),
        (["extract", "a", "b", "--algo", "lokrr"], "lokr"),
        (["convert", "a", "--to", "diffuser"], "diffusers"),
        (["convert", "a", "--to", "kohya"], "networks.lora or lycoris.kohya"),
        (["convert", "a", "--to", "comfy"], "comfyui"),
        (["convert", "a", "--to", "peft", "--arch", "flux"], "flux2 or flux1"),
        (["bake", "a", "b", "--dtype", "fp-16"], "fp16"),
        (["bake", "a", "b", "--dtype", "float16"], "fp16"),
        (["bake", "a", "b", "--dtype", "bfloat16"], "bf16"),
        (["inspect", "a", "--sort", "sizes"], "size"),
        (["inspect", "a", "--fail-on", "warn"], "warning"),
        (["train", "a", "b", "--algo", "lokrr"], "lokr"),
        (["train", "a", "b", "--network-arg", "conv_dm=4"], "conv_dim"),
        (["train", "a", "b", "--optimizer", "adamww"], "adamw"),
        (["train", "BASE", "b", "--preset", "atn-mlp"], "attn-mlp"),
        (["train", "--config", "mistyped.toml"], "network"),
        (["train", "--config", "mixx.toml"], "mix.toml"),
        (["merge", "--recipe", "mixx.toml"], "mix.toml"),
        (["merge", "--recipe", "mix.toml"], "method"),
        (["merge", "bse.safetensors", "lora.safetensors"], "base.safetensors"),
        (["merge", "base.safetensors", "lora.safetensors:0,5"], "lora.safetensors:0.5"),
        (["merge", "base.safetensors", "lora.safetensors", "--lbw", "MIDDD"], "MIDD"),
        (["merge", "base.safetensors", "lora.safetensors", "--lbw-rule", "IN5:attn:0"], "IN05"),
        (["merge", "base.safetensors", "lora.safetensors:0.5:lwb=MIDD"], "lbw"),
    ],
)
def test_mistyped_names_suggest_the_nearest(
    arguments: list[str], meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "lora"):
        (tmp_path / f"{name}.safetensors").symlink_to(DATA / f"{name}.safetensors")
    (tmp_path / "mix.toml").write_text("metod = 'ties'\n")
    (tmp_path / "mistyped.toml").write_text("[netwrok]\ndim = 4\n")
    monkeypatch.chdir(tmp_path)
    result = run(
        *(str(DATA / "base.safetensors") if argument == "BASE" else argument for argument in arguments)
    )
    assert result.exit_code == 2
    assert result.stderr.startswith("lycotool: error: ")
    assert f"did you mean {meant}?" in result.stderr.replace("'", "")


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


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            ["bake"],
            "missing argument CHECKPOINT",
            "usage: lycotool bake [OPTIONS] CHECKPOINT [ADAPTER[:W]]...",
        ),
        (["merge"], "missing argument BASE", "--recipe"),
        (["train"], "missing argument BASE", "config file"),
        (["extract", "a"], "missing argument TUNED", "usage: lycotool extract [OPTIONS] BASE TUNED"),
        (["convert", "a"], "--to is needed", "--to FORMAT"),
        (["merge", "a", "b", "-o"], "-o needs a value", "--output PATH"),
        (["merge", "a", "--force=yes"], "--force takes no value", "lycotool merge --help"),
        (["resize", "a", "b", "c"], "unexpected argument: b c", "usage: lycotool resize [OPTIONS] ADAPTER"),
        (["resize", "a", "--rank", "four"], "--rank is 'four', expected a whole number", "lycotool resize"),
        (["resize", "a", "--rank=2.5"], "--rank is '2.5', expected a whole number", "lycotool resize"),
        (["merge", "a", "--te", "x"], "--te is 'x', expected a number", "lycotool merge --help"),
        (["merge", "a", "--dylora-block-size", "0"], "--dylora-block-size is '0'", "lycotool merge --help"),
        (
            ["merge", "a", "-dash.safetensors"],
            "no such option: -dash.safetensors",
            "written ./-dash.safetensors",
        ),
        (["help"], "no such command: help", "lycotool --help"),
        (["--shell", "tcsh"], "--shell is 'tcsh', expected one of bash, zsh", "lycotool --help"),
    ],
)
def test_the_parser_speaks_as_every_other_error_does(arguments: list[str], message: str, hint: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    first, *rest = result.stderr.splitlines()
    assert first.startswith(f"lycotool: error: {message}")
    assert [line for line in rest if line.startswith("hint: ") and hint in line] == rest
    if len(arguments) > 2:
        arguments = [*arguments[:2], "--json", *arguments[2:]]
        document = json.loads(run(*arguments).stderr)["error"]
        assert document["message"].startswith(message)
        assert hint in document["hint"]


def test_no_arguments_show_the_help() -> None:
    result = run()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["lora.safetensors:abc"], "lora.safetensors: 'abc' is no strength", "lora.safetensors:0.7"),
        (["lora.safetensors:"], "lora.safetensors: '' is no strength", "lora.safetensors:0.7"),
        (["lora.safetensors", "0.8"], "0.8 is no file", "FILE:0.8"),
        (["lora.safetensors:0.5:tee"], "lora.safetensors: 'tee' is no strength", "lora.safetensors:0.7"),
        (["lor*.safetensors:0.5"], "lor*.safetensors: no such file", "a shell fills a pattern in"),
        (["-", "-"], "-: standard input was read already", "<(…)"),
    ],
)
def test_what_was_meant_for_a_strength(
    arguments: list[str], message: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "lora"):
        (tmp_path / f"{name}.safetensors").symlink_to(DATA / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    result = run("bake", "base.safetensors", *arguments, input=(DATA / "lora.safetensors").read_bytes())
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0] == f"lycotool: error: {message}" or "standard input" in message
    assert message in result.stderr
    assert hint in result.stderr.splitlines()[-1]


def test_many_faults_of_one_kind_are_one_line_and_whole_in_json() -> None:
    arguments = ("convert", DATA / "loha.safetensors", "--to", "diffusers")
    lines = run(*arguments).stderr.splitlines()
    assert len(lines) == 1 + 1 + 1
    assert lines[1].startswith("  diffusers has no loha: lora_te_text_model_encoder_layers_0_mlp_fc1, ")
    assert lines[1].endswith(" and 351 more, which `--json` lists too")
    assert len(json.loads(run(*arguments, "--json").stderr)["error"]["details"]) == 354


def test_long_lists_of_faults_end_on_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    report(
        errors.UsageError("what", details=[f"fault {number}" for number in range(60)]), "hint", as_json=False
    )
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2] == "  … and 20 more, which `--json` lists too"
    assert len(lines) == 1 + 40 + 1 + 1
