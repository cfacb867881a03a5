"""A run that is stopped in the middle of an epoch goes on bit for bit, for every algorithm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training.runs import InMemory, Nothing, Records, write_pictures

from lycotool.errors import BadInputError, IncompatibleError, UsageError
from lycotool.training import continuity
from lycotool.training.loop import load_state, state_of, train
from lycotool.training.plan import StepPlan
from lycotool.training.state import State, has_state, read_state, remove_state, write_state

#: Everything random at once: captions, flips, dropouts, noise.
RANDOM = {
    "shuffle_caption": True, "caption_dropout_rate": 0.2, "flip_aug": True, "dropout": 0.1, "rank_dropout": 0.1,
    "module_dropout": 0.1, "noise_offset": 0.1, "multires_noise_iterations": 3, "ip_noise_gamma": 0.1,
}  # fmt: skip

NETWORKS: dict[str, dict[str, Any]] = {
    "lora": RANDOM,
    "lora-scalar": {"algo": "lora", "use_scalar": True},
    "lora-dora-cp": {"algo": "lora", "dora_wd": True, "use_conv_cp": True},
    "loha": {"use_scalar": True},
    "lokr": {"factor": 4},
    "full": {"train_norm": True, "optimizer": "adafactor"},
    "glora": {"optimizer": "lion"},
    "dylora": {"dim": 4, "block_size": 2},
    "boft": {"constraint": 0.1},
    "diag-oft": {"rescaled": True},
    "ia3": {"optimizer": "prodigy"},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


class StopsAfter(Nothing):
    """Ends a run by an exception, as a power cut would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def is_due(self, planned: StepPlan) -> bool:
        return planned.step + 1 == self.step

    def after(self, planned: StepPlan) -> None:
        raise InterruptedError


@pytest.mark.parametrize("name", NETWORKS)
def test_resumed_is_the_same(name: str, pictures: Path, tmp_path: Path) -> None:
    values = {
        "algo": name,
        **NETWORKS[name],
        "batch_size": 2,
        "steps": 5,
        "preset": "attn-mlp",
        "train_te": name == "lora",
    }
    if "dim" not in values and name not in ("full", "ia3"):
        values["dim"] = 4
    if values.get("use_conv_cp"):
        values["preset"] = "full"
    straight, resumed = Records(), Records()
    with InMemory(pictures, **values) as made:
        train(made.run, Nothing(), straight)
        expected, _ = state_of(made.run)
        expected = {key: tensor.clone() for key, tensor in expected.items()}
    with InMemory(pictures, **values) as made:
        with pytest.raises(InterruptedError):
            train(made.run, StopsAfter(3), Records())
        tensors, rest = state_of(made.run)
        write_state(tmp_path / "a.state", State(3, tensors, rest))
    with InMemory(pictures, **values) as made:
        state = read_state(tmp_path / "a.state")
        load_state(made.run, state.tensors, state.rest)
        train(made.run, Nothing(), resumed, first_step=state.step)
        found, _ = state_of(made.run)
    assert resumed.losses == straight.losses[3:]
    assert [r.smoothed_loss for r in resumed.steps] == [r.smoothed_loss for r in straight.steps[3:]]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_states_replace_each_other_whole(tmp_path: Path) -> None:
    folder = tmp_path / "a.state"
    assert not has_state(folder)
    for step in (1, 2):
        write_state(folder, State(step, {"x": torch.full((2,), float(step))}, {"y": step}))
    assert len(list(folder.iterdir())) == 2
    state = read_state(folder)
    assert (state.step, state.rest, state.tensors["x"].tolist()) == (2, {"y": 2}, [2.0, 2.0])
    remove_state(folder)
    assert not folder.exists()


def test_a_half_written_state_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "a.state"
    write_state(folder, State(1, {"x": torch.ones(2)}, {}))
    (folder / "step00000002-abcdef00.safetensors").write_bytes(b"half")  # killed before the JSON
    assert read_state(folder).step == 1


def test_what_is_no_state(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no state"):
        read_state(tmp_path)
    folder = tmp_path / "a.state"
    write_state(folder, State(1, {"x": torch.ones(2)}, {}))
    next(folder.glob("*.safetensors")).write_bytes(b"damaged")
    with pytest.raises(BadInputError, match="damaged"):
        read_state(folder)
    (folder / "state.json").write_text('{"version": 99}')
    with pytest.raises(BadInputError, match="another version"):
        read_state(folder)


def test_another_run_is_refused(pictures: Path, tmp_path: Path) -> None:
    def identity(**values: Any) -> dict[str, Any]:
        with InMemory(pictures, preset="attn-only", train_te=False, **values) as made:
            return continuity.identity(made.ready.options, made.ready.base, made.ready.dataset)

    first = identity(steps=5)
    continuity.check(first, identity(steps=9, save_every_n_steps=1, log_file="x.jsonl"), tmp_path)
    for values, name in (({"lr": 1e-3}, "lr"), ({"dim": 4}, "dim"), ({"keep_tokens": 1}, "keep_tokens")):
        with pytest.raises(IncompatibleError) as caught:
            continuity.check(first, identity(steps=5, **values), tmp_path)
        assert any(detail.startswith(f"{name}: was") for detail in caught.value.details)
    with pytest.raises(IncompatibleError, match="another run"):
        continuity.check(
            identity(steps=5, lr_scheduler="cosine"), identity(steps=9, lr_scheduler="cosine"), tmp_path
        )
