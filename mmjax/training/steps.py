"""The loss and the training step: pure functions of a module, parameters and a batch.

B rows   T tokens   V vocabulary
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from mmjax import sharding, trees
from mmjax.batch import Batch
from mmjax.training import losses


def token_losses(logits: jax.Array, batch: Batch) -> jax.Array:
    """Returns the cross entropy of each next token in nats, float32[B,T-1]; 0 where it is no target.
    logits: float32[B,T,V]"""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch.tokens[:, 1:])
    return jnp.where(batch.loss_mask[:, 1:], losses, 0)


def loss(
    module: nn.Module,
    params: Any,
    batch: Batch,
    reduction: Literal["mean", "none"] = "mean",
    rngs: dict[str, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the next-token cross entropy: (loss, aux).

    "mean" is one number, the mean over the targets of the whole batch (of all devices). "none" is float32[B], each
    row's sum divided by its padded length - 1, ignored positions included (minigpt4/models/minigpt_base.py: forward).
    aux: "logits" float32[B,T,V], "tokens" the number of targets, "token_losses" float32[B,T-1].
    A batch without targets has loss 0 and zero gradients.
    """
    logits = module.apply({"params": params}, batch, rngs=rngs)
    losses = token_losses(logits, batch)
    count = batch.loss_mask[:, 1:].sum()
    total = losses.sum() / jnp.maximum(count, 1) if reduction == "mean" else losses.sum(-1) / (batch.padded_length - 1)
    return total, {"logits": logits, "tokens": count, "token_losses": losses}


def mean_loss(module: nn.Module, params: Any, batch: Batch, rngs: dict[str, jax.Array] | None = None) -> jax.Array:
    """Returns the "mean" of `loss` without computing the logits of all positions (`mmjax.training.losses`)."""
    hidden = module.apply({"params": params}, batch, rngs=rngs, method="hidden")
    targets = batch.loss_mask[:, 1:]
    weights = targets / jnp.maximum(targets.sum(), 1).astype(jnp.float32)

    def to_logits(hidden: jax.Array) -> jax.Array:
        return module.apply({"params": params}, hidden, method="logits")

    # The last position predicts nothing: it gets weight 0.
    tokens, weights = (jnp.pad(x, ((0, 0), (0, 1))) for x in (batch.tokens[:, 1:], weights))
    return losses.weighted_sum(to_logits, hidden, tokens, weights, sharding.num_batch_shards())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes; a training checkpoint contains exactly this.

    params: the trained parameters, None where a leaf is frozen
    key:    for dropout; each step folds its number in
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def start(trained: Any, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(jnp.int32(0), trained, optimizer.init(trained), jax.random.key(seed))


def train_step(module: nn.Module, optimizer: optax.GradientTransformation) -> Callable[..., tuple[TrainState, dict]]:
    """Returns a compiled `(state, frozen, batch, counts=None) -> (state, metrics)`, which donates the state's memory.

    Only trained parameters get gradients. Dropout is active in the parts that have a trained parameter. A step whose
    loss, gradients or updates are not finite, or that has no targets, changes neither parameters nor optimizer;
    `state.step` counts it.

    counts: a number of each process, see `distributed.ProcessCounts`

    metrics, the same on all devices:
    loss, grad_norm: float32
    tokens:          number of targets
    finite:          whether loss, gradients and updates are
    applied:         False if the step changed nothing
    gates:           of families with trained gates: mean of |tanh(gate)| of each layer after the step, float32[L]
    unusable:        the sum of `counts`, if they are given
    """

    def step(state: TrainState, frozen: Any, batch: Batch, counts: jax.Array | None = None) -> tuple[TrainState, dict]:
        parts = [part for part, leaves in state.params.items() if jax.tree.leaves(leaves)]
        rngs = dict(zip(parts, jax.random.split(jax.random.fold_in(state.key, state.step), len(parts)), strict=True))

        def objective(trained: Any) -> jax.Array:
            return mean_loss(module, trees.merge(trained, frozen), batch, rngs)

        value, grads = jax.value_and_grad(objective)(state.params)
        norm, tokens = optax.global_norm(grads), batch.loss_mask[:, 1:].sum()
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(optax.global_norm(updates))
        applied = finite & (tokens > 0)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(applied, new, old), (params, opt_state), (state.params, state.opt_state))
        metrics = {"loss": value, "tokens": tokens, "grad_norm": norm, "finite": finite, "applied": applied}
        if gates := open_gates(params, module.cfg.llm.gates):
            metrics["gates"] = jnp.concatenate(gates)
        if counts is not None:
            metrics["unusable"] = counts.sum()
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return jax.jit(step, donate_argnums=0)


def open_gates(trained: Any, patterns: Sequence[str]) -> list[jax.Array]:
    """Returns the mean of |tanh(gate)| of the layers of each trained gate, float32[L]; an empty list without gates.

    patterns: of the language model's gates, below `llm/`
    """
    return [jnp.abs(jnp.tanh(leaf)).mean(-1) for path, leaf in trees.flatten(trained).items()
            if leaf is not None and leaf.ndim > 1
            and path.startswith("llm/") and trees.matches(path.removeprefix("llm/"), patterns)]


@jax.jit
def fingerprint(tree: Any) -> jax.Array:
    """Returns a uint32 that changes when any bit of any leaf does (a weighted sum, not a cryptographic hash)."""

    def leaf_sum(leaf: jax.Array) -> jax.Array:
        dtype = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, dtype).astype(jnp.uint32)
        weights = jnp.zeros(bits.shape, jnp.uint32)
        for axis in range(bits.ndim):
            weights = weights * 31 + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(2_654_435_761)
        return (bits * (weights | 1)).sum(dtype=jnp.uint32)  # odd: an even weight would lose the highest bit

    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        total = total * jnp.uint32(31) + leaf_sum(leaf)
    return total
