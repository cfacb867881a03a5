"""Every option of every command: what its help says, and in which words."""

from __future__ import annotations

import pytest
from helpers import run

from lycotool.cli import app
from lycotool.cli._describe import CommandLine, Parameter, commands
from lycotool.training import config

COMMANDS = commands(app)
OPTIONS = [
    pytest.param(command, option, id=f"{command.name} {max(option.flags, key=len)}")
    for command in COMMANDS
    for option in command.options
]

#: What stands for a value, and so says its unit. `N` counts what the help names, `X` is a number whose meaning it
#: tells, `W` a factor, `0..1` a share, `SIZE` bytes with a unit; the rest are names, paths and texts.
NUMBERS = {int: {"N", "N|W,H"}, float: {"X", "W", "0..1"}}

#: Words of a help that say in which unit a whole number counts, or that it has none.
COUNTED = (
    "rank", "module", "layer", "step", "epoch", "image", "token", "line", "pixel", "batch", "worker", "process",
    "block", "factor", "seed", "random", "file", "time", "tag", "every", "recorded", "width", "height", "bits", "cycle",
    "timestep", "caption", "side", "percent", "parameter", "dare", "device", "many", "area", "term", "level", "convolution", "kernel",
)  # fmt: skip


def typed(command: CommandLine, option: Parameter) -> type:
    if command.name == "train" and option.name in config.all_options():
        return config.all_options()[option.name].kind
    return {"N": int, "N|W,H": int, "X": float, "W": float, "0..1": float}.get(option.metavar, str)


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_help_has_a_default_a_unit_and_a_form(command: CommandLine, option: Parameter) -> None:
    text = option.help
    assert text
    assert text == " ".join(text.split())
    assert text[0].isupper() or text.startswith("(IA)³") or text.split(":")[0].split(" ")[0].islower(), (
        "a sentence, or `value: what it does`"
    )
    body = text.partition(" [")[0] if text.endswith("]") else text
    assert body.endswith((".", ")")), body
    assert "please" not in text.lower()
    assert "!" not in text
    if option.is_flag:
        return
    if not option.required:
        assert option.default or "default" in text.lower(), "says what it is if it is not given"
    kind = typed(command, option)
    if kind in NUMBERS and not option.choices:
        allowed = NUMBERS[kind] if command.name != "train" else {*NUMBERS[kind], "75|150|225"}
        assert option.metavar in allowed, option.metavar
    if kind is int and not option.choices:
        assert any(word in text.lower() for word in COUNTED), "a whole number of what?"
    if option.metavar == "SIZE":
        assert "decimal" in text
        assert "binary" in text
    if option.several:
        assert "times" in text or "win" in text or "every" in text.lower() or "twice" in text, (
            "can come again"
        )
    if option.choices and option.metavar != "|".join(option.choices):
        assert all(choice in text for choice in option.choices) or "same names" in text, "names every choice"


def test_flags_mean_the_same_everywhere() -> None:
    """A flag has one help, but where a command differs in what it is about."""
    own = {"--output", "--rank", "--base", "--to", "--algo", "--error", "--size", "--param", "--method", "--compat",
           "--modules", "--device", "--force", "--dry-run", "--verify", "--seed", "--vae", "--factor", "--dora-axis",
           "--title", "--metadata", "--use-conv-cp", "--strict"}  # fmt: skip
    found: dict[str, set[str]] = {}
    for command in COMMANDS:
        for option in command.options:
            flag = max(option.flags, key=len)
            if flag not in own:
                found.setdefault(flag, set()).add(option.help)
    assert {flag: helps for flag, helps in found.items() if len(helps) > 1} == {}
    for flag in ("--json", "--quiet", "--strict"):
        assert all(any(flag in option.flags for option in command.options) for command in COMMANDS), flag


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_fits_the_terminal(command: CommandLine, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No word is broken, and Python's types stay out of it."""
    monkeypatch.setenv("COLUMNS", str(width))
    text = run(command.name, "--help").stdout
    assert all(len(line) <= width for line in text.splitlines())
    assert "<str>" not in text
    assert "list[" not in text
    assert "(found out)" not in text
    unbroken = "".join(text.split())  # lines may end at a hyphen
    for option in command.options:
        for choice in option.choices:
            assert choice in unbroken
