"""The command line: one line per command. Nothing here, nor anything it imports, loads torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from lycotool import __version__
from lycotool.cli import bake, convert, extract, inspect, merge, resize, train
from lycotool.cli._declared import GroupedCommand
from lycotool.cli._errors import reported
from lycotool.errors import UsageError

_EPILOG = """Exit codes: 0 done, 1 internal error, 2 usage or missing input, 3 damaged or unknown
file, 4 refused as unsafe, 5 files that do not fit, 6 non-finite numbers or overflow, 7 output,
8 memory or size limit, 9 refused by a rule, 10 a check found something, 130 and 143 interrupted."""

app = typer.Typer(
    name="lycotool",
    no_args_is_help=True,
    add_completion=False,  # Typer's own starts Python at every TAB and does not know which files fit
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"lycotool {__version__}")
        raise typer.Exit


_SHELL = "Completion"


@app.callback(invoke_without_command=True)
@reported
def _lycotool(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    install_completion: Annotated[
        bool,
        typer.Option(
            "--install-completion", help="Install completion for this shell.", rich_help_panel=_SHELL
        ),
    ] = False,
    show_completion: Annotated[
        bool,
        typer.Option(
            "--show-completion", help="Print the completion script of this shell.", rich_help_panel=_SHELL
        ),
    ] = False,
    shell: Annotated[
        Literal["bash", "zsh", "fish", "powershell"] | None,
        typer.Option(
            "--shell", help="The shell those two are for.", show_default="found out", rich_help_panel=_SHELL
        ),
    ] = None,
) -> None:
    """Train, merge, bake, resize, extract, convert and inspect LyCORIS and LoRA adapter files."""
    if context.invoked_subcommand is not None:
        if install_completion or show_completion or shell is not None:
            raise UsageError("options of completion go with no command", hint="`lycotool --show-completion`")
        return
    from lycotool.cli import _completion
    from lycotool.cli._describe import commands

    if install_completion == show_completion:
        raise UsageError(
            "nothing to do", hint="name a command, or one of `--install-completion` and `--show-completion`"
        )
    chosen = shell or _completion.detect_shell()
    if show_completion:
        sys.stdout.write(_completion.script(chosen, commands(app)))
        return
    for path in _completion.install(chosen, commands(app), Path.home()):
        typer.echo(path)
    typer.echo(f"installed for {chosen}; a new shell has it. Do it again after an upgrade.", err=True)


app.command(epilog=train.EPILOG, cls=GroupedCommand)(train.train)
app.command(epilog=merge.EPILOG, cls=GroupedCommand)(merge.merge)
app.command(epilog=bake.EPILOG, cls=GroupedCommand)(bake.bake)
app.command(epilog=resize.EPILOG, cls=GroupedCommand)(resize.resize)
app.command(epilog=extract.EPILOG, cls=GroupedCommand)(extract.extract)
app.command(epilog=inspect.EPILOG, cls=GroupedCommand)(inspect.inspect)
app.command(epilog=convert.EPILOG, cls=GroupedCommand)(convert.convert)


def main() -> None:
    """Run the command line."""
    try:
        app()
    except MemoryError:  # before a command has begun; commands say so themselves
        sys.stderr.write("lycotool: error: out of memory\n")
        sys.exit(8)
