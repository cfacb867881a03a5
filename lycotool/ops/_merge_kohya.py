"""`--compat kohya`: what sd-scripts' ``merge_lora.py`` makes of several LoRAs.

It merges factors rather than changes, and multiplies both of them by each adapter's ratio:

``up = Σ |wᵢ|·√(αᵢ/α₁)·upᵢ``, ``down = Σ wᵢ·√(αᵢ/α₁)·downᵢ``, ``alpha = α₁``,

with ``α₁`` that of the first adapter that has the layer and a missing alpha read as the rank.
One adapter at ratio w thus becomes ``w·|w|·ΔW``, and several have cross terms. With
``--concat`` the ranks stand beside each other instead of being added; as alpha stays, each
change is then multiplied by ``wᵢ·|wᵢ|·rᵢ/Σr`` rather than by ``wᵢ``. Source: sd-scripts
48d368f, ``networks/merge_lora.py``, ``merge_lora_models`` (the same in ``sdxl_merge_lora.py``
and ``flux_merge_lora.py``), with ``--precision float``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lycotool.algorithms import lora
from lycotool.errors import IncompatibleError, UsageError
from lycotool.lazy import torch
from lycotool.ops._adapter import AdapterInput
from lycotool.ops._common import listed
from lycotool.ops._merge_options import MergeOptions
from lycotool.ops._merge_parts import Group, Part
from lycotool.ops._merger import Merger
from lycotool.ops._methods import MethodOptions
from lycotool.ops._strengths import StrengthOptions

if TYPE_CHECKING:
    from torch import Tensor

_SLOTS = frozenset({"lora_up.weight", "lora_down.weight", "alpha"})


def refuse_with_kohya(options: MergeOptions, adapters: Sequence[AdapterInput], *, into_adapter: bool) -> None:
    """Refuse what sd-scripts' merge of LoRAs does not have.

    Raises
    ------
    UsageError
        Naming the option that does not go with it.
    """
    if options.compat == "none":
        if options.concat:
            raise UsageError("`--concat` is a mode of `--compat kohya`; the exact sum concatenates already")
        return
    if not into_adapter:
        raise UsageError(
            "`--compat kohya` is for merging adapters: into a checkpoint, sd-scripts adds w·ΔW as it should be",
            hint="leave it out",
        )
    others = {
        "--method and its options": options.method != MethodOptions(),
        "--rank, --conv-rank, --size and --error": options.ranks.truncates,
        "--te, --unet, --lbw and --lbw-rule": options.strengths != StrengthOptions(),
        "--base": options.base is not None,
        "--rebuild": options.rebuild,
    }
    for name, is_given in others.items():
        if is_given:
            raise UsageError(f"`--compat kohya` has no {name}")
    for adapter in adapters:
        if adapter != AdapterInput(adapter.path, adapter.strength):
            raise UsageError(
                "`--compat kohya` knows one ratio of an adapter and nothing else", path=adapter.path
            )


def check_kohya(groups: Sequence[Group], *, concat: bool) -> None:
    """Find what sd-scripts cannot merge.

    Raises
    ------
    IncompatibleError
        Listing modules that are no plain LoRA, alphas without a ratio, and different ranks.
    """
    faults: list[str] = []
    for group in groups:
        for part in group.parts:
            module = part.module
            if part.adapter.keys.spelling != "kohya":
                faults.append(f"{module.name}: names that sd-scripts does not read")
            elif module.detected.layout is not lora.PLAIN or module.keys.keys() - _SLOTS:
                faults.append(f"{module.name}: {module.detected.label} with {', '.join(sorted(module.keys))}")
            elif _alpha(part) / (_alpha(group.parts[0]) or math.nan) >= 0:
                continue
            else:
                faults.append(
                    f"{module.name}: no root of alpha {_alpha(part):g} / {_alpha(group.parts[0]):g}"
                )
        ranks = {part.module.dims.rank for part in group.parts}
        if len(ranks) > 1 and not concat:
            faults.append(
                f"{group.name}: ranks differ: {sorted(r or 0 for r in ranks)} (`--concat` allows that)"
            )
    if faults:
        raise IncompatibleError(
            f"sd-scripts cannot merge {len(faults)} modules",
            details=listed(faults),
            hint="leave `--compat kohya` out",
        )


def kohya_factors(group: Group, merger: Merger, *, concat: bool) -> tuple[dict[str, Tensor], float]:
    """The merged factors in float32 and the alpha that goes with them."""
    ups, downs = [], []
    first = _alpha(group.parts[0])
    for part in group.parts:
        scale = math.sqrt(_alpha(part) / first) * part.weight
        bound = merger.load(part)
        ups.append(bound["lora_up.weight"] * abs(scale))
        downs.append(bound["lora_down.weight"] * scale)
    if concat:
        up, down = torch.cat(ups, 1), torch.cat(downs, 0)
    else:
        up, down = torch.stack(ups).sum(0), torch.stack(downs).sum(0)
    return {"lora_up.weight": up, "lora_down.weight": down}, first


def _alpha(part: Part) -> float:
    """The stored alpha; the rank where there is none."""
    alpha = part.module.dims.alpha
    return float(part.module.dims.rank or 0) if alpha is None else alpha
