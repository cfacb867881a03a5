"""Row C12: the disk is full; ``python -m tests.reliability disk`` does it in more steps."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from reliability.full_disk import run_on_full_disk
from reliability.injection import SMALL_JOBS, Job, large
from reliability.lab import OK, OUTPUT, Server

#: Bakes four MiB, which is 1024 pages of 4 KiB and one for the header.
LARGE = Job("large", ("bake", "large.safetensors", "thin.safetensors", "-o", "out.safetensors"))


def four_mebibytes(folder: Path) -> None:
    """The input of :data:`LARGE`."""
    large(folder, 4)


@pytest.mark.parametrize("job", SMALL_JOBS, ids=lambda job: job.name)
def test_disk_that_fills_up(
    job: Job, server: Server, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    """No room at all, room for a part, and room enough: every output is whole, or as before."""
    outcome = run_on_full_disk(server, job, tmp_path, (0, 1, 16))
    record_property("disk", outcome.how)
    assert OUTPUT in outcome.codes.values()
    if outcome.how == "tmpfs":
        assert outcome.codes[0] == OUTPUT
        assert outcome.codes[16] == OK


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_ladder(
    kind: Literal["tmpfs", "ext4"], server: Server, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    """Between nothing and enough there is one step at which it begins to work."""
    steps = (0, 300, 900, 1023, 1025, 1040)
    outcome = run_on_full_disk(
        server, LARGE, tmp_path, steps, prepare=four_mebibytes, kilobytes=10240, kind=kind
    )
    record_property("disk", outcome.how)
    if outcome.how == kind:
        codes = list(outcome.codes.values())
        assert codes == sorted(codes, reverse=True)
        assert (codes[0], codes[-1]) == (OUTPUT, OK)


def test_two_writers_and_room_for_one(
    server: Server, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    """Both find room before they begin; who comes second says that there is none, and leaves nothing."""
    outcome = run_on_full_disk(
        server, TWO, tmp_path, (1500,), prepare=four_mebibytes, kilobytes=12288, copies=2
    )
    record_property("disk", outcome.how)


TWO = Job("two", (*LARGE.argv[:-1], "out-{copy}.safetensors"), ("out-1.safetensors", "out-2.safetensors"))
