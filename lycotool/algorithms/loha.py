"""LoHa: ``ΔW = c · (w1_a @ w1_b) ∘ (w2_a @ w2_b)``, ``∘`` elementwise, ``c = alpha / rank``.

With CP cores each product becomes ``Σ w_a[p, o] t[p, q, k] w_b[q, i]``; the CP form stores
``w_a`` transposed. [FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lycotool.algorithms.base import (
    ALPHA,
    Advice,
    Algorithm,
    Bound,
    Layout,
    Rule,
    Shape,
    Sizes,
    Slot,
    StackPart,
    rank_dims,
    size_of,
    stored_bias,
)
from lycotool.algorithms.rows import modules_of, stack_products, stack_slots, take_axis, with_one_scale
from lycotool.algorithms.training import (
    FACTOR_ARGUMENTS,
    LORA_PLUS_ARGUMENTS,
    Arguments,
    Start,
    Training,
    low_rank_form,
    normal,
    zeros,
)
from lycotool.lazy import torch
from lycotool.linalg.low_rank import LowRank, khatri_rao_rows

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.algorithms.layer import TrainableLayer

PLAIN = Layout(
    name="plain",
    slots=(
        Slot("hada_w1_a", "out rank"),
        Slot("hada_w1_b", "rank in_kernel"),
        Slot("hada_w2_a", "out rank2"),
        Slot("hada_w2_b", "rank2 in_kernel"),
        ALPHA,
        Slot("diff_b", "out", required=False),
    ),
    rows=size_of("out"),
    columns=size_of("in_kernel"),
    linear_in=("hada_w1_a", "diff_b"),
)

CP = Layout(
    name="cp",
    slots=(
        Slot("hada_t1", "rank rank *kernel"),
        Slot("hada_w1_a", "rank out"),
        Slot("hada_w1_b", "rank in"),
        Slot("hada_t2", "rank2 rank2 *kernel"),
        Slot("hada_w2_a", "rank2 out"),
        Slot("hada_w2_b", "rank2 in"),
        ALPHA,
        Slot("diff_b", "out", required=False),
    ),
    rows=size_of("out"),
    columns=size_of("in", "kernel"),
    linear_in=("hada_w1_a", "diff_b"),
    use_conv_cp=True,
)


def _halves(module: Bound) -> tuple[LowRank, LowRank]:
    """The two low-rank matrices whose elementwise product is the change."""
    if not module.layout.use_conv_cp:
        first = LowRank(module["hada_w1_a"] * module.dims.scale, module["hada_w1_b"])
        return first, LowRank(module["hada_w2_a"], module["hada_w2_b"])
    core1 = module["hada_t1"]
    core2 = core1 if module.reading.loha_cp_shared_core else module["hada_t2"]
    first = LowRank(module["hada_w1_a"].T * module.dims.scale, module["hada_w1_b"], core1)
    return first, LowRank(module["hada_w2_a"].T, module["hada_w2_b"], core2)


def delta(module: Bound, shape: Shape, base: Tensor | None) -> Tensor:
    """``c · (w1_a @ w1_b) ∘ (w2_a @ w2_b)``."""
    first, second = _halves(module)
    product = first.dense(module.memory)
    return torch.mul(product, second.dense(), out=None if module.memory is None else product).reshape(shape)


def factors(module: Bound) -> LowRank:
    """Exact factors of rank ``rank · rank2`` by Khatri-Rao products of the stored ones.

    The CP form keeps a core: ``t1 ⊗ t2`` over the rank axes, elementwise over the kernel.
    """
    first, second = _halves(module)
    up = khatri_rao_rows(first.up, second.up)
    down = khatri_rao_rows(first.down.T, second.down.T).T
    if first.core is None or second.core is None:
        return LowRank(up, down)
    core = torch.einsum("pq..., rs... -> prqs...", first.core, second.core)
    return LowRank(up, down, core.flatten(2, 3).flatten(0, 1))


def stack_rows(parts: Sequence[StackPart]) -> tuple[dict[str, Tensor], float] | None:
    """Both products stacked: ``∘`` works row by row, so rows of zeros stay zero."""
    if any(module.layout is not PLAIN for module in modules_of(parts)):
        return None
    parts, scale = with_one_scale(parts, "hada_w1_a")
    factors = stack_products(parts, ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))
    biases = stack_slots(parts, "diff_b")
    return None if factors is None else ({**factors, **biases}, scale)


def init(layer: TrainableLayer, arguments: Arguments, generator: torch.Generator) -> Start:
    """Normal values of deviation 1 on the input side and 0.1 elsewhere; ``w2_a`` zero.

    With ``use_scalar`` ``w2_a`` is normal too. Source: LyCORIS ``modules/loha.py``.
    """
    rank = arguments.rank
    with_core = arguments.use_conv_cp and any(size != 1 for size in layer.kernel)
    left = (rank, layer.out) if with_core else (layer.out, rank)
    right = (rank, layer.shape[1] if with_core else layer.numel // layer.out)
    trained = {}
    for half in "12":
        if with_core:
            trained[f"hada_t{half}"] = normal((rank, rank, *layer.kernel), generator, std=0.1)
        trained[f"hada_w{half}_b"] = normal(right, generator, std=1.0)
        is_zero = half == "2" and not arguments.use_scalar
        trained[f"hada_w{half}_a"] = zeros(*left) if is_zero else normal(left, generator, std=0.1)
    return Start(CP if with_core else PLAIN, trained, alpha=arguments.stored_alpha)


def cost(sizes: Sizes, layer: TrainableLayer) -> int:
    """The elements of the factors of rank ``rank · rank2``."""
    rank = size_of("rank", "rank2")(sizes)
    if "in_kernel" in sizes:
        return rank * (size_of("in_kernel")(sizes) + layer.out)
    return rank * (size_of("in")(sizes) + rank * size_of("kernel")(sizes) + layer.out)


_TO_LORA = "`lycotool resize --to lora` converts it exactly to LoRA first"

LOHA = Algorithm(
    name="loha",
    title="LoHa (Hadamard product of two low-rank matrices)",
    citation="FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859",
    layouts=(PLAIN, CP),
    dims=rank_dims("rank"),
    delta=delta,
    bias_delta=stored_bias,
    factors=factors,
    take_rows=take_axis("out"),
    stack_rows=stack_rows,
    allows_dora=True,
    merge=Rule(True, "exact as LoRA factors of rank dim², by Khatri-Rao products"),
    merge_conv_cp=Rule(
        False,
        "LoHa with use_conv_cp is not mergeable: its cores do not add",
        "`--rebuild` merges the rebuilt weight change; `lycotool bake` folds it into a checkpoint",
    ),
    resize=Rule(False, "the Hadamard form has no SVD of its own", _TO_LORA),
    training=Training(
        arguments=FACTOR_ARGUMENTS | LORA_PLUS_ARGUMENTS,
        init=init,
        layouts=(PLAIN, CP),
        learning_rate=2e-4,
        structured=low_rank_form(factors, cost),
        up=frozenset({"hada_w1_a", "hada_w2_a"}),
        rank=8,
    ),
    advice=(
        Advice(
            "dim at most 32 is recommended; samplers do not support more than 64",
            frozenset({"dim"}),
            lambda v: v["dim"] <= 32,
        ),
    ),
)
