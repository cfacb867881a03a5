"""``lycotool train`` as users type it, on micro models and pictures of 16 pixels."""

from __future__ import annotations

import io
import json
import re
import signal
import socket
from pathlib import Path

import pytest
import torch
from helpers import read, run, succeed
from safetensors import safe_open
from training.runs import base_file, write_pictures

from lycotool.cli._output import Output
from lycotool.cli._train_report import TrainProgress
from lycotool.training.observe import StepRecord

SMALL = (
    "--resolution",
    16,
    "--min-bucket-reso",
    16,
    "--bucket-reso-steps",
    8,
    "--batch-size",
    2,
    "--device",
    "cpu",
)


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "images")
    return tmp_path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def metadata(path: Path | str) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.usefixtures("no_network")
def test_main_job(in_folder: Path) -> None:
    result = succeed("train", base_file("sd1"), "images", *SMALL, "--steps", 2)
    assert result.stdout == "images-lora.safetensors\n"
    tensors = read(in_folder / "images-lora.safetensors")
    assert {key.split("_")[1] for key in tensors} == {"te", "unet"}
    assert all(tensor.dtype == torch.float16 for key, tensor in tensors.items() if "alpha" not in key)
    assert any(tensor.abs().max() > 0 for key, tensor in tensors.items() if "lora_up" in key)
    assert not (in_folder / "images-lora.state").exists()
    said = metadata(in_folder / "images-lora.safetensors")
    assert said["ss_network_module"] == "networks.lora"
    assert "seed 42" in result.stderr
    assert "83 modules" in result.stderr


def test_checkpointing_changes_nothing_but_memory() -> None:
    """Text encoders are checkpointed too where they are trained; what is recomputed is the same."""
    for name, options in {"a": (), "b": ("--gradient-checkpointing",)}.items():
        succeed(
            "train", base_file("sd1"), "images", *SMALL, "--steps", 2, "-o", f"{name}.safetensors", *options
        )
    plain, checkpointed = read(Path("a.safetensors")), read(Path("b.safetensors"))
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_dry_run_plans_and_writes_nothing(in_folder: Path) -> None:
    result = succeed("train", base_file("sd1"), "images", *SMALL, "--dry-run", "--algo", "loha", "--json")
    plan = json.loads(result.stdout)["plan"]
    assert [(row["component"], row["algo"], row["modules"]) for row in plan["modules"]] == [
        ("te1", "loha", 12), ("unet", "loha", 83),
    ]  # fmt: skip
    assert plan["steps"] == 1600
    assert plan["memory"]["base"] > 1e6
    assert plan["memory"]["parameters"] == plan["memory"]["gradients"]
    assert plan["memory"]["total"] > sum(
        plan["memory"][part] for part in ("base", "optimizer", "activations")
    )
    assert plan["available"] is None
    assert sorted(path.name for path in in_folder.iterdir()) == ["images"]


def test_json_names_the_output() -> None:
    result = succeed(
        "train", base_file("sd1"), "images", *SMALL, "--steps", 1, "--json", "-o", "a.safetensors"
    )
    document = json.loads(result.stdout)
    assert document["outputs"] == ["a.safetensors"]
    assert document["plan"]["seed"] == 42


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["absent.safetensors", "images"], 2, "absent.safetensors"),
        (["{base}", "absent"], 2, "no such file or folder"),
        (["images/0.png", "images"], 3, ""),
        (["{base}", "empty"], 3, "no images"),
        (["{base}", "images", "--preset", "no-such"], 2, "no preset is named"),
        (["{base}", "images", "--log", "a.jsonl"], 2, "did you mean --log-file"),
        (
            ["{base}", "images", "--resolution", "512x"],
            2,
            "--resolution is '512x', expected a whole number or 2",
        ),
        (
            ["{base}", "images", "--resolution", 32, "--bucket-reso-steps", 64],
            2,
            "or switch `enable_bucket` off",
        ),
        (["{base}", "images", "--resolution", 33, "--no-enable-bucket"], 2, "the next is 40x40"),
        (["{base}", "images", "--factor", 4], 2, "factor does not apply to lora"),
        (["{base}", "images", "--optimizer", "adamv"], 2, "did you mean adamw"),
        (["{base}", "images", "--optimizer-arg", "decay=1"], 2, "adamw has no argument decay"),
        (["{base}", "images", "--steps", 1, "--epochs", 1], 2, "--steps` and `--epochs"),
        (["{base}", "images", "--zero-terminal-snr"], 2, "epsilon prediction"),
        (["{base}", "images", "--no-train-unet", "--no-train-te"], 2, "nothing is trained"),
        (["{base}", "images", "--no-train-te", "--te-lr", 1], 2, "--te-lr does nothing"),
        (["{base}", "images", "--format", "gguf"], 2, "no such name"),
        (["{base}", "images", "-o", "a.ckpt"], 2, "unknown output format"),
        (["{base}", "images", "-o", "there.safetensors"], 7, "exists already"),
        (["{base}", "images", "-o", "{base}"], 7, "same file as the input"),
        (["{base}", "images", "--device", "cuda:9"], 2, "cuda:9"),
        (["{base}", "images", "--precision", "fp16"], 2, "fp16 is not for the CPU"),
        (["{base}", "images", "--sample-at-first"], 2, "need prompts"),
        (["{base}", "images", "--validate-every-n-steps", 1], 2, "set aside"),
        (["{base}", "images", "--resume", "nowhere"], 2, "no state"),
        (["{base}", "images", "--split-dylora"], 2, "--split-dylora is for"),
        (
            ["{base}", "images", "--lr-scheduler-power", 2],
            2,
            "--lr-scheduler-power does nothing with constant",
        ),
        (["{base}", "images", "--noise-offset-random-strength"], 2, "does nothing without --noise-offset"),
    ],
)
def test_errors_have_their_exit_code(
    in_folder: Path, arguments: list[object], code: int, message: str
) -> None:
    (in_folder / "empty").mkdir()
    (in_folder / "there.safetensors").write_bytes(b"")
    filled = [str(a).format(base=base_file("sd1")) for a in arguments]
    result = run("train", *SMALL, "--lr", 0.001, *filled)
    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert not result.stdout


QUICK = ("--preset", "attn-only", "--no-train-te", "--lr", 0.01)


def test_ctrl_c_saves_and_the_same_command_goes_on(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is interrupted after two of five steps ends as the one that was not."""
    from lycotool.training.recorder import Recorder

    command = ("train", base_file("sd1"), "images", *SMALL, *QUICK, "--steps", 5, "--save-dtype", "fp32")
    succeed(*command, "-o", "straight.safetensors")
    add = Recorder.add

    def interrupting(self: Recorder, **values: object) -> None:
        add(self, **values)  # type: ignore[arg-type]
        if values["step"] == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Recorder, "add", interrupting)
    stopped = run(*command, "-o", "a.safetensors", "--log-file", "a.jsonl")
    assert stopped.exit_code == 130
    assert not stopped.stdout
    assert "goes on from a.state" in stopped.stderr
    assert sorted(p.name for p in in_folder.glob("a*")) == [
        "a-step00000002.safetensors",
        "a.jsonl",
        "a.state",
    ]
    monkeypatch.undo()
    monkeypatch.chdir(in_folder)
    resumed = succeed(*command, "-o", "a.safetensors", "--log-file", "a.jsonl", "--json")
    assert json.loads(resumed.stdout)["first_step"] == 2
    assert not (in_folder / "a.state").exists()
    expected, found = read(in_folder / "straight.safetensors"), read(in_folder / "a.safetensors")
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    lines = [json.loads(line) for line in (in_folder / "a.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 3, 4, 5]


def test_a_state_of_other_options_is_refused_or_left(in_folder: Path) -> None:
    command = ("train", base_file("sd1"), "images", *SMALL, *QUICK, "-o", "a.safetensors")
    succeed(*command, "--steps", 2, "--save-state-on-train-end")
    other = run(*command, "--steps", 4, "--dim", 2, "-f")
    assert other.exit_code == 5
    assert "dim: was None, is 2" in other.stderr
    longer = succeed(*command, "--steps", 3, "-f", "--json")
    assert json.loads(longer.stdout)["first_step"] == 2
    succeed(*command, "--steps", 1, "--dim", 2, "-f", "--fresh")


def test_validation_samples_and_logs(in_folder: Path) -> None:
    (in_folder / "prompts.txt").write_text("a disk --s 2 --l 1 --d 5\na square --s 2 --w 24 --n blur\n")
    arguments = ("--validation-split", 0.5, "--validate-every-n-steps", 1, "--sample-prompts", "prompts.txt",
                 "--sample-every-n-steps", 2, "--sample-at-first", "--log-file", "log.jsonl", "--lr", 0, "--steps", 2)  # fmt: skip
    result = succeed(
        "train", base_file("sd1"), "images", *SMALL, *QUICK, *arguments, "-o", "a.safetensors", "--json"
    )
    names = sorted(path.name for path in (in_folder / "a-samples").iterdir())
    assert names == [f"step0000000{step}{part}.png" for step in (0, 2) for part in ("-00", "-01", "")]
    # The same prompts and seeds, a model that did not move: the same bytes.
    for part in ("-00", "-01", ""):
        first, last = ((in_folder / "a-samples" / f"step0000000{n}{part}.png").read_bytes() for n in (0, 2))
        assert first == last
    from PIL import Image

    with Image.open(in_folder / "a-samples" / "step00000000-01.png") as image:
        assert image.size == (24, 16)
    with Image.open(in_folder / "a-samples" / "step00000000.png") as image:
        assert image.size == (48, 16)
    lines = [json.loads(line) for line in (in_folder / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "validation"]
    assert len(losses) == 2
    assert losses[0] == losses[1] == json.loads(result.stdout)["validation_loss"]
    assert [line["event"] for line in lines if line["event"] != "validation"] == [
        "begin", "samples", "step", "step", "samples", "save",
    ]  # fmt: skip


def test_a_loss_that_is_not_finite_names_step_images_and_layer(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.resnet import ResnetBlock2D

    forward = ResnetBlock2D.forward

    def broken(
        self: ResnetBlock2D, hidden: torch.Tensor, *arguments: object, **named: object
    ) -> torch.Tensor:
        result = forward(self, hidden, *arguments, **named)
        # From the second step on, in the first block that has a shortcut.
        broken.calls += 1  # type: ignore[attr-defined]
        late = broken.calls > 8 and self.conv_shortcut is not None  # type: ignore[attr-defined]
        return result * float("nan") if late else result

    broken.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(ResnetBlock2D, "forward", broken)
    result = run("train", base_file("sd1"), "images", *SMALL, *QUICK, "--steps", 4, "-o", "a.safetensors")
    assert result.exit_code == 6, result.stderr
    assert "the loss of step" in result.stderr
    assert ".png" in result.stderr
    assert "first seen in the output of unet." in result.stderr
    assert not (in_folder / "a.safetensors").exists()


class Screen(io.StringIO):
    """What a terminal is sent."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("columns", "shown"), [(50, "loss 0.1234"), (80, "loss 0.1234, smoothed 0.2345, lr 0.0002"),
                                                (120, "loss 0.1234, smoothed 0.2345, lr 0.0002, 12.30 images/s, 1.0 GiB")])  # fmt: skip
def test_the_bar_keeps_steps_and_time_where_there_is_little_room(
    columns: int, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", screen := Screen())
    with TrainProgress(Output(quiet=False, json=False)) as progress:
        progress.begin(0, 12000)
        progress.step(StepRecord(
            step=1234, loss=0.1234, smoothed_loss=0.2345, lr={"unet": 2e-4}, images_per_second=12.3, peak_bytes=2**30,
            epoch=1, grad_norm=1.0,
        ))  # fmt: skip
        progress._bar.refresh()
    last = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in re.split(r"[\r\n]+", screen.getvalue())]
    line = next(line for line in reversed(last) if "training" in line)
    assert re.search(r" 1234/12000 [-0-9]:[-0-9]+:[-0-9]+ " + re.escape(shown) + r" *$", line), line
    assert len(line) <= columns
