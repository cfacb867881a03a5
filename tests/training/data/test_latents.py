"""Latents: the posterior and its noise, and a cache that is never stale."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from makers.pictures import picture, pictures
from ranks import in_threads

from lycotool.errors import BadInputError, NumericError, UsageError
from lycotool.training.data.batches import plan_epoch
from lycotool.training.data.dataset import Batch, Sample
from lycotool.training.data.images import fitted, load_image, to_pixels
from lycotool.training.data.latents import CROP, POSTERIOR, cache_latents, images_to_cache
from lycotool.training.data.options import DataOptions
from lycotool.training.data.reading import read_dataset
from lycotool.training.randomness import torch_generator, uniforms


def encode(pixels):
    """A stand-in for the VAE that tells images, places and mirrored ones apart."""
    assert pixels.shape[0] == 1
    assert pixels.dtype == torch.float32
    down = torch.nn.functional.avg_pool2d(pixels, 8)
    return down, down.abs() + 0.5


def read(folder, **options):
    base = {"resolution": (64, 64), "min_bucket_reso": 32, "bucket_reso_steps": 16, "batch_size": 4}
    return read_dataset(str(folder), DataOptions(**(base | {"class_tokens": "x"} | options)))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for seed, size in enumerate([(64, 64), (70, 64), (96, 48)]):
        picture(root / f"{seed}.png", size, seed=seed)
    return root


def expected(dataset, sample, *, seed, step, crop=None):
    """The noisy latent of the resized, cropped and mirrored image."""
    example = dataset.examples[sample.example]
    image = fitted(load_image(example.path), example.placement, crop or example.placement.centre, "lanczos")
    mean, std = encode(to_pixels(image, flipped=sample.flipped)[None])
    generator = torch_generator(seed, POSTERIOR, step, sample.example, sample.repeat)
    return mean[0] + std[0] * torch.randn(mean[0].shape, generator=generator)


@pytest.mark.parametrize("where", ["memory", "disk", "none"])
def test_latents_are_the_posteriors_and_fresh_noise(folder, tmp_path, where):
    dataset = read(folder, flip_aug=True, num_repeats=4)
    place = tmp_path / "cache" if where == "disk" else None
    cache = cache_latents(dataset, encode, key="vae", where=where, folder=place)
    assert cache.encoded == (0 if where == "none" else 6)
    seen = set()
    for batch in plan_epoch(dataset, seed=5, epoch=0):
        latents, _ = cache.sample(batch, seed=5, step=11)
        assert latents.shape == (len(batch.samples), 3, batch.bucket[1] // 8, batch.bucket[0] // 8)
        for row, sample in zip(latents, batch.samples, strict=True):
            # One multiplication and one addition, fused or not: two roundings at most.
            want = expected(dataset, sample, seed=5, step=11)
            torch.testing.assert_close(row, want, rtol=2**-22, atol=2**-22)
            seen.add(sample.flipped)
    assert seen == {True, False}


def test_where_does_not_change_a_bit(folder, tmp_path):
    dataset = read(folder, flip_aug=True)
    (batch, *_) = plan_epoch(dataset, seed=0, epoch=0)
    caches = [
        cache_latents(dataset, encode, key="vae"),
        cache_latents(dataset, encode, key="vae", where="none"),
        cache_latents(dataset, encode, key="vae", where="disk", folder=tmp_path / "c"),
    ]
    first, *others = [cache.sample(batch, seed=0, step=1)[0] for cache in caches]
    assert all(torch.equal(first, other) for other in others)


def test_noise_depends_on_step_and_sample(folder):
    dataset = read(folder)
    cache = cache_latents(dataset, encode, key="vae")
    batch = Batch(0, (64, 64), 0, (Sample(0, 0), Sample(0, 1)))
    one, _ = cache.sample(batch, seed=0, step=0)
    again, _ = cache.sample(batch, seed=0, step=0)
    assert torch.equal(one, again)
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one, cache.sample(batch, seed=0, step=1)[0])
    assert not torch.equal(one, cache.sample(batch, seed=1, step=0)[0])


def test_a_ranks_part_has_the_same_latents(folder):
    dataset = read(folder, num_repeats=4)
    cache = cache_latents(dataset, encode, key="vae")
    batch = plan_epoch(dataset, seed=0, epoch=0, ranks=2)[0]
    whole, _ = cache.sample(batch, seed=0, step=0)
    assert torch.equal(whole[1::2], cache.sample(batch.of_rank(1, 2), seed=0, step=0)[0])


def test_size_ids(folder):
    dataset = read(folder)
    cache = cache_latents(dataset, encode, key="vae")
    # 70x64 goes into 64x64 with six columns too many; 96x48 into 96x32.
    (bucket,) = {dataset.examples[1].bucket}
    assert bucket == (64, 64)
    _, sizes = cache.sample(Batch(0, bucket, 0, (Sample(1, 0), Sample(1, 0, flipped=True))), seed=0, step=0)
    assert sizes.dtype == torch.int64
    assert sizes.tolist() == [[64, 70, 0, 3, 64, 64], [64, 70, 0, 3, 64, 64]]


def test_random_crops(folder):
    dataset = read(folder, random_crop=True, num_repeats=8)
    cache = cache_latents(dataset, encode, key="vae")
    assert cache.encoded == 0
    samples = [Sample(1, repeat) for repeat in range(8)]
    latents, sizes = cache.sample(Batch(0, (64, 64), 0, tuple(samples)), seed=3, step=2)
    lefts = []
    for row, numbers, sample in zip(latents, sizes.tolist(), samples, strict=True):
        draws = uniforms(2, 3, CROP, 2, 1, sample.repeat)
        left = int(draws[0] * 7)  # 0 to 6: six columns are spare, no row is
        assert numbers == [64, 70, 0, left, 64, 64]
        want = expected(dataset, sample, seed=3, step=2, crop=(left, 0))
        torch.testing.assert_close(row, want, rtol=2**-22, atol=2**-22)
        lefts.append(left)
    assert len(set(lefts)) > 1
    again, _ = cache.sample(Batch(0, (64, 64), 0, tuple(samples)), seed=3, step=2)
    assert torch.equal(latents, again)


# --- on disk -------------------------------------------------------------------------------------


def filled(folder, disk, *, key="vae", **options):
    return cache_latents(read(folder, **options), encode, key=key, where="disk", folder=disk)


def test_a_second_run_encodes_nothing(folder, tmp_path):
    assert filled(folder, tmp_path / "c").encoded == 3
    again = filled(folder, tmp_path / "c")
    (batch, *_) = plan_epoch(again.dataset, seed=0, epoch=0)
    again.sample(batch, seed=0, step=0)
    assert again.encoded == 0
    assert again.notes == ()


@pytest.mark.parametrize(
    ("change", "encoded"),
    [
        ({"key": "another vae"}, 3),
        ({"flip_aug": True}, 3),  # the mirrored ones
        ({"resize_interpolation": "box"}, 3),
        ({"resolution": (96, 96)}, 3),
        ({"num_repeats": 7, "shuffle_caption": True, "batch_size": 1}, 0),
    ],
)
def test_settings_that_change_the_latents_are_never_served_stale(folder, tmp_path, change, encoded):
    filled(folder, tmp_path / "c")
    assert filled(folder, tmp_path / "c", **change).encoded == encoded


def test_a_changed_image_is_never_served_stale(folder, tmp_path):
    filled(folder, tmp_path / "c")
    before = (folder / "0.png").stat()
    picture(folder / "0.png", (64, 64), seed=99)
    import os

    os.utime(folder / "0.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # even with its old date
    changed = filled(folder, tmp_path / "c")
    assert changed.encoded == 1
    batch = Batch(0, (64, 64), 0, (Sample(0, 0),))
    latents, _ = changed.sample(batch, seed=0, step=0)
    want = expected(changed.dataset, Sample(0, 0), seed=0, step=0)
    torch.testing.assert_close(latents[0], want, rtol=2**-22, atol=2**-22)


def test_a_renamed_image_is_still_known(folder, tmp_path):
    filled(folder, tmp_path / "c")
    (folder / "0.png").rename(folder / "9.png")
    assert filled(folder, tmp_path / "c").encoded == 0


def test_damaged_entries_are_encoded_again(folder, tmp_path):
    first = filled(folder, tmp_path / "c")
    entry = min((tmp_path / "c").iterdir())
    entry.write_bytes(entry.read_bytes()[:-1])
    again = filled(folder, tmp_path / "c")
    assert again.encoded == 1
    assert len(again.notes) == 1
    assert str(entry) in again.notes[0]
    # And those that are damaged or taken away during the run.
    for path in (tmp_path / "c").iterdir():
        path.unlink()
    (batch, *_) = plan_epoch(first.dataset, seed=0, epoch=0)
    one, _ = first.sample(batch, seed=0, step=0)
    two, _ = cache_latents(first.dataset, encode, key="vae").sample(batch, seed=0, step=0)
    assert torch.equal(one, two)


def test_ranks_share_the_work(folder, tmp_path):
    dataset = read(folder)
    waited = []
    counts = []
    for rank in (0, 1):
        cache = cache_latents(
            dataset, encode, key="vae", where="disk", folder=tmp_path / "c", rank=rank, ranks=2,
            gather=lambda value, rank=rank: waited.append(rank),
        )  # fmt: skip
        counts.append(cache.encoded)
    assert counts == [2, 1]
    assert waited == [0, 1]
    assert filled(folder, tmp_path / "c").encoded == 0


def test_ranks_share_the_work_in_memory(folder, monkeypatch):
    """Each encodes its part, and then holds what one process alone would, a message at a time."""
    monkeypatch.setattr("lycotool.training.data.latents._MESSAGE", 1)
    dataset = read(folder)
    caches = in_threads(
        lambda rank, gather: cache_latents(dataset, encode, key="vae", rank=rank, ranks=2, gather=gather)
    )
    alone = cache_latents(dataset, encode, key="vae")
    assert [cache.encoded for cache in caches] == [2, 1]
    for cache in caches:
        assert cache.nbytes == alone.nbytes
        for batch in plan_epoch(dataset, seed=0, epoch=0):
            assert torch.equal(*(held.sample(batch, seed=0, step=0)[0] for held in (cache, alone)))
    assert [cache.encoded for cache in caches] == [2, 1]


def test_loading_into_memory(folder, tmp_path):
    cache = filled(folder, tmp_path / "c")
    assert cache.nbytes == 0
    cache.load()
    # Mean and deviation of 3 channels: 64, 64 and 96x32 pixels / 64, in float32.
    assert cache.nbytes == sum(2 * 3 * 4 * e.bucket[0] * e.bucket[1] // 64 for e in cache.dataset.examples)
    for path in (tmp_path / "c").iterdir():
        path.unlink()
    (batch, *_) = plan_epoch(cache.dataset, seed=0, epoch=0)
    cache.to("cpu")
    cache.sample(batch, seed=0, step=0)
    assert cache.encoded == 3


def test_progress_counts_images(folder, tmp_path):
    dataset = read(folder)
    done = []
    cache_latents(dataset, encode, key="vae", advance=done.append)
    assert sum(done) == len(images_to_cache(dataset)) == 3
    filled(folder, tmp_path / "c")
    dataset = read(folder, flip_aug=True)  # the mirrored ones are missing; images count, not their views
    done.clear()
    cache_latents(dataset, encode, key="vae", where="disk", folder=tmp_path / "c", advance=done.append)
    assert sum(done) == 3


# --- errors --------------------------------------------------------------------------------------


def test_broken_images_are_named_together(tmp_path):
    folder = pictures(tmp_path, {f"{i}.png": "c" for i in range(5)})
    for i in (1, 3):
        path = folder / f"{i}.png"
        path.write_bytes(path.read_bytes()[:-100])
    dataset = read(folder)  # headers are sound
    with pytest.raises(BadInputError) as error:
        cache_latents(dataset, encode, key="vae")
    assert error.value.headline == "the data set: 2 broken images"
    assert [
        str(folder / f"{i}.png") in line for i, line in zip((1, 3), error.value.details, strict=True)
    ] == [True] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["mean", "std"])
def test_values_of_the_vae_that_are_no_numbers(folder, value, part):
    def broken(pixels):
        mean, std = encode(pixels)
        (mean if part == "mean" else std)[0, 0, 0, 0] = value
        return mean, std

    with pytest.raises(NumericError, match="the VAE gives NaN or infinity for this image") as error:
        cache_latents(read(folder), broken, key="vae")
    assert error.value.path == str(folder / "0.png")
    assert "float16" in str(error.value.hint)


def test_an_image_that_changed_its_size(folder):
    dataset = read(folder)
    picture(folder / "0.png", (32, 32))
    with pytest.raises(BadInputError) as error:
        cache_latents(dataset, encode, key="vae")
    assert "the image changed: it has 32x32 pixels now" in error.value.details[0]


def test_folders_belong_to_caches_on_disk(folder, tmp_path):
    dataset = read(folder)
    with pytest.raises(UsageError, match="`cache_latents` on disk needs a folder"):
        cache_latents(dataset, encode, key="vae", where="disk")
    with pytest.raises(UsageError, match="`cache_dir` has no use with `memory`"):
        cache_latents(dataset, encode, key="vae", where="memory", folder=tmp_path)


def test_subsets_may_differ(folder):
    dataset = read(folder)
    plain = dataset.subsets[0]
    mixed = replace(
        dataset,
        subsets=(plain, replace(plain, options=replace(plain.options, random_crop=True))),
        examples=(dataset.examples[0], replace(dataset.examples[1], subset=1)),
    )
    cache = cache_latents(mixed, encode, key="vae")
    assert images_to_cache(mixed) == [0]
    batch = Batch(0, (64, 64), 0, (Sample(0, 0), Sample(1, 0)))
    assert cache.sample(batch, seed=0, step=0)[0].shape == (2, 3, 8, 8)
    assert cache.encoded == 2
