"""Frozen weights, written slice by slice and read directly onto the devices.

The folder is a standard Orbax checkpoint (OCDBT, one zarr array for each parameter, a tree of nested dicts), so
`orbax.checkpoint.StandardCheckpointer().restore(folder)` reads it too. Orbax writes a leaf only from an array that is
completely in memory; `save` therefore registers its own leaf type through Orbax's public `TypeHandler` interface. The
handler opens the same array as Orbax (`type_handlers.get_json_tspec_write`) and writes it slice by slice; Orbax does
the folder layout, the tree metadata and the final commit.
"""

import functools
import gc
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from mmjax import files, trees
from mmjax.checkpoints import format1, storage
from mmjax.models import int8
from mmjax.models.int8 import Int8

CHUNK_BYTES = 2**20  # maximum chunk of an array; small, so that each of 32 hosts reads only its part
IN_FLIGHT_BYTES = 128 * 2**20  # maximum of the slices that are being written
LATE_SECONDS = 1.0  # wait for TensorStore's pending reads after one of a damaged array failed
SLICE_BYTES = 128 * 2**20  # read at once of a stacked matrix that is quantised, at least a layer


class SlicedParameter(Protocol):
    """A parameter that is computed while it is written.

    rows:     size of a slice along the first axis
    slices(): the parameter's slices `[rows, ...]`, in order
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int

    def slices(self) -> Iterator[np.ndarray]: ...


class _Leaf:
    """The leaf type that is registered with Orbax, for one parameter."""

    def __init__(self, parameter: SlicedParameter):
        self.parameter = parameter
        self.shape, self.dtype = tuple(parameter.shape), np.dtype(parameter.dtype)


class _LeafHandler(ocp.type_handlers.NumpyHandler):
    """Writes `_Leaf`s slice by slice, in the same layout on disk as NumpyHandler."""

    def __init__(self, advance: Callable[[int], None]):
        super().__init__()
        self._advance = advance

    async def serialize(self, values, infos, args=None):
        pending: deque[tuple[Any, int]] = deque()
        for leaf, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            spec = ocp.type_handlers.get_json_tspec_write(
                info, use_ocdbt=True, global_shape=leaf.shape, local_shape=(leaf.parameter.rows, *leaf.shape[1:]),
                dtype=leaf.dtype, process_index=0, arg=ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES))
            array = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
            start = 0
            for part in leaf.parameter.slices():
                while pending and sum(size for _, size in pending) + part.nbytes > IN_FLIGHT_BYTES:
                    await self._wait_for_first(pending)
                pending.append((array[start : start + len(part)].write(part), part.nbytes))
                start += len(part)
        while pending:
            await self._wait_for_first(pending)
        return []

    async def _wait_for_first(self, pending):
        future, size = pending.popleft()
        await future
        self._advance(size)


def save(folder, parameters: Mapping[str, SlicedParameter], advance: Callable[[int], None] = lambda size: None) -> None:
    """Writes `{path: parameter}` to a new `folder`, with a few slices in memory at a time, and reads one array back.

    advance: called with the number of bytes whenever a slice has been written

    Raises `storage.WriteError` if the array cannot be read back, ValueError for a folder that cannot hold a checkpoint.
    """
    files.require_local({"folder": folder})
    jax_arrays = ocp.type_handlers.get_type_handler(jax.Array)  # not needed, but without it Orbax warns
    handlers = ocp.type_handlers.create_type_handler_registry(
        (_Leaf, _LeafHandler(advance)), (jax.Array, jax_arrays))
    # Weights in float16 and bfloat16 hardly compress, and zstd would take more time than the disk.
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False)
    tree = trees.unflatten({path: _Leaf(parameter) for path, parameter in parameters.items()})
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(storage.local(folder), args=ocp.args.PyTreeSave(tree))
    storage.read_back(folder)


def metadata(folder) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns `{path: shape and stored dtype}`.

    Raises FileNotFoundError if `folder` has no checkpoint, ValueError if it is damaged or Orbax does not support its
    name.
    """
    return {path: leaf for path, (_, leaf) in _stored(folder).items()}


def _stored(folder) -> dict[str, tuple[str, jax.ShapeDtypeStruct]]:
    """Returns `{path: (name on disk, shape and stored dtype)}`; raises the errors of `metadata`."""
    folder = storage.local(folder)
    if not (folder / "_METADATA").exists():
        raise FileNotFoundError(f"{folder} holds no Orbax checkpoint (it has no file _METADATA). "
                                "Make one with `mmjax convert`.")
    _check_index(folder)
    with files.ignore_closed_event_loop(), ocp.PyTreeCheckpointer() as checkpointer:
        item = checkpointer.metadata(folder).item_metadata
        if item is None:
            _wait_for_pending_reads()
    if item is None:  # Orbax has logged why
        raise ValueError(f"{folder} is damaged: Orbax cannot read which parameters it has. Convert or copy it again.")
    return {format1.rename(name): (name, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            for name, leaf in trees.flatten(item.tree).items()}


def _check_index(folder: storage.LocalPath) -> None:
    """Raises ValueError if the metadata of an array in `folder` cannot be read.

    Orbax reads all metadata at once and closes its event loop when the first read fails. TensorStore then calls back
    into the closed loop, which Python reports as an error of other code. So damage must be detected before Orbax reads.
    """
    if not (folder / "manifest.ocdbt").exists():
        raise ValueError(f"{folder} is damaged: manifest.ocdbt is missing. Convert or copy it again.")
    try:
        store = ts.KvStore.open({"driver": "ocdbt", "base": folder.as_uri() + "/"}).result()
        reading = [store.read(key) for key in store.list().result() if key.endswith(b"/.zarray")]
        for future in reading:
            json.loads(future.result().value)
    except ValueError as error:
        raise ValueError(f"{folder} is damaged; convert or copy it again. {error}") from error


def restore(folder, shapes: Mapping[str, Any], only: Callable[[str], bool] = lambda path: True) -> dict[str, Any]:
    """Returns the parameters of `folder` as nested dicts of jax arrays.

    shapes: flat or nested tree of `jax.ShapeDtypeStruct`: the shape, dtype (cast while reading) and, optionally, the
            sharding, of which each device reads its own shard (default: everything on the first device), and layout.
            A matrix to quantise is given as an `Int8` (`int8.shapes`); stacked matrices are read and quantised a few
            layers at a time, so that no device has more than those in the stored dtype
    only:   which of these paths to read

    Raises ValueError naming every parameter that is missing or has another shape, or the folder if it is damaged.
    """
    wanted = {path: shape for path, shape in trees.flatten(shapes).items() if only(path)}
    stored = _stored(folder)
    wrong = trees.compare(wanted, {path: stored[path][1] for path in wanted.keys() & stored.keys()})
    if wrong:
        raise ValueError(f"{len(wrong)} parameters of the model cannot be read from {folder}:\n  " + "\n  ".join(wrong)
                         + "\nConvert the checkpoint that belongs to this architecture, or change the architecture.")
    if not wanted:
        return {}
    quantised = {path: shape for path, shape in wanted.items() if isinstance(shape, Int8)}
    plain = {path: shape for path, shape in wanted.items() if path not in quantised}
    try:
        flat = _restore(folder, plain, _names(stored, plain)) if plain else {}
        opened = _open(folder, _names(stored, quantised))
        flat |= {path: _restore_int8(opened[path], shape) for path, shape in quantised.items()}
    except ValueError as error:
        raise ValueError(f"{folder} is damaged; convert or copy it again. {error}") from error
    return trees.unflatten(flat)


def _restore(folder, wanted: Mapping[str, jax.ShapeDtypeStruct], names: Mapping[str, str]) -> dict[str, Any]:
    """Reads parameters through Orbax. names: {path: name on disk}"""
    first_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def restore_args(shape):
        sharding = getattr(shape, "sharding", None) or first_device
        if sharding is not first_device and shape.format.layout is not None:
            sharding = shape.format
        return ocp.ArrayRestoreArgs(
            restore_type=jax.Array, dtype=shape.dtype, sharding=sharding, global_shape=shape.shape)

    wanted = trees.unflatten({names[path]: shape for path, shape in wanted.items()})
    args = ocp.args.PyTreeRestore(wanted, restore_args=jax.tree.map(restore_args, wanted), partial_restore=True)
    with files.ignore_closed_event_loop(), ocp.PyTreeCheckpointer() as checkpointer:
        try:
            read = trees.flatten(checkpointer.restore(storage.local(folder), args=args))
            return {path: read[name] for path, name in names.items()}
        except Exception as error:  # Orbax wraps TensorStore's ValueError in a bare Exception
            if not isinstance(error.__cause__ or error, ValueError):
                raise
            cause = str(error.__cause__ or error)  # the error itself would keep the pending reads alive
        _wait_for_pending_reads()
    raise ValueError(cause)


def _wait_for_pending_reads() -> None:
    """Waits, after an error of Orbax, for the reads of TensorStore that Orbax no longer waits for."""
    time.sleep(LATE_SECONDS)
    gc.collect()


def _restore_int8(stored: ts.TensorStore, wanted: Int8) -> Int8:
    """Reads and quantises a matrix. Every device reads its own shards; the scale of a channel is the same on all."""
    length, sharding = wanted.shape[0], wanted.values.sharding
    divisible = wanted.scale.shape[0] == length and sharding.spec[0] is None
    rows = max(1, SLICE_BYTES * length // (stored.dtype.numpy_dtype.itemsize * stored.size)) if divisible else length
    empty, update = _compiled_update(wanted)
    result = empty()
    for start in range(0, length, rows):
        result = update(result, _read(stored[start : min(start + rows, length)].translate_to[0], sharding), start)
    return result


def _read(stored: ts.TensorStore, sharding: jax.sharding.NamedSharding) -> jax.Array:
    """Reads an array onto the mesh; a shard that several devices of this process have is read once."""

    @functools.cache
    def read(*bounds: tuple[int, int]) -> np.ndarray:
        return stored[tuple(slice(*pair) for pair in bounds)].read().result()

    return jax.make_array_from_callback(
        stored.shape, sharding, lambda index: read(*((part.start, part.stop) for part in index)))


@functools.cache
def _compiled_update(wanted: Int8) -> tuple[Callable[[], Int8], Callable[[Int8, jax.Array, int], Int8]]:
    """Returns compiled functions: one returns zeros, the other quantises rows and writes them at a start index."""
    formats = jax.tree.map(lambda part: part.format, wanted)
    axes = tuple(axis for axis, size in enumerate(wanted.scale.shape) if size == 1)

    def empty() -> Int8:
        return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), wanted)

    def update(whole: Int8, w: jax.Array, start: int) -> Int8:
        return jax.tree.map(lambda all, part: jax.lax.dynamic_update_slice_in_dim(all, part, start, axis=0),
                            whole, int8.quantise(w, axes))

    return jax.jit(empty, out_shardings=formats), jax.jit(update, out_shardings=formats, donate_argnums=0)


def arrays(folder) -> dict[str, ts.TensorStore]:
    """Returns `{path: array}`, opened but not read: `array[i].read().result()` reads one layer of a stacked parameter.

    Only for folders that `save` wrote.
    """
    stored = _stored(folder)
    return _open(folder, _names(stored, stored))


def _names(stored: Mapping[str, tuple[str, jax.ShapeDtypeStruct]], paths: Iterable[str]) -> dict[str, str]:
    """Returns `{path: name on disk}` of some paths; `stored` is the result of `_stored`."""
    return {path: stored[path][0] for path in paths}


def _open(folder, names: Mapping[str, str]) -> dict[str, ts.TensorStore]:
    opened = storage.arrays(folder, names.values())
    return {path: opened[name] for path, name in names.items()}
