"""What only a real process shows: imports, pipes, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import DATA, lora, read, write
from safetensors.torch import load

LYCOTOOL = [sys.executable, "-m", "lycotool"]


def process(
    *arguments: object, cwd: Path, input: bytes | None = None, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*LYCOTOOL, *map(str, arguments)],
        cwd=cwd,
        input=input,
        capture_output=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )


#: Imports a command, runs it, and says which of the heavy packages came along.
_SPY = """
import sys
from lycotool.cli import app
try:
    app(sys.argv[1:], standalone_mode=True)
except SystemExit as end:
    code = end.code
heavy = {"torch", "numpy", "scipy", "safetensors"} & set(sys.modules)
print("heavy:", sorted(heavy), "code:", code, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("--show-completion", "--shell", "bash"),
        ("merge", "--help"),
        ("bake", "--help"),
        ("inspect", "--help"),
        ("inspect", str(DATA / "loha.safetensors"), "--modules", "--metadata"),
        ("inspect", str(DATA / "base.safetensors"), "--json"),
        ("inspect", str(DATA / "peft_lora")),
        ("inspect", str(DATA / "lora.safetensors"), str(DATA / "loha.safetensors"), "--sort", "size"),
        ("inspect", str(DATA / "lora.safetensors"), "--check", "--headers-only", "--tags", "--hashes"),
        ("inspect", str(DATA / "lora.safetensors"), "--strip-training-data", "--dry-run"),
    ],
    ids=lambda arguments: " ".join(Path(a).name for a in arguments),
)
def test_no_heavy_import(arguments: tuple[str, ...], tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", _SPY, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.stderr.splitlines()[-1] == "heavy: [] code: 0"


def test_pipe_in_and_out(tmp_path: Path) -> None:
    write(tmp_path / "b.safetensors", lora())
    adapter = write(tmp_path / "a.safetensors", lora()).read_bytes()
    found = process("merge", "-", "b.safetensors", "-o", "-", cwd=tmp_path, input=adapter)
    assert found.returncode == 0, found.stderr
    assert load(found.stdout)["lora_unet_down_a.lora_down.weight"].shape == (4, 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_path_on_stdout_feeds_the_next_command(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", lora())
    script = "out=$(lycotool merge a.safetensors a.safetensors:0.5 -q -o 'two words.safetensors') && lycotool inspect \"$out\""
    script = script.replace("lycotool ", f"{sys.executable} -m lycotool ")
    found = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "two words.safetensors" in found.stdout


def test_stdin_that_is_no_safetensors(tmp_path: Path) -> None:
    found = process("inspect", "-", cwd=tmp_path, input=b"not a model")
    assert found.returncode == 3
    assert b"Traceback" not in found.stderr


def test_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    script = f"{sys.executable} -m lycotool inspect --modules {DATA / 'loha.safetensors'} | head -1"
    found = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.stderr == ""
    assert len(found.stdout.splitlines()) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_during_the_write_leaves_nothing(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """A checkpoint large enough to be interrupted, and a FIFO to know when work has begun."""
    layers = {f"unet.l{i}.weight": torch.zeros(1024, 1024) for i in range(48)}
    write(tmp_path / "base.safetensors", layers)
    adapter: dict[str, torch.Tensor] = {}
    for i in range(48):
        adapter |= lora(f"lora_unet_l{i}", out=1024, width=1024, rank=256)
    write(tmp_path / "a.safetensors", adapter)
    (tmp_path / "out.safetensors").write_bytes(b"old")
    before = {
        p.name: p.read_bytes() if p.name.startswith("out") else p.stat().st_size for p in tmp_path.iterdir()
    }
    child = subprocess.Popen(
        [*LYCOTOOL, "bake", "base.safetensors", "a.safetensors", "-o", "out.safetensors", "--force"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        # The lowest priority, so that this test sees the write begin on a busy machine too.
        preexec_fn=lambda: os.nice(19),  # noqa: PLW1509 - this process has one thread
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while child.poll() is None and not writes_here(child.pid, tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    child.send_signal(number)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == code, stderr
    assert b"interrupted" in stderr
    after = {
        p.name: p.read_bytes() if p.name.startswith("out") else p.stat().st_size for p in tmp_path.iterdir()
    }
    assert after == before


def writes_here(pid: int, folder: Path) -> bool:
    """Whether a process has a file open for writing in a folder (named or not)."""
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = str(descriptor.readlink())
            if target.startswith(str(folder)) and ("#" in target or ".lycotool-" in target):
                return True
    except OSError:
        return False
    return False


def test_no_space_is_exit_7(tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk."""
    write(tmp_path / "base.safetensors", {"unet.a.weight": torch.zeros(512, 512)})
    write(tmp_path / "a.safetensors", lora("lora_unet_a", out=512, width=512))
    script = (
        f"ulimit -f 64; {sys.executable} -m lycotool bake base.safetensors a.safetensors -o out.safetensors"
    )
    found = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 7, found.stderr
    assert "too large" in found.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "base.safetensors"]


def test_python_m_and_console_script_agree(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("lycotool")
    found = subprocess.run([script, "--version"], cwd=tmp_path, capture_output=True, check=False)
    assert found.stdout == process("--version", cwd=tmp_path).stdout


def test_written_file_reads_back(tmp_path: Path) -> None:
    found = process("merge", DATA / "base.safetensors", DATA / "lora.safetensors", cwd=tmp_path)
    assert found.stdout == b"base+lora.safetensors\n"
    assert len(read(tmp_path / "base+lora.safetensors")) == 1145


@pytest.mark.parametrize(
    "command",
    [f"inspect {DATA / 'lora.safetensors'} --modules", f"resize {DATA / 'lora.safetensors'} --rank 1 -o -"],
)
def test_a_full_disk_behind_standard_output_is_exit_7(command: str, tmp_path: Path) -> None:
    script = f"{sys.executable} -m lycotool {command} > /dev/full"
    found = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 7
    assert "lycotool: error: standard output: No space left on device\nhint: " in found.stderr
    assert "Traceback" not in found.stderr
    assert "Exception ignored" not in found.stderr


def test_letters_that_a_terminal_has_not_are_spelled_out(tmp_path: Path) -> None:
    (tmp_path / "ü–試.safetensors").symlink_to(DATA / "lora.safetensors")
    found = process(
        "inspect", tmp_path / "ü–試.safetensors", cwd=tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0"
    )
    assert found.returncode == 0, found.stderr
    assert rb"\xfc\u2013\u8a66.safetensors" in found.stdout


def test_tables_in_a_pipe_have_no_spaces_at_the_end(tmp_path: Path) -> None:
    found = process("inspect", DATA / "lora.safetensors", DATA / "loha.safetensors", "--check", cwd=tmp_path)
    assert found.stdout
    assert not any(line.endswith(b" ") for line in found.stdout.splitlines())


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("typer", ("--version",)),
        ("torch", ("resize", DATA / "lora.safetensors", "--rank", 1, "-o", "out.safetensors")),
    ],
)
@pytest.mark.parametrize("code", ["raise KeyboardInterrupt", "exec('raise KeyboardInterrupt')"])
def test_interrupted_while_importing(
    module: str, arguments: tuple[object, ...], code: str, tmp_path: Path
) -> None:
    """The second is what CPython remembers until the end, to end by SIGINT itself."""
    (tmp_path / f"{module}.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = process(*arguments, cwd=tmp_path, PYTHONPATH=path)
    assert result.stderr.decode() == "lycotool: error: interrupted\n"
    assert result.returncode == 130
