"""Random tensors of every dtype, and what the reference implementation knows of them."""

import torch
from hypothesis import strategies as st

#: Every dtype the reference writes whole bytes of, in the order it sorts them by.
DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64",
    torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip

text = st.text(st.characters(codec="utf-8"), max_size=8)
names = text.filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Any bytes are an element, NaN included, except that a bool is 0 or 1."""
    width = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (*shape, width), generator=generator)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes, which compare NaN with NaN."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def state_dicts(
    draw: st.DrawFn, *, min_size: int = 0, dtypes: list[torch.dtype] | None = None
) -> dict[str, torch.Tensor]:
    """Up to six tensors of any names, dtypes and small shapes, empty and 0-dim ones included."""
    kinds = st.tuples(st.sampled_from(dtypes or list(DTYPES)), shapes)
    entries = draw(st.dictionaries(names, kinds, min_size=min_size, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return {name: random_bits(dtype, shape, generator) for name, (dtype, shape) in entries.items()}
