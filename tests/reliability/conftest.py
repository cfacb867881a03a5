"""The fork server, one for each worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reliability.lab import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()
