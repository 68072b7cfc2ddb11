"""Folders of Orbax checkpoints: the paths passed to Orbax, unsupported names, and a check that they can be read.

Orbax finds the parts to merge with `epath.Path.glob`, which also interprets the folder's name as a pattern: in
`exp [1]` it finds nothing, warns, and the checkpoint cannot be read. So every path of a user is passed to Orbax as a
`LocalPath`, and what was written is read back before it is used.
"""

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import tensorstore as ts
from etils import epath

SCHEMES = ("gs", "s3", "az", "hf")  # etils treats `/gs/...`, and a folder `gs:`, like `gs://...`
ROOM = 200  # bytes of a path that the files inside a checkpoint need
INLINE_BYTES = 1024  # TensorStore stores smaller values inside its tables


class LocalPath(type(epath.Path("/"))):
    """A path of etils whose `glob` does not interpret the path itself as a pattern; nor do paths derived from it."""

    def glob(self, pattern: str) -> Iterator["LocalPath"]:
        return (self / name for name in glob.glob(pattern, root_dir=self))


class WriteError(OSError):
    """A checkpoint that was just written cannot be read; the message describes the problem."""


def local(folder: str | Path) -> LocalPath:
    """Returns the absolute path of a folder, without links. Raises ValueError if Orbax does not support its name."""
    if message := problem(folder):
        raise ValueError(message)
    return LocalPath(os.path.realpath(folder))


def problem(folder: str | Path) -> str | None:
    """Returns why a folder of that name cannot hold a checkpoint, and what to do; None if it can."""
    path = os.path.realpath(folder)
    parts, size = path.split("/"), len(os.fsencode(path))
    most, longest = (os.pathconf("/", limit) for limit in ("PC_PATH_MAX", "PC_NAME_MAX"))
    if "\\" in path:
        reason = "has a backslash in it"
    elif any("\ud800" <= letter <= "\udfff" for letter in path):
        reason = "is not UTF-8"
    elif parts[1] in SCHEMES or {f"{name}:" for name in SCHEMES} & set(parts):
        reason = f"stands for remote storage (/NAME and NAME: with the name {', '.join(SCHEMES)})"
    elif size > most - ROOM:
        reason = f"has {size} bytes, and the files in a checkpoint need {ROOM} of the {most} that are allowed"
    elif any(len(os.fsencode(part)) > longest for part in parts):
        reason = f"has a name of more than {longest} bytes in it"
    else:
        return None
    return f"{path!r} {reason}: no checkpoint can be written or read there. Name another folder, or rename that one."


def arrays(folder: str | Path, paths: Iterable[str]) -> dict[str, ts.TensorStore]:
    """Returns `{path: array}`, opened but not read.

    Orbax stores a parameter as a zarr array under its path joined with dots.
    """
    base = local(folder).as_uri() + "/"

    def spec(path: str) -> dict:
        return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": path.replace("/", ".") + "/"}}

    opening = {path: ts.open(spec(path), read=True) for path in paths}
    return {path: future.result() for path, future in opening.items()}


def read_back(folder: str | Path) -> None:
    """Reads the names in a checkpoint and the first chunk of the smallest array that has its own file.

    Raises `WriteError`. Does not wait for other processes.
    """
    try:
        entries = json.loads((Path(folder) / "_METADATA").read_bytes())["tree_metadata"].values()
        names = ["/".join(key["key"] for key in entry["key_metadata"]) for entry in entries]
        opened = arrays(folder, names).values()
        array = min(opened, key=lambda array: (_nbytes(array) < INLINE_BYTES, _nbytes(array)))
        chunk = array.chunk_layout.read_chunk.shape or ()  # None for a scalar
        array[tuple(slice(0, size) for size in map(min, chunk, array.shape))].read().result()
    except Exception as error:  # of TensorStore, the file system, JSON or its contents
        raise WriteError(f"The checkpoint just written to {folder} cannot be read back: {explained(error)}") from None


def explained(error: Exception) -> str:
    """Returns the message of a TensorStore error without the spec of the array, which has kilobytes."""
    return re.sub(r" \[tensorstore_spec='.*?'\]", "", str(error)) or type(error).__name__


def _nbytes(array: ts.TensorStore) -> int:
    return array.dtype.numpy_dtype.itemsize * array.size
