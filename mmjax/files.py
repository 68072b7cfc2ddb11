"""Atomic and durable file writes, exclusive locks of folders, and checks that paths are local."""

import contextlib
import fcntl
import hashlib
import inspect
import logging
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# scheme://..., or scheme:/... as pathlib writes it. One letter is a drive, a name with a colon alone is a name.
URL = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):(?:/|\Z)")


def url_problem(path: Any, remote: Sequence[str] = ()) -> str | None:
    """Returns a sentence about a path that is a URL, which begins with the path; None for a local path.

    remote: schemes that are allowed, such as gs
    """
    shown = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
    match = URL.match(shown)
    if match is None or shown.startswith(tuple(f"{scheme}://" for scheme in remote)):
        return None
    is_file = match[1].lower() == "file"
    if isinstance(path, os.PathLike):  # pathlib removes a slash
        shown = f"{match[1]}:{'///' if is_file else '//'}{shown[match.end():].lstrip('/')}"
    if is_file:
        return f"{shown} is a URL where a path is expected. Write the path alone, without file://."
    if remote:
        return (f"{shown} is a URL of a kind that is not read here. Expected a local path, or a URL that begins with "
                + ", ".join(f"{scheme}://" for scheme in remote) + ".")
    return (f"{shown} is a URL where a local path is expected. Copy the files to this machine, or mount the bucket as "
            "a folder (gcsfuse, mount-s3), and give that path.")


def url_problems(paths: Mapping[str, Any], remote: Sequence[str] = ()) -> list[str]:
    """Returns a line for every path that is a URL, naming its option.

    paths:  a path, a sequence of paths or None for each option
    remote: schemes that are allowed
    """
    return [f"{option} = {problem}" for option, value in paths.items()
            for path in (value if isinstance(value, (list, tuple)) else [value])
            if (problem := url_problem(path, remote))]


def require_local(paths: Mapping[str, Any]) -> None:
    """Raises ValueError naming every option whose path is a URL; see `url_problems`."""
    refuse(url_problems(paths))


def is_path(annotation: Any) -> bool:
    """Returns whether a parameter so annotated holds a `Path`, such as `Path | None` or `list[Path]`."""
    return annotation is Path or any(map(is_path, typing.get_args(annotation)))


def refuse(problems: Sequence[str]) -> None:
    """Raises ValueError with these lines, if there are any."""
    if problems:
        raise ValueError("\n  ".join(problems))


def replace(path: Path, content: str | Iterable[str]) -> None:
    """Writes a text file atomically, from a string or lines.

    Raises OSError naming the file, which is then unchanged.
    """
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
    """Flushes a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_locked: set[int] = set()  # descriptors of the folders that this process has locked


def _close_locked() -> None:
    """Closes the locked folders in a fork. The parent keeps its locks: only LOCK_UN or the last close releases them."""
    while _locked:
        os.close(_locked.pop())


os.register_at_fork(after_in_child=_close_locked)


@contextlib.contextmanager
def exclusive_lock(folder: Path, doing: str = "writing") -> Iterator[None]:
    """Locks a folder for this process. Raises BlockingIOError if another process has locked it.

    A lock ends with its process, however that ends. On a file system that cannot lock folders nothing is locked.
    Programs that this process starts do not inherit the lock, and a fork (`os.fork`) releases it at once: a child that
    outlives its parent must not keep the folder locked.

    doing: what the process does, for the error message
    """
    descriptor = os.open(folder, os.O_RDONLY)  # closed in started programs (O_CLOEXEC is Python's default)
    _locked.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"Another process is {doing} in {folder}. Wait until it has ended, or name another "
                                  "folder.") from error
        except OSError:
            pass
        yield
    finally:
        if descriptor in _locked:  # not in a fork
            _locked.remove(descriptor)
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a started program shares it until its exec
            os.close(descriptor)


@contextlib.contextmanager
def ignore_closed_event_loop() -> Iterator[None]:
    """Suppresses Python's reports that TensorStore uses an event loop which Orbax has closed, and of coroutines pending
    on that loop. Orbax closes the loop when one of several arrays cannot be read or written, and raises the error."""
    before, logger = sys.unraisablehook, logging.getLogger("asyncio")

    def drop(record: logging.LogRecord) -> bool:
        return False

    def hook(report: Any) -> None:
        closed = isinstance(report.exc_value, RuntimeError) and str(report.exc_value) == "Event loop is closed"
        pending = inspect.iscoroutine(report.object) and "orbax" in report.object.cr_code.co_filename
        if not (closed or pending):
            before(report)

    sys.unraisablehook = hook
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
        sys.unraisablehook = before
