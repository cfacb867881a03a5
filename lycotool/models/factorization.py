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
