"""Boxes in words and what they cover."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mmjax.data import boxes
from mmjax.evaluate.metrics import grounding
from tests.evaluate.metrics import steady

ends = st.integers(0, 300)
ordered = st.tuples(ends, ends, ends, ends).map(
    lambda four: (min(four[::2]), min(four[1::2]), max(four[::2]), max(four[1::2])))
READ = {
    "{<1><2><30><100>}": (1, 2, 30, 100),
    " {<1> <2><30> <100>} </s>": (1, 2, 30, 100),
    "<unk>{<1><2><3><4>}": (1, 2, 3, 4),
    "{<1><2><3><4>}<delim>{<5><6><7><8>}": (1, 2, 3, 4),
    "{<999><0><0><0>}": (999, 0, 0, 0),
    "the dog {<1><2><3><4>}": None,
    "{<1><2><3>}": None,
    "{<1><2><3><4>": None,
    "{<-1><2><3><4>}": None,
    "{<1000><2><3><4>}": None,
    "{<1.5><2><3><4>}": None,
    "": None,
}


@pytest.mark.parametrize("answer", READ)
def test_reading(answer):
    assert boxes.read_box(answer) == READ[answer]


@steady
@given(st.integers(1, 2000), st.integers(1, 2000), st.data())
def test_what_is_written_is_read(width, height, data):
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = left, top, data.draw(st.integers(1, width - left)), data.draw(st.integers(1, height - top))
    assume(max(box) > 1 or min(width, height) == 1)  # else they would be shares of the image
    read = grounding.answered_box(boxes.box_text(box, width, height), (width, height))
    written = left, top, left + box[2], top + box[3]
    for found, right, side in zip(read, written, (width, height) * 2, strict=True):
        assert right - side / boxes.GRID - 1e-6 <= found <= right + 1e-6  # cut down to the grid


def test_iou_by_hand():
    assert grounding.iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert grounding.iou((0, 0, 9, 9), (5, 0, 14, 9), pixel=1) == pytest.approx(50 / 150)  # eval_utils.py: computeIoU
    assert grounding.iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0
    assert grounding.iou((10, 0, 0, 10), (0, 0, 10, 10)) == 0  # the wrong way round


@steady
@given(ordered, ordered, st.sampled_from((0.0, 1.0)))
def test_iou_is_symmetric_and_a_share(first, second, pixel):
    share = grounding.iou(first, second, pixel)
    assert share == grounding.iou(second, first, pixel) and 0 <= share <= 1


@steady
@given(ordered)
def test_a_box_covers_itself(box):
    assert grounding.iou(box, box, 1) == 1
    assert grounding.iou(box, box) == (box[0] < box[2] and box[1] < box[3])


@steady
@given(ordered, ordered, st.integers(-50, 50))
def test_moving_both_changes_nothing(first, second, by):
    moved = (tuple(end + by for end in box) for box in (first, second))
    assert grounding.iou(*moved) == pytest.approx(grounding.iou(first, second))
