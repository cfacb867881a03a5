"""float8 weights with scales beside them: how programs store them, as a table.

``W = stored · scale``, the scale one number, one for each row, or one for each block. Sources:
ComfyUI ``comfy/ops.py`` (``scale_weight`` and the marker ``scaled_fp8``) and
``comfy/quant_ops.py`` (``weight_scale`` and ``comfy_quant``), musubi-tuner
``modules/fp8_optimization_utils.py`` (``scale_weight`` of rows and blocks), transformers
``integrations/finegrained_fp8.py`` (``weight_scale_inv`` of blocks of 128, which is a factor
in spite of its name), compressed-tensors (``weight_scale`` of tensors and rows).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to name the scale of a float8 weight.

    Parameters
    ----------
    scale
        The scale's name where the weight is called ``weight``.
    beside
        What else may stand there: scales of the input and notes on the format. They stay true
        when the weight changes.
    block
        Height and width of the blocks, where their number does not tell; 0 where it must.
    """

    scale: str
    beside: tuple[str, ...]
    block: int = 0


SCHEMES = (
    Scheme("scale_weight", ("scale_input",)),
    Scheme("weight_scale", ("input_scale", "comfy_quant")),
    Scheme("weight_scale_inv", ("input_scale", "activation_scale"), block=128),
)

#: A tensor by whose presence ComfyUI knows that a model's weights are scaled.
MARKER = "scaled_fp8"

#: ComfyUI's entry in the metadata that says how each layer is stored.
METADATA = "_quantization_metadata"

#: dtypes that are scaled.
FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})

_SCALE_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})

#: Names beside a weight -> the kind of quantisation they are signs of.
_OTHERS: Mapping[str, str] = {
    "weight.absmax": "bitsandbytes 4-bit",
    "weight.quant_map": "bitsandbytes 4-bit",
    "SCB": "bitsandbytes 8-bit",
    "weight_scale_2": "NVFP4",
    "qweight": "integer (GPTQ, AWQ or SVDQuant)",
}


@dataclass(frozen=True, slots=True)
class Scaled:
    """A float8 weight and its scales.

    Attributes
    ----------
    scale, beside
        Their keys.
    grid
        Rows and columns of scales, as which ``scale`` is read.
    block
        Rows and columns of the weight, flattened to a matrix, that share one.
    fault
        Why it cannot be read, else None.
    """

    weight: str
    scale: str
    beside: tuple[str, ...] = ()
    grid: tuple[int, int] = (1, 1)
    block: tuple[int, int] = (1, 1)
    fault: str | None = None


def scaled_weights(tensors: Mapping[str, tuple[str, Shape]]) -> dict[str, Scaled]:
    """The scaled float8 weights of a checkpoint, by key.

    Parameters
    ----------
    tensors
        dtype (safetensors name) and shape by key.
    """
    found = {}
    for key, (dtype, shape) in tensors.items():
        if dtype not in FLOAT8 or not key.endswith("weight"):
            continue
        stem = key.removesuffix("weight")
        for scheme in SCHEMES:
            if (scale := stem + scheme.scale) in tensors:
                beside = tuple(stem + name for name in scheme.beside if stem + name in tensors)
                found[key] = _scaled(key, shape, scale, tensors[scale], scheme, beside)
                break
    return found


def _scaled(
    key: str,
    shape: Shape,
    scale: str,
    stored: tuple[str, Shape],
    scheme: Scheme,
    beside: tuple[str, ...],
) -> Scaled:
    dtype, sizes = stored
    if dtype not in _SCALE_DTYPES:
        return Scaled(key, scale, beside, fault=f"its scales are {dtype}, which is no float8 weight's")
    rows, columns = shape[0] if shape else 1, math.prod(shape[1:])
    grid = _grid(sizes, rows)
    if grid is not None:
        block = _block(rows, columns, grid, scheme.block)
        if block is not None:
            return Scaled(key, scale, beside, grid, block)
    return Scaled(
        key, scale, beside, fault=f"its scales of shape {list(sizes)} do not fit its shape {list(shape)}"
    )


def _grid(sizes: Shape, rows: int) -> tuple[int, int] | None:
    """Rows and columns of scales of this shape."""
    if math.prod(sizes) == 1:
        return 1, 1
    if sizes[0] == rows and math.prod(sizes[1:]) == 1:
        return rows, 1
    if len(sizes) == 3 and sizes[2] == 1:  # each row is cut into blocks
        return sizes[0], sizes[1]
    return (sizes[0], sizes[1]) if len(sizes) == 2 else None


def _block(rows: int, columns: int, grid: tuple[int, int], size: int) -> tuple[int, int] | None:
    """Rows and columns that share a scale: of the given size where that fits, else equal parts."""
    if size and grid == (-(-rows // size), -(-columns // size)):
        return size, size
    if grid[0] and grid[1] and rows % grid[0] == columns % grid[1] == 0:
        return rows // grid[0], columns // grid[1]
    return None


def other_quantisation(key: str, tensors: Mapping[str, object]) -> str | None:
    """The kind of quantisation that tensors beside a weight are signs of, or None for none.

    The weight is no scaled float8 weight: scales beside it are an integer weight's.
    """
    stem = key.removesuffix("weight")
    for name, kind in _OTHERS.items():
        if stem + name in tensors:
            return kind
    return "scaled integer" if any(stem + scheme.scale in tensors for scheme in SCHEMES) else None
