"""Reads arrays from untrusted .npy and .npz files.

`numpy.load` trusts a header: it evaluates it, allocates the memory that it describes, and raises any kind of error.
Here a header is parsed with a regular expression, and the size that it describes is compared with that of the file
before memory is allocated. Arrays of numbers and of text are read; objects, records and times are not.
"""

import dataclasses
import math
import os
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

HEADER = 10_000  # bytes, numpy's own limit
PLAIN = re.compile(r"[<>|=]?[biufcSU][1-9]\d{0,8}")  # dtypes
FIELD = re.compile(r"""\s*(['"])(descr|fortran_order|shape)\1\s*:\s*"""
                   r"""(?:(['"])([^'"]*)\3|(True|False)|\(([\d\s,L-]*)\))\s*(?:,|$)\s*""")
UNPACKED = 64 * 2**20  # maximum bytes that a small .npz file may unpack to
RATIO = 16  # maximum unpacked bytes for each byte of a larger file
DEFLATED = 1032  # the highest ratio that deflate can reach


@dataclasses.dataclass(frozen=True)
class NpyHeader:
    """The header of a .npy file. length: of the header, in bytes"""

    shape: tuple[int, ...]
    dtype: np.dtype
    order: str
    length: int


def read_npy(path: str | os.PathLike, mmap: bool = False) -> np.ndarray:
    """Returns the array in a .npy file, memory-mapped with `mmap`.

    Raises OSError, or ValueError describing the problem without the name of the file.
    """
    if not Path(path).is_file():  # neither a folder nor a pipe, which would block
        raise FileNotFoundError(f"there is no file {path}")
    with open(path, "rb") as file:
        header = _header(file, os.fstat(file.fileno()).st_size)
        if mmap and math.prod(header.shape):
            return np.memmap(path, header.dtype, "r", header.length, header.shape, header.order)
        return _array(file, header)


def read_npz(source: str | os.PathLike | BinaryIO, ratio: int = RATIO) -> dict[str, np.ndarray]:
    """Returns the arrays in a .npz file by name.

    ratio: maximum ratio of unpacked to packed size; a small file may always unpack to 64 MiB

    Raises OSError, or ValueError describing the problem without the name of the file.
    """
    named = isinstance(source, (str, os.PathLike))
    if named and not Path(source).is_file():
        raise FileNotFoundError(f"there is no file {source}")
    stored = Path(source).stat().st_size if named else source.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(source) as archive:
            _check_members(archive.infolist(), max(UNPACKED, ratio * stored), stored)
            return {member.filename.removesuffix(".npy"): _member(archive, member) for member in archive.infolist()}
    except (OSError, ValueError):
        raise
    except Exception as error:  # of zipfile or zlib
        raise ValueError(f"it is not a readable archive of arrays: {error}") from error


def _check_members(members: list[zipfile.ZipInfo], most: int, stored: int) -> None:
    """Raises ValueError for members that `numpy.savez` does not write, or that unpack to more than `most` bytes."""
    for member in members:
        if not member.filename.endswith(".npy"):
            raise ValueError(f"it holds {_short(member.filename)}, which is not an array")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{_short(member.filename)} is compressed in a way that numpy does not write")
    if (unpacked := sum(member.file_size for member in members)) > most:
        raise ValueError(f"its {stored:,} bytes would unpack to {unpacked:,}, more than the {most:,} that are allowed "
                         "for a file of its size. If that is intended, write it with numpy.savez, which does not "
                         "compress")


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        try:
            return _array(file, _header(file, member.file_size))
        except ValueError as error:
            raise ValueError(f"{_short(member.filename)}: {error}") from error


def _header(file: BinaryIO, size: int) -> NpyHeader:
    """Reads the header of a file of `size` bytes. Raises ValueError if it is invalid or describes more bytes."""
    start = file.read(8)
    if start[:6] != b"\x93NUMPY":
        raise ValueError("it does not begin as a .npy file does")
    length = int.from_bytes(file.read(2 if start[6:7] == b"\1" else 4), "little")
    if length > HEADER:
        raise ValueError(f"its header takes {length:,} bytes, more than {HEADER:,}")
    fields = _fields(file.read(length).decode("latin-1"))
    if not PLAIN.fullmatch(fields["descr"]):
        raise ValueError(f"it holds {_short(fields['descr'])}, but only plain numbers and text are read")
    try:
        dtype = np.dtype(fields["descr"])
        shape = tuple(int(side.strip().rstrip("L")) for side in fields["shape"].split(",") if side.strip())
    except (TypeError, ValueError) as error:  # such as float24, or 1-1
        raise ValueError(f"its header cannot be read: {_short(str(error))}") from error
    if min(shape, default=0) < 0 or len(shape) > 32:
        raise ValueError(f"its header names the shape {_short(list(shape))}")
    if (needed := math.prod(shape) * dtype.itemsize) > (available := size - file.tell()):
        raise ValueError(f"its header describes {dtype}{_short(list(shape))}, which takes "
                         f"{f'{needed:,}' if needed < 10**30 else 'far too many'} bytes, but there are {available:,}")
    if math.prod(max(side, 1) for side in shape) * dtype.itemsize > np.iinfo(np.intp).max:  # with another side of 0
        raise ValueError(f"its header names the shape {_short(list(shape))}")
    return NpyHeader(shape, dtype, "F" if fields["fortran_order"] == "True" else "C", file.tell())


def _fields(header: str) -> dict[str, str]:
    """Returns the fields of `{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }` by name."""
    text, position, fields = header.strip(), 1, {}
    if text[:1] == "{" and text[-1:] == "}":
        while match := FIELD.match(text, position, len(text) - 1):
            quoted, flag, sides = match.group(4), match.group(5), match.group(6)
            fields[match.group(2)] = next(value for value in (quoted, flag, sides) if value is not None)
            position = match.end()
    if position != len(text) - 1 or fields.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError(f"its header is not that of an array of plain numbers or text: {_short(text)}")
    return fields


def _array(file: BinaryIO, header: NpyHeader) -> np.ndarray:
    """Reads the array after the header. Raises ValueError if the file ends early."""
    flat = np.empty(math.prod(header.shape), header.dtype)
    buffer, done = memoryview(flat.view(np.uint8)), 0
    while done < len(buffer):
        if not (count := file.readinto(buffer[done:done + 2**20])):
            raise ValueError(f"it ends after {done:,} of {len(buffer):,} bytes")
        done += count
    return flat.reshape(header.shape, order=header.order)


def _short(value: Any) -> str:
    """Returns text for an error: on one line, at most 120 characters, without control characters."""
    text = "".join(char if char.isprintable() else " " for char in str(value))
    return text if len(text) <= 120 else text[:117] + "..."
