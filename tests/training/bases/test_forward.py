"""What the base computes, against diffusers' pipelines opened from the same folder.

Both run the same classes on the same weights with the same shapes on one thread, so results
are equal bit for bit unless a test says otherwise.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import diffusers
import pytest
import torch
from makers import bases
from training.bases.conftest import Bases

from lycotool.errors import UsageError
from lycotool.training.bases import (
    BaseModel,
    Conditioning,
    decode_latents,
    encode_images,
    encode_text,
    load_base,
    predict,
    save_vae_memory,
)

CAPTIONS = ["a cat on a mat", "dog"]
PIPELINES: Any = {
    "sd1": diffusers.StableDiffusionPipeline,
    "sd2": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
}
SIZE_IDS = torch.tensor([[1001.0, 800, 0, 16, 512, 640], [64, 64, 8, 0, 32, 32]])


class Opened:
    """A base as lycotool opens it, and diffusers' pipeline of the same folder."""

    def __init__(self, on_disk: Bases) -> None:
        self._on_disk = on_disk
        self.base = lru_cache(self._base)
        self.pipeline = lru_cache(self._pipeline)

    def _base(self, family: bases.Family, kind: str) -> BaseModel:
        return load_base(str(getattr(self._on_disk.get(family), kind)))

    def _pipeline(self, family: bases.Family) -> Any:
        pipeline = PIPELINES[family].from_pretrained(self._on_disk.get(family).folder, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


@pytest.fixture(scope="module")
def opened(on_disk: Bases) -> Opened:
    return Opened(on_disk)


def _ids(family: bases.Family, captions: list[str]) -> list[torch.Tensor]:
    pads = {"sd1": ["<|endoftext|>"], "sd2": ["!"], "sdxl": ["<|endoftext|>", "!"]}[family]
    return [
        bases.tokenizer(pad)(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        for pad in pads
    ]


BOTH = [(family, kind) for family in bases.FAMILIES for kind in ("file", "folder")]


@pytest.mark.parametrize(("family", "kind"), BOTH)
def test_text(opened: Opened, family: bases.Family, kind: str) -> None:
    got = encode_text(opened.base(family, kind), _ids(family, CAPTIONS))
    pipeline = opened.pipeline(family)
    if family == "sdxl":
        hidden, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
        assert got.pooled is not None
        assert torch.equal(got.pooled, pooled)
    else:
        hidden, _ = pipeline.encode_prompt(CAPTIONS, "cpu", 1, do_classifier_free_guidance=False)
        assert got.pooled is None
    assert got.hidden.shape == hidden.shape
    assert torch.equal(got.hidden, hidden)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip(
    opened: Opened, family: bases.Family, clip_skip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline counts the layers left out, so its ``clip_skip`` is one less."""
    pipeline = opened.pipeline(family)
    if not hasattr(pipeline.text_encoder, "text_model"):
        # It looks for the level that transformers 5.6 took out.
        monkeypatch.setitem(pipeline.text_encoder.__dict__, "text_model", pipeline.text_encoder)
    got = encode_text(opened.base(family, "file"), _ids(family, CAPTIONS), clip_skip=clip_skip).hidden
    hidden, _ = pipeline.encode_prompt(
        CAPTIONS, "cpu", 1, do_classifier_free_guidance=False, clip_skip=clip_skip - 1
    )
    assert torch.equal(got, hidden)
    plain = encode_text(opened.base(family, "file"), _ids(family, CAPTIONS)).hidden
    assert torch.equal(got, plain) == (clip_skip == 1)


def test_clip_skip_has_limits(opened: Opened) -> None:
    with pytest.raises(UsageError, match="clip skip 3: the text encoder has 2 layers"):
        encode_text(opened.base("sd1", "file"), _ids("sd1", CAPTIONS), clip_skip=3)
    with pytest.raises(UsageError, match="clip skip 0"):
        encode_text(opened.base("sd1", "file"), _ids("sd1", CAPTIONS), clip_skip=0)
    with pytest.raises(UsageError, match="takes no clip skip"):
        encode_text(opened.base("sdxl", "file"), _ids("sdxl", CAPTIONS), clip_skip=2)


@pytest.mark.parametrize("family", bases.FAMILIES)
@pytest.mark.parametrize("windows", [1, 2, 3])
def test_windows(opened: Opened, family: bases.Family, windows: int) -> None:
    """Every window is encoded by itself; the first token, the middles and the last are kept."""
    base = opened.base(family, "file")
    captions = [f"{caption} {number}" for caption in CAPTIONS for number in range(windows)]
    flat = _ids(family, captions)
    each = encode_text(base, flat)
    got = encode_text(base, [ids.reshape(2, windows, 77) for ids in flat])
    assert got.hidden.shape[:2] == (2, 75 * windows + 2)
    for number, hidden in enumerate(got.hidden):
        own = each.hidden[number * windows : (number + 1) * windows]
        assert torch.equal(hidden[0], own[0, 0])
        assert torch.equal(hidden[-1], own[-1, -1])
        assert torch.equal(hidden[1:-1], torch.cat([window[1:76] for window in own]))
    if each.pooled is not None:
        assert got.pooled is not None
        assert torch.equal(got.pooled, each.pooled[::windows])


@pytest.mark.parametrize("family", bases.FAMILIES)
def test_text_has_gradients(opened: Opened, family: bases.Family) -> None:
    base = opened.base(family, "file")
    weights = []
    for encoder in base.text_encoders:
        inner = getattr(encoder, "text_model", encoder)
        weights.append(inner.encoder.layers[0].self_attn.q_proj.weight.requires_grad_())
    try:
        got = encode_text(base, _ids(family, CAPTIONS))
        got.hidden.square().mean().backward()
        assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def _conditioning(family: bases.Family) -> Conditioning:
    generator = torch.Generator().manual_seed(1)
    width = 96 if family == "sdxl" else 32
    hidden = torch.randn(2, 77, width, generator=generator)
    return Conditioning(hidden, torch.randn(2, 64, generator=generator) if family == "sdxl" else None)


@pytest.mark.parametrize(("family", "kind"), BOTH)
def test_unet(opened: Opened, family: bases.Family, kind: str) -> None:
    noisy = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(2))
    timesteps, text = torch.tensor([3, 977]), _conditioning(family)
    size_ids = SIZE_IDS if family == "sdxl" else None
    with torch.no_grad():
        got = predict(opened.base(family, kind), noisy, timesteps, text, size_ids)
        expected = opened.pipeline(family).unet(
            noisy,
            timesteps,
            encoder_hidden_states=text.hidden,
            added_cond_kwargs={"text_embeds": text.pooled, "time_ids": size_ids},
        )[0]
    assert torch.equal(got, expected)


def test_size_ids_matter_and_are_not_rounded(on_disk: Bases) -> None:
    """1001 and 1002 are one number in bfloat16."""
    base = load_base(str(on_disk.get("sdxl").file), unet_dtype=torch.bfloat16)
    noisy, text = torch.zeros(2, 4, 16, 16), _conditioning("sdxl")
    other = SIZE_IDS + torch.tensor([1.0, 0, 0, 0, 0, 0])
    with torch.no_grad():
        first, second = (predict(base, noisy, torch.tensor([3, 977]), text, ids) for ids in (SIZE_IDS, other))
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize(("family", "kind"), BOTH)
def test_vae(opened: Opened, family: bases.Family, kind: str) -> None:
    base, vae = opened.base(family, kind), opened.pipeline(family).vae
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1
    mean, std = encode_images(base, pixels)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(mean).sample.clamp(-1, 1)
    assert torch.equal(mean, posterior.mean)
    assert torch.equal(std, posterior.std)
    assert mean.shape == (2, 4, 16, 24)
    # Multiplying and dividing by the scale rounds twice; eps of float32 times a small factor.
    torch.testing.assert_close(decode_latents(base, mean * base.latent_scale), decoded, rtol=0, atol=1e-5)


def test_vae_one_image_at_a_time(on_disk: Bases) -> None:
    base = load_base(str(on_disk.get("sd1").file))
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    together = encode_images(base, pixels)
    calls = []
    base.vae.encoder.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
    save_vae_memory(base)
    apart = encode_images(base, pixels)
    assert calls == [1, 1, 1]
    for one, other in zip(together, apart, strict=True):
        # Convolutions of one image sum in another order than those of three.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    save_vae_memory(base, tiling=True)
    assert base.vae.use_tiling


def test_outputs_are_float32_where_numbers_are_small(on_disk: Bases) -> None:
    base = load_base(str(on_disk.get("sdxl").file), vae_dtype=torch.bfloat16)
    mean, std = encode_images(base, torch.zeros(1, 3, 32, 32))
    assert mean.dtype == std.dtype == decode_latents(base, mean).dtype == torch.float32
