"""The command line: one line per command. Nothing here, nor anything it imports, loads torch."""

from __future__ import annotations

from typing import Annotated

import typer

from lycotool import __version__
from lycotool.cli import bake, convert, extract, inspect, merge, resize, train
from lycotool.cli._declared import GroupedCommand

_EPILOG = """Exit codes: 0 done, 1 internal error, 2 usage or missing input, 3 damaged or unknown
file, 4 refused as unsafe, 5 files that do not fit, 6 non-finite numbers or overflow, 7 output,
8 memory or size limit, 9 refused by a rule, 10 a check found something, 130 and 143 interrupted."""

app = typer.Typer(
    name="lycotool",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"lycotool {__version__}")
        raise typer.Exit


@app.callback()
def _lycotool(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Train, merge, bake, resize, extract, convert and inspect LyCORIS and LoRA adapter files."""


app.command(epilog=train.EPILOG, cls=GroupedCommand)(train.train)
app.command(epilog=merge.EPILOG)(merge.merge)
app.command(epilog=bake.EPILOG)(bake.bake)
app.command(epilog=resize.EPILOG)(resize.resize)
app.command(epilog=extract.EPILOG)(extract.extract)
app.command(epilog=inspect.EPILOG)(inspect.inspect)
app.command(epilog=convert.EPILOG)(convert.convert)


def main() -> None:
    """Run the command line."""
    app()
