"""Data sets as a whole: sizes, buckets, regularisation, validation, descriptions."""

from __future__ import annotations

import pytest
from makers.pictures import picture, pictures
from PIL import Image

from lycotool.errors import BadInputError, UsageError
from lycotool.training.data.options import DataOptions
from lycotool.training.data.reading import read_dataset

SMALL = {"resolution": (64, 64), "min_bucket_reso": 32, "bucket_reso_steps": 16}


def read(folder, **options):
    return read_dataset(str(folder), DataOptions(**(SMALL | options)))


def uses(dataset):
    return {example.path.name: example.repeats for example in dataset.examples}


def test_sizes_are_those_a_viewer_shows(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (96, 48)).save(tmp_path / "a.jpg", exif=exif)
    (example,) = read(tmp_path, class_tokens="a").examples
    assert example.size == (48, 96)
    assert example.bucket == (48, 80)


def test_buckets_are_counted_with_repeats(tmp_path):
    picture(tmp_path / "3_a" / "wide.png", (80, 48))
    picture(tmp_path / "2_a" / "square.png", (64, 64))
    dataset = read(tmp_path, batch_size=2)
    assert dataset.buckets == {(0, (64, 64)): 2, (0, (80, 48)): 3}
    assert dataset.images_per_epoch == 5
    assert dataset.batches_per_epoch() == 1 + 2
    assert dataset.batches_per_epoch(ranks=2) == 1 + 1


def test_description(tmp_path):
    pictures(tmp_path / "3_cat", {"a.png": None, "b.png": None})
    assert read(tmp_path, batch_size=4).describe() == (
        f"{tmp_path / '3_cat'}: 2 images x 3",
        "bucket 64x64: 6 images",
        "6 images and 2 batches per epoch",
    )


def test_tag_frequency(tmp_path):
    pictures(tmp_path / "1_x", {"a.png": "Cat, red ,", "b.png": "cat"})
    pictures(tmp_path / "1_y", {"c.png": "dog"})
    assert read(tmp_path).tag_frequency() == {"1_x": {"cat": 2, "red": 1}, "1_y": {"dog": 1}}


def test_images_too_small_for_a_bucket_are_named(tmp_path):
    picture(tmp_path / "a.png", (100, 10))
    with pytest.raises(BadInputError) as error:
        read(tmp_path, class_tokens="a", bucket_no_upscale=True)
    assert error.value.headline == f"{tmp_path}: 1 image too small"
    assert "100x10 pixels are too few" in error.value.details[0]
    assert "bucket_no_upscale" in str(error.value.hint)


def test_large_crops_are_named(tmp_path):
    picture(tmp_path / "a.png", (600, 60))
    picture(tmp_path / "b.png", (64, 64))
    assert read(tmp_path, class_tokens="a").warnings == (
        "1 image loses more than a third to the crop: a.png (600x60)",
    )


@pytest.mark.parametrize(("limit", "named"), [(75, ["a", "b", "c"]), (150, ["b", "c"]), (225, ["c"])])
def test_captions_that_are_cut_are_named(tmp_path, limit, named):
    long = {
        "a.png": "cat " * 76,
        "b.png": "cat " * 151,
        "c.png": "dog\n" + "cat " * 226,
        "d.png": "cat " * 75,
    }
    pictures(tmp_path, long)
    (warning,) = read(tmp_path, max_token_length=limit, enable_wildcard=True).warnings
    numbers = {"a": 76, "b": 151, "c": 226}
    assert warning.split(": ")[1] == ", ".join(f"{name}.png ({numbers[name]})" for name in named)
    assert f"more than {limit} tokens" in warning
    assert ("`max_token_length` may raise" in warning) is (limit < 225)


def test_options_without_effect_are_named(tmp_path):
    pictures(tmp_path / "1_a", {"a.png": "a"})
    pictures(tmp_path / "2_b", {"b.png": "b"})
    assert read(tmp_path, keep_tokens=2, prior_loss_weight=0.5).warnings == (
        "`keep_tokens` has no effect: no tag is moved or left out",
        "`prior_loss_weight` has no effect: there are no regularisation images",
    )


# --- regularisation ------------------------------------------------------------------------------


def regularised(tmp_path, training, regular, **options):
    """Training and regularisation folders given as {name: number of images}."""
    for root, folders in (("train", training), ("reg", regular)):
        for name, count in folders.items():
            pictures(tmp_path / root / name, {f"{root}-{name}-{i}.png": None for i in range(count)})
    return read(tmp_path / "train", reg_data_dir=str(tmp_path / "reg"), **options)


def test_regularisation_images_are_repeated_until_there_are_enough(tmp_path):
    # 5 · 2 training images; 3 of 1 repeat each: then one more each, in order, until there are 10.
    dataset = regularised(tmp_path, {"5_sks": 2}, {"1_cat": 3})
    assert {name: n for name, n in uses(dataset).items() if name.startswith("reg")} == {
        "reg-1_cat-0.png": 4,
        "reg-1_cat-1.png": 3,
        "reg-1_cat-2.png": 3,
    }
    assert dataset.images_per_epoch == 20


def test_regularisation_images_keep_their_own_repeats(tmp_path):
    # sd-scripts counts whole images: 2 · 3 reach 5, so both are used with 3.
    dataset = regularised(tmp_path, {"5_sks": 1}, {"3_cat": 4})
    assert {name: n for name, n in uses(dataset).items() if name.startswith("reg")} == {
        "reg-3_cat-0.png": 3,
        "reg-3_cat-1.png": 3,
    }
    assert dataset.warnings == (
        "2 regularisation images are more than needed, not used: reg-3_cat-2.png, reg-3_cat-3.png",
    )


def reference(training, regular):
    """sd-scripts' loop: register the images in order, then add one repeat each, until enough."""
    wanted = sum(training)
    repeats = {}
    count, first = 0, True
    while count < wanted:
        for index, own in enumerate(regular):
            if first:
                repeats[index] = own
                count += own
            else:
                repeats[index] += 1
                count += 1
            if count >= wanted:
                break
        first = False
    return repeats


@pytest.mark.parametrize("training", [[1], [7], [20, 3], [100]])
@pytest.mark.parametrize("regular", [[1], [2, 2, 2], [5, 1], [30]])
def test_balance_is_sd_scripts(training, regular):
    from lycotool.training.data.reading import _repeats

    members = [(0, index) for index in range(len(regular))]
    answer = _repeats(members, regular, sum(training))
    assert {position: n for (_, position), n in answer.items()} == reference(training, regular)


def test_prior_loss_weight(tmp_path):
    dataset = regularised(tmp_path, {"1_sks": 1}, {"1_cat": 1}, prior_loss_weight=0.25)
    assert {e.path.parent.name: e.loss_weight for e in dataset.examples} == {"1_sks": 1.0, "1_cat": 0.25}
    assert "1 images x 1 (regularisation)" in dataset.describe()[1]


def test_a_plain_folder_of_regularisation_images(tmp_path):
    pictures(tmp_path / "train", {"a.png": "a"})
    pictures(tmp_path / "reg", {"b.png": "b"})
    assert uses(read(tmp_path / "train", reg_data_dir=str(tmp_path / "reg"))) == {"a.png": 1, "b.png": 1}


@pytest.mark.parametrize(("folder", "error"), [("nowhere", UsageError), ("empty", BadInputError)])
def test_regularisation_folders_without_images(tmp_path, folder, error):
    pictures(tmp_path / "train", {"a.png": "a"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=r"regularisation|reg_data_dir"):
        read(tmp_path / "train", reg_data_dir=str(tmp_path / folder))


def test_regularisation_images_alone(tmp_path):
    pictures(tmp_path, {"a.png": "a"})
    with pytest.raises(BadInputError, match="there are only regularisation images"):
        read(tmp_path, is_reg=True)


# --- validation ----------------------------------------------------------------------------------


def test_validation_split(tmp_path):
    pictures(tmp_path, {f"{i}.png": f"caption {i}" for i in range(10)})
    augmented = {
        "flip_aug": True, "shuffle_caption": True, "caption_dropout_rate": 0.5, "random_crop": True,
        "caption_tag_dropout_rate": 0.5, "caption_dropout_every_n_epochs": 2, "token_warmup_step": 5,
    }  # fmt: skip
    dataset = read(tmp_path, validation_split=0.3, num_repeats=4, **augmented)
    aside = dataset.validation
    assert aside is not None
    assert len(dataset.examples) == 7
    assert len(aside.examples) == 3
    assert not {e.path for e in dataset.examples} & {e.path for e in aside.examples}
    assert {e.repeats for e in aside.examples} == {1}
    options = aside.subsets[0].options
    assert all(getattr(options, name) == getattr(DataOptions(), name) for name in augmented)
    assert dataset.describe()[-1] == "3 images for validation"


def test_validation_depends_on_its_seed(tmp_path):
    pictures(tmp_path, {f"{i}.png": "c" for i in range(20)})

    def names(seed):
        return [
            e.path.name
            for e in read(tmp_path, validation_split=0.2, validation_seed=seed).validation.examples
        ]

    assert names(1) == names(1)
    assert names(1) != names(2)


def test_regularisation_images_are_never_set_aside(tmp_path):
    dataset = regularised(tmp_path, {"1_sks": 4}, {"1_cat": 4}, validation_split=0.5)
    assert all(e.path.name.startswith("train") for e in dataset.validation.examples)
    # Two images are left to train, so two regularisation images do.
    assert sum(e.path.name.startswith("reg") for e in dataset.examples) == 2


def test_too_few_images_to_set_aside(tmp_path):
    pictures(tmp_path, {"a.png": "a", "b.png": "b"})
    with pytest.raises(UsageError, match="`validation_split` sets no image aside"):
        read(tmp_path, validation_split=0.1)


def test_all_images_set_aside(tmp_path):
    pictures(tmp_path, {"a.png": "a"})
    with pytest.raises(UsageError, match="`validation_split` leaves no image to train on"):
        read(tmp_path, validation_split=0.9)
