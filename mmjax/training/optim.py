"""AdamW with the originals' parameter groups, learning rates and accumulation of gradients
(minigpt4/common/optims.py and runners/runner_base.py; imagebind_LLM/util/lr_sched.py and engine_finetune.py)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax import trees
from mmjax.config import OptimConfig

# What has one axis in the original, and every bias. A head gate has four there (1, N, 1, 1), a token gate has one.
NO_DECAY = (r".*/(b|q_b|v_b|bias|scale)", r"llm/(layers/)?gate")
# One parameter a layer in the original. Those of layers that read no prompts get no gradient, and torch skips them.
SKIPPED_WITHOUT_GRADIENT = (r"llm/layers/attn/(new_)?gate",)


def whole_cosine(cfg: OptimConfig, step: Any, xp: Any) -> Any:
    """MiniGPT-4's: linear warm-up counted within the epoch, so that it starts again at each epoch if it is longer than
    one; then a cosine over the whole run that the warm-up does not shift."""
    start = cfg.init_lr if cfg.warmup_lr < 0 else cfg.warmup_lr
    ramp = start + (cfg.init_lr - start) * (step % cfg.steps_per_epoch) / max(cfg.warmup_steps, 1)
    wave = cfg.min_lr + (cfg.init_lr - cfg.min_lr) * 0.5 * (1 + xp.cos(np.pi * step / cfg.steps))
    return xp.where(step < cfg.warmup_steps, xp.minimum(ramp, cfg.init_lr), wave)


def half_cycle(cfg: OptimConfig, step: Any, xp: Any) -> Any:
    """ImageBind-LLM's: a line from 0 (so the first step changes nothing), then half a cosine wave over the rest of the
    run. The steps of an accumulation window share the rate of its first."""
    if cfg.accumulate > 1:
        step = step - index_in_window(cfg, step)
    ramp = cfg.init_lr * step / max(cfg.warmup_steps, 1)
    along = (step - cfg.warmup_steps) / max(cfg.steps - cfg.warmup_steps, 1)
    wave = cfg.min_lr + (cfg.init_lr - cfg.min_lr) * 0.5 * (1 + xp.cos(np.pi * along))
    return xp.where(step < cfg.warmup_steps, ramp, wave)


SCHEDULES = {"whole_cosine": whole_cosine, "half_cycle": half_cycle}


def learning_rate(cfg: OptimConfig, step: Any, xp: Any = np) -> Any:
    """The rate in force at step `step` (0-based, over the whole run), by the config's schedule.

    `xp` is numpy (float64) or jax.numpy.
    """
    return SCHEDULES[cfg.schedule](cfg, step, xp)


def index_in_window(cfg: OptimConfig, step: Any) -> Any:
    """How many steps of the same accumulation window come before `step`."""
    return (step % cfg.steps_per_epoch if cfg.average else step) % cfg.accumulate


def decay_mask(params: Any) -> Any:
    """True where weight decay acts: the matrices, tables and head gates, not biases, norm scales and token gates."""
    return trees.map_with_path(lambda path, _: not trees.matches(path, NO_DECAY), params)


def weight_decay(share: float) -> optax.GradientTransformation:
    """Adds `share` of each parameter to Adam's step for it, as AdamW does, where the parameter decays."""

    def add(step: jax.Array, param: jax.Array, decays: bool, skipped: bool) -> jax.Array:
        if not decays:
            return step
        both = step + share * param
        return jnp.where(step == 0, 0, both) if skipped else both

    def update(steps: Any, params: Any) -> Any:
        skipped = trees.map_with_path(lambda path, _: trees.matches(path, SKIPPED_WITHOUT_GRADIENT), params)
        return jax.tree.map(add, steps, params, decay_mask(params), skipped)

    return optax.stateless(update)


class Accumulated(NamedTuple):
    """The state of `accumulated`."""

    step: jax.Array  # int32, over the whole run
    total: Any  # of the gradients of the window so far
    inner: Any


def accumulated(inner: optax.GradientTransformation, cfg: OptimConfig) -> optax.GradientTransformation:
    """`inner` at the last step of each window, with the window's gradients summed or averaged; no change before it.

    What `average` leaves over at the end of an epoch is dropped, because the next window forgets it.
    """

    def init(params: Any) -> Accumulated:
        return Accumulated(jnp.int32(0), jax.tree.map(jnp.zeros_like, params), inner.init(params))

    def update(gradients: Any, state: Accumulated, params: Any = None) -> tuple[Any, Accumulated]:
        place = index_in_window(cfg, state.step)
        share = 1 / cfg.accumulate if cfg.average else 1.0
        total = jax.tree.map(lambda old, new: jnp.where(place == 0, 0, old) + share * new, state.total, gradients)
        updates, inner_state = jax.lax.cond(
            place == cfg.accumulate - 1,
            lambda: inner.update(total, state.inner, params),
            lambda: (jax.tree.map(jnp.zeros_like, gradients), state.inner))
        return updates, Accumulated(state.step + 1, total, inner_state)

    return optax.GradientTransformation(init, update)


def optimizer(cfg: OptimConfig) -> optax.GradientTransformation:
    """For the trained part of the parameters alone (None where a leaf is frozen): no state exists for the rest.

    Raises ValueError for a schedule that does not exist, or for windows that no epoch is long enough to complete.
    """
    if cfg.schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule = {cfg.schedule!r}: choose one of {', '.join(SCHEDULES)}.")
    if cfg.average and cfg.accumulate > cfg.steps_per_epoch:
        raise ValueError(f"optim.accumulate = {cfg.accumulate} is more than optim.steps_per_epoch = "
                         f"{cfg.steps_per_epoch}. With optim.average a window ends with its epoch, so nothing would "
                         "ever be trained: lower optim.accumulate.")

    def rate(update: Any) -> Any:
        windows = cfg.steps_per_epoch // cfg.accumulate
        epoch, window = (update // windows, update % windows) if cfg.average else (0, update)
        last = epoch * cfg.steps_per_epoch + (window + 1) * cfg.accumulate - 1  # step that completes the window
        return learning_rate(cfg, last, jnp)

    clip = [] if cfg.clip is None else [optax.clip_by_global_norm(cfg.clip)]
    chain = optax.chain(
        *clip, optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps), weight_decay(cfg.weight_decay),
        optax.scale_by_learning_rate(rate))
    return chain if cfg.accumulate == 1 else accumulated(chain, cfg)
