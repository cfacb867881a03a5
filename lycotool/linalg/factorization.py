"""How LoKr splits a dimension in two; every LoKr file's shapes come from this rule."""

from __future__ import annotations


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Split ``dimension`` into ``(m, n)``, ``m·n = dimension``, ``m <= n``.

    With a positive ``factor`` that divides it, the two are ``factor`` and the rest; else the
    most equal split with ``m <= factor`` (without a bound for a negative ``factor``).
    Source: LyCORIS ``functional/general.py``, ``factorization``.

    >>> factorization(320, 8), factorization(250, 8), factorization(360, -1), factorization(7)
    ((8, 40), (5, 50), (18, 20), (1, 7))
    """
    if factor > 0 and dimension % factor == 0:
        m, n = sorted((factor, dimension // factor))
        return m, n
    limit = dimension if factor < 0 else factor
    m = max(d for d in range(1, int(dimension**0.5) + 1) if dimension % d == 0 and d <= limit)
    return m, dimension // m


def butterfly_factorization(dimension: int, factor: int = -1) -> tuple[int, int] | None:
    """Split ``dimension`` into ``(block, blocks)`` for a butterfly: ``blocks`` a power of two.

    The block is the largest even one that is at most ``factor`` (without a bound for -1); None
    where there is none. Source: LyCORIS ``functional/general.py``, ``power2factorization``.

    >>> butterfly_factorization(320, 16), butterfly_factorization(1280), butterfly_factorization(15, 4)
    ((10, 32), (1280, 1), None)
    """
    limit = dimension if factor == -1 else factor
    blocks = 1
    while dimension % (2 * blocks) == 0:  # an even block is left
        if dimension // blocks <= limit:
            return dimension // blocks, blocks
        blocks *= 2
    return None
