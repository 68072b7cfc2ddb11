"""Reads JSON, writes files atomically and durably, locks folders, and checks that paths are local."""

import contextlib
import fcntl
import hashlib
import inspect
import json
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


# The first bytes of files that are often given in place of text, and what to do with them.
NOT_TEXT = (
    (b"\x1f\x8b", "is compressed with gzip. Unpack it first: gunzip"),
    (b"PK\x03\x04", "is a zip archive. Unpack it first: unzip"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd. Unpack it first: zstd -d"),
    (b"BZh", "is compressed with bzip2. Unpack it first: bunzip2"),
    (b"\xff\xfe", "is UTF-16, but UTF-8 is expected. Convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "is UTF-16, but UTF-8 is expected. Convert it: iconv -f UTF-16 -t UTF-8"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the file. Fetch the file: git lfs pull"),
    (b"<!DOCTYPE", "is a web page, probably of a failed download. Download it again"),
    (b"<html", "is a web page, probably of a failed download. Download it again"),
)
DEEPEST = 64  # brackets in brackets of a card or another small JSON file


def not_text(content: bytes) -> str | None:
    """Returns what a file holds that begins so, if it is no text in UTF-8, and what to do; None if it may be text."""
    return next((message for start, message in NOT_TEXT if content.startswith(start)), None)


def parse_json(content: str | bytes) -> Any:
    """Returns the value of a JSON text. Raises ValueError, also if it is nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("brackets nested too deeply") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the object in a small JSON file, such as a card. Raises ValueError naming the file and the problem, also
    for brackets nested more than `DEEPEST` deep, and OSError."""
    content = path.read_bytes()
    try:
        value = parse_json(content)
        _check_depth(value)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} {not_text(content) or f'is damaged, it is not JSON: {error}'}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _check_depth(value: Any) -> None:
    """Raises ValueError for a value that is nested too deeply to print, to copy or to write."""
    level = [value]
    for _ in range(DEEPEST):
        level = [part for each in level if isinstance(each, (dict, list))
                 for part in (each.values() if isinstance(each, dict) else each) if isinstance(part, (dict, list))]
        if not level:
            return
    raise ValueError(f"brackets nested more than {DEEPEST} deep")


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
