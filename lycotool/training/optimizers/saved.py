"""The state of an optimizer as tensors by name, and the rest as JSON can hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lycotool.errors import BadInputError
from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def saved(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by ``index.key``, and the other numbers and the groups."""
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, entries in whole["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                numbers.setdefault(str(index), {})[key] = value
    groups = [
        {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}
        for group in whole["param_groups"]
    ]
    return tensors, {"numbers": numbers, "groups": groups}


def restore(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Take up what :func:`saved` gave.

    Raises
    ------
    BadInputError
        If it is of other groups.
    """
    whole = optimizer.state_dict()
    if len(rest["groups"]) != len(whole["param_groups"]):
        raise BadInputError(
            f"the state has {len(rest['groups'])} optimizer groups, the training {len(whole['param_groups'])}"
        )
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    for index, entries in rest["numbers"].items():
        state.setdefault(int(index), {}).update(entries)
    for group, stored in zip(whole["param_groups"], rest["groups"], strict=True):
        for key, value in stored.items():
            like = group.get(key)
            if isinstance(like, torch.Tensor):
                group[key] = torch.full_like(like, value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
