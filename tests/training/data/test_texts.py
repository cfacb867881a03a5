"""Encoded captions: by ids, one at a time, within a limit, never stale."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from ranks import in_threads

from lycotool.training.data.texts import TextCache


@dataclass
class Made:
    hidden: torch.Tensor
    pooled: torch.Tensor | None


class Encoder:
    """Two encoders' stand-in that remembers what it was asked."""

    def __init__(self, *, pooled=True):
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.pooled = pooled
        self.asked = []

    def __call__(self, ids):
        assert all(encoder.shape[0] == 1 for encoder in ids)
        self.asked.append([encoder.flatten().tolist() for encoder in ids])
        hidden = torch.stack([encoder.flatten().float() for encoder in ids], dim=-1)[:, :]
        hidden = (hidden * self.weight)[None]
        return Made(hidden, hidden.sum(dim=1) if self.pooled else None)


def ids(*rows):
    """The same ids for two encoders, the second shifted by 100."""
    first = torch.tensor(rows)[:, None, :]
    return [first, first + 100]


def cache_of(encoder, **options):
    return TextCache(encoder, **({"key": "te", "clip_skip": None} | options))


def test_captions_are_encoded_once():
    encoder = Encoder()
    cache = cache_of(encoder)
    hidden, pooled = cache.get(ids([1, 2], [3, 4], [1, 2]))
    assert encoder.asked == [[[1, 2], [101, 102]], [[3, 4], [103, 104]]]
    assert hidden.tolist() == [[[1, 101], [2, 102]], [[3, 103], [4, 104]], [[1, 101], [2, 102]]]
    assert pooled.tolist() == [[3, 203], [7, 207], [3, 203]]
    assert not hidden.requires_grad
    cache.get(ids([3, 4]))
    assert cache.encoded == 2


def test_without_a_pooled_output():
    assert cache_of(Encoder(pooled=False)).get(ids([1, 2])).pooled is None


def test_what_is_returned_does_not_depend_on_what_was_known():
    one, other = cache_of(Encoder()), cache_of(Encoder())
    one.get(ids([3, 4]))
    assert torch.equal(one.get(ids([1, 2], [3, 4])).hidden, other.get(ids([1, 2], [3, 4])).hidden)


def test_the_limit_lets_the_oldest_go():
    encoder = Encoder(pooled=False)
    cache = cache_of(encoder, limit=2 * 16)  # two captions of 2 x 2 float32
    cache.get(ids([1, 2], [3, 4]))
    cache.get(ids([1, 2]))
    cache.get(ids([5, 6]))  # [3, 4] was used longest ago
    assert cache.nbytes == 32
    cache.get(ids([1, 2]))
    assert cache.encoded == 3
    cache.get(ids([3, 4]))
    assert cache.encoded == 4


def test_a_caption_larger_than_the_limit_is_still_given():
    cache = cache_of(Encoder(), limit=1)
    assert cache.get(ids([1, 2], [3, 4])).hidden.shape == (2, 2, 2)


@pytest.mark.parametrize("pooled", [True, False])
def test_on_disk(tmp_path, pooled):
    first = cache_of(Encoder(pooled=pooled), folder=tmp_path)
    first.fill(ids([1, 2], [3, 4], [1, 2]))
    assert first.encoded == 2
    assert len(list(tmp_path.iterdir())) == 2
    second = cache_of(Encoder(pooled=pooled), folder=tmp_path)
    found, made = second.get(ids([1, 2], [3, 4])), first.get(ids([1, 2], [3, 4]))
    assert second.encoded == 0
    assert torch.equal(found.hidden, made.hidden)
    assert found.pooled is made.pooled or torch.equal(found.pooled, made.pooled)


def test_captions_met_on_the_way_are_not_stored(tmp_path):
    cache = cache_of(Encoder(), folder=tmp_path)
    cache.get(ids([1, 2]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"key": "another"}, {"clip_skip": 2}])
def test_other_encoders_are_never_served_stale(tmp_path, change):
    cache_of(Encoder(), folder=tmp_path).fill(ids([1, 2]))
    other = cache_of(Encoder(), folder=tmp_path, **change)
    other.get(ids([1, 2]))
    assert other.encoded == 1


def test_windows_are_part_of_the_key(tmp_path):
    cache = cache_of(Encoder(), folder=tmp_path)
    flat = torch.tensor([[1, 2, 3, 4]])
    cache.get([flat, flat])
    cache.get([flat.reshape(1, 2, 2), flat.reshape(1, 2, 2)])
    assert cache.encoded == 2


def test_damaged_entries_are_encoded_again(tmp_path):
    cache_of(Encoder(), folder=tmp_path).fill(ids([1, 2]))
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(entry.read_bytes()[:-1])
    again = cache_of(Encoder(), folder=tmp_path)
    again.fill(ids([1, 2]))
    assert again.encoded == 1
    assert len(again.notes) == 1
    assert cache_of(Encoder(), folder=tmp_path).notes == ()


def test_ranks_share_the_work(tmp_path):
    rows = ids([1, 2], [3, 4], [5, 6])
    waited, done, counts = [], [], []
    for rank in (0, 1):
        cache = cache_of(Encoder(), folder=tmp_path)
        cache.fill(rows, rank=rank, ranks=2, gather=lambda value: waited.append(1), advance=done.append)
        counts.append(cache.encoded)
    assert counts == [2, 1]
    assert len(waited) == 2
    assert sum(done) == 3


def test_ranks_share_the_work_in_memory(monkeypatch):
    monkeypatch.setattr("lycotool.training.data.texts._MESSAGE", 1)
    rows = ids([1, 2], [3, 4], [5, 6], [1, 2])
    caches = [cache_of(Encoder()), cache_of(Encoder())]

    def fill(rank, gather):
        caches[rank].fill(rows, rank=rank, ranks=2, gather=gather)

    in_threads(fill)
    alone = cache_of(Encoder()).get(rows)
    assert [cache.encoded for cache in caches] == [2, 1]
    for cache in caches:
        assert torch.equal(cache.get(rows).hidden, alone.hidden)
        assert torch.equal(cache.get(rows).pooled, alone.pooled)
    assert [cache.encoded for cache in caches] == [2, 1]
