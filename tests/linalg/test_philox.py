"""Philox4x32-10 against the known answers that come with Random123, and what masks need of it."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from lycotool.linalg import philox
from lycotool.linalg.philox import philox4x32, uniform

CPU = torch.device("cpu")

#: Counter, key and words of `kat_vectors` in Random123 1.14, rows `philox4x32 10`.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    a, b, c, d = (torch.tensor([word]) for word in words(counter))
    left, right = words(key)

    found = philox4x32((a, b, c, d), (left, right))

    assert [int(word) for word in found] == words(expected)


def test_numbers_depend_on_their_place_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = uniform(1001, key=2**63 + 5, stream=3, device=CPU)
    monkeypatch.setattr(philox, "_CHUNK", 7)

    assert torch.equal(uniform(1001, key=2**63 + 5, stream=3, device=CPU), whole)
    assert torch.equal(uniform(10, key=2**63 + 5, stream=3, device=CPU), whole[:10])


def test_they_are_uniform_and_streams_are_independent() -> None:
    """Kolmogorov-Smirnov and a correlation, at one chance in a million for a good generator."""
    one, two, other = (
        uniform(40_000, key=key, stream=stream, device=CPU).double()
        for key, stream in ((1, 0), (1, 1), (2, 0))
    )

    assert stats.kstest(one.numpy(), "uniform").pvalue > 1e-6
    assert one.min() >= 0
    assert one.max() < 1
    for pair in ((one, two), (one, other)):
        assert abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) < 5 / 40_000**0.5
