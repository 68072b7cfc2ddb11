"""Files that are whole or not there, and on the disk before anything relies on them."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def replace(path: Path, content: str | Iterable[str]) -> None:
    """Writes a text file, whole or line by line, that nobody ever sees half-written. Raises OSError naming it; then the
    old one is there."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines([content] if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def alone(folder: Path, doing: str = "at work") -> Iterator[None]:
    """Nobody else is in a folder meanwhile. Raises BlockingIOError if somebody is, which the end of their process, of
    whatever kind, changes. A file system that cannot lock folders lets everybody in."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"Another process is {doing} in {folder}. Wait until it has ended, or name another "
                                  "one.") from error
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
