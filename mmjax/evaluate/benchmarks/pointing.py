"""Referring expressions: RefCOCO, RefCOCO+ and RefCOCOg; every expression is an item."""

import functools
import math
from collections.abc import Sequence
from typing import Any

from mmjax.data.formats.grounding import SPLIT, read_references, reference_ids
from mmjax.data.formats.record import clean_caption
from mmjax.data.formats.rows import caption_text, coco_name, field, image_root, read_json, shown, the_file
from mmjax.evaluate.benchmarks.items import Item, check_template, find_image, items, to_sample

PROMPT = "[refer] give me the location of {}"  # coco_caption.py: RefCOCOEvalData


def refer(path: str, root: str | None = None, prompt: str | None = None) -> list[Item]:
    """Reads a JSON list of {"img_id", "sents", "bbox", "height", "width"}, or `refs(SPLITTER).p` and `instances.json`.

    path: the file, or the folder that has exactly one refs(*).p; images are in `train2014`
    root: the folder with `train2014`; None for the list's folder, or the parent of the folder of the references

    The lists are those of MiniGPT-v2's evaluation, one for each split. References of the split `train` are left out;
    the splits are groups, and the expressions are cleaned as captions are in training. Raises FileNotFoundError or
    ValueError naming what cannot be used, also if the pickle has anything but plain values: it is never executed.
    """
    file = the_file(path, "refs(*).p", "RefCOCO's refs(SPLITTER).p")
    prompt = check_template(PROMPT if prompt is None else prompt, "expression")
    if file.suffix == ".json":
        rows = read_json(file, list, expected='a list of {"img_id", "sents", "bbox", "height", "width"}')
        root = image_root(file, root)
        return items(file, root, rows, functools.partial(_evaluation, root, prompt))
    root = str(file.absolute().parent.parent) if root is None else root
    rows, images, boxes = read_references(file, train=False)
    return items(file, root, rows, functools.partial(_reference, root, images, boxes, prompt))


def _reference(root: str, images: dict[int, Any], boxes: dict[int, Any], prompt: str, number: int,
               row: tuple[Any, Any]) -> Item:
    ref, sentence = row
    key, box = reference_ids(ref, images, boxes)
    expression = clean_caption(caption_text(sentence, "raw"))
    if not expression:
        raise ValueError("nothing but punctuation in the expression")
    image = find_image(root, coco_name(SPLIT, key))
    return _found(f"{field(ref, 'ref_id', int)}:{field(sentence, 'sent_id', int)}",
                  to_sample(prompt, expression, image), boxes[box], images[key], field(ref, "split", str))


def _evaluation(root: str, prompt: str, number: int, row: Any) -> Item:
    # eval_ref.py: the id of the image, then that of the box; several expressions have the same
    name = field(row, "img_id", str)
    image = find_image(root, f"{SPLIT}/{name[:len('COCO_train2014_000000000000')]}.jpg")
    return _found(f"{name}:{number}", to_sample(prompt, caption_text(row, "sents"), image), row, row, "")


def _found(name: str, sample: Any, boxed: Any, sized: Any, group: str) -> Item:
    width, height = (field(sized, side, int) for side in ("width", "height"))
    return Item(name, sample, box=_ends(field(boxed, "bbox", list), width, height), size=(width, height), group=group)


def _ends(box: Sequence[Any], width: int, height: int) -> tuple[float, float, float, float]:
    """Converts (left, top, width, height) to (x1, y1, x2, y2); raises ValueError unless it is a box in its image."""
    try:
        left, top, wide, high = map(float, box)
    except (TypeError, ValueError) as error:
        raise ValueError(f"'bbox' must be four numbers, got {shown(box)}") from error
    ends = left, top, left + wide, top + high
    inside = left < width and top < height and min(ends[2:]) > 0  # partly: some boxes extend beyond their image
    if not (all(map(math.isfinite, ends)) and min(wide, high) > 0 and inside):
        raise ValueError(f"the box {shown(box)} is not in its image of {width} x {height}")
    return ends
