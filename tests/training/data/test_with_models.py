"""The data with real model classes: shapes fit, and caches hold what the models themselves give."""

from __future__ import annotations

import warnings

import pytest
import torch
from makers import bases
from makers.pictures import pictures

from lycotool.training.bases.images import encode_images
from lycotool.training.bases.load import load_base
from lycotool.training.bases.text import encode_text
from lycotool.training.data.batches import plan_epoch
from lycotool.training.data.captions import caption_of
from lycotool.training.data.images import load_image, to_pixels
from lycotool.training.data.latents import POSTERIOR, cache_latents
from lycotool.training.data.options import DataOptions
from lycotool.training.data.reading import read_dataset
from lycotool.training.data.texts import TextCache
from lycotool.training.data.tokens import Tokenizer
from lycotool.training.randomness import torch_generator


@pytest.mark.parametrize(("family", "width"), [("sd1", 32), ("sdxl", 96)])
def test_a_batch_from_files_to_tensors(tmp_path, family, width):
    made = bases.micro_base(family, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = load_base(str(bases.write_file(made, tmp_path / "base.safetensors")))
    images = pictures(
        tmp_path / "images", {f"{i}.png": f"tag {i}, café, {'cat ' * 90}" for i in range(3)}, (32, 32)
    )
    options = DataOptions(resolution=(32, 32), min_bucket_reso=32, bucket_reso_steps=8, batch_size=3)
    dataset = read_dataset(str(images), options)
    latents = cache_latents(dataset, lambda pixels: encode_images(base, pixels), key="vae")
    texts = TextCache(lambda ids: encode_text(base, ids), key="te", clip_skip=None)
    (batch,) = plan_epoch(dataset, seed=0, epoch=0)

    drawn, sizes = latents.sample(batch, seed=0, step=0)
    assert drawn.shape == (3, 4, 16, 16)  # the micro VAE halves
    assert sizes.tolist() == [[32, 32, 0, 0, 32, 32]] * 3
    for row, sample in zip(drawn, batch.samples, strict=True):
        pixels = to_pixels(load_image(dataset.examples[sample.example].path))[None]
        with torch.no_grad():
            posterior = made.vae.encode(pixels).latent_dist
        noise = torch.randn((4, 16, 16), generator=torch_generator(0, POSTERIOR, 0, sample.example, 0))
        torch.testing.assert_close(row, posterior.mean[0] + posterior.std[0] * noise, rtol=1e-5, atol=1e-6)

    captions = [caption_of(dataset, sample, seed=0, epoch=0, step=0) for sample in batch.samples]
    tokenizers = [Tokenizer("zero" if pad == 0 else "eos") for pad in base.pad_tokens]
    ids = [torch.stack([t.ids(caption, 150) for caption in captions]) for t in tokenizers]
    assert [tokens.shape for tokens in ids] == [(3, 2, 77)] * len(tokenizers)
    found = texts.get(ids)
    assert found.hidden.shape == (3, 152, width)
    direct = encode_text(base, ids)
    # One caption at a time or three: matmuls of other shapes, so a few roundings apart.
    torch.testing.assert_close(found.hidden, direct.hidden, rtol=1e-5, atol=1e-5)
    if family == "sdxl":
        torch.testing.assert_close(found.pooled, direct.pooled, rtol=1e-5, atol=1e-5)
    assert texts.encoded == 3
