"""``torch``, imported at its first use.

The registry is data that ``--help``, completion and header-only ``inspect`` read, and
``import torch`` costs two seconds. Modules that hold both declarations and formulas
therefore write ``from lycotool.lazy import torch``: type checkers see the real package,
the program loads it when a formula first runs.
"""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING

__all__ = ["torch"]

#: Whether this process is a command's alone, so that nobody waits for objects of before to be collected.
is_own_process = False

if TYPE_CHECKING:
    import torch as torch
else:

    def _imported(name: str) -> object:
        """Import without the collector of garbage, which would look at a million new objects again and again.

        Hardly one of them is garbage, then or later; in a process of one's own it never looks at them.
        """
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return importlib.import_module(name)
        finally:
            if is_own_process:
                gc.freeze()
            if was_enabled:
                gc.enable()

    class _LazyModule:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> object:
            module = _imported(self._name)
            # All of it at once, so that nothing is imported while a training step is traced.
            vars(self).update(vars(module))
            return getattr(module, attribute)

    torch = _LazyModule("torch")
