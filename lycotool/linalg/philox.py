"""Random numbers that depend on a key and a place alone, not on device, order or batching.

Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random
numbers: as easy as 1, 2, 3" (SC 2011): a block cipher with few rounds, applied to a counter.
It is computed with integer tensor operations, so that every device gives the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10

#: Blocks of four words computed at a time, which bounds the scratch memory.
_CHUNK = 2**18


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four random words for each counter.

    Parameters
    ----------
    counter
        The four words of each counter, int64 tensors of one shape with values below 2³².
    key
        Two words below 2³².
    """
    a, b, c, d = counter
    left, right = key
    for _ in range(_ROUNDS):
        high1, low1 = _multiply(a, _MULTIPLIERS[0])
        high2, low2 = _multiply(c, _MULTIPLIERS[1])
        a, b, c, d = high2 ^ b ^ left, low2, high1 ^ d ^ right, low1
        left, right = (left + _WEYL[0]) & _WORD, (right + _WEYL[1]) & _WORD
    return a, b, c, d


def _multiply(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Upper and lower word of the 64-bit product."""
    product = words * factor  # modulo 2⁶⁴, whatever its sign
    return (product >> 32) & _WORD, product & _WORD


def uniform(count: int, *, key: int, stream: int, device: torch.device) -> Tensor:
    """``count`` numbers in [0, 1), multiples of 2⁻²⁴, as float32.

    Parameters
    ----------
    key
        64 bits that name the sequence.
    stream
        32 bits that name one of its independent streams.
    """
    words = torch.empty(4 * -(-count // 4), dtype=torch.float32, device=device)
    halves = key & _WORD, (key >> 32) & _WORD
    for start in range(0, len(words) // 4, _CHUNK):
        stop = min(start + _CHUNK, len(words) // 4)
        block = torch.arange(start, stop, dtype=torch.int64, device=device)
        zero = torch.zeros_like(block)
        found = philox4x32((block & _WORD, block >> 32, zero + stream, zero), halves)
        words[4 * start : 4 * stop] = (torch.stack(found, 1).flatten() >> 8).float() * 2.0**-24
    return words[:count]
