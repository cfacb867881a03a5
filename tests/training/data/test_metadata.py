"""Captions in one file: the Hub's form and both of sd-scripts'."""

from __future__ import annotations

import json

import pytest
from makers.pictures import pictures

from lycotool.errors import BadInputError, UsageError
from lycotool.training.data.options import DataOptions
from lycotool.training.data.reading import read_dataset


def read(source, **options):
    base = {"resolution": (64, 64), "min_bucket_reso": 32, "bucket_reso_steps": 16}
    return read_dataset(str(source), DataOptions(**(base | options)))


def captions(dataset):
    return {example.path.name: example.caption for example in dataset.examples}


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    return pictures(tmp_path, {"a.png": None, "sub/b.png": None})


def test_the_hubs_image_folder(folder):
    records = [{"file_name": "a.png", "text": " one "}, {"file_name": "sub/b.png", "caption": "two"}]
    path = lines(folder / "metadata.jsonl", *records)
    assert captions(read(folder)) == {"a.png": "one", "b.png": "two"}
    assert captions(read(path)) == {"a.png": "one", "b.png": "two"}


def test_blank_lines_and_num_repeats(folder):
    (folder / "metadata.jsonl").write_text('\n{"file_name": "a.png", "text": "one"}\n\n')
    (example,) = read(folder, num_repeats=3).examples
    assert example.repeats == 3


def test_images_and_columns_that_are_not_used_are_named(folder):
    pictures(folder, {"c.png": None})
    lines(folder / "metadata.jsonl", {"file_name": "a.png", "text": "one", "score": 3})
    assert read(folder).warnings == (
        "1 column of metadata.jsonl not used: score",
        "1 image is not named in metadata.jsonl and not used: c.png",
    )


def test_sd_scripts_lines(folder):
    path = lines(
        folder / "meta.jsonl",
        {"image_path": "a.png", "caption": "a cat", "tags": "red, blue", "image_size": [64, 64]},
        {"image_path": str(folder / "sub/b.png"), "tags": "dog"},
    )
    assert captions(read(path)) == {"a.png": "a cat,red, blue", "b.png": "dog"}


def test_sd_scripts_object(folder):
    path = folder / "meta.json"
    document = {
        "a": {"caption": "one", "train_resolution": [64, 64]},
        "sub/b.png": {"caption": "", "tags": "two"},
    }
    path.write_text(json.dumps(document))
    assert captions(read(path)) == {"a.png": "one", "b.png": "two"}


def test_tags_follow_each_line_with_wildcards(folder):
    record = {"image_path": "a.png", "caption": "one\n\ntwo", "tags": "x\ny"}
    path = lines(folder / "meta.jsonl", record)
    assert captions(read(path, enable_wildcard=True)) == {"a.png": "one,x,y\ntwo,x,y"}
    assert captions(read(path, caption_separator=";")) == {"a.png": "one;x;y"}


def test_missing_captions(folder):
    path = lines(folder / "metadata.jsonl", {"file_name": "a.png"}, {"file_name": "sub/b.png", "text": ""})
    with pytest.raises(BadInputError) as error:
        read(path)
    assert error.value.headline == f"{path}: 1 missing caption, 1 empty caption"
    assert captions(read(path, allow_missing_captions=True)) == {"a.png": "", "b.png": ""}


def test_missing_images(folder):
    path = lines(
        folder / "metadata.jsonl",
        *({"file_name": name, "text": "t"} for name in ("a.png", "gone.png", "lost.png")),
    )
    with pytest.raises(BadInputError) as error:
        read(path)
    assert error.value.headline == f"{path}: 2 missing images"
    assert error.value.details[0] == f"missing image: {folder / 'gone.png'}: named in metadata.jsonl"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.jsonl", '{"file_name": "a.png", "text": "x"}\n{"file_name"', "line 2 is not JSON"),
        ("m.jsonl", '{"text": "x"}', "line 1 names no image: expected `file_name` or `image_path`"),
        ("m.jsonl", "[1]", "line 1 names no image"),
        ("m.jsonl", '{"file_name": "a.png", "text": 3}', "`text` is no text"),
        ("m.jsonl", r'{"file_name": "a.png", "text": "\ud83d"}', "`text` has half of a surrogate pair"),
        ("m.jsonl", '{"file_name": "a.png", "text": "x"}\n' * 2, "names an image twice"),
        ("m.json", "[]", "is no dataset file: expected an object"),
        ("m.json", '{"a.png": 3}', "is no metadata: expected an object per image"),
        ("m.json", "{", "is not JSON"),
        ("m.jsonl", "", "no images found"),
    ],
)
def test_files_that_are_not_metadata(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(BadInputError, match=message):
        read(folder / name)


def test_a_file_that_is_not_utf8(folder):
    (folder / "m.jsonl").write_bytes(b'{"file_name": "caf\xe9.png"}')
    with pytest.raises(BadInputError, match="is not UTF-8"):
        read(folder / "m.jsonl")


def test_a_file_that_does_not_exist(folder):
    with pytest.raises(UsageError, match="does not exist"):
        read(folder / "m.jsonl")


def test_image_root(folder, tmp_path_factory):
    path = lines(tmp_path_factory.mktemp("elsewhere") / "m.jsonl", {"image_path": "b.png", "caption": "two"})
    assert captions(read(path, image_root=str(folder / "sub"))) == {"b.png": "two"}


@pytest.mark.parametrize("name", ["", "dataset.toml"])
def test_image_root_without_a_metadata_file(folder, name):
    (folder / "dataset.toml").write_text("")
    with pytest.raises(UsageError, match="`image_root` has no effect: this is no metadata file"):
        read(folder / name, image_root=str(folder))
