"""Draws depend on their names alone. The vectors are frozen: a change of one breaks every resume."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from examples import many
from hypothesis import given
from hypothesis import strategies as st

from lycotool.training.randomness import numpy_generator, seed_of, shuffled, torch_generator, uniforms

GOLDEN = {
    (42, "noise", 7, 0): 2249940442881137274,
    (42, "noise", 0, 7): 3830470307098416921,
    (0, "a"): 1290648035185288882,
    (-1, "é", 2**40): 6282469823516302713,
}


@pytest.mark.parametrize("arguments", GOLDEN)
def test_seeds_are_frozen(arguments):
    assert seed_of(*arguments) == GOLDEN[arguments]


def test_a_seed_is_blake2b_of_a_json_text():
    digest = hashlib.blake2b(b'[42,"noise",7,0]', digest_size=8, person=b"lycotool").digest()
    assert seed_of(42, "noise", 7, 0) == int.from_bytes(digest, "little") // 2


def test_numpy_draws_are_frozen():
    bits = numpy_generator(42, "noise", 7, 0).bit_generator.random_raw(3).tolist()
    assert bits == [5907872776716491833, 428619783570926989, 17590170211022657073]


def test_torch_draws_are_frozen():
    draws = torch.randint(0, 2**31, (4,), generator=torch_generator(42, "noise", 7, 0))
    assert draws.tolist() == [412033337, 1364960813, 1396887513, 1822976446]


names = st.tuples(st.integers(), st.text(max_size=8), st.lists(st.integers(), max_size=4))


@many
@given(names, names)
def test_different_names_give_different_seeds(one, other):
    same = one == other
    assert (seed_of(one[0], one[1], *one[2]) == seed_of(other[0], other[1], *other[2])) is same


@many
@given(names)
def test_seeds_fit_every_generator(name):
    seed = seed_of(name[0], name[1], *name[2])
    assert 0 <= seed < 2**63
    torch_generator(name[0], name[1], *name[2])
    numpy_generator(name[0], name[1], *name[2])


def test_integers_of_any_kind_are_the_same_index():
    assert seed_of(np.int64(42), "noise", np.int32(7), torch.tensor(0)) == seed_of(42, "noise", 7, 0)


def test_order_of_draws_does_not_matter():
    first = [torch.randn(3, generator=torch_generator(0, "x", i)) for i in (0, 1)]
    second = [torch.randn(3, generator=torch_generator(0, "x", i)) for i in (1, 0)]
    assert torch.equal(first[0], second[1])
    assert torch.equal(first[1], second[0])


def test_a_new_process_draws_the_same():
    code = "from lycotool.training.randomness import seed_of; print(seed_of(42, 'noise', 7, 0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == GOLDEN[42, "noise", 7, 0]


WORDS = [9784274653455564464, 5547901465291657339, 16927274079965971838]


def test_words_are_blake2b_digests():
    text = b'[42,"noise",7,0]'
    blocks = [
        hashlib.blake2b(text, person=b"lycotool", salt=bytes([number]) + bytes(15)).digest()
        for number in (0, 1)
    ]
    words = [int.from_bytes(block[i : i + 8], "little") for block in blocks for i in range(0, 64, 8)]
    assert words[:3] == WORDS
    assert uniforms(12, 42, "noise", 7, 0) == [word // 2**11 / 2**53 for word in words[:12]]
    assert uniforms(2, 42, "noise", 7, 0) == uniforms(12, 42, "noise", 7, 0)[:2]
    assert uniforms(0, 42, "noise", 7, 0) == []
    assert shuffled(range(12), 42, "noise", 7, 0) == sorted(range(12), key=words.__getitem__)


@many
@given(st.lists(st.integers(), max_size=20), st.integers())
def test_shuffled_is_a_permutation(items, seed):
    assert sorted(shuffled(items, seed, "x")) == sorted(items)


def test_shuffled_reaches_every_permutation_alike():
    # 6 permutations of 6 000 draws: 1 000 each, standard deviation 28.9; five of those.
    counts: dict[tuple[str, ...], int] = {}
    for index in range(6000):
        order = tuple(shuffled("abc", 0, "x", index))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert all(abs(count - 1000) < 145 for count in counts.values())
