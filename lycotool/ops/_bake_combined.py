"""The changes that adapters make to one tensor of a checkpoint, combined by a merge method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lycotool.ops._bake_plan import Edit
from lycotool.ops._methods import Combination
from lycotool.ops._naming import places
from lycotool.ops._strengths import Weighted

if TYPE_CHECKING:
    from torch import Tensor


#: ``(edit, original tensor, strength)`` to the change of (its rows of) the tensor.
ChangeFn = Callable[[Edit, "Tensor", float], "Tensor | None"]


class CombinedEdits:
    """Several adapters' edits of one tensor as a merge method combines them.

    Edits of the same rows are combined with each other. Where adapters cut a fused tensor
    differently, all the rows that their pieces touch are combined at once.
    """

    def __init__(self, adapters: Sequence[Weighted], combination: Combination) -> None:
        self._adapters = adapters
        self._combination = combination
        self._index = {id(weighted.adapter): index for index, weighted in enumerate(adapters)}
        known = [place for a in adapters for place in places(a.adapter.modules, ()).values()]
        self._places = [places(weighted.adapter.modules, known) for weighted in adapters]

    def added(self, base: Tensor, edits: Sequence[Edit], change_of: ChangeFn) -> Tensor:
        """The tensor with the combined changes."""
        total = base.clone()
        for (start, stop), together in _by_rows(edits, len(base)).items():
            first = together[0]
            weights = [weighted.of(first.module.name) for weighted in self._adapters]
            rows = base[start:stop]
            changes: dict[int, Tensor] = {}
            for edit in together:
                index = self._index[id(edit.adapter)]
                change = change_of(edit, base, self._combination.strength(edit.strength))
                if change is None:
                    continue
                target = edit.param.view(base)
                if edit.param.rows not in (None, (start, stop)):
                    whole = changes.setdefault(index, rows.new_zeros(rows.shape))
                    offset = _rows(edit, len(base))[0] - start
                    whole[offset : offset + len(target)] += change.reshape(target.shape)
                else:
                    changes[index] = change.reshape(target.shape)
            if not changes:
                continue
            place = self._places[self._index[id(first.adapter)]][first.module.name]
            combined = self._combination.combined(place, first.part, changes, weights)
            first_view = first.param.view(total)
            if combined.shape == first_view.shape:
                first_view.add_(combined)
            else:
                total[start:stop] += combined.reshape(rows.shape)
        return total


def _rows(edit: Edit, height: int) -> tuple[int, int]:
    return (0, height) if edit.param.rows is None else edit.param.rows


def _by_rows(edits: Sequence[Edit], height: int) -> dict[tuple[int, int], list[Edit]]:
    """Edits whose rows overlap, directly or through others, with the rows they cover."""
    groups: list[tuple[int, int, list[Edit]]] = []
    for edit in sorted(edits, key=lambda edit: _rows(edit, height)):
        start, stop = _rows(edit, height)
        if groups and start < groups[-1][1]:
            low, high, members = groups[-1]
            groups[-1] = low, max(high, stop), [*members, edit]
        else:
            groups.append((start, stop, [edit]))
    return {(start, stop): members for start, stop, members in groups}
