"""Shared code of the readers: rows that are converted to records on access, and checks of their values.

Data are not trusted: a problem of a row becomes the `problem` of its record, a problem of a whole file is an error.
Images are only read below a root folder.
"""

import abc
import functools
import json
import os
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmjax import files
from mmjax.data.conversation import IMAGE
from mmjax.data.formats.record import Record
from mmjax.data.text import PLACEHOLDER

MARK = "<image>"  # image placeholder of LLaVA's questions
LOOKED_AT = 16  # rows of a data file that are checked before any is used
_short = reprlib.Repr()
_short.maxstring = 120


def shown(value: Any) -> str:
    """Returns a value from a file as text for an error: on one line, short, without control characters."""
    return _short.repr(value)


class Lazy(Sequence[Record]):
    """A sequence whose records are made on access. A record that cannot be made has a `problem`."""

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        number = range(len(self))[number]  # handles negative indices, raises IndexError
        try:
            return self.record(number)
        except (ValueError, OSError) as error:
            return Record(self.name(number), None, "", problem=str(error))

    @abc.abstractmethod
    def name(self, number: int) -> str:
        """Returns the name of a record, for errors."""

    @abc.abstractmethod
    def record(self, number: int) -> Record:
        """Makes a record. Raises ValueError or OSError describing its problem."""


class RowRecords(Lazy):
    """The rows of a data file, converted to records by `read(root, name, number, row)`.

    root: the folder of their images

    Raises ValueError if there are no rows, or if none of some rows spread over the file can be used and has an existing
    image: then the folder or the layout is wrong. Other missing images are detected when they are read.
    """

    def __init__(self, path: Path, root: str, rows: Sequence[Any],
                 read: Callable[[str, str, int, Any], Record]) -> None:
        if not len(rows):
            raise ValueError(f"{path} has no rows.")
        self.path, self.root, self.rows, self.read = path, root, rows, read
        checked = [self[number] for number in range(0, len(rows), -(-len(rows) // LOOKED_AT))]
        problems = [_early_problem(record) for record in checked]
        if all(problems):
            raise ValueError(
                f"None of {len(problems)} rows of {path} that were checked can be used:\n  "
                + "\n  ".join(f"{record.name}: {reason}" for record, reason in zip(checked[:5], problems, strict=False))
                + f"\nImages are expected below {root}. If they are elsewhere, name that folder as `root` (data.root "
                "of a configuration, --root of data check).")

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, number: int) -> str:
        return f"{self.path.name}:{number}"

    def record(self, number: int) -> Record:
        return self.read(self.root, self.name(number), number, self.rows[number])


def _early_problem(record: Record) -> str | None:
    """Returns the problem of a record, without reading its image."""
    if record.problem is None and isinstance(record.image, str) and not os.path.isfile(record.image):
        return f"there is no image {shown(record.image)}"
    return record.problem


def the_file(path: str, pattern: str, what: str) -> Path:
    """Returns a file, or the only file of that pattern in a folder.

    Raises FileNotFoundError, or ValueError if the folder has several.
    """
    file = Path(path)
    if not file.is_dir():
        if not file.is_file():
            raise FileNotFoundError(f"There is no {file}. Expected {what}.")
        return file
    matches = sorted(each for each in file.glob(pattern) if each.is_file())
    if not matches:
        raise FileNotFoundError(f"{file} has no {pattern}. Expected {what}.")
    if len(matches) > 1:
        raise ValueError(f"{file} has {len(matches)} files {pattern}: {', '.join(each.name for each in matches[:5])}. "
                         "Name one of them.")
    return matches[0]


def image_root(file: Path, root: str | None) -> str:
    """Returns the folder of the images: `root`, or the file's folder, or the parent of a folder `annotations`."""
    if root is not None:
        return root
    folder = file.absolute().parent
    return str(folder.parent if folder.name == "annotations" else folder)


def parse_json(content: str | bytes) -> Any:
    """Returns the value of a JSON text. Raises ValueError, also if it is nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("brackets nested too deeply") from error


def read_json(path: Path, *kinds: type, expected: str) -> Any:
    """Returns the content of a JSON file; raises ValueError naming the file if it is damaged or of another type."""
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error
    if not isinstance(content, kinds):
        raise ValueError(f"{path} must hold {expected}, not a {type(content).__name__}.")
    return content


def field(row: Any, key: str, *kinds: type) -> Any:
    """Returns the value of a key in a row; raises ValueError if there is none, or one of another type."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with {key!r}, got {shown(row)}")
    value = row.get(key)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{key!r} must be {' or '.join(kind.__name__ for kind in kinds)}, got {shown(value)}")
    return value


def text(row: Any, key: str) -> str:
    """Returns the text of a key, which may be empty; raises ValueError for anything else."""
    value = field(row, key, str)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key!r} is not text: {error}") from error
    return value


def caption_text(row: Any, key: str) -> str:
    """Returns the text of a key; raises ValueError for anything else or only white space."""
    value = text(row, key)
    if not value.strip():
        raise ValueError(f"{key!r} is empty")
    return value


def image_path(root: str, name: str) -> str:
    """Returns the path of an image, which need not exist. Raises ValueError if it is not below the root.

    Links are followed for this check; an absolute path below the root is allowed.
    """
    if "://" in name and (problem := files.url_problem(name)):
        raise ValueError(f"the image {problem}")
    path = os.path.join(root, name)
    try:
        base, real = _real(os.path.join(os.getcwd(), root)), os.path.realpath(path)
    except ValueError as error:  # a zero byte, or not Unicode
        raise ValueError(f"{shown(name)} is not a name of an image: {error}") from error
    if real == base or os.path.commonpath([base, real]) != base:
        raise ValueError(f"the image {shown(name)} is not below {root}")
    return path


@functools.lru_cache(maxsize=16)
def _real(root: str) -> str:
    """Returns the real path of an absolute path; `..` after a link is resolved as by the system."""
    return os.path.realpath(root)


def about_image(question: str) -> str:
    """Returns a question about an image in MiniGPT-4's format: `<Img><ImageHere></Img> QUESTION `, with a final space.

    All readers use this, so images are always put first; LLaVA's `<image>` marks are removed. A question with one
    `<ImageHere>` is unchanged. Raises ValueError if it has several.
    """
    if question.count(PLACEHOLDER) > 1:
        raise ValueError(f"the question has {question.count(PLACEHOLDER)} {PLACEHOLDER}, but there is one image")
    if PLACEHOLDER in question:
        return question
    return f"{IMAGE} {question.replace(MARK, '').strip()} "


def without_image(question: str) -> str:
    """Returns a question without image marks; raises ValueError if it has some."""
    if PLACEHOLDER in question or MARK in question:
        raise ValueError(f"the question {shown(question)} shows an image that is not there")
    return question


def coco_name(split: str, number: int) -> str:
    """Returns the path of an image of COCO 2014, such as `train2014/COCO_train2014_000000000009.jpg`."""
    return f"{split}/COCO_{split}_{number:012d}.jpg"
