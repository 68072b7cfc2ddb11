"""Reads Parquet files as Hugging Face data sets have them: a column of images, and captions or conversations.

Text columns are kept in memory. Images are read by row groups when they are needed: in random order a row group is
read for nearly every image, so `mmjax data prepare parquet` is faster for large data.
"""

import functools
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmjax import files
from mmjax.data.formats.account import Account
from mmjax.data.formats.instruct import described
from mmjax.data.formats.record import Record
from mmjax.data.formats.rows import Lazy, Root, image_path, parse_options, shown
from mmjax.data.formats.tar_index import describe_stamp

IMAGES = ("image", "images", "jpg", "png", "jpeg", "img", "picture")  # default names of the column of images
CAPTIONS = ("caption", "captions", "text", "description")  # and of the column of captions
CONVERSATIONS = ("conversations", "messages", "turns", "texts")
ROWS, EXPANSION, SMALL = 64, 1_000, 2**26  # rows and unpacked bytes for each byte of a file; a small file may unpack to
CACHED = 4  # row groups of images


def parquet(path: str, root: str | None = None, follow_links: bool = False) -> Sequence[Record]:
    """Reads Parquet files with a column of images and a column of captions or conversations.

    path: a file, or a folder of them; of a folder with several splits (`train-00000-of-00002.parquet`), those of
          `train`. Columns follow a `?` if they are ambiguous: `data?image=NAME&text=NAME`
    root: the folder of the images that are stored as paths; None for that of the files
    follow_links: whether links may lead out of the root

    An image is a binary value, {"bytes", "path"}, a path, or a list of them. A caption is text, or a list of which the
    first is used. A conversation is a list of {"from", "value"}, {"role", "content"}, {"user", "assistant"} or
    [QUESTION, ANSWER]; a table with the columns `prompt` and `answer` has one pair. Raises FileNotFoundError or
    ValueError naming files that are missing, damaged or ambiguous.
    """
    return Rows(path, root, follow_links)


@dataclass(frozen=True)
class Cell:
    """An image in a table. It is pickled as its position, and the table is opened when the image is read.

    row:   of its file
    index: among the images of the row
    """

    file: str
    column: str
    row: int
    index: int
    root: str
    table: "_Table" = field(compare=False, repr=False)

    def read(self) -> bytes:
        """Returns the bytes of the image. Raises ValueError or OSError if it cannot be read."""
        value = self.table.images(self.row)[self.index]
        content = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(content, bytes):
            return content
        name = value.get("path") if isinstance(value, dict) else value
        if not isinstance(name, str):
            raise ValueError(f"{self} holds no image but {shown(value)}")
        return Path(image_path(self.root, name)).read_bytes()

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}" + f", image {self.index}" * bool(self.index)

    def __reduce__(self) -> Any:
        return _cell, (self.file, self.column, self.row, self.index, self.root)


def _cell(file: str, column: str, row: int, index: int, root: str) -> Cell:
    return Cell(file, column, row, index, root, _table(file, column))


class Rows(Lazy):
    """The rows of several files, which are pickled as the path."""

    def __init__(self, path: str, root: str | None, follow_links: bool) -> None:
        place, options = parse_options(path, ("image", "text"))
        self.path, self._root, self._follow_links = path, root, follow_links
        self.account = Account("rows")
        self.files = tuple(_files(place, self.account))
        self.root = Root.of(root or os.path.dirname(os.path.abspath(self.files[0])), follow_links)
        self._tables = [_open(file, options) for file in self.files]
        self._starts = [0]
        for table in self._tables:
            self._starts.append(self._starts[-1] + len(table))
        self.account.found += len(self)
        self.account.used = len(self)
        if not len(self):
            raise ValueError(f"{path} has no rows.")

    def __reduce__(self) -> Any:
        return Rows, (self.path, self._root, self._follow_links)

    def __len__(self) -> int:
        return self._starts[-1]

    def fingerprints(self) -> dict[str, str]:
        """Returns `{file: size and time}`."""
        return {file: describe_stamp(file) for file in self.files}

    def name(self, number: int) -> str:
        table, row = self._locate(number)
        return f"{os.path.basename(table.file)}:{row}"

    def record(self, number: int) -> Record:
        table, row = self._locate(number)
        cells = [Cell(table.file, table.column, row, index, self.root, table) for index in range(table.count(row))]
        return described(self.name(number), cells, table.text(row))

    def _locate(self, number: int) -> tuple["_Table", int]:
        """Returns the table of a record and its row."""
        table = next(index for index, start in enumerate(self._starts[1:]) if number < start)
        return self._tables[table], number - self._starts[table]


def _files(place: str, account: Account) -> Iterator[str]:
    """Yields the files of a path, in order; other files of a folder are left out."""
    path = Path(place)
    if path.is_file():
        yield place
        return
    if not path.is_dir():
        raise FileNotFoundError(f"There is no {place}. Expected a .parquet file, or a folder of them.")
    names = sorted(each.name for each in path.iterdir() if each.is_file())
    tables = [name for name in names if name.endswith(".parquet") and not name.startswith(".")]
    if not tables:
        raise FileNotFoundError(f"{place} has no .parquet files. Name the folder that has them, such as {place}/data.")
    splits = {name.split("-")[0] for name in tables if "-" in name}
    chosen = [name for name in tables if name.startswith("train-")] if len(splits) > 1 and "train" in splits else tables
    for reason, left in (("files of other splits", [name for name in tables if name not in chosen]),
                         ("files that are no .parquet", [name for name in names if name not in tables])):
        account.found += len(left)
        if left:
            account.leave(reason, *left)
    yield from (str(path / name) for name in chosen)


def _open(file: str, options: dict[str, str]) -> "_Table":
    column, texts = _choose_columns(file, options)
    return _table(file, column, texts)


@functools.lru_cache(maxsize=64)
def _table(file: str, column: str, texts: tuple[str, ...] = ()) -> "_Table":
    return _Table(file, column, texts)


def _guarded(file: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a function of pyarrow. Raises ValueError naming the file in place of its errors, which may be any."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{file} is not a Parquet file that can be read: {first or repr(error)}") from error


def _reader(file: str) -> Any:
    from pyarrow import parquet as arrow

    with open(file, "rb") as opened:
        start = opened.read(64)
    if start[:4] != b"PAR1":
        raise ValueError(f"{file} {files.not_text(start) or 'is not a Parquet file: it does not begin as one does'}")
    reader = _guarded(file, arrow.ParquetFile, file, memory_map=True)
    size, rows = os.path.getsize(file), reader.metadata.num_rows
    groups = [reader.metadata.row_group(number) for number in range(reader.metadata.num_row_groups)]
    if rows > ROWS * size or sum(group.num_rows for group in groups) != rows:
        raise ValueError(f"{file} is damaged: its {size:,} bytes say that they have {rows:,} rows")
    if (unpacked := sum(group.total_byte_size for group in groups)) > max(SMALL, EXPANSION * size):
        raise ValueError(f"{file} cannot be used: its {size:,} bytes would unpack to {unpacked:,}")
    return reader


def _choose_columns(file: str, options: dict[str, str]) -> tuple[str, tuple[str, ...]]:
    """Returns the column of images ("" for none) and those of text. Raises ValueError if they are ambiguous."""
    schema = _guarded(file, lambda: _reader(file).schema_arrow)
    names = list(dict.fromkeys(schema.names))
    if missing := [name for name in options.values() if name not in names]:
        raise ValueError(f"{file} has no column {', '.join(missing)}; it has {', '.join(names)}.")
    images = [options["image"]] if "image" in options else [name for name in names if name.lower() in IMAGES]
    if "text" in options:
        texts = [[options["text"]]]
    else:
        texts = [[name] for name in names if name in CONVERSATIONS] or [
            [name] for name in names if name.lower() in CAPTIONS]
        texts = texts or ([["prompt", "answer"]] if {"prompt", "answer"} <= set(names) else [])
    if len(images) > 1 or len(texts) != 1:
        raise ValueError(f"{file} has the columns {', '.join(names)}. Say which to read: {file}?image=NAME&text=NAME")
    return images[0] if images else "", tuple(texts[0])


class _Table:
    """A file: its text in memory, its images by row groups. Threads may share it."""

    def __init__(self, file: str, column: str, texts: tuple[str, ...]) -> None:
        self.file, self.column, self._texts = file, column, texts
        self._reader, self._lock = _reader(file), threading.Lock()
        self._starts = [0]
        for number in range(self._reader.metadata.num_row_groups):
            self._starts.append(self._starts[-1] + self._reader.metadata.row_group(number).num_rows)
        self._text = _guarded(file, self._reader.read, columns=list(texts)) if texts else None
        self._counts = self._count_images() if column and texts else []
        self._group = functools.lru_cache(CACHED)(self._read_group)

    def __len__(self) -> int:
        return self._starts[-1]

    def text(self, row: int) -> dict[str, Any]:
        """Returns a row for `described`. Raises ValueError for text that is not UTF-8."""
        values = {name: _guarded(self.file, self._text.column(name)[row].as_py) for name in self._texts}
        if set(self._texts) == {"prompt", "answer"}:
            return values
        (value,) = values.values()
        if isinstance(value, list) and value and not isinstance(value[0], str):
            return {"turns" if _is_pair(value[0]) else "conversations": value}
        return {"caption": value[0] if isinstance(value, list) and value else value}

    def count(self, row: int) -> int:
        """Returns the number of images of a row."""
        return self._counts[row] if self._counts else 0

    def images(self, row: int) -> list[Any]:
        """Returns the images of a row, as they are stored."""
        group = next(number for number, start in enumerate(self._starts[1:]) if row < start)
        with self._lock:
            value = _guarded(self.file, self._group(group)[row - self._starts[group]].as_py)
        return _listed(value)

    def _read_group(self, group: int) -> Any:
        return _guarded(self.file, self._reader.read_row_group, group, columns=[self.column]).column(0)

    def _count_images(self) -> list[int]:
        """Returns the number of images of each row. Only the paths are read where there are some beside the bytes."""
        schema = self._reader.schema
        leaves = [schema.column(number).path for number in range(len(schema))]
        leaves = [leaf for leaf in leaves if leaf == self.column or leaf.startswith(self.column + ".")]
        paths = [leaf for leaf in leaves if leaf.endswith(".path")] or leaves
        counts = []
        for batch in _guarded(self.file, lambda: list(self._reader.iter_batches(1_000, columns=paths))):
            counts += [len(_listed(value)) for value in _guarded(self.file, batch.column(0).to_pylist)]
        return counts


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) or isinstance(value, dict) and {"user", "assistant"} <= value.keys()


def _listed(value: Any) -> list[Any]:
    """Returns the images of a value: a list, one image, or none for null."""
    return [] if value is None else [each for each in value if each is not None] if isinstance(value, list) else [value]
