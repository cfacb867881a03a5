"""How often each tag stood in the captions that an adapter was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TagRow:
    """One tag: how often it occurs, in how many data sets, and on what share of the images.

    ``share`` is None where the metadata does not count the images. sd-scripts counts an image
    once for every caption line, so a share can pass 1.
    """

    tag: str
    count: int
    datasets: int
    share: float | None


def tag_rows(metadata: Mapping[str, object]) -> list[TagRow]:
    """The tags of ``ss_tag_frequency``, merged over all data sets, commonest first.

    Parameters
    ----------
    metadata
        Decoded: ``ss_tag_frequency`` maps each data set to its tags' counts. Whatever is not of
        that form is passed over, because anybody can write it.
    """
    frequencies = metadata.get("ss_tag_frequency")
    counts: dict[str, list[int]] = {}
    for tags in frequencies.values() if isinstance(frequencies, dict) else ():
        found: dict[str, int] = {}
        for tag, number in tags.items() if isinstance(tags, dict) else ():
            if type(number) is int and number > 0:  # a bool is no count
                found[tag.strip()] = found.get(tag.strip(), 0) + number
        for tag, number in found.items():
            counts.setdefault(tag, []).append(number)
    images = _images(metadata)
    rows = [
        TagRow(tag, sum(numbers), len(numbers), sum(numbers) / images if images else None)
        for tag, numbers in counts.items()
    ]
    return sorted(rows, key=lambda row: (-row.count, row.tag))


def _images(metadata: Mapping[str, object]) -> int:
    """Images of the data sets that tags are counted in, without their repeats."""
    folders = metadata.get("ss_dataset_dirs")
    if not isinstance(folders, dict):
        return 0
    counts = [about.get("img_count") for about in folders.values() if isinstance(about, dict)]
    return sum(number for number in counts if type(number) is int and number > 0)
