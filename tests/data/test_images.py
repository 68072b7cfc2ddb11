"""Pictures from every kind of source. Resizing and normalising against the original's: tests/parity."""

import numpy as np
import pytest
from PIL import Image

from mmjax.batch import Sample
from mmjax.data.images import load, stack
from mmjax.families.minigpt4 import normalise

SIZE = 8
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
NORMALISED = np.random.default_rng(1).normal(size=(3, SIZE, SIZE)).astype(np.float32)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(PIXELS).save(path)
    return path


def test_the_same_picture_from_every_source(file):
    expected = np.asarray(Image.fromarray(PIXELS).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    for source in (PIXELS, Image.fromarray(PIXELS), file, str(file)):
        found = load(source, SIZE)
        assert (found.dtype, found.shape) == (np.uint8, (SIZE, SIZE, 3))
        np.testing.assert_array_equal(found, expected)


def test_a_picture_of_the_right_size_keeps_its_pixels():
    square = PIXELS[:SIZE, :SIZE]
    np.testing.assert_array_equal(load(square, SIZE), square)


def test_grey_and_transparent_pictures_become_rgb():
    grey = PIXELS[..., 0]
    expected = load(np.repeat(grey[..., None], 3, -1), SIZE)
    np.testing.assert_array_equal(load(grey, SIZE), expected)
    np.testing.assert_array_equal(load(Image.fromarray(grey), SIZE), expected)
    transparent = Image.fromarray(np.concatenate([PIXELS, PIXELS[..., :1]], -1))
    assert transparent.mode == "RGBA"
    np.testing.assert_array_equal(load(transparent, SIZE), load(PIXELS, SIZE))
    palette = Image.fromarray(PIXELS).quantize(256)
    np.testing.assert_array_equal(load(palette, SIZE), load(palette.convert("RGB"), SIZE))


def test_normalised_pictures_pass_unchanged():
    np.testing.assert_array_equal(load(NORMALISED, SIZE), NORMALISED)
    assert load(NORMALISED.astype(np.float64), SIZE).dtype == np.float32


@pytest.mark.parametrize(("picture", "message"), [
    (PIXELS.astype(np.int32), r"must be uint8\[H,W,3\], got int32\[12, 20, 3\]"),
    (PIXELS.transpose(2, 0, 1), r"got uint8\[3, 12, 20\]"),
    (PIXELS[None], r"got uint8\[1, 12, 20, 3\]"),
    (PIXELS[..., :2], r"got uint8\[12, 20, 2\]"),
    (NORMALISED[:, 1:], r"must be float32\[3,8,8\], got float32\[3, 7, 8\]"),
    (NORMALISED.transpose(1, 2, 0), r"float32\[3,8,8\], got float32\[8, 8, 3\]"),
])
def test_arrays_of_another_kind(picture, message):
    with pytest.raises(ValueError, match=message):
        load(picture, SIZE)


def test_files_that_cannot_be_read(tmp_path, file, monkeypatch):
    with pytest.raises(ValueError, match="No picture at .*absent.jpg"):
        load(tmp_path / "absent.jpg", SIZE)
    with pytest.raises(ValueError, match="No picture at"):
        load(tmp_path, SIZE)
    words = tmp_path / "words.jpg"
    words.write_text("this is not a picture")
    with pytest.raises(ValueError, match="words.jpg is not a picture that can be read"):
        load(words, SIZE)
    header = tmp_path / "header.ppm"
    header.write_bytes(b"P6 2x 2 255 ")
    with pytest.raises(ValueError, match="header.ppm is not a picture that can be read"):
        load(header, SIZE)
    whole, cut = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    Image.fromarray(np.tile(PIXELS, (10, 10, 1))).save(whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert load(whole, SIZE).shape == (SIZE, SIZE, 3)
    with pytest.raises(ValueError, match="cut.jpg is not a picture that can be read: .*truncated"):
        load(cut, SIZE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # the picture has 240: more than twice as many
    with pytest.raises(ValueError, match="picture.png is not a picture that can be read: .*exceeds limit"):
        load(file, SIZE)


def test_rows_without_any_picture_have_no_images():
    assert stack([Sample(prompt="a"), Sample()], SIZE) is None
    assert stack([], SIZE) is None


def test_rows_with_different_numbers_of_pictures_are_filled_with_black():
    found = stack([Sample(images=[PIXELS]), Sample(), Sample(images=[PIXELS[::-1], PIXELS])], SIZE)
    assert (found.dtype, found.shape) == (np.uint8, (3, 2, SIZE, SIZE, 3))
    np.testing.assert_array_equal(found[0, 0], load(PIXELS, SIZE))
    np.testing.assert_array_equal(found[2], [load(PIXELS[::-1], SIZE), load(PIXELS, SIZE)])
    assert not found[0, 1].any() and not found[1].any()


def test_one_normalised_picture_makes_the_batch_normalised():
    found = stack([Sample(images=[PIXELS]), Sample(images=[NORMALISED, PIXELS])], SIZE)
    assert (found.dtype, found.shape) == (np.float32, (2, 2, 3, SIZE, SIZE))
    expected = np.asarray(normalise(load(PIXELS, SIZE)[None, None]))[0, 0]
    np.testing.assert_array_equal(found[0, 0], expected)
    np.testing.assert_array_equal(found[1], [NORMALISED, expected])
    assert not found[0, 1].any()
