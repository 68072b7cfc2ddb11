"""AdamW with the original's parameter groups and learning rate (minigpt4/common/optims.py, runners/runner_base.py)."""

from typing import Any

import numpy as np
import optax

from mmjax import trees
from mmjax.config import OptimConfig

NO_DECAY = (r".*/(b|q_b|v_b|bias|scale)",)


def learning_rate(cfg: OptimConfig, step: Any, xp: Any = np) -> Any:
    """The rate that step `step` (0-based, over the whole run) uses.

    Linear warm-up counted within the epoch, so that it starts again at each epoch if it is longer than one; then a
    cosine over the whole run that the warm-up does not shift. `xp` is numpy (float64) or jax.numpy.
    """
    start = cfg.init_lr if cfg.warmup_lr < 0 else cfg.warmup_lr
    ramp = start + (cfg.init_lr - start) * (step % cfg.steps_per_epoch) / max(cfg.warmup_steps, 1)
    wave = cfg.min_lr + (cfg.init_lr - cfg.min_lr) * 0.5 * (1 + xp.cos(np.pi * step / cfg.steps))
    return xp.where(step < cfg.warmup_steps, xp.minimum(ramp, cfg.init_lr), wave)


def decay_mask(params: Any) -> Any:
    """True where weight decay acts: the matrices and tables, not biases and norm scales."""
    return trees.map_with_path(lambda path, _: not trees.matches(path, NO_DECAY), params)


def optimizer(cfg: OptimConfig) -> optax.GradientTransformation:
    """For the trained part of the parameters alone (None where a leaf is frozen): no state exists for the rest."""
    import jax.numpy as jnp

    def rate(update: Any) -> Any:  # of the last step whose gradient goes into this update
        return learning_rate(cfg, (update + 1) * cfg.accumulate - 1, jnp)

    adamw = optax.adamw(rate, cfg.beta1, cfg.beta2, cfg.eps, weight_decay=cfg.weight_decay, mask=decay_mask)
    clip = [] if cfg.clip is None else [optax.clip_by_global_norm(cfg.clip)]
    chain = optax.chain(*clip, adamw)
    if cfg.accumulate == 1:
        return chain
    return optax.MultiSteps(chain, cfg.accumulate, use_grad_mean=False).gradient_transformation()
