"""The public interface: what `from lycotool import …` gives."""

from __future__ import annotations

import doctest
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import DATA, DOCS
from helpers import succeed

import lycotool
from lycotool import MergeOptions, merge


def test_every_name_is_there() -> None:
    assert len(lycotool.__all__) == len(set(lycotool.__all__))
    for name in lycotool.__all__:
        assert getattr(lycotool, name) is not None
        assert name in dir(lycotool)
    listed = {name for names in lycotool._HOMES.values() for name in names}
    assert listed | {"__version__"} == set(lycotool.__all__)


def test_nothing_private_is_listed() -> None:
    assert set(dir(lycotool)) == set(lycotool.__all__)
    own: dict[str, object] = {}
    exec("from lycotool import *", own)
    assert {name for name in own if not name.startswith("__")} == set(lycotool.__all__) - {"__version__"}
    for name in lycotool.__all__:
        value = getattr(lycotool, name)
        assert name == "__version__" or value.__doc__, name
        assert name == "__version__" or not value.__name__.startswith("_"), name


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'melt'"):
        _ = lycotool.melt


def test_import_loads_no_torch() -> None:
    program = "import sys; from lycotool import *; print({'torch', 'typer', 'rich'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_python_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(DATA, tmp_path / "tests" / "data")
    monkeypatch.chdir(tmp_path)
    found = doctest.testfile(str(DOCS / "python.md"), module_relative=False, encoding="utf-8")
    assert found.attempted >= 5
    assert found.failed == 0


def test_same_bytes_as_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    succeed("merge", DATA / "base.safetensors", f"{DATA}/lora.safetensors:0.5", "-o", "a.safetensors")
    merge(DATA / "base.safetensors", [f"{DATA}/lora.safetensors:0.5"], MergeOptions(output="b.safetensors"))
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
