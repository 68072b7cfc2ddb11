"""Reads images and converts them to the input of the image towers.

S side of the square image that a tower reads

MiniGPT-4 trains and evaluates with the same transform: bicubic resize to a square without keeping the aspect ratio
(minigpt4/processors/blip_processors.py). ImageBind and LLaMA-Adapter v2 keep it: the short side is scaled to S and the
image is cropped at the center (CLIP's transform), or at random in training (torchvision's RandomResizedCrop).

Left out: LLaMA-Adapter v2's original reads files by OpenCV, which rotates photographs by their EXIF orientation; here,
as in the other originals, images are not rotated.
"""

import contextlib
import io
import math
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmjax import files
from mmjax.batch import Sample
from mmjax.families.base import ImageSpec
from mmjax.models import pixels

MOST_SIDE = 2**20
UNFOLDED = 32_000_000  # pixels that a file of any size may have
RATIO = 128  # maximum pixels for each byte of an image with more; photographs have 30 at most
TILE, MOST_TILE = (322, 323), 2**22  # a TIFF's tags for the sides of its tiles, and maximum pixels of a tile
MARGIN = 4  # pixels; upscaling reads two
THIN = 64  # ratio of an image's sides above which it is cropped before it is scaled
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2")
CLIPPED = ("I", "F")  # first letters of the modes whose values above 255 become 255
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")


def load(source: Any, size: int, fit: str = "stretch", random: np.random.Generator | None = None,
         fill: tuple[float, ...] = pixels.MEAN) -> np.ndarray:
    """Returns an image as uint8[S,S,3]; a normalised float32[3,S,S] is returned unchanged.

    source: a path, an object whose `read()` returns the file's bytes (a member of an archive), a PIL image,
            uint8[H,W,3] (or [H,W]: grey), or float32[3,S,S]
    fit:    "stretch", "center_crop" or "pad", see `mmjax.families.base.ImageSpec`
    random: with "center_crop", draws the crop, as in training
    fill:   color of the padding, between 0 and 1

    Raises ValueError naming the file, or the shape and dtype, that cannot be used.
    """
    if not isinstance(source, (str, os.PathLike, Image.Image)) and not hasattr(source, "read"):
        source = np.asarray(source)
        if np.issubdtype(source.dtype, np.floating):
            if source.shape != (3, size, size):
                raise ValueError(f"A normalised image must be float32[3,{size},{size}], got {source.dtype}"
                                 f"{list(source.shape)}; give uint8[H,W,3] to have it resized.")
            return source.astype(np.float32)
        if source.dtype == np.uint8 and source.shape == (size, size, 3) and random is None:
            return source  # nothing to scale or to crop
    image = rgb(source)
    if fit == "stretch":
        return _resized(image, size, size)
    if fit == "pad":
        return _resized(padded(image, fill), size, size)
    if random is None:
        return middle(image, size)
    return crop(image, random_box(random, image.height, image.width), size)


def read(source: Any, spec: ImageSpec, random: np.random.Generator | None = None) -> np.ndarray:
    """Returns an image as `load` does, with the options of `spec`."""
    return load(source, spec.size, spec.fit, random, spec.mean)


def rgb(source: Any) -> Image.Image:
    """Returns the image in a file, a PIL image or an array; raises the errors of `load`.

    Also raises ValueError for more pixels than Pillow's limit (`PIL.Image.MAX_IMAGE_PIXELS`): a file of a few bytes can
    decompress to fill the memory. Only the formats of `KINDS` are tried: Pillow passes others (EPS) to programs that
    execute them.
    """
    return decoded(source)[0]


def decoded(source: Any) -> tuple[Image.Image, str]:
    """Returns (the image of `rgb`, the mode that the source has it in, such as "L" or "I;16")."""
    if isinstance(source, Image.Image):
        return source.convert("RGB"), source.mode
    if isinstance(source, np.ndarray):
        colours = source.shape[2:] in ((), (3,))
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or not colours or not source.size:
            raise ValueError(f"An image array must be uint8[H,W,3], got {source.dtype}{list(source.shape)}.")
        return Image.fromarray(source).convert("RGB"), "RGB" if source.ndim == 3 else "L"
    try:
        if hasattr(source, "read"):
            content = source.read()
            return _decoded(io.BytesIO(content), len(content))
        if Path(source).is_file():  # neither a folder nor a pipe, which would block
            return _decoded(source, os.path.getsize(source))
    except Exception as error:  # decoders raise any error for damaged bytes
        raise ValueError(f"{source} is not an image that can be read: {error}") from error
    raise ValueError(files.url_problem(source) or no_image(source))


def _decoded(file: Any, size: int) -> tuple[Image.Image, str]:
    with open_file(file, size) as image:
        return image.convert("RGB"), image.mode


@contextlib.contextmanager
def open_file(file: Any, size: int) -> Iterator[Image.Image]:
    """Opens an image file of `size` bytes, of which only the header is read.

    Raises ValueError if it is of a kind that is not read, or would take far too much memory, and errors of Pillow.
    """
    try:
        image = Image.open(file, formats=KINDS)
    except UnidentifiedImageError as error:
        if (kind := _other_kind(file)) is None:
            raise
        raise ValueError(f"it holds {kind}. Convert it to JPEG or PNG") from error
    with image:
        check_pixels(image, size)
        yield image


def _other_kind(file: Any) -> str | None:
    """Returns what an image file that is not read holds, by its first bytes; None if it is unknown."""
    if hasattr(file, "seek"):
        file.seek(0)
        start = file.read(64)
    else:
        with open(file, "rb") as opened:
            start = opened.read(64)
    if not start:
        return "nothing (0 bytes)"
    if start[4:8] == b"ftyp":
        brand = start[8:12].decode("latin-1")
        kinds = {"avif": "an AVIF image", "avis": "an AVIF sequence", "heic": "an HEIC image", "heix": "an HEIC image",
                 "mif1": "an HEIF image"}
        return kinds.get(brand, "a video or another file of the kind MP4") + ", which is not read here"
    if start.startswith((b"%PDF", b"%!PS")):
        return "a PDF or PostScript document, which is not read here"
    if start.lstrip().startswith((b"<svg", b"<?xml")):
        return "an SVG drawing, which is not read here"
    return files.not_text(start) and f"no image: it {files.not_text(start)}"


def no_image(path: Any) -> str:
    """Returns the sentence about a path where there is no image, and names the file that has nearly its name."""
    sentence, near = f"No image at {path}", _near(os.fspath(path)) if isinstance(path, (str, os.PathLike)) else None
    return f"{sentence}{near}." if near else f"{sentence}."


def missing(path: str) -> str:
    """Returns the problem of a record whose image does not exist; see `no_image`."""
    return f"there is no image {path!r}{_near(path)}" if len(path) < 120 else f"there is no image {path[:117]!r}..."


def _near(path: str) -> str:
    """Returns the end of a sentence that names the file with nearly the same name as a missing one; "" without one."""
    stem, suffix = os.path.splitext(path)
    folder, name = os.path.split(path)
    forms = [os.path.join(folder, unicodedata.normalize(form, name)) for form in ("NFC", "NFD")]
    near = [stem + each for kind in (*SUFFIXES, ".avif") for each in (kind, kind.upper()) if each != suffix]
    near += [os.path.join(folder, each) for each in (name.lower(), name.upper(), name.capitalize())]
    try:
        found = next((each for each in (*forms, *near) if each != path and os.path.isfile(each)), None)
    except ValueError:  # a zero byte, or not Unicode
        return ""
    if found is None:
        return ""
    if found in forms:
        return "; there is a file of that name in another Unicode form (NFC or NFD): rename it"
    return f"; there is {os.path.basename(found)!r}"


def padded(image: Image.Image, fill: tuple[float, ...]) -> Image.Image:
    """Returns the image centered in a square of one color (llava/mm_utils.py: expand2square)."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in fill))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def check_pixels(image: Image.Image, size: int) -> None:
    """Raises ValueError for an opened file of `size` bytes that would take far too much memory.

    Decoding and conversion take up to ten bytes for each pixel, and an array of pointers for each row.
    """
    width, height, most = image.width, image.height, Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise ValueError(f"its {width} x {height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS = {most}")
    if max(width, height) > MOST_SIDE:
        raise ValueError(f"its {width} x {height} pixels have a side of more than {MOST_SIDE}")
    if width * height > UNFOLDED and width * height > RATIO * size:
        raise ValueError(f"its {size} bytes unfold to {width} x {height} pixels; above {UNFOLDED} pixels at most "
                         f"{RATIO} for each byte are read. If that is intended, scale it down")
    tile = [int(getattr(image, "tag_v2", {}).get(tag, 1)) for tag in TILE]
    if tile[0] * tile[1] > max(MOST_TILE, 2 * width * height):
        raise ValueError(f"its tiles of {tile[0]} x {tile[1]} pixels are far larger than its {width} x {height} pixels")


def middle(image: Image.Image, size: int) -> np.ndarray:
    """Returns uint8[S,S,3]: the short side scaled to S, cropped at the center of the long one."""
    short, long = sorted(image.size)
    long = int(size * long / short)
    if long > THIN * size and short < size:  # otherwise the image becomes smaller
        return _thin_middle(image, long, size)
    pixels = _resized(image, *((size, long) if image.width <= image.height else (long, size)))
    top, left = (round((side - size) / 2) for side in pixels.shape[:2])
    return pixels[top:top + size, left:left + size]


def _thin_middle(image: Image.Image, long: int, size: int) -> np.ndarray:
    """Returns the result of `middle` for an image that, scaled to a long side of `long`, would take much memory.

    It is first cropped to the needed part and a margin; then the width is scaled before the height, as in Pillow.
    """
    first, (width, height) = round((long - size) / 2), image.size
    begin, end = (side * max(image.size) / long for side in (first, first + size))
    low, high = max(0, math.floor(begin) - MARGIN), min(max(image.size), math.ceil(end) + MARGIN)
    begin, end = begin - low, end - low
    if width < height:
        image = image.crop((0, low, width, high)).resize((size, high - low), Image.Resampling.BICUBIC)
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, (0, begin, size, end)))
    image = image.crop((low, 0, high, height)).resize((size, height), Image.Resampling.BICUBIC, (begin, 0, end, height))
    return _resized(image, size, size)


def crop(image: Image.Image, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """Returns uint8[S,S,3]: a box (top, left, height, width) of an image, scaled to the square."""
    top, left, height, width = map(int, box)
    return _resized(image.crop((left, top, left + width, top + height)), size, size)


def random_box(random: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """Returns a random (top, left, height, width) of 90 to 100 % of an image's area, with a ratio between 3:4 and 4:3.

    After ten draws that do not fit, it is the largest such box at the center (torchvision's RandomResizedCrop).
    """
    narrow, flat = 0.75, 1.3333
    for _ in range(10):
        area = height * width * random.uniform(0.9, 1.0)
        ratio = math.exp(random.uniform(math.log(narrow), math.log(flat)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
    ratio = min(max(width / height, narrow), flat)
    h, w = min(height, round(width / ratio)), min(width, round(height * ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def _resized(image: Image.Image, width: int, height: int) -> np.ndarray:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def stack(samples: Sequence[Sample], spec: ImageSpec) -> np.ndarray | None:
    """Returns `Batch.images` of these rows: uint8[B,F,S,S,3] or normalised float32[B,F,3,S,S]; None without images.

    If images take slots, F is the largest number of images in a row, and other rows are padded with black images that
    no soft token refers to; pixels stay uint8 until they are on the device, unless an image is already normalised.
    If images take no slots, every row has one: zeros for text alone, as in the originals. These are zeros after the
    normalisation, so the whole batch is normalised here.

    Raises ValueError naming the rows that have too many images, or the image that cannot be used.
    """
    size, most = spec.size, max((len(sample.images) for sample in samples), default=0)
    if most == 0:
        return None
    check_one_image(samples, spec)
    rows = [[read(image, spec) for image in sample.images] for sample in samples]
    if not spec.tokens or any(image.dtype == np.float32 for row in rows for image in row):
        rows = [[spec.normalise(image) for image in row] for row in rows]
        blank = np.zeros((3, size, size), np.float32)
    else:
        blank = np.zeros((size, size, 3), np.uint8)
    return np.stack([np.stack(row + [blank] * (most - len(row))) for row in rows])


def check_one_image(samples: Sequence[Sample], spec: ImageSpec) -> None:
    """Raises ValueError naming the rows with several images, if a model reads one for each row."""
    if not spec.tokens and (several := [row for row, sample in enumerate(samples) if len(sample.images) > 1]):
        raise ValueError(f"Rows {several} have more than one image, but this model reads one a row.")
