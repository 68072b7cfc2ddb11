"""Shared code of the readers: rows that are converted to records on access, and checks of their values.

Data are not trusted: a problem of a row becomes the `problem` of its record, a problem of a whole file is an error.
Images are only read below a root folder.
"""

import abc
import codecs
import difflib
import functools
import json
import os
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmjax import files
from mmjax.data.conversation import IMAGE
from mmjax.data.formats.account import Account
from mmjax.data.formats.record import Record
from mmjax.data.images import missing
from mmjax.data.text import PLACEHOLDER

MARK = "<image>"  # image placeholder of LLaVA's questions
FOLLOW = "data.follow_links of a configuration, --follow-links of a command"
NOT_BELOW = "is not below"
LOOKED_AT = 16  # rows of a data file that are checked before any is used
_short = reprlib.Repr()
_short.maxstring = 120


def shown(value: Any) -> str:
    """Returns a value from a file as text for an error: on one line, short, without control characters."""
    return _short.repr(value)


class Lazy(Sequence[Record]):
    """A sequence whose records are made on access. A record that cannot be made has a `problem`.

    account: what the reader found and left out
    files:   the files that the records were read from, without those of images
    """

    account: Account
    files: tuple[str, ...]

    def fingerprints(self) -> dict[str, str]:
        """Returns `{file: fingerprint}` of the files that the records were read from; files of images have none."""
        return {file: f"SHA-256 {files.sha256(file)}" for file in self.files}

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

    root:    the folder of their images
    account: of the file; None if every row is a record
    beside:  other files that were read for them

    Raises ValueError if there are no rows, or if none of some rows spread over the file can be used and has an existing
    image: then the folder or the layout is wrong. Other missing images are detected when they are read.
    """

    def __init__(self, path: Path, root: str, rows: Sequence[Any], read: Callable[[str, str, int, Any], Record],
                 account: Account | None = None, beside: Sequence[Path] = ()) -> None:
        if not len(rows):
            raise ValueError(f"{path} has no rows.")
        self.path, self.root, self.rows, self.read = path, root, rows, read
        self.account = account or Account("rows", len(rows), len(rows))
        self.files = tuple(map(str, (path, *beside)))
        checked = [self[number] for number in range(0, len(rows), -(-len(rows) // LOOKED_AT))]
        problems = [_early_problem(record) for record in checked]
        if all(problems):
            elsewhere = any(record.problem is None or NOT_BELOW in record.problem and FOLLOW not in record.problem
                            for record in checked)
            raise ValueError(
                f"None of {len(problems)} rows of {path} that were checked can be used:\n  "
                + "\n  ".join(f"{record.name}: {reason}" for record, reason in zip(checked[:5], problems, strict=False))
                + (f"\nImages are expected below {root}. If they are elsewhere, name that folder as `root` (data.root "
                   "of a configuration, --root of data check)." if elsewhere else ""))

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, number: int) -> str:
        return f"{self.path.name}:{number}"

    def record(self, number: int) -> Record:
        return self.read(self.root, self.name(number), number, self.rows[number])


def _early_problem(record: Record) -> str | None:
    """Returns the problem of a record, without reading its images."""
    absent = (missing(image) for image in record.images if isinstance(image, str) and not os.path.isfile(image))
    return record.problem or next(absent, None)


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


def parse_options(path: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Returns the path of a data set, and the options after its `?`. Raises ValueError for unknown options."""
    place, mark, rest = path.partition("?")
    options = {}
    for part in rest.split("&") if mark else ():
        key, _, value = part.partition("=")
        if key not in known or not value:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"Did you mean {close[0]}=...?" if close else f"There are {', '.join(known)}."
            raise ValueError(f"{path}: {part!r} is none of the options KEY=VALUE of a data set. {hint}")
        options[key] = value
    return place, options


def image_root(file: Path, root: str | None, follow_links: bool = False) -> str:
    """Returns the folder of the images: `root`, or the file's folder, or the parent of a folder `annotations`."""
    if root is None:
        folder = file.absolute().parent
        root = str(folder.parent if folder.name == "annotations" else folder)
    return Root.of(root, follow_links)


def read_json(path: Path, *kinds: type, expected: str) -> Any:
    """Returns the content of a JSON file; raises ValueError naming the file if it is damaged or of another type.

    A file with one JSON object a line is read as the list of these objects, if a list is expected.
    """
    content = path.read_bytes()
    try:
        value = files.parse_json(content)
    except ValueError as error:  # not JSON, or not UTF-8
        if message := files.not_text(content):
            raise ValueError(f"{path} {message} {path.name}") from error
        if (rows := _json_lines(content)) is None:
            raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error
        if list not in kinds:
            raise ValueError(f"{path} has one JSON object a line, but must hold {expected}.") from error
        return rows
    if not isinstance(value, kinds):
        raise ValueError(f"{path} must hold {expected}, not a {type(value).__name__}.")
    return value


def _json_lines(content: bytes) -> list[Any] | None:
    """Returns the objects of a text with one JSON object a line; None for any other text."""
    lines = [line for line in content.split(b"\n") if line.strip()]
    if len(lines) < 2 or not all(line.lstrip().startswith(b"{") for line in lines):
        return None
    try:
        return [files.parse_json(line) for line in lines]
    except ValueError:
        return None


def lines_of(path: Path) -> tuple[list[tuple[int, bytes]], int]:
    """Returns (the lines that are not blank with their numbers, counted from 0; the number of blank lines) of a file
    of JSON lines. A file with one JSON list is read as its elements.

    Raises ValueError naming a file that is no text, or a list that is not JSON.
    """
    content = path.read_bytes()
    if message := files.not_text(content):
        raise ValueError(f"{path} {message} {path.name}")
    content = content.removeprefix(codecs.BOM_UTF8)
    if content.lstrip().startswith(b"["):
        return [(number, json.dumps(row).encode()) for number, row in enumerate(read_json(
            path, list, expected="a list, or one JSON object a line"))], 0
    lines = content.split(b"\n")
    full = [(number, line) for number, line in enumerate(lines) if line.strip()]
    return full, len(lines) - (not lines[-1]) - len(full)


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


class Root(str):
    """A folder of images whose links may lead out of it. For other folders a plain string is used."""

    @staticmethod
    def of(path: str, follow_links: bool) -> str:
        """Returns the path, as a `Root` if links may lead out of it."""
        return Root(path) if follow_links else path

    def __reduce__(self) -> Any:
        return Root, (str(self),)


def image_path(root: str, name: str) -> str:
    """Returns the path of an image, which need not exist. Raises ValueError if it is not below the root.

    Links are followed for this check, unless `root` is a `Root`; an absolute path below the root is allowed. A name
    that leads out of the root by `..` is refused for any root.
    """
    if "://" in name and (problem := files.url_problem(name)):
        raise ValueError(f"the image {problem}")
    path = os.path.join(root, name)
    try:
        base, real = _real(os.path.join(os.getcwd(), root)), os.path.realpath(path)
    except ValueError as error:  # a zero byte, or not Unicode
        raise ValueError(f"{shown(name)} is not a name of an image: {error}") from error
    if real != base and os.path.commonpath([base, real]) == base:
        return path
    named = os.path.abspath(path).startswith(os.path.abspath(root).rstrip(os.sep) + os.sep)
    if not named or ".." in Path(name).parts:
        raise ValueError(f"the image {shown(name)} {NOT_BELOW} {root}")
    if isinstance(root, Root):
        return path
    raise ValueError(f"the image {shown(name)} {NOT_BELOW} {root}: {_link(path, base)} is a link that leads to "
                     f"{shown(real)}. Allow links that lead out of the folder ({FOLLOW})")


def _link(path: str, base: str) -> str:
    """Returns the first link on the way to a path that leads out of a real folder."""
    parts = Path(os.path.abspath(path)).parts
    for end in range(1, len(parts) + 1):
        part = os.path.join(*parts[:end])
        if os.path.islink(part) and os.path.commonpath([base, os.path.realpath(part)]) != base:
            return shown(part)
    return shown(path)


@functools.lru_cache(maxsize=16)
def _real(root: str) -> str:
    """Returns the real path of an absolute path; `..` after a link is resolved as by the system."""
    return os.path.realpath(root)


def image_names(row: dict[str, Any]) -> list[str]:
    """Returns the names of a row's images, in order: `image` is a name, a list of names or null, `images` a list or
    null. Null, and no key at all, is no image.

    Raises ValueError for anything else, and for both keys.
    """
    given = {key: row[key] for key in ("image", "images") if row.get(key) is not None}
    if len(given) > 1:
        raise ValueError("both 'image' and 'images'; give one of them")
    for key, value in given.items():
        names = value if isinstance(value, list) else [value] if key == "image" else None
        if names is None or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{key!r} must be {'a name or ' * (key == 'image')}a list of names, got {shown(value)}")
        return [text({key: name}, key) for name in names]
    return []


QUESTION, ANSWER = ("human", "user"), ("gpt", "assistant")  # who says a question and an answer
SPOKEN = (("from", "value"), ("role", "content"))  # keys of a message: who says it, and what


def dialogue(messages: Sequence[Any], empty_question: bool = False) -> list[tuple[str, str]]:
    """Returns the (question, answer) pairs of a conversation: messages {"from", "value"} or {"role", "content"}.

    Raises ValueError if it does not begin with a question, if questions and answers do not take turns, or if a text is
    empty. A message need not say whose it is.

    empty_question: whether questions may be empty
    """
    if len(messages) < 2 or len(messages) % 2:
        first = _speaker(messages[0]) if messages else None
        raise ValueError(f"a conversation needs an answer to every question, but has {len(messages)} messages"
                         + (f" and begins with {shown(first)}" if first in ANSWER else ""))
    texts = []
    for index, message in enumerate(messages):
        speaker, expected = _speaker(message), (QUESTION, ANSWER)[index % 2]
        if speaker is not None and speaker not in expected:
            if index == 0:
                raise ValueError(f"the conversation begins with {shown(speaker)}, but must begin with a question "
                                 f"({' or '.join(QUESTION)})")
            raise ValueError(f"'from' must be human and gpt in turn, but is not in message {index} (from 0): "
                             f"{shown(speaker)}")
        read = text if empty_question and not index % 2 else caption_text
        texts.append(read(message, _text_key(message)))
    return list(zip(texts[::2], texts[1::2], strict=True))


def _text_key(message: Any) -> str:
    return next((key for _, key in SPOKEN if isinstance(message, dict) and key in message), "value")


def _speaker(message: Any) -> Any:
    """Returns who says a message; None if it does not say."""
    return next((message[key] for key, _ in SPOKEN if isinstance(message, dict) and key in message), None)


def about_image(question: str, count: int = 1) -> str:
    """Returns a question about images in MiniGPT-4's format: `<Img><ImageHere></Img> QUESTION `, with a final space.

    All readers use this, so images are always put first; LLaVA's `<image>` marks are removed. A question with one
    `<ImageHere>` for each image is unchanged. Raises ValueError if it has another number of them.
    """
    if (marked := question.count(PLACEHOLDER)) not in (0, count):
        there = "there is one image" if count == 1 else f"there are {count} images"
        raise ValueError(f"the question has {marked} {PLACEHOLDER}, but {there}")
    if marked:
        return question
    return f"{IMAGE * count} {question.replace(MARK, '').strip()} "


def without_image(question: str) -> str:
    """Returns a question without image marks; raises ValueError if it has some."""
    if PLACEHOLDER in question or MARK in question:
        raise ValueError(f"the question {shown(question)} shows an image that is not there")
    return question


def coco_name(split: str, number: int) -> str:
    """Returns the path of an image of COCO 2014, such as `train2014/COCO_train2014_000000000009.jpg`."""
    return f"{split}/COCO_{split}_{number:012d}.jpg"
