"""Nothing is fetched, nothing is run, and pickles are read in one place alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lycotool
from reliability.cases import VERBS
from reliability.lab import OK, Server
from reliability.table import ELSEWHERE
from reliability.tensors import companions

PACKAGE = Path(lycotool.__file__).parent
TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("verb", VERBS)
def test_no_command_uses_the_network(verb: str, server: Server, tmp_path: Path) -> None:
    """A child that opened a socket, looked up a name or started a program would end with 99."""
    companions(tmp_path)
    name = {"base": "base.safetensors", "extract": "tuned.safetensors"}.get(verb, "good.safetensors")
    ended = server.run(tmp_path, [part.replace("{x}", name) for part in VERBS[verb]])
    assert ended.code in (OK, 10 if verb == "check" else OK), ended.text


def test_the_guard_bites(server: Server, tmp_path: Path) -> None:
    """What the other tests rely on: a socket, a program, and a file elsewhere end the child."""
    for code in (
        "import socket; socket.socket()",
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "open('/tmp/elsewhere', 'w')",
        "import pickle; pickle.loads(b'cos\\nsystem\\n.')",
    ):
        assert server.run(tmp_path, ["--python", code]).code == 99, code
    assert server.run(tmp_path, ["--python", "open('here', 'w').close()"]).code == 0


def _calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _name(call: ast.Call) -> str:
    return ast.unparse(call.func)


def test_one_place_reads_pickles() -> None:
    """One `torch.load` for adapters and models, with its safety written out; nothing else unpickles.

    But for what copies of the process write into a pipe to it.
    """
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for call in _calls(ast.parse(file.read_text(encoding="utf-8"))):
            name = _name(call)
            where = f"{file.relative_to(PACKAGE)}:{call.lineno}: {ast.unparse(call)[:80]}"
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if name == "torch.load":
                found.append(str(file.relative_to(PACKAGE)))
                assert keywords.get("weights_only") == "True", where
            if where.startswith("ops/_forked.py") and name == "pickle.loads":
                continue
            if ast.unparse(call) == "exec('')":  # nothing, which lets CPython forget an interrupt
                continue
            assert name not in (
                "pickle.load",
                "pickle.loads",
                "pickle.Unpickler",
                "marshal.loads",
                "shelve.open",
            ), where
            assert name not in ("eval", "exec", "os.system", "subprocess.run", "subprocess.Popen"), where
            assert "allow_pickle" not in keywords or not name.startswith(("np.", "numpy.")), where
            if name.endswith("from_pretrained"):
                assert keywords.get("local_files_only") == "True", where
    assert "io/pickles.py" in found


def test_nothing_imports_the_network() -> None:
    """No module of the package names one that talks to a network."""
    forbidden = {
        "socket",
        "ssl",
        "urllib",
        "http",
        "ftplib",
        "smtplib",
        "requests",
        "httpx",
        "aiohttp",
        "huggingface_hub",
    }
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                assert name.split(".")[0] not in forbidden, f"{file.relative_to(PACKAGE)} imports {name}"


def test_rows_tested_elsewhere_are() -> None:
    """Every test that a row of the table names exists."""
    for row in ELSEWHERE:
        file, _, function = row.test.partition("::")
        text = (TESTS / file).read_text(encoding="utf-8")
        assert f"def {function.split('[')[0]}(" in text, f"{row.id}: {row.test}"
