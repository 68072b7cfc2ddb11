"""AdamW with the original projects' parameter groups, learning rates and gradient accumulation
(minigpt4/common/optims.py and runners/runner_base.py; imagebind_LLM/util/lr_sched.py and engine_finetune.py)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax import trees
from mmjax.config import OptimConfig
from mmjax.models.language_model import LanguageModelConfig

NO_DECAY = (r".*/(b|q_b|v_b|bias|scale)",)  # one axis in the original. A language model's config may add others


def whole_cosine(cfg: OptimConfig, step: Any, xp: Any) -> Any:
    """MiniGPT-4's schedule: a linear warm-up, then a cosine over the whole run that the warm-up does not shift.

    The warm-up counts steps within the epoch, so one longer than an epoch restarts with each epoch."""
    start = cfg.init_lr if cfg.warmup_lr < 0 else cfg.warmup_lr
    ramp = start + (cfg.init_lr - start) * (step % cfg.steps_per_epoch) / max(cfg.warmup_steps, 1)
    wave = cfg.min_lr + (cfg.init_lr - cfg.min_lr) * 0.5 * (1 + xp.cos(np.pi * step / cfg.steps))
    return xp.where(step < cfg.warmup_steps, xp.minimum(ramp, cfg.init_lr), wave)


def half_cycle(cfg: OptimConfig, step: Any, xp: Any) -> Any:
    """ImageBind-LLM's schedule: a linear warm-up from 0 (the first step changes nothing), then half a cosine wave over
    the rest of the run. All steps of an accumulation window use the rate of its first step."""
    if cfg.accumulate > 1:
        step = step - index_in_window(cfg, step)
    ramp = cfg.init_lr * step / max(cfg.warmup_steps, 1)
    progress = (step - cfg.warmup_steps) / max(cfg.steps - cfg.warmup_steps, 1)
    wave = cfg.min_lr + (cfg.init_lr - cfg.min_lr) * 0.5 * (1 + xp.cos(np.pi * progress))
    return xp.where(step < cfg.warmup_steps, ramp, wave)


SCHEDULES = {"whole_cosine": whole_cosine, "half_cycle": half_cycle}


def learning_rate(cfg: OptimConfig, step: Any, xp: Any = np) -> Any:
    """Returns the learning rate at step `step` (0-based, over the whole run), by the config's schedule.

    `xp` is numpy (float64) or jax.numpy.
    """
    return SCHEDULES[cfg.schedule](cfg, step, xp)


def index_in_window(cfg: OptimConfig, step: Any) -> Any:
    """Returns the index of `step` within its accumulation window."""
    return (step % cfg.steps_per_epoch if cfg.average else step) % cfg.accumulate


def _below_llm(patterns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"llm/(?:{pattern})" for pattern in patterns)


def decay_mask(params: Any, llm: LanguageModelConfig | None = None) -> Any:
    """Returns a tree that is True where weight decay applies: not to biases, norm scales and the language model's
    `no_decay`."""
    rules = NO_DECAY + _below_llm(llm.no_decay if llm else ())
    return trees.map_with_path(lambda path, _: not trees.matches(path, rules), params)


def weight_decay(share: float, llm: LanguageModelConfig | None = None) -> optax.GradientTransformation:
    """Adds `share` times each decaying parameter to its Adam step, as AdamW does. Without a gradient torch skips a
    parameter, but not a slice of one: `llm.skipped_without_gradient` are parameters that have no other slices there."""
    rules = _below_llm(llm.skipped_without_gradient if llm else ())

    def add(step: jax.Array, param: jax.Array, decays: bool, skipped: bool) -> jax.Array:
        if not decays:
            return step
        both = step + share * param
        return jnp.where(step == 0, 0, both) if skipped else both

    def update(steps: Any, params: Any) -> Any:
        skipped = trees.map_with_path(lambda path, _: trees.matches(path, rules), params)
        return jax.tree.map(add, steps, params, decay_mask(params, llm), skipped)

    return optax.stateless(update)


class AccumulationState(NamedTuple):
    """The state of `accumulate_gradients`."""

    step: jax.Array  # int32, over the whole run
    total: Any  # sum of the window's gradients so far
    inner: Any


def accumulate_gradients(inner: optax.GradientTransformation, cfg: OptimConfig) -> optax.GradientTransformation:
    """Applies `inner` at the last step of each window, to the window's summed or averaged gradients; no update before.

    With `average`, an incomplete window at the end of an epoch is dropped.
    """

    def init(params: Any) -> AccumulationState:
        return AccumulationState(jnp.int32(0), jax.tree.map(jnp.zeros_like, params), inner.init(params))

    def update(gradients: Any, state: AccumulationState, params: Any = None) -> tuple[Any, AccumulationState]:
        index = index_in_window(cfg, state.step)
        share = 1 / cfg.accumulate if cfg.average else 1.0
        total = jax.tree.map(lambda old, new: jnp.where(index == 0, 0, old) + share * new, state.total, gradients)
        updates, inner_state = jax.lax.cond(
            index == cfg.accumulate - 1,
            lambda: inner.update(total, state.inner, params),
            lambda: (jax.tree.map(jnp.zeros_like, gradients), state.inner))
        return updates, AccumulationState(state.step + 1, total, inner_state)

    return optax.GradientTransformation(init, update)


def optimizer(cfg: OptimConfig, llm: LanguageModelConfig | None = None) -> optax.GradientTransformation:
    """Returns the optimizer of the trained parameters (None where a leaf is frozen); frozen ones have no state.

    llm: config of the language model, which has rules for some of its parameters; None: the parameters have no such

    Raises ValueError for an unknown schedule, or for accumulation windows longer than an epoch.
    """
    if cfg.schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule = {cfg.schedule!r}: choose one of {', '.join(SCHEDULES)}.")
    if cfg.average and cfg.accumulate > cfg.steps_per_epoch:
        raise ValueError(f"optim.accumulate = {cfg.accumulate} is more than optim.steps_per_epoch = "
                         f"{cfg.steps_per_epoch}. With optim.average a window ends with its epoch, so nothing would "
                         "be trained: lower optim.accumulate.")

    def rate(update: Any) -> Any:
        windows = cfg.steps_per_epoch // cfg.accumulate
        epoch, window = (update // windows, update % windows) if cfg.average else (0, update)
        last = epoch * cfg.steps_per_epoch + (window + 1) * cfg.accumulate - 1  # step that completes the window
        return learning_rate(cfg, last, jnp)

    clip = [] if cfg.clip is None else [optax.clip_by_global_norm(cfg.clip)]
    chain = optax.chain(
        *clip, optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps), weight_decay(cfg.weight_decay, llm),
        optax.scale_by_learning_rate(rate))
    return chain if cfg.accumulate == 1 else accumulate_gradients(chain, cfg)
