"""Documents are fresh: generated parts, examples with their output, links, command lines."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from documents import DATA, DOCS, PAGES, ROOT, comparable, executed, generated
from helpers import read, succeed, write
from training.runs import base_file, base_folder, write_pictures

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


def headings(page: Path) -> set[str]:
    """What links to parts of a page name them by."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, part = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not part or part in headings(linked), target


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


MIGRATED = re.findall(
    r"`(lycotool [^`]+)` \|$", (DOCS / "migration.md").read_text(encoding="utf-8"), re.MULTILINE
)

#: What keeps a training run as small as its model.
SHORT = ("--steps", 1, "--resolution", 32, "--no-enable-bucket", "--device", "cpu", "-q")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the table for a model with all the layers of SD 1.5, its widths small."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copy(DATA / "base.safetensors", folder / "m.safetensors")
    # Without CP cores, which not every format has.
    succeed(
        "convert",
        DATA / "lora.safetensors",
        "--to",
        "networks.lora",
        "--drop",
        "-o",
        folder / "a.safetensors",
    )
    tensors = read(folder / "a.safetensors")
    halved = {key: value if key.endswith("alpha") else value / 2 for key, value in tensors.items()}
    write(folder / "b.safetensors", halved)
    succeed("bake", folder / "m.safetensors", folder / "a.safetensors", "-q", "-o", folder / "t.safetensors")
    layers = {key: value for key, value in tensors.items() if "_ff_net_2" in key}
    wide = {key: torch.ones(8, 8) if value.ndim == 2 else value for key, value in layers.items()}
    write(folder / "d.safetensors", wide, {"ss_network_module": "networks.dylora", "ss_network_dim": "8"})
    for name in "ab":
        succeed(
            "convert", folder / f"{name}.safetensors", "--to", "peft", "--drop", "-q", "-o", folder / name
        )
    return folder


@pytest.fixture(scope="module")
def trainable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the table for a model that is small enough to be trained here."""
    folder = tmp_path_factory.mktemp("trainable")
    write_pictures(folder / "images")
    shutil.copy(base_file("sd1"), folder / "m.safetensors")
    shutil.copytree(base_folder("sd1"), folder / "model")
    settings = {
        "pretrained_model_name_or_path": "m.safetensors",
        "train_data_dir": "images",
        "network_dim": 4,
        "caption_extension": ".txt",
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    (folder / "c.toml").write_text("\n".join([*lines, 'network_module = "networks.lora"']), encoding="utf-8")
    succeed("train", folder / "model", folder / "images", *SHORT, "-o", folder / "a.safetensors")
    return folder


@pytest.mark.parametrize("line", MIGRATED)
def test_migrated_lines_run(
    line: str, published: Path, trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(line)[1:]
    trains = words[0] == "train"
    shutil.copytree(trainable if trains or "model" in words else published, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    before = set(Path().iterdir())
    succeed(*words, *SHORT) if trains else succeed(*words)
    assert words[0] == "inspect" or set(Path().iterdir()) > before


def test_there_are_migrated_lines() -> None:
    assert len(MIGRATED) > 30


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
