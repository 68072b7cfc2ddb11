"""Chunked cross entropy: logits are computed for targets only, one chunk of positions at a time.

B rows   T positions   D model   V vocabulary   G groups of rows   N = B·T/G positions in a group   C in a chunk

The loss needs only the logits of targets, often half of float32[B,T,V]. `weighted_sum` moves the positions with a
weight to the front of their group and processes chunks while any are left, so only float32[G,C,V] exist at a time and
other positions cost nothing. The gradient is computed together with the loss: nothing of the vocabulary's size is kept,
and nothing is computed twice.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

MAX_CHUNKS, MIN_CHUNK = 8, 256  # chunks of a group, positions of a chunk


def weighted_sum(to_logits: Callable[[jax.Array], jax.Array], hidden: jax.Array, tokens: jax.Array, weights: jax.Array,
                 groups: int = 1) -> jax.Array:
    """Returns the sum of weight · cross entropy, float32, of `tokens` int[B,T], given `hidden` [B,T,D], weights [B,T].

    to_logits: [G,C,D] -> float32[G,C,V]; it may close over parameters, which get their gradients
    groups:    number of groups of rows that share devices; positions move within their group only

    Differentiable once, in `hidden` and in what `to_logits` closes over.
    """
    B, T, D = hidden.shape
    N = B * T // groups
    size = min(N, max(MIN_CHUNK, -(-N // MAX_CHUNKS) // MIN_CHUNK * MIN_CHUNK))
    count = -(-N // size)
    order = jnp.argsort(weights.reshape(groups, N) == 0, axis=-1, stable=True)

    def chunks(x: jax.Array) -> jax.Array:
        """[B,T,...] -> [count,G,C,...], the positions with a weight first."""
        x = x.reshape(groups, N, *x.shape[2:])
        rest = (1,) * (x.ndim - 2)
        x = jnp.take_along_axis(x, order.reshape(groups, N, *rest), axis=1)
        x = jnp.pad(x, ((0, 0), (0, count * size - N), *((0, 0) for _ in rest)))
        return jnp.moveaxis(x.reshape(groups, count, size, *x.shape[2:]), 1, 0)

    hidden = chunks(hidden)
    converted, closure = jax.closure_convert(to_logits, hidden[0])
    return _sum_chunks(converted, hidden, chunks(tokens), chunks(weights), tuple(closure))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_chunks(to_logits: Callable, hidden: jax.Array, tokens: jax.Array, weights: jax.Array,
                closure: Sequence[jax.Array]):
    """hidden [count,G,C,D]; to_logits(hidden[0], *closure) -> float32[G,C,V]"""

    def add(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        value = jax.lax.cond(chunk[-1].any(), lambda: _sum_chunk(to_logits, closure, *chunk), lambda: jnp.float32(0))
        return total + value, None

    return jax.lax.scan(add, jnp.float32(0), (hidden, tokens, weights))[0]


def _sum_chunk(to_logits: Callable, closure: Sequence[jax.Array], hidden: jax.Array, tokens: jax.Array,
               weights: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(to_logits(hidden, *closure), tokens)
    return jnp.where(weights == 0, 0, weights * losses).sum()


def _forward(to_logits: Callable, hidden: Any, tokens: Any, weights: Any,
             closure: Sequence[Any]) -> tuple[jax.Array, Any]:
    """Returns the sum and its gradients with respect to `hidden` and the differentiated arrays of `closure`."""
    hidden, tokens, weights = hidden.value, tokens.value, weights.value
    perturbed, closure = [one.perturbed for one in closure], [one.value for one in closure]
    trained = [one for one, is_on in zip(closure, perturbed, strict=True) if is_on]

    def chunk_sum(hidden: jax.Array, trained: Sequence[jax.Array], tokens: jax.Array, weights: jax.Array) -> jax.Array:
        following = iter(trained)
        merged = [next(following) if is_on else one for one, is_on in zip(closure, perturbed, strict=True)]
        return _sum_chunk(to_logits, merged, hidden, tokens, weights)

    def add(sums: Any, chunk: Any) -> tuple[Any, jax.Array]:
        hidden, tokens, weights = chunk
        zeros = jnp.float32(0), (jnp.zeros_like(hidden), jax.tree.map(jnp.zeros_like, trained))
        value, (by_hidden, by_trained) = jax.lax.cond(
            weights.any(), lambda: jax.value_and_grad(chunk_sum, (0, 1))(hidden, trained, tokens, weights),
            lambda: zeros)
        return jax.tree.map(jnp.add, sums, (value, by_trained)), by_hidden

    start = jnp.float32(0), jax.tree.map(jnp.zeros_like, trained)
    (total, by_trained), by_hidden = jax.lax.scan(add, start, (hidden, tokens, weights))
    following = iter(by_trained)
    return total, (by_hidden, tuple(next(following) if is_on else None for is_on in perturbed))


def _backward(to_logits: Callable, saved: Any, scale: jax.Array) -> tuple[Any, ...]:
    by_hidden, by_closure = jax.tree.map(lambda gradient: (gradient * scale).astype(gradient.dtype), saved)
    return by_hidden, None, None, by_closure


_sum_chunks.defvjp(_forward, _backward, symbolic_zeros=True)
