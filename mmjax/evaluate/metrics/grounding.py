"""Intersection over union of the box in an answer and the right box.

An answer without a box counts as wrong, and every expression counts once. MiniGPT-v2's eval_ref.py differs: it keys the
right boxes by image, which drops all but the last expression of an image, and divides by the number of expressions.
"""

from collections.abc import Sequence

import numpy as np

from mmjax.data.boxes import GRID, read_box

Box = tuple[float, float, float, float]


def pixels(box: Sequence[float], size: tuple[int, int]) -> Box:
    """Converts a box (x1, y1, x2, y2) from the grid to pixels of an image of (width, height)."""
    width, height = size
    x1, y1, x2, y2 = box
    return x1 / GRID * width, y1 / GRID * height, x2 / GRID * width, y2 / GRID * height


def answered_box(answer: str, size: tuple[int, int]) -> Box | None:
    """Returns the box at the start of an answer about an image of (width, height), in pixels; None if there is none."""
    box = read_box(answer)
    return None if box is None else pixels(box, size)


def iou(first: Sequence[float], second: Sequence[float], pixel: float = 0.0) -> float:
    """Returns the intersection over union of two boxes (x1, y1, x2, y2), 0 to 1; 0 if one has x2 < x1 or y2 < y1.

    pixel: added to every width and height; 1 as in MiniGPT-v2's computeIoU, whose boxes include both ends
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    sides = [box[2:] - box[:2] for box in (a, b)]
    if min(side.min() for side in sides) < 0:
        return 0.0
    shared = np.maximum(0.0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) + pixel).prod()
    union = sum((side + pixel).prod() for side in sides) - shared
    return float(shared / union) if union > 0 else 0.0
