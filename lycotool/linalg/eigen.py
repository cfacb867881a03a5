"""Eigenvalues and eigenvectors of many small symmetric matrices at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from lycotool.errors import NumericError
from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Sides up to this go to LAPACK on threads, one matrix a thread, whatever device they are on.
#: Measured for 794 matrices of 128: 83 ms on 16 cores, 1281 ms by cuSOLVER on an H100, which
#: takes them one after another. From about here on one matrix fills a GPU.
_THREADED = 512

#: Bytes up to which a batch is brought to the CPU in one piece; above it each thread fetches
#: its own matrices, because the copies then cost as much as the algebra.
_MOVED_TOGETHER = 16 * 2**20

_workers: ContextVar[tuple[ThreadPoolExecutor, int] | None] = ContextVar("workers", default=None)


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """``A = X Λ Xᵀ`` of each symmetric matrix of a batch.

    Parameters
    ----------
    matrices
        ``(batch, n, n)``, float64.

    Returns
    -------
    Tensor, Tensor
        Eigenvalues descending ``(batch, n)`` and eigenvectors in columns, on the same device.

    Raises
    ------
    NumericError
        If LAPACK finds none: an element is not finite, because products overflowed.
    """
    batch, side = matrices.shape[0], matrices.shape[-1]
    with _as_numeric():
        if side > _THREADED or (matrices.device.type == "cpu" and batch == 1):
            values, vectors = torch.linalg.eigh(matrices)
        elif matrices.nbytes < _MOVED_TOGETHER:
            values, vectors = (found.to(matrices.device) for found in _on_threads(matrices.cpu()))
        else:
            values, vectors = _on_threads(matrices)
    return values.flip(-1), vectors.flip(-1)


def eigenvalues(matrices: Tensor) -> Tensor:
    """:func:`eigh` without the vectors, which are most of the work for large matrices."""
    if matrices.shape[-1] > _THREADED:
        with _as_numeric():
            values: Tensor = torch.linalg.eigvalsh(matrices)
        return values.flip(-1)
    return eigh(matrices)[0]


@contextmanager
def _as_numeric() -> Iterator[None]:
    """LAPACK's failure as what it is about."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # documented, but not in __all__
        raise NumericError(
            "no spectrum can be computed: products of the values are beyond float64"
        ) from error


@contextmanager
def one_matrix_a_thread() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Keep the threads of :func:`eigh` between its calls; torch's own work gets one meanwhile.

    LAPACK would split each small matrix over all cores, slower than one core alone, and the
    number of its threads is a setting of the whole process that takes milliseconds to change.
    For long work on a GPU; without it :func:`eigh` sets the number and back at each call.

    Yields
    ------
    ThreadPoolExecutor, int
        The threads, and how many they are.
    """
    if (workers := _workers.get()) is not None:
        yield workers
        return
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # OpenMP counts threads by the thread that asks, so each worker has to say it too.
        with ThreadPoolExecutor(count, "lycotool-eigh", torch.set_num_threads, (1,)) as pool:
            token = _workers.set((pool, count))
            try:
                yield pool, count
            finally:
                _workers.reset(token)
    finally:
        torch.set_num_threads(count)


def _on_threads(matrices: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.empty_like(matrices[..., 0]), torch.empty_like(matrices)
    with one_matrix_a_thread() as (pool, count):
        # Of a few matrices one piece a worker, because a piece costs a matrix or two by handing
        # Python's lock around; of many more pieces, so that a slow one leaves nobody idle.
        pieces_of = min(4 * count, max(count, len(matrices) // 8), len(matrices))
        pieces = zip(*(t.chunk(pieces_of) for t in (matrices, values, vectors)), strict=True)
        for _ in pool.map(_solve, pieces):
            pass
    return values, vectors


def _solve(piece: tuple[Tensor, Tensor, Tensor]) -> None:
    """Decompose some matrices on the CPU, wherever they are."""
    matrices, values, vectors = piece
    if matrices.device.type == "cpu":
        torch.linalg.eigh(matrices, out=(values, vectors))
        return
    found = torch.linalg.eigh(matrices.cpu())
    values.copy_(found.eigenvalues)
    vectors.copy_(found.eigenvectors)
