"""Layers that the models share.

B batch   T tokens   D model   F feed-forward   N heads   H head

Weights are cast to the dtype of the activations; norms are computed in float32; a float32 product never
uses TF32 or bfloat16. Dropout is active where the caller passes its random stream, so a part without a stream stays
in evaluation mode.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.custom_derivatives import SymbolicZero

from mmjax.models import int8
from mmjax.models.int8 import Int8


def einsum(letters: str, x: jax.Array, w: jax.Array | Int8, dtype: jnp.dtype | None = None) -> jax.Array:
    """Returns `jnp.einsum` at full precision if `x` is float32; the factors have the dtype of `x`.

    dtype: of the result, without rounding to another one in between; None: that of `x`

    The result must keep the output axes of an `Int8` in their order.
    """
    dtype = x.dtype if dtype is None else dtype
    if isinstance(w, Int8):
        return _einsum_int8(letters, dtype, x, w)
    if x.dtype == jnp.float32:
        return jnp.einsum(letters, x, w.astype(x.dtype), precision="highest").astype(dtype)
    if x.dtype == w.dtype == dtype:
        return _multiply(letters, x, w, dtype)
    return _mixed_einsum(letters, dtype, x, w)


def _multiply(letters: str, x: jax.Array, w: jax.Array, dtype: jnp.dtype) -> jax.Array:
    # XLA accumulates bfloat16 products in float32. On a CPU that must be requested, or it converts both matrices first.
    sums = jnp.float32 if dtype == jnp.float32 or on_cpu() else None
    return jnp.einsum(letters, x, w.astype(x.dtype), preferred_element_type=sums).astype(dtype)


# JAX would multiply a float32 gradient of a bfloat16 product as float32. This rounds it first, as the forward pass
# rounds its factors. The gradient of a float32 matrix is summed in float32, also over devices. Only the gradients that
# are needed are products of the program.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mixed_einsum(letters: str, dtype: jnp.dtype, x: jax.Array, w: jax.Array) -> jax.Array:
    return _multiply(letters, x, w, dtype)


def _mixed_einsum_forward(letters: str, dtype: jnp.dtype, x: Any, w: Any) -> tuple[jax.Array, Any]:
    saved = x.value if w.perturbed else None, w.value if x.perturbed else None
    dtypes = jnp.zeros((0,), x.value.dtype), jnp.zeros((0,), w.value.dtype)
    return _multiply(letters, x.value, w.value, dtype), (saved, dtypes)


def _mixed_einsum_backward(letters: str, dtype: jnp.dtype, factors: Any, dy: Any) -> tuple[Any, Any]:
    (x, w), (of_x, of_w) = factors
    if isinstance(dy, SymbolicZero):
        return None, None
    x_axes, w_axes, y_axes = letters.replace("->", ",").split(",")
    dy = dy.astype(of_x.dtype)
    return (None if w is None else _multiply(f"{y_axes},{w_axes}->{x_axes}", dy, w, of_x.dtype),
            None if x is None else _multiply(f"{x_axes},{y_axes}->{w_axes}", x, dy, of_w.dtype))


_mixed_einsum.defvjp(_mixed_einsum_forward, _mixed_einsum_backward, symbolic_zeros=True)


def on_cpu() -> bool:
    """Returns whether the current trace is for a CPU: the platform of the mesh, or without a mesh JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.platform if device else jax.default_backend()) == "cpu"


# Saves only the inputs for the backward pass: by default jax would save the matrix in the dtype of `x`.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(0, 1))
def _einsum_int8(letters: str, dtype: jnp.dtype, x: jax.Array, w: Int8) -> jax.Array:
    _, w_axes, y_axes = letters.replace("->", ",").split(",")
    channels = dict(zip(w_axes, w.scale.shape, strict=True))
    scale = w.scale.reshape([channels.get(axis, 1) for axis in y_axes])
    return (einsum(letters, x, w.values, jnp.float32) * scale).astype(dtype)


def in_float32(operation: Callable[..., jax.Array], x: jax.Array, parameter: jax.Array) -> jax.Array:
    """Returns an elementwise operation on `x` and a parameter that broadcasts to it, computed in float32, in the dtype
    of `x`.

    For two bfloat16 operands the result is that of bfloat16. The gradient of a float32 parameter is summed in float32,
    also over devices.
    """
    return operation(x.astype(jnp.float32), parameter.astype(jnp.float32)).astype(x.dtype)


def repeat_rows(parameter: jax.Array, rows: int, dtype: jnp.dtype) -> jax.Array:
    """Returns `rows` copies of a parameter along a new first axis; its gradient is summed in the parameter's dtype."""
    return jnp.broadcast_to(parameter, (rows, *parameter.shape)).astype(dtype)


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
        return in_float32(jnp.add, y, self.b) if self.use_bias else y

    def matmul(self, letters: str, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """Returns the product with the matrix, without the bias. dtype: of the result, see `einsum`"""
        kept = x.shape[: x.ndim - self.contracted]
        if math.prod(kept) == 1 and x.dtype != jnp.float32 and on_cpu():  # XLA multiplies one row ten times slower
            return self.matmul(letters, jnp.concatenate([x, x]), dtype)[:1]
        if not self.transposed:
            return einsum(letters, x, self.w, dtype)
        y = einsum("XI,OI->XO", x.reshape(math.prod(kept), -1), self.w, dtype)
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
        return in_float32(jnp.multiply, normed.astype(x.dtype), scale)


def gelu(x: jax.Array) -> jax.Array:
    """Returns the exact GELU, x · (1 + erf(x / sqrt 2)) / 2, computed in float32 as torch computes it.

    `jax.nn.gelu(approximate=False)` is x · erfc(-x / sqrt 2) / 2. On a TPU erfc costs a quarter of ViT-G's forward
    pass, and in bfloat16 it is less accurate.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


class FeedForward(nn.Module):
    """fc2(activation(fc1(x))) with biases; F = `hidden`."""

    hidden: int
    activation: Callable[[jax.Array], jax.Array] = gelu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D, F = x.shape[-1], self.hidden
        h = Project((D, F), use_bias=True, name="fc1")("BTD,DF->BTF", x)
        return Project((F, D), use_bias=True, name="fc2")("BTF,FD->BTD", self.activation(h))


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
