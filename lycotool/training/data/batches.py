"""The order of an epoch: a function of seed and epoch alone.

A batch never mixes buckets, nor the ``[[datasets]]`` of a dataset file. An epoch has
``Σ ceil(images of the bucket / batch size)`` batches, as in sd-scripts.
"""

from __future__ import annotations

from lycotool.training.data.dataset import Batch, Dataset, Sample
from lycotool.training.data.options import Size
from lycotool.training.randomness import shuffled, uniforms

#: Which image comes when within its bucket; index: epoch, group, bucket width and height.
IMAGE_ORDER = "image order"
#: Which batch comes when; index: epoch.
BATCH_ORDER = "batch order"
#: Whether each use of an image is mirrored; index: epoch, example.
FLIP = "flip"


def plan_epoch(dataset: Dataset, *, seed: int, epoch: int, ranks: int = 1) -> tuple[Batch, ...]:
    """Every batch of an epoch, in order.

    Parameters
    ----------
    seed
        The run's.
    epoch
        Counted from 0.
    ranks
        A batch holds the samples of all of them, ``batch_size`` each: the plan for ``N`` ranks
        is the plan for one rank with ``N`` times the batch size. ``Batch.of_rank`` takes a part.
    """
    pools: dict[tuple[int, Size], list[Sample]] = {}
    for index, example in enumerate(dataset.examples):
        pool = pools.setdefault((dataset.group_of(index), example.bucket), [])
        pool.extend(_uses(dataset, index, seed=seed, epoch=epoch))
    batches: list[Batch] = []
    for (group, bucket), pool in sorted(pools.items()):
        size = dataset.batch_size_of(group) * ranks
        order = shuffled(pool, seed, IMAGE_ORDER, epoch, group, *bucket)
        parts = (tuple(order[start : start + size]) for start in range(0, len(order), size))
        batches.extend(Batch(group, bucket, epoch, part) for part in parts)
    return tuple(shuffled(batches, seed, BATCH_ORDER, epoch))


def plan_validation(dataset: Dataset) -> tuple[Batch, ...]:
    """Every example once, in order, nothing mirrored: the same batches every time."""
    batches: list[Batch] = []
    for group, bucket in dataset.buckets:
        members = [
            index
            for index, example in enumerate(dataset.examples)
            if example.bucket == bucket and dataset.group_of(index) == group
        ]
        size = dataset.batch_size_of(group)
        for start in range(0, len(members), size):
            samples = tuple(Sample(index, 0) for index in members[start : start + size])
            batches.append(Batch(group, bucket, 0, samples))
    return tuple(batches)


def _uses(dataset: Dataset, index: int, *, seed: int, epoch: int) -> list[Sample]:
    repeats = dataset.examples[index].repeats
    if not dataset.options_of(index).flip_aug:
        return [Sample(index, repeat) for repeat in range(repeats)]
    draws = uniforms(repeats, seed, FLIP, epoch, index)
    return [Sample(index, repeat, flipped=draw < 0.5) for repeat, draw in enumerate(draws)]
