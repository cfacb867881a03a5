"""LoKr: ``ΔW = c · w1 ⊗ w2``, each factor stored whole or as a product.

``w1 = lokr_w1`` or ``w1_a @ w1_b`` of shape ``(a, c)``; ``w2 = lokr_w2`` or ``w2_a @ w2_b``
of shape ``(b, d, *kernel)`` or, with a CP core, ``Σ w2_a[p, b] t2[p, q, k] w2_b[q, d]``;
the layer is ``(a·b, c·d, *kernel)``. ``c = alpha / rank``, and 1 whatever alpha says when
both factors are whole. [LyCORIS, arXiv 2309.14859; KronA, arXiv 2212.10650]
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
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
    StackPart,
    alpha_over_rank,
    size_of,
    stored_bias,
)
from lycotool.algorithms.rows import (
    agree,
    are_equal,
    modules_of,
    stack,
    stack_slots,
    take_along,
    whole_blocks,
)
from lycotool.algorithms.training import (
    FACTOR_ARGUMENTS,
    LORA_PLUS_ARGUMENTS,
    Arguments,
    Operands,
    Start,
    Structured,
    Training,
    kaiming,
    low_rank_of,
    operands_of,
    zeros,
)
from lycotool.lazy import torch
from lycotool.linalg.factorization import factorization
from lycotool.linalg.low_rank import LowRank, kron, low_rank_split

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.algorithms.layer import TrainableLayer

_W1 = {
    "w1 full": (Slot("lokr_w1", "out1 in1"),),
    "w1 product": (Slot("lokr_w1_a", "out1 rank1"), Slot("lokr_w1_b", "rank1 in1")),
}
_W2 = {
    "w2 full": (Slot("lokr_w2", "out2 in2 *kernel"),),
    "w2 product": (Slot("lokr_w2_a", "out2 rank2"), Slot("lokr_w2_b", "rank2 in2 *kernel")),
    "cp": (
        Slot("lokr_t2", "rank_out rank2 *kernel"),
        Slot("lokr_w2_a", "rank_out out2"),
        Slot("lokr_w2_b", "rank2 in2"),
    ),
}


def _layout(first: str, second: str) -> Layout:
    return Layout(
        name=f"{first}, {second}",
        slots=(*_W1[first], *_W2[second], ALPHA, Slot("diff_b", "out1*out2", required=False)),
        rows=size_of("out1", "out2"),
        columns=size_of("in1", "in2", "kernel"),
        linear_in=(_W1[first][0].name, "diff_b"),
        use_conv_cp=second == "cp",
    )


LAYOUTS = tuple(_layout(first, second) for first, second in product(_W1, _W2))


def dims(layout: Layout, sizes: Sizes, alpha: float | None, reading: Reading) -> Dims:
    """Rank of the second factor, else of the first; two whole factors have none and c = 1."""
    for symbol in ("rank2", "rank1"):
        if symbol in sizes:
            return alpha_over_rank(size_of(symbol)(sizes), alpha, reading)
    return Dims(None, alpha, 1.0)


def _first(module: Bound) -> Tensor:
    """``c · w1``, ``(a, c)``."""
    if "lokr_w1" in module:
        return module["lokr_w1"] * module.dims.scale
    return module["lokr_w1_a"] @ module["lokr_w1_b"] * module.dims.scale


def _second(module: Bound) -> LowRank | None:
    """``w2`` as factors ``(b, r) @ (r, d·kernel)``; None when it is stored whole."""
    if "lokr_t2" in module:
        return LowRank(module["lokr_w2_a"].T, module["lokr_w2_b"], module["lokr_t2"])
    if "lokr_w2_a" in module:
        return LowRank(module["lokr_w2_a"], module["lokr_w2_b"].flatten(1))
    return None


def delta(module: Bound, shape: Shape, base: Tensor | None) -> Tensor:
    """``c · w1 ⊗ w2``.

    The kernel axes of ``w2`` may stay flattened with its columns: input index ``(c, d, k)``
    runs in the same order either way.
    """
    second = _second(module)
    w2 = module["lokr_w2"].flatten(1) if second is None else second.dense()
    return kron(_first(module), w2, module.memory).reshape(shape)


def factors(module: Bound) -> LowRank:
    """Exact factors: ``(A B) ⊗ (C D) = (A ⊗ C)(B ⊗ D)``.

    A factor stored whole is split with an identity on its smaller side, so the rank is
    ``min(a, c)`` (or the stored rank of w1) times ``min(b, d·kernel)`` (or that of w2).
    The CP form keeps its core: ``I ⊗ t2``.
    """
    first, second = kronecker_parts(module)
    up, down = kron(first.up, second.up), kron(first.down, second.down)
    if second.core is None:
        return LowRank(up, down)
    identity = torch.eye(first.rank, dtype=up.dtype, device=up.device)
    core = torch.einsum("ab, pq... -> apbq...", identity, second.core)
    return LowRank(up, down, core.flatten(2, 3).flatten(0, 1))


def kronecker_parts(module: Bound) -> tuple[LowRank, LowRank]:
    """``c · w1`` and ``w2`` as factored matrices ``(a, c)`` and ``(b, d·kernel)``."""
    if "lokr_w1" in module:
        first = LowRank(*low_rank_split(_first(module)))
    else:
        first = LowRank(module["lokr_w1_a"] * module.dims.scale, module["lokr_w1_b"])
    second = _second(module)
    if second is None:
        second = LowRank(*low_rank_split(module["lokr_w2"].flatten(1)))
    return first, second


def take_rows(module: Bound, index: Tensor) -> dict[str, Tensor] | None:
    """``c · w1[blocks] ⊗ w2``: row ``i`` of w1 makes the whole block ``i`` of ``b`` rows."""
    blocks = whole_blocks(index, module.size("out2"))
    return None if blocks is None else take_along(module, {"out1": blocks, "out1*out2": index})


def stack_rows(parts: Sequence[StackPart]) -> tuple[dict[str, Tensor], float] | None:
    """``c · [w1; w1'; …] ⊗ w2``, where all that stands right of w1's rows is the same."""
    modules = modules_of(parts)
    first = modules[0]
    if any(m.layout is not first.layout or m.dims.scale != first.dims.scale for m in modules):
        return None
    rows = "lokr_w1" if "lokr_w1" in first else "lokr_w1_a"
    shared = first.layout.required - {rows}
    if not all(are_equal([module[slot] for module in modules]) for slot in shared):
        return None
    if not agree([module[rows] for module in modules]):
        return None
    block = first.size("out2")
    if any(isinstance(part, int) and part % block for part in parts):
        return None
    return {
        rows: stack([part // block if isinstance(part, int) else part[rows] for part in parts]),
        **{slot: first[slot] for slot in sorted(shared)},
        **stack_slots(parts, "diff_b"),
    }, first.dims.scale


def init(layer: TrainableLayer, arguments: Arguments, generator: torch.Generator) -> Start:
    """Everything uniform but the last factor of ``w2``, which is zero.

    A factor is a product only where that is smaller: ``w2`` below half its larger side, ``w1``
    with ``decompose_both`` below half of its. With ``use_scalar`` nothing is zero. Two whole
    factors have c = 1, so their alpha is the rank. Source: LyCORIS ``modules/lokr.py``.
    """
    rank, kernel = arguments.rank, layer.kernel
    a, b = factorization(layer.out, arguments.factor)
    c, d = factorization(layer.shape[1], arguments.factor)
    if arguments.unbalanced_factorization:
        a, b = b, a

    def last(*shape: int) -> Tensor:
        return kaiming(shape, generator) if arguments.use_scalar else zeros(*shape)

    if arguments.decompose_both and not arguments.full_matrix and 2 * rank < max(a, c):
        first = "w1 product"
        trained = {"lokr_w1_a": kaiming((a, rank), generator), "lokr_w1_b": kaiming((rank, c), generator)}
    else:
        first, trained = "w1 full", {"lokr_w1": kaiming((a, c), generator)}
    if arguments.full_matrix or 2 * rank >= max(b, d):
        second, trained["lokr_w2"] = "w2 full", last(b, d, *kernel)
    elif arguments.use_conv_cp and any(size != 1 for size in kernel):
        second, trained["lokr_t2"] = "cp", kaiming((rank, rank, *kernel), generator)
        trained |= {"lokr_w2_a": kaiming((rank, b), generator), "lokr_w2_b": last(rank, d)}
    else:
        second, trained["lokr_w2_a"] = "w2 product", kaiming((b, rank), generator)
        trained["lokr_w2_b"] = last(rank, d * layer.numel // (layer.out * layer.shape[1]))
    layout = next(layout for layout in LAYOUTS if layout.name == f"{first}, {second}")
    is_whole = (first, second) == ("w1 full", "w2 full")
    return Start(layout, trained, alpha=float(rank) if is_whole else arguments.stored_alpha)


def operands(module: Bound) -> Operands:
    """``c · w1``, and w2 whole or as factors."""
    second = _second(module)
    return {
        "first": _first(module),
        **({"second": module["lokr_w2"]} if second is None else operands_of(second)),
    }


def on_gpu(operands: Operands, layer: TrainableLayer) -> Operands:
    """What moves no run of channels, which takes a GPU longer than products do.

    A thin w2 meets the runs where they are in a linear layer's input, and w1 what is left of them,
    as ``w1ᵀ ⊗ I``; in a convolution it is part of exact factors of ΔW. Where either has more
    multiply-adds than ΔW, or ``w1ᵀ ⊗ I`` would be large itself, w2 is given whole, and ΔW built of
    it. A CP core has nothing better.
    """
    if "core" in operands:
        return {}
    first = operands["first"]
    if "second" in operands:
        return {"first": first, "second": operands["second"].flatten(1)}
    low, columns = low_rank_of(operands), layer.numel // layer.out
    if layer.kind == "linear":
        mixing = first.numel() * low.rank**2
        if 3 * (low.rank * (layer.out + columns) + mixing) < 2 * layer.numel and 8 * mixing <= layer.numel:
            identity = torch.eye(low.rank, dtype=first.dtype, device=first.device)
            return {**operands_of(low), "mixing": kron(first.T, identity)}
    elif 3 * min(first.shape) * low.rank * (layer.out + columns) < 2 * layer.numel:
        left, right = low_rank_split(first)
        return operands_of(LowRank(kron(left, low.up), kron(right, low.down)))
    return {"first": first, "second": low.dense()}


def change(operands: Operands, layer: TrainableLayer, x: Tensor) -> Tensor:
    """``(w1 ⊗ w2) x``: w2 on each of the ``c`` runs of ``d`` channels, then w1 across the runs."""
    first = operands["first"].to(x.dtype)
    is_conv = layer.kind == "conv"
    runs = torch.unflatten(x, layer.channel_axis, (first.shape[1], -1))  # (n, c, d, ...) or (..., c, d)
    if is_conv:
        runs = runs.flatten(0, 1)
    if "second" in operands:
        narrow = layer.apply(
            runs, operands["second"].reshape(-1, runs.shape[layer.channel_axis], *layer.kernel)
        )
    else:
        narrow = layer.low_rank(runs, low_rank_of(operands))
    if is_conv:
        mixed = torch.einsum("ac, ncb... -> nab...", first, torch.unflatten(narrow, 0, (-1, first.shape[1])))
        return mixed.flatten(1, 2)
    return torch.einsum("ac, ...cb -> ...ab", first, narrow).flatten(-2)


def cost(sizes: Sizes, layer: TrainableLayer) -> int:
    """w2 for each of ``c`` runs, then w1 for each of ``b`` rows."""
    a, b, c = (size_of(symbol)(sizes) for symbol in ("out1", "out2", "in1"))
    columns = size_of("in2")(sizes)
    kernel = layer.numel // (layer.out * layer.shape[1])
    if "rank_out" in sizes:
        outer, inner = size_of("rank_out")(sizes), size_of("rank2")(sizes)
        second = inner * columns + outer * inner * kernel + outer * b
    elif "rank2" in sizes:
        # The kernel is folded into the columns where the layout has none.
        second = size_of("rank2")(sizes) * (columns * size_of("kernel")(sizes) + b)
    else:
        second = b * columns * kernel
    return c * second + a * c * b


_REFUSAL = Rule(
    False,
    "LoKr is not mergeable: Kronecker products of different factors do not add",
    "`--rebuild` merges the rebuilt weight change; `lycotool bake` folds it into a checkpoint",
)

LOKR = Algorithm(
    name="lokr",
    title="LoKr (Kronecker product)",
    citation="LyCORIS, arXiv 2309.14859; KronA, arXiv 2212.10650",
    layouts=LAYOUTS,
    dims=dims,
    delta=delta,
    bias_delta=stored_bias,
    factors=factors,
    kronecker_parts=kronecker_parts,
    take_rows=take_rows,
    stack_rows=stack_rows,
    allows_dora=True,
    merge=_REFUSAL,
    resize=Rule(
        False,
        "the Kronecker form has no SVD of its own",
        "`lycotool resize --to lora` converts it exactly to LoRA first",
    ),
    training=Training(
        arguments=FACTOR_ARGUMENTS
        | LORA_PLUS_ARGUMENTS
        | {"factor", "decompose_both", "full_matrix", "unbalanced_factorization"},
        init=init,
        layouts=LAYOUTS,
        learning_rate=2e-4,
        structured=Structured(operands=operands, change=change, on_gpu=on_gpu, cost=cost),
        up=frozenset({"lokr_w1_a", "lokr_w2_a"}),
    ),
    advice=(
        Advice(
            "factor 1 to 8 is recommended",
            frozenset({"factor"}),
            lambda v: v["factor"] < 0 or 1 <= v["factor"] <= 8,
        ),
    ),
)
