"""Ranks of many modules from the size their file may have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lycotool.errors import IncompatibleError
from lycotool.linalg import ranks

if TYPE_CHECKING:
    from torch import Tensor

#: Room for the header's growth when a file size is the budget: numbers and a comment on the ranks.
_HEADER_SLACK = 1024


def ranks_for_size(
    values: Sequence[Tensor],
    costs: Sequence[int],
    *,
    caps: Sequence[int],
    size: int,
    at_rank_1: int,
    path: str,
) -> list[int]:
    """The ranks that lose least in a file of at most ``size`` bytes; see :func:`ranks.allocate`.

    Parameters
    ----------
    values, costs, caps
        Of each module: singular values, bytes of one more rank, the most it may get.
    at_rank_1
        Bytes of the whole file with every module at rank 1.

    Raises
    ------
    IncompatibleError
        If rank 1 of every module is too much.
    """
    least = at_rank_1 + _HEADER_SLACK
    if least > size:
        raise IncompatibleError(f"{size} bytes are too few: rank 1 of every module needs {least}", path=path,
                                hint=f"`--size {-(-least // 1000)}KB` is the least")  # fmt: skip
    budget = sum(costs) + size - least - 8 * len(values)
    return ranks.allocate(values, costs, caps=caps, budget=max(budget, sum(costs)))
