"""Pictures from wherever they are to what the towers take.

MiniGPT-4 trains and evaluates with the same transform: bicubic resize to a square without keeping the aspect ratio,
then normalisation (minigpt4/processors/blip_processors.py). Pixels stay uint8 until they are on the device.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmjax.batch import Sample
from mmjax.families.minigpt4 import normalise


def load(picture: Any, size: int) -> np.ndarray:
    """uint8[size,size,3], or an already normalised float32[3,size,size] unchanged.

    picture: a path, a PIL image, `uint8[H,W,3]` (or [H,W]: grey), or `float32[3,size,size]`. Raises ValueError naming
    the file, or the shape and dtype, that cannot be used.
    """
    if isinstance(picture, np.ndarray) and np.issubdtype(picture.dtype, np.floating):
        if picture.shape != (3, size, size):
            raise ValueError(f"A normalised picture must be float32[3,{size},{size}], got {picture.dtype}"
                             f"{list(picture.shape)}; give uint8[H,W,3] to have it resized.")
        return picture.astype(np.float32)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)):
            raise ValueError(f"A picture array must be uint8[H,W,3], got {picture.dtype}{list(picture.shape)}.")
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        return _open(picture, size)
    return np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def _open(path: Any, size: int) -> np.ndarray:
    if not Path(path).is_file():
        raise ValueError(f"No picture at {path}.")
    try:
        with Image.open(path) as picture:
            return load(picture, size)
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:  # what Pillow raises
        raise ValueError(f"{path} is not a picture that can be read: {error}") from error


def stack(samples: Sequence[Sample], size: int) -> np.ndarray | None:
    """`Batch.images` of these rows: uint8[B,F,size,size,3], or float32[B,F,3,size,size] if any picture came
    normalised. F is the longest row's number of pictures, the others are filled up with black ones that no soft token
    refers to. None if no row has a picture."""
    most = max((len(sample.images) for sample in samples), default=0)
    if most == 0:
        return None
    rows = [[load(picture, size) for picture in sample.images] for sample in samples]
    if any(picture.dtype == np.float32 for row in rows for picture in row):
        rows = [[p if p.dtype == np.float32 else normalise(p[None, None])[0, 0] for p in row] for row in rows]
        blank = np.zeros((3, size, size), np.float32)
    else:
        blank = np.zeros((size, size, 3), np.uint8)
    return np.stack([np.stack(row + [blank] * (most - len(row))) for row in rows])
