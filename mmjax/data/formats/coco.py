"""COCO captions, as COCO publishes them or in one list of Karpathy's split."""

import collections
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmjax.data.formats.account import Account
from mmjax.data.formats.record import Record
from mmjax.data.formats.rows import RowRecords, caption_text, field, image_path, image_root, read_json, the_file


def coco_captions(path: str, root: str | None = None, follow_links: bool = False) -> Sequence[Record]:
    """Reads `annotations/captions_SPLIT.json` and the images in the folder SPLIT; each caption is a record.

    path: the file, or a folder with exactly one such file
    root: the folder with the folder SPLIT; None for the file's, or its parent if that is `annotations`
    follow_links: whether links may lead out of the root

    A file with a list of {"image", "caption"} (coco_karpathy_train.json, the training data of MiniGPT-v2) is read too;
    its `image` is a path below `root`. Raises FileNotFoundError or ValueError if the file cannot be used.
    """
    file = the_file(path, "captions_*.json", "COCO's captions_SPLIT.json")
    expected = '{"images": [...], "annotations": [...]}, or a list of {"image", "caption"}'
    content = read_json(file, dict, list, expected=expected)
    root = image_root(file, root, follow_links)
    if isinstance(content, list):
        return RowRecords(file, root, content, _karpathy)
    images, annotations = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise ValueError(f"{file} must hold {expected}.")
    split = file.stem.removeprefix("captions_")
    account = Account("captions", len(annotations), len(annotations))
    found = by_id(images, account)
    captioned = {row.get("image_id") for row in annotations if isinstance(row, dict) and _is_id(row.get("image_id"))}
    if bare := [str(key) for key in found if key not in captioned]:
        account.notice("images without a caption", *bare)
    return RowRecords(file, root, annotations, functools.partial(_caption, split, found), account)


def by_id(rows: Sequence[Any], account: Account | None = None) -> dict[int, Any]:
    """Returns the rows with an id by id. account: gets the ids of several rows, of which the last counts"""
    known = [row for row in rows if isinstance(row, dict) and _is_id(row.get("id"))]
    found = {row["id"]: row for row in known}
    if account is not None and len(known) > len(found):
        counts = collections.Counter(row["id"] for row in known)
        account.notice("ids of several entries, of which the last is used",
                       *(str(key) for key, count in counts.items() if count > 1))
    return found


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _caption(split: str, images: dict[int, Any], root: str, name: str, number: int, row: Any) -> Record:
    key = field(row, "image_id", int)
    if key not in images:
        raise ValueError(f"there is no image with the id {key}")
    file = field(images[key], "file_name", str)
    return Record(name, image_path(root, str(Path(split, file))), caption_text(row, "caption"))


def _karpathy(root: str, name: str, number: int, row: Any) -> Record:
    return Record(name, image_path(root, field(row, "image", str)), caption_text(row, "caption"))
