"""Where parameters and activations live on a mesh of devices.

A family's AXES say what each dimension of a parameter is; PLACEMENT says where such a dimension lives. Trying another
layout is an edit of PLACEMENT alone, which constrains the activations as well.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mmjax import trees
from mmjax.config import MeshConfig

PLACEMENT = {  # the rest is replicated
    "batch": ("data", "fsdp"),
    "lookup": "data",  # rows whose words are looked up in a table of which every device has some columns
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ff": "tensor",
    "vocab": "tensor",
}


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh ("data", "fsdp", "tensor") over all devices; ValueError if the sizes do not multiply to their number."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    known = math.prod(size for size in sizes if size != -1)
    impossible = sizes.count(-1) > 1 or any(size < 1 for size in sizes if size != -1)
    if impossible or len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ValueError(
            f"The mesh data={cfg.data}, fsdp={cfg.fsdp}, tensor={cfg.tensor} does not fill {len(devices)} device(s). "
            "The product must be their number; one size may be -1 to take what is left.")
    shape = [len(devices) // known if size == -1 else size for size in sizes]
    return Mesh(np.asarray(devices).reshape(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def num_shards(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """How many pieces a dimension of this kind is cut into."""
    placed = PLACEMENT.get(axis) or ()
    return math.prod(mesh.shape[name] for name in ((placed,) if isinstance(placed, str) else placed))


def num_batch_shards() -> int:
    """Into how many pieces the rows are cut where `use` is in force; 1 elsewhere."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else num_shards(mesh, "batch")


def shardings(shapes: Mapping[str, Any], axes: Sequence[tuple[str, tuple[str, ...]]], mesh: Mesh) -> dict[str, Any]:
    """`{path: NamedSharding}` for `{path: anything with a shape}`.

    Raises ValueError naming every parameter that no line of `axes` describes, or that the mesh cannot divide, together
    with the largest number of pieces that would work.
    """
    placed, problems = {}, []
    for path, leaf in shapes.items():
        try:
            names = trees.lookup(path, axes)
        except KeyError:
            problems.append(f"{path} {tuple(leaf.shape)}: no line of AXES describes it")
            continue
        if len(names) != len(leaf.shape):
            problems.append(f"{path} {tuple(leaf.shape)}: AXES names {len(names)} dimensions: {names}")
            continue
        for name, size in zip(names, leaf.shape, strict=True):
            if size % num_shards(mesh, name):
                most = math.gcd(size, num_shards(mesh, name))
                problems.append(f"{path}: {name} = {size} cannot be cut into {num_shards(mesh, name)} (mesh axis "
                                f"{PLACEMENT[name]}); {most} would work")
        placed[path] = NamedSharding(mesh, PartitionSpec(*(PLACEMENT.get(name) for name in names)))
    if problems:
        raise ValueError(
            f"{len(problems)} parameters do not fit the mesh {dict(mesh.shape)}:\n  " + "\n  ".join(problems))
    return placed


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(PLACEMENT["batch"]))


def process_local_rows(mesh: Mesh, count: int) -> list[int]:
    """Which of a batch's `count` rows are on devices of this process. Of one process, all."""
    held = batch_sharding(mesh).addressable_devices_indices_map((count,)).values()
    return sorted({row for (rows,) in held for row in range(*rows.indices(count))})


def put_batch(batch: Any, mesh: Mesh, count: int) -> Any:
    """A batch of numpy arrays on the devices, as `batch_sharding` says; each process gives its `own_rows` of `count`.

    The copies may still be under way when this returns.
    """
    place, local = batch_sharding(mesh), {row: number for number, row in enumerate(process_local_rows(mesh, count))}

    def whole(array: np.ndarray) -> jax.Array:
        def piece(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(count)  # which follow each other in the process's rows, too
            return array[local[start]:local[start] + stop - start]

        return jax.make_array_from_callback((count, *array.shape[1:]), place, piece)

    return jax.tree.map(whole, batch)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Everything compiled inside sees the mesh, and the models' logical constraints the PLACEMENT."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(PLACEMENT.items())):
        yield
