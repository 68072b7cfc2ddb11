"""Cross entropy without all the logits: they are made where there are targets, a chunk of places at a time.

B rows   T places   D model   V vocabulary   G groups of rows   N = B·T/G places of a group   C places of a chunk

Of a training step's logits float32[B,T,V] only the targets' matter, often half of them, and of those only one number
each. Here the places with a weight are brought to the front of their group, and gone through chunk by chunk for as long
as there are any, so that float32[G,C,V] exist at a time and what is no target costs nothing. The gradient is made
beside the loss: nothing of the vocabulary's size is kept, and nothing is computed twice.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

CHUNKS, LEAST = 8, 256  # a group is cut into at most so many chunks of at least so many places


def weighted_sum(to_logits: Callable[[jax.Array], jax.Array], hidden: jax.Array, ids: jax.Array, weights: jax.Array,
                 groups: int = 1) -> jax.Array:
    """float32: the sum of weight · cross entropy of `ids` int[B,T], for logits of `hidden` [B,T,D] and weights [B,T].

    to_logits: [G,C,D] -> float32[G,C,V]; it may close over parameters, which get their gradients
    groups:    of rows that lie on the same devices; places move within their group alone

    Differentiable once, in `hidden` and in what `to_logits` closes over.
    """
    B, T, D = hidden.shape
    N = B * T // groups
    size = min(N, max(LEAST, -(-N // CHUNKS) // LEAST * LEAST))
    count = -(-N // size)
    order = jnp.argsort(weights.reshape(groups, N) == 0, axis=-1, stable=True)

    def chunks(x: jax.Array) -> jax.Array:
        """[B,T,...] -> [count,G,C,...], the places with a weight first."""
        x = x.reshape(groups, N, *x.shape[2:])
        rest = (1,) * (x.ndim - 2)
        x = jnp.take_along_axis(x, order.reshape(groups, N, *rest), axis=1)
        x = jnp.pad(x, ((0, 0), (0, count * size - N), *((0, 0) for _ in rest)))
        return jnp.moveaxis(x.reshape(groups, count, size, *x.shape[2:]), 1, 0)

    hidden = chunks(hidden)
    held_to_logits, held = jax.closure_convert(to_logits, hidden[0])
    return _of_chunks(held_to_logits, hidden, chunks(ids), chunks(weights), tuple(held))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_chunks(to_logits: Callable, hidden: jax.Array, ids: jax.Array, weights: jax.Array, held: Sequence[jax.Array]):
    """hidden [count,G,C,D]; to_logits(hidden[0], *held) -> float32[G,C,V]"""

    def add(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        found = jax.lax.cond(chunk[-1].any(), lambda: _of_chunk(to_logits, held, *chunk), lambda: jnp.float32(0))
        return total + found, None

    return jax.lax.scan(add, jnp.float32(0), (hidden, ids, weights))[0]


def _of_chunk(to_logits: Callable, held: Sequence[jax.Array], hidden: jax.Array, ids: jax.Array,
              weights: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(to_logits(hidden, *held), ids)
    return jnp.where(weights == 0, 0, weights * losses).sum()


def _forward(to_logits: Callable, hidden: Any, ids: Any, weights: Any, held: Sequence[Any]) -> tuple[jax.Array, Any]:
    """The sum, and its gradient by `hidden` and by those of `held` that are differentiated."""
    hidden, ids, weights = hidden.value, ids.value, weights.value
    wanted, held = [one.perturbed for one in held], [one.value for one in held]
    trained = [one for one, is_wanted in zip(held, wanted, strict=True) if is_wanted]

    def of(hidden: jax.Array, trained: Sequence[jax.Array], ids: jax.Array, weights: jax.Array) -> jax.Array:
        following = iter(trained)
        mixed = [next(following) if is_wanted else one for one, is_wanted in zip(held, wanted, strict=True)]
        return _of_chunk(to_logits, mixed, hidden, ids, weights)

    def add(sums: Any, chunk: Any) -> tuple[Any, jax.Array]:
        hidden, ids, weights = chunk
        nothing = jnp.float32(0), (jnp.zeros_like(hidden), jax.tree.map(jnp.zeros_like, trained))
        value, (by_hidden, by_trained) = jax.lax.cond(
            weights.any(), lambda: jax.value_and_grad(of, (0, 1))(hidden, trained, ids, weights), lambda: nothing)
        return jax.tree.map(jnp.add, sums, (value, by_trained)), by_hidden

    start = jnp.float32(0), jax.tree.map(jnp.zeros_like, trained)
    (total, by_trained), by_hidden = jax.lax.scan(add, start, (hidden, ids, weights))
    following = iter(by_trained)
    return total, (by_hidden, tuple(next(following) if is_wanted else None for is_wanted in wanted))


def _backward(to_logits: Callable, kept: Any, scale: jax.Array) -> tuple[Any, ...]:
    by_hidden, by_held = jax.tree.map(lambda gradient: (gradient * scale).astype(gradient.dtype), kept)
    return by_hidden, None, None, by_held


_of_chunks.defvjp(_forward, _backward, symbolic_zeros=True)
