"""Training in several processes: the numbers of one process, one writer, one end.

Processes talk through gloo here; tests/gpu has the same through NCCL.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read, run, succeed
from ranks import lycotool, run_ranks
from safetensors import safe_open
from training.runs import Nothing, Records, base_file, options, picture, write_pictures

from lycotool.distributed import World, joined
from lycotool.errors import PeerFailedError, ResourceError
from lycotool.launching import _failure, launch
from lycotool.training.assemble import make_run
from lycotool.training.bases.load import load_base
from lycotool.training.loop import Run, train
from lycotool.training.observe import Observer
from lycotool.training.options import TrainOptions
from lycotool.training.plan import StepPlan
from lycotool.training.setup import prepare


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Seven pictures, so that the last batch of an epoch is short."""
    folder = write_pictures(tmp_path / "images")
    for number in range(3):
        picture(number, shift=2).save(folder / f"more{number}.png")
        (folder / f"more{number}.txt").write_text("red, green, blue, yellow", encoding="utf-8")
    return folder


# --- the numbers ------------------------------------------------------------------------------

#: Plain gradient descent, whose steps are as exact as the gradients.
PLAIN: Mapping[str, Any] = {"optimizer": "sgd", "lr": 0.02, "max_grad_norm": 0.0, "preset": "attn-only"}

RUNS: Mapping[str, Mapping[str, Any]] = {
    # 4 and 3 images: 2 and 1 in the second process. Everything that is drawn is at work.
    "drawn": {
        **PLAIN, "batch_size": 4, "steps": 4, "flip_aug": True, "shuffle_caption": True,
        "caption_dropout_rate": 0.3, "noise_offset": 0.1, "ip_noise_gamma": 0.1, "min_snr_gamma": 5.0,
        "multires_noise_iterations": 3, "rank_dropout": 0.3, "module_dropout": 0.3,
    },
    # 6 images, and 1 that leaves nothing to the second process; two batches a step; cropped anew each time.
    "accumulated": {
        **PLAIN, "batch_size": 6, "steps": 2, "gradient_accumulation_steps": 2, "train_te": False,
        "random_crop": True, "resolution": (8, 8), "min_bucket_reso": 8, "algo": "dylora", "dim": 4, "block_size": 2,
    },
    # Each process moves a part, of two groups whose sizes do not divide.
    "sharded": {
        **PLAIN, "batch_size": 4, "steps": 4, "shard_optimizer": True, "te_lr": (0.01,), "max_grad_norm": 0.5,
        "optimizer": "sgdnesterov", "dim": 3,
    },
    # Gradients of an optimizer that keeps tensors apart, clipped.
    "adafactor": {"optimizer": "adafactor", "batch_size": 4, "steps": 2, "preset": "attn-only", "algo": "lokr", "factor": 4},
}  # fmt: skip


def _train_together(folder: str, runs: Mapping[str, Mapping[str, Any]], out: str) -> None:
    with joined("cpu") as world:
        for name, values in runs.items():
            ours = {**values, "batch_size": values["batch_size"] // world.size}
            given = options(Path(folder), **ours)
            torch.save(_outcome(given, world), Path(out, f"{name}-{world.rank}.pt"))


class Gradients(Nothing):
    """Keeps those of every step."""

    def __init__(self, made: Run) -> None:
        self.made = made
        self.kept: list[list[torch.Tensor]] = []

    def is_due(self, planned: StepPlan) -> bool:
        return True

    def after(self, planned: StepPlan) -> None:
        self.kept.append([gradient.flatten().clone() for gradient in self.made.stepper.gradients])


def _outcome(given: TrainOptions, world: World) -> dict[str, Any]:
    """Train a float32 adapter on a float64 base, where sums in another order are nearly the same."""
    base = load_base(given.base, unet_dtype=torch.float64, te_dtype=torch.float64)
    ready = prepare(given, load_weights=lambda path: {}, base=base, world=world)
    made = make_run(ready, Observer())
    gradients, records = Gradients(made), Records()
    start = {key: tensor.clone() for key, tensor in made.network.raw_state().items()}
    train(made, gradients, records)
    return {
        "start": start,
        "gradients": gradients.kept,
        "parameters": {key: tensor.clone() for key, tensor in made.network.raw_state().items()},
        "losses": records.losses,
        "norms": [record.grad_norm for record in records.steps],
        "encoded": made.inputs.latents.encoded,
    }


def test_two_processes_are_one(images: Path, tmp_path: Path) -> None:
    """At the same global batch: gradients and parameters to 1e-6, float32's eps a few times.

    Only the order of sums differs. Both processes hold the same bits.
    """
    ended = run_ranks(tmp_path, _train_together, str(images), RUNS, str(tmp_path))
    assert [process.code for process in ended] == [0, 0], ended
    for name, values in RUNS.items():
        one = {key: value for key, value in values.items() if key != "shard_optimizer"}
        alone = _outcome(options(images, **one), World(0, 1, torch.device("cpu")))
        ours = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1)]
        assert all(
            torch.equal(ours[0]["parameters"][key], ours[1]["parameters"][key]) for key in alone["start"]
        )
        for mine, theirs, expected in zip(
            ours[0]["gradients"], ours[1]["gradients"], alone["gradients"], strict=True
        ):
            if not values.get("shard_optimizer"):
                assert all(torch.equal(*both) for both in zip(mine, theirs, strict=True))
            for own, other, whole in zip(mine, theirs, expected, strict=True):
                joined = torch.cat([own, other])[: whole.numel()] if values.get("shard_optimizer") else own
                assert (joined - whole).norm() <= 1e-6 * whole.norm(), name
        assert ours[0]["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert ours[0]["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        for key, expected in alone["parameters"].items():
            assert torch.allclose(ours[0]["parameters"][key], expected, rtol=1e-6, atol=1e-9), (name, key)
        assert any(not torch.equal(alone["parameters"][key], alone["start"][key]) for key in alone["start"])
    # What is cached is encoded once: 4 of the 7 here, 3 there.
    counts = [torch.load(tmp_path / f"adafactor-{rank}.pt")["encoded"] for rank in (0, 1)]
    assert counts == [4, 3]


# --- the command ------------------------------------------------------------------------------

SMALL = ("--resolution", 16, "--min-bucket-reso", 16, "--bucket-reso-steps", 8, "--device", "cpu")
QUICK = (
    *SMALL,
    "--preset",
    "attn-only",
    "--no-train-te",
    "--optimizer",
    "sgd",
    "--lr",
    0.5,
    "--save-dtype",
    "fp32",
)


def command(*arguments: object, output: str) -> tuple[object, ...]:
    return ("train", base_file("sd1"), "images", *QUICK, "-o", output, *arguments)


@pytest.fixture(autouse=True)
def in_folder(images: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(images.parent)
    return images.parent


def metadata(path: str) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
        return found


def events(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def near(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[key], other[key], rtol=1e-6, atol=1e-7) for key in one
    )


def test_one_writes(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapter, log, images, validation and metadata are those of one process, and written once."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    (in_folder / "prompts.txt").write_text("a disk --s 1 --l 1\n", encoding="utf-8")
    more = ("--steps", 3, "--validation-split", 0.5, "--sample-prompts", "prompts.txt", "--sample-every-n-steps", 3,
            "--save-every-n-steps", 2, "--cache-latents", "disk", "--cache-text", "disk")  # fmt: skip
    alone = command(
        *more, "--batch-size", 2, "--log-file", "one.jsonl", "--cache-dir", "c1", output="one.safetensors"
    )
    succeed(*alone)
    ours = command(
        *more, "--batch-size", 1, "--log-file", "two.jsonl", "--cache-dir", "c2", output="two.safetensors"
    )
    ended = run_ranks(in_folder, lycotool, ours)
    assert [process.code for process in ended] == [0, 0], ended
    assert ended[0].stdout == "two.safetensors\n"
    assert (ended[1].stdout, ended[1].stderr) == ("", "")
    assert (
        "2 processes share each batch of 2 images (1 each); learning rates are not scaled" in ended[0].stderr
    )
    assert near(read(Path("two.safetensors")), read(Path("one.safetensors")))
    assert sorted(p.name.replace("two", "one") for p in in_folder.glob("two*")) == sorted(
        p.name for p in in_folder.glob("one*")
    )
    assert {p.name for p in in_folder.glob("c2/*")} == {p.name for p in in_folder.glob("c1/*")}
    kept = {"ss_output_name", "modelspec.title", "ss_batch_size_per_device", "modelspec.hash_sha256",
            "sshs_model_hash", "sshs_legacy_hash", "ss_session_id"}  # fmt: skip
    one, two = (
        {k: v for k, v in metadata(f"{name}.safetensors").items() if k not in kept} for name in ("one", "two")
    )
    assert one == two
    assert (one["ss_total_batch_size"], metadata("two.safetensors")["ss_batch_size_per_device"]) == ("2", "1")
    logs = [[event["event"] for event in events(name)] for name in ("one.jsonl", "two.jsonl")]
    assert logs[0] == logs[1]
    losses = [
        [e["loss"] for e in events(name) if e["event"] == "validation"] for name in ("one.jsonl", "two.jsonl")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize(
    ("more", "together"),
    [((), ()), (("--optimizer", "sgdnesterov", "--lr", 0.1), ("--shard-optimizer",))],
    ids=["plain", "sharded"],
)
def test_a_run_goes_on_in_another_number_of_processes(
    in_folder: Path, more: tuple[object, ...], together: tuple[object, ...]
) -> None:
    """If their batches together are as large; else both sizes are named."""

    def alone(*arguments: object, output: str = "a.safetensors") -> tuple[object, ...]:
        return command(*arguments, *more, output=output)

    def ours(*arguments: object) -> tuple[object, ...]:
        return alone(*arguments, *together)

    succeed(*alone("--batch-size", 4, "--steps", 4, output="straight.safetensors"))
    kept = ("--save-state-on-train-end",)
    ended = run_ranks(in_folder, lycotool, ours("--batch-size", 2, "--steps", 2, *kept))
    assert [process.code for process in ended] == [0, 0], ended
    other = run(*alone("--batch-size", 2, "--steps", 4, "-f"))
    assert other.exit_code == 5
    assert "images per batch (--batch-size times processes): was 4, is 2" in other.stderr
    found = succeed(*alone("--batch-size", 4, "--steps", 3, "-f", "--json", *kept))
    assert json.loads(found.stdout)["first_step"] == 2
    ended = run_ranks(in_folder, lycotool, ours("--batch-size", 2, "--steps", 4, "-f"))
    assert [process.code for process in ended] == [0, 0], ended
    assert "going on after step 3" in ended[0].stderr
    assert near(read(Path("a.safetensors")), read(Path("straight.safetensors")))


def test_a_picture_that_one_process_cannot_read(in_folder: Path) -> None:
    file = in_folder / "images" / "1.png"  # the second of its bucket, so the second process encodes it
    file.write_bytes(file.read_bytes()[:-40])
    ended = run_ranks(in_folder, lycotool, command("--batch-size", 2, "--steps", 2, output="a.safetensors"))
    assert [process.code for process in ended] == [3, 3], ended
    assert "error" not in ended[0].stderr
    assert ended[1].stderr.startswith("lycotool: error: ")
    assert "1.png" in ended[1].stderr
    assert "Traceback" not in ended[1].stderr
    assert not list(in_folder.glob("a*"))


def _spoiled(arguments: Sequence[object]) -> None:
    """What the second process computes is not a number after a while."""
    if os.environ["RANK"] == "1":
        from diffusers.models.resnet import ResnetBlock2D

        forward, calls = ResnetBlock2D.forward, []

        def broken(self: Any, hidden: torch.Tensor, *more: object, **named: object) -> torch.Tensor:
            calls.append(1)
            result: torch.Tensor = forward(self, hidden, *more, **named)
            return result * float("nan") if len(calls) > 8 and self.conv_shortcut is not None else result

        ResnetBlock2D.forward = broken  # type: ignore[method-assign]
    lycotool(arguments)


def test_a_loss_that_is_not_finite_in_one_process(in_folder: Path) -> None:
    """The sums are not finite in both, and the one that can say where does, or both say what it found."""
    ended = run_ranks(in_folder, _spoiled, command("--batch-size", 2, "--steps", 4, output="a.safetensors"))
    assert [process.code for process in ended] == [6, 6], ended
    said = "".join(process.stderr for process in ended)
    assert said.count("lycotool: error: the loss of step ") == 1
    assert "first seen in the output of unet." in said


def test_started_by_the_command(in_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`--gpus 2` becomes two processes; Ctrl-C reaches both, which stop after the same step with one save."""
    arguments = command(
        "--batch-size", 2, "--gpus", 2, "--steps", 100000, "--log-file", "log.jsonl", output="a.safetensors"
    )

    def interrupt() -> None:
        end = time.monotonic() + 200
        while time.monotonic() < end:
            if Path("log.jsonl").exists() and any(event["event"] == "step" for event in events("log.jsonl")):
                break
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(PeerFailedError) as caught:
        launch(2, [str(argument) for argument in arguments])
    thread.join()
    assert caught.value.exit_code == 130
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.count("lycotool: error: interrupted") == said.err.count("goes on from a.state") == 1
    assert "Traceback" not in said.err
    assert "torch" not in said.err
    (saved,) = in_folder.glob("a-step*.safetensors")
    done = int(saved.stem.removeprefix("a-step"))
    steps = [event["step"] for event in events("log.jsonl") if event["event"] == "step"]
    assert steps == list(range(1, done + 1))
    succeed(*command("--batch-size", 4, "--steps", done, output="straight.safetensors"))
    assert near(read(saved), read(Path("straight.safetensors")))


@pytest.mark.parametrize(
    ("codes", "code", "message"),
    [
        ({0: 3, 1: 3}, 3, None),
        ({1: 130, 0: 130}, 130, None),
        ({0: 8, 1: -9}, 8, "process 1 was killed by SIGKILL"),
        ({1: -11, 0: -15}, 8, "process 1 was killed by SIGSEGV"),
    ],
)
def test_how_the_command_ends(codes: dict[int, int], code: int, message: str | None) -> None:
    error = _failure(codes)
    assert error.exit_code == code  # type: ignore[attr-defined]
    assert isinstance(error, PeerFailedError if message is None else ResourceError)
    assert message is None or message in str(error)


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--gpus", "many"), "expected a number of GPUs, or auto"),
        (("--gpus", 0), "expected a number of GPUs, or auto"),
        (("--gpus", 99, "--device", "auto"), "--gpus 99: CUDA has"),
        (("--gpus", 2, "--steps", 1, "--optimizer", "no-such"), "no-such"),
        (("--gpus", 2, "--algo", "lora", "--preset", "no-such"), "no preset is named"),
        (("--shard-optimizer",), "--shard-optimizer is for several processes"),
    ],
)
def test_what_is_wrong_is_said_before_processes_start(
    in_folder: Path, given: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lycotool.cli.train.launch", None)
    found = run(*command(*given, output="a.safetensors"))
    assert found.exit_code == 2
    assert message in found.stderr


def test_an_optimizer_that_cannot_be_sharded(in_folder: Path) -> None:
    ours = command("--shard-optimizer", "--optimizer", "adafactor", output="a.safetensors")
    ended = run_ranks(in_folder, lycotool, ours)
    assert [process.code for process in ended] == [2, 2]
    said = "".join(process.stderr for process in ended)
    assert said.count("--shard-optimizer: a step of adafactor needs all parameters together") == 1


def test_a_launcher_and_an_option_that_differ(in_folder: Path) -> None:
    ended = run_ranks(in_folder, lycotool, command("--gpus", 3, output="a.safetensors"))
    assert [process.code for process in ended] == [2, 2]
    assert "".join(process.stderr for process in ended).count("--gpus 3 in one of 2 processes") == 1


def test_a_dry_run_plans_for_all(in_folder: Path) -> None:
    found = succeed(
        *command("--gpus", 3, "--batch-size", 2, "--epochs", 2, "--dry-run", "--json", output="a.safetensors")
    )
    plan = json.loads(found.stdout)["plan"]
    assert (plan["processes"], plan["batch_sizes"], plan["batches_per_epoch"], plan["steps"]) == (
        3,
        [6],
        2,
        4,
    )


def test_all_there_are(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU `auto` is one process; with several, as many."""
    called: list[int] = []
    monkeypatch.setattr("lycotool.cli.train.launch", lambda count, arguments: called.append(count))
    succeed(*command("--gpus", "auto", "--steps", 1, output="a.safetensors"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    succeed(*command("--gpus", "auto", "--device", "auto", output="b.safetensors"))
    succeed(*command("--gpus", 3, "--device", "cuda", output="b.safetensors"))
    assert called == [4, 3]
    refused = run(*command("--gpus", 2, "--device", "cuda:1", output="b.safetensors"))
    assert refused.exit_code == 2
    assert "--device cuda:1 is one device" in refused.stderr


@pytest.mark.parametrize("value", ["3", '"3"'])
def test_a_number_in_a_file(in_folder: Path, value: str) -> None:
    (in_folder / "a.toml").write_text(f"gpus = {value}\n", encoding="utf-8")
    found = succeed(
        *command("--config", "a.toml", "--steps", 1, "--dry-run", "--json", output="a.safetensors")
    )
    assert json.loads(found.stdout)["plan"]["processes"] == 3


def test_a_function_is_one_process(in_folder: Path) -> None:
    from lycotool import UsageError
    from lycotool import train as call

    with pytest.raises(UsageError, match="a function is called in one process"):
        call(options(in_folder / "images", gpus="2"))
