"""A GPU's memory ran out: what was expected, and what takes less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lycotool.errors import ResourceError
from lycotool.lazy import torch
from lycotool.training.memory.choice import MemoryChoice, gibibytes, remedies
from lycotool.training.options import TrainOptions


@contextmanager
def explained(options: TrainOptions, choice: MemoryChoice | None = None) -> Iterator[None]:
    """Turn running out of a GPU's memory into an error that names what to change.

    Parameters
    ----------
    choice
        What was estimated; None before that.

    Raises
    ------
    ResourceError
        In place of torch's own error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        expected = "the GPU has no memory left"
        if choice is not None and choice.available is not None:
            expected += (
                f": training was estimated at {gibibytes(choice.estimate.total)}, "
                f"{gibibytes(choice.available)} were free"
            )
        raise ResourceError(
            expected,
            details=[str(error).partition("\n")[0]],
            hint=remedies(options, checkpointing=bool(options.compute.gradient_checkpointing)),
        ) from None
