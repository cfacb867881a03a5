"""Steps inside the backward pass: the same parameters as by a step after it, and no gradients left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read, run, succeed
from training.runs import SIDE, InMemory, Nothing, Records, base_file, write_pictures

from lycotool.errors import BadInputError
from lycotool.training.loop import load_state, state_of, train
from lycotool.training.memory.estimate import estimate_memory

SMALL = (
    "--resolution",
    SIDE,
    "--min-bucket-reso",
    SIDE,
    "--bucket-reso-steps",
    8,
    "--batch-size",
    2,
    "--device",
    "cpu",
)
STEPS = 3


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def trained(pictures: Path, **values: Any) -> tuple[dict[str, torch.Tensor], Records]:
    records = Records()
    with InMemory(pictures, train_te=False, steps=STEPS, max_grad_norm=0, **values) as made:
        train(made.run, Nothing(), records)
        assert all(
            parameter.grad is None or not values.get("fused_backward")
            for parameter in made.run.network.parameters()
        )
        return {name: tensor.clone() for name, tensor in made.run.network.raw_state().items()}, records


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer": "sgd", "lr": 0.1}, {"optimizer": "lion", "lr": 1e-3}, {"lr": 1e-3},
        {"optimizer": "adafactor", "lr": 1e-3}, {"algo": "loha", "lr": 1e-3}, {"algo": "full", "lr": 1e-4},
        {"algo": "lora", "dora_wd": True, "lr": 1e-3}, {"gradient_checkpointing": True, "lr": 1e-3},
        {"lr_scheduler": "linear", "lr_warmup_steps": 2, "lr": 1e-3, "loraplus_lr_ratio": 4.0},
    ],
    ids=str,
)  # fmt: skip
def test_parameters_are_those_of_steps_after_the_backward_pass(
    pictures: Path, values: dict[str, Any]
) -> None:
    """The operations are the same on each parameter; in one buffer AdamW rounds some elements otherwise."""
    (plain, before), (fused, after) = (
        trained(pictures, **values), trained(pictures, **values, fused_backward=True),
    )  # fmt: skip
    assert plain.keys() == fused.keys()
    # Adam divides by √v: one unit in the last place of a tiny gradient may be a whole step of lr.
    for name, tensor in plain.items():
        allowed = (1e-4 * tensor.abs()).clamp_min(2e-5 * values["lr"] / 1e-3 + 1e-8)
        assert ((fused[name] - tensor).abs() <= allowed).all(), name
    assert after.losses == pytest.approx(before.losses, rel=1e-5)
    norms = [[record.grad_norm for record in records.steps] for records in (before, after)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_gradient_that_is_not_finite_moves_nothing(pictures: Path) -> None:
    with InMemory(pictures, train_te=False, max_grad_norm=0, fused_backward=True, optimizer="sgd") as made:
        stepper, parameter = made.run.stepper, next(made.run.network.parameters())
        before = parameter.detach().clone()
        stepper.begin([1.0] * len(stepper.groups))
        (parameter * torch.inf).sum().backward()
        stepper.step([])
        assert not stepper.norm().isfinite()
        assert torch.equal(parameter, before)
        parameter.sum().backward()  # outside of a step
        assert torch.equal(parameter, before)
        assert parameter.grad is not None
        stepper.zero_grad()
        assert parameter.grad is None


def test_a_run_goes_on(pictures: Path) -> None:
    whole, _ = trained(pictures, fused_backward=True)
    values: dict[str, Any] = {"train_te": False, "max_grad_norm": 0, "fused_backward": True}
    with InMemory(pictures, steps=1, **values) as made:
        train(made.run, Nothing(), Records())
        tensors, rest = state_of(made.run)
        kept = {name: tensor.clone() for name, tensor in tensors.items()}
    with InMemory(pictures, steps=STEPS, **values) as made:
        load_state(made.run, kept, rest)
        train(made.run, Nothing(), Records(), first_step=1)
        found = made.run.network.raw_state()
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
        with pytest.raises(BadInputError, match="parameters"):
            made.run.stepper.load_state({}, {"0": {}})


def test_gradients_take_no_memory(pictures: Path) -> None:
    values: dict[str, Any] = {"train_te": False, "max_grad_norm": 0, "algo": "full"}
    with InMemory(pictures, **values) as made:
        plain = estimate_memory(made.ready, checkpoint=True)
    with InMemory(pictures, **values, fused_backward=True) as made:
        fused = estimate_memory(made.ready, checkpoint=True)
        assert fused.gradients == max(parameter.nbytes for parameter in made.run.network.parameters())
    assert plain.gradients == plain.parameters == fused.parameters
    assert fused.gradients < plain.gradients / 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--max-grad-norm"),
        (("--max-grad-norm", 0, "--gradient-accumulation-steps", 2), "--gradient-accumulation-steps"),
        (("--max-grad-norm", 0, "--precision", "fp16"), "--precision fp16"),
        (("--max-grad-norm", 0, "--optimizer", "prodigy"), "prodigy"),
    ],
)
def test_what_needs_all_gradients_is_refused(
    pictures: Path, arguments: tuple[object, ...], message: str
) -> None:
    result = run("train", base_file("sd1"), pictures, *SMALL, "--fused-backward", *arguments)
    assert result.exit_code == 2
    assert f"{message} needs all gradients together" in result.stderr


def test_on_the_command_line(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    succeed(
        "train", base_file("sd1"), pictures, *SMALL, "--steps", 2, "--algo", "full", "--fused-backward",
        "--max-grad-norm", 0, "-o", output,
    )  # fmt: skip
    assert any(tensor.abs().max() > 0 for tensor in read(output).values())
