"""Measures the machine's peak performance, and the time and memory of two programs.

Both sides alternate in one process, so that other load on the machine affects both. Memory is measured in separate
processes, as the largest resident set (Linux) or, on a GPU, by the allocator.
"""

import ctypes
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """The best speeds of this machine.

    matmul:     operations per second of one large product, by side ("ours", "theirs")
    copy, read: bytes per second of an array in memory
    """

    matmul: Mapping[str, float]
    copy: float
    read: float


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds(function: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def turns(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of every call. The functions alternate, every other round in the opposite order; each is
    called once before the timing."""
    for function in functions.values():
        function()
    found: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        for name in list(functions)[:: -1 if number % 2 else 1]:
            found[name].append(seconds(functions[name]))
    return found


def medians(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in found.items()}


def ceiling(side: int, size: int, dtype: str, device: str, theirs: bool, rounds: int = 7) -> Ceiling:
    """Returns the ceiling, the best of the rounds.

    side:   of the square matrices
    size:   bytes of the array that is copied and read
    device: "cpu" or "cuda", torch's name
    theirs: whether torch is measured too
    """
    found = turns(products(side, dtype, device, ("ours", "theirs") if theirs else ("ours",)), rounds)
    array = jnp.ones(size // 4, jnp.float32)
    copy, read = jax.jit(lambda x: x + 1), jax.jit(jnp.sum)
    moved = turns({"copy": lambda: copy(array).block_until_ready(), "read": lambda: read(array).block_until_ready()},
                  rounds)
    return Ceiling({name: 2 * side**3 / min(times) for name, times in found.items()},
                   copy=2 * size / min(moved["copy"]), read=size / min(moved["read"]))


def products(side: int, dtype: str, device: str, names: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Returns {"ours", "theirs"}, or one of them: functions that multiply two square matrices."""
    return {name: _product(side, dtype) if name == "ours" else _their_product(side, dtype, device) for name in names}


def _product(side: int, dtype: str) -> Callable[[], Any]:
    random = np.random.default_rng(0)
    a, b = (jnp.asarray(random.standard_normal((side, side), np.float32), dtype) for _ in range(2))
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest" if dtype == "float32" else None))
    return lambda: multiply(a, b).block_until_ready()


def _their_product(side: int, dtype: str, device: str) -> Callable[[], Any]:
    import torch

    a, b = (torch.randn(side, side, dtype=getattr(torch, dtype), device=device) for _ in range(2))

    def multiply() -> None:
        torch.matmul(a, b)
        if device != "cpu":
            torch.cuda.synchronize()

    return multiply


# ---- memory ----


def forget_peak() -> None:
    """Resets `peak`, after returning freed memory to the system. Without /proc/self/clear_refs `peak` stays that of the
    whole process."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # of the GNU C library
    except (AttributeError, OSError, TypeError):
        pass
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak() -> int:
    """Returns the largest resident set of this process in bytes. `ru_maxrss` is not used because a process inherits it
    from its parent."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def run_module(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Runs `python -m module arguments` and returns its last line, parsed as JSON.

    Raises RuntimeError with the output of the process if it failed.
    """
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | dict(environment or {}))
    if done.returncode:
        raise RuntimeError(f"python -m {module} {' '.join(arguments)} ended with status {done.returncode}:\n"
                           f"{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])
