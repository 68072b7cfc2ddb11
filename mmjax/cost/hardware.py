"""Devices that need not be present: TPU slices by name, and the figures of their chips and of some GPUs.

The figures of a chip are those that Google publishes (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e): peak bfloat16
operations, memory bandwidth, and the interconnect. Google gives the interconnect of a chip in both directions; here it
is that of one link in one direction (v4: Jouppi et al. 2023). The memory is what XLA lets a program use, as its message
for a program that does not fit states; it is less than a chip has.
"""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

LOCAL = "local"
GIB = 2**30
MATRIX = 2 * 128 * 128  # operations of a 128 x 128 matrix unit in a cycle; a unit of v6e is 256 x 256


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    flops:      bfloat16 operations a second
    per_cycle:  bfloat16 operations in a cycle of its matrix units
    memory:     bytes that a program may use
    bandwidth:  of the memory, bytes a second
    link:       bytes a second in one direction to one neighbour
    dimensions: of the grid of chips
    around:     a dimension whose size is a multiple of this is a ring
    together:   only if all dimensions are
    kinds:      names of the device in JAX
    options:    of `get_topology_desc`
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    per_cycle: int
    memory: int
    bandwidth: float
    link: float
    dimensions: int
    around: int
    together: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def clock(self) -> float:
        """Cycles a second, as the published peak and the matrix units imply; libtpu counts time in these."""
        return self.flops / self.per_cycle


CHIPS = {chip.name: chip for chip in (
    Chip("v4", ("TPU v4",), 275e12, 2 * 4 * MATRIX, int(30.75 * GIB), 1200e9, 50e9, 3, 4, True,
         (("chip_config_name", "megacore"),)),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 4 * MATRIX, int(15.75 * GIB), 819e9, 50e9, 2, 16),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 2 * 4 * MATRIX, int(95.73 * GIB), 2765e9, 100e9, 3, 4, True),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 4 * 4 * MATRIX, int(31.24 * GIB), 1638e9, 100e9, 2, 16),
)}

# Dense bfloat16 operations a second with float32 accumulation, from NVIDIA's data sheets. The first entry whose words
# are all in JAX's name of a GPU applies.
GPUS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
        "L4": 121e12, "4090": 165e12}


def peak(device: Any) -> float | None:
    """Returns the bfloat16 operations a second of a `jax.Device`; None if unknown, such as for a CPU."""
    chip = next((chip for chip in CHIPS.values() if device.device_kind in chip.kinds), None)
    kind = set(re.split(r"[\s-]", device.device_kind))
    return chip.flops if chip else next((flops for name, flops in GPUS.items() if kind >= set(name.split())), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    chip:   None if the figures of the devices are unknown
    memory: bytes that a program may use of each device; None if unknown
    links:  bytes a second that the device with the fewest links can send to, or receive from, all its neighbours
    """

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None
    memory: int | None
    links: float | None


def find(name: str) -> Topology:
    """Returns the devices of a TPU slice by its name, such as "v5e:4x4" or "v5p:2x2x2"; "local": those of this machine.

    Raises ValueError for another name, for a slice that does not exist, and if libtpu is not installed.
    """
    if name == LOCAL:
        return _local()
    known = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    chip = known and CHIPS.get(known[1])
    sizes = tuple(map(int, known[2].split("x"))) if known else ()
    if chip is None or len(sizes) != chip.dimensions:
        examples = ", ".join(f"{chip.name}:{'x'.join('2' * chip.dimensions)}" for chip in CHIPS.values())
        raise ValueError(f"topology = {name!r}: a chip and its grid, such as {examples}; or {LOCAL!r}, the devices of "
                         "this machine.")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"Compiling for {name} on a machine without it needs libtpu: pip install 'mmjax[tpu]'.")
    return Topology(name, _described(name, chip, sizes), chip, chip.memory, links(chip, sizes))


def links(chip: Chip, sizes: Sequence[int]) -> float:
    """Returns the bytes a second through all links of a corner of the grid, which has the fewest."""
    closed = [size % chip.around == 0 for size in sizes]
    if chip.together:
        closed = [all(closed)] * len(sizes)
    return chip.link * sum(0 if size == 1 else 2 if ring else 1 for size, ring in zip(sizes, closed, strict=True))


def _described(name: str, chip: Chip, sizes: Sequence[int]) -> tuple[Any, ...]:
    """Returns the devices of a slice, as libtpu describes them without Google's servers or a TPU of this machine."""
    from jax.experimental import topologies

    for variable, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"),
                            ("TPU_ACCELERATOR_TYPE", "v5litepod-1"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")):
        os.environ.setdefault(variable, value)
    host = (*(min(size, 2) for size in sizes[:2]), 1)  # a host has 2 x 2 chips, or all of a smaller slice
    options = {"chips_per_host_bounds": host} | dict(chip.options)
    try:
        return tuple(topologies.get_topology_desc(name, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology = {name!r}: libtpu has no such slice. {error}") from error


def _local() -> Topology:
    devices = tuple(jax.devices())
    chip = next((chip for chip in CHIPS.values() if devices[0].device_kind in chip.kinds), None)
    memory = chip and chip.memory
    if memory is None and devices[0].platform == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
    elif statistics := devices[0].memory_stats():
        memory = statistics.get("bytes_limit", memory)
    sizes = [len(set(along)) for along in zip(*(device.coords for device in devices), strict=True)] if chip else []
    return Topology(LOCAL, devices, chip, memory, chip and links(chip, sizes))
