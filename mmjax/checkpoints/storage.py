"""Folders of Orbax checkpoints: which path Orbax is given, what it cannot take, and whether it wrote what can be read.

Orbax looks for the parts that it has to merge with `epath.Path.glob`, which takes the name of the folder for a pattern
too: under `exp [1]` it finds nothing, warns, and the checkpoint cannot be read. So every path that a user names goes
to Orbax as a `LocalPath`, and what has been written is read back before anything relies on it.
"""

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import tensorstore as ts
from etils import epath

SCHEMES = ("gs", "s3", "az", "hf")  # etils takes `/gs/...` for `gs://...`, and a folder `gs:` for the beginning of one
ROOM = 200  # bytes of a path that the files inside a checkpoint need
INLINE_BYTES = 1024  # TensorStore keeps what is smaller inside its tables


class LocalPath(type(epath.Path("/"))):
    """A path of etils whose `glob` takes nothing for a pattern but the pattern. What is made from it is one as well."""

    def glob(self, pattern: str) -> Iterator["LocalPath"]:
        return (self / name for name in glob.glob(pattern, root_dir=self))


class NotWritten(OSError):
    """A checkpoint that was just written cannot be read; the message says what is wrong with it."""


def local(folder: str | Path) -> LocalPath:
    """The folder as Orbax and TensorStore can take it: absolute, without links and `..`. Raises ValueError if they
    cannot."""
    if found := problem(folder):
        raise ValueError(found)
    return LocalPath(os.path.realpath(folder))


def problem(folder: str | Path) -> str | None:
    """Why there can be no checkpoint in a folder of that name, and what to do; None if there can."""
    path = os.path.realpath(folder)
    parts, size = path.split("/"), len(os.fsencode(path))
    most, longest = (os.pathconf("/", limit) for limit in ("PC_PATH_MAX", "PC_NAME_MAX"))
    if "\\" in path:
        what = "has a backslash in it"
    elif any("\ud800" <= letter <= "\udfff" for letter in path):
        what = "is not UTF-8"
    elif parts[1] in SCHEMES or {f"{name}:" for name in SCHEMES} & set(parts):
        what = f"stands for remote storage (/NAME and NAME: with the name {', '.join(SCHEMES)})"
    elif size > most - ROOM:
        what = f"has {size} bytes, and the files in a checkpoint need {ROOM} of the {most} that there may be"
    elif any(len(os.fsencode(part)) > longest for part in parts):
        what = f"has a name of more than {longest} bytes in it"
    else:
        return None
    return f"{path!r} {what}: no checkpoint can be written or read there. Name another folder, or rename that one."


def arrays(folder: str | Path, paths: Iterable[str]) -> dict[str, ts.TensorStore]:
    """`{path: array}`, opened but not read.

    Relies on Orbax keeping a parameter as a zarr array under its path joined with dots.
    """
    base = local(folder).as_uri() + "/"

    def spec(path: str) -> dict:
        return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": path.replace("/", ".") + "/"}}

    opening = {path: ts.open(spec(path), read=True) for path in paths}
    return {path: future.result() for path, future in opening.items()}


def read_back(folder: str | Path) -> None:
    """Reads the names in a checkpoint and the first chunk of one array, the smallest that has a file of its own.

    Raises `NotWritten`. Waits for no other process.
    """
    try:
        entries = json.loads((Path(folder) / "_METADATA").read_bytes())["tree_metadata"].values()
        names = ["/".join(key["key"] for key in entry["key_metadata"]) for entry in entries]
        held = arrays(folder, names).values()
        array = min(held, key=lambda array: (_nbytes(array) < INLINE_BYTES, _nbytes(array)))
        chunk = array.chunk_layout.read_chunk.shape or ()  # None of a scalar
        array[tuple(slice(0, size) for size in map(min, chunk, array.shape))].read().result()
    except Exception as error:  # TensorStore's, of the file system, of JSON, and of what is not in it
        raise NotWritten(f"What was written to {folder} cannot be read back: {explained(error)}") from None


def explained(error: Exception) -> str:
    """An error of TensorStore without the description of the array, which is kilobytes."""
    return re.sub(r" \[tensorstore_spec='.*?'\]", "", str(error)) or type(error).__name__


def _nbytes(array: ts.TensorStore) -> int:
    return array.dtype.numpy_dtype.itemsize * array.size
