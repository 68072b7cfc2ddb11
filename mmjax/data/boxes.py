"""A box in words, as MiniGPT-v2 writes and reads it: `{<x1><y1><x2><y2>}`, whole hundredths of the image's sides."""

import re
import reprlib
from collections.abc import Sequence

GRID = 100
_BOX = re.compile(r"\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}", re.ASCII)


def box_text(box: Sequence[float], width: float, height: float) -> str:
    """A box (left, top, width, height) in pixels, each end cut down to the grid; raises ValueError if it is not inside
    its image."""
    try:
        left, top, wide, high = map(float, box)
        ends = left / width, top / height, (left + wide) / width, (top + high) / height
        x1, y1, x2, y2 = (int(end * GRID) for end in ends)
    except (TypeError, ValueError, ArithmeticError) as error:  # not four numbers, or NaN, infinite, a side of 0
        raise ValueError(f"{reprlib.repr(box)} is no box in an image of {reprlib.repr(width)} x "
                         f"{reprlib.repr(height)}: {error}") from error
    if not (0 <= x1 <= x2 <= GRID and 0 <= y1 <= y2 <= GRID and min(wide, high, width, height, left + 1, top + 1) > 0):
        raise ValueError(f"the box {reprlib.repr(box)} is not inside its image of {width} x {height}")
    return f"{{<{x1}><{y1}><{x2}><{y2}>}}"


def read_box(words: str) -> tuple[int, int, int, int] | None:
    """The box (x1, y1, x2, y2) that an answer begins with, on the grid as it is written; None if it begins with none.

    Spaces and `<unk>` do not count and what follows the box is not looked at (eval_ref.py). The ends may lie beyond the
    grid or in the wrong order: up to 999 each.
    """
    found = _BOX.match(words.replace("<unk>", "").replace(" ", "").strip())
    return None if found is None else tuple(map(int, found.groups()))
