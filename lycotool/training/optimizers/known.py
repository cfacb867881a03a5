"""The optimizers that have a name; any other one is named by ``module.Class``.

Names are those of sd-scripts' ``--optimizer_type``, in any case.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lycotool.errors import UsageError
from lycotool.training.optimizers.arguments import accepted_by, read_arguments


@dataclass(frozen=True, slots=True)
class Known:
    """Where an optimizer is, and how it is used.

    Attributes
    ----------
    places
        ``module.Class`` to try in turn.
    package
        What ``pip install`` needs for it; empty where it is always there.
    elementwise
        Whether it treats every element alike, so that one flat vector is as good as many tensors.
    separable
        Whether, besides, no element's step depends on another element, so that it can be sharded.
    defaults
        Arguments that differ from the class's own.
    lr
        A learning rate of its own, where the algorithm's does not apply.
    """

    places: tuple[str, ...]
    package: str = ""
    elementwise: bool = False
    separable: bool = False
    defaults: Mapping[str, object] = field(default_factory=dict)
    lr: float | None = None


_EIGHT_BIT = "bitsandbytes"

KNOWN: Mapping[str, Known] = {
    "adamw": Known(("torch.optim.AdamW",), elementwise=True, separable=True),
    "lion": Known(("lycotool.training.optimizers.lion.Lion",), elementwise=True, separable=True),
    "prodigy": Known(("lycotool.training.optimizers.prodigy.Prodigy",), elementwise=True, lr=1.0),
    # relative_step would set the learning rates aside.
    "adafactor": Known(
        ("transformers.optimization.Adafactor",),
        "transformers",
        defaults={"relative_step": False, "scale_parameter": False, "warmup_init": False},
    ),
    "sgd": Known(("torch.optim.SGD",), elementwise=True, separable=True),
    "sgdnesterov": Known(
        ("torch.optim.SGD",), elementwise=True, separable=True, defaults={"momentum": 0.9, "nesterov": True}
    ),
    "adamw8bit": Known(("bitsandbytes.optim.AdamW8bit", "torchao.optim.AdamW8bit"), _EIGHT_BIT),
    "pagedadamw8bit": Known(("bitsandbytes.optim.PagedAdamW8bit",), _EIGHT_BIT),
    "pagedadamw": Known(("bitsandbytes.optim.PagedAdamW",), _EIGHT_BIT),
    "lion8bit": Known(("bitsandbytes.optim.Lion8bit",), _EIGHT_BIT),
    "pagedlion8bit": Known(("bitsandbytes.optim.PagedLion8bit",), _EIGHT_BIT),
    "sgdnesterov8bit": Known(
        ("bitsandbytes.optim.SGD8bit",), _EIGHT_BIT, defaults={"momentum": 0.9, "nesterov": True}
    ),
}


def find(name: str) -> Known:
    """The optimizer of a name, or the class of a dotted one.

    Raises
    ------
    UsageError
        If there is none, with the nearest name.
    """
    if (known := KNOWN.get(name.lower())) is not None:
        return known
    if "." in name:
        return Known((name,), name.partition(".")[0])
    close = difflib.get_close_matches(name.lower(), KNOWN, 1)
    hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(KNOWN)}."
    raise UsageError(f"no such optimizer: {name}", hint=f"{hint} Any other one is named by module.Class")


def load(known: Known, name: str) -> type:
    """Import the class.

    Raises
    ------
    UsageError
        If its package is not installed, naming the ``pip`` command, or has no such class.
    """
    for place in known.places:
        module, _, attribute = place.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ModuleNotFoundError as error:
            if error.name is not None and not module.startswith(error.name):
                raise
            continue
        if isinstance(found, type):
            return found
        raise UsageError(f"--optimizer {name}: {module} has no class {attribute}")
    raise UsageError(
        f"--optimizer {name} needs a package that is not installed",
        hint=f"pip install {known.package}",
    )


def chosen(name: str, arguments: Sequence[str]) -> tuple[Known, type, dict[str, Any]]:
    """The entry, the class and what to make it with: the entry's defaults under the user's arguments.

    Raises
    ------
    UsageError
        If there is no such optimizer, it is not installed, or an argument is not one of its.
    """
    known = find(name)
    cls = load(known, name)
    return known, cls, {**known.defaults, **read_arguments(arguments, accepted_by(cls), what=name)}
