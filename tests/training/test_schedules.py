"""Schedules give the factors of transformers' and diffusers' own, step for step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lycotool.errors import UsageError
from lycotool.training.schedules import Schedule, check_rules, steps_of

LR, TOTAL = 3e-3, 50


def factors(make: Callable[[torch.optim.Optimizer], object], steps: int = TOTAL) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"] / LR)
        optimizer.step()
        scheduler.step()  # type: ignore[attr-defined]
    return found


def ours(**values: object) -> list[float]:
    schedule = Schedule(total=TOTAL, **values)  # type: ignore[arg-type]
    return [schedule.factor(step, LR) for step in range(TOTAL)]


def theirs(name: str, **values: object) -> list[float]:
    import transformers.optimization as t

    get = {
        "constant": t.get_constant_schedule,
        "constant_with_warmup": t.get_constant_schedule_with_warmup,
        "linear": t.get_linear_schedule_with_warmup,
        "cosine": t.get_cosine_schedule_with_warmup,
        "cosine_with_restarts": t.get_cosine_with_hard_restarts_schedule_with_warmup,
        "polynomial": t.get_polynomial_decay_schedule_with_warmup,
        "cosine_with_min_lr": t.get_cosine_with_min_lr_schedule_with_warmup,
        "warmup_stable_decay": t.get_wsd_schedule,
        "inverse_sqrt": t.get_inverse_sqrt_schedule,
    }[name]
    return factors(lambda optimizer: get(optimizer, **values))


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("name", "mine", "their"),
    [
        ("constant_with_warmup", {}, {}),
        ("linear", {}, {"num_training_steps": TOTAL}),
        ("cosine", {}, {"num_training_steps": TOTAL}),
        ("cosine_with_restarts", {"cycles": 3}, {"num_training_steps": TOTAL, "num_cycles": 3}),
        ("polynomial", {"power": 2.0}, {"num_training_steps": TOTAL, "power": 2.0}),
        (
            "cosine_with_min_lr",
            {"cycles": 1, "min_ratio": 0.1},
            {"num_training_steps": TOTAL, "num_cycles": 0.5, "min_lr_rate": 0.1},
        ),
        ("inverse_sqrt", {"timescale": 20}, {"timescale": 20}),
        ("inverse_sqrt", {}, {}),
    ],
)
def test_with_warmup(name: str, mine: dict[str, object], their: dict[str, object], warmup: int) -> None:
    expected = theirs(name, num_warmup_steps=warmup, **their)
    assert ours(name=name, warmup=warmup, **mine) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("warmup", [0, 7])
def test_warmup_stable_decay(warmup: int) -> None:
    expected = theirs(
        "warmup_stable_decay", num_warmup_steps=warmup, num_stable_steps=TOTAL - warmup - 12,
        num_decay_steps=12, min_lr_ratio=0.1, num_cycles=0.5,
    )  # fmt: skip
    mine = ours(name="warmup_stable_decay", warmup=warmup, decay=12, min_ratio=0.1)
    assert mine == pytest.approx(expected, rel=1e-12)


def test_constant() -> None:
    assert ours(name="constant") == theirs("constant")


def test_piecewise_constant_is_diffusers_own() -> None:
    from diffusers.optimization import get_piecewise_constant_schedule

    rules = "1:10,0.1:20,0.01:30,0.005"
    expected = factors(lambda optimizer: get_piecewise_constant_schedule(optimizer, step_rules=rules))
    assert ours(name="piecewise_constant", rules=rules) == pytest.approx(expected)


@pytest.mark.parametrize("rules", ["", "1:10", "a:b,1", "1:10,0.1:x,2"])
def test_rules_that_cannot_be_read(rules: str) -> None:
    with pytest.raises(UsageError, match="--lr-rules"):
        check_rules(rules)


def test_steps_or_shares() -> None:
    assert steps_of(0.1, 200, option="--lr-warmup") == 20
    assert steps_of(1, 200, option="--lr-warmup") == 1
    assert steps_of(0, 200, option="--lr-warmup") == 0


@pytest.mark.parametrize("value", [-1, 1.5, 201, float("nan")])
def test_steps_out_of_range(value: float) -> None:
    with pytest.raises(UsageError, match="--lr-warmup"):
        steps_of(value, 200, option="--lr-warmup")
