"""Images from wherever they are to what the towers take.

S side of the square that a tower sees

MiniGPT-4 trains and evaluates with the same transform: bicubic resize to a square without keeping the aspect ratio
(minigpt4/processors/blip_processors.py). ImageBind and LLaMA-Adapter v2 keep it: the short side is scaled to S and the
middle cut out (CLIP's transform); in training a random part is scaled to the square (torchvision's RandomResizedCrop).

Left out: LLaMA-Adapter v2's original reads files by OpenCV, which turns a photograph upright that says in its EXIF data
how it was held; here, as in the other originals, no image is turned.
"""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmjax import files
from mmjax.batch import Sample
from mmjax.families.base import ImageSpec
from mmjax.models import pixels

MOST_SIDE = 2**20
UNFOLDED = 32_000_000  # pixels that a file of any size may have
RATIO = 128  # pixels for each byte of a larger one; photographs have 30 at most
TILE, MOST_TILE = (322, 323), 2**22  # a TIFF's tags for the sides of its tiles, and pixels that each may have
MARGIN = 4  # pixels; scaling up looks at two
THIN = 64  # how many times an image's long side is its short one, from where it is cut before it is scaled
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")


def load(source: Any, size: int, fit: str = "stretch", random: np.random.Generator | None = None,
         fill: tuple[float, ...] = pixels.MEAN) -> np.ndarray:
    """uint8[S,S,3]; or of an image that comes normalised, float32[3,S,S] unchanged.

    source: a path, something to `read()` the file's bytes from (a member of an archive), a PIL image, uint8[H,W,3] (or
            [H,W]: grey), or float32[3,S,S]
    fit:    "stretch", "center_crop" or "pad", see `mmjax.families.base.ImageSpec`
    random: with "center_crop", draws what is cut out instead, as in training
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
            return source  # nothing to scale or to cut away
    image = rgb(source)
    if fit == "stretch":
        return _resized(image, size, size)
    if fit == "pad":
        return _resized(padded(image, fill), size, size)
    if random is None:
        return middle(image, size)
    return crop(image, random_box(random, image.height, image.width), size)


def read(source: Any, spec: ImageSpec, random: np.random.Generator | None = None) -> np.ndarray:
    """`load` for a model that takes images as `spec` says."""
    return load(source, spec.size, spec.fit, random, spec.mean)


def rgb(source: Any) -> Image.Image:
    """The image in a file, a PIL image or an array; raises ValueError as `load` does.

    Also for one of more pixels than Pillow's limit (`PIL.Image.MAX_IMAGE_PIXELS`): files of a few bytes can unfold to
    fill the memory. Only the kinds of `KINDS` are tried, for Pillow hands others (EPS) to programs that execute them.
    """
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, np.ndarray):
        colours = source.shape[2:] in ((), (3,))
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or not colours or not source.size:
            raise ValueError(f"An image array must be uint8[H,W,3], got {source.dtype}{list(source.shape)}.")
        return Image.fromarray(source).convert("RGB")
    try:
        if hasattr(source, "read"):
            content = source.read()
            return _decoded(io.BytesIO(content), len(content))
        if Path(source).is_file():  # neither a folder nor a pipe that would be waited for
            return _decoded(source, os.path.getsize(source))
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise ValueError(f"{source} is not an image that can be read: {error}") from error
    raise ValueError(files.url_problem(source) or f"No image at {source}.")


def _decoded(file: Any, size: int) -> Image.Image:
    with Image.open(file, formats=KINDS) as image:
        check_pixels(image, size)
        return image.convert("RGB")


def padded(image: Image.Image, fill: tuple[float, ...]) -> Image.Image:
    """The image in the middle of a square of one color (llava/mm_utils.py: expand2square)."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in fill))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def check_pixels(image: Image.Image, size: int) -> None:
    """Raises ValueError for an opened file of `size` bytes that would take far more memory than it should.

    Decoding and converting take up to ten bytes a pixel, and an array of pointers for each row.
    """
    width, height, most = image.width, image.height, Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise ValueError(f"its {width} x {height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS = {most}")
    if max(width, height) > MOST_SIDE:
        raise ValueError(f"its {width} x {height} pixels have a side of more than {MOST_SIDE}")
    if width * height > UNFOLDED and width * height > RATIO * size:
        raise ValueError(f"its {size} bytes unfold to {width} x {height} pixels; above {UNFOLDED} pixels at most "
                         f"{RATIO} a byte are read. If it is meant so, scale it down")
    tile = [int(getattr(image, "tag_v2", {}).get(tag, 1)) for tag in TILE]
    if tile[0] * tile[1] > max(MOST_TILE, 2 * width * height):
        raise ValueError(f"its tiles of {tile[0]} x {tile[1]} pixels are far larger than its {width} x {height} pixels")


def middle(image: Image.Image, size: int) -> np.ndarray:
    """uint8[S,S,3]: the short side scaled to S, then what is in the middle of the long one."""
    short, long = sorted(image.size)
    long = int(size * long / short)
    if long > THIN * size and short < size:  # otherwise it becomes smaller than it is
        return _thin_middle(image, long, size)
    pixels = _resized(image, *((size, long) if image.width <= image.height else (long, size)))
    top, left = (round((side - size) / 2) for side in pixels.shape[:2])
    return pixels[top:top + size, left:left + size]


def _thin_middle(image: Image.Image, long: int, size: int) -> np.ndarray:
    """The same of an image whose scaled whole, with a long side of `long`, would take much memory.

    What is needed and a margin are cut out first; then the width is scaled before the height, as Pillow does the
    whole.
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
    """uint8[S,S,3]: a box (top, left, height, width) scaled to the square."""
    top, left, height, width = map(int, box)
    return _resized(image.crop((left, top, left + width, top + height)), size, size)


def random_box(random: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of 90 to 100 % of an image's area and a ratio of sides between 3:4 and 4:3.

    Ten draws that may not fit, then the largest such box in the middle (torchvision's RandomResizedCrop).
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
    """`Batch.images` of these rows: uint8[B,F,S,S,3] or normalised float32[B,F,3,S,S]. None if no row has an image.

    Where images take slots of the text, F is the longest row's number of images, and the others are filled up with black
    ones that no soft token refers to; pixels stay uint8 until they are on the device, unless an image came normalised.
    Where images take no slots, every row has one: of text alone zeros, as in the originals. Those are zeros after
    normalisation, so all of the batch is normalised here.

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
    """Raises ValueError naming the rows with several images, if a model reads one a row."""
    if not spec.tokens and (many := [row for row, sample in enumerate(samples) if len(sample.images) > 1]):
        raise ValueError(f"Rows {many} have more than one image, but this model reads one a row.")
