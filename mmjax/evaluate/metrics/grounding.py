"""Boxes: what an answer's box covers of the right one.

An answer that holds no box counts as wrong. Every expression counts once: MiniGPT-v2's own eval_ref.py keys the right
boxes by image, so that of several expressions about one image all but the last one's box are lost, and divides by
the number of expressions all the same.
"""

from collections.abc import Sequence

import numpy as np

from mmjax.data.boxes import GRID, read_box

Box = tuple[float, float, float, float]


def pixels(box: Sequence[float], size: tuple[int, int]) -> Box:
    """A box (x1, y1, x2, y2) on the grid in pixels of an image of (width, height)."""
    width, height = size
    x1, y1, x2, y2 = box
    return x1 / GRID * width, y1 / GRID * height, x2 / GRID * width, y2 / GRID * height


def answered_box(answer: str, size: tuple[int, int]) -> Box | None:
    """The box in pixels that an answer about an image of (width, height) begins with; None if it begins with none."""
    box = read_box(answer)
    return None if box is None else pixels(box, size)


def iou(first: Sequence[float], second: Sequence[float], pixel: float = 0.0) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2), 0 to 1; 0 if one of them has its ends in the wrong order.

    pixel: what is added to every width and height: 1 as in MiniGPT-v2's computeIoU, where both ends belong to the box
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    sides = [box[2:] - box[:2] for box in (a, b)]
    if min(side.min() for side in sides) < 0:
        return 0.0
    shared = np.maximum(0.0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) + pixel).prod()
    union = sum((side + pixel).prod() for side in sides) - shared
    return float(shared / union) if union > 0 else 0.0
