"""What a data set is once it has been read: examples, where each came from, and what was noticed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lycotool.training.data.buckets import Placement
from lycotool.training.data.options import DataOptions, Size


@dataclass(frozen=True, slots=True)
class Subset:
    """A folder or metadata file, and the options its images are used with.

    Parameters
    ----------
    source
        The folder or file.
    options
        With everything the dataset file says for this place.
    group
        Which ``[[datasets]]`` it belongs to: batches stay within one.
    """

    source: Path
    options: DataOptions
    group: int = 0


@dataclass(frozen=True, slots=True)
class Example:
    """One image and its caption.

    Parameters
    ----------
    path
        The image file.
    size
        Width and height as a viewer shows it, EXIF orientation applied.
    caption
        As written: before prefix, dropout and shuffling; may have several lines.
    subset
        Index into :attr:`Dataset.subsets`.
    placement
        The bucket, and the size before the crop.
    repeats
        Times per epoch.
    loss_weight
        1, or ``prior_loss_weight`` for a regularisation image.
    """

    path: Path
    size: Size
    caption: str
    subset: int
    placement: Placement
    repeats: int
    loss_weight: float = 1.0

    @property
    def bucket(self) -> Size:
        """Width and height it is trained at."""
        return self.placement.bucket


@dataclass(frozen=True, slots=True)
class Sample:
    """One use of an example in an epoch, with all that was drawn when the epoch was planned."""

    example: int
    repeat: int
    flipped: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one bucket that are trained together.

    Parameters
    ----------
    group
        Which dataset of the file.
    bucket
        Width and height.
    epoch
        The epoch it was planned for, counted from 0.
    """

    group: int
    bucket: Size
    epoch: int
    samples: tuple[Sample, ...]

    def of_rank(self, rank: int, ranks: int) -> Batch:
        """Every ``ranks``-th sample from ``rank``: one rank's part, which may be empty."""
        return Batch(self.group, self.bucket, self.epoch, self.samples[rank::ranks])


@dataclass(frozen=True)
class Dataset:
    """Everything that is trained on.

    Parameters
    ----------
    subsets
        In the order they were read.
    examples
        In the order of subsets and file names; an index into it names an image for every draw.
    warnings
        What the user should know, one sentence each.
    validation
        Examples set aside, without augmentation; None if there are none.
    """

    subsets: tuple[Subset, ...]
    examples: tuple[Example, ...]
    warnings: tuple[str, ...] = ()
    validation: Dataset | None = None

    def options_of(self, example: int) -> DataOptions:
        """The options an example is used with."""
        return self.subsets[self.examples[example].subset].options

    def group_of(self, example: int) -> int:
        """Which dataset of the file an example belongs to."""
        return self.subsets[self.examples[example].subset].group

    def batch_size_of(self, group: int) -> int:
        """Images per step and GPU in a dataset of the file."""
        return next(s.options.batch_size for s in self.subsets if s.group == group)

    @cached_property
    def buckets(self) -> dict[tuple[int, Size], int]:
        """Images per epoch, repeats counted, of each group and bucket that is used; sorted."""
        counts: Counter[tuple[int, Size]] = Counter()
        for index, example in enumerate(self.examples):
            counts[self.group_of(index), example.bucket] += example.repeats
        return dict(sorted(counts.items()))

    @property
    def images_per_epoch(self) -> int:
        """Images an epoch trains, repeats counted."""
        return sum(self.buckets.values())

    def batches_per_epoch(self, ranks: int = 1) -> int:
        """Steps an epoch takes: the sum over buckets of images / (batch size · ranks), rounded up."""
        return sum(-(-n // (self.batch_size_of(group) * ranks)) for (group, _), n in self.buckets.items())

    def tag_frequency(self) -> dict[str, dict[str, int]]:
        """How often each tag occurs, per source folder: ``ss_tag_frequency`` of the metadata."""
        found: dict[str, Counter[str]] = {}
        for example in self.examples:
            tags = (tag.strip().lower() for tag in example.caption.split(","))
            found.setdefault(self.subsets[example.subset].source.name, Counter()).update(filter(None, tags))
        return {name: dict(counts) for name, counts in found.items()}

    def describe(self, ranks: int = 1) -> tuple[str, ...]:
        """Lines that say what was found: sources, images, repeats, buckets; batches of so many ranks."""
        lines = []
        repeats: dict[int, list[int]] = {index: [] for index in range(len(self.subsets))}
        for example in self.examples:
            repeats[example.subset].append(example.repeats)
        for index, subset in enumerate(self.subsets):
            found = repeats[index] or [0]
            times = str(min(found)) if min(found) == max(found) else f"{min(found)} to {max(found)}"
            kind = " (regularisation)" if subset.options.is_reg else ""
            lines.append(f"{subset.source}: {len(repeats[index])} images x {times}{kind}")
        lines.extend(f"bucket {w}x{h}: {count} images" for (_, (w, h)), count in self.buckets.items())
        steps = self.batches_per_epoch(ranks)
        lines.append(f"{self.images_per_epoch} images and {steps} batches per epoch")
        if self.validation is not None:
            lines.append(f"{len(self.validation.examples)} images for validation")
        return tuple(lines)
