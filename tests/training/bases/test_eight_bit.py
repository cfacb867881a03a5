"""Weights in 8 bits: what is stored, that autograd keeps none of it rebuilt, and that every algorithm trains on it."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read, run, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from training.runs import SIDE, base_file, base_folder, options, write_pictures

from lycotool.linalg.quantised import rebuild_rows, round_rows
from lycotool.training.bases import eight_bit
from lycotool.training.bases.eight_bit import (
    BaseDtype,
    EightBitConv2d,
    EightBitLinear,
    hold_in_eight_bits,
    rebuilt_for_gradients,
)
from lycotool.training.bases.hashes import fingerprint_of
from lycotool.training.bases.load import load_base
from lycotool.training.bases.model import BaseModel
from lycotool.training.memory.activations import step_bytes
from lycotool.training.memory.estimate import estimate_memory
from lycotool.training.setup import Trainable, prepare

CPU = torch.device("cpu")
KINDS: tuple[BaseDtype, ...] = ("fp8", "int8")
STORED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
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


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def prepared(pictures: Path, family: Any = "sd1", **values: Any) -> Trainable:
    return prepare(options(pictures, family, **values), load_weights=lambda path: {})


# --- rounding ---------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 40), kind=st.sampled_from(KINDS),
    exponent=st.integers(-12, 8), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_rounding_is_to_the_nearest(
    rows: int, columns: int, kind: BaseDtype, exponent: int, seed: int
) -> None:
    """Half a step: 2⁻⁴ of the value in float8 (three bits after the first), 1/254 of the row's largest in int8."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 2.0**exponent
    stored, scale = round_rows(weight, STORED[kind])
    rebuilt = rebuild_rows(stored, scale, torch.float32)
    error, peaks = (rebuilt - weight).abs(), weight.abs().amax(1, keepdim=True)
    if kind == "fp8":
        assert ((error <= weight.abs() * 2.0**-4) | (error <= scale * 2.0**-10)).all()
        assert (scale == torch.exp2(torch.log2(scale).round())).all()
        # A power of 2 times three bits: the same numbers in every dtype.
        assert torch.equal(rebuilt, rebuild_rows(stored, scale, torch.bfloat16).float())
    else:
        # The scale has bfloat16's digits, so a row's largest value may lie 2⁻⁹ beyond 127 steps.
        assert (error <= peaks * (0.5 / 127 + 2.0**-9) * 1.01).all()
    assert stored.dtype == STORED[kind]
    assert scale.shape == (rows, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_stays(kind: BaseDtype) -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -3.0]])
    rebuilt = rebuild_rows(*round_rows(weight, STORED[kind]), torch.float32)
    assert torch.equal(rebuilt[0], weight[0])
    assert rebuilt[1] == pytest.approx(weight[1], rel=0.04)


# --- layers -----------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution and two linear layers, the first and last of which may stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.norm = nn.GroupNorm(2, 16)
        self.inner = nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 5, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.norm(self.conv(self.conv_in(x))).movedim(1, -1))


def held_and_reference(kind: BaseDtype) -> tuple[Net, Net]:
    torch.manual_seed(0)
    held = Net().requires_grad_(False)
    reference = copy.deepcopy(held)
    hold_in_eight_bits(held, kind, CPU)
    for name, module in held.named_modules():
        if isinstance(module, EightBitLinear | EightBitConv2d):
            reference.get_submodule(name).weight.data.copy_(module.weight)
    return held, reference


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_rounded_weights(kind: BaseDtype) -> None:
    held, reference = held_and_reference(kind)
    assert type(held.conv_in) is nn.Conv2d
    assert [type(layer) for layer in (held.conv, held.inner[0], held.inner[2])] == [
        EightBitConv2d, EightBitLinear, EightBitLinear,
    ]  # fmt: skip
    results = []
    for net in (held, reference):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with rebuilt_for_gradients(net):
            y = net(x)
        y.square().sum().backward()
        results.append((y, x.grad))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_autograd_keeps_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []

    def watched(*arguments: Any) -> torch.Tensor:
        weight = rebuild_rows(*arguments)
        made.append(weakref.ref(weight.untyped_storage()))
        return weight

    held, _ = held_and_reference("fp8")
    monkeypatch.setattr(eight_bit, "rebuild_rows", watched)
    x = torch.randn(2, 3, 8, 8).requires_grad_()
    with rebuilt_for_gradients(held):
        y = held(x)
    assert [watch() for watch in made] == [None] * 3
    y.sum().backward()
    assert [watch() for watch in made] == [None] * 6  # rebuilt again, and free again
    assert held(x).requires_grad
    y = held(x)
    assert any(watch() is not None for watch in made[-3:])  # what it would be without


def test_what_is_held_is_counted_and_described() -> None:
    torch.manual_seed(0)
    net = Net().bfloat16()
    done = hold_in_eight_bits(net, "fp8", CPU)
    numbers = 16 * 8 * 9 + 24 * 16 + 5 * 24
    assert (done.layers, done.before, done.after) == (3, 2 * numbers, numbers + 4 * (16 + 24 + 5))
    # Uniform weights over float8's steps of 2⁻³: relative errors of 2⁻³ / √12 at 2⁰, less above: 1.8 to 3.6 %.
    assert done.error is not None
    assert 0.018 < done.error < 0.036
    assert "3 layers are held in fp8" in done.describe("UNet", "fp8")
    torch.manual_seed(0)
    finer = hold_in_eight_bits(Net().bfloat16(), "int8", CPU)
    assert finer.error is not None
    assert finer.error < done.error / 2


def test_a_fingerprint_sees_weights_in_eight_bits() -> None:
    """Caches of text encoders' outputs are kept by it."""
    found = set()
    for seed, kind in ((0, "fp8"), (1, "fp8"), (0, "int8")):
        torch.manual_seed(0)
        net = Net()
        net.inner[0].weight.data += seed
        hold_in_eight_bits(net, kind, CPU)  # type: ignore[arg-type]
        found.add(fingerprint_of(net))
    assert len(found) == 3


# --- training ---------------------------------------------------------------------------------


NETWORKS: dict[str, dict[str, Any]] = {
    "lora": {}, "dora": {"algo": "lora", "dora_wd": True}, "loha": {"algo": "loha"}, "lokr": {"algo": "lokr"},
    "full": {"algo": "full"}, "ia3": {"algo": "ia3"}, "glora": {"algo": "glora"}, "oft": {"algo": "diag-oft"},
    "boft": {"algo": "boft"}, "dylora": {"algo": "dylora"}, "dropout": {"dropout": 0.2, "module_dropout": 0.2},
    "checkpointed": {"algo": "loha", "gradient_checkpointing": True},
}  # fmt: skip


def gradients(ready: Trainable) -> list[torch.Tensor]:
    from lycotool.training.assemble import make_run
    from lycotool.training.observe import Observer
    from lycotool.training.step import Steps

    run = make_run(ready, Observer())
    run.network.draw(0)
    inputs = run.inputs.make(run.plan.at(0).batches[0], step=0, first=0)
    Steps(run, print)._add_gradients(inputs)
    found = [gradient.clone() for gradient in run.stepper.gradients]
    run.network.detach()
    return found


@pytest.fixture(scope="module")
def with_rounded_weights() -> BaseModel:
    """A base that has the weights which float8 gives in its own dtype."""
    plain, rounded = load_base(str(base_file("sd1"))), load_base(str(base_file("sd1")))
    hold_in_eight_bits(rounded.unet, "fp8", CPU)
    changed = 0
    for name, module in rounded.unet.named_modules():
        if isinstance(module, EightBitLinear | EightBitConv2d):
            plain.unet.get_submodule(name).weight.data.copy_(module.weight)
            changed += 1
    assert changed > 50
    return plain


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_every_algorithm_trains_on_the_rounded_weights(
    pictures: Path, network: dict[str, Any], with_rounded_weights: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are those over a base that has the rounded weights in its own dtype: the same operations."""
    found = gradients(prepared(pictures, base_dtype="fp8", train_te=False, **network))
    monkeypatch.setattr("lycotool.training.setup.load_base", lambda *arguments, **named: with_rounded_weights)
    expected = gradients(prepared(pictures, train_te=False, **network))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        assert torch.equal(one, other)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_eight_bits_save_memory(pictures: Path, checkpoint: bool) -> None:
    """Weights have half the bytes, and activations do not grow by what is rebuilt."""
    plain = prepared(pictures, train_te=False, precision="bf16")
    held = prepared(pictures, train_te=False, precision="bf16", base_dtype="fp8")
    before, after = (
        step_bytes(ready.base, ready.network, (16, 16), 2, tokens=75, trained={"unet"}, checkpoint=checkpoint)
        for ready in (plain, held)
    )
    largest = 2 * max(
        module.weight.numel() for module in plain.base.unet.modules() if isinstance(module, nn.Conv2d)
    )
    assert after - before <= (12 if checkpoint else 2) * largest
    weights = [estimate_memory(ready, checkpoint=checkpoint).base for ready in (plain, held)]
    assert 0.5 < weights[1] / weights[0] < 0.62  # norms, biases and the two ends stay


def test_text_encoders_are_held_where_they_stay(pictures: Path) -> None:
    for values, expected in (
        ({"train_te": False}, False),
        ({}, True),
        ({"train_te": False, "cache_text": "none"}, True),
    ):
        ready = prepared(pictures, base_dtype="int8", **values)
        encoder = ready.base.text_encoders[0]
        assert any(isinstance(module, EightBitLinear) for module in encoder.modules()) is expected
        assert len(ready.notes) == 1 + expected


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_command_line(pictures: Path, tmp_path: Path, kind: str) -> None:
    """It trains, says what was rounded, and goes on bit for bit; the result is not that of a run without."""
    common = ("train", base_file("sd1"), pictures, *SMALL, "--save-state-on-train-end", "--base-dtype", kind)
    whole, parts, plain = (tmp_path / f"{name}.safetensors" for name in ("whole", "parts", "plain"))
    result = succeed(*common, "--steps", 3, "-o", whole)
    assert f"layers are held in {kind}" in result.stderr
    assert "rounding changed them by" in result.stderr
    succeed(*common, "--steps", 1, "-o", parts)
    succeed(*common, "--steps", 3, "-o", parts, "--force")
    succeed("train", base_file("sd1"), pictures, *SMALL, "--steps", 3, "-o", plain)
    first, second, third = (read(path) for path in (whole, parts, plain))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_a_state_of_another_base_dtype_is_refused(pictures: Path, tmp_path: Path) -> None:
    common = ("train", base_file("sd1"), pictures, *SMALL, "-o", tmp_path / "a.safetensors", "--force")
    succeed(*common, "--steps", 1, "--save-state-on-train-end", "--base-dtype", "fp8")
    result = run(*common, "--steps", 2)
    assert result.exit_code == 5
    assert "base_dtype: was fp8, is None" in result.stderr


def test_a_bad_value_names_the_choices(pictures: Path) -> None:
    result = run("train", base_file("sd1"), pictures, "--base-dtype", "fp4")
    assert result.exit_code == 2
    assert "fp8" in result.stderr


def test_a_dry_run_counts_it(pictures: Path) -> None:
    sizes = []
    for extra in ((), ("--base-dtype", "fp8")):
        result = succeed(
            "train", base_folder("sdxl"), pictures, *SMALL, "--dry-run", "--json", "--no-train-te",
            "--precision", "bf16", *extra,
        )  # fmt: skip
        sizes.append(json.loads(result.stdout)["plan"]["memory"]["base"])
    assert 0.5 < sizes[1] / sizes[0] < 0.65
