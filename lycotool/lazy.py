"""``torch``, imported at its first use.

The registry is data that ``--help``, completion and header-only ``inspect`` read, and
``import torch`` costs two seconds. Modules that hold both declarations and formulas
therefore write ``from lycotool.lazy import torch``: type checkers see the real package,
the program loads it when a formula first runs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__all__ = ["torch"]

if TYPE_CHECKING:
    import torch as torch
else:

    class _LazyModule:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> object:
            module = importlib.import_module(self._name)
            # All of it at once, so that nothing is imported while a training step is traced.
            vars(self).update(vars(module))
            return getattr(module, attribute)

    torch = _LazyModule("torch")
