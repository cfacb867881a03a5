"""Documents are fresh: generated parts, examples with their output, links, command lines."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
from documents import DATA, DOCS, PAGES, ROOT, comparable, executed, generated
from helpers import run, succeed

from lycotool.cli import app
from lycotool.cli._describe import commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_is_fresh(page: Path, shell: Mapping[str, str]) -> None:
    text = page.read_text(encoding="utf-8")
    assert generated(text) == text, "run tests/makers/make_docs.py"
    assert comparable(executed(text, shell)) == comparable(text), "run tests/makers/make_docs.py"


def test_every_command_has_a_page() -> None:
    for command in commands(app):
        text = (DOCS / f"{command.name}.md").read_text(encoding="utf-8")
        assert f"<!-- generated: options {command.name} -->" in text
        assert "<!-- run -->" in text or command.name == "train"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target


def lines_of(page: Path) -> list[str]:
    """Every `lycotool` command line of a page: in shell blocks and in code of tables."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^(?:\$ )?(lycotool (?:[^`\n]|\\\n)+)$", text, re.MULTILINE)
    inline = re.findall(r"`(lycotool [a-z]+ [^`]*)`", text)
    return [line.replace("\\\n", " ").replace("\\|", "|") for line in (*blocks, *inline)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page: Path) -> None:
    known = {
        command.name: {flag for option in command.options for flag in (*option.flags, *option.negative)}
        | {"-h", "--help"}
        for command in commands(app)
    }
    for line in lines_of(page):
        if 'echo "exit code' in line:
            continue  # shows what an error looks like
        words = shlex.split(re.split(r" [|>&;] | \|\| |&& |2>", line)[0], comments=True)
        if len(words) < 2 or words[1] not in known:
            continue
        given = {word.partition("=")[0] for word in words[2:] if re.match(r"--?[a-z]", word)}
        assert given <= known[words[1]], line


def test_migrated_lines_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each right-hand side passes the parser and the checks of options: what is missing are the files."""
    monkeypatch.chdir(tmp_path)
    lines = re.findall(
        r"`(lycotool [^`]+)` \|$", (DOCS / "migration.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(lines) > 30
    for line in lines:
        result = run(*shlex.split(line)[1:])
        assert result.exit_code == 2, line
        assert re.search(r"(m|a|d|b|c|model|images)(\.safetensors|\.toml)?: no such file", result.stderr), (
            line,
            result.stderr,
        )


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("merge", ["{lora}", "{loha}"]),
        ("bake", ["{base}", "{lora}"]),
        ("resize", ["{lora}", "--rank", "2"]),
        ("extract", ["{base}", "merged.safetensors", "--rank", "2"]),
        ("convert", ["{lora}", "--to", "diffusers"]),
        ("inspect", ["{lora}"]),
    ],
)
def test_json_has_the_keys_that_are_documented(
    command: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {name: str(DATA / f"{name}.safetensors") for name in ("base", "lora", "loha")}
    if command == "extract":
        succeed("merge", paths["base"], paths["lora"], "-o", "merged.safetensors", "-q")
    dry = [] if command == "inspect" else ["--dry-run"]
    result = succeed(command, *(argument.format(**paths) for argument in arguments), "--json", *dry)
    document = json.loads(result.stdout)
    assert document.pop("schema_version") == 1
    if command == "inspect":
        assert document["errors"] == []
        document = document["files"][0]
    text = (DOCS / f"{command}.md").read_text(encoding="utf-8").split("## What `--json` prints")[1]
    assert set(document) == set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def test_readme_names_every_document() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert f"(lycotool/docs/{page.name})" in readme, page.name
