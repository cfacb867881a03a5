"""For every test: one thread per worker, GPU tests only where there is a GPU, slow ones when asked for."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator, Mapping

import examples  # noqa: F401 - loads the profile
import pytest
import torch
from forked import lycotool_on_path

# Workers share the cores; more threads than cores make small matmuls slower, not faster.
torch.set_num_threads(1)

#: Programs whose absence makes fewer tests; a run says which it did without.
PROGRAMS = ("zsh", "fish", "jq", "parallel")


def pytest_report_header() -> str:
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return (
        f"not tested, because not installed: {', '.join(absent)}"
        if absent
        else "all shells and tools are here"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = set() if torch.cuda.is_available() else {"gpu"}
    if "slow" not in config.getoption("markexpr"):
        left_out.add("slow")
    dropped = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


def pytest_collection_finish() -> None:
    """Leave what imports and collection made, millions of objects, out of later garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """An environment with a `lycotool` on its path, for scripts that real shells run."""
    with lycotool_on_path(tmp_path_factory.mktemp("bin")) as environment:
        yield environment
