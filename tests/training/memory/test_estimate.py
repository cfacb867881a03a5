"""The estimate of memory: each part against what a run on the CPU really makes and keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from makers.bases import Family
from training.runs import InMemory, Nothing, write_pictures

from lycotool.training.loop import train
from lycotool.training.memory.activations import encoding_bytes, step_bytes
from lycotool.training.memory.estimate import estimate_memory, frozen_bytes
from lycotool.training.memory.shadow import on_meta
from lycotool.training.memory.tracker import BLOCK, Tracker, blocks, flash_attention
from lycotool.training.observe import Observer
from lycotool.training.tree import tensors_of

NETWORKS: dict[str, dict[str, Any]] = {
    "lora": {}, "dora": {"algo": "lora", "dora_wd": True}, "loha": {"algo": "loha"}, "lokr": {"algo": "lokr"},
    "lokr as on a GPU": {"algo": "lokr", "dim": 1, "factor": 4, "compute_on": torch.device("cuda")},
    "whole lokr as on a GPU": {"algo": "lokr", "full_matrix": True, "factor": 4, "compute_on": torch.device("cuda")},
    "full": {"algo": "full"}, "ia3": {"algo": "ia3"}, "glora": {"algo": "glora"}, "oft": {"algo": "diag-oft"},
    "boft": {"algo": "boft"}, "dylora": {"algo": "dylora"},
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def test_a_tracker_counts_what_lives() -> None:
    known = torch.ones(1000)
    with Tracker([known]) as tracker:
        view = known[:10]
        a = known * 2
        assert (tracker.current, tracker.peak) == (blocks(4000), blocks(4000))
        b = a.view(10, 100) + 1
        del a
        assert tracker.current == blocks(4000)
        assert tracker.peak == 2 * blocks(4000)
        b.add_(1)
        del b
    assert tracker.current == 0
    assert view.numel() == 10


def test_models_come_back_from_meta(pictures: Path) -> None:
    with InMemory(pictures, train_te=False) as made:
        before = {name: tensor.clone() for name, tensor in made.run.network.raw_state().items()}
        weights = {name: (p, p.data_ptr()) for name, p in made.ready.base.unet.named_parameters()}
        with on_meta(made.ready.base.unet, made.run.network) as stand_ins:
            assert all(tensor.is_meta for tensor in stand_ins)
            assert all(p.is_meta for p in made.ready.base.unet.parameters())
        after = dict(made.ready.base.unet.named_parameters())
        assert all(after[name] is p and p.data_ptr() == place for name, (p, place) in weights.items())
        assert all(torch.equal(made.run.network.raw_state()[name], value) for name, value in before.items())


def real_forward(made: InMemory) -> tuple[int, int]:
    """Bytes alive at the end of a real forward pass on the CPU, and those of them that autograd keeps.

    Weights, parameters, gradients and inputs are not counted.
    """
    run, base = made.run, made.ready.base
    run.network.draw(0)
    inputs = run.inputs.make(run.plan.at(0).batches[0], step=0, first=0)
    known = [
        *base.unet.parameters(), *run.network.parameters(), *run.network.buffers(), *run.stepper.gradients,
        *tensors_of(inputs),
    ]  # fmt: skip
    places = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in places:
            kept[storage.data_ptr()] = (storage, blocks(storage.nbytes()))
        return tensor

    with (
        Tracker(known) as tracker,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        run.network.prepared(),
    ):
        loss = run.losses(inputs).sum()
        assert loss.requires_grad
        peak = tracker.peak
    return peak, sum(size for _, size in kept.values())


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_activations_are_those_of_a_step_on_the_cpu(pictures: Path, network: dict[str, Any]) -> None:
    """Other kernels have other scratch tensors: a few kilobytes of some megabytes."""
    network = dict(network)
    device = network.pop("compute_on", torch.device("cpu"))
    with InMemory(pictures, train_te=False, **network) as made:
        made.run.network.compute_on(device)
        peak, kept = real_forward(made)
        found = step_bytes(
            made.ready.base, made.run.network, (16, 16), 4, tokens=75, trained={"unet"}, checkpoint=False
        )
    assert found == pytest.approx(peak, rel=0.02)
    assert 0.9 * found < kept < found


@pytest.mark.parametrize(("family", "train_te"), [("sd1", True), ("sdxl", False)])
def test_checkpointing_takes_less(pictures: Path, family: Family, train_te: bool) -> None:
    with InMemory(pictures, family, train_te=train_te) as made:
        base, network, trained = made.ready.base, made.run.network, made.ready.lrs
        kept, again = (
            step_bytes(base, network, (16, 16), 4, tokens=75, trained=trained, checkpoint=checkpoint)
            for checkpoint in (False, True)
        )
        assert not base.unet.is_gradient_checkpointing
        assert not any(encoder.training for encoder in base.text_encoders)
    assert again < kept / 2


def test_activations_grow_with_the_batch(pictures: Path) -> None:
    with InMemory(pictures, train_te=False) as made:
        one, two, four = (
            step_bytes(made.ready.base, made.run.network, (16, 16), n, tokens=75, trained={"unet"}, checkpoint=False)
            for n in (1, 2, 4)
        )  # fmt: skip
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "prodigy", "sgd", "sgdnesterov", "adafactor"])
def test_parameters_gradients_and_state_are_counted(pictures: Path, optimizer: str) -> None:
    with InMemory(pictures, steps=1, optimizer=optimizer) as made:
        estimate = estimate_memory(made.ready, checkpoint=False)
        assert estimate.parameters == estimate.gradients == sum(g.nbytes for g in made.run.stepper.gradients)
        train(made.run, Nothing(), Observer())
        state = sum(tensor.nbytes for tensor in made.run.stepper.state()[0].values())
        # Counted for each group here; the estimate makes one group of all. Counters have 4 bytes.
        assert estimate.optimizer == pytest.approx(state, abs=16 * 4 * 2)


def test_weights_are_counted(pictures: Path) -> None:
    with InMemory(pictures, train_te=False) as made:
        base = made.ready.base
        expected = sum(-(-p.nbytes // BLOCK) * BLOCK for p in base.unet.parameters())
        assert frozen_bytes(base.unet) == expected
        assert estimate_memory(made.ready, checkpoint=False).base == expected
    with InMemory(pictures) as made:  # text encoders are at work
        base = made.ready.base
        assert estimate_memory(made.ready, checkpoint=False).base == expected + frozen_bytes(
            base.text_encoders[0]
        )


def test_latents_are_counted(pictures: Path) -> None:
    with InMemory(pictures, flip_aug=True) as made:
        estimate = estimate_memory(made.ready, checkpoint=False)
        held = made.run.inputs.latents.nbytes
        assert held == 4 * 2 * 2 * (4 * 8 * 8) * 4  # images, views, mean and deviation, elements, bytes
        assert estimate.caches == held
    with InMemory(pictures, cache_latents="none") as made:
        estimate = estimate_memory(made.ready, checkpoint=False)
        assert estimate.caches == 0
        assert made.ready.keeps_vae
        assert estimate.base == sum(
            map(frozen_bytes, (made.ready.base.unet, made.ready.base.vae, *made.ready.base.text_encoders))
        )


def test_encoding_is_what_the_vae_takes(pictures: Path) -> None:
    """On the CPU, attention of one head makes the same tensors."""
    with InMemory(pictures) as made:
        base = made.ready.base
        pixels = torch.zeros(1, 3, 64, 64)
        with Tracker([*base.vae.parameters(), pixels]) as tracker:
            base.vae.encode(pixels)
        assert encoding_bytes(base, (64, 64)) == pytest.approx(tracker.peak, rel=0.02)


def test_a_convolution_may_copy_its_input() -> None:
    x = torch.empty(1, 8, 64, 64, device="meta")
    weight = torch.empty(2, 8, 3, 3, device="meta")
    output = 4 * 2 * 62 * 62
    for copies, expected in ((False, blocks(output)), (True, blocks(output) + x.nbytes)):
        with Tracker([x, weight], copies_inputs=copies) as tracker:
            torch.nn.functional.conv2d(x, weight)
        assert tracker.peak == expected


def test_attention_on_meta_keeps_no_matrix_of_pairs() -> None:
    query = torch.empty(1, 2, 4096, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with flash_attention(), Tracker([query]) as tracker:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert tracker.peak < 2 * query.nbytes


@pytest.mark.parametrize(
    ("options", "text", "vae"),
    [
        ({"train_te": False}, False, False),
        ({"train_te": False, "cache_text": "none"}, True, False),
        ({"train_te": False, "shuffle_caption": True, "epochs": 50}, False, False),
        ({"train_te": False, "caption_dropout_rate": 0.5, "epochs": 50}, True, False),
        ({"train_te": False, "caption_dropout_rate": 0.5, "steps": 1}, False, False),
        ({"random_crop": True}, True, True),
    ],
)
def test_what_stays_at_work(pictures: Path, options: dict[str, Any], text: bool, vae: bool) -> None:
    with InMemory(pictures, **options) as made:
        assert (made.ready.keeps_text, made.ready.keeps_vae) == (text, vae)


def test_kernels_keep_less(pictures: Path) -> None:
    """A norm and the SiLU behind it keep one image instead of three, a gate its projection alone."""
    with InMemory(pictures, train_te=False) as made:
        base, network = made.ready.base, made.run.network
        plain, ours, again = (
            step_bytes(
                base,
                network,
                (16, 16),
                4,
                tokens=75,
                trained={"unet"},
                checkpoint=checkpoint,
                kernels=kernels,
            )
            for kernels, checkpoint in ((False, False), (True, False), (True, True))
        )
        assert not any(
            "forward" in m.__dict__ for m in base.unet.modules() if isinstance(m, torch.nn.GroupNorm)
        )
    assert again < ours < 0.95 * plain
