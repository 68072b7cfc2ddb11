"""What has been compiled once need not be compiled again: JAX's persistent cache, on by default.

It lies in the user's cache folder; the environment variable MMJAX_COMPILATION_CACHE names another one, or says "off".
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
    """Where compiled programs are kept: as the variable says, or as JAX has been told already, or the user's cache
    folder; None for nowhere."""
    told = os.environ.get(VARIABLE)
    if told == OFF:
        return None
    files.require_local({VARIABLE: told})
    before = jax.config.jax_compilation_cache_dir
    if told or before:
        return Path(told or before).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmjax" / "compiled"


def enable() -> Path | str | None:
    """Turns the cache on, or off; its folder, or the URL that JAX was told before. Where the user's cache folder cannot
    be written it stays off.

    Raises ValueError if the folder that the variable names cannot be written.
    """
    before = jax.config.jax_compilation_cache_dir
    if not os.environ.get(VARIABLE) and files.url_problem(before):
        return _told(before)  # JAX reads and writes buckets itself
    place = folder()
    if place is not None and not _writable(place):
        if os.environ.get(VARIABLE):
            raise ValueError(f"{VARIABLE} = {place}: this folder cannot be written. Name another one, or say {OFF!r}.")
        place = None
    return _told(place)


def _told(place: Path | str | None) -> Path | str | None:
    """The same, which JAX has been told."""
    jax.config.update("jax_compilation_cache_dir", None if place is None else str(place))
    jax.config.update("jax_enable_compilation_cache", place is not None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a run's dozen small ones take half a second
    return place


def _writable(place: Path) -> bool:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(place, os.W_OK)


@contextlib.contextmanager
def announce(what: str, console: Console) -> Iterator[None]:
    """Says that something is being compiled inside, and then how long it took and where it came from."""
    counts = _counts()
    hits, misses, begun = counts[_HIT], counts[_MISS], time.monotonic()
    place = jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None
    console.print(f"Compiling {what}. " + (f"Compiled programs are kept in {place}." if place else
                                           f"Compiled programs are not kept; {VARIABLE} names a folder for them."),
                  highlight=False)
    yield
    seconds = time.monotonic() - begun
    found = counts[_HIT] > hits and counts[_MISS] == misses
    console.print(f"{what[0].upper()}{what[1:]} "
                  + (f"came from there in {seconds:.1f} s." if found else f"took {seconds:.1f} s to compile."),
                  highlight=False)


@dataclasses.dataclass
class Compiled:
    """What was compiled inside a `counted`, by whichever thread: how many programs, the seconds that took, and the
    names of their functions. One that came from the cache counts as well."""

    programs: int = 0
    seconds: float = 0.0
    names: list[str] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def count_compilations() -> Iterator[Compiled]:
    """Counts the programs that are compiled inside; what it gives grows meanwhile."""
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
    """How often JAX found, and did not find, a program in the cache since this was first asked."""
    counts = {_HIT: 0, _MISS: 0}

    def listen(event: str, **_: object) -> None:
        if event in counts:
            counts[event] += 1

    jax.monitoring.register_event_listener(listen)
    return counts
