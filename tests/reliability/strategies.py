"""Modules and files drawn from the registry's own layouts: sound, nearly sound, and anything.

A sound module has the slots of one layout, with sizes that obey its axes; a nearly sound one
differs from that in one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import assume
from hypothesis import strategies as st

from lycotool.algorithms import ALGORITHMS, BY_METADATA
from lycotool.algorithms.base import Algorithm, Layout, MismatchError, Shape
from lycotool.formats.keys import ALIASES
from lycotool.io.header import DTYPE_BITS
from reliability.tensors import entry, raw

Draw = Callable[[st.SearchStrategy], object]
Shapes = dict[str, Shape]

_ALL = [(algorithm, layout) for algorithm in ALGORITHMS for layout in algorithm.layouts]
_NAMES = sorted({slot.name for _, layout in _ALL for slot in layout.slots} | set(ALIASES))
_SIZES = st.sampled_from((1, 2, 3, 4, 6, 8))
_ODD_SIZES = st.sampled_from((0, 1, 2, 5, 7, 2**31, 2**62, 2**63 - 1))

#: Names of layers in the spellings of several programs, and some of none.
PATHS = st.sampled_from(
    (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "base_model.model.text_model.encoder.layers.0.self_attn.q_proj",
        "diffusion_model.double_blocks.0.img_attn.qkv",
        "lycoris_a_b",
    )
) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@dataclass(frozen=True)
class Module:
    """A module's shapes, and the layout they were made for."""

    algorithm: Algorithm
    layout: Layout
    shapes: Shapes

    @property
    def hint(self) -> str | None:
        """What metadata must say of algorithms whose keys are another's."""
        return self.algorithm.name if self.algorithm.name in BY_METADATA else None


@st.composite
def sound_modules(draw: Draw) -> Module:
    """Slots of one layout, all that it needs and some that it may have."""
    algorithm, layout = draw(st.sampled_from(_ALL))
    sizes: dict[str, int | Shape] = {}
    shapes = {
        slot.name: _shape(draw, slot.axes, sizes)
        for slot in layout.slots
        if slot.required or draw(st.booleans())
    }
    try:
        layout.bind(shapes)
    except MismatchError:
        assume(False)  # a condition beyond the axes
    return Module(algorithm, layout, shapes)


def _shape(draw: Draw, axes: str, sizes: dict[str, int | Shape]) -> Shape:
    """Sizes for the words of a slot, the same ones wherever a word comes again."""
    if axes == "scalar":
        return draw(st.sampled_from(((), (1,))))
    shape: list[int] = []
    for word in axes.split():
        if word == "*1":
            shape += [1] * draw(st.sampled_from((0, 2)))
        elif word.startswith("*"):
            shape += sizes.setdefault(word[1:], draw(st.sampled_from(((), (1, 1), (3, 3)))))
        else:
            for part in word.split("*"):
                if not part.isdecimal() and part not in sizes:
                    sizes[part] = draw(_SIZES)
            shape.append(math.prod(int(p) if p.isdecimal() else sizes[p] for p in word.split("*")))
    return tuple(shape)


@st.composite
def nearly_sound_modules(draw: Draw) -> Module:
    """A sound module with one thing done to it."""
    module = draw(sound_modules())
    shapes = dict(module.shapes)
    name = draw(st.sampled_from(sorted(shapes)))
    match draw(st.sampled_from(("drop", "add", "resize", "deepen", "flatten", "rename"))):
        case "drop":
            del shapes[name]
        case "add":
            shapes[draw(st.sampled_from(_NAMES))] = draw(any_shapes())
        case "resize":
            assume(shapes[name])
            place = draw(st.integers(0, len(shapes[name]) - 1))
            shapes[name] = (*shapes[name][:place], draw(_ODD_SIZES), *shapes[name][place + 1 :])
        case "deepen":
            shapes[name] = (*shapes[name], draw(_SIZES))
        case "flatten":
            shapes[name] = shapes[name][:1]
        case _:
            shapes[draw(st.sampled_from(_NAMES))] = shapes.pop(name)
    assume(shapes)
    return Module(module.algorithm, module.layout, shapes)


def any_shapes() -> st.SearchStrategy[Shape]:
    """Up to five sizes, sensible or not."""
    return st.lists(_SIZES | _ODD_SIZES, max_size=5).map(tuple)


def random_modules() -> st.SearchStrategy[Shapes]:
    """Slots of any layouts, with any shapes."""
    return st.dictionaries(
        st.sampled_from(_NAMES) | st.text(max_size=8), any_shapes(), min_size=1, max_size=6
    )


@st.composite
def files(draw: Draw) -> bytes:
    """A sound container of modules that are sound, nearly so, or anything, and of other tensors."""
    shapes: dict[str, Shape] = {}
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(
            st.one_of(
                sound_modules().map(lambda module: module.shapes),
                nearly_sound_modules().map(lambda module: module.shapes),
                random_modules(),
            )
        )
        path = draw(PATHS)
        shapes |= {f"{path}.{slot}": shape for slot, shape in kind.items()}
    shapes |= draw(st.dictionaries(PATHS, any_shapes(), max_size=2))
    header: dict[str, object] = {}
    if draw(st.booleans()):
        header["__metadata__"] = draw(
            st.dictionaries(
                st.sampled_from(("ss_network_args", "ss_network_module", "ss_base_model_version", "x")),
                st.sampled_from(("networks.dylora", '{"algo": "tlora"}', '{"algo": 3}', "[", "sd_v1")),
            )
        )
    stop = 0
    for name, shape in shapes.items():
        dtype = draw(st.sampled_from(("F32", "F16", "BF16", "F8_E4M3", "I64", "BOOL")))
        nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        if nbytes <= 2**14 and name.isprintable() and name != "__metadata__":
            header[name] = entry(dtype, shape, stop, stop + nbytes)
            stop += nbytes
    return raw(header, bytes(stop))
