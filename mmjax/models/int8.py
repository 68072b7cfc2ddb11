"""Matrices stored as int8, half the size of bfloat16: `w ≈ values · scale`, with one scale per output channel.

A product needs no copy of the matrix in another dtype, because the scale is constant along the contracted axes:
`x @ w ≈ (x @ values) · scale`; see `mmjax.models.layers.einsum`. Such matrices are never trained.

B batch   T tokens   D model   F feed-forward   N heads   H head   V vocabulary   S queries, keys, values
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec

from mmjax import trees

Matrices = Sequence[tuple[str, tuple[int, ...]]]  # (path rule, contracted axes)

LANES = 128  # of a TPU's tile
MAX_VALUE = 127  # -128 is not used, so that a matrix and its negative round alike
MATRICES = (  # of encoders: parameters that can be stored as int8, and their contracted axes, counted from the end
    (r"(?!llm/).*/(attn|cross)/[qkv]/w", (-3,)),  # D N H
    (r"(?!llm/).*/attn/qkv/w", (-4,)),  # D S N H
    (r"(?!llm/).*/(attn|cross)/o/w", (-3, -2)),  # N H D
    (r"(?!llm/)(.*/mlp|bind/block_\d+)/(gate|up|down|fc1|fc2)/w", (-2,)),  # D F, F D
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A quantised matrix: one leaf of a parameter tree with the matrix's shape, and a pytree of two arrays.

    values: int8, in -127 .. 127. It is first because flax compares a parameter's shape with that of its first array
    scale:  float32, of size 1 along the contracted axes
    """

    values: Any
    scale: Any

    shape = property(lambda self: self.values.shape)
    dtype = property(lambda self: self.values.dtype)
    size = property(lambda self: self.values.size)
    nbytes = property(lambda self: self.values.nbytes + self.scale.nbytes)


def holds(path: str, matrices: Matrices) -> bool:
    """Returns whether the parameter at a path is one of `matrices`, such as `Family.all_matrices(cfg)`."""
    return trees.matches(path, (pattern for pattern, _ in matrices))


def summed(path: str, rank: int, matrices: Matrices) -> tuple[int, ...]:
    """Returns the contracted axes, from 0 on, of the matrix at a path. Raises KeyError if it is not in `matrices`."""
    return tuple(rank + axis for axis in trees.lookup(path, matrices))


def quantise(w: jax.Array, axes: tuple[int, ...]) -> Int8:
    """Quantises a matrix with the contracted `axes`. The error is at most half a scale, 1/254 of a channel's maximum.

    A channel of zeros has scale 0. A channel with a non-finite value has a non-finite scale, so that its results are
    not finite either.
    """
    wide = w.astype(jnp.float32)
    scale = jnp.abs(wide).max(axes, keepdims=True) / MAX_VALUE
    return Int8(jnp.round(wide / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale)


def wide(w: Int8) -> jax.Array:
    """Returns the matrix in float32."""
    return w.values.astype(jnp.float32) * w.scale


def shapes(shape: tuple[int, ...], sharding: NamedSharding, axes: tuple[int, ...]) -> Int8:
    """Returns the `Int8` of a matrix with the contracted `axes` as two `jax.ShapeDtypeStruct`s with their formats.

    sharding: of the matrix; the scales are sharded like their channels
    """
    spec = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    scales = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    of_scales = NamedSharding(
        sharding.mesh, PartitionSpec(*(None if axis in axes else name for axis, name in enumerate(spec))))
    return Int8(jax.ShapeDtypeStruct(shape, jnp.int8, sharding=ordered(shape, sharding, axes)),
                jax.ShapeDtypeStruct(scales, jnp.float32, sharding=of_scales))


def ordered(shape: tuple[int, ...], sharding: NamedSharding, axes: tuple[int, ...]) -> NamedSharding | Format:
    """Returns the sharding of a frozen matrix with the contracted `axes`, on a TPU with its memory layout."""
    layout = order(shape, axes) if sharding.mesh.devices.flat[0].platform == "tpu" else None
    return sharding if layout is None else Format(layout, sharding)


def order(shape: tuple[int, ...], axes: tuple[int, ...]) -> Layout | None:
    """Returns the memory layout for a TPU: the contracted axes just before the last one; None: the default layout.

    A TPU stores tiles of the last two axes and multiplies them as they are. With heads of size 128, [L,D,N,H] in the
    default layout would be copied to L N D H in every step, all layers at once (7B: 1.6 GB).
    """
    last = len(shape) - 1
    if last in axes or shape[last] % LANES:
        return None
    return Layout((*(axis for axis in range(last) if axis not in axes), *axes, last))


