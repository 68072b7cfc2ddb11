"""Parameters from where they lie onto the devices: each in its dtype, straight onto its place on the mesh."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax import sharding, trees
from mmjax.checkpoints import frozen as frozen_weights
from mmjax.checkpoints.converted import Checkpoint
from mmjax.families import FAMILIES, initial
from mmjax.families import shapes as family_shapes
from mmjax.models import int8
from mmjax.models.int8 import Int8


def read_params(
    source: Checkpoint,
    module: nn.Module,
    mesh: jax.sharding.Mesh,
    dtype: Callable[[str], Any],
    init_fresh: int | None = None,
    trained: Mapping[str, Any] | None = None,
    only: Callable[[str], bool] = lambda path: True,
) -> dict[str, Any]:
    """All parameters of `module`, or some, each straight onto its place on the mesh.

    dtype:      of the parameter at a path; int8 makes an `Int8` of it, which only some can be (see `frozen_kind`)
    init_fresh: seed for the parameters that no source file held; None raises ValueError naming them
    trained:    `{path: array}` that take the place of the checkpoint's, such as an earlier run's; ValueError names what
                does not belong to this model
    only:       which paths
    """
    trained = trained or {}
    fresh = [path for path in source.fresh if path not in trained and only(path)]
    if fresh and init_fresh is None:
        raise ValueError(
            f"{source.folder} was converted without {', '.join(fresh)}. Convert it with the trained "
            "file (--projector, --lora, --adapter), load the run that trained them, or start them anew with "
            "init_fresh=SEED.")
    family = FAMILIES[source.family]
    shapes = family_shapes(source.family, module.cfg)
    placed = sharding.shardings(shapes, family.AXES, mesh)
    wanted = {path: as_held(path, shape.shape, dtype(path), placed[path])
              for path, shape in shapes.items() if only(path)}
    places = {path: jax.tree.map(lambda leaf: leaf.format, held) for path, held in wanted.items()}
    if wrong := trees.compare({path: shapes[path] for path in trained.keys() & shapes.keys()}, trained):
        raise ValueError("The trained parameters are of another model:\n  " + "\n  ".join(wrong))
    flat = trees.flatten(frozen_weights.restore(
        source.folder / "weights", wanted, only=lambda path: path not in trained and path not in fresh))
    flat |= {path: jax.device_put(cast(path, leaf, wanted[path]), places[path])
             for path, leaf in trained.items() if only(path)}

    def start() -> dict[str, jax.Array]:
        every = trees.flatten(initial(source.family, module.cfg)(jax.random.key(init_fresh)))
        return {path: cast(path, every[path], wanted[path]) for path in fresh}

    if fresh:
        flat |= jax.jit(start, out_shardings={path: places[path] for path in fresh})()
    return trees.unflatten(flat)


def frozen_kind(path: str, dtype: Any, frozen_dtype: str | None) -> Any:
    """The dtype of a frozen parameter: int8 if it is to be and `int8.MATRICES` has it, or `dtype`."""
    return jnp.int8 if frozen_dtype == "int8" and int8.holds(path) else dtype


def as_held(path: str, shape: tuple[int, ...], dtype: Any, place: Any) -> Any:
    """What a parameter is to be on the devices: `jax.ShapeDtypeStruct`, or an `Int8` of two."""
    if jnp.dtype(dtype) == jnp.int8:
        return int8.shapes(shape, place, int8.summed(path, len(shape)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def cast(path: str, leaf: jax.Array, held: Any) -> Any:
    """A parameter as it is to be held."""
    return int8.quantise(leaf, int8.summed(path, leaf.ndim)) if isinstance(held, Int8) else leaf.astype(held.dtype)
