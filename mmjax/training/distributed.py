"""The processes of one run: how they find each other, wait for each other and tell each other what they know.

A run of one process needs none of this, and every function here does the obvious thing for it. Several processes run
the same program; each holds the devices of its host, and the first of them alone writes what people read.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmjax.config import HostsConfig

# How many processes a launcher has started, by the launcher's name.
LAUNCHERS = {"SLURM": "SLURM_NTASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}


def initialize(cfg: HostsConfig) -> None:
    """Makes this process one of several, if the configuration or the surroundings say that there are several.

    Before anything else is asked of JAX. The surroundings are SLURM, Open MPI, or a Cloud TPU host; JAX works out of
    them who is who. Raises ValueError for a configuration that says half of it, TimeoutError if the others do not come.
    """
    if jax.distributed.is_initialized():
        return
    named = {"coordinator_address": cfg.coordinator, "num_processes": cfg.processes, "process_id": cfg.process}
    if any(value is not None for value in named.values()):
        if absent := [name for name in ("coordinator", "processes", "process") if getattr(cfg, name) is None]:
            raise ValueError(f"hosts.{', hosts.'.join(absent)}: name all of hosts.coordinator (ADDRESS:PORT of process "
                             "0), hosts.processes (their number) and hosts.process (which one this is), or none.")
        if not 0 <= cfg.process < cfg.processes:
            raise ValueError(f"hosts.process = {cfg.process}: from 0 to hosts.processes - 1 = {cfg.processes - 1}")
    elif launcher(os.environ) is None:
        return
    try:
        jax.distributed.initialize(**named, initialization_timeout=cfg.timeout)
    except RuntimeError as error:  # grpc's deadline, among others
        raise TimeoutError(f"The processes of this run did not find each other within hosts.timeout = {cfg.timeout} s: "
                           f"{error}. Do all of them run, and can they reach process 0?") from error


def launcher(environment: Mapping[str, str]) -> str | None:
    """What has started this process as one of several; None for a process on its own."""
    for name, variable in LAUNCHERS.items():
        if environment.get(variable, "").isdigit() and int(environment[variable]) > 1:
            return name
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    if chips and importlib.util.find_spec("libtpu") and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        return "Cloud TPU"  # one host or many: JAX asks the machine
    return None


def is_primary() -> bool:
    """Whether this is the process that writes what people read."""
    return jax.process_index() == 0


def barrier(what: str, timeout: int) -> None:
    """Until all processes are here. Raises TimeoutError saying what they were to do, after so many seconds."""
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost

    try:
        multihost.get_barrier_sync_fn()(key=multihost.unique_barrier_key(what), timeout_ms=timeout * 1000)
    except Exception as error:  # the coordination service's own kind of error
        raise TimeoutError(f"Process {jax.process_index()} of {jax.process_count()} waited {timeout} s for the others "
                           f"({what}); one of them has stopped or is much slower, its log says why: {error}") from error


def run_on_primary(work: Callable[[], Any], what: str, timeout: int) -> None:
    """The first process does it, the others wait. Raises what the work raises; in the others RuntimeError."""
    problem = None
    if is_primary():
        try:
            work()
        except Exception as error:
            problem = error
    barrier(what, timeout)
    failed = all_sum(problem is not None)[0]
    if problem is not None:
        raise problem
    if failed:
        raise RuntimeError(f"Process 0 failed ({what}); its log says why.")


def all_sum(*numbers: int) -> list[int]:
    """The sums of all processes' numbers."""
    return [int(total) for total in _all_gather(np.asarray(numbers, np.int32)).sum(0)]


def all_gather_objects(items: list[Any]) -> list[Any]:
    """All processes' items, which are what JSON can hold, in the order of the processes."""
    if jax.process_count() == 1:
        return items
    content = np.frombuffer(json.dumps(items).encode(), np.uint8)
    sizes = _all_gather(np.asarray([len(content)], np.int32))[:, 0]
    every = _all_gather(np.pad(content, (0, sizes.max() - len(content))))
    return [item for row, size in zip(every, sizes, strict=True) for item in json.loads(row[:size].tobytes())]


def _all_gather(array: np.ndarray) -> np.ndarray:
    """[processes, ...] of arrays of one shape."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array)).reshape(jax.process_count(), *array.shape)
