"""Folders: which images are found, with which captions, repeats and class tokens."""

from __future__ import annotations

import pytest
from makers.pictures import picture, pictures

from lycotool.errors import BadInputError, UsageError
from lycotool.training.data.options import DataOptions
from lycotool.training.data.reading import read_dataset


def read(folder, **options):
    options = {"resolution": (64, 64), "min_bucket_reso": 32, "bucket_reso_steps": 16} | options
    return read_dataset(str(folder), DataOptions(**options))


def found(dataset):
    return {example.path.name: (example.caption, example.repeats) for example in dataset.examples}


def test_a_plain_folder(tmp_path):
    dataset = read(pictures(tmp_path, {"b.png": "two", "a.jpg": "one", "C.PNG": "three"}))
    assert [example.path.name for example in dataset.examples] == ["C.PNG", "a.jpg", "b.png"]
    assert found(dataset) == {"a.jpg": ("one", 1), "b.png": ("two", 1), "C.PNG": ("three", 1)}
    assert dataset.warnings == ()


def test_num_repeats(tmp_path):
    assert found(read(pictures(tmp_path, {"a.png": "one"}), num_repeats=3)) == {"a.png": ("one", 3)}


def test_repeat_folders(tmp_path):
    pictures(tmp_path / "10_sks cat", {"a.png": None, "b.png": "b cat"})
    pictures(tmp_path / "2_a_dog", {"c.png": None})
    pictures(tmp_path / "5", {"d.png": "d"})
    assert found(read(tmp_path)) == {
        "a.png": ("sks cat", 10),
        "b.png": ("b cat", 10),
        "c.png": ("a_dog", 2),
        "d.png": ("d", 5),
    }


def test_images_beside_repeat_folders_are_read_too(tmp_path):
    pictures(tmp_path, {"a.png": "one"})
    pictures(tmp_path / "3_cat", {"b.png": None})
    assert found(read(tmp_path, num_repeats=2)) == {"a.png": ("one", 2), "b.png": ("cat", 3)}


def test_the_name_of_the_folder_itself_is_not_looked_at(tmp_path):
    assert found(read(pictures(tmp_path / "2024_trip", {"a.png": "one"}))) == {"a.png": ("one", 1)}


def test_a_folder_of_no_repeats_is_left_out(tmp_path):
    pictures(tmp_path / "0_cat", {"a.png": None})
    pictures(tmp_path / "1_dog", {"b.png": None})
    dataset = read(tmp_path)
    assert found(dataset) == {"b.png": ("dog", 1)}
    assert dataset.warnings == (f"{tmp_path / '0_cat'} is left out: its name says 0 repeats",)


def test_num_repeats_without_effect(tmp_path):
    pictures(tmp_path / "1_dog", {"b.png": None})
    with pytest.raises(UsageError, match="`num_repeats` would have no effect"):
        read(tmp_path, num_repeats=4)


def test_subfolders(tmp_path):
    pictures(tmp_path, {"a.png": "one"})
    pictures(tmp_path / "more" / "deep", {"b.png": "two"})
    pictures(tmp_path / ".hidden", {"c.png": "three"})
    pictures(tmp_path / "more" / ".hidden", {"d.png": "four"})
    plain = read(tmp_path)
    assert found(plain) == {"a.png": ("one", 1)}
    assert plain.warnings == (f"1 image in {tmp_path / 'more'} is not used; `recursive` reads subfolders",)
    assert found(read(tmp_path, recursive=True)) == {"a.png": ("one", 1), "b.png": ("two", 1)}


def test_subfolders_of_repeat_folders(tmp_path):
    pictures(tmp_path / "2_cat", {"a.png": None})
    pictures(tmp_path / "2_cat" / "more", {"b.png": None})
    assert found(read(tmp_path)) == {"a.png": ("cat", 2)}
    assert found(read(tmp_path, recursive=True)) == {"a.png": ("cat", 2), "b.png": ("cat", 2)}


def test_hidden_files_are_not_read(tmp_path):
    pictures(tmp_path, {"a.png": "one", "._a.png": None})
    assert found(read(tmp_path)) == {"a.png": ("one", 1)}


def test_pictures_that_are_not_read_are_named(tmp_path):
    pictures(tmp_path, {"a.png": "one"})
    for name in ("b.gif", "c.HEIC"):
        (tmp_path / name).write_bytes(b"")
    assert read(tmp_path).warnings == (f"2 files in {tmp_path} cannot be read as images: b.gif, c.HEIC",)


def test_caption_files(tmp_path):
    pictures(tmp_path, {"a.png": None, "b.png": "from txt", "c.png": "same"})
    (tmp_path / "a.caption").write_text("from caption")
    (tmp_path / "b.caption").write_text("another")
    (tmp_path / "c.caption").write_text("same\n")
    dataset = read(tmp_path)
    assert {name: caption for name, (caption, _) in found(dataset).items()} == {
        "a.png": "from caption",
        "b.png": "from txt",
        "c.png": "same",
    }
    assert dataset.warnings == ("1 image has both a .txt and a .caption; .txt was read: b.png",)


@pytest.mark.parametrize("suffix", [".tags", "tags"])
def test_another_caption_extension(tmp_path, suffix):
    pictures(tmp_path, {"a.png": "from txt"})
    (tmp_path / "a.tags").write_text("from tags")
    assert found(read(tmp_path, caption_extension=suffix)) == {"a.png": ("from tags", 1)}


def test_byte_order_marks_and_blank_lines(tmp_path):
    pictures(tmp_path, {"a.png": None})
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\r\n  caf\xc3\xa9, cat \r\n\r\n")
    assert found(read(tmp_path)) == {"a.png": ("café, cat", 1)}


def test_captions_of_several_lines(tmp_path):
    pictures(tmp_path, {"a.png": "one\n\n two \nthree"})
    plain = read(tmp_path)
    assert found(plain) == {"a.png": ("one", 1)}
    assert plain.warnings == (
        "1 caption has several lines, of which the first is used; `enable_wildcard` draws one: a.txt",
    )
    drawn = read(tmp_path, enable_wildcard=True)
    assert found(drawn) == {"a.png": ("one\ntwo\nthree", 1)}
    assert drawn.warnings == ()


def test_captions_that_are_not_utf8(tmp_path):
    pictures(tmp_path, {"a.png": None})
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(BadInputError, match="1 unreadable caption") as error:
        read(tmp_path)
    assert error.value.details == (f"unreadable caption: {tmp_path / 'a.txt'}: is not UTF-8",)


def test_class_tokens_stand_in_for_missing_captions(tmp_path):
    pictures(tmp_path, {"a.png": None, "b.png": "own"})
    assert found(read(tmp_path, class_tokens="a cat")) == {"a.png": ("a cat", 1), "b.png": ("own", 1)}


def test_missing_and_empty_captions_are_named(tmp_path):
    pictures(tmp_path, {"a.png": None, "b.png": " \n", "c.png": "own"})
    with pytest.raises(BadInputError) as error:
        read(tmp_path)
    assert error.value.headline == f"{tmp_path}: 1 missing caption, 1 empty caption"
    assert error.value.details == (
        f"missing caption: {tmp_path / 'a.png'}",
        f"empty caption: {tmp_path / 'b.png'}",
    )
    assert "allow_missing_captions" in str(error.value.hint)
    allowed = read(tmp_path, allow_missing_captions=True)
    assert found(allowed) == {"a.png": ("", 1), "b.png": ("", 1), "c.png": ("own", 1)}
    assert allowed.warnings == (f"2 images are trained without a caption in {tmp_path}: a.png, b.png",)


def test_stems_shared_by_two_images(tmp_path):
    pictures(tmp_path, {"a.png": "one"})
    picture(tmp_path / "a.jpg")
    assert read(tmp_path).warnings == (
        "1 name is shared by several images, and so are their captions: a.jpg and a.png",
    )


def test_broken_images_are_counted_and_named(tmp_path):
    pictures(tmp_path, {f"{i:02}.png": "c" for i in range(30)})
    for i in range(25):
        (tmp_path / f"{i:02}.png").write_bytes(b"x")
    with pytest.raises(BadInputError) as error:
        read(tmp_path)
    assert error.value.headline == f"{tmp_path}: 25 broken images"
    assert len(error.value.details) == 21
    assert error.value.details[0] == f"broken image: {tmp_path / '00.png'}: is not an image that can be read"
    assert error.value.details[-1] == "… and 5 more"


def test_empty_folders(tmp_path):
    with pytest.raises(BadInputError, match="no images found") as error:
        read(tmp_path)
    assert ".webp" in str(error.value.hint)
    (tmp_path / "1_empty").mkdir()
    pictures(tmp_path / "2_cat", {"a.png": None})
    assert read(tmp_path).warnings == (f"{tmp_path / '1_empty'} has no images",)


def test_a_source_that_does_not_exist(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read(tmp_path / "nowhere")


def test_a_file_that_is_no_data_set(tmp_path):
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(UsageError, match="is no data set") as error:
        read(tmp_path / "a.csv")
    assert ".jsonl" in str(error.value.hint)


def test_without_a_resolution(tmp_path):
    with pytest.raises(UsageError, match="`resolution` is not set"):
        read_dataset(str(tmp_path), DataOptions())
