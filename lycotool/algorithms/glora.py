"""GLoRA: ``ΔW = c · (W a1 a2 + b1 b2)``, ``c = alpha / rank``.

The layout of LyCORIS 2.x and older stores each pair the other way round:
``ΔW = c · (W a2 a1 + b2 b1)``. For convolutions ``W a1 a2`` contracts the input channels.
[GLoRA, arXiv 2306.07967]
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lycotool.algorithms.base import (
    ALPHA,
    Advice,
    Algorithm,
    Bound,
    Dims,
    Layout,
    Reading,
    Rule,
    Shape,
    Sizes,
    Slot,
    alpha_over_rank,
    size_of,
)
from lycotool.algorithms.rows import take_along
from lycotool.algorithms.training import (
    LORA_PLUS_ARGUMENTS,
    RANK_ARGUMENTS,
    Arguments,
    BaseFn,
    Operands,
    Start,
    Structured,
    Training,
    kaiming,
    low_rank_of,
    zeros,
)
from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.algorithms.layer import TrainableLayer


def _is_low_rank(sizes: Sizes) -> bool:
    """Tells the two layouts apart on square layers, where the shapes alone fit both."""
    return size_of("rank")(sizes) < size_of("in")(sizes)


NEW = Layout(
    name="new",
    slots=(
        Slot("a1.weight", "in rank *1"),
        Slot("a2.weight", "rank in *1"),
        Slot("b1.weight", "out rank *1"),
        Slot("b2.weight", "rank in *kernel"),
        ALPHA,
    ),
    rows=size_of("out"),
    columns=size_of("in", "kernel"),
    linear_in=("a1.weight", "b1.weight"),
    prefers=_is_low_rank,
)

OLD = Layout(
    name="old",
    slots=(
        Slot("a1.weight", "rank in *1"),
        Slot("a2.weight", "in rank *1"),
        Slot("b1.weight", "rank in *kernel"),
        Slot("b2.weight", "out rank *1"),
        ALPHA,
    ),
    rows=size_of("out"),
    columns=size_of("in", "kernel"),
    linear_in=("a2.weight", "b2.weight"),
    prefers=_is_low_rank,
)


def dims(layout: Layout, sizes: Sizes, alpha: float | None, reading: Reading) -> Dims:
    """``c = alpha / rank``; its square where the old trainer's forward is asked for."""
    found = alpha_over_rank(size_of("rank")(sizes), alpha, reading)
    if layout is OLD and reading.glora_old_scale == "twice":
        return replace(found, scale=found.scale**2)
    return found


def _pairs(module: Bound) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``left_a (in, r), right_a (r, in), left_b (out, r), right_b (r, in·kernel)``."""
    a1, a2, b1, b2 = (module[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    return (a2, a1, b2, b1) if module.layout is OLD else (a1, a2, b1, b2)


def delta(module: Bound, shape: Shape, base: Tensor | None) -> Tensor:
    """``c · (W a1 a2 + b1 b2)``."""
    if base is None:
        raise ValueError("glora needs the base weight")
    left_a, right_a, left_b, right_b = _pairs(module)
    prompted = torch.einsum("oi..., ir, rj -> oj...", base, left_a, right_a)
    return module.dims.scale * (prompted + (left_b @ right_b).reshape(shape))


def concat(parts: list[tuple[Bound, float]]) -> dict[str, Tensor] | None:
    """Sums in one layout concatenate the ranks of both pairs, without the base weight."""
    modules = [module for module, _ in parts]
    if len({module.layout.name for module in modules}) != 1:
        return None
    old = modules[0].layout is OLD
    scales = [module.dims.scale * weight for module, weight in parts]

    def joined(slot: str, *, left: bool) -> Tensor:
        tensors = [m[slot] * c if left else m[slot] for m, c in zip(modules, scales, strict=True)]
        return torch.cat(tensors, dim=1 if left else 0)

    slots = {
        "a1.weight": joined("a1.weight", left=not old),
        "a2.weight": joined("a2.weight", left=old),
        "b1.weight": joined("b1.weight", left=not old),
        "b2.weight": joined("b2.weight", left=old),
    }
    rank = slots["a2.weight"].shape[1 if old else 0]
    if rank >= slots["a2.weight"].shape[0 if old else 1]:
        return None  # square or wider: the result could not be told from the other layout
    slots["alpha"] = torch.tensor(float(rank), dtype=slots["a1.weight"].dtype)
    return slots


def take_rows(module: Bound, index: Tensor) -> dict[str, Tensor] | None:
    """``c · (W[index] a1 a2 + b1[index] b2)``: the prompt works on the input side of every row.

    None for a rank that is not low: on a square layer it could not be told from the other layout.
    """
    return take_along(module, {"out": index}) if _is_low_rank(module.sizes) else None


def init(layer: TrainableLayer, arguments: Arguments, generator: torch.Generator) -> Start:
    """``a1`` and ``b1`` uniform, ``a2`` and ``b2`` zero; all uniform with ``use_scalar``.

    Source: LyCORIS ``modules/glora.py``.
    """
    rank, ones = arguments.rank, (1,) * len(layer.kernel)

    def right(*shape: int) -> Tensor:
        return kaiming(shape, generator) if arguments.use_scalar else zeros(*shape)

    trained = {
        "a1.weight": kaiming((layer.shape[1], rank, *ones), generator),
        "a2.weight": right(rank, layer.shape[1], *ones),
        "b1.weight": kaiming((layer.out, rank, *ones), generator),
        "b2.weight": right(rank, *layer.shape[1:]),
    }
    return Start(NEW, trained, alpha=arguments.stored_alpha)


def operands(module: Bound) -> Operands:
    """Both pairs, ``c`` folded into the left ones."""
    left_a, right_a, left_b, right_b = _pairs(module)
    scale = module.dims.scale
    return {"up": left_b * scale, "down": right_b, "prompt_up": left_a * scale, "prompt_down": right_a}


def output(operands: Operands, layer: TrainableLayer, x: Tensor, base: BaseFn) -> Tensor:
    """``W (x + c · a1 a2 x) + c · b1 b2 x``."""
    prompt = layer.pointwise(layer.pointwise(x, operands["prompt_down"]), operands["prompt_up"])
    return base(x + prompt) + layer.low_rank(x, low_rank_of(operands))


def cost(sizes: Sizes, layer: TrainableLayer) -> int:
    """The elements of both pairs."""
    rank, columns = size_of("rank")(sizes), size_of("in")(sizes)
    return rank * (2 * columns + columns * size_of("kernel")(sizes) + layer.out)


GLORA = Algorithm(
    name="glora",
    title="GLoRA (generalised LoRA: prompts the weight and adds to it)",
    citation="GLoRA, arXiv 2306.07967",
    layouts=(NEW, OLD),
    dims=dims,
    delta=delta,
    needs_base=True,
    concat=concat,
    take_rows=take_rows,
    merge=Rule(
        False,
        "GLoRA is not mergeable: its change depends on the base weight",
        "`--rebuild` joins modules of one layout, or uses `--base`; "
        "`lycotool bake` folds it into a checkpoint",
    ),
    resize=Rule(False, "its change depends on the base weight"),
    training=Training(
        arguments=RANK_ARGUMENTS | LORA_PLUS_ARGUMENTS,
        init=init,
        layouts=(NEW,),
        learning_rate=2e-4,
        structured=Structured(operands=operands, output=output, cost=cost),
        up=frozenset({"a1.weight", "b1.weight"}),
        rank_axes=(("a1.weight", 1), ("b1.weight", 1)),
        shrinking="linear",
    ),
    advice=(Advice("AUTOMATIC1111 does not read the new layout"),),
)
