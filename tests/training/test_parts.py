"""Small parts of the loop: records, logs, held-back signals, loss scaling, samplers."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from lycotool.errors import OutputError, UsageError
from lycotool.training.bases.schedule import alphas_cumprod, with_zero_terminal_snr
from lycotool.training.logs import JsonLog, TensorBoardLog
from lycotool.training.loss_scale import LossScale
from lycotool.training.observe import StepRecord
from lycotool.training.optimizers.stepper import Group, Stepper
from lycotool.training.recorder import Recorder
from lycotool.training.samplers import _CLASSES, make_sampler, quiet, takes_generator
from lycotool.training.stopping import held_back


def record(step: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(step, 1, loss, loss, 0.5, {"unet": 1e-3}, 2.0, 0)


def test_records_are_fetched_in_groups_and_smoothed_as_one() -> None:
    losses = [1.0, 2.0, float("nan"), 4.0]
    recorder = Recorder(torch.device("cpu"), every=2)
    found = []
    for step, loss in enumerate(losses):
        recorder.add(
            step=step, epoch=0, loss=torch.tensor(loss), norm=torch.tensor(0.5), lr={"unet": 1.0}, images=3
        )
        if recorder.is_due:
            found += recorder.fetch()
    assert [r.step for r in found] == [1, 2, 3, 4]
    assert recorder.fetch() == []
    # The mean of what is finite, recent ones a little heavier.
    weights = [0.98**2, 0.98, 0, 1]
    expected = sum(w * x for w, x in zip(weights, [1, 2, 0, 4], strict=True)) / sum(weights)
    assert found[-1].smoothed_loss == pytest.approx(expected)


def test_json_lines_of_a_resumed_run_follow_each_other(tmp_path: Path) -> None:
    path = str(tmp_path / "a.jsonl")
    log = JsonLog(path, first_step=0)
    log.begin(0, 5)
    for step in (1, 2, 3):
        log.step(record(step, float("inf") if step == 1 else 1.0))
    log.validated(3, 0.5)
    log.saved(3, "a.safetensors")
    log.close()
    with Path(path).open("a") as file:
        file.write('{"event": "st')  # killed while it wrote
    log = JsonLog(path, first_step=2)
    log.begin(2, 5)
    log.step(record(3))
    log.sampled(3, ["x.png"])
    log.warning("careful")
    log.close()
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert [(line["event"], line.get("step")) for line in lines] == [
        ("begin", 0), ("step", 1), ("step", 2), ("begin", 2), ("step", 3), ("samples", 3), ("warning", None),
    ]  # fmt: skip
    assert lines[1]["loss"] is None
    assert lines[2]["lr"] == {"unet": 1e-3}


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        JsonLog(str(tmp_path / "absent" / "a.jsonl"), first_step=0)


def test_tensorboard_is_asked_for_by_name(tmp_path: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(UsageError) as caught:
            TensorBoardLog(str(tmp_path), first_step=0)
        assert caught.value.hint == "pip install tensorboard"
        return
    log = TensorBoardLog(str(tmp_path), first_step=0)
    log.step(record(1))
    log.close()
    assert list(tmp_path.iterdir())


def test_signals_wait_for_the_end_of_the_block() -> None:
    reached = []

    def block() -> None:
        with held_back() as stop:
            reached.append(bool(stop))
            signal.raise_signal(signal.SIGINT)
            reached.append(bool(stop))

    with pytest.raises(KeyboardInterrupt):
        block()
    assert reached == [False, True]


def test_a_second_signal_acts_at_once() -> None:
    reached = []

    def block() -> None:
        with held_back():
            signal.raise_signal(signal.SIGINT)
            reached.append("first")
            signal.raise_signal(signal.SIGINT)
            reached.append("second")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert reached == ["first"]


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with held_back():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_loss_scale_leaves_out_overflows_and_finds_its_size() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    stepper = Stepper([Group("unet", 1e-3, (parameter,))], "adamw")
    scale = LossScale(enabled=True)
    assert scale.scaled(torch.tensor(1.0)) == 65536
    parameter.grad.fill_(65536 * 2.0)
    norm, allowed = scale.unscale(stepper)
    assert (allowed, norm.item()) == (True, pytest.approx(2 * 3**0.5))
    parameter.grad.fill_(float("inf"))
    assert scale.unscale(stepper)[1] is False
    assert scale.factor == 32768
    again = LossScale(enabled=True)
    again.load_state(scale.state())
    for _ in range(2000):
        parameter.grad.fill_(1.0)
        again.unscale(stepper)
    assert again.factor == 65536


def test_loss_scale_is_one_otherwise() -> None:
    scale = LossScale(enabled=False)
    loss = torch.tensor(1.5)
    assert scale.scaled(loss) is loss


@pytest.mark.parametrize("name", sorted(_CLASSES))
def test_samplers_lead_from_noise_to_a_known_latent(name: str) -> None:
    """A model that always knows the answer: whatever the sampler, it must get there."""
    answer = torch.full((1, 4, 2, 2), 0.7)
    alphas = alphas_cumprod()
    scheduler = make_sampler(name, alphas, prediction="epsilon")  # type: ignore[arg-type]
    with quiet():
        scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 2, 2, generator=generator) * scheduler.init_noise_sigma
    drawn = {"generator": generator} if takes_generator(scheduler) else {}
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(latents, timestep)
        # ᾱ between two steps, where a sampler asks there.
        place = float(timestep)
        low = int(place)
        share = place - low
        alpha = (1 - share) * alphas[low] + share * alphas[min(low + 1, 999)]
        noise = (seen - alpha.sqrt() * answer) / (1 - alpha).sqrt()
        latents = scheduler.step(noise.float(), timestep, latents, **drawn).prev_sample
    # What noise is left at the first time step of the schedule is a few per cent.
    assert (latents - answer).abs().max() < 0.12


def test_a_schedule_that_ends_in_noise_is_sampled_from_its_end() -> None:
    ends = with_zero_terminal_snr(alphas_cumprod())
    scheduler = make_sampler("ddim", ends, prediction="v_prediction")
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999
    assert make_sampler("ddim", alphas_cumprod(), prediction="epsilon").config.timestep_spacing == "leading"
    with pytest.raises(UsageError, match="dpmsingle"):
        make_sampler("dpmsingle", ends, prediction="v_prediction")
