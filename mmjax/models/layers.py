"""Layers that the models share.

B batch   T query tokens   S key tokens   D model   F feed-forward
N query heads   K key and value heads   G = N/K   H head

Weights are cast to the dtype of the activations; norms and softmax are computed in float32; a float32 product never
uses TF32 or bfloat16. Dropout is active where the caller passes its random stream, so a part without a stream stays
in evaluation mode.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mmjax.models import int8
from mmjax.models.int8 import Int8


def einsum(letters: str, x: jax.Array, w: jax.Array | Int8) -> jax.Array:
    """Returns `jnp.einsum` in the dtype of `x`, at full precision if that is float32.

    The result must keep the output axes of an `Int8` in their order.
    """
    if isinstance(w, Int8):
        return _einsum_int8(letters, x, w)
    if x.dtype == jnp.float32:
        return jnp.einsum(letters, x, w.astype(x.dtype), precision="highest")
    # XLA accumulates bfloat16 products in float32. On a CPU that must be requested, or it converts both matrices first.
    sums = jnp.float32 if on_cpu() else None
    return jnp.einsum(letters, x, w.astype(x.dtype), preferred_element_type=sums).astype(x.dtype)


def on_cpu() -> bool:
    """Returns whether the current trace is for a CPU: the platform of the mesh, or without a mesh JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.platform if device else jax.default_backend()) == "cpu"


# Saves only the inputs for the backward pass: by default jax would save the matrix in the dtype of `x`.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def _einsum_int8(letters: str, x: jax.Array, w: Int8) -> jax.Array:
    _, w_axes, y_axes = letters.replace("->", ",").split(",")
    channels = dict(zip(w_axes, w.scale.shape, strict=True))
    scale = w.scale.reshape([channels.get(axis, 1) for axis in y_axes])
    return (einsum(letters, x, w.values).astype(jnp.float32) * scale).astype(x.dtype)


def embedding_lookup(table: jax.Array | Int8, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the rows of a table [V,D]: int[...] -> [...,D] in a dtype."""
    rows = jax.tree.map(lambda leaf: jnp.take(leaf, tokens, axis=0), table)
    return (int8.wide(rows) if isinstance(rows, Int8) else rows).astype(dtype)


def uniform_fan_in(fan_in: int) -> Callable[..., jax.Array]:
    """Returns the initializer U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch.nn.Linear's for its weight and its bias."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class Project(nn.Module):
    """A linear map whose axes are named by the caller: `Project((D, N, H))("BTD,DNH->BTNH", x)`.

    shape:      the weight's axes, inputs first, `contracted` of them
    zero_bias:  initialize the bias with zeros instead of as torch.nn.Linear does
    transposed: the weight is stored as a matrix [outputs, inputs] (see `transpose_weight`); the axes of the product are
                then the axes of `x` that are not contracted, followed by the outputs
    """

    shape: tuple[int, ...]
    contracted: int = 1
    use_bias: bool = False
    zero_bias: bool = False
    transposed: bool = False

    def setup(self):
        fan_in = math.prod(self.shape[: self.contracted])
        stored = (math.prod(self.shape) // fan_in, fan_in) if self.transposed else self.shape
        self.w = self.param("w", uniform_fan_in(fan_in), stored)
        if self.use_bias:
            start = nn.initializers.zeros_init() if self.zero_bias else uniform_fan_in(fan_in)
            self.b = self.param("b", start, self.shape[self.contracted :])

    def __call__(self, letters: str, x: jax.Array) -> jax.Array:
        y = self.matmul(letters, x)
        return y + self.b.astype(y.dtype) if self.use_bias else y

    def matmul(self, letters: str, x: jax.Array) -> jax.Array:
        """Returns the product with the matrix, without the bias."""
        kept = x.shape[: x.ndim - self.contracted]
        if math.prod(kept) == 1 and x.dtype != jnp.float32 and on_cpu():
            return self.matmul(letters, jnp.concatenate([x, x]))[:1]  # XLA on a CPU multiplies one row ten times slower
        if not self.transposed:
            return einsum(letters, x, self.w)
        y = einsum("XI,OI->XO", x.reshape(math.prod(kept), -1), self.w)
        return y.reshape(*kept, *self.shape[self.contracted :])


def transpose_weight(w: jax.Array | Int8, inputs: int) -> jax.Array | Int8:
    """Returns a weight with `inputs` leading contracted axes as a matrix [outputs, inputs].

    XLA on a CPU multiplies a few rows with such a matrix up to 1.5 times as fast as with [inputs, outputs] (float32,
    8 rows: 10 to 15 GB/s of weights against 7 to 11), and one row or many rows equally fast.
    """
    return jax.tree.map(lambda leaf: leaf.reshape(math.prod(leaf.shape[:inputs]), -1).T, w)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, computed in float32 (two passes) and returned in the input's dtype."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:]).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:]).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """RMS norm: x / rms(x) in float32, cast to the input's dtype, then multiplied by the scale (LLaMA's order)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:])
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """Returns the exact GELU, by the error function."""
    return jax.nn.gelu(x, approximate=False)


class FeedForward(nn.Module):
    """fc2(activation(fc1(x))) with biases; F = `hidden`."""

    hidden: int
    activation: Callable[[jax.Array], jax.Array] = gelu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D, F = x.shape[-1], self.hidden
        h = Project((D, F), use_bias=True, name="fc1")("BTD,DF->BTF", x)
        return Project((F, D), use_bias=True, name="fc2")("BTF,FD->BTD", self.activation(h))


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    drop: Callable[[jax.Array], jax.Array] = lambda weights: weights,
) -> jax.Array:
    """Scaled dot-product attention. q [B,T,N,H], k and v [B,S,K,H], mask bool[B,T,S] (True is seen) -> [B,T,N,H].

    Key head j is shared by the query heads j·G .. j·G + G - 1. A query that sees nothing returns the mean of all
    values, as with the original's additive masks, and never NaN.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    # The head axes are moved before the token axis: XLA on a CPU is faster that way, and elsewhere equally fast.
    q = jnp.moveaxis(q.reshape(B, T, K, N // K, H) * H**-0.5, 1, 3)
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    scores = einsum("BKGTH,BKSH->BKGTS", q, k).astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = drop(jax.nn.softmax(scores, axis=-1).astype(v.dtype))
    return jnp.moveaxis(einsum("BKGTS,BKSH->BKGTH", weights, v), 3, 1).reshape(B, T, N, H)


class SelfAttention(nn.Module):
    """Attention without a mask; one matrix, with biases, computes queries, keys and values. [B,T,D] -> [B,T,D]."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D, N = x.shape[-1], self.heads
        H = D // N
        q, k, v = jnp.moveaxis(Project((D, 3, N, H), use_bias=True, name="qkv")("BTD,DSNH->BTSNH", x), 2, 0)
        return Project((N, H, D), contracted=2, use_bias=True, name="o")("BTNH,NHD->BTD", attend(q, k, v))


class Block(nn.Module):
    """The pre-norm block of a plain ViT (Dosovitskiy et al. 2020), with the signature that `nn.scan` needs."""

    heads: int
    hidden: int
    eps: float
    activation: Callable[[jax.Array], jax.Array] = gelu

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        x = x + SelfAttention(self.heads, name="attn")(LayerNorm(self.eps, name="norm1")(x))
        x = x + FeedForward(self.hidden, self.activation, name="mlp")(LayerNorm(self.eps, name="norm2")(x))
        return x, None


BLOCKS_AXES = (  # of `Block`s stacked as "blocks"
    (r"blocks/norm[12]/(scale|bias)", ("layer", "embed")),
    (r"blocks/attn/qkv/w", ("layer", "embed", "qkv", "heads", "head")),
    (r"blocks/attn/qkv/b", ("layer", "qkv", "heads", "head")),
    (r"blocks/attn/o/w", ("layer", "heads", "head", "embed")),
    (r"blocks/mlp/fc1/w", ("layer", "embed", "ff")),
    (r"blocks/mlp/fc1/b", ("layer", "ff")),
    (r"blocks/mlp/fc2/w", ("layer", "ff", "embed")),
    (r"blocks/(attn/o|mlp/fc2)/b", ("layer", "embed")),
)


def blocks(depth: int, heads: int, hidden: int, eps: float,
           activation: Callable[[jax.Array], jax.Array] = gelu) -> nn.Module:
    """Returns `depth` blocks as one module named "blocks", scanned over stacked weights: [B,T,D] -> ([B,T,D], None)."""
    stacked = nn.scan(Block, variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True}, length=depth)
    return stacked(heads, hidden, eps, activation, name="blocks")


def unit(x: jax.Array) -> jax.Array:
    """Returns the vectors along the last axis scaled to length 1, in float32."""
    wide = x.astype(jnp.float32)
    return wide / jnp.maximum(jnp.sqrt(jnp.square(wide).sum(-1, keepdims=True)), 1e-12)


def bicubic(source: int, target: int) -> np.ndarray:
    """Returns the matrix of torch's bicubic interpolation along one axis, float32[target, source].

    Keys' cubic with a = -0.75, half-pixel centres, taps clamped at the border, no antialiasing (`jax.image.resize`
    uses a = -0.5 and antialiases).
    """
    a = -0.75
    matrix = np.zeros((target, source))
    for row in range(target):
        centre = (row + 0.5) * source / target - 0.5
        left = int(np.floor(centre))
        for tap in range(left - 1, left + 3):
            d = abs(centre - tap)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[row, min(max(tap, 0), source - 1)] += near if d <= 1 else far
    return matrix.astype(np.float32)


def resize_positions(pos: jax.Array, target: int) -> jax.Array:
    """Resizes a position table [1 + n·n, D] -> [1 + target·target, D]; the class token's row is kept."""
    side = round((pos.shape[0] - 1) ** 0.5)
    if side == target:
        return pos
    matrix = bicubic(side, target)
    grid = pos[1:].astype(jnp.float32).reshape(side, side, -1)
    grid = jnp.einsum("hp,wq,pqD->hwD", matrix, matrix, grid, precision="highest")
    return jnp.concatenate([pos[:1], grid.reshape(target * target, -1).astype(pos.dtype)])
