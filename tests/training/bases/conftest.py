"""Micro bases on disk, each made once: a single file and a diffusers folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
from makers import bases


@dataclass(frozen=True)
class OnDisk:
    """A micro model in memory and on disk."""

    made: bases.MicroBase
    file: Path
    folder: Path


class Bases:
    """The micro models, made when first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.get = lru_cache(self._make)

    def _make(self, family: bases.Family) -> OnDisk:
        made = bases.micro_base(family, seed=3)
        # SD 2 must say what it predicts.
        metadata = {"modelspec.prediction_type": "v"} if family == "sd2" else {}
        prediction = "v_prediction" if family == "sd2" else "epsilon"
        file = bases.write_file(made, self._root / f"{family}.safetensors", metadata=metadata)
        return OnDisk(made, file, bases.write_folder(made, self._root / family, prediction=prediction))


@pytest.fixture(scope="session")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bases]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Bases(tmp_path_factory.mktemp("bases"))
