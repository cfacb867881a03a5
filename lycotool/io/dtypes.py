"""safetensors dtype names, torch dtypes and the names users type, in one table."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lycotool.errors import UsageError
from lycotool.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

#: safetensors name -> attribute of torch.
_TORCH_NAMES: Mapping[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16",
    "I32": "int32", "U32": "uint32", "I64": "int64", "U64": "uint64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64",
}  # fmt: skip

#: Values of ``--dtype`` (the aliases are those of sd-scripts' ``--save_precision``).
OPTION_DTYPES: Mapping[str, str] = {
    "fp32": "F32", "fp16": "F16", "bf16": "BF16",
    "fp8_e4m3fn": "F8_E4M3", "fp8_e5m2": "F8_E5M2",
    "float": "F32", "float32": "F32", "half": "F16", "float16": "F16", "bfloat16": "BF16",
}  # fmt: skip

#: dtypes that hold weights one can compute with.
FLOATING = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})


def to_torch(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name.

    Raises
    ------
    UsageError
        If this version of torch has no such dtype, or the machine stores numbers the other way round.
    """
    _check_byte_order()
    dtype = getattr(torch, _TORCH_NAMES.get(name, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"torch {torch.__version__} has no dtype for {name}")
    return dtype


def has_name(dtype: torch.dtype) -> bool:
    """Whether safetensors files can hold this dtype."""
    return str(dtype).removeprefix("torch.") in _TORCH_NAMES.values()


def from_torch(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    attribute = str(dtype).removeprefix("torch.")
    return next(name for name, torch_name in _TORCH_NAMES.items() if torch_name == attribute)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in row-major order, as a file stores them.

    Raises
    ------
    UsageError
        If the machine stores numbers the other way round.
    """
    _check_byte_order()
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _check_byte_order() -> None:
    """Files are little-endian; wrong numbers without a word would be the worst of all answers."""
    if sys.byteorder != "little":
        raise UsageError(
            f"this machine is {sys.byteorder}-endian, files of tensors are little-endian",
            hint="`lycotool inspect` reads headers here; everything else needs a little-endian machine",
        )
