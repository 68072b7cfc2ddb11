"""Where the samples of tars are, kept on disk: the headers of all of LAION take two hours to read, which is done once.

One file a tar, in the user's cache folder; the environment variable MMJAX_TAR_INDEX names another one (on a disk that
several hosts share), or says "off". What is found there is believed only if it was made of the tar as it is now.
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

VARIABLE = "MMJAX_TAR_INDEX"
OFF = "off"
FORMAT = 1  # of the files; others are made anew
DIGEST = 32  # bytes in front of a file's content


class TarIndex(NamedTuple):
    """Where the N samples of a tar are.

    keys:     bytes[N]
    places:   int64[N,5]: offset and size of the image and of the caption, and whether that is JSON
    problems: of the samples by number that cannot be used
    """

    keys: np.ndarray
    places: np.ndarray
    problems: dict[int, str]


def folder() -> Path | None:
    """Where indices are kept: as the variable says, or the user's cache folder; None for nowhere, also where that
    cannot be written.

    Raises ValueError if the folder that the variable names cannot be written.
    """
    told = os.environ.get(VARIABLE)
    if told == OFF:
        return None
    files.require_local({VARIABLE: told})
    place = Path(told or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmjax" / "tars")
    try:
        place.expanduser().mkdir(parents=True, exist_ok=True)
        if os.access(place.expanduser(), os.W_OK):
            return place.expanduser()
        problem = "it is read-only"
    except OSError as error:
        problem = str(error)
    if told:
        raise ValueError(f"{VARIABLE} = {told}: this folder cannot be written ({problem}). Name another one, or say "
                         f"{OFF!r}.")
    return None


def kept(file: str, place: Path | None, read: Callable[[str], TarIndex]) -> TarIndex:
    """The index of a tar, from the folder `place` if the tar is as it was then; otherwise `read`, and put there.

    Several processes may do so at once. An index that is damaged is read anew, which is said. Raises what `read` does.
    """
    made_of = None if place is None else stamp(file)
    if place is None or made_of is None:
        return read(file)
    path = place / f"{hashlib.sha256(_absolute(file).encode(errors='surrogateescape')).hexdigest()[:40]}.index"
    try:
        found = _parse(path.read_bytes(), made_of)
    except FileNotFoundError:
        found = None
    except (ValueError, OSError) as error:
        _say(f"The index {path} is damaged ({error}), so the headers of {file} are read again.")
        found = None
    if found is None:
        found = read(file)
        if stamp(file) == made_of:  # nobody wrote into it meanwhile
            _write(path, _content(found, made_of))
    return found


def stamp(file: str) -> tuple[int, int] | None:
    """A file's size and the time of its last change, in nanoseconds; None where the file system knows no such time.

    Raises FileNotFoundError.
    """
    if "://" not in file:
        found = os.stat(file)
        return found.st_size, found.st_mtime_ns
    found = epath.Path(file).stat()
    return (found.length, found.mtime * 10**9) if found.mtime else None


def _absolute(file: str) -> str:
    return file if "://" in file else os.path.abspath(file)


def _content(index: TarIndex, made_of: tuple[int, int]) -> bytes:
    """A digest, then the index and what it was made of."""
    problems = json.dumps({str(place): problem for place, problem in index.problems.items()})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, made_of=np.array([FORMAT, *made_of]), keys=index.keys, places=index.places,
                        problems=np.frombuffer(problems.encode(), np.uint8))
    content = buffer.getvalue()
    return hashlib.sha256(content).digest() + content


def _parse(content: bytes, made_of: tuple[int, int]) -> TarIndex | None:
    """None if it was made of something else. Raises ValueError if it is damaged, or points outside of its tar."""
    digest, content = content[:DIGEST], content[DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("its checksum is another")
    try:
        arrays = read_npz(io.BytesIO(content), DEFLATED)  # keys of one length: many zeros
        if arrays["made_of"].tolist() != [FORMAT, *made_of]:
            return None
        keys, places = arrays["keys"], arrays["places"]
        problems = {int(place): str(problem) for place, problem in json.loads(arrays["problems"].tobytes()).items()}
    except Exception as error:  # another program may have written anything
        raise ValueError(f"it cannot be read: {error!r}") from error
    _check(keys, places, problems, made_of[0])
    return TarIndex(keys, places, problems)


def _check(keys: np.ndarray, places: np.ndarray, problems: dict[int, str], size: int) -> None:
    if keys.ndim != 1 or keys.dtype.kind != "S" or places.dtype != np.int64 or places.shape != (len(keys), 5):
        raise ValueError(f"it holds {keys.dtype}{list(keys.shape)} and {places.dtype}{list(places.shape)}")
    starts, sizes, is_json = places[:, 0:4:2], places[:, 1:4:2], places[:, 4]
    inside = (starts >= 0) & (sizes >= 0) & (starts <= size) & (sizes <= size - starts)
    if not inside.all() or not ((is_json == 0) | (is_json == 1)).all() or problems.keys() - set(range(len(keys))):
        raise ValueError("it points outside of the tar")


def _write(path: Path, content: bytes) -> None:
    """At once or not at all; where it cannot be written, that is said."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        _say(f"The headers of the tars will be read again by the next run: their index cannot be kept in {path.parent} "
             f"({error.strerror}).")


@functools.cache
def _say(message: str) -> None:
    """Once, whatever the number of tars that it holds for."""
    Console(stderr=True).print(message, markup=False, highlight=False)
