"""Features on disk: what a frozen encoder makes of every image, so that training need not run it.

N images in all, n of a shard   K crops of each

    FOLDER/features.json           what the features are (`Card`)
    FOLDER/NNNNN.array_record      a shard: the K features of its first image, of its second, ...; plain bytes
    FOLDER/NNNNN.npy               uint64[3,n]: the keys and contents of its images. Written last: without it the
                                   shard was not finished and is written again
    FOLDER/index.npy               uint64[4,N]: the same of all shards, sorted by key, and where each image is.
                                   Without it the whole was never finished
    FOLDER/features_errors.jsonl   the images that could not be read; see `mmjax.training.encode_features`

An image is known by the path from its source's folder, so that the data may move. Its key is a hash of that in two
words. That the folder still holds the same images, a hash of their contents shows: `Features.of` looks at some.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from ml_dtypes import bfloat16

from mmjax import files, trees
from mmjax.batch import Sample
from mmjax.config import Source
from mmjax.data import images
from mmjax.data.arrays import read_npy
from mmjax.data.formats.record import Record
from mmjax.data.formats.rows import image_root, shown

FORMAT = 1
SHARD = 4096  # images
OPEN = 64  # shards that are kept open
LOOKED_AT = 16  # images of a source whose contents are compared before a run
MOST_NUMBERS = 2**26  # of a feature; the largest encoder here makes half a million
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(bfloat16)}
AGAIN = "`mmjax data features` with the same folder adds what is missing"


# ---- what images are called ----


def folder_of(source: Source) -> str:
    """The folder below which a source's images lie, absolute."""
    if source.root is not None:
        return _absolute(source.root)
    if epath.Path(source.path).is_dir():
        return _absolute(source.path)
    return os.path.dirname(source.path) if "://" in source.path else image_root(Path(source.path), None)


def _absolute(path: str) -> str:
    return path.rstrip("/") if "://" in path else os.path.abspath(path)


@dataclasses.dataclass(frozen=True)
class ImageNames:
    """What images are called: a folder's number and their path from there, such as `0/image/1.jpg`, `0/00.tar, 9321
    bytes at 512` and, of a folder that holds them in itself, `0, example 3`; their whole path if they are in none.

    folders: absolute, with their numbers
    """

    folders: Mapping[str, int]

    def __call__(self, image: Any) -> str:
        """image: as in `Record`; None: the image of zeros that stands for one where a model needs it"""
        if image is None:
            return ""
        path = _absolute(str(image))
        within = [folder for folder in self.folders if path.startswith((folder + "/", folder + ", "))]
        if not within:
            return path
        folder = max(within, key=len)
        return f"{self.folders[folder]}{path[len(folder):]}"


def key(name: str) -> np.ndarray:
    """uint64[2]: a hash of an image's name."""
    return np.frombuffer(hashlib.blake2b(os.fsencode(name), digest_size=16).digest(), "<u8")


def content_hash(content: bytes) -> int:
    """Of an image's bytes, in 64 bits."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def crop_random(seed: int, name: str, crop: int) -> np.random.Generator:
    """What draws one of an image's crops."""
    return np.random.default_rng([seed, *map(int, key(name)), crop])


@dataclasses.dataclass(frozen=True)
class Held:
    """An image's bytes, under the name that errors give it; `mmjax.data.images` reads it.

    image: as in `Record`
    """

    image: Any
    content: bytes

    @staticmethod
    def of(image: Any) -> "Held":
        """A path's or an archive member's. Raises ValueError or OSError if it cannot be read."""
        if hasattr(image, "read"):
            return Held(image, image.read())
        if not Path(image).is_file():  # neither a folder nor a pipe that would be waited for
            raise ValueError(files.url_problem(image) or f"No image at {image}.")
        return Held(image, Path(image).read_bytes())

    def read(self) -> bytes:
        return self.content

    def __str__(self) -> str:
        return str(self.image)


# ---- what a folder holds ----


@dataclasses.dataclass(frozen=True)
class Card:
    """What the features of a folder are: its `features.json`.

    encoder:   what made them; see `mmjax.training.encode_features.encoder`
    transform: how images were cut and scaled for it; see `mmjax.training.encode_features.transform`
    crops:     features of an image, K
    seed:      of the crops, where they are random
    dtype:     of the stored numbers, "float32" or "bfloat16"
    shape:     of a feature
    folders:   those of the sources, by their numbers
    """

    encoder: dict[str, Any]
    transform: dict[str, Any]
    crops: int
    seed: int
    dtype: str
    shape: tuple[int, ...]
    folders: tuple[str, ...] = ()

    @staticmethod
    def read(folder: Path) -> "Card":
        """Raises FileNotFoundError, or ValueError naming what is wrong with the file."""
        path = folder / "features.json"
        if not path.is_file():
            raise FileNotFoundError(f"There are no features at {folder}. Make them with `mmjax data features --config "
                                    f"FILE --out {folder}`.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError(f"it is not of format {FORMAT}, which this mmjax reads")
            card = Card(**content)
            card._check()
            return dataclasses.replace(card, shape=tuple(card.shape), folders=tuple(card.folders))
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path} cannot be used: {error}. Delete {folder} and make the features again.") from error

    def _check(self) -> None:
        """Raises ValueError for values, as JSON gives them, that no writer puts there."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {shown(self.dtype)}, not {' or '.join(DTYPES)}")
        for name in ("encoder", "transform"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} is {shown(getattr(self, name))}, not an object")
        for name, least in (("crops", 1), ("seed", 0)):
            if not _whole(getattr(self, name), least):
                raise ValueError(f"{name} is {shown(getattr(self, name))}, not a whole number from {least} on")
        if not isinstance(self.shape, list) or not all(_whole(side, 1) for side in self.shape):
            raise ValueError(f"shape is {shown(self.shape)}, not a list of whole numbers from 1 on")
        if math.prod(self.shape) > MOST_NUMBERS:
            raise ValueError(f"shape is {shown(self.shape)}; a feature has at most {MOST_NUMBERS:,} numbers")
        if not isinstance(self.folders, (list, tuple)) or not all(isinstance(folder, str) for folder in self.folders):
            raise ValueError(f"folders is {shown(self.folders)}, not a list of names")

    def write(self, folder: Path) -> None:
        files.replace(folder / "features.json",
                      json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=1) + "\n")

    @property
    def nbytes(self) -> int:
        """Of one feature."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def fingerprint(values: Mapping[str, Any]) -> str:
    """A short hash of nested values."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two nested dicts, one line each: `path: stored -> wanted`."""
    before, now = trees.flatten(stored), trees.flatten(wanted)
    return [f"{path.replace('/', '.')}: {before.get(path)!r} -> {now.get(path)!r}"
            for path in sorted(before.keys() | now.keys()) if before.get(path) != now.get(path)]


def check(folder: Path, card: Card, encoder: Mapping[str, Any], transform: Mapping[str, Any]) -> None:
    """Raises ValueError naming both fingerprints, and what differs, unless these made the features of a folder."""
    plain = json.loads(json.dumps({"encoder": encoder, "transform": transform}))
    stored = {"encoder": card.encoder, "transform": card.transform}
    if lines := differences(stored, plain):
        pairs = ", ".join(f"{name} {fingerprint(stored[name])} -> {fingerprint(plain[name])}" for name in plain)
        raise ValueError(f"{folder} holds features that another encoder or transform made ({pairs}):\n  "
                         + "\n  ".join(lines) + "\nMake this run's with `mmjax data features` in another folder.")


class FeatureIndex:
    """Where images are, by their keys. columns: uint64[4,N] as in index.npy."""

    def __init__(self, columns: np.ndarray):
        self.first, self.second, self.contents, self.places = map(np.asarray, columns)

    @staticmethod
    def of(shards: Mapping[int, np.ndarray]) -> np.ndarray:
        """uint64[4,N]: the columns of shards' uint64[3,n], by the shards' numbers."""
        columns = [np.concatenate([keys, [(number << 32) + np.arange(keys.shape[1], dtype=np.uint64)]])
                   for number, keys in shards.items()]
        joined = np.concatenate([np.zeros((4, 0), np.uint64), *columns], axis=1).astype(np.uint64)
        return joined[:, np.lexsort((joined[1], joined[0]))]

    def __len__(self) -> int:
        return len(self.first)

    def find(self, name: str) -> int | None:
        """The column of an image."""
        first, second = key(name)
        for column in range(int(np.searchsorted(self.first, first)), len(self)):
            if self.first[column] != first:
                break
            if self.second[column] == second:
                return column
        return None


# ---- whose images these are ----


def numbers(card: Card, index: FeatureIndex, sources: Sequence[Source], records: Sequence[Sequence[Record]],
            at: Path) -> dict[str, int]:
    """The numbers that the card has for the folders of these sources, without those that it has none for.

    A folder that is not on the card has the number of one that is, and whose images are in it now. That the contents
    of some images show. at: where the features are

    Raises ValueError naming an image if those of a folder on the card have become others.
    """
    folders = [folder_of(source) for source in sources]
    found = {folder: number for number, folder in enumerate(card.folders) if folder in folders}
    for folder, its in zip(folders, records, strict=True):
        shown = _some(its)
        if folder in found:
            _, others = _compared(index, folder, found[folder], shown)
            if others:
                raise ValueError(f"{others[0]} is another image than the one of which {at} holds a feature. Delete "
                                 f"{at} and make the features again with `mmjax data features`.")
            continue
        for number in sorted(set(range(len(card.folders))) - set(found.values())):
            same, others = _compared(index, folder, number, shown)
            if same and not others:
                found[folder] = number
                break
    return found


def _compared(index: FeatureIndex, folder: str, number: int, shown: Sequence[Held]) -> tuple[list[Held], list[Held]]:
    """Of the images that are known by their names in a folder of that number those that are as they were, and those
    that are others."""
    names, same, others = ImageNames({folder: number}), [], []
    for held in shown:
        column = index.find(names(held.image))
        if column is not None:
            (same if content_hash(held.content) == index.contents[column] else others).append(held)
    return same, others


def _some(records: Sequence[Record]) -> list[Held]:
    """Images of some records, spread over all of them, that can be read."""
    found = []
    for number in sorted({step * len(records) // LOOKED_AT for step in range(LOOKED_AT)}) if records else ():
        try:
            record = records[number]
            if record.image is not None and record.problem is None:
                found.append(Held.of(record.image))
        except (ValueError, OSError):
            continue
    return found


# ---- writing ----


class Writer:
    """Adds features to a folder, new or not. As a context it ends with a whole index, unless something was raised.

    What was stored before stays, also of a run that was killed, but for a shard that it had not finished.

    Raises ValueError if the folder holds other features than `card` says, BlockingIOError if another process is adding
    to it.
    """

    def __init__(self, folder: Path, card: Card):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "features.json").exists():
            card = _the_same(folder, card)
        self.card, self._alone = card, contextlib.ExitStack()
        self._alone.enter_context(files.exclusive_lock(folder))
        card.write(folder)
        for path in folder.glob("*.partial"):
            path.unlink()
        self._shards = {}
        for path in sorted(folder.glob("[0-9]*.npy")):
            records = path.with_suffix(".array_record")
            try:
                keys = _columns(path, 3)
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}). Delete it and {records.name}; {AGAIN}.") from error
            if _records(records) == keys.shape[1] * card.crops:
                self._shards[int(path.stem)] = keys
            else:  # cut off, or gone
                path.unlink()
                records.unlink(missing_ok=True)
        self.index = FeatureIndex(FeatureIndex.of(self._shards))
        self._writer, self._keys = None, []

    @property
    def keys(self) -> np.ndarray:
        """uint64[N,2]: of the images that are stored."""
        return np.stack([self.index.first, self.index.second], axis=1)

    def names(self, sources: Sequence[Source], records: Sequence[Sequence[Record]]) -> ImageNames:
        """The names of these sources' images; folders that are new are put on the card."""
        found = numbers(self.card, self.index, sources, records, self.folder)
        for folder in map(folder_of, sources):
            if folder not in found:
                found[folder] = len(self.card.folders)
                self.card = dataclasses.replace(self.card, folders=(*self.card.folders, folder))
        self.card.write(self.folder)
        return ImageNames(found)

    def add(self, key: np.ndarray, content: int, features: np.ndarray) -> None:
        """Of one image: its key, the hash of its content, and its features [K,...]."""
        from array_record.python.array_record_module import ArrayRecordWriter

        stored = np.ascontiguousarray(features, DTYPES[self.card.dtype])
        if stored.shape != (self.card.crops, *self.card.shape):
            raise ValueError(f"Features of an image must be {[self.card.crops, *self.card.shape]}, got "
                             f"{list(stored.shape)}.")
        if self._writer is None:
            self._number = max(self._shards, default=-1) + 1
            path = _partial(self.folder / f"{self._number:05}.array_record")
            self._writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        with _writing(self.folder):
            for feature in stored:
                self._writer.write(feature.tobytes())
        self._keys.append((*key, content))
        if len(self._keys) == SHARD:
            self._close()

    def _close(self) -> None:
        """Ends the shard."""
        if self._writer is None:
            return
        with _writing(self.folder):
            self._writer.close()
        path = self.folder / f"{self._number:05}.array_record"
        _done(_partial(path), path)
        keys = np.array(self._keys, np.uint64).reshape(-1, 3).T
        _put_array(path.with_suffix(".npy"), keys)
        self._shards[self._number] = keys
        self._writer, self._keys = None, []

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._close()
        if kind is None:
            columns = FeatureIndex.of(self._shards)
            _put_array(self.folder / "index.npy", columns)
            self.index = FeatureIndex(columns)
        self._alone.close()


def _the_same(folder: Path, card: Card) -> Card:
    """The card of a folder; raises ValueError if it holds other features than `card` says."""
    stored = Card.read(folder)
    check(folder, stored, card.encoder, card.transform)
    ours, theirs = (dataclasses.replace(each, encoder={}, transform={}, folders=()) for each in (card, stored))
    if lines := differences(dataclasses.asdict(theirs), dataclasses.asdict(ours)):
        raise ValueError(f"{folder} holds other features of these images:\n  " + "\n  ".join(lines)
                         + "\nName another folder.")
    return stored


def missing(stored: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Numbers, in order, of the wanted keys uint64[n,2] that are not stored, each key's first one alone."""
    keys = np.concatenate([stored, wanted])
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: the same keys stay in order
    ordered = keys[order]
    first = np.ones(len(keys), bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(1)
    found = order[first]
    return np.sort(found[found >= len(stored)]) - len(stored)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raises OSError in place of what array_record raises, also for a full disk."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"Features cannot be written to {folder}: {error}. What is finished stays; {AGAIN}.") from error


def _put_array(path: Path, array: np.ndarray) -> None:
    partial = _partial(path)
    with partial.open("wb") as file:
        np.save(file, array)
    _done(partial, path)


def _partial(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(path.name + ".partial")


def _done(partial: Path, path: Path) -> None:
    files.sync(partial)
    partial.replace(path)
    files.sync(path.parent)


# ---- reading ----


def _reader(path: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    options = "readahead_buffer_size:0,max_parallelism:0"  # as array_record advises for reading here and there
    return ArrayRecordReader(str(path), options, file_reader_buffer_size=1 << 15)


def _columns(path: Path, count: int, mmap: bool = False) -> np.ndarray:
    """uint64[count,n] of an index, or of a shard. Raises ValueError saying what else the file is."""
    columns = read_npy(path, mmap)
    if columns.dtype != np.uint64 or columns.ndim != 2 or len(columns) != count:
        raise ValueError(f"it must hold uint64[{count},n], but holds {columns.dtype}{list(columns.shape)}")
    return columns


def _records(path: Path) -> int:
    """How many records a shard has; 0 if it is cut off or not there."""
    return _reader(path).num_records() if path.is_file() else 0


class Features:
    """The features of a folder. Threads may share it, other processes are sent no more than where it is.

    names: what images are called; see `of`

    Raises FileNotFoundError or ValueError naming what is missing or wrong.
    """

    def __init__(self, folder: str | Path, names: ImageNames | None = None):
        self.folder = Path(folder)
        self.names = names or ImageNames({})
        self.card = Card.read(self.folder)
        self.dtype = DTYPES[self.card.dtype]
        index = self.folder / "index.npy"
        if not index.is_file():
            raise ValueError(f"The features of {folder} were not all made: {AGAIN}.")
        try:
            self.index = FeatureIndex(_columns(index, 4, mmap=True))
        except ValueError as error:
            raise ValueError(f"{index} is damaged ({error}). Delete it; {AGAIN}.") from error
        self._open = functools.lru_cache(maxsize=OPEN)(self._opened)

    def __reduce__(self) -> tuple[Any, ...]:
        return Features, (self.folder, self.names)

    def of(self, sources: Sequence[Source], records: Sequence[Sequence[Record]]) -> "Features":
        """The same for images of these sources, wherever they lie now. Looks at the contents of some of each.

        Raises ValueError naming a source whose images are others, or an image of them that is missing.
        """
        found = Features(self.folder, ImageNames(numbers(self.card, self.index, sources, records, self.folder)))
        for source, its in zip(sources, records, strict=True):
            found._check_some(source, its)
        return found

    def _check_some(self, source: Source, records: Sequence[Record]) -> None:
        shown = _some(records)
        absent = [held for held in shown if self.index.find(self.names(held.image)) is None]
        absent = [held for held in absent if _is_image(held)]  # of others there can be no features
        if absent:
            raise ValueError(f"{len(absent)} of {len(shown)} images of {source.path} that were looked at are not in "
                             f"{self.folder}, such as {absent[0]}. It has features of images of "
                             f"{', '.join(self.card.folders)}; {AGAIN}.")

    def find(self, image: Any, crop: int = 0) -> np.ndarray:
        """The feature of an image, or of one of its crops.

        image: as in `Record`; None: the image of zeros

        Raises ValueError naming an image that has none, or the file that is damaged.
        """
        column = self.index.find(self.names(image))
        if column is None:
            raise ValueError(f"{'The image of zeros' if image is None else image} has no feature in {self.folder}: "
                             f"it could not be read (features_errors.jsonl there says why), or it is new. {AGAIN}.")
        shard, number = divmod(int(self.index.places[column]), 1 << 32)
        return self._read(shard, number * self.card.crops + crop)

    def _read(self, shard: int, number: int) -> np.ndarray:
        try:
            (content,) = self._open(shard).read([number])
            return np.frombuffer(content, self.dtype).reshape(self.card.shape)
        except (RuntimeError, IndexError, ValueError) as error:
            path = self.folder / f"{shard:05}.array_record"
            raise ValueError(f"{path} is damaged ({error}). Delete it; {AGAIN}.") from error

    def _opened(self, shard: int) -> Any:
        return _reader(self.folder / f"{shard:05}.array_record")

    # ---- as a collator's images ----

    @functools.cached_property
    def blank(self) -> np.ndarray:
        """Zeros, for the places of images that no word refers to."""
        return np.zeros(self.card.shape, self.dtype)

    @functools.cached_property
    def nothing(self) -> np.ndarray:
        """The feature of the image of zeros."""
        return self.find(None)

    def feature_of(self, image: Any, random: np.random.Generator | None) -> np.ndarray:
        """The feature of an image; of one of its crops, where one is drawn. Raises ValueError as `find` does."""
        return self.find(image, 0 if random is None else int(random.integers(self.card.crops)))

    def stack(self, rows: Sequence[Sequence[Sample]], placed: bool, most: int | None = None) -> np.ndarray | None:
        """`Batch.media["feature"]` of rows of samples whose images are features.

        placed: images take places among the words: [B,F,...] with blank ones behind a row's own, None if there are
                no images at all. Otherwise [B,...], one a row: of text alone that of the image of zeros
        most:   F; None for the longest row's number of images
        """
        found = [[image for sample in row for image in sample.images] for row in rows]
        if not placed:
            if many := [row for row, its in enumerate(found) if len(its) > 1]:
                raise ValueError(f"Rows {many} have more than one image, but this model reads one a row.")
            return np.stack([its[0] if its else self.nothing for its in found])
        most = max(map(len, found)) if most is None else most
        if not most:
            return None
        return np.stack([np.stack(its + [self.blank] * (most - len(its))) for its in found])


def _is_image(held: Held) -> bool:
    try:
        images.rgb(held)
    except ValueError:
        return False
    return True
