"""Completion scripts for four shells, complete in themselves.

Everything a shell can offer (commands, options, choices, the kind of file a value is) is written
into the script, so that a TAB starts no Python and costs nothing. Files and folders are
completed by the shell, which knows its own quoting.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lycotool.cli import _shells
from lycotool.cli._describe import CommandLine
from lycotool.errors import OutputError, UsageError


def script(shell: str, commands: Sequence[CommandLine]) -> str:
    """The completion script of a shell, ending with a line break."""
    return _SCRIPTS[shell](commands)


def detect_shell() -> str:
    """The shell this process was started from: by its parents where that can be read, else ``$SHELL``.

    Raises
    ------
    UsageError
        If it is none that has a script.
    """
    for name in (*_parents(), Path(os.environ.get("SHELL", "")).name):
        if name in _SCRIPTS:
            return name
        if name == "pwsh":
            return "powershell"
    raise UsageError(
        "which shell this is cannot be found out", hint="`--shell` names it: " + ", ".join(_SCRIPTS)
    )


def _parents() -> list[str]:
    """Names of the processes above this one, nearest first."""
    found: list[str] = []
    number = os.getppid()
    while number > 1:
        try:
            # The name, in parentheses, may hold spaces and parentheses itself.
            name, _, rest = Path(f"/proc/{number}/stat").read_text().partition("(")[2].rpartition(")")
            number = int(rest.split()[1])
        except (OSError, ValueError, IndexError):
            break
        found.append(name)
    return found


def install(shell: str, commands: Sequence[CommandLine], home: Path) -> list[Path]:
    """Write a script where its shell looks for it; the files that were written or changed.

    Raises
    ------
    OutputError
        If one cannot be written.
    """
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    # bash looks in its folder by itself only where the package bash-completion is there.
    places: Mapping[str, tuple[Path, Path | None, str]] = {
        "bash": (
            data / "bash-completion/completions/lycotool",
            home / ".bashrc",
            "source {}",
        ),
        "zsh": (
            home / ".zfunc/_lycotool",
            Path(os.environ.get("ZDOTDIR") or home) / ".zshrc",
            "fpath=({folder} $fpath); autoload -Uz compinit; compinit",
        ),
        "fish": (config / "fish/completions/lycotool.fish", None, ""),
        "powershell": (
            config / "powershell/lycotool.ps1",
            config / "powershell/Microsoft.PowerShell_profile.ps1",
            ". {}",
        ),
    }
    path, startup, line = places[shell]
    written = [path]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script(shell, commands), encoding="utf-8")
        if startup is not None:
            line = line.format(shlex.quote(str(path)), folder=shlex.quote(str(path.parent)))
            before = startup.read_text(encoding="utf-8") if startup.exists() else ""
            if line not in before.splitlines():
                gap = "" if before.endswith("\n") or not before else "\n"
                startup.parent.mkdir(parents=True, exist_ok=True)
                startup.write_text(f"{before}{gap}{line}\n", encoding="utf-8")
                written.append(startup)
    except OSError as error:
        raise OutputError(
            f"cannot be written: {error.strerror}",
            path=error.filename,
            hint="`--show-completion` prints the script",
        ) from None
    return written


_SCRIPTS: Mapping[str, Callable[[Sequence[CommandLine]], str]] = {
    "bash": _shells.bash,
    "zsh": _shells.zsh,
    "fish": _shells.fish,
    "powershell": _shells.powershell,
}

#: The shells that have a script.
SHELLS = tuple(_SCRIPTS)
