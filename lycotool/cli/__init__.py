"""The command line: one line per command. Nothing here, nor anything it imports, loads torch.

A command is imported when its name is on the command line, because their options together take
longer to declare than Typer to import. ``app`` has them all; so do the completion scripts.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lycotool import __version__, lazy
from lycotool.cli._errors import reported
from lycotool.cli._parsing import CommandGroup, GroupedCommand
from lycotool.errors import UsageError

if TYPE_CHECKING:
    app: typer.Typer

_EPILOG = """Exit codes: 0 done, 1 internal error, 2 usage or missing input, 3 damaged or unknown
file, 4 refused as unsafe, 5 files that do not fit, 6 non-finite numbers or overflow, 7 output,
8 memory or size limit, 9 refused by a rule, 10 a check found something, 130 and 143 interrupted."""

#: The commands in the order of ``--help``, with the first sentences of their descriptions.
COMMANDS: Mapping[str, str] = {
    "train": "Train an adapter from a base model and captioned images.",
    "merge": "Merge adapters into a checkpoint, or adapters into one adapter.",
    "bake": "Fold adapters of any algorithm into a checkpoint.",
    "resize": "Shrink an adapter's ranks, losing as little as that rank allows.",
    "extract": "Write the difference of two checkpoints as an adapter.",
    "inspect": "Show what a file is and what can be done with it.",
    "convert": "Write an adapter in another program's format, and verify it.",
}


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"lycotool {__version__}")
        raise typer.Exit


_SHELL = "Completion"


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
        sys.stdout.write(_completion.script(chosen, commands(application())))
        return
    for path in _completion.install(chosen, commands(application()), Path.home()):
        typer.echo(path)
    typer.echo(f"installed for {chosen}; a new shell has it. Do it again after an upgrade.", err=True)


def application(needed: Iterable[str] = COMMANDS) -> typer.Typer:
    """The command line as Typer has it.

    Parameters
    ----------
    needed
        The commands that may be run or asked for help; the others are listed only.
    """
    made = typer.Typer(
        name="lycotool",
        cls=CommandGroup,
        no_args_is_help=True,
        add_completion=False,  # Typer's own starts Python at every TAB and does not know which files fit
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog=_EPILOG,
    )
    made.callback(invoke_without_command=True)(_lycotool)
    for name, summary in COMMANDS.items():
        if name in needed:
            module = importlib.import_module(f"lycotool.cli.{name}")
            made.command(name, epilog=module.EPILOG, cls=GroupedCommand)(getattr(module, name))
        else:
            made.command(name, help=summary)(_unreachable)
    return made


def _unreachable() -> None:
    raise AssertionError("a command was reached whose name was not on the command line")


def __getattr__(name: str) -> object:
    if name == "app":
        globals()["app"] = application()
        return globals()["app"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


#: What torch and its thread pool read when they are loaded: large tensors in large pages, which are a
#: sixth of the system's work to fill; and threads that wait asleep, because reading, hashing and
#: writing want the processors too. Training has no such neighbours and many small steps.
_FOR_TENSORS = {"THP_MEM_ALLOC_ENABLE": "1"}
_FOR_FILES = {**_FOR_TENSORS, "OMP_WAIT_POLICY": "PASSIVE"}


def _return_memory() -> None:
    """Have the C library give every large block back to the system when it is freed.

    It keeps what threads have freed, in case they want more: a third of the memory of a bake.
    """
    if sys.platform == "linux":
        import ctypes

        call = getattr(ctypes.CDLL(None), "mallopt", None)
        if call is not None:
            call(-3, 2**20)  # M_MMAP_THRESHOLD, which no longer grows then


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="backslashreplace")  # names of files, and Σ
    lazy.is_own_process = True
    command = next((word for word in sys.argv[1:] if word in COMMANDS), "")
    for name, value in (_FOR_TENSORS if command == "train" else _FOR_FILES).items():
        os.environ.setdefault(name, value)
    if command in ("merge", "bake"):
        _return_memory()
    try:
        application(COMMANDS.keys() & set(sys.argv[1:]))()
    except MemoryError:  # before a command has begun; commands say so themselves
        sys.stderr.write("lycotool: error: out of memory\n")
        sys.exit(8)
