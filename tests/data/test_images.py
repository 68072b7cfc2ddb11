"""Images from every kind of source. Resizing and normalising against the original's: tests/parity."""

import dataclasses
import io
import warnings

import numpy as np
import pytest
from PIL import Image

from benchmarks.hostile import png, tiff
from mmjax.batch import Sample
from mmjax.data import images
from mmjax.data.formats import Member
from mmjax.data.images import crop, load, middle, random_box, read, rgb, stack
from mmjax.families import llama_adapter, minigpt4
from mmjax.families.base import ImageSpec
from mmjax.models import clip, eva_vit
from mmjax.models.pixels import normalise

SIZE = 8
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
SQUASHED = dataclasses.replace(
    minigpt4.PRESETS["tiny"], vit=dataclasses.replace(eva_vit.TINY, image_size=SIZE)).images
CROPPED = dataclasses.replace(
    llama_adapter.PRESETS["tiny"], clip=dataclasses.replace(clip.TINY, image_size=SIZE)).images
swapped = CROPPED.normalise
FITS = ("stretch", "center_crop", "pad")
NORMALISED = np.random.default_rng(1).normal(size=(3, SIZE, SIZE)).astype(np.float32)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(path)
    return path


def test_the_same_image_from_every_source(file):
    expected = np.asarray(Image.fromarray(PIXELS).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    archive = file.with_name("archive")
    archive.write_bytes(b"before" + file.read_bytes() + b"behind")
    member = Member(str(archive), len(b"before"), file.stat().st_size)
    for source in (PIXELS, Image.fromarray(PIXELS), file, str(file), member, io.BytesIO(file.read_bytes())):
        found = load(source, SIZE)
        assert (found.dtype, found.shape) == (np.uint8, (SIZE, SIZE, 3))
        np.testing.assert_array_equal(found, expected)


def test_a_image_of_the_right_size_keeps_its_pixels():
    square = PIXELS[:SIZE, :SIZE]
    np.testing.assert_array_equal(load(square, SIZE), square)


def test_grey_and_transparent_images_become_rgb():
    grey = PIXELS[..., 0]
    expected = load(np.repeat(grey[..., None], 3, -1), SIZE)
    np.testing.assert_array_equal(load(grey, SIZE), expected)
    np.testing.assert_array_equal(load(Image.fromarray(grey), SIZE), expected)
    transparent = Image.fromarray(np.concatenate([PIXELS, PIXELS[..., :1]], -1))
    assert transparent.mode == "RGBA"
    np.testing.assert_array_equal(load(transparent, SIZE), load(PIXELS, SIZE))
    palette = Image.fromarray(PIXELS).quantize(256)
    np.testing.assert_array_equal(load(palette, SIZE), load(palette.convert("RGB"), SIZE))


def test_normalised_images_pass_unchanged():
    np.testing.assert_array_equal(load(NORMALISED, SIZE), NORMALISED)
    assert load(NORMALISED.astype(np.float64), SIZE).dtype == np.float32


@pytest.mark.parametrize(("image", "message"), [
    (PIXELS.astype(np.int32), r"must be uint8\[H,W,3\], got int32\[12, 20, 3\]"),
    (PIXELS.transpose(2, 0, 1), r"got uint8\[3, 12, 20\]"),
    (PIXELS[None], r"got uint8\[1, 12, 20, 3\]"),
    (PIXELS[..., :2], r"got uint8\[12, 20, 2\]"),
    (PIXELS[:0], r"got uint8\[0, 20, 3\]"),
    (NORMALISED[:, 1:], r"must be float32\[3,8,8\], got float32\[3, 7, 8\]"),
    (NORMALISED.transpose(1, 2, 0), r"float32\[3,8,8\], got float32\[8, 8, 3\]"),
])
@pytest.mark.parametrize("fit", FITS)
def test_arrays_of_another_kind(image, message, fit):
    with pytest.raises(ValueError, match=message):
        load(image, SIZE, fit)


def test_files_that_cannot_be_read(tmp_path, file, monkeypatch):
    with pytest.raises(ValueError, match="No image at .*absent.jpg"):
        load(tmp_path / "absent.jpg", SIZE)
    with pytest.raises(ValueError, match="No image at"):
        load(tmp_path, SIZE)
    words = tmp_path / "words.jpg"
    words.write_text("this is not an image")
    with pytest.raises(ValueError, match="words.jpg is not an image that can be read"):
        load(words, SIZE)
    header = tmp_path / "header.ppm"
    header.write_bytes(b"P6 2x 2 255 ")
    with pytest.raises(ValueError, match="header.ppm is not an image that can be read"):
        load(header, SIZE)
    whole, cut = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    Image.fromarray(np.tile(PIXELS, (10, 10, 1))).save(whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert load(whole, SIZE).shape == (SIZE, SIZE, 3)
    with pytest.raises(ValueError, match="cut.jpg is not an image that can be read: .*truncated"):
        load(cut, SIZE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # the image has 240: more than twice as many
    with pytest.raises(ValueError, match="image.png is not an image that can be read: .*exceeds limit"):
        load(file, SIZE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # less than twice as many: there Pillow only warns
    for source in (file, Holder(file.read_bytes())):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match="read: its 20 x 12 pixels are more than .*MAX_IMAGE_PIXELS = 200"):
                load(source, SIZE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load(file, SIZE).shape == (SIZE, SIZE, 3)


@dataclasses.dataclass
class Holder:
    content: bytes

    def read(self):
        return self.content


def test_no_file_is_handed_to_programs(tmp_path):
    """Pillow reads EPS by running Ghostscript, whatever the file's ending says."""
    path = tmp_path / "a.jpg"
    Image.fromarray(PIXELS).save(path, "EPS")
    with Image.open(path) as image:
        assert image.format == "EPS"
    with pytest.raises(ValueError, match="a.jpg is not an image that can be read"):
        rgb(path)


@pytest.mark.parametrize("config", [SQUASHED, CROPPED], ids=["squashed", "cropped"])
def test_rows_without_any_image_have_no_images(config):
    assert stack([Sample(prompt="a"), Sample()], config) is None
    assert stack([], config) is None


@pytest.mark.parametrize(("height", "width"), [(12, 20), (20, 12), (9, 9)])
def test_the_middle_keeps_the_aspect_ratio(height, width):
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (height, width, 3), np.uint8))
    long = int(SIZE * max(height, width) / min(height, width))
    whole = image.resize((SIZE, long) if height > width else (long, SIZE), Image.Resampling.BICUBIC)
    first = round((long - SIZE) / 2)
    cut = (0, first, SIZE, first + SIZE) if height > width else (first, 0, first + SIZE, SIZE)
    np.testing.assert_array_equal(middle(image, SIZE), np.asarray(whole.crop(cut)))
    np.testing.assert_array_equal(load(image, SIZE, "center_crop"), middle(image, SIZE))


@pytest.mark.parametrize(("height", "width"), [(1, 80), (90, 1), (2, 130), (7, 500), (333, 5), (700, 7)])
def test_thin_images_are_cut_before_they_are_scaled(height, width, monkeypatch):
    """As if the whole had been scaled, but for how Pillow rounds."""
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (height, width, 3), np.uint8))
    monkeypatch.setattr(images, "THIN", 10_000)
    whole = middle(image, SIZE).astype(int)
    monkeypatch.setattr(images, "THIN", 1)
    assert np.abs(middle(image, SIZE) - whole).max() <= 1


@pytest.mark.parametrize(("content", "message"), [
    (png(2**20 + 1, 1), "have a side of more than 1048576"), (tiff(8, 4_000), "tiles of 4000 x 4000 pixels are far"),
    (png(60_000, 60_000, present=False), "exceeds limit")], ids=["side", "tile", "claim"])
def test_files_that_would_fill_the_memory(content, message, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    for source in (tmp_path / "a.png", Holder(content)):
        with pytest.raises(ValueError, match=message):
            load(source, SIZE)


def test_large_images_need_large_files(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "UNFOLDED", 100)
    Image.fromarray(PIXELS).save(tmp_path / "noise.png")
    assert load(tmp_path / "noise.png", SIZE).shape == (SIZE, SIZE, 3)
    (tmp_path / "flat.png").write_bytes(png(200, 200))
    with pytest.raises(
        ValueError, match="bytes unfold to 200 x 200 pixels; above 100 pixels at most 128 for each byte"
    ):
        load(tmp_path / "flat.png", SIZE)


@pytest.mark.parametrize(("height", "width"), [(100, 100), (60, 100), (10, 100), (100, 3), (1, 1)])
def test_random_boxes(height, width):
    random = np.random.default_rng(0)
    for _ in range(50):
        top, left, h, w = random_box(random, height, width)
        assert 0 <= top <= height - h and 0 <= left <= width - w and h > 0 and w > 0
        if height == width == 100:
            assert 0.88 < h * w / 1e4 <= 1 and 0.74 < w / h < 1.35


def test_random_crops_are_boxes_of_the_image(file):
    drawn = load(file, SIZE, "center_crop", random=np.random.default_rng(3))
    top, left, height, width = box = random_box(np.random.default_rng(3), *PIXELS.shape[:2])
    np.testing.assert_array_equal(drawn, crop(rgb(PIXELS), box, SIZE))
    np.testing.assert_array_equal(drawn, load(PIXELS[top:top + height, left:left + width], SIZE))


def test_rows_with_different_numbers_of_images_are_filled_with_black():
    found = stack([Sample(images=[PIXELS]), Sample(), Sample(images=[PIXELS[::-1], PIXELS])], SQUASHED)
    assert (found.dtype, found.shape) == (np.uint8, (3, 2, SIZE, SIZE, 3))
    np.testing.assert_array_equal(found[0, 0], load(PIXELS, SIZE))
    np.testing.assert_array_equal(found[2], [load(PIXELS[::-1], SIZE), load(PIXELS, SIZE)])
    assert not found[0, 1].any() and not found[1].any()


def test_one_normalised_image_makes_the_batch_normalised():
    found = stack([Sample(images=[PIXELS]), Sample(images=[NORMALISED, PIXELS])], SQUASHED)
    assert (found.dtype, found.shape) == (np.float32, (2, 2, 3, SIZE, SIZE))
    expected = normalise(load(PIXELS, SIZE))
    np.testing.assert_array_equal(found[0, 0], expected)
    np.testing.assert_array_equal(found[1], [NORMALISED, expected])
    assert not found[0, 1].any()


@pytest.mark.parametrize(("height", "width"), [(12, 20), (20, 12), (13, 20), (9, 9)])
def test_padding_puts_the_whole_image_in_the_middle_of_a_square(height, width):
    pixels = np.random.default_rng(2).integers(0, 256, (height, width, 3), np.uint8)
    side, fill = max(height, width), (0.5, 0.25, 0.0)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.tile(np.array([127, 63, 0], np.uint8), (side, side, 1))
    square[top:top + height, left:left + width] = pixels
    np.testing.assert_array_equal(load(pixels, SIZE, "pad", fill=fill), load(square, SIZE))
    np.testing.assert_array_equal(read(pixels, ImageSpec(SIZE, "pad", mean=fill)), load(square, SIZE))


def test_an_image_is_read_as_its_spec_says():
    for spec, fit in ((SQUASHED, "stretch"), (CROPPED, "center_crop"), (ImageSpec(SIZE, "pad"), "pad")):
        np.testing.assert_array_equal(read(PIXELS, spec), load(PIXELS, SIZE, fit))
    drawn = read(PIXELS, CROPPED, np.random.default_rng(3))
    np.testing.assert_array_equal(drawn, load(PIXELS, SIZE, "center_crop", np.random.default_rng(3)))
    assert (drawn != read(PIXELS, CROPPED)).any()


# ---- images that take no slots of the text: LLaMA-Adapter v2 ----


def test_images_are_as_the_original_makes_them(file):
    """OpenCV's order of colours, the middle, then zeros for the row without a image."""
    found = stack([Sample(images=[file]), Sample(prompt="only words"), Sample(images=[PIXELS[::-1]])], CROPPED)
    assert (found.dtype, found.shape) == (np.float32, (3, 1, 3, SIZE, SIZE))
    for row, pixels in ((0, PIXELS), (2, PIXELS[::-1])):
        blue_first = Image.fromarray(np.ascontiguousarray(pixels[..., ::-1]))
        np.testing.assert_array_equal(found[row, 0], normalise(middle(blue_first, SIZE)))
    np.testing.assert_array_equal(found[1], 0)


def test_images_that_were_cropped_for_training_are_left_alone():
    pixels = np.random.default_rng(4).integers(0, 256, (40, 44, 3), np.uint8)
    cut = load(pixels, SIZE, "center_crop", random=np.random.default_rng(1))
    np.testing.assert_array_equal(stack([Sample(images=[cut])], CROPPED)[0, 0], swapped(cut))


def test_normalised_images_keep_their_order_of_colours():
    found = stack([Sample(images=[NORMALISED]), Sample(images=[PIXELS])], CROPPED)
    np.testing.assert_array_equal(found[0, 0], NORMALISED)
    np.testing.assert_array_equal(found[1, 0], swapped(load(PIXELS, SIZE, "center_crop")))


def test_a_row_has_one_image():
    with pytest.raises(ValueError, match=r"Rows \[1\] have more than one image, but this model reads one a row"):
        stack([Sample(images=[PIXELS]), Sample(images=[PIXELS, PIXELS])], CROPPED)
