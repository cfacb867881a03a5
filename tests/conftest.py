"""For every test: one thread per worker, and GPU tests only where there is a GPU."""

from __future__ import annotations

import pytest
import torch

# Workers share the cores; more threads than cores make small matmuls slower, not faster.
torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if item not in gpu]
