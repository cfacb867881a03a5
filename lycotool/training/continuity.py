"""Whether a saved state is of the run that is to go on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from lycotool.errors import IncompatibleError
from lycotool.training.bases.model import BaseModel
from lycotool.training.config import all_options
from lycotool.training.data.dataset import Dataset
from lycotool.training.options import TrainOptions
from lycotool.training.schedules import ENDLESS

#: Groups that decide nothing about the numbers.
_FREE_GROUPS = frozenset({"save", "metadata", "log", "validation", "samples"})
#: Options of other groups that do not either.
_FREE = frozenset(
    {
        "device",
        "cache_latents",
        "cache_text",
        "cache_dir",
        "gpus",
        "shard_optimizer",
        "validation_seed",
        "gradient_checkpointing",
    }
)


def identity(options: TrainOptions, base: BaseModel, dataset: Dataset, *, ranks: int = 1) -> dict[str, Any]:
    """What must be the same for a resumed run to be the run that was stopped: JSON.

    Parameters
    ----------
    ranks
        Processes that train together. Batch sizes are those of all of them, so a run goes on in
        another number of processes if their batches are as much larger or smaller.
    """
    decided: dict[str, Any] = {}
    for name, entry in all_options().items():
        if entry.group not in _FREE_GROUPS and name not in _FREE:
            decided[name] = getattr(getattr(options, entry.group), name)
    if _is_endless(options):
        del decided["steps"], decided["epochs"]
    decided |= {
        "base": base.content_hash,
        "dataset": _digest(dataset, ranks),
        "batch_size": options.data.batch_size * ranks,
    }
    found: dict[str, Any] = json.loads(json.dumps(decided))
    return found


def check(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to go on from the state of another run.

    Raises
    ------
    IncompatibleError
        Naming every difference.
    """
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if names:
        raise IncompatibleError(
            "the state is of another run",
            path=folder,
            details=[_difference(name, before.get(name), now.get(name)) for name in names],
            hint="`--fresh` starts anew; with the same options the run goes on",
        )


def _difference(name: str, before: object, now: object) -> str:
    if name in ("base", "dataset"):
        return f"{name}: is not the same"
    if name == "batch_size":
        return f"images per batch (--batch-size times processes): was {before}, is {now}"
    return f"{name}: was {before}, is {now}"


def _is_endless(options: TrainOptions) -> bool:
    """Whether a step is the same in a run of another length."""
    shares = (options.schedule.lr_warmup_steps, options.data.token_warmup_step)
    return options.schedule.lr_scheduler in ENDLESS and all(value == 0 or value >= 1 for value in shares)


def _digest(dataset: Dataset, ranks: int) -> str:
    rows = [
        [e.path.name, _size(e.path), list(e.size), e.caption, list(e.bucket), e.repeats, e.loss_weight]
        for e in dataset.examples
    ]
    subsets = [
        dataclasses.asdict(subset.options) | {"batch_size": subset.options.batch_size * ranks}
        for subset in dataset.subsets
    ]
    text = json.dumps([rows, subsets], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
