"""The fork servers, for each worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reliability.lab import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture(scope="session")
def twin() -> Iterator[Server]:
    """Runs the same things with other hashes of strings."""
    running = Server(faults=False, seed=7)
    yield running
    running.close()
