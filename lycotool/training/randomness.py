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
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from lycotool.lazy import torch

if TYPE_CHECKING:
    import numpy as np

Item = TypeVar("Item")

#: Keeps the seeds apart from any other use of BLAKE2b on the same text.
_PERSON = b"lycotool"


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
    text = json.dumps([int(seed), purpose, *map(int, indices)], separators=(",", ":"))
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=_PERSON).digest()
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
    """``count`` numbers of [0, 1), multiples of 2^-53; longer lists begin with the shorter ones.

    They come from Philox's raw bits: NumPy promises those for ever, its distributions it does not.
    """
    raw = numpy_generator(seed, purpose, *indices).bit_generator.random_raw(count)
    return [int(bits) / 2**53 for bits in raw >> 11]


def shuffled(items: Sequence[Item], seed: int, purpose: str, *indices: int) -> list[Item]:
    """The items in an order in which each permutation is equally likely."""
    keys = numpy_generator(seed, purpose, *indices).bit_generator.random_raw(len(items))
    return [items[place] for place in keys.argsort(kind="stable")]
