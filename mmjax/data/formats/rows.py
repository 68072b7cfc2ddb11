"""What the readers share: rows that become records one by one, and the checks of what stands in them.

Data come from anywhere, so nothing in a row is believed: what is wrong with one row becomes that record's `problem`,
what is wrong with a whole file is an error. Images are looked up below a root folder and nowhere else.
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

MARK = "<image>"  # where LLaVA's questions show the image
LOOKED_AT = 16  # rows of a data file that are looked at before any is used
_short = reprlib.Repr()
_short.maxstring = 120


def shown(value: Any) -> str:
    """A value from a file as an error may show it: on one line, not too long, nothing in it that moves a terminal."""
    return _short.repr(value)


class Lazy(Sequence[Record]):
    """Records made when they are asked for. One that cannot be made says why in its `problem`."""

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        number = range(len(self))[number]  # negative ones count from the end, others beyond it raise IndexError
        try:
            return self.record(number)
        except (ValueError, OSError) as error:
            return Record(self.name(number), None, "", problem=str(error))

    @abc.abstractmethod
    def name(self, number: int) -> str:
        """What an error calls this one."""

    @abc.abstractmethod
    def record(self, number: int) -> Record:
        """Raises ValueError or OSError saying what is wrong with this one."""


class RowRecords(Lazy):
    """The rows of a data file, each made a record by `read(root, name, number, row)`.

    root: the folder that their images lie below

    Raises ValueError if there are no rows; also if none of a few from all over the file can be used, or has an image
    that is there: then it is the wrong folder, or another layout. Otherwise an image is looked for when it is read.
    """

    def __init__(self, path: Path, root: str, rows: Sequence[Any],
                 read: Callable[[str, str, int, Any], Record]) -> None:
        if not len(rows):
            raise ValueError(f"{path} has no rows.")
        self.path, self.root, self.rows, self.read = path, root, rows, read
        looked_at = [self[number] for number in range(0, len(rows), -(-len(rows) // LOOKED_AT))]
        problems = [_trouble(record) for record in looked_at]
        if all(problems):
            raise ValueError(
                f"None of {len(problems)} rows of {path} that were looked at can be used:\n  "
                + "\n  ".join(f"{record.name}: {why}" for record, why in zip(looked_at[:5], problems, strict=False))
                + f"\nImages are expected below {root}. If they lie elsewhere, name that folder as `root` (data.root "
                "of a configuration, --root of data check).")

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, number: int) -> str:
        return f"{self.path.name}:{number}"

    def record(self, number: int) -> Record:
        return self.read(self.root, self.name(number), number, self.rows[number])


def _trouble(record: Record) -> str | None:
    """Why a record cannot be used, as far as that shows before its image is read."""
    if record.problem is None and isinstance(record.image, str) and not os.path.isfile(record.image):
        return f"there is no image {shown(record.image)}"
    return record.problem


def the_file(path: str, pattern: str, what: str) -> Path:
    """A file, or the only one of that pattern in a folder.

    Raises FileNotFoundError, or ValueError if the folder has several.
    """
    place = Path(path)
    if not place.is_dir():
        if not place.is_file():
            raise FileNotFoundError(f"There is no {place}. Expected {what}.")
        return place
    found = sorted(file for file in place.glob(pattern) if file.is_file())
    if not found:
        raise FileNotFoundError(f"{place} has no {pattern}. Expected {what}.")
    if len(found) > 1:
        raise ValueError(f"{place} has {len(found)} files {pattern}: {', '.join(file.name for file in found[:5])}. "
                         "Name one of them.")
    return found[0]


def image_root(file: Path, root: str | None) -> str:
    """The folder below which images lie: `root`, or the file's; of `annotations/FILE` the one above."""
    if root is not None:
        return root
    folder = file.absolute().parent
    return str(folder.parent if folder.name == "annotations" else folder)


def parse_json(content: str | bytes) -> Any:
    """Raises ValueError, also for what is nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("brackets nested too deeply") from error


def read_json(path: Path, *kinds: type, expected: str) -> Any:
    """What a JSON file holds; raises ValueError naming the file if it is damaged or holds something else."""
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error
    if not isinstance(content, kinds):
        raise ValueError(f"{path} must hold {expected}, not a {type(content).__name__}.")
    return content


def field(row: Any, key: str, *kinds: type) -> Any:
    """What a row has under a key; raises ValueError if it has none, or one of another kind."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with {key!r}, got {shown(row)}")
    value = row.get(key)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{key!r} must be {' or '.join(kind.__name__ for kind in kinds)}, got {shown(value)}")
    return value


def text(row: Any, key: str) -> str:
    """Text, which may be empty; raises ValueError for anything else."""
    found = field(row, key, str)
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key!r} is not text: {error}") from error
    return found


def caption_text(row: Any, key: str) -> str:
    """Text with something in it; raises ValueError for anything else."""
    found = text(row, key)
    if not found.strip():
        raise ValueError(f"{key!r} is empty")
    return found


def image_path(root: str, name: str) -> str:
    """The path of an image, which need not be there. Raises ValueError if it leads out of the root.

    Links are followed to see where it leads; an absolute path that stays below the root is fine.
    """
    if "://" in name and (problem := files.url_problem(name)):
        raise ValueError(f"the image {problem}")
    path = os.path.join(root, name)
    try:
        base, real = _real(os.path.join(os.getcwd(), root)), os.path.realpath(path)
    except ValueError as error:  # a zero byte, or not Unicode
        raise ValueError(f"{shown(name)} is no name of an image: {error}") from error
    if real == base or os.path.commonpath([base, real]) != base:
        raise ValueError(f"the image {shown(name)} is not below {root}")
    return path


@functools.lru_cache(maxsize=16)
def _real(root: str) -> str:
    """Of an absolute path; `..` behind a link leads where the system says."""
    return os.path.realpath(root)


def about_image(question: str) -> str:
    """A question as MiniGPT-4 asks it of an image: `<Img><ImageHere></Img> QUESTION `, with the space at its end.

    This is the one place that decides where an image stands: in front, wherever LLaVA's `<image>` marks were (they
    go). A question that has one `<ImageHere>` of its own stays as it is. Raises ValueError if it has several.
    """
    if question.count(PLACEHOLDER) > 1:
        raise ValueError(f"the question has {question.count(PLACEHOLDER)} {PLACEHOLDER}, but there is one image")
    if PLACEHOLDER in question:
        return question
    return f"{IMAGE} {question.replace(MARK, '').strip()} "


def without_image(question: str) -> str:
    """A question that shows no image; raises ValueError if it does."""
    if PLACEHOLDER in question or MARK in question:
        raise ValueError(f"the question {shown(question)} shows an image that is not there")
    return question


def coco_name(split: str, number: int) -> str:
    """Where COCO's images of 2014 lie, such as `train2014/COCO_train2014_000000000009.jpg`."""
    return f"{split}/COCO_{split}_{number:012d}.jpg"
