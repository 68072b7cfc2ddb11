"""Shardings of parameters and activations over a mesh of devices.

A family's AXES name the logical axis of each dimension of a parameter; PLACEMENT maps logical axes to mesh axes.
Another layout needs changes to PLACEMENT alone, which constrains the activations as well.
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

PLACEMENT = {  # all other axes are replicated
    "batch": ("data", "fsdp"),
    "lookup": "data",  # rows of tokens to look up in an embedding table whose columns are sharded
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ff": "tensor",
    "vocab": "tensor",
}


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh ("data", "fsdp", "tensor") over all devices.

    Raises ValueError if the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    known = math.prod(size for size in sizes if size != -1)
    impossible = sizes.count(-1) > 1 or any(size < 1 for size in sizes if size != -1)
    if impossible or len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ValueError(
            f"The mesh data={cfg.data}, fsdp={cfg.fsdp}, tensor={cfg.tensor} does not fill {len(devices)} device(s). "
            "The product must be their number; one size may be -1 to take all that remain.")
    shape = [len(devices) // known if size == -1 else size for size in sizes]
    return Mesh(np.asarray(devices).reshape(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def num_shards(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """Returns the number of shards of a dimension with this logical axis."""
    names = PLACEMENT.get(axis) or ()
    return math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))


def num_batch_shards() -> int:
    """Returns the number of shards of a batch's rows within `use_mesh`; 1 elsewhere."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else num_shards(mesh, "batch")


def shardings(shapes: Mapping[str, Any], axes: Sequence[tuple[str, tuple[str, ...]]], mesh: Mesh) -> dict[str, Any]:
    """Returns `{path: NamedSharding}` for `{path: anything with a shape}`.

    A parameter that fsdp does not divide along its "embed" dimension is sharded along another one that it divides, or
    stays whole; `exceptions` names them.

    Raises ValueError naming every parameter that no line of `axes` describes, or that another mesh axis than fsdp
    cannot divide, together with the largest number of shards that would work.
    """
    result, problems = {}, []
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
            if PLACEMENT.get(name) != "fsdp" and size % num_shards(mesh, name):
                most = math.gcd(size, num_shards(mesh, name))
                problems.append(f"{path}: {name} = {size} cannot be cut into {num_shards(mesh, name)} (mesh axis "
                                f"{PLACEMENT[name]}); {most} would work")
        result[path] = NamedSharding(mesh, _spec(names, leaf.shape, mesh))
    if problems:
        raise ValueError(
            f"{len(problems)} parameters do not fit the mesh {dict(mesh.shape)}:\n  " + "\n  ".join(problems))
    return result


def _spec(names: Sequence[str], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Returns the spec of a parameter. If fsdp does not divide its own dimension, it is moved to the largest other one
    that it divides beside the mesh axis that is there; never to the layers, whose scan would gather the whole stack."""
    placed, fsdp = [PLACEMENT.get(name) for name in names], mesh.shape["fsdp"]
    for axis, size in enumerate(shape):
        if placed[axis] == "fsdp" and size % fsdp:
            placed[axis] = None
            others = [other for other, length in enumerate(shape) if other != axis and names[other] != "layer"
                      and length % (fsdp * num_shards(mesh, names[other])) == 0]
            if others:
                other = max(others, key=lambda other: shape[other])
                placed[other] = "fsdp" if placed[other] is None else (placed[other], "fsdp")
    return PartitionSpec(*placed)


def exceptions(shapes: Mapping[str, Any], axes: Sequence[tuple[str, tuple[str, ...]]], mesh: Mesh) -> str | None:
    """Returns a line about the parameters that fsdp does not divide as PLACEMENT says; None if it divides all.

    shapes: `{path: anything with a shape and a dtype}`
    """
    other, whole, sizes = [], [], {}
    for path, leaf in shapes.items():
        names = trees.lookup(path, axes)
        undivided = {name: size for name, size in zip(names, leaf.shape, strict=True)
                     if PLACEMENT.get(name) == "fsdp" and size % mesh.shape["fsdp"]}
        if undivided:
            sizes |= undivided
            moved = any(axis == "fsdp" or "fsdp" in (axis or ()) for axis in _spec(names, leaf.shape, mesh))
            (other if moved else whole).append(path)
    if not sizes:
        return None
    kept = shardings({path: shapes[path] for path in whole}, axes, mesh)
    held = sum(math.prod(spec.shard_shape(shapes[path].shape)) * np.dtype(shapes[path].dtype).itemsize
               for path, spec in kept.items())
    parts = [f"{len(paths)} parameter{'s' * (len(paths) > 1)} (such as {paths[0]}) {what}" for paths, what in (
        (other, "sharded along another dimension"),
        (whole, f"not sharded over it, {held / 1e6:,.0f} MB on each device")) if paths]
    undivided = ", ".join(f"{name} = {size:,}" for name, size in sizes.items())
    return f"fsdp = {mesh.shape['fsdp']} does not divide {undivided}: {'; '.join(parts)}."


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(PLACEMENT["batch"]))


def process_local_rows(mesh: Mesh, count: int) -> list[int]:
    """Returns the indices of those of a batch's `count` rows that are on devices of this process."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((count,)).values()
    return sorted({row for (rows,) in slices for row in range(*rows.indices(count))})


def put_batch(batch: Any, mesh: Mesh, count: int) -> Any:
    """Copies a batch of numpy arrays to the devices, with `batch_sharding`.

    Each process passes its `process_local_rows` of the `count` rows, or an element for each group of them that lies in
    one shard. The copies may be unfinished when this returns.
    """
    sharding, local = batch_sharding(mesh), {row: number for number, row in enumerate(process_local_rows(mesh, count))}

    def put(array: np.ndarray) -> jax.Array:
        groups = len(array) * count // len(local)  # of all processes; as many as rows in most arrays
        rows = count // groups

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(groups)
            first = local[start * rows] // rows  # consecutive among the process's groups, too
            return array[first:first + stop - start]

        return jax.make_array_from_callback((groups, *array.shape[1:]), sharding, shard)

    return jax.tree.map(put, batch)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Sets the mesh, and PLACEMENT as the rules of the models' logical axes, for everything compiled inside."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(PLACEMENT.items())):
        yield
