"""Every algorithm in training: outputs and all gradients are LyCORIS', in float64.

The same parameters in both modules, the same input and the same gradient of the output. What
LyCORIS does otherwise by mistake is left out or put right, and named where that is done: the
scale of DyLoRA, rotations that are computed in float32, GLoRA and (IA)³ on grouped
convolutions, and LoKr with two whole factors and rs_lora.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lycoris.modules import dylora, get_module, make_module
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from makers.layers import (
    CONVOLUTIONS,
    LAYERS,
    NAME,
    NORMS,
    build,
    make_input,
    make_layer,
    relative_error,
    train_randomly,
    values,
    weight_of,
)
from torch import Tensor, nn

from lycotool.training.adapter import AdapterLayer

# Two orders of the same float64 sums, of at most 16·9 products, and their gradients, of up to
# as many again; measured: at most 1e-14. What the specification asks for.
TOLERANCE = 1e-10

#: Our argument -> LyCORIS' keyword.
KEYWORDS = {
    "dim": "lora_dim",
    "use_conv_cp": "use_tucker",
    "dora_wd": "weight_decompose",
    "wd_on_output": "wd_on_out",
}

MODULES: dict[str, type[LycorisBaseModule]] = {
    "lora": LoConModule, "loha": LohaModule, "lokr": LokrModule, "ia3": IA3Module, "full": FullModule,
    "glora": GLoRAModule, "diag-oft": DiagOFTModule, "boft": ButterflyOFTModule, "dylora": DyLoraModule,
    "norm": NormModule,
}  # fmt: skip

UNGROUPED = ("linear", "linear without bias", *(name for name in CONVOLUTIONS if "groups" not in name))


@dataclass(frozen=True)
class Case:
    """Arguments as both programs understand them, on one layer."""

    algo: str
    layer: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.algo} / {self.layer} / {options}"

    @property
    def ours(self) -> dict[str, object]:
        # Norms come by themselves.
        return {"algo": "full" if self.algo == "norm" else self.algo, **self.arguments}

    @property
    def theirs(self) -> dict[str, Any]:
        return {KEYWORDS.get(key, key): value for key, value in self.arguments.items()}


def _cases() -> Iterator[Case]:
    for algo, size in (("lora", {"dim": 4, "alpha": 2.5}), ("loha", {"dim": 2, "alpha": 1.5}),
                       ("lokr", {"dim": 1, "alpha": 0.75})):  # fmt: skip
        for layer in (*UNGROUPED, "conv 3x3 groups 2"):
            yield Case(algo, layer, size)
        for layer in ("linear", "conv 3x3"):
            yield Case(algo, layer, {**size, "rs_lora": True})
            yield Case(algo, layer, {**size, "use_scalar": True})
            for on_output in (True, False):
                yield Case(algo, layer, {**size, "dora_wd": True, "wd_on_output": on_output})
        # LyCORIS' LoKr core has strides that torch.kron refuses where an axis is 1.
        for layer in ("conv 3x3 stride 2", *(() if algo == "lokr" else ("conv1d", "conv3d"))):
            yield Case(algo, layer, {**size, "use_conv_cp": True})
        yield Case(algo, "conv 3x3", {**size, "use_conv_cp": True, "dora_wd": True, "wd_on_output": True})
        yield Case(algo, "conv 1x1", {**size, "dora_wd": True, "wd_on_output": False})
    for arguments in (
        {"dim": 1, "decompose_both": True},
        {"dim": 1, "factor": 2, "unbalanced_factorization": True, "decompose_both": True},
        {"dim": 64},
        {"full_matrix": True, "dim": 4},
    ):
        for layer in ("linear", "conv 3x3", "conv 1x1"):
            yield Case("lokr", layer, {"alpha": 1.5, **arguments})
    for layer in UNGROUPED:
        yield Case("glora", layer, {"dim": 3, "alpha": 1.5})
        for on_input in (False, True):
            yield Case("ia3", layer, {"train_on_input": on_input})
    yield Case("glora", "linear", {"dim": 3, "alpha": 1.5, "use_scalar": True})
    yield Case("glora", "conv 3x3", {"dim": 3, "alpha": 1.5, "rs_lora": True})
    for layer in (*UNGROUPED, "conv 3x3 groups 2"):
        yield Case("full", layer)
        for algo in ("diag-oft", "boft"):
            # 12 rows have no butterfly with blocks below 6.
            yield Case(algo, layer, {"dim": 6 if LAYERS[layer]().weight.shape[0] == 12 else 4})
    for algo in ("diag-oft", "boft"):
        for layer in ("linear", "conv 3x3"):
            yield Case(algo, layer, {"dim": 4, "rescaled": True})
            yield Case(algo, layer, {"dim": 4, "constraint": 0.01})
            yield Case(algo, layer, {"dim": 4, "constraint": 1e6, "rescaled": True})
    for layer in NORMS:
        yield Case("norm", layer)


CASES = list(_cases())


@pytest.fixture(autouse=True)
def float64_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """LyCORIS computes rotations after `.float()`; here that keeps float64."""
    to_float = Tensor.float

    def keep(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else to_float(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "float", keep)


def their_module(case: Case, layer: nn.Module) -> LycorisBaseModule:
    module = MODULES[case.algo](NAME, layer, multiplier=1.0, **case.theirs).double()
    module.apply_to()
    return module


@torch.no_grad()
def copy_parameters(case: Case, ours: AdapterLayer, theirs: LycorisBaseModule, layer: nn.Module) -> None:
    own = dict(theirs.named_parameters())
    for slot, parameter in ours.trained():
        if case.algo == "full":  # keeps the changed weight, not the change
            own["weight" if slot == "diff" else "bias"].copy_(
                parameter + (ours.base_weight if slot == "diff" else layer_bias(ours))
            )
        else:
            own[slot].copy_(parameter)


def layer_bias(adapter: AdapterLayer) -> Tensor:
    bias = adapter.original.bias
    assert isinstance(bias, Tensor)
    return bias.detach()


def gradients(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the input under a fixed gradient of the output."""
    x = x.clone().requires_grad_(True)
    y = layer(x)
    y.backward(values("gradient", tuple(y.shape)))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("form", ["structured", "fused"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_output_and_gradients(case: Case, form: str) -> None:
    x = make_input(case.layer)
    layer, reference = make_layer(case.layer), make_layer(case.layer)
    network, adapter = build(layer, {**case.ours, "bypass_mode": form == "structured"})
    train_randomly(network)
    if "constraint" in case.arguments:
        with torch.no_grad():  # LyCORIS adds 1e-8 to the norm: far below 1e-10 of a large one
            adapter.parameter("oft_blocks").mul_(1e4)
    theirs = their_module(case, reference)
    copy_parameters(case, adapter, theirs, reference)
    unchanged = make_layer(case.layer)(x)

    y, dx = gradients(layer, x)
    expected, expected_dx = gradients(reference, x)

    assert relative_error(unchanged, expected) > 0.01  # there is something to test
    assert relative_error(y, expected) < TOLERANCE
    assert relative_error(dx, expected_dx) < TOLERANCE
    own = dict(theirs.named_parameters())
    names = {"diff": "weight", "diff_b": "bias"} if case.algo == "full" else {}
    trained = dict(adapter.trained())
    assert {names.get(slot, slot) for slot in trained} == own.keys()
    for slot, parameter in trained.items():
        gradient = own[names.get(slot, slot)].grad
        assert parameter.grad is not None
        assert gradient is not None
        assert relative_error(parameter.grad, gradient) < TOLERANCE, slot


@pytest.mark.parametrize("form", ["structured", "fused"])
@pytest.mark.parametrize("layer_name", ["linear", "conv 3x3"])
@pytest.mark.parametrize("step", range(6))
def test_dylora_blocks(step: int, layer_name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LyCORIS' scale is alpha over the blocks in use, which no file tells; ours is alpha/dim."""
    case = Case("dylora", layer_name, {"dim": 6, "alpha": 3.0, "block_size": 2})
    x = make_input(layer_name)
    layer, reference = make_layer(layer_name), make_layer(layer_name)
    network, adapter = build(layer, {**case.ours, "bypass_mode": form == "structured"})
    train_randomly(network)
    network.draw(step)
    block = int(adapter.masks["live"].argmax()) // 2
    theirs = MODULES["dylora"](
        NAME, reference, lora_dim=6, alpha=3.0 * (block + 1) / 6, block_size=2
    ).double()
    theirs.apply_to()
    assert isinstance(theirs, DyLoraModule)
    with torch.no_grad():
        for index in range(3):
            ranks = slice(2 * index, 2 * index + 2)
            theirs.up_list[index].copy_(adapter.parameter("lora_up.weight").flatten(1)[:, ranks])
            theirs.down_list[index].copy_(adapter.parameter("lora_down.weight").flatten(1)[ranks])
    monkeypatch.setattr(dylora.random, "randint", lambda low, high: block)

    y, dx = gradients(layer, x)
    expected, expected_dx = gradients(reference, x)

    assert relative_error(y, expected) < TOLERANCE
    assert relative_error(dx, expected_dx) < TOLERANCE
    up, down = (adapter.parameter(f"lora_{side}.weight").grad for side in ("up", "down"))
    assert up is not None
    assert down is not None
    for index in range(3):
        ranks = slice(2 * index, 2 * index + 2)
        for found, wanted in (
            (up.flatten(1)[:, ranks], theirs.up_list[index].grad),
            (down.flatten(1)[ranks], theirs.down_list[index].grad),
        ):
            if index == block:
                assert relative_error(found, wanted) < TOLERANCE
            else:  # held still, or not in use
                assert wanted is None
                assert not found.any()


def test_every_block_of_dylora_has_its_turn() -> None:
    network, adapter = build(make_layer("linear"), {"algo": "dylora", "dim": 6, "block_size": 2})
    found = set()
    for step in range(40):
        network.draw(step)
        found.add(int(adapter.masks["live"].argmax()) // 2)
    assert found == {0, 1, 2}


# --- where training starts -----------------------------------------------------------------

#: Large enough for the deviation of a slot to be known to 5 %: 1000 values and more.
WIDE: dict[str, nn.Module] = {
    "linear": nn.Linear(240, 160), "conv 3x3": nn.Conv2d(48, 64, 3), "layer norm": nn.LayerNorm(64),
}  # fmt: skip

STARTS = [
    Case("lora", "linear", {"dim": 8}),
    Case("lora", "conv 3x3", {"dim": 16, "use_conv_cp": True}),
    Case("lora", "conv 3x3", {"dim": 16, "use_scalar": True}),
    Case("loha", "linear", {"dim": 8}),
    Case("loha", "conv 3x3", {"dim": 16, "use_conv_cp": True}),
    Case("loha", "linear", {"dim": 8, "use_scalar": True}),
    Case("lokr", "linear", {"dim": 4, "factor": 4, "decompose_both": True}),
    Case("lokr", "linear", {"dim": 4, "use_scalar": True}),
    Case("lokr", "conv 3x3", {"dim": 2, "use_conv_cp": True}),
    Case("lokr", "conv 3x3", {"full_matrix": True}),
    Case("glora", "conv 3x3", {"dim": 16}),
    Case("glora", "linear", {"dim": 8, "use_scalar": True}),
    Case("ia3", "conv 3x3"),
    Case("full", "linear"),
    Case("norm", "layer norm"),
    Case("diag-oft", "linear", {"dim": 8, "rescaled": True}),
    Case("boft", "conv 3x3", {"dim": 8}),
    Case("lora", "linear", {"dim": 8, "dora_wd": True}),
    Case("lora", "conv 3x3", {"dim": 8, "dora_wd": True, "wd_on_output": False}),
]


@pytest.mark.parametrize("case", STARTS, ids=lambda case: case.id)
def test_shapes_and_initial_values(case: Case) -> None:
    layer = WIDE[case.layer]
    network, adapter = build(layer, case.ours, dtype=torch.float32)
    network.detach()
    theirs = MODULES[case.algo](NAME, layer, **case.theirs)
    names = {"diff": "weight", "diff_b": "bias"} if case.algo == "full" else {}
    trained = {names.get(slot, slot): parameter.detach() for slot, parameter in adapter.trained()}
    expected = {slot: parameter.detach() for slot, parameter in theirs.named_parameters()}
    if "dora_wd" in case.arguments:
        assert relative_error(trained.pop("dora_scale"), expected.pop("dora_scale")) < 1e-6  # float32 norms
    assert trained.keys() == expected.keys()
    for slot, wanted in expected.items():
        found = trained[slot]
        assert found.shape == wanted.shape
        if wanted.numel() < 2 or float(wanted.std()) == 0:
            assert torch.equal(found, wanted), slot
            continue
        # Two samples: four standard errors of either deviation, √(2/n) of it at most.
        error = 4 * (2 / wanted.numel()) ** 0.5
        assert abs(float(found.std() / wanted.std()) - 1) < error, slot
        # Uniform values keep within their bound, normal ones of this number do not.
        is_uniform = [float(values.abs().max() / values.std()) < 2 for values in (found, wanted)]
        assert is_uniform[0] == is_uniform[1] or wanted.numel() < 64, slot
        assert abs(float(found.mean())) < error * float(wanted.std())


# --- files ---------------------------------------------------------------------------------

#: What LyCORIS can load: not (IA)³, DoRA on the input, CP or unbalanced LoKr.
FILES = [
    Case("lora", "linear", {"dim": 4, "alpha": 2.5}),
    Case("lora", "linear", {"dim": 4, "alpha": 2.5, "rs_lora": True}),
    Case("lora", "conv 3x3 stride 2", {"dim": 4, "alpha": 2.5, "use_scalar": True}),
    Case("lora", "conv 3x3", {"dim": 4, "use_conv_cp": True}),
    Case("lora", "conv 3x3", {"dim": 4, "dora_wd": True}),
    Case("dylora", "conv 1x1", {"dim": 4, "alpha": 3}),
    Case("dylora", "conv 3x3", {"dim": 4, "alpha": 3}),
    Case("loha", "linear", {"dim": 3, "use_scalar": True}),
    Case("loha", "conv 3x3", {"dim": 2, "use_conv_cp": True}),
    Case("loha", "conv 1x1", {"dim": 2, "dora_wd": True}),
    Case("lokr", "linear", {"dim": 1, "alpha": 0.5}),
    Case("lokr", "conv 3x3", {"dim": 1, "decompose_both": True}),
    Case("lokr", "conv 3x3", {"full_matrix": True}),
    Case("full", "linear"),
    Case("full", "conv 3x3"),
    Case("norm", "group norm"),
    Case("glora", "linear", {"dim": 3, "use_scalar": True}),
    Case("glora", "conv 3x3", {"dim": 3}),
    Case("diag-oft", "linear", {"dim": 4, "rescaled": True}),
    Case("diag-oft", "conv 3x3", {"dim": 4, "constraint": 0.02}),
    Case("boft", "conv 3x3", {"dim": 4}),
]


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.id)
def test_lycoris_loads_what_is_saved(case: Case) -> None:
    x = make_input(case.layer, torch.float32)
    layer, reference = (make_layer(case.layer, torch.float32) for _ in range(2))
    network, _ = build(layer, case.ours, dtype=torch.float32)
    train_randomly(network)
    saved = network.eval().export()

    with torch.no_grad():
        kind, tensors = get_module(saved, NAME)
        loaded = make_module(kind, tensors, NAME, reference).eval()
        loaded.apply_to()
        expected, found = reference(x), layer(x)

    assert relative_error(make_layer(case.layer, torch.float32)(x), expected) > 0.01
    # float32 sums of up to 24·9 products in two orders, and one rotation solved in float32.
    assert relative_error(found, expected) < 64 * torch.finfo(torch.float32).eps
    assert weight_of(layer).dtype == torch.float32
