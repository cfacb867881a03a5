"""Start-up: commands that are not named are not imported, and values come out as Typer makes them."""

import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.core import TyperCommand
from typer.testing import CliRunner

from lycotool.cli import COMMANDS, app, application
from lycotool.cli._describe import commands
from lycotool.cli._light import LightCommand, LightGroup


def test_summaries_are_the_commands_own() -> None:
    assert {command.name: command.summary for command in commands(app)} == COMMANDS


def test_listing_is_the_same_whatever_is_imported() -> None:
    pages = {CliRunner().invoke(application(needed), ["--help"]).output for needed in ((), COMMANDS)}
    assert len(pages) == 1
    assert all(name in page for name in COMMANDS for page in pages)


def test_a_misspelt_command_is_answered_with_the_nearest() -> None:
    found = CliRunner().invoke(application(()), ["mrge"])
    assert found.exit_code == 2
    assert "merge" in found.output


#: What no command but `train` needs to say what its options are, and nothing that needs no conversion.
_SPY = """
import sys
from lycotool.cli import main
try:
    main()
except SystemExit:
    pass
print([name for name in ("pydantic", "lycotool.training.options", "concurrent.futures") if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["inspect", "tests/data/lora.safetensors"]], ids=str)  # fmt: skip
def test_what_is_not_imported(arguments: list[str], pytestconfig: pytest.Config) -> None:
    found = subprocess.run(
        [sys.executable, "-c", _SPY, *arguments],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stderr == "[]\n"


def test_a_plain_number_needs_no_pydantic(pytestconfig: pytest.Config) -> None:
    arguments = ["resize", _ADAPTER, "--rank", "1", "--param", "0.5", "--dry-run"]
    found = subprocess.run(
        [sys.executable, "-c", _SPY, *arguments], cwd=pytestconfig.rootpath, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert "pydantic" not in found.stderr.splitlines()[-1]


_LOUD = """
import sys
from lycotool.cli import main
try:
    main()
except SystemExit as end:
    print(end.code, "torch" in sys.modules)
"""

_ADAPTER, _BASE = "tests/data/lora.safetensors", "tests/data/base.safetensors"


@pytest.mark.parametrize(
    "arguments",
    [
        ["bake", _BASE, _ADAPTER], ["merge", _BASE, _ADAPTER], ["merge", _ADAPTER, _ADAPTER],
        ["resize", _ADAPTER, "--rank", "1"], ["convert", _ADAPTER, "--to", "diffusers"],
        ["extract", _BASE, _BASE], ["train", _BASE, "tests/data"], ["inspect", _ADAPTER, "--set", "a=b"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)  # fmt: skip
def test_what_needs_no_tensor_is_said_without_torch(
    arguments: list[str], pytestconfig: pytest.Config
) -> None:
    """Importing it takes seconds, which nobody should wait to read that a folder is missing."""
    found = subprocess.run(
        [sys.executable, "-c", _LOUD, *arguments, "-o", "nowhere/out.safetensors"],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "nowhere" in found.stderr
    assert found.stdout == "7 False\n"


def _seen(command: type[TyperCommand], arguments: list[str]) -> tuple[int, str, list[object]]:
    """What a function is given for these arguments, and what is said."""
    made = typer.Typer(add_completion=False, rich_markup_mode=None, cls=LightGroup)
    values: list[object] = []

    def called(flag: Any) -> Any:
        values.append(flag)
        return flag

    @made.command(cls=command)
    def run(
        names: list[str],
        last: Annotated[str | None, typer.Argument()] = None,
        text: Annotated[str, typer.Option("--text")] = "t",
        number: Annotated[int, typer.Option("--number", min=1)] = 3,
        whole: Annotated[int | None, typer.Option("--whole")] = None,
        ratio: Annotated[float | None, typer.Option("--ratio")] = None,
        share: Annotated[float, typer.Option("--share")] = 0.5,
        rules: Annotated[list[str] | None, typer.Option("--rule")] = None,
        counts: Annotated[list[int] | None, typer.Option("--count")] = None,
        choice: Annotated[Literal["a", "b"], typer.Option("--choice")] = "a",
        other: Annotated[Literal["c", "d"] | None, typer.Option("--other", callback=called)] = None,
        flag: Annotated[bool | None, typer.Option("--flag/--no-flag")] = None,
    ) -> None:
        values.extend([names, last, text, number, whole, ratio, share, rules, counts, choice, other, flag])

    found = CliRunner().invoke(made, arguments)
    return found.exit_code, found.output, values


@pytest.mark.parametrize(
    "arguments",
    [
        ["x"], ["x", "y", "z"], [], ["--help"], ["x", "--text", ""], ["x", "--text", "7", "--number", "7"],
        ["x", "--number", "0"], ["x", "--number", "seven"], ["x", "--number", "+7"], ["x", "--ratio", "1e-3"],
        ["x", "--ratio", "nan", "--share", "1_0"], ["x", "--rule", "r", "--rule", ""], ["x", "--count", "1", "--count", "2"],
        ["x", "--count", "one"], ["x", "--choice", "b"], ["x", "--choice", "B"], ["x", "--other", "c"], ["x", "--other", "e"],
        *(["x", "--whole", n] for n in ("7", "-7", "007", "+7", "7_0", "7.0", "1e3", " 7", "٧", "-0", "9" * 15, "9" * 40, "", "x")),
        *(["x", "--ratio", n] for n in ("7", "-.5", "0.1", "00.30", "1e-3", "1E3", "1e400", "-0", ".5", "5.", "inf", " 1", "1_0", "٧")),
        ["x", "--flag"], ["x", "--no-flag"], ["x", "--text"], ["x", "--nothing"], ["", ""],
    ],
    ids=str,
)  # fmt: skip
def test_values_are_typers(arguments: list[str]) -> None:
    assert _seen(LightCommand, arguments) == _seen(TyperCommand, arguments)
