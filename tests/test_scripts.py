"""Ten jobs as people script them (tests/scripts/), run by a real shell, and what shells see of commands."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from documents import TOOLS
from helpers import DATA, GOLDEN, read
from safetensors import safe_open

SCRIPTS = Path(__file__).parent / "scripts"
NEEDS_JQ = {"inspect_to_csv.sh", "bake_and_back.sh", "publish.sh"}
MISSING = {tool for tool in TOOLS if shutil.which(tool) is None}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder of loras, some with names that scripts stumble over."""
    loras = tmp_path / "my loras"
    (loras / "deep").mkdir(parents=True)
    shutil.copy(DATA / "lora.safetensors", loras / "a b.safetensors")
    shutil.copy(DATA / "loha.safetensors", loras / "deep" / "line\nbreak.safetensors")
    torch.save({"a": torch.zeros(1)}, loras / "old.pt")
    shutil.copy(DATA / "base.safetensors", tmp_path)
    return tmp_path


def sh(shell: Mapping[str, str], folder: Path, *command: str | Path, code: int = 0) -> str:
    found = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=dict(shell),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == code, found.stderr
    return found.stdout


def script(name: str) -> Path:
    if name in NEEDS_JQ and "jq" in MISSING:
        pytest.fail("jq is not installed")
    return SCRIPTS / name


def test_every_script_is_run() -> None:
    names = {path.name for path in SCRIPTS.glob("*.sh")}
    text = Path(__file__).read_text(encoding="utf-8")
    assert len(names) == 10
    assert all(f'script("{name}")' in text for name in names)


def test_resize_folder(shell: Mapping[str, str], here: Path) -> None:
    sh(shell, here, script("resize_folder.sh"), "my loras", "out", "1")
    for name in ("a b.safetensors", "deep/line\nbreak.safetensors"):
        tensors = read(here / "out" / name)
        assert {t.shape[0] for key, t in tensors.items() if key.endswith("lora_down.weight")} == {1}


def test_merge_by_blocks(shell: Mapping[str, str], here: Path) -> None:
    style, character = DATA / "lora.safetensors", DATA / "loha.safetensors"
    sh(shell, here, script("merge_by_blocks.sh"), "base.safetensors", style, character, "out.safetensors")
    before, after = read(here / "base.safetensors"), read(here / "out.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    blocks = {key.split(".")[2] for key in changed if key.startswith("model.diffusion_model.")}
    # OUTALL and MIDD leave the first input blocks to neither.
    assert {"middle_block", "output_blocks"} <= blocks
    assert not any("model.diffusion_model.input_blocks.1." in key for key in changed)


def test_extract_and_convert(shell: Mapping[str, str], here: Path) -> None:
    sh(
        shell,
        here,
        "lycotool",
        "merge",
        "base.safetensors",
        DATA / "loha.safetensors",
        "-q",
        "-o",
        "t.safetensors",
    )
    out = sh(
        shell, here, script("extract_and_convert.sh"), "base.safetensors", "t.safetensors", "d.safetensors"
    )
    assert out == "d.safetensors\n"
    assert len([key for key in read(here / "d.safetensors") if key.endswith("lora_A.weight")]) == 354


def test_inspect_to_csv(shell: Mapping[str, str], here: Path) -> None:
    out = sh(shell, here, script("inspect_to_csv.sh"), "my loras/a b.safetensors", "base.safetensors")
    assert list(csv.reader(io.StringIO(out))) == [
        ["path", "kind", "architecture", "modules", "bytes"],
        [
            "my loras/a b.safetensors",
            "adapter",
            "SD 1.x",
            "354",
            str((DATA / "lora.safetensors").stat().st_size),
        ],
        ["base.safetensors", "checkpoint", "SD 1.x", "0", str((DATA / "base.safetensors").stat().st_size)],
    ]


def test_split_dylora(shell: Mapping[str, str], here: Path) -> None:
    out = sh(
        shell, here, script("split_dylora.sh"), GOLDEN / "kohya_dylora_conv3x3.safetensors", "2", "slices"
    )
    sizes = [int(line.split("\t")[1]) for line in out.splitlines()]
    assert len(sizes) >= 2
    assert sizes == sorted(sizes)
    assert len(list((here / "slices").iterdir())) == len(sizes)


def test_bake_and_back(shell: Mapping[str, str], here: Path) -> None:
    assert (
        sh(shell, here, script("bake_and_back.sh"), "base.safetensors", DATA / "lora.safetensors") == "true\n"
    )
    assert sorted(path.name for path in here.iterdir()) == ["base.safetensors", "my loras"]


def test_replay(shell: Mapping[str, str], here: Path) -> None:
    shutil.copy(DATA / "loha.safetensors", here)
    sh(shell, here, script("replay.sh"), "my loras/a b.safetensors", "loha.safetensors", "out.safetensors")
    assert sorted(p.name for p in here.glob("out*")) == ["out.safetensors"]


def test_publish(shell: Mapping[str, str], here: Path) -> None:
    sh(shell, here, script("publish.sh"), DATA / "lora.safetensors", "public.safetensors", "A. Uthor")
    with safe_open(here / "public.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.author"] == "A. Uthor"
    assert "ss_tag_frequency" not in metadata


def test_find_broken(shell: Mapping[str, str], here: Path) -> None:
    assert sh(shell, here, script("find_broken.sh"), "my loras") == ""
    whole = (DATA / "lora.safetensors").read_bytes()
    (here / "my loras" / "cut off.safetensors").write_bytes(whole[:-100])
    assert sh(shell, here, script("find_broken.sh"), "my loras", code=1) == "my loras/cut off.safetensors\n"


def test_convert_in_parallel(shell: Mapping[str, str], here: Path) -> None:
    (here / "my loras" / "deep" / "line\nbreak.safetensors").rename(here / "my loras" / "c.safetensors")
    out = sh(shell, here, script("convert_in_parallel.sh"), "my loras", "diffusers", "out")
    assert out == "out/a b.safetensors\nout/c.safetensors\n"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("lycotool inspect base.safetensors >/dev/null", 0),
        ("lycotool inspect nowhere.safetensors", 2),
        ("lycotool no-such-command", 2),
        ("echo x >bad.safetensors; lycotool inspect bad.safetensors", 3),
        ("lycotool inspect 'my loras/old.pt'", 4),
        ("lycotool bake 'my loras/a b.safetensors' 'my loras/a b.safetensors'", 5),
        (
            "touch o.safetensors; lycotool merge base.safetensors 'my loras/a b.safetensors' -o o.safetensors",
            7,
        ),
        ('lycotool resize "my loras/deep/line\nbreak.safetensors" --rank 1', 9),
        ("lycotool inspect 'my loras/a b.safetensors' --check --fail-on info >/dev/null", 10),
    ],
)
def test_exit_codes_in_a_shell(shell: Mapping[str, str], here: Path, command: str, code: int) -> None:
    sh(shell, here, "bash", "-c", command, code=code)


@pytest.mark.parametrize(
    "command",
    [
        "lycotool inspect 'my loras/a b.safetensors' --modules --json | head -c 20",
        "lycotool inspect base.safetensors --metadata | true",
        "lycotool bake base.safetensors 'my loras/a b.safetensors' -q -o - | head -c 100 >/dev/null",
        "lycotool --help | head -n 1",
    ],
)
def test_reader_that_goes_away_is_quiet(shell: Mapping[str, str], here: Path, command: str) -> None:
    found = subprocess.run(
        ["bash", "-c", command], cwd=here, env=dict(shell), capture_output=True, text=True, check=False
    )
    assert found.stderr == ""
    assert found.returncode == 0
    assert sorted(path.name for path in here.iterdir()) == ["base.safetensors", "my loras"]
