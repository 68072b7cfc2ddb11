"""Coordination of the processes of one run: start-up, barriers, sums and the exchange of objects.

Every function also works for a run of one process. Several processes run the same program; each drives the devices of
its host, and only the primary process writes files and messages.
"""

import importlib.util
import itertools
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
    """Calls `jax.distributed.initialize` if the configuration or the environment describes several processes.

    Must be called before any other use of JAX. JAX reads the environment of SLURM, Open MPI or a Cloud TPU host itself.
    Raises ValueError for an incomplete configuration, TimeoutError if the other processes do not connect.
    """
    if jax.distributed.is_initialized():
        return
    options = {"coordinator_address": cfg.coordinator, "num_processes": cfg.processes, "process_id": cfg.process}
    if any(value is not None for value in options.values()):
        missing = [name for name in ("coordinator", "processes", "process") if getattr(cfg, name) is None]
        if missing:
            raise ValueError(f"hosts.{', hosts.'.join(missing)}: name all of hosts.coordinator (ADDRESS:PORT of "
                             "process 0), hosts.processes (their number) and hosts.process (which one this is), or "
                             "none.")
        if not 0 <= cfg.process < cfg.processes:
            raise ValueError(f"hosts.process = {cfg.process}: from 0 to hosts.processes - 1 = {cfg.processes - 1}")
    elif launcher(os.environ) is None:
        return
    try:
        jax.distributed.initialize(**options, initialization_timeout=cfg.timeout)
    except RuntimeError as error:  # such as the deadline of gRPC
        raise TimeoutError(f"The processes of this run did not find each other within hosts.timeout = {cfg.timeout} s: "
                           f"{error}. Do all of them run, and can they reach process 0?") from error


def launcher(environment: Mapping[str, str]) -> str | None:
    """Returns the name of the launcher that started several processes; None for a single process."""
    for name, variable in LAUNCHERS.items():
        if environment.get(variable, "").isdigit() and int(environment[variable]) > 1:
            return name
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    if chips and importlib.util.find_spec("libtpu") and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        return "Cloud TPU"  # JAX finds out how many hosts there are
    return None


def is_primary() -> bool:
    """Whether this is the process that writes files and messages."""
    return jax.process_index() == 0


def barrier(what: str, timeout: int) -> None:
    """Waits until all processes have called it. Raises TimeoutError naming `what` after `timeout` seconds."""
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost

    try:
        multihost.get_barrier_sync_fn()(key=multihost.unique_barrier_key(what), timeout_ms=timeout * 1000)
    except Exception as error:  # the coordination service raises an error type of its own
        raise TimeoutError(f"Process {jax.process_index()} of {jax.process_count()} waited {timeout} s for the others "
                           f"({what}); one of them has stopped or is much slower, its log says why: {error}") from error


def run_on_primary(work: Callable[[], Any], what: str, timeout: int) -> None:
    """Calls `work` on the primary process while the others wait. Raises what `work` raises, elsewhere RuntimeError."""
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
    """Returns each number summed over all processes."""
    return [int(total) for total in _all_gather(np.asarray(numbers, np.int32)).sum(0)]


class ProcessCounts:
    """Makes arrays that hold a number of each process, int32[devices of the mesh]. A compiled function returns their
    sum to every process, and none of them has to wait for the others before it calls that function."""

    def __init__(self, mesh: jax.sharding.Mesh):
        self._mesh = mesh
        self._zero = self._array(0)

    def __call__(self, number: int) -> jax.Array:
        """Returns the array with this process's number; each of the others passes its own."""
        return self._array(number) if number else self._zero

    def _array(self, number: int) -> jax.Array:
        sharding = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec(self._mesh.axis_names))
        numbers = itertools.chain([number], itertools.repeat(0))  # on the first device of the process, 0 on the others
        return jax.make_array_from_callback(
            (self._mesh.size,), sharding, lambda _: np.asarray([next(numbers)], np.int32))


def all_gather_objects(items: list[Any]) -> list[Any]:
    """Returns the items of all processes, in the order of the processes. Items must be serialisable as JSON."""
    if jax.process_count() == 1:
        return items
    content = np.frombuffer(json.dumps(items).encode(), np.uint8)
    sizes = _all_gather(np.asarray([len(content)], np.int32))[:, 0]
    gathered = _all_gather(np.pad(content, (0, sizes.max() - len(content))))
    return [item for row, size in zip(gathered, sizes, strict=True) for item in json.loads(row[:size].tobytes())]


def _all_gather(array: np.ndarray) -> np.ndarray:
    """Stacks every process's array, all of one shape: [processes, ...]."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array)).reshape(jax.process_count(), *array.shape)
