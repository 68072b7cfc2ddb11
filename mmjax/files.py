"""Files that are whole or not there, and on the disk before anything relies on them; and paths that are local."""

import contextlib
import fcntl
import hashlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# scheme://..., or scheme:/... as pathlib writes it. One letter is a drive, a name with a colon alone is a name.
URL = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):(?:/|\Z)")


def url_problem(path: Any, remote: Sequence[str] = ()) -> str | None:
    """What is wrong with a path that is a URL, in a sentence that begins with it; None for a local path.

    remote: schemes that can be read nevertheless, such as gs
    """
    shown = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
    found = URL.match(shown)
    if found is None or shown.startswith(tuple(f"{scheme}://" for scheme in remote)):
        return None
    is_file = found[1].lower() == "file"
    if isinstance(path, os.PathLike):  # as it was before pathlib took a slash
        shown = f"{found[1]}:{'///' if is_file else '//'}{shown[found.end():].lstrip('/')}"
    if is_file:
        return f"{shown} is a URL where a path is expected. Write the path alone, without file://."
    if remote:
        return (f"{shown} is a URL of a kind that is not read here. Expected a local path, or a URL that begins with "
                + ", ".join(f"{scheme}://" for scheme in remote) + ".")
    return (f"{shown} is a URL where a local path is expected. Copy the files to this machine, or mount the bucket as "
            "a folder (gcsfuse, mount-s3), and name the path there.")


def url_problems(paths: Mapping[str, Any], remote: Sequence[str] = ()) -> list[str]:
    """A line for every path that is a URL, naming its option.

    paths:  of each option a path, several in a sequence, or None
    remote: schemes that can be read nevertheless
    """
    return [f"{option} = {problem}" for option, value in paths.items()
            for path in (value if isinstance(value, (list, tuple)) else [value])
            if (problem := url_problem(path, remote))]


def require_local(paths: Mapping[str, Any]) -> None:
    """Raises ValueError naming every option whose path is a URL; see `url_problems`."""
    refuse(url_problems(paths))


def refuse(problems: Sequence[str]) -> None:
    """Raises ValueError with these lines, if there are any."""
    if problems:
        raise ValueError("\n  ".join(problems))


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


_held: set[int] = set()  # descriptors of the folders that this process has locked


def _forget_held() -> None:
    """In a fork. Closing leaves the parent its lock, which only LOCK_UN, or the last descriptor closed, would end."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_held)


@contextlib.contextmanager
def exclusive_lock(folder: Path, doing: str = "at work") -> Iterator[None]:
    """Nobody else is in a folder meanwhile. Raises BlockingIOError if somebody is, which the end of their process, of
    whatever kind, changes. A file system that cannot lock folders lets everybody in.

    A program that this process starts does not inherit the lock, and a copy of this process (`os.fork`) gives it up at
    once: a child that outlives its parent must not keep others out.
    """
    descriptor = os.open(folder, os.O_RDONLY)  # closed in programs that are started (O_CLOEXEC is Python's default)
    _held.add(descriptor)
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
        if descriptor in _held:  # not in a fork
            _held.remove(descriptor)
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a program may have it until the moment in which it starts
            os.close(descriptor)


@contextlib.contextmanager
def ignore_closed_event_loop() -> Iterator[None]:
    """Inside, Python does not report that TensorStore answers to an event loop which Orbax has closed, nor what was
    still waiting there: Orbax closes it when one of several arrays cannot be read or written, and raises what went
    wrong."""
    before, logger = sys.unraisablehook, logging.getLogger("asyncio")

    def drop(record: logging.LogRecord) -> bool:
        return False

    def hook(found: Any) -> None:
        closed = isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"
        waiting = inspect.iscoroutine(found.object) and "orbax" in found.object.cr_code.co_filename
        if not (closed or waiting):
            before(found)

    sys.unraisablehook = hook
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
        sys.unraisablehook = before
