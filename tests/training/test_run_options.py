"""Every option of a run does what it says: seen in gradients, parameters, groups and plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training.runs import InMemory, Nothing, Records, options, write_pictures

from lycotool.errors import UsageError
from lycotool.training.assemble import schedule_of
from lycotool.training.checks import check_options, check_schedule
from lycotool.training.data.dataset import Batch
from lycotool.training.data.options import DataOptions
from lycotool.training.data.reading import read_dataset
from lycotool.training.loop import train
from lycotool.training.options import LengthOptions, ScheduleOptions
from lycotool.training.plan import Plan
from lycotool.training.setup import learning_rates

QUICK: dict[str, Any] = {"preset": "attn-only", "train_te": False, "lr": 1e-2}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "images")


def outcome(pictures: Path, **values: Any) -> tuple[dict[str, torch.Tensor], Records]:
    """Parameters and records of a short run."""
    records = Records()
    with InMemory(pictures, **{"steps": 2, **QUICK, **values}) as made:
        train(made.run, Nothing(), records)
        return {name: tensor.clone() for name, tensor in made.run.network.raw_state().items()}, records


def gradients(pictures: Path, **values: Any) -> torch.Tensor:
    """All gradients of the first step, before clipping."""
    with InMemory(pictures, **{"steps": 1, "max_grad_norm": 0.0, **QUICK, **values}) as made:
        train(made.run, Nothing(), Records())
        return torch.cat([gradient.flatten() for gradient in made.run.stepper.gradients])


def test_accumulation_is_one_large_batch(pictures: Path) -> None:
    """Four batches of one image give the gradient of one batch of the same four."""
    parts = gradients(pictures, batch_size=1, gradient_accumulation_steps=4)
    with InMemory(pictures, batch_size=1, gradient_accumulation_steps=4, **QUICK) as made:
        batches = made.run.plan.at(0).batches
    assert len(batches) == 4
    with InMemory(pictures, batch_size=4, **QUICK, steps=1) as made:
        first = batches[0]
        whole = Batch(first.group, first.bucket, first.epoch, tuple(s for b in batches for s in b.samples))
        made.run.stepper.zero_grad()
        made.run.losses(made.run.inputs.make(whole, step=0, first=0)).mean().backward()
        expected = torch.cat([gradient.flatten() for gradient in made.run.stepper.gradients])
    # Sums in another order.
    assert torch.allclose(parts, expected, rtol=1e-3, atol=1e-6 * float(expected.abs().max()))


def test_checkpointing_gives_the_same_gradients(pictures: Path) -> None:
    plain, again = gradients(pictures), gradients(pictures, gradient_checkpointing=True)
    # The same operations on the same numbers, once more.
    assert torch.allclose(plain, again, rtol=1e-4, atol=1e-7)


def test_gradients_are_clipped_to_the_norm(pictures: Path) -> None:
    with InMemory(pictures, **{**QUICK, "steps": 1, "max_grad_norm": 1e-3}) as made:
        records = Records()
        train(made.run, Nothing(), records)
        assert made.run.stepper.norm().item() == pytest.approx(1e-3, rel=1e-3)
        assert records.steps[0].grad_norm > 1e-3


def test_weight_norms_are_limited(pictures: Path) -> None:
    free, _ = outcome(pictures)
    limited, _ = outcome(pictures, scale_weight_norms=1e-3)
    assert sum(t.norm() for t in limited.values()) < sum(t.norm() for t in free.values())


@pytest.mark.parametrize(
    "values",
    [{"seed": 1}, {"noise_offset": 0.5}, {"min_snr_gamma": 1.0}, {"loss_type": "l1"}, {"lr": 1e-3}, {"lr_warmup_steps": 2.0},
     {"optimizer": "lion"}, {"optimizer_arg": ("weight_decay=1.0",)}, {"clip_skip": 2}, {"max_timestep": 10},
     {"dropout": 0.5}, {"module_dropout": 0.5}, {"flip_aug": True}, {"loraplus_lr_ratio": 16.0}, {"dim": 2}],
    ids=lambda values: next(iter(values)),
)  # fmt: skip
def test_it_changes_what_is_trained(
    values: dict[str, Any], pictures: Path, plain: dict[str, torch.Tensor]
) -> None:
    found, _ = outcome(pictures, **values)
    same = found.keys() == plain.keys() and all(
        found[name].shape == plain[name].shape and torch.equal(found[name], plain[name]) for name in found
    )
    assert not same


@pytest.fixture(scope="module")
def plain(pictures: Path) -> dict[str, torch.Tensor]:
    return outcome(pictures)[0]


@pytest.mark.parametrize(
    "values", [{"log_every": 2}, {"cache_latents": "none"}, {"cache_text": "none"}, {"format": "peft"}]
)
def test_it_does_not(values: dict[str, Any], pictures: Path, plain: dict[str, torch.Tensor]) -> None:
    found, records = outcome(pictures, **values)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert [record.step for record in records.steps] == [1, 2]


def test_caches_on_disk_change_nothing(
    pictures: Path, tmp_path: Path, plain: dict[str, torch.Tensor]
) -> None:
    for _ in range(2):
        found, _ = outcome(pictures, cache_latents="disk", cache_text="disk", cache_dir=str(tmp_path))
        assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert list(tmp_path.rglob("*.safetensors"))


def test_components_have_their_learning_rates(pictures: Path) -> None:
    values = {"preset": "attn-only", "steps": 1, "unet_lr": 1e-3}
    with InMemory(pictures, **values, te_lr=(5e-4,)) as made:
        records = Records()
        train(made.run, Nothing(), records)
        assert records.steps[0].lr == {"te1": 5e-4, "unet": 1e-3}
        assert made.run.inputs.texts is None
    with InMemory(pictures, **values, te_lr=(0.0,)) as made:
        assert set(made.run.network.components) == {"unet"}
        assert made.run.inputs.texts is not None
    with InMemory(pictures, **{**values, "unet_lr": 0.0}, te_lr=(5e-4,)) as made:
        assert set(made.run.network.components) == {"te1"}


def test_text_encoders_of_sdxl_by_themselves(pictures: Path) -> None:
    with InMemory(pictures, "sdxl", preset="attn-only", te_lr=(1e-3, 0.0), steps=1) as made:
        assert set(made.run.network.components) == {"te1", "unet"}


def test_lora_plus_has_a_group_of_its_own(pictures: Path) -> None:
    with InMemory(pictures, **{**QUICK, "loraplus_lr_ratio": 16.0}) as made:
        assert sorted(group.lr for group in made.run.stepper.groups) == [1e-2, pytest.approx(16e-2)]


@pytest.mark.parametrize(
    ("values", "lr"),
    [
        ({}, 2e-4),
        ({"algo": "full"}, 2e-6),
        ({"algo": "ia3"}, 5e-3),
        ({"optimizer": "prodigy"}, 1.0),
        ({"lr": 3e-4}, 3e-4),
    ],
)
def test_default_learning_rates(values: dict[str, Any], lr: float, pictures: Path) -> None:
    given = options(pictures, **values)
    optimizer = check_options(given)
    with InMemory(pictures, preset="attn-only", train_te=False) as made:
        assert learning_rates(given, made.ready.base, optimizer.lr)["unet"] == pytest.approx(lr)


def test_bf16_base_keeps_float32_parameters(pictures: Path) -> None:
    from lycotool.training.assemble import make_run
    from lycotool.training.bases.load import load_base
    from lycotool.training.observe import Observer
    from lycotool.training.setup import prepare

    given = options(pictures, **{**QUICK, "precision": "bf16", "steps": 1})
    ready = prepare(
        given,
        load_weights=lambda path: {},
        base=load_base(given.base, unet_dtype=torch.bfloat16, te_dtype=torch.bfloat16),
    )
    run, records = make_run(ready, Observer()), Records()
    train(run, Nothing(), records)
    assert {p.dtype for p in ready.network.parameters()} == {torch.float32}
    assert {p.dtype for p in ready.base.unet.parameters() if not p.requires_grad} == {torch.bfloat16}
    _, exact = outcome(pictures, steps=1)
    # bf16 keeps 8 bits; the loss is a mean over a thousand numbers.
    assert records.losses[0] == pytest.approx(exact.losses[0], rel=0.03)


def test_the_plan_counts_epochs_as_sd_scripts_does(pictures: Path) -> None:
    data = DataOptions(resolution=(16, 16), min_bucket_reso=16, bucket_reso_steps=8, batch_size=1)
    dataset = read_dataset(str(pictures), data)
    plan = Plan(dataset, LengthOptions(epochs=3, gradient_accumulation_steps=3))
    assert (plan.batches_per_epoch, plan.steps_per_epoch, plan.steps, plan.epochs) == (4, 2, 6, 3)
    assert [plan.at(step).samples for step in range(4)] == [3, 1, 3, 1]
    assert [plan.at(step).ends_epoch for step in range(4)] == [False, True, False, True]
    assert sorted(s.example for step in (2, 3) for b in plan.at(step).batches for s in b.samples) == [
        0,
        1,
        2,
        3,
    ]
    assert Plan(dataset, LengthOptions()).steps == 1600
    with pytest.raises(UsageError, match="both say"):
        Plan(dataset, LengthOptions(steps=1, epochs=1))


def test_schedules_get_their_numbers() -> None:
    schedule = schedule_of(ScheduleOptions(lr_scheduler="cosine", lr_warmup_steps=0.1), 200)
    assert (schedule.warmup, schedule.total) == (20, 200)
    with pytest.raises(UsageError, match="does nothing with constant"):
        check_schedule(ScheduleOptions(lr_scheduler_num_cycles=2))
    with pytest.raises(UsageError, match="does nothing with piecewise_constant"):
        check_schedule(
            ScheduleOptions(
                lr_scheduler="piecewise_constant", lr_scheduler_rules="1:5,0.1", lr_warmup_steps=5.0
            )
        )
    with pytest.raises(UsageError, match="take 150 steps"):
        schedule_of(
            ScheduleOptions(lr_scheduler="warmup_stable_decay", lr_warmup_steps=75.0, lr_decay_steps=75.0),
            100,
        )


def test_relative_step_and_learning_rates_exclude_each_other(pictures: Path) -> None:
    with pytest.raises(UsageError, match="relative_step"):
        check_options(
            options(pictures, optimizer="adafactor", optimizer_arg=("relative_step=true",), lr=1e-3)
        )
    found, _ = outcome(pictures, optimizer="adafactor", optimizer_arg=("relative_step=true",), lr=None)
    assert any(t.abs().max() > 0 for name, t in found.items() if "up" in name)
