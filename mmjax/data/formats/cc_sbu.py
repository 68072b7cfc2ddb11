"""CC-SBU-align, the images and captions of MiniGPT-4's second stage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmjax.data.formats.record import Record
from mmjax.data.formats.rows import Root, RowRecords, caption_text, field, image_path, read_json


def cc_sbu_align(path: str, root: str | None = None, follow_links: bool = False) -> Sequence[Record]:
    """Reads `filter_cap.json` ({"annotations": [{"image_id", "caption"}, ...]}) and `image/IMAGE_ID.jpg` (stage 2).

    path: the folder with the file
    root: the folder with the folder `image`; None for the same
    follow_links: whether links may lead out of the root

    The name of a record is its `image_id`. Raises FileNotFoundError or ValueError if the file cannot be used.
    """
    file = Path(path) / "filter_cap.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not in the CC-SBU-align layout: there is no {file.name} in it.")
    expected = '{"annotations": [{"image_id": "2", "caption": "..."}, ...]}'
    rows = read_json(file, dict, expected=expected).get("annotations")
    if not isinstance(rows, list):
        raise ValueError(f"{file} must hold {expected}.")
    return RowRecords(file, Root.of(path if root is None else root, follow_links), rows, _caption)


def _caption(root: str, name: str, number: int, row: Any) -> Record:
    key = str(field(row, "image_id", str, int))
    if not key.strip():
        raise ValueError("'image_id' is empty")
    return Record(key, image_path(root, f"image/{key}.jpg"), caption_text(row, "caption"))
