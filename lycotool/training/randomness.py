"""Counter-based randomness: a draw is a function of seed, purpose and indices, of nothing else.

``seed_of(seed, purpose, *indices)`` is the first 63 bits of BLAKE2b over the JSON text
``[seed,"purpose",index,...]``. No draw depends on an earlier one, on the number of ranks or on
the device, so a run that is stopped and resumed, or spread over ranks, draws the same numbers,
and no generator state is ever stored.

A purpose is a short name such as ``"noise"``, declared once as a constant by the code that
draws; two purposes never share their draws.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from lycotool.lazy import torch

if TYPE_CHECKING:
    import numpy as np

Item = TypeVar("Item")

#: Keeps the seeds apart from any other use of BLAKE2b on the same text.
_PERSON = b"lycotool"

_EIGHT_WORDS = struct.Struct("<8Q")


def seed_of(seed: int, purpose: str, *indices: int) -> int:
    """63 bits that depend on all arguments, the same on every machine and in every version.

    Parameters
    ----------
    seed
        The run's seed, any integer.
    purpose
        What is drawn.
    indices
        Which draw it is, such as step and sample; ``(1, 2)`` and ``(2, 1)`` differ.

    Examples
    --------
    >>> seed_of(42, "noise", 7, 0)
    2249940442881137274
    """
    digest = hashlib.blake2b(_text(seed, purpose, indices), digest_size=8, person=_PERSON).digest()
    return int.from_bytes(digest, "little") >> 1


def torch_generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A CPU generator for one draw.

    PyTorch's CPU generator keeps 32 bits of its seed: of 65 000 draws two can be expected to
    be equal, which for noise is harmless.
    """
    return torch.Generator("cpu").manual_seed(seed_of(seed, purpose, *indices))


def numpy_generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A NumPy generator for one draw: Philox 4x64, whose key is :func:`seed_of`."""
    import numpy as np

    return np.random.Generator(np.random.Philox(key=seed_of(seed, purpose, *indices)))


def uniforms(count: int, seed: int, purpose: str, *indices: int) -> list[float]:
    """``count`` numbers of [0, 1), multiples of 2^-53; longer lists begin with the shorter ones."""
    return [(word >> 11) / 2**53 for word in _words(count, seed, purpose, indices)]


def shuffled(items: Sequence[Item], seed: int, purpose: str, *indices: int) -> list[Item]:
    """The items in an order in which each permutation is equally likely."""
    words = _words(len(items), seed, purpose, indices)
    return [items[place] for place in sorted(range(len(items)), key=words.__getitem__)]


def _words(count: int, seed: int, purpose: str, indices: Sequence[int]) -> list[int]:
    """64-bit words: the 64-byte BLAKE2b digests of the text, salted by their number.

    A hash and not a generator: nothing has to be set up for a draw or two.
    """
    text = _text(seed, purpose, indices)
    blocks = (
        hashlib.blake2b(text, person=_PERSON, salt=block.to_bytes(16, "little")).digest()
        for block in range(-(-count // 8))
    )
    return [word for block in blocks for word in _EIGHT_WORDS.unpack(block)][:count]


def _text(seed: int, purpose: str, indices: Sequence[int]) -> bytes:
    return json.dumps([int(seed), purpose, *map(int, indices)], separators=(",", ":")).encode()
