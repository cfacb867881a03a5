"""The layers two checkpoints have in common, matched by what they are, not what they are called."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lycotool.errors import IncompatibleError, UsageError
from lycotool.io.dtypes import FLOATING
from lycotool.io.store import TensorStore
from lycotool.models.layers import AmbiguousNameError, Layer, LayerIndex
from lycotool.models.module_names import KohyaNames
from lycotool.models.naming import ANY
from lycotool.ops._common import listed

#: Names of layers that look things up rather than multiply.
_EMBEDDINGS = ("embedding", "embeddings", "embed_tokens", "shared")

_ENCODER_LAYER = re.compile(r"encoder_layers_(\d+)_")

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
    """The pairs to compare, the layers left out, by reason, and what was asked for in vain."""

    chosen: list[Pair] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

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
    UsageError
        If the patterns leave nothing.
    """
    ours, theirs = _aligned(_places(base), _places(tuned))
    _check_same_model(ours, theirs, base.path, tuned.path)
    names = KohyaNames.of(component for component, _ in ours)
    pairs = Pairs()
    eligible: list[Pair] = []
    for place, layer in ours.items():
        component, path = place
        if place not in theirs:
            pairs.skip("in one checkpoint only", layer.path)
            continue
        pair = Pair(names.name(component, layer.path), component, path, layer, theirs[place])
        dtypes = {base.info(layer.weight.key).dtype, tuned.info(pair.tuned.weight.key).dtype}
        if component == "vae":
            pairs.skip("part of the VAE", layer.path)
        elif not layer.weight.shape:
            pairs.skip("a single number", layer.path)
        elif not dtypes <= FLOATING:
            pairs.skip("not a floating-point weight", layer.path)
        else:
            eligible.append(pair)
    for pair in eligible:
        layer = pair.base
        if not _is_chosen(pair, include, exclude):
            pairs.skip("left out by --include or --exclude", layer.path)
        else:
            if (pair.base.bias is None) != (pair.tuned.bias is None):
                pairs.skip("in one checkpoint only", f"{layer.path}.bias")
            pairs.chosen.append(pair)
    for place, layer in theirs.items():
        if place not in ours:
            pairs.skip("in one checkpoint only", layer.path)
    if eligible and not pairs.chosen:
        raise UsageError(
            "`--include` and `--exclude` leave no layer", path=tuned.path, hint=_named(eligible[0])
        )
    for option, patterns in (("include", include), ("exclude", exclude)):
        pairs.warnings += [
            f"`--{option} {pattern}` fits no layer; {_named(eligible[0])}"
            for pattern in patterns
            if eligible and not any(_fits(pair, [pattern]) for pair in eligible)
        ]
    return pairs


def _named(pair: Pair) -> str:
    return f"layers are named as {pair.name} or {pair.base.path}"


def _places(store: TensorStore) -> Places:
    try:
        return LayerIndex(store.shapes).places
    except AmbiguousNameError as error:
        raise IncompatibleError(str(error), path=store.path) from None


def _aligned(ours: Places, theirs: Places) -> tuple[Places, Places]:
    """Give a file of bare paths the component of the other's denoiser."""

    def named(these: Places, others: Places) -> Places:
        if {component for component, _ in these} == {ANY} and any(c == "unet" for c, _ in others):
            return {("unet", path): layer for (_, path), layer in these.items()}
        return these

    return named(ours, theirs), named(theirs, ours)


def _check_same_model(ours: Places, theirs: Places, base: str, tuned: str) -> None:
    """Demand the same layers in every model both have, and the same shapes.

    One text encoder may have one last layer more (SD 2.x files keep a layer that diffusers
    drops) and a projection; the VAE and buffers may be missing.
    """
    shared = {component for component, _ in ours} & {component for component, _ in theirs}
    if not shared:
        faults = [f"{layer.path}: not in {tuned}" for layer in list(ours.values())[:5]]
        faults += [f"{layer.path}: not in {base}" for layer in list(theirs.values())[:5]]
        raise IncompatibleError(f"not the same model as {base}", path=tuned, details=faults)
    strict = shared - {"vae", ANY} or shared & {ANY}
    faults = []
    for these, others, where in ((ours, theirs, tuned), (theirs, ours, base)):
        missing = {
            place: layer
            for place, layer in these.items()
            if place not in others and place[0] in strict and _is_weight(layer)
        }
        faults += [
            f"{layer.path}: not in {where}"
            for place, layer in missing.items()
            if not _is_spare(place, missing)
        ]
    for place, layer in ours.items():
        if place in theirs:
            faults += _differing_shapes(layer, theirs[place])
    if faults:
        raise IncompatibleError(f"not the same model as {base}", path=tuned, details=listed(faults))


def _is_spare(place: tuple[str, str], missing: Places) -> bool:
    """Whether a missing layer belongs to the last block of a text encoder, or projects out of it."""
    component, path = place
    if component not in ("te1", "te2", "te3"):
        return False
    if path == "text_projection":
        return True
    blocks = {m[1] for c, p in missing if c == component and (m := _ENCODER_LAYER.match(p))}
    return len(blocks) == 1 and bool(_ENCODER_LAYER.match(path))


def _differing_shapes(one: Layer, two: Layer) -> list[str]:
    a, b = one.weight.shape, two.weight.shape
    # A 1x1 convolution and a linear layer are the same matrix.
    if a[:1] != b[:1] or math.prod(a) != math.prod(b):
        return [f"{one.path}: shape {list(a)} against {list(b)}"]
    if one.bias and two.bias and one.bias.shape != two.bias.shape:
        return [f"{one.bias.key}: shape {list(one.bias.shape)} against {list(two.bias.shape)}"]
    return []


def _is_weight(layer: Layer) -> bool:
    """Whether an entry is a weight of the model rather than a buffer beside it."""
    return layer.weight.key.endswith("weight") and len(layer.weight.shape) > 0


def _is_chosen(pair: Pair, include: Sequence[str], exclude: Sequence[str]) -> bool:
    return (not include or _fits(pair, include)) and not _fits(pair, exclude)


def _fits(pair: Pair, patterns: Sequence[str]) -> bool:
    names = (pair.name, pair.base.path)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)
