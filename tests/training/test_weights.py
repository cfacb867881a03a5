"""Starting from an adapter file, of every form that can be trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conformance.trained import Case, cases
from makers.layers import make_input, make_layer, make_target, relative_error, train_randomly
from safetensors.torch import save_file
from torch import Tensor, nn

from lycotool.errors import IncompatibleError
from lycotool.ops._network_weights import load_network_weights
from lycotool.training.network import Network
from lycotool.training.network_options import NetworkOptions

NAME = "lora_unet_layer"

#: One of each form, and the two of LoKr that only an unbalanced split has.
UNBALANCED = {"decompose_both": True, "factor": 2, "unbalanced_factorization": True}
FORMS = [
    *{
        (case.algo, *sorted(case.arguments.items()), case.layer == "conv 3x3"): case for case in cases()
    }.values(),
    Case("lokr", "conv 3x3", {**UNBALANCED, "dim": 3}),
    Case("lokr", "conv 3x3", {**UNBALANCED, "dim": 1, "use_conv_cp": True}),
]


def start(layer: nn.Module, path: Path, dtype: torch.dtype = torch.float32, **options: object) -> Network:
    chosen = NetworkOptions(network_weights=str(path)).with_arguments(f"{k}={v}" for k, v in options.items())
    weights = load_network_weights(str(path))
    return Network.build([make_target(layer, NAME)], chosen, seed=1, weights=weights, dtype=dtype)


def save(path: Path, tensors: Mapping[str, Tensor], algo: str = "lora") -> Path:
    save_file(dict(tensors), path, {"ss_network_args": f'{{"algo": "{algo}"}}'})
    return path


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_training_goes_on_from_a_file(case: Case, from_file: bool, tmp_path: Path) -> None:
    layer, other = make_layer(case.layer, torch.float32), make_layer(case.layer, torch.float32)
    x = make_input(case.layer, torch.float32)
    network, _ = case.build(layer, torch.float32)
    network.eval()
    train_randomly(network)
    path = save(tmp_path / "a.safetensors", network.export(), case.algo)

    algo = "full" if case.algo == "norm" else case.algo
    own: Mapping[str, object] = {"dim_from_weights": True} if from_file else {"algo": algo, **case.arguments}
    started = start(other, path, **own).eval()

    # The same float32 values; a scalar is folded in, which rounds once.
    assert relative_error(other(x), layer(x)) < 64 * torch.finfo(torch.float32).eps
    assert [row.algo for row in started.table()] == [row.algo for row in network.table()]
    again = started.export()
    assert again.keys() == network.export().keys()
    for (_, _, mine), (_, _, theirs) in zip(started.named(), network.named(), strict=True):
        assert mine.dims == theirs.dims
        assert {slot for slot, _ in mine.trained()} <= {slot for slot, _ in theirs.trained()}


def test_another_alpha_keeps_the_change(tmp_path: Path) -> None:
    case = Case("lora", "linear", {"dim": 4, "alpha": 1})
    layer, other = make_layer("linear", torch.float32), make_layer("linear", torch.float32)
    network, _ = case.build(layer, torch.float32)
    train_randomly(network)
    path = save(tmp_path / "a.safetensors", network.export())
    started = start(other, path, dim=4, alpha=2)
    (adapter,) = started.adapters
    assert adapter.dims.scale == 0.5
    x = make_input("linear", torch.float32)
    assert torch.equal(other(x), layer(x))  # the factor is a power of two


def test_a_scalar_starts_at_one(tmp_path: Path) -> None:
    case = Case("lora", "linear", {"dim": 4, "use_scalar": True})
    layer, other = make_layer("linear", torch.float32), make_layer("linear", torch.float32)
    network, _ = case.build(layer, torch.float32)
    train_randomly(network)
    path = save(tmp_path / "a.safetensors", network.export())
    started = start(other, path, dim=4, use_scalar=True)
    assert float(started.raw_state()[f"{NAME}.scalar"]) == 1


def lora(rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{NAME}.lora_up.weight": torch.ones(16, rank),
        f"{NAME}.lora_down.weight": torch.ones(rank, 12),
        f"{NAME}.alpha": torch.tensor(1.0),
    }


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (lora(), {"dim": 4}, "lora_down.weight has shape [2, 12] in the file, expected [4, 12]"),
        (lora(), {"algo": "loha"}, "is lora in the file, loha is trained"),
        ({**lora(), f"{NAME}.diff_b": torch.ones(16)}, {"dim_from_weights": True}, "diff_b is not trained"),
        (
            {f"{NAME}.oft_blocks": torch.ones(4, 4, 4), f"{NAME}.alpha": torch.tensor(0.5)},
            {"algo": "diag-oft", "dim": 4, "constraint": 0.25},
            "has constraint 0.5 in the file, 0.25 here",
        ),
        (
            {f"{NAME}.oft_diag": torch.ones(4, 4, 4)},
            {"dim_from_weights": True},
            "the form 'old' of diag-oft is not trained",
        ),
        (
            {f"{NAME}.weight": torch.ones(12), f"{NAME}.on_input": torch.tensor(1)},
            {"algo": "ia3"},
            "is on the other side in the file",
        ),
        (
            {
                f"{NAME}.p_layer.weight": torch.ones(16, 2),
                f"{NAME}.q_layer.weight": torch.ones(2, 12),
                f"{NAME}.lambda_layer": torch.ones(1, 2),
            },
            {"dim_from_weights": True},
            "tlora cannot be trained",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    tensors: dict[str, Tensor], options: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "a.safetensors", tensors)
    with pytest.raises(IncompatibleError) as caught:
        start(make_layer("linear", torch.float32), path, **options)
    assert message in caught.value.message
    assert caught.value.key == NAME


def test_modules_that_are_not_trained_are_named(tmp_path: Path) -> None:
    tensors = lora(4) | {key.replace("layer", "other"): tensor for key, tensor in lora(4).items()}
    path = save(tmp_path / "a.safetensors", tensors)
    for options in ({"dim": 4}, {"dim_from_weights": True}):
        with pytest.raises(
            IncompatibleError, match="1 modules of the file are on no trained layer"
        ) as caught:
            start(make_layer("linear", torch.float32), path, **options)
        assert caught.value.details == ("lora_unet_other",)


def test_layers_that_are_not_in_the_file(tmp_path: Path) -> None:
    """They start anew; with `dim_from_weights` the file's are all that is trained."""
    path = save(tmp_path / "a.safetensors", lora(4))
    weights = load_network_weights(str(path))

    def names(**options: object) -> tuple[str, ...]:
        targets = [make_target(make_layer("linear", torch.float32), name) for name in (NAME, "lora_unet_new")]
        chosen = NetworkOptions(network_weights=str(path)).with_arguments(
            f"{k}={v}" for k, v in options.items()
        )
        return Network.build(targets, chosen, seed=0, weights=weights).names

    assert names(dim=4) == (NAME, "lora_unet_new")
    assert names(dim_from_weights=True) == (NAME,)
