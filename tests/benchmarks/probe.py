"""``lycotool`` that says at its end how much memory of the GPU it took."""

import atexit
import os
import sys
from pathlib import Path

from benchmarks.measure import GPU_FILE


@atexit.register
def _note() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and GPU_FILE in os.environ and torch.cuda.is_initialized():
        Path(os.environ[GPU_FILE]).write_text(str(torch.cuda.max_memory_reserved()))


if __name__ == "__main__":
    from lycotool.cli import main

    main()
