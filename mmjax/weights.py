"""The frozen checkpoint: written slice by slice, read straight onto the devices.

The folder is a standard Orbax checkpoint (OCDBT, one zarr array a parameter, a tree of nested dicts), so
`orbax.checkpoint.StandardCheckpointer().restore(folder)` reads it too. Orbax itself writes a leaf only from an array
that is wholly in memory; `save` therefore registers its own leaf type through Orbax's public `TypeHandler` interface.
The handler opens the array that Orbax would have opened (`type_handlers.get_json_tspec_write`) and writes it slice by
slice; folder layout, tree metadata and the final commit stay Orbax's.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from mmjax import trees

CHUNK_BYTES = 16 * 2**20  # largest piece of an array that is stored, and read, as one
IN_FLIGHT_BYTES = 128 * 2**20  # slices handed to the file system whose writing has not ended


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
    """Writes `{path: parameter}` to a new `folder`, holding a few slices in memory at a time.

    advance: called with a number of bytes whenever they have been written.
    """
    jax_arrays = ocp.type_handlers.get_type_handler(jax.Array)  # there are none; Orbax warns if it cannot write them
    handlers = ocp.type_handlers.create_type_handler_registry(
        (_Leaf, _LeafHandler(advance)), (jax.Array, jax_arrays))
    # Weights in float16 and bfloat16 hardly compress, and zstd would cost more time than the disk.
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False)
    tree = trees.unflatten({path: _Leaf(parameter) for path, parameter in parameters.items()})
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(epath.Path(folder).absolute(), args=ocp.args.PyTreeSave(tree))


def metadata(folder) -> dict[str, jax.ShapeDtypeStruct]:
    """`{path: shape and stored dtype}`. Raises FileNotFoundError if `folder` holds no checkpoint."""
    folder = epath.Path(folder).absolute()
    if not (folder / "_METADATA").exists():
        raise FileNotFoundError(f"{folder} holds no Orbax checkpoint (it has no file _METADATA). "
                                "Make one with `mmjax convert`.")
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in trees.flatten(tree).items()}


def restore(folder, shapes: Mapping[str, Any], only: Callable[[str], bool] = lambda path: True) -> dict[str, Any]:
    """The parameters of `folder` as nested dicts of jax arrays.

    shapes: flat or nested tree of `jax.ShapeDtypeStruct`: the wanted shape, dtype (cast while reading) and, optionally,
            sharding, of which each device reads its own slice (default: everything on the first device)
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
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def how(shape):
        return ocp.ArrayRestoreArgs(
            restore_type=jax.Array, dtype=shape.dtype, sharding=getattr(shape, "sharding", None) or default,
            global_shape=shape.shape)

    wanted = trees.unflatten(wanted)
    restore_args = ocp.args.PyTreeRestore(wanted, restore_args=jax.tree.map(how, wanted), partial_restore=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        try:
            return checkpointer.restore(epath.Path(folder).absolute(), args=restore_args)
        except Exception as error:  # Orbax wraps TensorStore's ValueError in a bare Exception
            cause = error.__cause__ or error
            if not isinstance(cause, ValueError):
                raise
            raise ValueError(f"{folder} is damaged; convert or copy it again. {cause}") from error


def arrays(folder) -> dict[str, ts.TensorStore]:
    """`{path: array}`, opened but not read: `array[i].read().result()` reads one slice of a stacked parameter.

    For folders that `save` wrote: relies on Orbax keeping a parameter as a zarr array under its path joined with dots.
    """
    base = epath.Path(folder).absolute().as_uri() + "/"

    def spec(path):
        return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": path.replace("/", ".") + "/"}}

    opening = {path: ts.open(spec(path), read=True) for path in metadata(folder)}
    return {path: future.result() for path, future in opening.items()}
