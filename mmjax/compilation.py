"""JAX's persistent compilation cache, enabled by default.

It is in the user's cache folder; the environment variable MMJAX_COMPILATION_CACHE names another folder, or is "off".
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from rich.console import Console

from mmjax import files

VARIABLE = "MMJAX_COMPILATION_CACHE"
OFF = "off"
_HIT, _MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"
_COMPILED = "/jax/core/compile/backend_compile_duration"


def folder() -> Path | None:
    """Returns the folder of compiled programs; None if they are not cached.

    It is that of the variable, else JAX's configured one, else in the user's cache folder.
    """
    value = os.environ.get(VARIABLE)
    if value == OFF:
        return None
    files.require_local({VARIABLE: value})
    configured = jax.config.jax_compilation_cache_dir
    if value or configured:
        return Path(value or configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmjax" / "compiled"


def enable() -> Path | str | None:
    """Enables or disables the cache; returns its folder, or the URL that JAX is configured with.

    The cache stays disabled if the user's cache folder cannot be written. Raises ValueError if the folder that the
    variable names cannot be written.
    """
    configured = jax.config.jax_compilation_cache_dir
    if not os.environ.get(VARIABLE) and files.url_problem(configured):
        return _configure(configured)  # JAX reads and writes buckets itself
    path = folder()
    if path is not None and not _writable(path):
        if os.environ.get(VARIABLE):
            raise ValueError(f"{VARIABLE} = {path}: this folder cannot be written. Name another one, or say {OFF!r}.")
        path = None
    return _configure(path)


def _configure(path: Path | str | None) -> Path | str | None:
    """Configures JAX with this folder, and returns it."""
    jax.config.update("jax_compilation_cache_dir", None if path is None else str(path))
    jax.config.update("jax_enable_compilation_cache", path is not None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a run's dozen small ones take half a second
    return path


def _writable(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(path, os.W_OK)


@contextlib.contextmanager
def announce(what: str, console: Console) -> Iterator[None]:
    """Prints that something is compiled inside, and then how long that took and whether it came from the cache."""
    counts = _counts()
    hits, misses, start = counts[_HIT], counts[_MISS], time.monotonic()
    path = jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None
    console.print(f"Compiling {what}. " + (f"Compiled programs are cached in {path}." if path else
                                           f"Compiled programs are not cached; {VARIABLE} names a folder for them."),
                  highlight=False)
    yield
    seconds = time.monotonic() - start
    cached = counts[_HIT] > hits and counts[_MISS] == misses
    console.print(f"{what[0].upper()}{what[1:]} "
                  + (f"came from the cache in {seconds:.1f} s." if cached else f"took {seconds:.1f} s to compile."),
                  highlight=False)


@dataclasses.dataclass
class Compiled:
    """The programs compiled inside `count_compilations`, in any thread, including those from the cache.

    programs: their number
    seconds:  the time that took
    names:    of their functions
    """

    programs: int = 0
    seconds: float = 0.0
    names: list[str] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def count_compilations() -> Iterator[Compiled]:
    """Counts the programs that are compiled inside; the yielded counter is updated meanwhile."""
    compiled = Compiled()

    def listen(event: str, seconds: float, **about: object) -> None:
        if event == _COMPILED:
            compiled.programs += 1
            compiled.seconds += seconds
            compiled.names.append(str(about.get("fun_name", "")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@functools.cache
def _counts() -> dict[str, int]:
    """Returns the counts of cache hits and misses since the first call."""
    counts = {_HIT: 0, _MISS: 0}

    def listen(event: str, **_: object) -> None:
        if event in counts:
            counts[event] += 1

    jax.monitoring.register_event_listener(listen)
    return counts
