"""Every LyCORIS module: what its forward pass does is what lycotool reads from its file.

The forward pass in evaluation mode is the truth, because training optimised it. LyCORIS'
own merge functions and loaders are not used: several are wrong (scale applied twice for
LoHa and LoKr, (IA)³ and many LoKr files not loadable, DoRA on the input axis neither).

Not tested, because LyCORIS itself is inconsistent there: GLoRA with rs_lora (trains with
alpha/√rank, saves alpha), LoKr with two whole factors and rs_lora (trains with √rank, which
no reader of the file can know), T-LoRA on kernels above 1x1 and away from its default
initialisation (the file lacks what is needed), LayerNorm without bias (forward fails).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules import dylora
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
from lycoris.modules.tlora import TLoraModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lycotool.algorithms.base import Reading
from lycotool.algorithms.lokr import LOKR
from oracles.support import (
    assert_near,
    bake,
    effective,
    effective_norm,
    evaluate,
    randomise,
    randomise_base,
)

NAME = "lora_unet_layer"

# In roundings of the largest element of W'; measured errors are at most a quarter of each.
#
# Both programs add up to 64 products per element, in different orders. Errors of such sums
# grow like the square root: √64 times half a unit on either side.
SUMS = 8
# Up to three rotations in a row, one of the two programs with an explicit float32 inverse of
# I - Q, whose condition number is below 2 here.
ROTATIONS = 16
# LyCORIS subtracts a float32 singular value decomposition of W. Its error is multiplied by
# the largest singular value over the gap at the cut, below 50 for these weights.
DECOMPOSITION = 128

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": partial(nn.Linear, 20, 12),
    "wide linear": partial(nn.Linear, 48, 64),
    "linear without bias": partial(nn.Linear, 12, 24, bias=False),
    "conv 1x1": partial(nn.Conv2d, 12, 16, 1),
    "conv 3x3": partial(nn.Conv2d, 12, 16, 3, padding=1),
    "wide conv 3x3": partial(nn.Conv2d, 24, 32, 3, padding=1),
    "conv 3x1 stride 2": partial(nn.Conv2d, 12, 16, (3, 1), stride=2, padding=(1, 0), bias=False),
    "conv 3x3 dilation 2": partial(nn.Conv2d, 12, 16, 3, dilation=2),
    "conv 3x3 groups 2": partial(nn.Conv2d, 16, 16, 3, padding=1, groups=2),
    "conv1d": partial(nn.Conv1d, 12, 16, 3, padding=1),
    "conv3d": partial(nn.Conv3d, 6, 8, (2, 3, 1), padding=(1, 1, 0)),
    "layer norm": partial(nn.LayerNorm, 16),
    "group norm": partial(nn.GroupNorm, 4, 16),
}
LINEAR = ("linear", "linear without bias")
KERNELS = ("conv 3x3", "conv 3x1 stride 2", "conv 3x3 dilation 2", "conv1d", "conv3d")
CONVOLUTIONS = ("conv 1x1", *KERNELS)
GROUPED = "conv 3x3 groups 2"


@dataclass(frozen=True)
class Case:
    """A LyCORIS module over a layer, and what lycotool should take it for."""

    module: type[LycorisBaseModule]
    layer: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    roundings: float = SUMS

    @property
    def id(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.label} / {self.layer} / {options}"


def _with_dora(module: type[LycorisBaseModule], name: str, **common: Any) -> Iterator[Case]:
    """The algorithms that share LoRA's options."""
    for layer in (*LINEAR, *CONVOLUTIONS, GROUPED):
        yield Case(module, layer, name, common)
    for layer in ("linear", "conv 1x1", "conv 3x3"):
        yield Case(module, layer, name, {**common, "rs_lora": True})
    for layer in (*KERNELS, GROUPED):
        # Where a kernel has an axis of length 1, torch.kron refuses the strides of LyCORIS' core.
        if module is not LokrModule or layer not in ("conv 3x1 stride 2", "conv3d"):
            yield Case(module, layer, f"{name} (cp)", {**common, "use_tucker": True})
    # The switch for CP does nothing on 1x1 kernels.
    yield Case(module, "conv 1x1", name, {**common, "use_tucker": True})
    for axis, on_output in (("out", True), ("in", False)):
        dora = {**common, "weight_decompose": True, "wd_on_out": on_output}
        for layer in ("linear", "conv 1x1", "conv 3x3", "conv1d", "conv3d"):
            yield Case(module, layer, f"{name} + dora ({axis})", dora)
        yield Case(module, "conv 3x3", f"{name} (cp) + dora ({axis})", {**dora, "use_tucker": True})


def _lokr() -> Iterator[Case]:
    for options in (
        {"lora_dim": 2},
        {"lora_dim": 2, "decompose_both": True},
        {"lora_dim": 2, "factor": 4},
        {"lora_dim": 2, "factor": 4, "unbalanced_factorization": True},
        {"lora_dim": 5, "factor": 8},
        {"lora_dim": 3, "factor": 16, "decompose_both": True},
        {"lora_dim": 64},  # too large to decompose: both factors whole, alpha ignored
        {"full_matrix": True},
    ):
        for layer in ("wide linear", "wide conv 3x3", "conv 1x1"):
            yield Case(LokrModule, layer, "lokr", {"alpha": 1.5, **options})
    both = {"alpha": 1.5, "decompose_both": True}
    yield Case(LokrModule, "wide conv 3x3", "lokr (cp)", {**both, "lora_dim": 1, "use_tucker": True})
    # Only where the first factor is the larger one is it decomposed and the second whole.
    first = {**both, "factor": 2, "unbalanced_factorization": True}
    for layer, rank in (("wide linear", 13), ("wide conv 3x3", 7), ("conv 1x1", 3)):
        yield Case(LokrModule, layer, "lokr", {**first, "lora_dim": rank})


def _orthogonal(module: type[LycorisBaseModule], name: str, layers: tuple[str, ...]) -> Iterator[Case]:
    for layer in layers:
        yield Case(module, layer, name, {"lora_dim": 4}, ROTATIONS)
    for layer in layers[:2]:
        yield Case(module, layer, name, {"lora_dim": 4, "rescaled": True}, ROTATIONS)
        # 0.01 · out binds (the norm of Q is above 1), 100 · out does not.
        yield Case(module, layer, name, {"lora_dim": 4, "constraint": 0.01}, ROTATIONS)
        yield Case(module, layer, name, {"lora_dim": 4, "constraint": 100}, ROTATIONS)
        both = {"lora_dim": 4, "constraint": 0.02, "rescaled": True}
        yield Case(module, layer, name, both, ROTATIONS)
    yield Case(module, layers[0], name, {"lora_dim": 2}, ROTATIONS)


CASES = [
    *_with_dora(LoConModule, "lora", lora_dim=4, alpha=2.5),
    Case(LoConModule, "linear", "lora", {"lora_dim": 16, "alpha": 0}),  # rank above the width
    *_with_dora(LohaModule, "loha", lora_dim=3, alpha=1.5),
    *_with_dora(LokrModule, "lokr", lora_dim=1, alpha=0.75),
    *_lokr(),
    *(
        Case(IA3Module, layer, "ia3", {"train_on_input": on_input})
        for layer in (*LINEAR, *CONVOLUTIONS)
        for on_input in (False, True)
    ),
    *(Case(FullModule, layer, "full") for layer in (*LINEAR, *CONVOLUTIONS, GROUPED)),
    *(Case(NormModule, layer, "norm") for layer in ("layer norm", "group norm")),
    *(Case(GLoRAModule, layer, "glora", {"lora_dim": 3, "alpha": 1.5}) for layer in (*LINEAR, *CONVOLUTIONS)),
    # A rank above the width, as any rank above 4 has on SD's conv_in. The shapes of b1 and b2
    # still tell LyCORIS' two layouts apart, for the layers are not square.
    *(
        Case(GLoRAModule, layer, "glora", {"lora_dim": 24, "alpha": 1.5})
        for layer in ("linear", "conv 1x1", "conv 3x3")
    ),
    *_orthogonal(DiagOFTModule, "diag-oft", ("linear", "conv 3x3", "conv 1x1", "conv1d", "conv3d")),
    *_orthogonal(ButterflyOFTModule, "boft", ("wide linear", "conv 3x3", "conv 1x1", "conv1d", "conv3d")),
    *(
        Case(TLoraModule, layer, "tlora", {"lora_dim": rank, "alpha": 1.5}, DECOMPOSITION)
        for layer in ("linear", "linear without bias", "conv 1x1")
        for rank in (2, 5)
    ),
    # A rank above the width: LyCORIS pads the decomposition of the base with zeros.
    Case(TLoraModule, "linear", "tlora", {"lora_dim": 14, "alpha": 7}, DECOMPOSITION),
]


@dataclass(frozen=True)
class Trained:
    """A LyCORIS module with random parameters over a random layer."""

    layer: nn.Module
    module: LycorisBaseModule
    weight: Tensor
    bias: Tensor | None

    @property
    def saved(self) -> dict[str, Tensor]:
        """The tensors that LyCORIS' network would save."""
        return {
            key: tensor.detach().clone() for key, tensor in self.module.state_dict(prefix=f"{NAME}.").items()
        }

    def result(self) -> tuple[Tensor, Tensor]:
        """Weight and bias that the layer's output shows."""
        read = effective_norm if isinstance(self.layer, nn.LayerNorm | nn.GroupNorm) else effective
        return read(self.layer.forward, self.layer)


def train(case: Case, *, multiplier: float = 1.0) -> Trained:
    layer = LAYERS[case.layer]()
    randomise_base(layer, seed=1)
    weight = layer.weight.detach().clone()
    bias = None if layer.bias is None else layer.bias.detach().clone()
    module = case.module(NAME, layer, multiplier=multiplier, **case.options).eval()
    # `full` reads its difference only while it is applied; the others do not mind.
    module.apply_to()
    # Products of three to five factors need larger ones to be seen beside the weight.
    randomise(module, seed=2, std=0.7 if case.module in (LohaModule, LokrModule) else 0.3)
    if isinstance(module, FullModule):
        # Its parameter is the changed weight.
        module.weight.data.add_(weight)
    return Trained(layer, module, weight, bias)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_forward_pass(case: Case) -> None:
    trained = train(case)
    weight, bias = trained.result()
    change, bias_change, detected = evaluate(trained.saved, trained.weight)
    assert detected.label == case.label
    assert (weight - trained.weight).norm() > 0.02 * trained.weight.norm()  # there is something to test
    assert_near(trained.weight + change, weight, case.roundings)
    before = torch.zeros_like(bias) if trained.bias is None else trained.bias
    assert_near(before if bias_change is None else before + bias_change, bias, case.roundings)


def test_every_lokr_layout_is_there() -> None:
    found = {
        evaluate(trained.saved, trained.weight)[2].layout.name
        for trained in (train(case) for case in CASES if case.module is LokrModule)
    }
    assert found == {layout.name for layout in LOKR.layouts}


#: Algorithms whose module follows a strength the way lycotool defines it, and DoRA, whose
#: other way `--dora-strength lycoris` reproduces. BOFT interpolates every stage instead.
STRENGTHS = [
    Case(LoConModule, "conv 3x3", "lora (cp)", {"lora_dim": 4, "alpha": 2.5, "use_tucker": True}),
    Case(LohaModule, "linear", "loha", {"lora_dim": 3, "alpha": 1.5}),
    Case(LokrModule, "wide linear", "lokr", {"lora_dim": 2, "alpha": 1.5}),
    Case(IA3Module, "conv 1x1", "ia3"),
    Case(FullModule, "linear", "full"),
    Case(NormModule, "group norm", "norm"),
    Case(GLoRAModule, "conv 3x3", "glora", {"lora_dim": 3, "alpha": 1.5}),
    Case(TLoraModule, "linear", "tlora", {"lora_dim": 3, "alpha": 1.5}, DECOMPOSITION),
    Case(DiagOFTModule, "conv 3x3", "diag-oft", {"lora_dim": 4, "constraint": 0.02}, ROTATIONS),
    *(
        Case(module, "conv 3x3", f"{name} + dora ({axis})",
             {"lora_dim": 3, "alpha": 1.5, "weight_decompose": True, "wd_on_out": axis == "out"})
        for module, name in ((LoConModule, "lora"), (LohaModule, "loha"), (LokrModule, "lokr"))
        for axis in ("out", "in")
    ),
]  # fmt: skip


@pytest.mark.parametrize("strength", [0.6, -1.0])
@pytest.mark.parametrize("case", STRENGTHS, ids=lambda case: case.id)
def test_strength(case: Case, strength: float) -> None:
    trained = train(case, multiplier=strength)
    weight, _ = trained.result()
    change, _, _ = evaluate(
        trained.saved, trained.weight, strength=strength, reading=Reading(dora_strength="lycoris")
    )
    assert_near(trained.weight + change, weight, case.roundings)


@pytest.mark.parametrize("layer", ["linear", "conv 1x1", "conv 3x3", "conv1d", "conv3d"])
@pytest.mark.parametrize("rank", range(1, 7))
def test_dylora_at_every_rank(layer: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rows of a DyLoRA file are a LoRA by themselves, with the alpha of the file."""
    trained = train(Case(DyLoraModule, layer, "lora", {"lora_dim": 6, "alpha": 2.5, "block_size": 1}))
    # The module draws the rank of each forward pass, also in evaluation mode.
    monkeypatch.setattr(dylora.random, "randint", lambda low, high: rank - 1)
    weight, _ = trained.result()
    saved = trained.saved
    saved[f"{NAME}.lora_up.weight"] = saved[f"{NAME}.lora_up.weight"][:, :rank]
    saved[f"{NAME}.lora_down.weight"] = saved[f"{NAME}.lora_down.weight"][:rank]
    change, _, _ = evaluate(saved, trained.weight)
    assert_near(trained.weight + change, weight, SUMS)


def test_dylora_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """LyCORIS divides alpha by the number of blocks, which is not in the file."""
    trained = train(Case(DyLoraModule, "linear", "lora", {"lora_dim": 6, "alpha": 2.5, "block_size": 2}))
    monkeypatch.setattr(dylora.random, "randint", lambda low, high: high)
    weight, _ = trained.result()
    change, _, _ = evaluate(trained.saved, trained.weight, reading=Reading(dylora_block_size=2))
    assert_near(trained.weight + change, weight, SUMS)


#: One case of each algorithm, through files: alpha and constraint are exact in both formats.
SAVED = [
    Case(LoConModule, "linear", "lora", {"lora_dim": 4, "alpha": 2.5}),
    Case(LoConModule, "conv 3x3", "lora", {"lora_dim": 4, "alpha": 2.5, "use_tucker": True}),
    Case(LoConModule, "conv 3x3", "lora", {"lora_dim": 4, "alpha": 2.5, "weight_decompose": True}),
    Case(LohaModule, "conv 1x1", "loha", {"lora_dim": 3, "alpha": 1.5}),
    Case(LokrModule, "wide linear", "lokr", {"lora_dim": 2, "alpha": 1.5, "decompose_both": True}),
    Case(IA3Module, "linear", "ia3", {"train_on_input": True}),
    Case(NormModule, "layer norm", "norm"),
    Case(GLoRAModule, "conv1d", "glora", {"lora_dim": 3, "alpha": 1.5}),
    Case(DiagOFTModule, "linear", "diag-oft", {"lora_dim": 4, "constraint": 1 / 64}, ROTATIONS),
    Case(ButterflyOFTModule, "conv 3x3", "boft", {"lora_dim": 4, "rescaled": True}, ROTATIONS),
    Case(TLoraModule, "linear", "tlora", {"lora_dim": 2, "alpha": 1.5}, DECOMPOSITION),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", SAVED, ids=lambda case: case.id)
def test_saved_in_half_precision(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    """Trainers cast all tensors, also alpha and switches; `bake` reads the file."""
    trained = train(case)
    weight, bias = trained.result()
    adapter, checkpoint, output = (tmp_path / f"{name}.safetensors" for name in ("adapter", "base", "baked"))
    save_file({key: tensor.to(dtype) for key, tensor in trained.saved.items()}, adapter)
    prefix = "model.diffusion_model.layer"
    save_file({f"{prefix}.weight": trained.weight, f"{prefix}.bias": trained.bias}, checkpoint)
    bake(checkpoint, adapter, output)
    baked = load_file(output)
    assert_near(baked[f"{prefix}.weight"], weight, case.roundings)
    assert_near(baked[f"{prefix}.bias"], bias, case.roundings)
