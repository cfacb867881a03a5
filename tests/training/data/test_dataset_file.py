"""sd-scripts' dataset file: precedence, keys, and what becomes of those that cannot be used."""

from __future__ import annotations

import json

import pytest
from makers.pictures import pictures

from lycotool.errors import BadInputError, UsageError
from lycotool.training.data.dataset_file import UNSUPPORTED
from lycotool.training.data.options import DataOptions, levels
from lycotool.training.data.reading import read_dataset


def read(folder, text, **options):
    path = folder / "dataset.toml"
    path.write_text(text)
    base = {"resolution": (64, 64), "min_bucket_reso": 32, "bucket_reso_steps": 16}
    return read_dataset(str(path), DataOptions(**(base | options)))


def subsets(dataset):
    return [subset.options for subset in dataset.subsets]


@pytest.fixture
def folder(tmp_path):
    pictures(tmp_path / "cats", {"a.png": "cat a", "b.png": "cat b"})
    pictures(tmp_path / "dogs", {"c.png": "dog c"})
    return tmp_path


def test_the_lowest_place_wins(folder):
    dataset = read(
        folder,
        """
        [general]
        shuffle_caption = true
        keep_tokens = 1
        caption_extension = ".txt"
        [[datasets]]
        batch_size = 3
        keep_tokens = 2
            [[datasets.subsets]]
            image_dir = "cats"
            keep_tokens = 3
            [[datasets.subsets]]
            image_dir = "dogs"
        """,
        keep_tokens=9,
        flip_aug=True,
    )
    cats, dogs = subsets(dataset)
    assert (cats.keep_tokens, dogs.keep_tokens) == (3, 2)
    assert cats.shuffle_caption
    assert cats.flip_aug
    assert (cats.batch_size, dogs.batch_size) == (3, 3)
    assert [example.caption for example in dataset.examples] == ["cat a", "cat b", "dog c"]


def test_datasets_are_apart(folder):
    dataset = read(
        folder,
        """
        [[datasets]]
        resolution = 64
        batch_size = 2
            [[datasets.subsets]]
            image_dir = "cats"
        [[datasets]]
        resolution = [128, 96]
        batch_size = 4
            [[datasets.subsets]]
            image_dir = "cats"
            num_repeats = 5
        """,
    )
    assert [subset.group for subset in dataset.subsets] == [0, 1]
    assert [options.resolution for options in subsets(dataset)] == [(64, 64), (128, 96)]
    assert dataset.buckets == {(0, (64, 64)): 2, (1, (96, 96)): 10}
    assert dataset.batches_per_epoch() == 1 + 3


#: A value other than the default for every option a file may have.
VALUES = {
    "num_repeats": 2, "is_reg": False, "validation_split": 0.5, "validation_seed": 4, "resolution": [96, 64],
    "batch_size": 2, "enable_bucket": False, "min_bucket_reso": 48, "max_bucket_reso": 256,
    "bucket_reso_steps": 8, "bucket_no_upscale": True, "caption_extension": ".caption", "class_tokens": "cat",
    "caption_prefix": "p", "caption_suffix": "s", "caption_separator": ";", "shuffle_caption": True,
    "keep_tokens": 2, "keep_tokens_separator": "|||", "secondary_separator": ";;;", "enable_wildcard": True,
    "caption_dropout_rate": 0.5, "caption_dropout_every_n_epochs": 2, "caption_tag_dropout_rate": 1,
    "token_warmup_min": 2, "token_warmup_step": 0.5, "flip_aug": True, "random_crop": True,
    "resize_interpolation": "box",
}  # fmt: skip


def test_every_option_of_a_file_is_tested():
    assert set(VALUES) == {name for name, level in levels().items() if level != "run"}


@pytest.mark.parametrize("key", VALUES)
def test_every_key_is_read(folder, key):
    value = VALUES[key]
    text = json.dumps(value)
    place = "subset" if levels()[key] == "subset" else "dataset"
    dataset = read(
        folder,
        f"""
        [[datasets]]
        {f"{key} = {text}" if place == "dataset" else ""}
            [[datasets.subsets]]
            image_dir = "cats"
            {f"{key} = {text}" if place == "subset" else ""}
        """,
        class_tokens="x",
    )
    expected = tuple(value) if isinstance(value, list) else value
    assert getattr(subsets(dataset)[0], key) == expected


@pytest.mark.parametrize(
    ("alias", "name"), [("cubic", "bicubic"), ("linear", "bilinear"), ("lanczos4", "lanczos")]
)
def test_sd_scripts_other_names_of_filters(folder, alias, name):
    text = f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"\nresize_interpolation = "{alias}"'
    assert subsets(read(folder, text))[0].resize_interpolation == name


def test_regularisation_subsets(folder):
    dataset = read(
        folder,
        """
        [[datasets]]
            [[datasets.subsets]]
            image_dir = "cats"
            num_repeats = 2
            [[datasets.subsets]]
            image_dir = "dogs"
            is_reg = true
            class_tokens = "dog"
        """,
        prior_loss_weight=0.5,
    )
    regular = [example for example in dataset.examples if example.subset == 1]
    assert [(example.repeats, example.loss_weight) for example in regular] == [(4, 0.5)]


def test_metadata_files(folder):
    (folder / "meta.json").write_text(json.dumps({"a": {"caption": "one"}, "b.png": {"tags": "two"}}))
    dataset = read(
        folder,
        """
        [[datasets]]
            [[datasets.subsets]]
            image_dir = "cats"
            metadata_file = "meta.json"
        """,
    )
    assert [example.caption for example in dataset.examples] == ["one", "two"]


def test_json_dataset_files(folder):
    document = {"datasets": [{"subsets": [{"image_dir": str(folder / "cats"), "flip_aug": True}]}]}
    path = folder / "dataset.json"
    path.write_text(json.dumps(document))
    dataset = read_dataset(str(path), DataOptions(resolution=(512, 512)))
    assert subsets(dataset)[0].flip_aug
    assert len(dataset.examples) == 2


def test_relative_paths_are_the_current_folders_first(folder, monkeypatch):
    other = pictures(folder / "elsewhere" / "cats", {"z.png": "z"})
    monkeypatch.chdir(other.parent)
    text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"'
    assert [e.path.name for e in read(folder, text).examples] == ["z.png"]
    monkeypatch.chdir(other)
    assert [e.path.name for e in read(folder, text).examples] == ["a.png", "b.png"]


def test_a_folder_named_twice(folder):
    text = (
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"\n[[datasets.subsets]]\nimage_dir = "./cats/"'
    )
    dataset = read(folder, text)
    assert len(dataset.examples) == 2
    assert "is named twice in a dataset; the second is left out" in dataset.warnings[0]


def test_the_name_of_an_image_folder_is_not_looked_at(folder):
    pictures(folder / "5_birds", {"a.png": "bird"})
    dataset = read(folder, '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "5_birds"')
    assert [example.repeats for example in dataset.examples] == [1]


def test_every_bad_key_is_named_at_once(folder):
    with pytest.raises(UsageError) as error:
        read(
            folder,
            """
            typo = 1
            [general]
            suffle_caption = true
            color_aug = true
            is_reg = true
            image_dir = "cats"
            max_token_length = 150
            flip_aug = "yes"
            resolution = "big"
            batch_size = true
            resize_interpolation = "sinc"
            [[datasets]]
            caption_dropout_rate = [1]
                [[datasets.subsets]]
                image_dir = 3
                batch_size = 2
                face_crop_aug_range = [1.0, 3.0]
                [[datasets.subsets]]
                keep_tokens = -1
            """,
        )
    assert error.value.message == "16 keys of the dataset file cannot be used"
    assert sorted(error.value.details) == sorted(
        [
            "the file typo: unknown key",
            "[general] suffle_caption: unknown key, did you mean shuffle_caption?",
            "[general] color_aug: colour augmentation is not supported",
            "[general] is_reg: belongs to [[datasets.subsets]]",
            "[general] image_dir: belongs to [[datasets.subsets]]",
            "[general] max_token_length: is an option of the command line",
            "[general] flip_aug: found 'yes', expected true or false",
            "[general] resolution: found 'big', expected a number of pixels, or [width, height]",
            "[general] batch_size: found True, expected a whole number",
            "[general] resize_interpolation: found 'sinc', expected one of lanczos, bicubic, bilinear, box, area, nearest",
            "[[datasets]] 1 caption_dropout_rate: found [1], expected a number",
            "[[datasets]] 1 subset 1 image_dir: found 3, expected a path",
            "[[datasets]] 1 subset 1 batch_size: belongs to [general] or [[datasets]]",
            "[[datasets]] 1 subset 1 face_crop_aug_range: cropping around faces is not supported",
            "[[datasets]] 1 subset 2 has neither image_dir nor metadata_file",
            "[[datasets]] 1 subset 2 `keep_tokens` is -1, expected at least 0",
        ]
    )


def test_a_filter_that_is_no_text(folder):
    with pytest.raises(UsageError, match="a key of the dataset file cannot be used"):
        read(folder, '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"\nresize_interpolation = [1]')


def test_values_out_of_range_are_placed(folder):
    with pytest.raises(UsageError) as error:
        read(folder, '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"\nkeep_tokens = -1')
    assert error.value.details == ("[[datasets]] 1 subset 1 `keep_tokens` is -1, expected at least 0",)


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_unsupported_keys_may_say_what_is_so_anyway(folder, key):
    harmless, reason = UNSUPPORTED[key]
    for value in harmless:
        text = "{}" if value == {} else json.dumps(value)
        read(folder, f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"\n{key} = {text}')
    if key != "cache_info":
        with pytest.raises(UsageError) as error:
            read(folder, f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"\n{key} = [7]')
        assert error.value.details == (f"[[datasets]] 1 subset 1 {key}: {reason}",)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("a = ", BadInputError, "is no TOML"),
        ("[general]\nflip_aug = true", BadInputError, r"has no \[\[datasets.subsets\]\]"),
        ("[[datasets]]\nbatch_size = 2", BadInputError, r"has no \[\[datasets.subsets\]\]"),
        ("datasets = 3", UsageError, "a key of the dataset file cannot be used"),
        ("general = 3", UsageError, "a key of the dataset file cannot be used"),
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "gone"', UsageError, "cannot be read as a folder"),
        ('[[datasets]]\n[[datasets.subsets]]\nmetadata_file = "gone.json"', UsageError, "cannot be read"),
    ],
)
def test_files_that_cannot_be_used(folder, text, error, message):
    with pytest.raises(error, match=message):
        read(folder, text)


def test_subsets_of_both_flavours_do_not_mix(folder):
    with pytest.raises(UsageError) as error:
        read(
            folder,
            """
            [[datasets]]
                [[datasets.subsets]]
                image_dir = "cats"
                [[datasets.subsets]]
                metadata_file = "m.json"
            """,
        )
    assert error.value.details == ("[[datasets]] 1 mixes subsets with and without metadata_file",)


def test_a_regularisation_folder_beside_a_file(folder):
    text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"'
    with pytest.raises(UsageError, match="`reg_data_dir` has no effect beside a dataset file"):
        read(folder, text, reg_data_dir=str(folder / "dogs"))


@pytest.mark.parametrize("name", ["x" * 300, "a\\u0000b"], ids=["too long", "with a NUL"])
def test_a_path_no_system_takes_is_a_fault_of_its_key(folder, name):
    with pytest.raises(UsageError) as error:
        read(folder, f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{name}"\n')
    assert "image_dir" in str(error.value.details)


def test_an_extension_no_system_takes_finds_no_captions(folder):
    with pytest.raises(BadInputError, match="caption"):
        read(
            folder,
            f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"\ncaption_extension = ".{"x" * 300}"\n',
        )
