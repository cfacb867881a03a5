"""Completion as people meet it: installed, in the real shell, on a terminal, with the TAB key.

What a line becomes is read from what the shell then runs: a stand-in for ``lycotool`` on the path
that records its arguments. It, and a stand-in for ``python``, record every start, so a TAB that
starts anything is seen.
"""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tree_sitter
import tree_sitter_powershell
from helpers import run, succeed
from makers.make_completions import FOLDER, NAMES

from lycotool.cli import app
from lycotool.cli._completion import SHELLS, script
from lycotool.cli._describe import commands

TAB = "\t"

#: What is typed, and the arguments the shell then runs `lycotool` with. The folder holds what
#: `here` writes: everything else that begins alike would keep the shell from deciding.
LINES = [
    ("mer\t", ["merge"]),
    ("--vers\t", ["--version"]),
    ("merge --meth\tmagn\t", ["merge", "--method", "magnitude-prune"]),
    ("merge --method breadc\t", ["merge", "--method", "breadcrumbs"]),
    ("train --preset attn-m\t", ["train", "--preset", "attn-mlp"]),
    ("convert --to onet\t", ["convert", "--to", "onetrainer"]),
    ("bake --dtype fp8_e5\t", ["bake", "--dtype", "fp8_e5m2"]),
    ("resize --keep-r\t", ["resize", "--keep-refused"]),
    ("train --no-train-u\t", ["train", "--no-train-unet"]),
    ("merge --lbw MID\t", ["merge", "--lbw", "MIDD"]),
    ("inspect sty\t", ["inspect", "style.safetensors"]),
    ("merge fl\tsty\t", ["merge", "flux.safetensors.index.json", "style.safetensors"]),
    ("resize my\t", ["resize", "my style.safetensors"]),
    ("inspect lor\tdee\t", ["inspect", "loras/deep.safetensors"]),
    ("merge --recipe mi\t", ["merge", "--recipe", "mix.toml"]),
    ("merge --replay sty\t", ["merge", "--replay", "style.safetensors"]),
]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder where only one name of each beginning is a model."""
    for name in (
        "style.safetensors", "style.txt", "style.png", "flux.safetensors.index.json", "flux.md", "my style.safetensors",
        "my notes.txt", "mix.toml", "mix.png", "loras/deep.safetensors", "loras/deep.txt", "lorem.txt",
    ):  # fmt: skip
        path = tmp_path / "here" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "here"


@pytest.fixture
def bin(tmp_path: Path) -> Path:
    """Stand-ins that record how they were started."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("lycotool", "python", "python3"):
        stand_in = folder / name
        stand_in.write_text(f'#!/bin/sh\nprintf "%s\\0" {name} "$@" >>"$STARTED"; echo >>"$STARTED"\n')
        stand_in.chmod(0o755)
    return folder


SHELL_COMMANDS = {
    "bash": ["bash", "--noprofile", "-i"],
    "zsh": ["zsh", "-i"],
    "fish": ["fish", "-i"],
}

# bash is part of every system this runs on; zsh and fish are packages, which `.ci/run` installs.
HERE = [shell for shell in SHELL_COMMANDS if shell == "bash" or shutil.which(shell)]


class Terminal:
    """A shell on a pseudo-terminal, whose stand-ins record their starts in a file of its own."""

    def __init__(self, command: list[str], cwd: Path, environment: dict[str, str], started: Path) -> None:
        self.started = started
        environment = {**environment, "STARTED": str(started)}
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.execvpe(command[0], command, environment)

    def until_idle(self, seconds: float = 0.25, limit: float = 20) -> str:
        """What is shown until nothing more has come for a while; answers what fish asks the terminal."""
        shown, deadline = b"", time.monotonic() + limit
        while time.monotonic() < deadline and select.select([self.fd], [], [], seconds)[0]:
            try:
                chunk = os.read(self.fd, 65536)
            except OSError:
                break
            if b"\x1b[c" in chunk or b"\x1b[0c" in chunk:
                os.write(self.fd, b"\x1b[?62;c")
            shown += chunk
        return shown.decode(errors="replace")

    def type(self, text: str) -> None:
        for piece in text.replace(TAB, f"\0{TAB}\0").split("\0"):
            os.write(self.fd, piece.encode())
            if piece == TAB:
                self.until_idle()

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.mark.parametrize("shell", HERE)
def test_in_the_shell(
    shell: str, here: Path, bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(Path, "home", lambda: home)
    succeed("--install-completion", "--shell", shell)
    environment = {
        "HOME": str(home), "PATH": f"{bin}:/usr/bin:/bin", "TERM": "xterm", "LANG": "C.UTF-8", "PS1": "ready> ",
        "HISTFILE": "", "skip_global_compinit": "1",
    }  # fmt: skip
    # Most of the time is waiting until a shell has nothing more to say, so several wait at once.
    terminals = [
        Terminal(SHELL_COMMANDS[shell], here, environment, tmp_path / f"started{number}")
        for number in range(4)
    ]
    try:
        with ThreadPoolExecutor(len(terminals)) as pool:
            lines = [LINES[number :: len(terminals)] for number in range(len(terminals))]
            wrong = [found for part in pool.map(completed_wrongly, terminals, lines) for found in part]
    finally:
        for terminal in terminals:
            terminal.close()
    assert not wrong


def completed_wrongly(terminal: Terminal, lines: list[tuple[str, list[str]]]) -> list[tuple[object, ...]]:
    """The lines that became other commands than expected, what was started and what was shown."""
    wrong: list[tuple[object, ...]] = []
    started = terminal.started
    terminal.until_idle(1.5)
    for line, expected in lines:
        started.unlink(missing_ok=True)
        terminal.type(f"lycotool {line}")
        assert not started.exists(), f"{line!r} started {started.read_text()!r}"
        terminal.type("\r")
        shown = terminal.until_idle()
        deadline = time.monotonic() + 5
        while not started.exists() and time.monotonic() < deadline:
            shown += terminal.until_idle(0.1)
        calls = started.read_text().split("\n")[:-1] if started.exists() else []
        if calls != ["\0".join(["lycotool", *expected, ""])]:
            wrong.append((line, calls, shown))
    return wrong


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_fresh(shell: str) -> None:
    stored = (FOLDER / NAMES[shell]).read_text(encoding="utf-8")
    assert stored == script(shell, commands(app)), "run tests/makers/make_completions.py"


@pytest.mark.parametrize("shell", SHELLS)
def test_show_prints_the_script(shell: str) -> None:
    assert succeed("--show-completion", "--shell", shell).stdout == script(shell, commands(app))


@pytest.mark.parametrize("shell", SHELLS)
def test_every_option_is_in_every_script(shell: str) -> None:
    text = script(shell, commands(app))
    for command in commands(app):
        assert command.name in text
        for option in command.options:
            for flag in (*option.flags, *option.negative):
                name = flag.lstrip("-") if shell == "fish" else flag
                assert name in text, (command.name, flag)
            for choice in option.choices:
                assert choice in text, (command.name, choice)


def test_powershell_can_read_its_script() -> None:
    """It is never run here. Its syntax is checked by a grammar; keys and encoding by what PowerShell does.

    Keys of a literal that differ in case alone are an error there, and Windows PowerShell reads files without
    a byte order mark in the system's encoding.
    """
    text = script("powershell", commands(app))
    assert text.isascii()
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_powershell.language()))
    assert not parser.parse(text.encode()).root_node.has_error
    assert parser.parse(text.replace("param(", "param((", 1).encode()).root_node.has_error
    for table in re.split(r"(?:Options|root|commands) = \[ordered\]@", text)[1:]:
        keys = [key.lower() for key in re.findall(r"^ +'([^']+)' = ", table, re.MULTILINE)]
        assert keys
        assert len(keys) == len(set(keys)), keys


def test_parameters_that_are_paths_are_known_to_be() -> None:
    """Metavars in capitals that are no kind of path are listed here, so that a new one is thought about."""
    values = {
        "N", "X", "TEXT", "GLOB", "W", "KEY", "KEY=VALUE", "NAME", "NAME=VALUE", "FORMAT", "BLOCKS:LAYERS:W", "N|W,H",
        "F:STEP,…,F", "SIZE", "0..1", "75|150|225", "auto|cpu|cuda[:N]|mps",
        "auto|cpu|cuda[:N]", "N|auto",
    }  # fmt: skip
    unknown = {
        (command.name, p.name, p.metavar)
        for command in commands(app)
        for p in command.parameters
        if p.kind == "none" and not p.is_flag and not p.choices and p.metavar not in values
    }
    assert unknown == set()


def test_install_twice_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".bashrc").write_text("alias ll='ls -l'")
    succeed("--install-completion", "--shell", "bash")
    before = (tmp_path / ".bashrc").read_text()
    assert before.startswith("alias ll='ls -l'\nsource ")
    again = succeed("--install-completion", "--shell", "bash")
    assert (tmp_path / ".bashrc").read_text() == before
    assert again.stdout.splitlines() == [str(tmp_path / ".local/share/bash-completion/completions/lycotool")]


def test_the_shell_is_found_out(tmp_path: Path) -> None:
    program = f"{sys.executable} -m lycotool --show-completion; true"
    found = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.stdout == (FOLDER / NAMES["bash"]).read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--shell", "zsh"),
        ("--install-completion", "--show-completion"),
        ("--show-completion", "inspect", "a"),
    ],
)
def test_wrong_use(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "hint:" in result.stderr


def test_unwritable_home_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "file")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    result = run("--install-completion", "--shell", "fish")
    assert result.exit_code == 7
    assert "--show-completion" in result.stderr
