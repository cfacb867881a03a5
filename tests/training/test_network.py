"""The network of a run: groups, masks, norms, export; algorithms' own tests are conformance's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from makers.layers import (
    NAME,
    build,
    make_input,
    make_layer,
    make_target,
    relative_error,
    train_randomly,
    training_of,
)
from torch import Tensor, nn

from lycotool.errors import IncompatibleError, NumericError, UsageError
from lycotool.training.network import Network
from lycotool.training.network_options import NetworkOptions
from lycotool.training.targets import TableRow, Target


def network_of(
    targets: Mapping[str, tuple[str, str]] | list[Target], *arguments: str, seed: int = 0, **options: Any
) -> Network:
    """An adapter on each of some layers, given as name -> (component, kind of layer)."""
    if not isinstance(targets, list):
        targets = [make_target(make_layer(kind), name, part) for name, (part, kind) in targets.items()]
    chosen = NetworkOptions(**options).with_arguments(arguments)
    return Network.build(targets, chosen, seed=seed, dtype=torch.float64)


MIXED = {
    "lora_te_a": ("te1", "linear"),
    "lora_unet_b": ("unet", "linear"),
    "lora_unet_c": ("unet", "conv 3x3"),
    "lora_unet_d": ("unet", "layer norm"),
}

# --- building ------------------------------------------------------------------------------


def test_the_table_counts_modules_and_parameters_by_type() -> None:
    network = network_of(MIXED, "dim=2", "train_norm=true")
    assert network.table() == (
        TableRow("te1", "lora", 1, 2 * (12 + 16)),
        TableRow("unet", "lora", 2, 2 * (12 + 16) + 2 * (12 * 9 + 16)),
        TableRow("unet", "norm", 1, 32),
    )
    assert sum(p.numel() for p in network.parameters_of("unet")) == 2 * (12 + 16) + 2 * (12 * 9 + 16) + 32


def test_convolutions_have_their_own_rank_and_alpha() -> None:
    network = network_of(MIXED, "dim=4", "alpha=2", "conv_dim=3", "conv_alpha=1.5")
    found = {name: (layer.dims.rank, layer.alpha) for name, _, layer in network.named()}
    assert found["lora_unet_b"] == (4, 2.0)
    assert found["lora_unet_c"] == (3, 1.5)


def test_conv_dim_0_leaves_kernels_out_and_1x1_in() -> None:
    layers = {"a": ("unet", "conv 1x1"), "b": ("unet", "conv 3x3"), "c": ("unet", "conv 3x1 dilation 2")}
    assert network_of(layers, "conv_dim=0").names == ("a",)


@pytest.mark.parametrize(("arguments", "alpha"), [((), 8.0), (("alpha=0",), 16.0), (("alpha=3",), 3.0)])
def test_alpha_is_half_of_dim_and_0_is_the_rank(arguments: tuple[str, ...], alpha: float) -> None:
    (layer,) = network_of({"a": ("unet", "linear")}, *arguments).adapters
    assert layer.alpha == alpha
    assert layer.dims.scale == alpha / 16


def test_rs_lora_divides_by_the_root_and_the_file_says_so() -> None:
    network = network_of({"a": ("unet", "linear")}, "dim=16", "alpha=8", "rs_lora=true")
    (layer,) = network.adapters
    assert layer.dims.scale == 8 / math.sqrt(16)
    assert float(network.export()["a.alpha"]) / 16 == layer.dims.scale


def test_overrides_give_layers_an_algorithm_of_their_own() -> None:
    targets = [
        make_target(make_layer("linear"), "a"),
        make_target(make_layer("conv 3x3"), "b", overrides={"algo": "lokr", "dim": 1, "factor": 4}),
        make_target(make_layer("conv 3x3"), "c", overrides={"dim": 3, "alpha": 1, "use_tucker": True}),
    ]
    network = network_of(targets, "dim=4", "conv_dim=0", "rs_lora=true")
    labels = {name: (layer.detected.label, layer.dims.rank) for name, _, layer in network.named()}
    # A rank given for a layer is that of its kernel too, as in LyCORIS.
    assert labels == {"a": ("lora", 4), "b": ("lokr", 1), "c": ("lora (cp)", 3)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"algo": "lora", "factor": 4}, "factor does not apply to lora"),
        ({"fctor": 4}, "no network argument is named 'fctor'"),
        ({"algo": "tlora"}, "tlora cannot be trained"),
        ({"algo": "norm"}, "algo is 'norm'"),
    ],
)
def test_bad_overrides(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        network_of([make_target(make_layer("linear"), overrides=overrides)])


def test_what_cannot_be_built_is_named() -> None:
    for arguments, message in (
        (("algo=boft", "dim=4"), "no butterfly"),
        (("algo=dylora", "dim=6"), "dim 6 is not a multiple of block_size 4"),
    ):
        with pytest.raises(IncompatibleError, match=message) as caught:
            network_of({"lora_unet_b": ("unet", "linear without bias")}, *arguments)
        assert caught.value.key == "lora_unet_b"
    with pytest.raises(IncompatibleError, match="pads with circular"):
        make_target(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))
    with pytest.raises(IncompatibleError, match="no layer is left"):
        network_of({"b": ("unet", "conv 3x3")}, "conv_dim=0")
    with pytest.raises(IncompatibleError, match="is a target twice"):
        network_of([make_target(make_layer("linear"), "a"), make_target(make_layer("linear"), "a")])


def test_detach_gives_the_layers_back() -> None:
    layer, x = make_layer("linear"), make_input("linear")
    before = layer(x)
    network, _ = build(layer, {"algo": "lora"})
    train_randomly(network)
    assert relative_error(layer(x), before) > 0.01
    network.detach()
    assert torch.equal(layer(x), before)
    assert "forward" not in vars(layer)


def test_the_seed_and_the_name_make_the_start() -> None:
    def start(seed: int, name: str) -> Tensor:
        return network_of({name: ("unet", "linear")}, seed=seed).raw_state()[f"{name}.lora_down.weight"]

    assert torch.equal(start(1, "a"), start(1, "a"))
    assert not torch.equal(start(1, "a"), start(2, "a"))
    assert not torch.equal(start(1, "a"), start(1, "b"))


# --- groups --------------------------------------------------------------------------------


def test_lora_plus_is_for_the_factors_behind_the_rank() -> None:
    targets = [
        make_target(make_layer("linear"), "lora_te_a", "te1"),
        make_target(make_layer("linear"), "b"),
        make_target(make_layer("linear"), "c", overrides={"algo": "loha"}),
        make_target(make_layer("linear"), "d", overrides={"algo": "lokr", "dim": 1}),
        make_target(make_layer("linear"), "e", overrides={"algo": "glora"}),
    ]
    network = network_of(targets, "loraplus_lr_ratio=16", "loraplus_text_encoder_lr_ratio=4")
    groups = {(g.component, g.lr_ratio): set(g.names) for g in network.parameter_groups()}
    assert groups["unet", 16] == {
        "b.lora_up.weight", "c.hada_w1_a", "c.hada_w2_a", "d.lokr_w2_a", "e.a1.weight", "e.b1.weight",
    }  # fmt: skip
    assert groups["te1", 4] == {"lora_te_a.lora_up.weight"}
    everything = [p for g in network.parameter_groups() for p in g.parameters]
    assert {id(p) for p in everything} == {id(p) for p in network.parameters()}
    assert len(everything) == len(list(network.parameters()))


def test_without_lora_plus_there_is_one_group_a_component() -> None:
    assert [(g.component, g.lr_ratio) for g in network_of(MIXED).parameter_groups()] == [
        ("te1", 1),
        ("unet", 1),
    ]


def test_lora_plus_that_does_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="LoRA\\+ does nothing for unet"):
        network_of({"a": ("unet", "linear")}, "algo=lokr", "full_matrix=true", "loraplus_lr_ratio=4")


# --- dropouts ------------------------------------------------------------------------------

ALGOS = {
    "lora": {"dim": 4}, "loha": {"dim": 2}, "lokr": {"dim": 1}, "ia3": {}, "dylora": {"dim": 4}, "full": {},
    "glora": {"dim": 4}, "diag-oft": {"dim": 4}, "boft": {"dim": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["dropout", "rank_dropout", "module_dropout"])
@pytest.mark.parametrize("layer_name", ["linear", "conv 3x3"])
@pytest.mark.parametrize("algo", ALGOS)
def test_dropouts_drop_in_training_alone(algo: str, layer_name: str, kind: str) -> None:
    layer, x = make_layer(layer_name), make_input(layer_name)
    unchanged = layer(x)
    network, _ = build(layer, {"algo": algo, **ALGOS[algo], kind: 0.5})
    train_randomly(network)
    network.eval()
    whole = layer(x)
    network.train()
    steps = []
    for step in range(12):
        network.draw(step)
        steps.append(layer(x))
        network.draw(step)
        assert torch.equal(layer(x), steps[-1])  # a step is what it is
    assert any(relative_error(y, whole) > 0.01 for y in steps)
    assert len({float(y.detach().sum()) for y in steps}) > 1
    network.eval()
    assert torch.equal(layer(x), whole)
    if kind == "module_dropout" and algo != "dylora":
        for y in steps:
            dropped = relative_error(y, unchanged) < 1e-12
            assert dropped or relative_error(y, whole) < 1e-12


def test_dropout_of_elements_keeps_the_mean() -> None:
    layer = make_layer("linear")
    network, adapter = build(layer, {"algo": "lora", "dropout": 0.3})
    train_randomly(network)
    rows, steps = 500, 10
    x = torch.ones(rows, 12, dtype=torch.float64)
    change = adapter.change(x)
    kept = torch.zeros(16)
    for step in range(steps):
        network.draw(step)
        dropped = layer(x) - type(layer).forward(layer, x)
        is_kept = dropped.abs() > 1e-9
        assert torch.allclose(dropped[is_kept], (change / 0.7)[is_kept])
        kept += is_kept.sum(0)
    # Four standard errors of a binomial share, for each of 16 outputs.
    error = 4 * math.sqrt(0.3 * 0.7 / (rows * steps))
    assert float((kept / (rows * steps) - 0.7).abs().max()) < error


def test_elements_are_dropped_independently() -> None:
    """Within an output, between layers and between steps."""
    layers = dict.fromkeys("ab", ("unet", "linear"))
    network = network_of(layers, "dropout=0.5")
    train_randomly(network)
    x = torch.ones(64, 50, 12, dtype=torch.float64)
    masks = []
    for step in (0, 1):
        network.draw(step)
        for adapter in network.adapters:
            changed = adapter(x) - adapter.original.__class__.forward(adapter.original, x)
            masks.append((changed.abs() > 1e-9).double().flatten() - 0.5)
    count = masks[0].numel()
    for i, left in enumerate(masks):
        assert abs(float(left.mean())) < 4 * 0.5 / math.sqrt(count)
        for shift in (1, 16, 800):  # neighbours in a row, a column, a batch
            assert abs(float((left * left.roll(shift)).mean())) < 4 * 0.25 / math.sqrt(count)
        for right in masks[:i]:
            assert abs(float((left * right).mean())) < 4 * 0.25 / math.sqrt(count)


@pytest.mark.parametrize("scaled", [False, True])
def test_rank_dropout_drops_ranks_of_lora(scaled: bool) -> None:
    layer = make_layer("linear")
    arguments: dict[str, object] = {"algo": "lora", "dim": 8, "rank_dropout": 0.4}
    network, adapter = build(layer, arguments | ({"rank_dropout_scale": True} if scaled else {}))
    train_randomly(network)
    x = make_input("linear")
    shares = []
    for step in range(200):
        network.draw(step)
        mask = adapter.masks["rank lora_up.weight"]
        kept = mask > 0
        shares.append(float(kept.double().mean()))
        up = adapter.parameter("lora_up.weight")[:, kept]
        down = adapter.parameter("lora_down.weight")[kept]
        scale = adapter.dims.scale / (max(shares[-1], 1 / 8) if scaled else 1)
        assert torch.allclose(adapter.change(x), scale * x @ down.T @ up.T)
    # Four standard errors of a binomial share over 200 · 8 draws.
    assert abs(sum(shares) / len(shares) - 0.6) < 4 * math.sqrt(0.24 / 1600)


def test_rank_dropout_drops_rows_where_there_are_no_ranks() -> None:
    layer = make_layer("linear")
    network, adapter = build(layer, {"algo": "full", "rank_dropout": 0.5})
    train_randomly(network)
    network.draw(0)
    x = make_input("linear")
    changed = (layer(x) - type(layer).forward(layer, x)).flatten(0, -2).abs().amax(0) > 1e-12
    assert torch.equal(changed, adapter.masks["rows"] > 0)
    assert 0 < int(changed.sum()) < 16


def test_rows_are_dropped_below_dora() -> None:
    layer = make_layer("linear")
    network, adapter = build(layer, {"algo": "loha", "dim": 2, "dora_wd": True, "rank_dropout": 0.5})
    train_randomly(network)
    network.draw(0)
    rows = adapter.masks["rows"][:, None]
    v = adapter.base_weight + rows * adapter.inner_change()
    expected = adapter.parameter("dora_scale") * v / v.norm(dim=1, keepdim=True)
    assert torch.allclose(adapter.base_weight + adapter.weight_change(), expected)


def test_a_step_that_was_not_drawn_is_an_error() -> None:
    layer = make_layer("linear")
    build(layer, {"algo": "lora", "module_dropout": 0.5})
    with pytest.raises(RuntimeError, match=r"Network\.draw"):
        layer(make_input("linear"))


# --- scale_weight_norms --------------------------------------------------------------------


def sd_scripts_max_norm(
    up: Tensor, down: Tensor, scale: float, value: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One LoRA module, as sd-scripts computes it."""
    norm = (up @ down * scale).norm().clamp(min=value / 2)
    ratio = norm.clamp(max=value) / norm
    return up * ratio**0.5, down * ratio**0.5, (up @ down * scale).norm() * ratio


@pytest.mark.parametrize("value", [0.5, 1000.0])
def test_max_norm_is_sd_scripts(value: float) -> None:
    network = network_of({"a": ("unet", "linear"), "b": ("te1", "linear without bias")}, "dim=3")
    train_randomly(network)
    expected = {}
    norms = []
    for name, _, layer in network.named():
        up, down = (layer.parameter(f"lora_{side}.weight").detach().clone() for side in ("up", "down"))
        up, down, norm = sd_scripts_max_norm(up, down, layer.dims.scale, value)
        expected |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        norms.append(norm)

    found = network.max_norm(value)

    for key, tensor in network.raw_state().items():
        assert torch.allclose(tensor, expected[key], rtol=1e-12, atol=0)
    assert int(found.count) == (2 if value < 1 else 0)
    assert torch.isclose(found.mean, sum(norms, torch.zeros(())) / 2, rtol=1e-12)
    assert torch.isclose(found.largest, max(norms), rtol=1e-12)


@pytest.mark.parametrize(
    ("algo", "extra"),
    [
        *((algo, {}) for algo in ALGOS if "oft" not in algo),
        *(
            (algo, {name: True})
            for algo in ALGOS
            for name in ("use_conv_cp", "dora_wd", "use_scalar")
            if name in training_of(algo).arguments
        ),
    ],
)
def test_max_norm_bounds_every_change(algo: str, extra: dict[str, object]) -> None:
    network, adapter = build(make_layer("conv 3x3"), {"algo": algo, **ALGOS[algo], **extra})
    train_randomly(network)
    network.draw(0)
    network.eval()
    before = adapter.inner_change().detach().clone()
    value = 0.3 * float(before.norm())
    network.max_norm(value)
    after = adapter.inner_change()
    assert torch.allclose(after, 0.3 * before)  # the direction stays
    state = {key: tensor.clone() for key, tensor in network.raw_state().items()}
    network.max_norm(value * 1.01)
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.raw_state().items())


@pytest.mark.parametrize("algo", ["diag-oft", "boft"])
def test_max_norm_of_rotations_is_that_of_their_blocks(algo: str) -> None:
    network, adapter = build(make_layer("linear"), {"algo": algo, "dim": 4})
    train_randomly(network)
    network.max_norm(0.1)
    assert torch.isclose(adapter.parameter("oft_blocks").norm(), torch.tensor(0.1, dtype=torch.float64))


# --- state and file ------------------------------------------------------------------------


def test_a_state_of_another_network_is_refused() -> None:
    network = network_of({"a": ("unet", "linear")}, "dim=4")
    with pytest.raises(IncompatibleError) as caught:
        network.load_raw_state(
            {**network_of({"a": ("unet", "linear")}, "dim=2").raw_state(), "b.c": torch.ones(1)}
        )
    assert len(caught.value.details) == 3
    assert "a.lora_down.weight: has shape [2, 12], expected [4, 12]" in caught.value.details


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_export_casts_everything_but_an_inexact_alpha(dtype: torch.dtype) -> None:
    saved = network_of({"a": ("unet", "linear")}, "dim=8", "alpha=4", "rs_lora=true").export(dtype)
    assert {t.dtype for key, t in saved.items() if not key.endswith("alpha")} == {dtype}
    # 4·√8 needs more than the bits of float16 and bfloat16.
    assert saved["a.alpha"].dtype == torch.float32
    assert float(saved["a.alpha"]) == pytest.approx(4 * math.sqrt(8), rel=1e-7)
    plain = network_of({"a": ("unet", "linear")}, "dim=8", "alpha=4").export(dtype)
    assert plain["a.alpha"].dtype == dtype


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (math.nan, None, "NaN"),
        (1e6, torch.float16, "overflows float16"),
        (math.inf, torch.bfloat16, "infinite"),
    ],
)
def test_export_refuses_what_a_file_may_not_have(
    value: float, dtype: torch.dtype | None, message: str
) -> None:
    network = network_of({"a": ("unet", "linear")})
    network.raw_state()["a.lora_up.weight"][0, 0] = value
    with pytest.raises(NumericError, match=message) as caught:
        network.export(dtype)
    assert caught.value.key == "a.lora_up.weight"


def test_export_is_a_copy() -> None:
    network = network_of({NAME: ("unet", "linear")})
    saved = network.export()
    network.raw_state()[f"{NAME}.lora_down.weight"].zero_()
    assert saved[f"{NAME}.lora_down.weight"].any()
