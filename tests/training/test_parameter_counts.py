"""Trainable parameters on the published models, against LyCORIS' at dim 16 and alpha 1.

In millions, UNet and text encoders, for the preset `full`: counted on LyCORIS' own networks
(3.4) over the same models.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import pytest
import torch
from training.published_bases import published_base

from lycotool.training.bases.configs import FamilyName
from lycotool.training.network import Network
from lycotool.training.network_options import NetworkOptions
from lycotool.training.presets import PRESETS
from lycotool.training.targets import Target, find_targets

#: Algorithm -> millions of parameters; with an asterisk the norms are trained too.
MILLIONS: Mapping[tuple[str, FamilyName], tuple[float, float]] = {
    ("lora", "sd1"): (16.93, 2.65),
    ("lora", "sdxl"): (49.31, 14.45),
    ("dylora", "sd1"): (16.93, 2.65),
    ("loha", "sd1"): (33.86, 5.31),
    ("lokr", "sd1"): (0.795, 0.141),
    ("lokr", "sdxl"): (2.26, 0.69),
    ("glora*", "sd1"): (26.55, 5.31),
    ("diag-oft*", "sdxl"): (24.46, 7.23),
    ("boft*", "sd1"): (27.19, 7.85),
    ("boft*", "sdxl"): (138.5, 40.6),
    ("full*", "sd1"): (859.5, 85.0),
    ("full*", "sdxl"): (2562, 714.5),
}


@lru_cache
def targets(family: FamilyName, *, train_norm: bool) -> tuple[Target, ...]:
    return find_targets(published_base(family), PRESETS["full"], train_norm=train_norm)


@pytest.mark.parametrize(("algo", "family"), MILLIONS)
def test_parameters(algo: str, family: FamilyName) -> None:
    train_norm = algo.endswith("*")
    arguments = [f"algo={algo.rstrip('*')}"]
    if not algo.startswith("full"):
        arguments.append("dim=16")
    options = NetworkOptions(train_norm=train_norm).with_arguments(arguments)
    with torch.device("meta"):  # shapes only
        network = Network.build(targets(family, train_norm=train_norm), options, seed=0)
    network.detach()
    found = [0, 0]
    for row in network.table():
        found[row.component != "unet"] += row.parameters
    for count, millions in zip(found, MILLIONS[algo, family], strict=True):
        # Half a unit of the last digit given; the sum of components' own roundings is not made.
        digits = len(f"{millions}".partition(".")[2]) if isinstance(millions, float) else 0
        assert abs(count / 1e6 - millions) <= 0.5 * 10**-digits * 1.01, (count, millions)
