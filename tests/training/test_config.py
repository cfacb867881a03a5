"""Options as files: every one of them, strict reading, and writing that reads back equal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lycotool.errors import UsageError
from lycotool.training import config
from lycotool.training.declare import Declared

BARE = {"base": "model.safetensors", "dataset": "images"}


def another_value(entry: Declared) -> Any:
    """A value that is not the default."""
    if entry.choices:
        value: Any = next(choice for choice in entry.choices if choice != entry.default)
    elif entry.kind is bool:
        value = not entry.default
    elif entry.kind is str:
        value = 'other "text" \\ ü'
    else:
        low = entry.minimum if entry.minimum is not None else 1
        value = entry.kind(low + (0 if entry.kind is int and low != entry.default else 0.25))
        if entry.kind is int and value == entry.default:
            value += 1
    return value if entry.count == 1 else (value,) * (entry.count or 2)


def test_every_option_is_fully_declared() -> None:
    for entry in config.all_options().values():
        assert entry.help.endswith("."), entry.name
        assert entry.panel, entry.name
        # TOML has no null: None must be what leaving the option out means.
        assert not entry.optional or entry.default is None, entry.name


def test_every_option_survives_a_file(tmp_path: Path) -> None:
    values = {entry.name: another_value(entry) for entry in config.all_options().values()}
    values["resolution"] = (768, 512)
    file = tmp_path / "a.toml"
    tables = [
        f"[{entry.group}]\n{name} = {config._toml(values[name])}\n"
        if name == first
        else f"{name} = {config._toml(values[name])}\n"
        for group in config.groups()
        for first in [next(n for n, e in config.all_options().items() if e.group == group)]
        for name, entry in config.all_options().items()
        if entry.group == group
    ]
    file.write_text("".join(tables), encoding="utf-8")
    assert config.read_config(str(file)) == values


def test_defaults_read_back_equal(tmp_path: Path) -> None:
    options = config.build(BARE)
    file = tmp_path / "a.toml"
    file.write_text(config.to_toml(options), encoding="utf-8")
    assert config.build(config.read_config(str(file))) == options


def test_changed_options_read_back_equal(tmp_path: Path) -> None:
    values = {
        **BARE, "output": 'a"b.safetensors', "algo": "lokr", "dim": 8, "factor": 4, "te_lr": (1e-4, 0.0), "lr": 1.0,
        "optimizer_arg": ("weight_decay=0.1", "betas=0.9,0.99"), "resolution": (768, 512), "shuffle_caption": True,
        "train_te": False, "min_snr_gamma": 5.0, "max_token_length": 150, "sample_prompts": "prompts.txt",
    }  # fmt: skip
    options = config.build(values)
    file = tmp_path / "a.toml"
    file.write_text(config.to_toml(options), encoding="utf-8")
    again = config.build(config.read_config(str(file)))
    assert again == options
    assert again != config.build(BARE)
    assert dataclasses.asdict(again)["data"]["resolution"] == (768, 512)


def test_keys_may_stand_outside_of_their_table(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('base = "m"\nlr = 1e-4\nsteps = 10\n[network]\nalgo = "loha"\n', encoding="utf-8")
    assert config.read_config(str(file)) == {"base": "m", "lr": 1e-4, "steps": 10, "algo": "loha"}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("learnig_rate = 1", "learnig_rate: unknown"),
        ("[optimizer]\nlrr = 1", "[optimizer] lrr: unknown; did you mean lr?"),
        ("[optimizer]\nalgo = 'lora'", "[optimizer] algo: belongs into [network]"),
        ("lr = 1\n[optimizer]\nlr = 2", "[optimizer] lr: given twice"),
        ("steps = 'many'", "steps: 'many', expected a whole number"),
        ("steps = 1.5", "steps: 1.5, expected a whole number"),
        ("shuffle_caption = 'false'", "shuffle_caption: 'false', expected true or false"),
        ("loss_type = 'l3'", "loss_type: 'l3', expected one of l2"),
        ("resolution = [1, 2, 3]", "resolution: 3 values, expected 1 or 2"),
        ("base = 1", "base: expected text"),
    ],
)
def test_what_is_not_understood(text: str, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        config.read_config(str(file))
    assert caught.value.path == str(file)
    assert [detail.startswith(fault) for detail in caught.value.details] == [True]


def test_all_faults_are_listed_together(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("a = 1\nb = 2\nsteps = 'x'\n", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        config.read_config(str(file))
    assert len(caught.value.details) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, "--lr is -1, expected at least 0"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"steps": 0}, "--steps is 0, expected at least 1 steps"),
        ({"lr_scheduler_min_lr_ratio": 2.0}, "at least 0 and at most 1"),
        ({"te_lr": (1e-4, -1.0)}, "--te-lr is -1"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        config.build({**BARE, **values})
    assert message in caught.value.message


@pytest.mark.parametrize("missing", ["base", "dataset"])
def test_base_and_dataset_are_needed(missing: str) -> None:
    with pytest.raises(UsageError, match=f"missing argument {missing.upper()}"):
        config.build({key: value for key, value in BARE.items() if key != missing})
