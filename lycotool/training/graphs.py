"""A function of tensors as CUDA graphs: one for each set of shapes it is given.

A step of training is thousands of short kernels. Starting each from Python takes longer than
running it; a graph is recorded once and starts them all at once. What is recorded reads and
writes fixed memory: arguments are copied to where the recorded ones lay, and what the function
changes must stay where it is.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

from lycotool.lazy import torch
from lycotool.training.tree import tensors_of, with_tensors

Arguments = TypeVar("Arguments")

#: Calls of each shape before it is recorded: libraries choose and allocate at the first.
_WARM_UP = 2

#: Shapes recorded at most; others run as they are. The usual ones come first.
_LIMIT = 64

_Key = tuple[object, ...]


class Captured(Generic[Arguments]):
    """Calls a function, from its third call with the same shapes on as a graph.

    The graphs share their memory: one runs at a time, and none reads what another left.

    Parameters
    ----------
    function
        Gives nothing, does not wait for the device, and branches on no tensor's values.
    note
        Told why calls are not recorded, where that fails.
    """

    def __init__(
        self, function: Callable[[Arguments], None], *, device: torch.device, note: Callable[[str], None]
    ) -> None:
        self._function = function
        self._device = device
        self._note = note
        self._pool = torch.cuda.graph_pool_handle()
        self._calls: Counter[_Key] = Counter()
        self._graphs: dict[_Key, tuple[torch.cuda.CUDAGraph, Arguments]] = {}
        self._works = True

    def __call__(self, arguments: Arguments) -> None:
        """Call the function; its tensors are on the device."""
        key: _Key = tuple((tensor.shape, tensor.dtype) for tensor in tensors_of(arguments))
        if key not in self._graphs and not self._record(key, arguments):
            self._function(arguments)
            return
        graph, held = self._graphs[key]
        for place, tensor in zip(tensors_of(held), tensors_of(arguments), strict=True):
            place.copy_(tensor)
        graph.replay()

    def _record(self, key: _Key, arguments: Arguments) -> bool:
        """Record the function for these shapes, if it is time to."""
        self._calls[key] += 1
        if not self._works or self._calls[key] <= _WARM_UP or len(self._graphs) >= _LIMIT:
            return False
        held = with_tensors(arguments, torch.empty_like)
        graph = torch.cuda.CUDAGraph()
        gc.collect()
        torch.cuda.empty_cache()  # what unrecorded calls held lies outside the pool
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._function(held)
        except torch.cuda.OutOfMemoryError:
            self._stop("there is not enough memory for it")
        except RuntimeError as error:
            self._stop(str(error).strip().splitlines()[0])
        else:
            self._graphs[key] = graph, held
        return self._works

    def _stop(self, reason: str) -> None:
        self._works = False
        self._note(f"steps are not recorded as a CUDA graph, which makes them slower: {reason}")
        gc.collect()
        torch.cuda.empty_cache()
