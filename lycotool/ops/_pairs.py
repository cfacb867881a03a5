"""The layers two checkpoints have in common, matched by what they are, not what they are called."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lycotool.errors import IncompatibleError
from lycotool.io.dtypes import FLOATING
from lycotool.io.store import TensorStore
from lycotool.models.layers import AmbiguousNameError, Layer, LayerIndex
from lycotool.models.module_names import KohyaNames
from lycotool.ops._common import listed

#: Names of layers that look things up rather than multiply.
_EMBEDDINGS = ("embedding", "embeddings", "embed_tokens", "shared")

Places = Mapping[tuple[str, str], Layer]


@dataclass(frozen=True, slots=True)
class Pair:
    """One layer of both checkpoints, and the adapter module that stands for it."""

    name: str
    component: str
    path: str
    base: Layer
    tuned: Layer

    @property
    def is_convolution(self) -> bool:
        """Whether the conv rank applies: kernels larger than 1."""
        return math.prod(self.base.weight.shape[2:]) > 1

    @property
    def is_matrix(self) -> bool:
        """Whether the weight multiplies (linear, convolution) rather than scales or looks up."""
        return len(self.base.weight.shape) > 1 and not self.path.endswith(_EMBEDDINGS)


@dataclass(slots=True)
class Pairs:
    """The pairs to compare, and the layers left out, by reason."""

    chosen: list[Pair] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, path: str) -> None:
        """Note a layer that is left out."""
        self.skipped.setdefault(reason, []).append(path)


def pair_layers(
    base: TensorStore, tuned: TensorStore, *, include: Sequence[str], exclude: Sequence[str]
) -> Pairs:
    """Match the layers of two checkpoints by component and canonical path.

    Parameters
    ----------
    include, exclude
        Shell patterns on module names or checkpoint paths; no ``include`` takes all.

    Raises
    ------
    IncompatibleError
        If they are not of one model, naming the first layers that differ.
    """
    ours, theirs = _places(base), _places(tuned)
    _check_same_model(ours, theirs, base.path, tuned.path)
    names = KohyaNames.of(component for component, _ in ours)
    pairs = Pairs()
    for place, layer in ours.items():
        component, path = place
        if place not in theirs:
            pairs.skip("in one checkpoint only", layer.path)
            continue
        pair = Pair(names.name(component, layer.path), component, path, layer, theirs[place])
        dtypes = {base.info(layer.weight.key).dtype, tuned.info(pair.tuned.weight.key).dtype}
        if component == "vae":
            pairs.skip("part of the VAE", layer.path)
        elif not dtypes <= FLOATING:
            pairs.skip("not a floating-point weight", layer.path)
        elif not _is_chosen(pair, include, exclude):
            pairs.skip("left out by --include or --exclude", layer.path)
        else:
            pairs.chosen.append(pair)
    for place, layer in theirs.items():
        if place not in ours:
            pairs.skip("in one checkpoint only", layer.path)
    return pairs


def _places(store: TensorStore) -> Places:
    try:
        return LayerIndex(store.shapes).places
    except AmbiguousNameError as error:
        raise IncompatibleError(str(error), path=store.path) from None


def _check_same_model(ours: Places, theirs: Places, base: str, tuned: str) -> None:
    """Demand equal layers in every component both have; the VAE and buffers may differ."""
    shared = {component for component, _ in ours} & {component for component, _ in theirs}
    faults = []
    for these, others, where in ((ours, theirs, tuned), (theirs, ours, base)):
        faults += [
            f"{layer.path}: not in {where}"
            for place, layer in these.items()
            if place not in others and place[0] in shared - {"vae"} and _is_weight(layer)
        ]
    for place, layer in ours.items():
        if place in theirs:
            one, two = layer.weight.shape, theirs[place].weight.shape
            # A 1x1 convolution and a linear layer are the same matrix.
            if one[:1] != two[:1] or math.prod(one) != math.prod(two):
                faults.append(f"{layer.path}: shape {list(one)} against {list(two)}")
    if faults or not shared:
        raise IncompatibleError(f"not the same model as {base}", path=tuned, details=listed(faults))


def _is_weight(layer: Layer) -> bool:
    """Whether an entry is a weight of the model rather than a buffer beside it."""
    return layer.weight.key.endswith("weight") and len(layer.weight.shape) > 0


def _is_chosen(pair: Pair, include: Sequence[str], exclude: Sequence[str]) -> bool:
    def hit(patterns: Sequence[str]) -> bool:
        names = (pair.name, pair.base.path)
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)

    return (not include or hit(include)) and not hit(exclude)
