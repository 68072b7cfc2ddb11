"""Matrices held as int8, half of what bfloat16 takes: `w ≈ values · scale`, one scale an output channel.

A product needs no copy of the matrix in another dtype, because a scale is the same for everything that is summed over:
`x @ w ≈ (x @ values) · scale`; see `mmjax.models.layers.einsum`. Such matrices are only read, never trained.

B batch   T tokens   D model   F feed-forward   N heads   H head   V vocabulary   S queries, keys, values
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec

from mmjax import trees

LANES = 128  # of a TPU's tile
MOST = 127  # of int8; -128 is not used, so that a matrix and its negative round alike
MATRICES = (  # that may be held so, and the axes that they sum over, counted from the end
    (r".*/(attn|cross)/[qkv]/w", (-3,)),  # D N H
    (r".*/attn/qkv/w", (-4,)),  # D S N H
    (r".*/(attn|cross)/o/w", (-3, -2)),  # N H D
    (r"(.*/mlp|bind/block_\d+)/(gate|up|down|fc1|fc2)/w|llm/head/w", (-2,)),  # D F, F D, D V
    (r"llm/embedding", (-1,)),  # V D: as a head it sums over D too
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A leaf of a parameter tree, of the matrix's own shape; to jax it is two arrays.

    values: int8, in -127 .. 127. First, because flax compares a parameter's shape with that of its first array
    scale:  float32, of extent 1 along the axes that are summed over
    """

    values: Any
    scale: Any

    shape = property(lambda self: self.values.shape)
    dtype = property(lambda self: self.values.dtype)
    size = property(lambda self: self.values.size)
    nbytes = property(lambda self: self.values.nbytes + self.scale.nbytes)


def holds(path: str) -> bool:
    """Whether the parameter at a path is one of `MATRICES`."""
    return trees.matches(path, (pattern for pattern, _ in MATRICES))


def summed(path: str, rank: int) -> tuple[int, ...]:
    """The axes, from 0 on, that the matrix at a path sums over. Raises KeyError if it is none of `MATRICES`."""
    return tuple(rank + axis for axis in trees.lookup(path, MATRICES))


def quantise(w: jax.Array, axes: tuple[int, ...]) -> Int8:
    """The nearest `Int8` of a matrix that sums over `axes`: off by half a scale at most, 1/254 of a channel's largest.

    A channel of zeros has the scale 0. One with a number that is not finite has a scale that is not, so that what it
    gives is not finite either.
    """
    wide = w.astype(jnp.float32)
    scale = jnp.abs(wide).max(axes, keepdims=True) / MOST
    return Int8(jnp.round(wide / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale)


def wide(w: Int8) -> jax.Array:
    """The matrix in float32."""
    return w.values.astype(jnp.float32) * w.scale


def shapes(shape: tuple[int, ...], place: NamedSharding, axes: tuple[int, ...]) -> Int8:
    """What a matrix that sums over `axes` is to be as an `Int8`: two `jax.ShapeDtypeStruct`s, with their formats.

    place: of the matrix; the scales lie where their channels do
    """
    spec = (*place.spec, *[None] * (len(shape) - len(place.spec)))
    scales = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    lies = NamedSharding(place.mesh, PartitionSpec(*(None if axis in axes else name for axis, name in enumerate(spec))))
    on_tpu = place.mesh.devices.flat[0].platform == "tpu"
    return Int8(jax.ShapeDtypeStruct(shape, jnp.int8, sharding=Format(order(shape, axes), place) if on_tpu else place),
                jax.ShapeDtypeStruct(scales, jnp.float32, sharding=lies))


def order(shape: tuple[int, ...], axes: tuple[int, ...]) -> Layout | None:
    """How a TPU wants a matrix in its memory: what is summed over just before the last axis; None: as it comes.

    A TPU keeps tiles of the last two axes and multiplies them as they are. Of heads of 128 wide, [L,D,N,H] as it comes
    would be copied into the order L N D H in every step, all layers at once (7B: 1.6 GB).
    """
    last = len(shape) - 1
    if last in axes or shape[last] % LANES:
        return None
    return Layout((*(axis for axis in range(last) if axis not in axes), *axes, last))


