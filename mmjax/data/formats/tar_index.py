"""Cached indices of the samples in tars: reading the headers of all of LAION takes two hours, which is done once.

There is one file for each tar, in the user's cache folder; the environment variable MMJAX_TAR_INDEX names another
folder (on a disk that several hosts share), or is "off". An index is used only if the tar has not changed.
"""

import functools
import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath
from rich.console import Console

from mmjax import files
from mmjax.data.arrays import DEFLATED, read_npz
from mmjax.data.formats.account import Items

VARIABLE = "MMJAX_TAR_INDEX"
OFF = "off"
FORMAT = 2  # of the files; those of other formats are made again
DIGEST = 32  # bytes of the digest at the start of a file


class TarIndex(NamedTuple):
    """The positions of the N samples in a tar.

    keys:     bytes[N]
    places:   int64[N,5]: offset and size of the image and of the caption, and whether the caption is JSON
    problems: of the samples that cannot be used, by index
    members:  number of samples and of other members
    left:     members that are in no sample, by reason
    odd:      what looks odd, by what it is
    """

    keys: np.ndarray
    places: np.ndarray
    problems: dict[int, str]
    members: int = 0
    left: dict[str, Items] = {}
    odd: dict[str, Items] = {}

    @property
    def digest(self) -> str:
        """A digest of the names and positions of the samples, which is that of the tar's headers."""
        return hashlib.sha256(self.keys.tobytes() + self.places.tobytes()).hexdigest()


def folder() -> Path | None:
    """Returns the folder of the indices: that of the variable, or the user's cache folder; None if it is off or the
    cache folder cannot be written.

    Raises ValueError if the folder that the variable names cannot be written.
    """
    value = os.environ.get(VARIABLE)
    if value == OFF:
        return None
    files.require_local({VARIABLE: value})
    path = Path(value or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmjax" / "tars")
    try:
        path.expanduser().mkdir(parents=True, exist_ok=True)
        if os.access(path.expanduser(), os.W_OK):
            return path.expanduser()
        problem = "it is read-only"
    except OSError as error:
        problem = str(error)
    if value:
        raise ValueError(f"{VARIABLE} = {value}: this folder cannot be written ({problem}). Name another one, or say "
                         f"{OFF!r}.")
    return None


def cached(file: str, cache: Path | None, read: Callable[[str], TarIndex]) -> TarIndex:
    """Returns the index of a tar from the folder `cache`; if it is missing or outdated, from `read`, and stores it.

    Several processes may do so at once. A damaged index is made again, with a message. Raises the errors of `read`.
    """
    made_of = None if cache is None else stamp(file)
    if cache is None or made_of is None:
        return read(file)
    path = cache / f"{hashlib.sha256(_absolute(file).encode(errors='surrogateescape')).hexdigest()[:40]}.index"
    try:
        result = _parse(path.read_bytes(), made_of)
    except FileNotFoundError:
        result = None
    except (ValueError, OSError) as error:
        _say(f"The index {path} is damaged ({error}), so the headers of {file} are read again.")
        result = None
    if result is None:
        result = read(file)
        if stamp(file) == made_of:  # not changed meanwhile
            _write(path, _content(result, made_of))
    return result


def stamp(file: str) -> tuple[int, int] | None:
    """Returns a file's size and modification time in nanoseconds; None if the file system has no such time.

    Raises FileNotFoundError.
    """
    if "://" not in file:
        stat = os.stat(file)
        return stat.st_size, stat.st_mtime_ns
    stat = epath.Path(file).stat()
    return (stat.length, stat.mtime * 10**9) if stat.mtime else None


def describe_stamp(file: str) -> str:
    """Returns a file's size and time of its last change as text. Raises FileNotFoundError."""
    made_of = stamp(file)
    if made_of is None:
        return "no time"
    size, changed = made_of
    return f"{size} bytes of {changed / 1e9:.3f}"


def _absolute(file: str) -> str:
    return file if "://" in file else os.path.abspath(file)


def _content(index: TarIndex, made_of: tuple[int, int]) -> bytes:
    """Returns the bytes of a file: a digest, then the index and the stamp of its tar."""
    groups = [{reason: [items.count, items.names] for reason, items in group.items()}
              for group in (index.left, index.odd)]
    problems = json.dumps([{str(place): problem for place, problem in index.problems.items()}, index.members, *groups])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, made_of=np.array([FORMAT, *made_of]), keys=index.keys, places=index.places,
                        problems=np.frombuffer(problems.encode(), np.uint8))
    content = buffer.getvalue()
    return hashlib.sha256(content).digest() + content


def _parse(content: bytes, made_of: tuple[int, int]) -> TarIndex | None:
    """Returns the index in a file; None if its tar has changed. Raises ValueError if it is damaged or inconsistent."""
    digest, content = content[:DIGEST], content[DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("its checksum is wrong")
    try:
        arrays = read_npz(io.BytesIO(content), DEFLATED)  # keys of one length: many zeros
        if arrays["made_of"].tolist() != [FORMAT, *made_of]:
            return None
        keys, places = arrays["keys"], arrays["places"]
        stored, members, *groups = files.parse_json(arrays["problems"].tobytes())
        problems = {int(place): str(problem) for place, problem in stored.items()}
        left, odd = ({str(reason): Items(int(count), list(map(str, names))) for reason, (count, names) in group.items()}
                     for group in groups)
    except Exception as error:  # the content is not trusted
        raise ValueError(f"it cannot be read: {error!r}") from error
    _check(keys, places, problems, made_of[0])
    return TarIndex(keys, places, problems, int(members), left, odd)


def _check(keys: np.ndarray, places: np.ndarray, problems: dict[int, str], size: int) -> None:
    if keys.ndim != 1 or keys.dtype.kind != "S" or places.dtype != np.int64 or places.shape != (len(keys), 5):
        raise ValueError(f"it holds {keys.dtype}{list(keys.shape)} and {places.dtype}{list(places.shape)}")
    starts, sizes, is_json = places[:, 0:4:2], places[:, 1:4:2], places[:, 4]
    inside = (starts >= 0) & (sizes >= 0) & (starts <= size) & (sizes <= size - starts)
    if not inside.all() or not ((is_json == 0) | (is_json == 1)).all() or problems.keys() - set(range(len(keys))):
        raise ValueError("it points outside of the tar")


def _write(path: Path, content: bytes) -> None:
    """Writes a file atomically; prints a message if that fails."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        _say(f"The headers of the tars will be read again by the next run: their index cannot be stored in "
             f"{path.parent} ({error.strerror}).")


@functools.cache
def _say(message: str) -> None:
    """Prints a message once, for any number of tars."""
    Console(stderr=True, markup=False).print(message, highlight=False)
