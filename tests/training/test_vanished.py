"""Which values that vanish in float16 are told of: judged by the changes of weights they make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training.runs import InMemory, write_pictures

from lycotool.linalg.underflow import Underflow
from lycotool.training.network import Network
from lycotool.training.vanished import forget_what_changes_nothing

#: Values of this size lose 1.7 % of their norm in float16, whose spacing there is 2^-24.
SMALL = 1e-6

#: A layer whose output the micro model's group norms undo.
TIME = "lora_unet_down_blocks_0_resnets_0_time_emb_proj"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@torch.no_grad()
def fill(network: Network, *, small: str, factor: float = 1.0, size: float = SMALL) -> None:
    """Up factors of the usual size, but of names with ``small``; their partners times ``factor``."""
    generator = torch.Generator().manual_seed(0)
    for name, _, layer in network.named():
        for slot, parameter in layer.trained():
            is_small = small in name
            std = (size if is_small else 1e-3) if "up" in slot else (0.1 * factor if is_small else 0.1)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def told(network: Network) -> set[str]:
    underflow = Underflow()
    forget_what_changes_nothing(underflow, network, network.export(torch.float16, underflow))
    return {key.partition(".")[0] for key in underflow.found}


def changes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ΔW of each module in float64, from the file's tensors alone."""
    modules = {key.partition(".")[0] for key in state}
    found = {}
    for name in modules:
        up, down = (state[f"{name}.lora_{slot}.weight"].double().flatten(1) for slot in ("up", "down"))
        found[name] = up @ down * (float(state[f"{name}.alpha"]) / len(down))
    return found


def test_what_is_nothing_beside_the_rest_is_not_told_of(pictures: Path) -> None:
    with InMemory(pictures, train_te=False, dim=4, alpha=4) as made:
        network = made.ready.network
        fill(network, small=TIME)
        underflow = Underflow()
        network.export(torch.float16, underflow)
        (vanished,) = underflow.found.values()
        assert 0.01 < vanished.share < 0.03
        assert told(network) == set()


def test_the_partner_counts(pictures: Path) -> None:
    """The same factor, multiplied so that 2^-8 of the UNet's change is lost, by the definition in float64."""
    with InMemory(pictures, train_te=False, dim=4, alpha=4) as made:
        network = made.ready.network
        fill(network, small=TIME)
        exact = network.export()
        saved = {**exact, f"{TIME}.lora_up.weight": exact[f"{TIME}.lora_up.weight"].half()}
        before, after = changes(exact), changes(saved)
        own, lost = before[TIME].norm(), (before[TIME] - after[TIME]).norm()
        others = sum(change.square().sum() for name, change in before.items() if name != TIME)
        # c lost = 2^-8 √(others + c² own²)
        limit = float((others / ((lost * 2**8) ** 2 - own**2)).sqrt())
        for factor, expected in ((0.99, set()), (1.01, {TIME})):
            fill(network, small=TIME, factor=limit * factor)
            assert told(network) == expected


def test_many_small_losses_count_together(pictures: Path) -> None:
    with InMemory(pictures, train_te=False, dim=4) as made:
        fill(made.ready.network, small="")
        assert told(made.ready.network) == set(made.ready.network.names)


def test_a_text_encoder_is_judged_by_itself(pictures: Path) -> None:
    with InMemory(pictures, dim=4) as made:
        fill(made.ready.network, small="lora_te")
        names = {name for name in made.ready.network.names if name.startswith("lora_te")}
        assert told(made.ready.network) == names


def test_what_is_gone_is_always_told_of(pictures: Path) -> None:
    with InMemory(pictures, train_te=False, dim=4) as made:
        fill(made.ready.network, small=TIME, size=1e-9)
        assert told(made.ready.network) == {TIME}


@pytest.mark.parametrize(
    "values", [{"algo": "lora", "dora_wd": True}, {"algo": "loha"}, {"algo": "lokr", "factor": 4}], ids=str
)
def test_of_other_algorithms(pictures: Path, values: dict[str, object]) -> None:
    """One small factor beside changes of the usual size; and where every change is as small."""
    with InMemory(pictures, train_te=False, dim=4, **values) as made:
        network = made.ready.network
        generator = torch.Generator().manual_seed(0)
        for is_alone in (True, False):
            with torch.no_grad():
                for name, _, layer in network.named():
                    slot, parameter = next(iter(layer.trained()))
                    std = SMALL if name == TIME or not is_alone else 0.1
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
                    others = [
                        own for own_slot, own in layer.trained() if own_slot not in (slot, "dora_scale")
                    ]
                    for other in others:
                        other.copy_(torch.randn(other.shape, generator=generator) * 0.1)
            found = told(network)
            assert found == set() if is_alone else TIME in found
