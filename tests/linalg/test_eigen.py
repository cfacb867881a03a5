"""Batched eigendecompositions against their defining identity."""

import numpy as np
import pytest
import torch

from lycotool.linalg.eigen import eigh, one_matrix_a_thread

EPS = float(np.finfo(np.float64).eps)


@pytest.mark.parametrize(("batch", "side"), [(1, 1), (1, 40), (3, 40), (50, 7), (2, 520)], ids=str)
def test_values_descend_and_vectors_diagonalise(batch: int, side: int) -> None:
    generator = torch.Generator().manual_seed(batch * side)
    half = torch.randn(batch, side, side, dtype=torch.float64, generator=generator)
    matrices = half + half.mT

    values, vectors = eigh(matrices)

    assert (values.diff(dim=-1) <= 0).all()
    # A backward stable decomposition: n·eps of the norm, and as much from orthogonality.
    near = 8 * side * EPS * float(torch.linalg.matrix_norm(matrices).max())
    assert (matrices @ vectors - vectors * values.unsqueeze(-2)).abs().max() <= near
    assert (vectors.mT @ vectors - torch.eye(side, dtype=torch.float64)).abs().max() <= 8 * side * EPS


def test_the_number_of_threads_is_left_as_it_was() -> None:
    threads = torch.get_num_threads()
    matrices = torch.eye(4, dtype=torch.float64).repeat(9, 1, 1)

    eigh(matrices)
    assert torch.get_num_threads() == threads

    def fail_inside() -> None:
        with one_matrix_a_thread():
            eigh(matrices)
            assert torch.get_num_threads() == 1
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail_inside()
    assert torch.get_num_threads() == threads
