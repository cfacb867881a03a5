"""Several processes that do one job: how they find each other, talk, and end together.

A process belongs to a job if ``RANK`` and ``WORLD_SIZE`` are set, as ``torchrun``, ``accelerate
launch`` and job scripts set them; :mod:`lycotool.launching` starts such processes itself. Without
them :func:`joined` gives a world of one, and nothing of ``torch.distributed`` is touched.

What is small and of the host (counts, names, a flag) goes through gloo; tensors on GPUs through
NCCL, whose settings are left as they are. An exception in one process ends them all: it writes a
note into the job's store, a thread of each process reads that, and the first alone is reported.
"""

from lycotool.distributed.joining import joined
from lycotool.distributed.place import PIDS, launched
from lycotool.distributed.world import Gather, World

__all__ = ["PIDS", "Gather", "World", "joined", "launched"]
