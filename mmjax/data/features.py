"""Features on disk: the frozen encoder's output for every image, so that training does not run the encoder.

N images in total, n in a shard   K crops of each

    FOLDER/features.json           the description of the features (`Card`)
    FOLDER/NNNNN.array_record      a shard: the K features of its first image, of its second, ...; raw bytes
    FOLDER/NNNNN.npy               uint64[3,n]: the keys and content hashes of its images. Written last: a shard
                                   without it is incomplete and is written again
    FOLDER/index.npy               uint64[4,N]: the same for all shards, sorted by key, and the index of each image.
                                   Without it the features are incomplete
    FOLDER/features_errors.jsonl   the images that could not be read; see `mmjax.training.encode_features`

An image is identified by its path relative to its source's folder, so the data can be moved. Its key is a 128-bit hash
of that path. `Features.of` compares the content hashes of some images to check that they are the same.
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
OPEN = 64  # maximum number of open shards
LOOKED_AT = 16  # images of a source whose contents are compared before a run
MOST_NUMBERS = 2**26  # maximum size of a feature; that of the largest encoder is half a million
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(bfloat16)}
AGAIN = "`mmjax data features` with the same folder adds what is missing"


# ---- names of images ----


def folder_of(source: Source) -> str:
    """Returns the absolute path of the folder of a source's images."""
    if source.root is not None:
        return _absolute(source.root)
    if epath.Path(source.path).is_dir():
        return _absolute(source.path)
    return os.path.dirname(source.path) if "://" in source.path else image_root(Path(source.path), None)


def _absolute(path: str) -> str:
    return path.rstrip("/") if "://" in path else os.path.abspath(path)


@dataclasses.dataclass(frozen=True)
class ImageNames:
    """Maps images to names: a folder's number and the relative path, such as `0/image/1.jpg`, `0/00.tar, 9321 bytes at
    512` or, for a data set with embedded images, `0, example 3`; the whole path if an image is in none of the folders.

    folders: numbers of the folders by absolute path
    """

    folders: Mapping[str, int]

    def __call__(self, image: Any) -> str:
        """image: as in `Record`; None for the image of zeros that replaces a missing one"""
        if image is None:
            return ""
        path = _absolute(str(image))
        within = [folder for folder in self.folders if path.startswith((folder + "/", folder + ", "))]
        if not within:
            return path
        folder = max(within, key=len)
        return f"{self.folders[folder]}{path[len(folder):]}"


def key(name: str) -> np.ndarray:
    """Returns uint64[2]: a hash of an image's name."""
    return np.frombuffer(hashlib.blake2b(os.fsencode(name), digest_size=16).digest(), "<u8")


def content_hash(content: bytes) -> int:
    """Returns a 64-bit hash of an image's bytes."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def crop_random(seed: int, name: str, crop: int) -> np.random.Generator:
    """Returns the random generator of one of an image's crops."""
    return np.random.default_rng([seed, *map(int, key(name)), crop])


@dataclasses.dataclass(frozen=True)
class ImageBytes:
    """An image's bytes and the name used in errors; `mmjax.data.images` can read it.

    image: as in `Record`
    """

    image: Any
    content: bytes

    @staticmethod
    def of(image: Any) -> "ImageBytes":
        """Reads a path or a member of an archive. Raises ValueError or OSError if that fails."""
        if hasattr(image, "read"):
            return ImageBytes(image, image.read())
        if not Path(image).is_file():  # neither a folder nor a pipe, which would block
            raise ValueError(files.url_problem(image) or images.no_image(image))
        return ImageBytes(image, Path(image).read_bytes())

    def read(self) -> bytes:
        return self.content

    def __str__(self) -> str:
        return str(self.image)


# ---- the contents of a folder ----


@dataclasses.dataclass(frozen=True)
class Card:
    """The description of the features in a folder: its `features.json`.

    encoder:   the encoder; see `mmjax.training.encode_features.encoder`
    transform: cropping and scaling of its images; see `mmjax.training.encode_features.transform`
    crops:     number of features of an image, K
    seed:      of random crops
    dtype:     of the stored numbers, "float32" or "bfloat16"
    shape:     of a feature
    folders:   folders of the sources; their index is their number
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
        """Reads the card in a folder. Raises FileNotFoundError, or ValueError naming the file and the problem."""
        path = folder / "features.json"
        if not path.is_file():
            raise FileNotFoundError(f"There are no features at {folder}. Make them with `mmjax data features --config "
                                    f"FILE --out {folder}`.")
        try:
            content = files.read_json_object(path)
            if content.pop("format", None) != FORMAT:
                raise ValueError(f"it is not of format {FORMAT}, which this mmjax reads")
            card = Card(**content)
            card._check()
            return dataclasses.replace(card, shape=tuple(card.shape), folders=tuple(card.folders))
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path} cannot be used: {error}. Delete {folder} and make the features again.") from error

    def _check(self) -> None:
        """Raises ValueError for values, as read from JSON, that are not valid."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {shown(self.dtype)}, not {' or '.join(DTYPES)}")
        for name in ("encoder", "transform"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} is {shown(getattr(self, name))}, not an object")
        for name, least in (("crops", 1), ("seed", 0)):
            if not _is_integer(getattr(self, name), least):
                raise ValueError(f"{name} is {shown(getattr(self, name))}, not an integer of {least} or more")
        if not isinstance(self.shape, list) or not all(_is_integer(side, 1) for side in self.shape):
            raise ValueError(f"shape is {shown(self.shape)}, not a list of positive integers")
        if math.prod(self.shape) > MOST_NUMBERS:
            raise ValueError(f"shape is {shown(self.shape)}; a feature has at most {MOST_NUMBERS:,} numbers")
        if not isinstance(self.folders, (list, tuple)) or not all(isinstance(folder, str) for folder in self.folders):
            raise ValueError(f"folders is {shown(self.folders)}, not a list of names")

    def write(self, folder: Path) -> None:
        files.replace(folder / "features.json",
                      json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=1) + "\n")

    @property
    def nbytes(self) -> int:
        """The size of a feature in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def fingerprint(values: Mapping[str, Any]) -> str:
    """Returns a short hash of nested values."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Returns a line for each difference between two nested dicts: `path: stored -> wanted`."""
    old, new = trees.flatten(stored), trees.flatten(wanted)
    return [f"{path.replace('/', '.')}: {old.get(path)!r} -> {new.get(path)!r}"
            for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path)]


def check(folder: Path, card: Card, encoder: Mapping[str, Any], transform: Mapping[str, Any]) -> None:
    """Raises ValueError naming both fingerprints and the differences, unless these made the features of a folder."""
    plain = json.loads(json.dumps({"encoder": encoder, "transform": transform}))
    stored = {"encoder": card.encoder, "transform": card.transform}
    if lines := differences(stored, plain):
        pairs = ", ".join(f"{name} {fingerprint(stored[name])} -> {fingerprint(plain[name])}" for name in plain)
        raise ValueError(f"{folder} has features of another encoder or transform ({pairs}):\n  "
                         + "\n  ".join(lines) + "\nMake this run's with `mmjax data features` in another folder.")


class FeatureIndex:
    """Finds images by their keys. columns: uint64[4,N] as in index.npy"""

    def __init__(self, columns: np.ndarray):
        self.first, self.second, self.contents, self.positions = map(np.asarray, columns)

    @staticmethod
    def of(shards: Mapping[int, np.ndarray]) -> np.ndarray:
        """Returns uint64[4,N] for the uint64[3,n] of the shards by number."""
        columns = [np.concatenate([keys, [(number << 32) + np.arange(keys.shape[1], dtype=np.uint64)]])
                   for number, keys in shards.items()]
        joined = np.concatenate([np.zeros((4, 0), np.uint64), *columns], axis=1).astype(np.uint64)
        return joined[:, np.lexsort((joined[1], joined[0]))]

    def __len__(self) -> int:
        return len(self.first)

    def find(self, name: str) -> int | None:
        """Returns the column of an image; None if it has none."""
        first, second = key(name)
        for column in range(int(np.searchsorted(self.first, first)), len(self)):
            if self.first[column] != first:
                break
            if self.second[column] == second:
                return column
        return None


# ---- the folders of images ----


def numbers(card: Card, index: FeatureIndex, sources: Sequence[Source], records: Sequence[Sequence[Record]],
            features: Path) -> dict[str, int]:
    """Returns the numbers on the card of the folders of these sources, without folders that have none.

    A folder that is not on the card has the number of a moved folder on the card whose images it has, according to
    the contents of some images. features: the folder of the features

    Raises ValueError naming an image if images of a folder on the card have changed.
    """
    folders = [folder_of(source) for source in sources]
    result = {folder: number for number, folder in enumerate(card.folders) if folder in folders}
    for folder, folder_records in zip(folders, records, strict=True):
        images = _some_images(folder_records)
        if folder in result:
            _, changed = _compared(index, folder, result[folder], images)
            if changed:
                raise ValueError(f"{changed[0]} has changed since its feature in {features} was made. Delete "
                                 f"{features} and make the features again with `mmjax data features`.")
            continue
        for number in sorted(set(range(len(card.folders))) - set(result.values())):
            same, changed = _compared(index, folder, number, images)
            if same and not changed:
                result[folder] = number
                break
    return result


def _compared(index: FeatureIndex, folder: str, number: int,
              images: Sequence[ImageBytes]) -> tuple[list[ImageBytes], list[ImageBytes]]:
    """Returns (unchanged images, changed images) among those whose names in a folder of that number are stored."""
    names, same, changed = ImageNames({folder: number}), [], []
    for image in images:
        column = index.find(names(image.image))
        if column is not None:
            (same if content_hash(image.content) == index.contents[column] else changed).append(image)
    return same, changed


def _some_images(records: Sequence[Record]) -> list[ImageBytes]:
    """Returns the readable images of some records, evenly spread over all of them."""
    result = []
    for number in sorted({step * len(records) // LOOKED_AT for step in range(LOOKED_AT)}) if records else ():
        try:
            record = records[number]
            if record.image is not None and record.problem is None:
                result.append(ImageBytes.of(record.image))
        except (ValueError, OSError):
            continue
    return result


# ---- writing ----


class Writer:
    """Adds features to a new or existing folder. A context manager, which writes the index unless an error was raised.

    Stored features are kept, also those of a killed process, except for its incomplete shard.

    Raises ValueError if the folder has other features than `card` describes, BlockingIOError if another process is
    adding to it.
    """

    def __init__(self, folder: Path, card: Card):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "features.json").exists():
            card = _existing_card(folder, card)
        self.card, self._lock = card, contextlib.ExitStack()
        self._lock.enter_context(files.exclusive_lock(folder))
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
            if _num_records(records) == keys.shape[1] * card.crops:
                self._shards[int(path.stem)] = keys
            else:  # truncated or missing
                path.unlink()
                records.unlink(missing_ok=True)
        self.index = FeatureIndex(FeatureIndex.of(self._shards))
        self._writer, self._keys = None, []

    @property
    def keys(self) -> np.ndarray:
        """uint64[N,2]: the keys of the stored images."""
        return np.stack([self.index.first, self.index.second], axis=1)

    def names(self, sources: Sequence[Source], records: Sequence[Sequence[Record]]) -> ImageNames:
        """Returns the names of these sources' images, and adds new folders to the card."""
        folder_numbers = numbers(self.card, self.index, sources, records, self.folder)
        for folder in map(folder_of, sources):
            if folder not in folder_numbers:
                folder_numbers[folder] = len(self.card.folders)
                self.card = dataclasses.replace(self.card, folders=(*self.card.folders, folder))
        self.card.write(self.folder)
        return ImageNames(folder_numbers)

    def add(self, key: np.ndarray, content: int, features: np.ndarray) -> None:
        """Adds an image: its key, the hash of its content, and its features [K,...]."""
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
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        with _writing(self.folder):
            self._writer.close()
        path = self.folder / f"{self._number:05}.array_record"
        _complete(_partial(path), path)
        keys = np.array(self._keys, np.uint64).reshape(-1, 3).T
        _put_array(path.with_suffix(".npy"), keys)
        self._shards[self._number] = keys
        self._writer, self._keys = None, []

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._close_shard()
        if kind is None:
            columns = FeatureIndex.of(self._shards)
            _put_array(self.folder / "index.npy", columns)
            self.index = FeatureIndex(columns)
        self._lock.close()


def _existing_card(folder: Path, card: Card) -> Card:
    """Returns the card of a folder; raises ValueError if the folder has other features than `card` describes."""
    stored = Card.read(folder)
    check(folder, stored, card.encoder, card.transform)
    new, old = (dataclasses.replace(each, encoder={}, transform={}, folders=()) for each in (card, stored))
    if lines := differences(dataclasses.asdict(old), dataclasses.asdict(new)):
        raise ValueError(f"{folder} has other features of these images:\n  " + "\n  ".join(lines)
                         + "\nName another folder.")
    return stored


def missing(stored: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the indices, in order, of the wanted keys uint64[n,2] that are not stored, without duplicates."""
    keys = np.concatenate([stored, wanted])
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys keep their order
    ordered = keys[order]
    first = np.ones(len(keys), bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(1)
    unique = order[first]
    return np.sort(unique[unique >= len(stored)]) - len(stored)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raises OSError in place of the RuntimeError of array_record, also for a full disk."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"Features cannot be written to {folder}: {error}. Complete shards are kept; {AGAIN}.") from error


def _put_array(path: Path, array: np.ndarray) -> None:
    partial = _partial(path)
    with partial.open("wb") as file:
        np.save(file, array)
    _complete(partial, path)


def _partial(path: Path) -> Path:
    """Returns the name of a file until it is complete."""
    return path.with_name(path.name + ".partial")


def _complete(partial: Path, path: Path) -> None:
    """Flushes a file to the disk and gives it its name."""
    files.sync(partial)
    partial.replace(path)
    files.sync(path.parent)


# ---- reading ----


def _reader(path: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    options = "readahead_buffer_size:0,max_parallelism:0"  # as array_record recommends for random access
    return ArrayRecordReader(str(path), options, file_reader_buffer_size=1 << 15)


def _columns(path: Path, count: int, mmap: bool = False) -> np.ndarray:
    """Returns uint64[count,n] of an index or a shard. Raises ValueError for a file with other content."""
    columns = read_npy(path, mmap)
    if columns.dtype != np.uint64 or columns.ndim != 2 or len(columns) != count:
        raise ValueError(f"it must hold uint64[{count},n], but holds {columns.dtype}{list(columns.shape)}")
    return columns


def _num_records(path: Path) -> int:
    """Returns the number of records of a shard; 0 if it is truncated or missing."""
    return _reader(path).num_records() if path.is_file() else 0


class Features:
    """Reads the features of a folder. Threads may share it; pickled, it has only the folder and the names.

    names: names of the images; see `of`

    Raises FileNotFoundError or ValueError naming what is missing or wrong.
    """

    def __init__(self, folder: str | Path, names: ImageNames | None = None):
        self.folder = Path(folder)
        self.names = names or ImageNames({})
        self.card = Card.read(self.folder)
        self.dtype = DTYPES[self.card.dtype]
        index = self.folder / "index.npy"
        if not index.is_file():
            raise ValueError(f"The features in {folder} are incomplete: {AGAIN}.")
        try:
            self.index = FeatureIndex(_columns(index, 4, mmap=True))
        except ValueError as error:
            raise ValueError(f"{index} is damaged ({error}). Delete it; {AGAIN}.") from error
        self._open = functools.lru_cache(maxsize=OPEN)(self._open_shard)

    def __reduce__(self) -> tuple[Any, ...]:
        return Features, (self.folder, self.names)

    def of(self, sources: Sequence[Source], records: Sequence[Sequence[Record]]) -> "Features":
        """Returns the features of these sources' images, which may have moved. Compares the contents of some images.

        Raises ValueError naming a source whose images have changed, or an image that is missing.
        """
        result = Features(self.folder, ImageNames(numbers(self.card, self.index, sources, records, self.folder)))
        for source, source_records in zip(sources, records, strict=True):
            result._check_some(source, source_records)
        return result

    def _check_some(self, source: Source, records: Sequence[Record]) -> None:
        tried = _some_images(records)
        absent = [image for image in tried if self.index.find(self.names(image.image)) is None]
        absent = [image for image in absent if _is_image(image)]  # others have no features
        if absent:
            raise ValueError(f"{len(absent)} of {len(tried)} images of {source.path} that were checked are not in "
                             f"{self.folder}, such as {absent[0]}. It has features of images of "
                             f"{', '.join(self.card.folders)}; {AGAIN}.")

    def find(self, image: Any, crop: int = 0) -> np.ndarray:
        """Returns the feature of an image, or of one of its crops.

        image: as in `Record`; None for the image of zeros

        Raises ValueError naming an image without a feature, or a damaged file.
        """
        column = self.index.find(self.names(image))
        if column is None:
            raise ValueError(f"{'The image of zeros' if image is None else image} has no feature in {self.folder}: "
                             f"it could not be read (features_errors.jsonl there says why), or it is new. {AGAIN}.")
        shard, number = divmod(int(self.index.positions[column]), 1 << 32)
        return self._read(shard, number * self.card.crops + crop)

    def _read(self, shard: int, number: int) -> np.ndarray:
        try:
            (content,) = self._open(shard).read([number])
            return np.frombuffer(content, self.dtype).reshape(self.card.shape)
        except (RuntimeError, IndexError, ValueError) as error:
            path = self.folder / f"{shard:05}.array_record"
            raise ValueError(f"{path} is damaged ({error}). Delete it; {AGAIN}.") from error

    def _open_shard(self, shard: int) -> Any:
        return _reader(self.folder / f"{shard:05}.array_record")

    # ---- for a collator ----

    @functools.cached_property
    def blank(self) -> np.ndarray:
        """Zeros, to pad the images of a row; no soft token refers to them."""
        return np.zeros(self.card.shape, self.dtype)

    @functools.cached_property
    def zero_image(self) -> np.ndarray:
        """The feature of the image of zeros."""
        return self.find(None)

    def feature_of(self, image: Any, random: np.random.Generator | None) -> np.ndarray:
        """Returns the feature of an image, with `random` that of a random crop. Raises the errors of `find`."""
        return self.find(image, 0 if random is None else int(random.integers(self.card.crops)))

    def stack(self, rows: Sequence[Sequence[Sample]], in_slots: bool, most: int | None = None) -> np.ndarray | None:
        """Returns `Batch.features` of rows, or groups of rows, of samples whose images are features.

        in_slots: whether images take slots. If so, [G,N,...] padded with blank features, or None without images;
                  if not, [B,...], one a row: for text alone that of the image of zeros
        most:     N; None for the largest number of images in a row
        """
        features = [[image for sample in row for image in sample.images] for row in rows]
        if not in_slots:
            if several := [row for row, images in enumerate(features) if len(images) > 1]:
                raise ValueError(f"Rows {several} have more than one image, but this model reads one a row.")
            return np.stack([images[0] if images else self.zero_image for images in features])
        most = max(map(len, features)) if most is None else most
        if not most:
            return None
        return np.stack([np.stack(images + [self.blank] * (most - len(images))) for images in features])


def _is_image(image: ImageBytes) -> bool:
    try:
        images.rgb(image)
    except ValueError:
        return False
    return True
