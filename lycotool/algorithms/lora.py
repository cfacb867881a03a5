"""LoRA and LoCon: ``ΔW = c · up @ down``; with a CP core ``ΔW = c · up × core × down``.

``c = alpha / rank``. Linear layers (LoRA, LierLa), convolutions of one to three dimensions
(LoCon, C3Lier), the CP/Tucker form (``lora_mid``), and the sparse remainder that LyCORIS'
extraction stores (``ΔW = c · (up @ down + sparse)``). rs_lora needs nothing here: trainers
fold it into the stored alpha. [LoRA, arXiv 2106.09685; LoCon, LyCORIS, arXiv 2309.14859]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lycotool.algorithms.base import (
    ALPHA,
    Advice,
    Algorithm,
    Bound,
    Dims,
    Layout,
    MismatchError,
    Reading,
    Rule,
    Shape,
    Sizes,
    Slot,
    StackPart,
    alpha_over_rank,
    size_of,
)
from lycotool.algorithms.rows import (
    modules_of,
    rows_of,
    stack_products,
    stack_slots,
    take_along,
    with_one_scale,
)
from lycotool.algorithms.training import (
    FACTOR_ARGUMENTS,
    LORA_PLUS_ARGUMENTS,
    Arguments,
    Start,
    Training,
    kaiming,
    low_rank_form,
    zeros,
)
from lycotool.lazy import torch
from lycotool.linalg.low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.algorithms.layer import TrainableLayer

_BASE_COPY = "a copy of the base layer, which sd-scripts' DyLoRA saves beside the adapter"

#: Tensors any LoRA module may have besides its factors.
_COMPANIONS = (
    ALPHA,
    Slot("lora_up.bias", "out", required=False),
    Slot("diff_b", "out", required=False),
    Slot("org_module.weight", "out *base", required=False, unused=_BASE_COPY),
    Slot("org_module.bias", "out", required=False, unused=_BASE_COPY),
)

#: LyCORIS computed this remainder from the wrong matrix for CP modules.
_WRONG_SPARSE = "LyCORIS computes the sparse part of CP modules wrongly; adding it raises the error"

PLAIN = Layout(
    name="plain",
    slots=(Slot("lora_up.weight", "out rank *1"), Slot("lora_down.weight", "rank in *kernel"), *_COMPANIONS),
    rows=size_of("out"),
    columns=size_of("in", "kernel"),
    linear_in=("lora_up.weight", "lora_up.bias", "diff_b"),
)

SPARSE = replace(
    PLAIN,
    name="plain + sparse",
    slots=(
        *PLAIN.slots,
        Slot("bias_indices", "2 nonzero", may_be_empty=True),
        Slot("bias_values", "nonzero", may_be_empty=True),
        Slot("bias_size", "2"),
    ),
    linear_in=(*PLAIN.linear_in, "bias_values"),
)

CP = Layout(
    name="cp",
    slots=(
        Slot("lora_up.weight", "out rank_out *1"),
        Slot("lora_mid.weight", "rank_out rank *kernel"),
        Slot("lora_down.weight", "rank in *1"),
        *_COMPANIONS,
        Slot("bias_indices", "2 nonzero", required=False, unused=_WRONG_SPARSE, may_be_empty=True),
        Slot("bias_values", "nonzero", required=False, unused=_WRONG_SPARSE, may_be_empty=True),
        Slot("bias_size", "2", required=False, unused=_WRONG_SPARSE),
    ),
    rows=size_of("out"),
    columns=size_of("in", "kernel"),
    linear_in=("lora_up.weight", "lora_up.bias", "diff_b"),
    use_conv_cp=True,
)


def dims(layout: Layout, sizes: Sizes, alpha: float | None, reading: Reading) -> Dims:
    """``c = alpha / rank``; times the block size for DyLoRA trained by LyCORIS."""
    found = alpha_over_rank(size_of("rank")(sizes), alpha, reading)
    return replace(found, scale=found.scale * reading.dylora_block_size)


def low_rank(module: Bound) -> LowRank:
    """The stored factors as they are, ``c`` folded into ``up``."""
    up = module["lora_up.weight"].flatten(1) * module.dims.scale
    if "lora_mid.weight" in module:
        return LowRank(up, module["lora_down.weight"].flatten(1), module["lora_mid.weight"])
    return LowRank(up, module["lora_down.weight"].flatten(1))


def factors(module: Bound) -> LowRank | None:
    """The exact factors; None when a sparse part stands beside them."""
    return None if module.layout is SPARSE else low_rank(module)


def delta(module: Bound, shape: Shape, base: Tensor | None) -> Tensor:
    """``c · up @ down`` (through the core if there is one), plus ``c ·`` the sparse part."""
    dense = low_rank(module).dense(module.memory)
    if module.layout is SPARSE:
        dense = dense + module.dims.scale * _sparse(module, dense)
    return dense.reshape(shape)


def _sparse(module: Bound, like: Tensor) -> Tensor:
    """The sparse remainder as a dense matrix shaped like ``like``."""
    rows, columns = _sparse_indices(module, tuple(like.shape))
    sparse = torch.zeros_like(like)
    return sparse.index_put_((rows, columns), module["bias_values"].to(like.dtype), accumulate=True)


def _sparse_indices(module: Bound, shape: Shape) -> Tensor:
    """Where the values of the sparse remainder stand, ``(2, nonzero)``, for a matrix of that shape.

    Indices are stored as int16 and wrap above 32767; they are read back modulo 65536.
    """
    if max(shape) > 65536:
        raise MismatchError(f"bias_indices are 16-bit and cannot address a {list(shape)} matrix")
    indices = module["bias_indices"].long() % 65536
    stored = [int(size) % 65536 for size in module["bias_size"].tolist()]
    if stored != [size % 65536 for size in shape]:
        raise MismatchError(f"bias_size is {stored}, expected {list(shape)}")
    if (indices >= torch.tensor(shape, device=indices.device)[:, None]).any():
        raise MismatchError(f"bias_indices point outside a {list(shape)} matrix")
    return indices


def bias_delta(module: Bound) -> Tensor | None:
    """``diff_b`` as it is, and PEFT's ``lora_B.bias`` times ``c``."""
    total = module.get("diff_b")
    if "lora_up.bias" in module:
        scaled = module["lora_up.bias"] * module.dims.scale
        total = scaled if total is None else total + scaled
    return total


def take_rows(module: Bound, index: Tensor) -> dict[str, Tensor]:
    """``c · up[index] @ down``, and the elements of the sparse part that stand in those rows."""
    taken = take_along(module, {"out": index})
    if module.layout is SPARSE:
        taken |= _take_sparse(module, index)
    return taken


def _take_sparse(module: Bound, index: Tensor) -> dict[str, Tensor]:
    """The sparse remainder of these rows, renumbered."""
    stored, size = module["bias_indices"], module["bias_size"]
    shape = (rows_of(module), size_of("in", "kernel")(module.sizes))
    rows, columns = _sparse_indices(module, shape)
    number = torch.full((shape[0],), -1, device=rows.device)
    number[index.to(rows.device)] = torch.arange(index.numel(), device=rows.device)
    kept = number[rows] >= 0
    renumbered = torch.stack([number[rows[kept]], columns[kept]])
    return {
        "bias_indices": renumbered.to(stored.dtype),  # wraps, see _sparse_indices
        "bias_values": module["bias_values"][kept],
        "bias_size": torch.tensor([index.numel(), shape[1]], device=size.device).to(size.dtype),
    }


def stack_rows(parts: Sequence[StackPart]) -> tuple[dict[str, Tensor], float] | None:
    """``diag(up₁, up₂, …) @ [down₁; down₂; …]``; equal downs stand once and keep their rank."""
    if any(module.layout is not PLAIN for module in modules_of(parts)):
        return None
    parts, scale = with_one_scale(parts, "lora_up.weight", "lora_up.bias")
    factors = stack_products(parts, ("lora_up.weight", "lora_down.weight"))
    biases = stack_slots(parts, "lora_up.bias", "diff_b")
    return None if factors is None else ({**factors, **biases}, scale)


def from_factors(low: LowRank, kernel: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """A LoRA module that holds exactly these factors, with ``alpha = rank`` (so ``c = 1``).

    Parameters
    ----------
    kernel
        The layer's kernel, ``()`` for linear layers; decides the factors' dimensions.
    """
    ones = (1,) * len(kernel)
    out, rank = low.up.shape
    slots = {"lora_up.weight": low.up.reshape(out, rank, *ones)}
    if low.core is None:
        slots["lora_down.weight"] = low.down.reshape(rank, -1, *kernel)
        slots["alpha"] = torch.tensor(float(rank), dtype=dtype)
    else:
        rank_in = low.down.shape[0]
        slots["lora_mid.weight"] = low.core.reshape(rank, rank_in, *kernel)
        slots["lora_down.weight"] = low.down.reshape(rank_in, -1, *ones)
        slots["alpha"] = torch.tensor(float(rank_in), dtype=dtype)
    return slots


def init(layer: TrainableLayer, arguments: Arguments, generator: torch.Generator) -> Start:
    """``down`` and the core uniform, ``up`` zero; with ``use_scalar`` that is uniform too.

    Sources: microsoft/LoRA ``loralib/layers.py``; LyCORIS ``modules/locon.py``.
    """
    rank, ones = arguments.rank, (1,) * len(layer.kernel)
    with_core = arguments.use_conv_cp and layer.kernel != ones
    trained = {
        "lora_down.weight": kaiming((rank, layer.shape[1], *(ones if with_core else layer.kernel)), generator)
    }
    if with_core:
        trained["lora_mid.weight"] = kaiming((rank, rank, *layer.kernel), generator)
    up = (layer.out, rank, *ones)
    trained["lora_up.weight"] = kaiming(up, generator) if arguments.use_scalar else zeros(*up)
    return Start(CP if with_core else PLAIN, trained, alpha=arguments.stored_alpha)


def cost(sizes: Sizes, layer: TrainableLayer) -> int:
    """The elements of the factors."""
    if "rank_out" not in sizes:
        return size_of("rank")(sizes) * (size_of("in", "kernel")(sizes) + layer.out)
    core = size_of("rank_out", "rank", "kernel")(sizes)
    return size_of("rank", "in")(sizes) + core + size_of("rank_out")(sizes) * layer.out


LORA = Algorithm(
    name="lora",
    title="LoRA / LoCon (low-rank factors, linear and convolution)",
    citation="LoRA, arXiv 2106.09685; LoCon, LyCORIS, arXiv 2309.14859",
    layouts=(PLAIN, SPARSE, CP),
    dims=dims,
    delta=delta,
    bias_delta=bias_delta,
    factors=factors,
    take_rows=take_rows,
    stack_rows=stack_rows,
    allows_dora=True,
    merge=Rule(True, "sums of low-rank factors are low-rank: ranks are concatenated"),
    resize=Rule(True, "exact truncated SVD from the factors"),
    resize_conv_cp=Rule(True, "exact after folding the core into the down factor"),
    training=Training(
        arguments=FACTOR_ARGUMENTS | LORA_PLUS_ARGUMENTS,
        init=init,
        layouts=(PLAIN, CP),
        learning_rate=2e-4,
        structured=low_rank_form(factors, cost),
        up=frozenset({"lora_up.weight"}),
        rank_axes=(("lora_up.weight", 1),),
    ),
    advice=(
        Advice("dim at most 64 is recommended", frozenset({"dim"}), lambda v: v["dim"] <= 64),
        Advice(
            "alpha at most dim/2 (or 1) is recommended",
            frozenset({"dim", "alpha"}),
            lambda v: v["alpha"] <= max(1, v["dim"] / 2),
        ),
    ),
)
