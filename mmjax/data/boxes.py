"""Boxes as text in MiniGPT-v2's format: `{<x1><y1><x2><y2>}`, in hundredths of the image's sides."""

import re
import reprlib
from collections.abc import Sequence

GRID = 100
_BOX = re.compile(r"\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}", re.ASCII)


def box_text(box: Sequence[float], width: float, height: float) -> str:
    """Returns the text of a box (left, top, width, height) in pixels, whose coordinates are rounded down to the grid.

    Raises ValueError if it is not inside its image, or if all its numbers are shares of the image.
    """
    try:
        left, top, wide, high = map(float, box)
        ends = left / width, top / height, (left + wide) / width, (top + high) / height
        x1, y1, x2, y2 = (int(end * GRID) for end in ends)
    except (TypeError, ValueError, ArithmeticError) as error:  # not four numbers, or NaN, infinite, a side of 0
        raise ValueError(f"{reprlib.repr(box)} is not a box in an image of {reprlib.repr(width)} x "
                         f"{reprlib.repr(height)}: {error}") from error
    if not (0 <= x1 <= x2 <= GRID and 0 <= y1 <= y2 <= GRID and min(wide, high, width, height, left + 1, top + 1) > 0):
        corners = left < wide and top < high and max(wide / width, high / height) <= 1
        raise ValueError(f"the box {reprlib.repr(box)} is not inside its image of {width} x {height}"
                         + ("; it would be as (left, top, right, bottom), but (left, top, width, height) is expected"
                            if corners else ""))
    if max(left, top, wide, high) <= 1 < min(width, height):
        raise ValueError(f"the box {reprlib.repr(box)} has shares of its image of {width} x {height}, but pixels are "
                         "expected: (left, top, width, height). Multiply them by the sides of the image")
    return f"{{<{x1}><{y1}><{x2}><{y2}>}}"


def read_box(text: str) -> tuple[int, int, int, int] | None:
    """Returns the box (x1, y1, x2, y2) at the start of an answer, in grid coordinates; None if there is none.

    Spaces and `<unk>` are ignored, as is the text after the box (eval_ref.py). Coordinates may be outside of the grid
    or in the wrong order: up to 999 each.
    """
    match = _BOX.match(text.replace("<unk>", "").replace(" ", "").strip())
    return None if match is None else tuple(map(int, match.groups()))
