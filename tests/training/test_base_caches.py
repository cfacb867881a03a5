"""Caches on disk and states of runs are kept by the weights of the base, not by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from makers import bases
from training.runs import options, write_pictures

from lycotool.training.assemble import latents_of, texts_of
from lycotool.training.bases import BaseModel, load_base
from lycotool.training.continuity import identity
from lycotool.training.data.dataset import Dataset
from lycotool.training.data.reading import read_dataset
from lycotool.training.data.texts import Encoded
from lycotool.training.observe import Observer
from lycotool.training.options import TrainOptions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return bases.write_folder(bases.micro_base("sd1", seed=1), tmp_path / "base")


def _replace(folder: Path, component: str) -> None:
    """Put another model's weights in the place of a component's."""
    other = bases.write_folder(bases.micro_base("sd1", seed=2), folder.parent / "other")
    for path in (other / component).glob("*.safetensors"):
        path.replace(folder / component / path.name)


def _options(folder: Path, tmp_path: Path, where: str) -> tuple[TrainOptions, Dataset]:
    pictures = write_pictures(tmp_path / "pictures")
    given = {"cache_dir": str(tmp_path / "cache")} if where == "disk" else {}
    found = options(pictures, cache_latents=where, cache_text=where, **given)
    return found, read_dataset(str(pictures), found.data)


def _latents(folder: Path, tmp_path: Path, where: str) -> torch.Tensor:
    from lycotool.training.data.batches import plan_epoch

    found, dataset = _options(folder, tmp_path, where)
    cache = latents_of(found, load_base(str(folder)), dataset, Observer())
    batch = plan_epoch(dataset, seed=1, epoch=0)[0]
    return cache.sample(batch, seed=1, step=0)[0]


def _text(folder: Path, tmp_path: Path, where: str) -> torch.Tensor:
    found, _ = _options(folder, tmp_path, where)
    text: Encoded = texts_of(found, load_base(str(folder))).get([torch.arange(2 * 77).reshape(2, 1, 77)])
    return text.hidden


def test_another_vae_in_the_same_place(folder: Path, tmp_path: Path) -> None:
    before = _latents(folder, tmp_path, "disk")
    assert torch.equal(_latents(folder, tmp_path, "disk"), before)
    _replace(folder, "vae")
    after = _latents(folder, tmp_path, "disk")
    assert not torch.allclose(after, before)
    assert torch.equal(after, _latents(folder, tmp_path, "memory"))


def test_another_text_encoder_in_the_same_place(folder: Path, tmp_path: Path) -> None:
    before = _text(folder, tmp_path, "disk")
    assert torch.equal(_text(folder, tmp_path, "disk"), before)
    _replace(folder, "text_encoder")
    after = _text(folder, tmp_path, "disk")
    assert not torch.allclose(after, before)
    assert torch.equal(after, _text(folder, tmp_path, "memory"))


def test_a_run_is_of_its_base(folder: Path, tmp_path: Path) -> None:
    found, dataset = _options(folder, tmp_path, "memory")

    def of(base: BaseModel) -> object:
        return identity(found, base, dataset)["base"]

    before = of(load_base(str(folder)))
    assert of(load_base(str(folder))) == before
    _replace(folder, "unet")
    assert of(load_base(str(folder))) != before
