"""Writing the adapter: its names, what is kept, and the state beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lycotool.io.dtypes import OPTION_DTYPES, as_bytes, from_torch, to_torch
from lycotool.io.nameless import temporary_beside
from lycotool.io.writer import FilePlan, TensorPlan, write_file
from lycotool.linalg.underflow import Underflow
from lycotool.training.metadata import RunMetadata
from lycotool.training.vanished import forget_what_changes_nothing

if TYPE_CHECKING:
    from lycotool.training.network import Network

#: ``(file in kohya's format, output)``: writes what the user asked for; gives all paths.
Finish = Callable[[Path, Path], list[str]]

SUFFIX = ".safetensors"


class Saver:
    """Writes adapters of one run.

    Parameters
    ----------
    output
        The finished adapter; others get its name and ``-step00000100`` or ``-000002``.
    dtype
        ``fp16``, ``bf16`` or ``fp32``.
    keep
        How many of the others are kept; None keeps all.
    finish
        Turns the file into another format; None leaves it.
    warn
        Told what became zero in a file.

    Attributes
    ----------
    lost
        What was told of the last file.
    """

    def __init__(
        self,
        network: Network,
        metadata: RunMetadata,
        output: Path,
        *,
        dtype: str,
        keep: int | None,
        finish: Finish | None,
        warn: Callable[[str], None],
    ) -> None:
        self._network = network
        self._metadata = metadata
        self._output = output
        self._dtype = to_torch(OPTION_DTYPES[dtype])
        self._keep = keep
        self._finish = finish
        self._warn = warn
        self._written: list[list[str]] = []
        self.lost: list[str] = []

    @property
    def stem(self) -> str:
        """The output's name without its suffix."""
        return self._output.name.removesuffix(SUFFIX)

    def final(self, step: int, epoch: int) -> list[str]:
        """Write the finished adapter."""
        return self._write(self._output, step, epoch)

    def between(self, step: int, epoch: int, *, ends_epoch: bool) -> list[str]:
        """Write one on the way, and remove those that are not kept any more.

        Parameters
        ----------
        ends_epoch
            Whether it is named by the epoch or by the step.
        """
        mark = f"{epoch:06d}" if ends_epoch else f"step{step:08d}"
        suffix = SUFFIX if self._output.name.endswith(SUFFIX) else ""
        paths = self._write(self._output.with_name(f"{self.stem}-{mark}{suffix}"), step, epoch)
        self._written = [earlier for earlier in self._written if earlier != paths] + [paths]
        while self._keep is not None and len(self._written) > self._keep:
            for path in self._written.pop(0):
                _remove(Path(path))
        return paths

    @property
    def written(self) -> list[list[str]]:
        """Files on the way that are kept, for a resumed run."""
        return self._written

    @written.setter
    def written(self, value: list[list[str]]) -> None:
        self._written = value

    def _write(self, path: Path, step: int, epoch: int) -> list[str]:
        underflow = Underflow()
        tensors = self._network.export(self._dtype, underflow)
        forget_what_changes_nothing(underflow, self._network, tensors)
        self.lost = [f"{path.name}: {text}" for text in underflow.warnings()]
        for text in self.lost:
            self._warn(text)
        plans = {key: TensorPlan(from_torch(t.dtype), tuple(t.shape)) for key, t in tensors.items()}
        plan = FilePlan(plans, self._metadata.at(step, epoch), hashed=True)

        def produce(key: str) -> Iterable[memoryview]:
            return [as_bytes(tensors[key])]

        if self._finish is None:
            write_file(path, plan, produce)
            return [str(path)]
        draft = temporary_beside(path, SUFFIX[1:])
        try:
            write_file(draft, plan, produce)
            return self._finish(draft, path)
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()


def _remove(path: Path) -> None:
    """Remove a file, or a folder of files as PEFT's format is."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            for inner in path.iterdir():
                inner.unlink()
            path.rmdir()
        else:
            path.unlink()
