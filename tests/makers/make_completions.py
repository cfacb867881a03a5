"""Write completions/: ``python tests/makers/make_completions.py``. A test fails when they are stale."""

from pathlib import Path

from lycotool.cli import app
from lycotool.cli._completion import script
from lycotool.cli._describe import commands

FOLDER = Path(__file__).resolve().parents[2] / "completions"

#: The names under which the shells look for them.
NAMES = {"bash": "lycotool.bash", "zsh": "_lycotool", "fish": "lycotool.fish", "powershell": "lycotool.ps1"}

if __name__ == "__main__":
    for shell, name in NAMES.items():
        (FOLDER / name).write_text(script(shell, commands(app)), encoding="utf-8")
