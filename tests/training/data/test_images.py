"""Images of every kind, against pixels worked out by hand or by a second way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from makers.pictures import picture
from PIL import Image, ImageCms

from lycotool.errors import BadInputError, UsageError
from lycotool.training.data.buckets import Placement
from lycotool.training.data.images import EXTENSIONS, fitted, image_size, load_image, to_pixels


def pixels(image):
    return np.asarray(image)


@pytest.mark.parametrize("suffix", sorted(EXTENSIONS - {".jxl", ".avif"}))
def test_every_suffix_is_read(tmp_path, suffix):
    path = picture(tmp_path / f"a{suffix}", (20, 10))
    assert image_size(path) == (20, 10)
    assert load_image(path).size == (20, 10)
    assert load_image(path).mode == "RGB"


def test_a_png_keeps_its_pixels(tmp_path):
    path = picture(tmp_path / "a.png", (20, 10))
    assert np.array_equal(pixels(load_image(path)), np.asarray(Image.open(path)))


# What a camera does: the stored rows and columns of each EXIF orientation, seen from upright ones.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_exif_orientation(tmp_path, orientation, suffix):
    upright = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == ".webp" else {}
    stored.save(tmp_path / f"a{suffix}", exif=exif, **options)
    assert image_size(tmp_path / f"a{suffix}") == (4, 6)
    assert np.array_equal(pixels(load_image(tmp_path / f"a{suffix}")), upright)


def test_transparency_is_laid_over_white(tmp_path):
    layer = np.zeros((1, 3, 4), dtype=np.uint8)
    layer[0, :, 0] = 100
    layer[0, :, 3] = [0, 255, 128]
    Image.fromarray(layer).save(tmp_path / "a.png")
    # red: 255 at alpha 0, 100 at 255, between at 128: 255 - 128 / 255 * 155 = 177.2
    loaded = pixels(load_image(tmp_path / "a.png"))[0].tolist()
    assert loaded[0] == [255, 255, 255]
    assert loaded[1] == [100, 0, 0]
    assert abs(loaded[2][0] - 177.2) < 1
    assert abs(loaded[2][1] - 127) < 1


def test_transparent_palettes_and_grey(tmp_path):
    indexed = Image.new("P", (2, 1))
    indexed.putpalette([0, 0, 0, 10, 20, 30])
    indexed.putdata([0, 1])
    indexed.save(tmp_path / "p.png", transparency=0)
    assert pixels(load_image(tmp_path / "p.png")).tolist() == [[[255, 255, 255], [10, 20, 30]]]
    Image.fromarray(np.array([[[7, 0], [7, 255]]], dtype=np.uint8)).save(tmp_path / "la.png")
    assert pixels(load_image(tmp_path / "la.png")).tolist() == [[[255] * 3, [7] * 3]]


def test_sixteen_bit_greyscale_is_scaled(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert pixels(load_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 1, 128, 255]
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert pixels(load_image(tmp_path / "a.tif"))[0, :, 2].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L"])
def test_greyscale(tmp_path, mode):
    Image.new(mode, (4, 4), 1 if mode == "1" else 9).save(tmp_path / "a.png")
    assert np.unique(pixels(load_image(tmp_path / "a.png"))).tolist() == [255 if mode == "1" else 9]


def test_cmyk_without_a_profile(tmp_path):
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = pixels(load_image(tmp_path / "a.jpg"))[0, 0].tolist()
    assert red > 250
    assert max(green, blue) < 5


def swapped_profile():
    """The profile of sRGB with the primaries of red and blue exchanged, under another name."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    places = {}
    for index in range(int.from_bytes(data[128:132], "big")):
        tag = 132 + 12 * index
        places[bytes(data[tag : tag + 4])] = int.from_bytes(data[tag + 4 : tag + 8], "big")
    red, blue = places[b"rXYZ"] + 8, places[b"bXYZ"] + 8
    data[red : red + 12], data[blue : blue + 12] = data[blue : blue + 12], data[red : red + 12]
    return bytes(data).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))


def test_a_colour_profile_is_applied(tmp_path):
    Image.new("RGB", (4, 4), (200, 100, 50)).save(tmp_path / "a.png", icc_profile=swapped_profile())
    loaded = pixels(load_image(tmp_path / "a.png"))[0, 0].tolist()
    assert max(abs(one - other) for one, other in zip(loaded, (50, 100, 200), strict=True)) <= 1


@pytest.mark.parametrize("profile", ["sRGB", b"not a profile"])
def test_profiles_that_change_nothing(tmp_path, profile):
    data = (
        profile
        if isinstance(profile, bytes)
        else ImageCms.ImageCmsProfile(ImageCms.createProfile(profile)).tobytes()
    )
    Image.new("RGB", (4, 4), (60, 70, 80)).save(tmp_path / "a.png", icc_profile=data)
    assert pixels(load_image(tmp_path / "a.png"))[0, 0].tolist() == [60, 70, 80]


def test_of_an_animation_the_first_frame_is_used(tmp_path):
    frames = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (10, 200)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert pixels(load_image(tmp_path / "a.webp"))[0, 0].tolist() == [10, 0, 0]


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "a.png").write_bytes(b"hello")
    with pytest.raises(BadInputError, match="is not an image that can be read") as error:
        image_size(tmp_path / "a.png")
    assert error.value.path == str(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_files_that_are_cut_short(tmp_path, suffix):
    path = picture(tmp_path / f"a{suffix}", (64, 64))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(BadInputError) as error:
        load_image(path)
    assert error.value.path == str(path)
    assert "image" in error.value.message


def test_floating_point_pixels(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(BadInputError, match="floating-point pixels"):
        load_image(tmp_path / "a.tif")


def test_a_missing_file(tmp_path):
    with pytest.raises(BadInputError, match="cannot be read"):
        load_image(tmp_path / "a.png")


def test_without_pillow_the_error_says_what_to_install(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match="pillow") as error:
        image_size(tmp_path / "a.png")
    assert error.value.hint == "`pip install 'lycotool[train]'`"


FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "area": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}


@pytest.mark.parametrize("name", FILTERS)
def test_resize_and_crop(tmp_path, name):
    image = load_image(picture(tmp_path / "a.png", (40, 30)))
    out = fitted(image, Placement((16, 16), (24, 18)), (5, 1), name)
    expected = pixels(image.resize((24, 18), FILTERS[name]))[1:17, 5:21]
    assert np.array_equal(pixels(out), expected)


def test_no_resize_keeps_the_pixels(tmp_path):
    image = load_image(picture(tmp_path / "a.png", (40, 30)))
    out = fitted(image, Placement((32, 24), (40, 30)), (4, 3), "lanczos")
    assert np.array_equal(pixels(out), pixels(image)[3:27, 4:36])


def test_pixels_of_the_vae():
    image = Image.fromarray(np.array([[[0, 51, 255], [255, 0, 0]]], dtype=np.uint8))
    tensor = to_pixels(image)
    assert tensor.shape == (3, 1, 2)
    assert tensor.dtype == torch.float32
    # 51 / 127.5 - 1
    assert torch.allclose(tensor[:, 0, 0], torch.tensor([-1.0, -0.6, 1.0]), atol=1e-7)
    assert torch.equal(to_pixels(image, flipped=True), tensor.flip(2))
