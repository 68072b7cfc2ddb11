"""The frozen checkpoint: written slice by slice, read straight onto the devices.

The folder is a standard Orbax checkpoint (OCDBT, one zarr array a parameter, a tree of nested dicts), so
`orbax.checkpoint.StandardCheckpointer().restore(folder)` reads it too. Orbax itself writes a leaf only from an array
that is wholly in memory; `save` therefore registers its own leaf type through Orbax's public `TypeHandler` interface.
The handler opens the array that Orbax would have opened (`type_handlers.get_json_tspec_write`) and writes it slice by
slice; folder layout, tree metadata and the final commit stay Orbax's.
"""

import functools
import gc
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
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

CHUNK_BYTES = 2**20  # largest piece of an array that is read as one; so small that 32 hosts each read their part alone
IN_FLIGHT_BYTES = 128 * 2**20  # slices handed to the file system whose writing has not ended
LATE_SECONDS = 1.0  # for what TensorStore still reads when an array has turned out to be damaged
SLICE_BYTES = 128 * 2**20  # of a stacked matrix that is quantised: read at once, a layer at least


class Slices(Protocol):
    """A parameter that is made while it is written.

    rows:     extent of a slice along the first axis
    slices(): arrays `[rows, ...]` that make up the parameter in order
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int

    def slices(self) -> Iterator[np.ndarray]: ...


class _Leaf:
    """What Orbax sees of a parameter: something it has a handler for."""

    def __init__(self, parameter: Slices):
        self.parameter = parameter
        self.shape, self.dtype = tuple(parameter.shape), np.dtype(parameter.dtype)


class _LeafHandler(ocp.type_handlers.NumpyHandler):
    """Writes `_Leaf`s one slice after the other; on disk they are what NumpyHandler would have written."""

    def __init__(self, advance: Callable[[int], None]):
        super().__init__()
        self._advance = advance

    async def serialize(self, values, infos, args=None):
        waiting: deque[tuple[Any, int]] = deque()
        for leaf, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            spec = ocp.type_handlers.get_json_tspec_write(
                info, use_ocdbt=True, global_shape=leaf.shape, local_shape=(leaf.parameter.rows, *leaf.shape[1:]),
                dtype=leaf.dtype, process_index=0, arg=ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES))
            array = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
            start = 0
            for piece in leaf.parameter.slices():
                while waiting and sum(size for _, size in waiting) + piece.nbytes > IN_FLIGHT_BYTES:
                    await self._landed(waiting)
                waiting.append((array[start : start + len(piece)].write(piece), piece.nbytes))
                start += len(piece)
        while waiting:
            await self._landed(waiting)
        return []

    async def _landed(self, waiting):
        future, size = waiting.popleft()
        await future
        self._advance(size)


def save(folder, parameters: Mapping[str, Slices], advance: Callable[[int], None] = lambda size: None) -> None:
    """Writes `{path: parameter}` to a new `folder`, holding a few slices in memory at a time, and reads one of them
    back.

    advance: called with a number of bytes whenever they have been written.

    Raises `storage.NotWritten` if that cannot be read, ValueError for a folder that cannot have a checkpoint in it.
    """
    files.require_local({"folder": folder})
    jax_arrays = ocp.type_handlers.get_type_handler(jax.Array)  # there are none; Orbax warns if it cannot write them
    handlers = ocp.type_handlers.create_type_handler_registry(
        (_Leaf, _LeafHandler(advance)), (jax.Array, jax_arrays))
    # Weights in float16 and bfloat16 hardly compress, and zstd would cost more time than the disk.
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False)
    tree = trees.unflatten({path: _Leaf(parameter) for path, parameter in parameters.items()})
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(storage.local(folder), args=ocp.args.PyTreeSave(tree))
    storage.read_back(folder)


def metadata(folder) -> dict[str, jax.ShapeDtypeStruct]:
    """`{path: shape and stored dtype}`. Raises FileNotFoundError if `folder` holds no checkpoint, ValueError if it is
    damaged, or if its name is one that Orbax cannot take."""
    return {path: leaf for path, (_, leaf) in _stored(folder).items()}


def _stored(folder) -> dict[str, tuple[str, jax.ShapeDtypeStruct]]:
    """`{path: (name on disk, shape and stored dtype)}`; raises as `metadata` does."""
    folder = storage.local(folder)
    if not (folder / "_METADATA").exists():
        raise FileNotFoundError(f"{folder} holds no Orbax checkpoint (it has no file _METADATA). "
                                "Make one with `mmjax convert`.")
    _check_index(folder)
    with files.ignore_closed_event_loop(), ocp.PyTreeCheckpointer() as checkpointer:
        item = checkpointer.metadata(folder).item_metadata
        if item is None:
            _let_reads_end()
    if item is None:  # Orbax has logged why
        raise ValueError(f"{folder} is damaged: Orbax cannot read which parameters it has. Convert or copy it again.")
    return {format1.rename(name): (name, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            for name, leaf in trees.flatten(item.tree).items()}


def _check_index(folder: storage.LocalPath) -> None:
    """Raises ValueError if the description of an array in `folder` cannot be read.

    Orbax reads all of them at once and closes its event loop when the first one fails. TensorStore then answers the
    others to a closed loop, which Python reports as an error of whatever runs at that moment. So what is damaged must
    be found before Orbax is asked.
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
    """The parameters of `folder` as nested dicts of jax arrays.

    shapes: flat or nested tree of `jax.ShapeDtypeStruct`: the wanted shape, dtype (cast while reading) and, optionally,
            sharding, of which each device reads its own slice (default: everything on the first device).
            A matrix that is to be an `Int8` is given as one (`int8.shapes`); of a stacked one a few layers at a time
            are read and quantised, so that no device holds more than those in the stored dtype
    only:   which of these paths to read

    Raises ValueError naming every parameter that is missing or has another shape, or the folder if it is damaged.
    """
    wanted = {path: shape for path, shape in trees.flatten(shapes).items() if only(path)}
    stored = metadata(folder)
    wrong = trees.compare(wanted, {path: stored[path] for path in wanted.keys() & stored.keys()})
    if wrong:
        raise ValueError(f"{len(wrong)} parameters of the model cannot be read from {folder}:\n  " + "\n  ".join(wrong)
                         + "\nConvert the checkpoint that belongs to this architecture, or change the architecture.")
    if not wanted:
        return {}
    quantised = {path: shape for path, shape in wanted.items() if isinstance(shape, Int8)}
    plain = {path: shape for path, shape in wanted.items() if path not in quantised}
    try:
        flat = _restore(folder, plain) if plain else {}
        if quantised:
            stored = arrays(folder)
            flat |= {path: _restore_int8(stored[path], shape) for path, shape in quantised.items()}
    except ValueError as error:
        raise ValueError(f"{folder} is damaged; convert or copy it again. {error}") from error
    return trees.unflatten(flat)


def _restore(folder, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def how(shape):
        return ocp.ArrayRestoreArgs(
            restore_type=jax.Array, dtype=shape.dtype, sharding=getattr(shape, "sharding", None) or default,
            global_shape=shape.shape)

    names = {path: name for path, (name, _) in _stored(folder).items() if path in wanted}
    wanted = trees.unflatten({names[path]: shape for path, shape in wanted.items()})
    restore_args = ocp.args.PyTreeRestore(wanted, restore_args=jax.tree.map(how, wanted), partial_restore=True)
    with files.ignore_closed_event_loop(), ocp.PyTreeCheckpointer() as checkpointer:
        try:
            read = trees.flatten(checkpointer.restore(storage.local(folder), args=restore_args))
            return {path: read[name] for path, name in names.items()}
        except Exception as error:  # Orbax wraps TensorStore's ValueError in a bare Exception
            if not isinstance(error.__cause__ or error, ValueError):
                raise
            cause = str(error.__cause__ or error)  # the error itself would keep the reads that have not ended
        _let_reads_end()
    raise ValueError(cause)


def _let_reads_end() -> None:
    """When Orbax has raised: until TensorStore has answered for the arrays that Orbax no longer waits for."""
    time.sleep(LATE_SECONDS)
    gc.collect()


def _restore_int8(stored: ts.TensorStore, wanted: Int8) -> Int8:
    """Whatever the mesh, every device reads its own slices, and those that share a channel agree on its scale."""
    length, place = wanted.shape[0], wanted.values.sharding
    divisible = wanted.scale.shape[0] == length and place.spec[0] is None
    rows = max(1, SLICE_BYTES * length // (stored.dtype.numpy_dtype.itemsize * stored.size)) if divisible else length
    empty, fill = _filling(wanted)
    whole = empty()
    for start in range(0, length, rows):
        whole = fill(whole, _read(stored[start : min(start + rows, length)].translate_to[0], place), start)
    return whole


def _read(stored: ts.TensorStore, place: jax.sharding.NamedSharding) -> jax.Array:
    """On the mesh; what several devices of this process hold is read once."""

    @functools.cache
    def read(*bounds: tuple[int, int]) -> np.ndarray:
        return stored[tuple(slice(*pair) for pair in bounds)].read().result()

    return jax.make_array_from_callback(
        stored.shape, place, lambda index: read(*((part.start, part.stop) for part in index)))


@functools.cache
def _filling(wanted: Int8) -> tuple[Callable[[], Int8], Callable[[Int8, jax.Array, int], Int8]]:
    """Compiled: an empty one; and one with a part put, quantised, at a place along its first axis."""
    places = jax.tree.map(lambda part: part.format, wanted)
    axes = tuple(axis for axis, size in enumerate(wanted.scale.shape) if size == 1)

    def empty() -> Int8:
        return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), wanted)

    def fill(whole: Int8, w: jax.Array, start: int) -> Int8:
        return jax.tree.map(lambda all, part: jax.lax.dynamic_update_slice_in_dim(all, part, start, axis=0),
                            whole, int8.quantise(w, axes))

    return jax.jit(empty, out_shardings=places), jax.jit(fill, out_shardings=places, donate_argnums=0)


def arrays(folder) -> dict[str, ts.TensorStore]:
    """`{path: array}`, opened but not read: `array[i].read().result()` reads one slice of a stacked parameter.

    For folders that `save` wrote.
    """
    stored = {path: name for path, (name, _) in _stored(folder).items()}
    found = storage.arrays(folder, stored.values())
    return {path: found[name] for path, name in stored.items()}
