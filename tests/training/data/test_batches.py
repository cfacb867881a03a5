"""Epochs: every image as often as it should be, buckets apart, the order a function of seed and epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from examples import many
from hypothesis import given
from hypothesis import strategies as st

from lycotool.training.data.batches import plan_epoch, plan_validation
from lycotool.training.data.buckets import Placement
from lycotool.training.data.dataset import Dataset, Example, Subset
from lycotool.training.data.options import DataOptions

BUCKETS = [(64, 64), (64, 128), (128, 64)]

#: A change of these breaks every resume.
FROZEN = [((64, 64), [4, 0]), ((64, 128), [5, 3]), ((64, 64), [2]), ((64, 128), [1])]


def dataset_of(members, *, batch_sizes=(2,), flip=False):
    """Members are (group, bucket number, repeats)."""
    subsets = tuple(
        Subset(Path(str(group)), DataOptions(batch_size=size, flip_aug=flip), group)
        for group, size in enumerate(batch_sizes)
    )
    examples = tuple(
        Example(Path(f"{i}.png"), BUCKETS[b], "", group, Placement(BUCKETS[b], BUCKETS[b]), repeats)
        for i, (group, b, repeats) in enumerate(members)
    )
    return Dataset(subsets, examples)


members = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=12
)


@many
@given(members, st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch(members, batch_size, ranks, seed, epoch):
    dataset = dataset_of(members, batch_sizes=(batch_size, 3))
    plan = plan_epoch(dataset, seed=seed, epoch=epoch, ranks=ranks)
    uses = Counter((s.example, s.repeat) for batch in plan for s in batch.samples)
    assert uses == Counter((i, r) for i, m in enumerate(members) for r in range(m[2]))
    for batch in plan:
        assert batch.epoch == epoch
        assert 1 <= len(batch.samples) <= dataset.batch_size_of(batch.group) * ranks
        assert {dataset.examples[s.example].bucket for s in batch.samples} == {batch.bucket}
        assert {dataset.group_of(s.example) for s in batch.samples} == {batch.group}
    # Σ ceil(images of the bucket / batch size)
    assert len(plan) == dataset.batches_per_epoch(ranks)
    counts = Counter()
    for group, bucket, repeats in members:
        counts[group, bucket] += repeats
    assert len(plan) == sum(-(-n // ((batch_size, 3)[group] * ranks)) for (group, _), n in counts.items())


def test_ranks_share_a_batch_without_overlap():
    dataset = dataset_of([(0, 0, 5)])
    one = plan_epoch(dataset_of([(0, 0, 5)], batch_sizes=(4,)), seed=3, epoch=1)
    two = plan_epoch(dataset, seed=3, epoch=1, ranks=2)
    assert one == two
    parts = [[batch.of_rank(rank, 2) for batch in two] for rank in (0, 1)]
    for batch, first, second in zip(two, *parts, strict=True):
        assert first.samples == batch.samples[0::2]
        assert second.samples == batch.samples[1::2]
    assert [sum(len(batch.samples) for batch in part) for part in parts] == [3, 2]


def test_order_depends_on_seed_and_epoch_alone():
    dataset = dataset_of([(0, i % 3, 2) for i in range(12)])
    plan = plan_epoch(dataset, seed=1, epoch=2)
    assert plan == plan_epoch(dataset, seed=1, epoch=2)
    assert plan != plan_epoch(dataset, seed=1, epoch=3)
    assert plan != plan_epoch(dataset, seed=2, epoch=2)


def test_order_is_frozen():
    plan = plan_epoch(dataset_of([(0, i % 2, 1) for i in range(6)]), seed=42, epoch=0)
    assert [(batch.bucket, [s.example for s in batch.samples]) for batch in plan] == FROZEN


def test_half_of_the_uses_are_mirrored():
    # 1 000 draws at 1/2 have a standard deviation of 15.8; five of those.
    plan = plan_epoch(dataset_of([(0, 0, 1000)], flip=True), seed=0, epoch=0)
    mirrored = sum(s.flipped for batch in plan for s in batch.samples)
    assert abs(mirrored - 500) < 80
    plain = plan_epoch(dataset_of([(0, 0, 100)]), seed=0, epoch=0)
    assert not any(s.flipped for batch in plain for s in batch.samples)


def test_validation_is_in_order_and_never_mirrored():
    dataset = dataset_of([(0, 1, 1), (0, 0, 1), (0, 0, 1), (0, 0, 1)], flip=True)
    plan = plan_validation(dataset)
    assert [(batch.bucket, [s.example for s in batch.samples]) for batch in plan] == [
        ((64, 64), [1, 2]),
        ((64, 64), [3]),
        ((64, 128), [0]),
    ]
    assert not any(s.flipped for batch in plan for s in batch.samples)
