"""ImageBind-LLM's learning rate and whole training runs of both phases, with and without accumulation."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import trees
from mmjax.config import OptimConfig
from mmjax.families import imagebind_llm as family
from mmjax.training import optim, steps
from tests import tiny
from tests.parity import imagebind_golden as golden
from tests.parity.close import assert_close
from tests.parity.imagebind_golden import GRADIENT, LOSS, WEIGHT

START = {"gate": "llm/.*gate", "_l2": "llm/.*/lora_b", "biases": "llm/.*/b"}  # what a run's `start` sets to 0


def test_learning_rates():
    """By the fraction of an epoch, which an epoch of one step lets a step be."""
    case = golden.folder() / "cases" / "schedule" / "case.json"
    if not case.is_file():
        pytest.skip(f"{golden.folder()} has no case schedule")
    for told in json.loads(case.read_text(encoding="utf-8"))["lr"]:
        cfg = OptimConfig(schedule="half_cycle", init_lr=told["lr"], min_lr=told["min_lr"], epochs=told["epochs"],
                          steps_per_epoch=1, warmup_steps=told["warmup_epochs"])
        at = np.array(told["epoch"], np.float64)
        np.testing.assert_allclose(optim.learning_rate(cfg, at), told["lr_at_epoch"], rtol=1e-12)
        compiled = tiny.jit(functools.partial(optim.learning_rate, cfg, xp=jnp))(at.astype(np.float32))
        np.testing.assert_allclose(compiled, told["lr_at_epoch"], rtol=1e-5, atol=1e-6 * told["lr"])


def settings(case) -> OptimConfig:
    spec = case.spec
    beta1, beta2, eps = map(float, re.search(r"betas \((.*), (.*)\), eps (\S+?),", spec["optimizer"]).groups())
    length = len(spec["batch_order_per_epoch"])
    return OptimConfig(
        schedule="half_cycle", init_lr=spec["lr"], min_lr=spec["min_lr"], warmup_steps=spec["warmup_epochs"] * length,
        epochs=spec["epochs"], steps_per_epoch=length, weight_decay=spec["weight_decay"], beta1=beta1, beta2=beta2,
        eps=eps, accumulate=spec["accum_iter"], average=True)


@golden.each(lambda case: "batch_order_per_epoch" in case.spec)
def test_trajectory(case):
    """Thirty chained steps: losses, rates, the norm of every gradient that is used, and the weights at the end."""
    spec, arrays, cfg = case.spec, case.arrays, settings(case)
    zeros = {pattern: np.zeros_like for word, pattern in START.items() if word in spec["start"]}
    m = golden.changed(golden.model(golden.adapter(case)), zeros)
    trained, frozen = trees.split(m.params, trees.mask(m.params, family.PHASES[spec["phase"]]))
    optimizer = optim.optimizer(cfg, m.config.llm)
    state = tiny.jit(lambda trained: steps.start(trained, optimizer, 0))(trained)
    batches = [golden.batch(tokens, labels, image=images)
               for tokens, labels, images in zip(arrays["tokens"], arrays["labels"], arrays["images"], strict=True)]
    step = tiny.compiled(steps.train_step(m.module, optimizer), state, frozen, batches[0])

    losses, norms = [], []
    for number in range(cfg.steps):
        state, metrics = step(state, frozen, batches[spec["batch_order_per_epoch"][number % cfg.steps_per_epoch]])
        losses.append(float(metrics["loss"]))
        norms.append(metrics["grad_norm"] if cfg.accumulate == 1 else
                     np.linalg.norm([np.linalg.norm(leaf) for leaf in jax.tree.leaves(state.opt_state.total)]))
    assert_close("losses", losses, arrays["loss"], absolute=LOSS)
    np.testing.assert_allclose(optim.learning_rate(cfg, np.arange(cfg.steps)), arrays["lr"], rtol=1e-12)
    used = np.take(norms, arrays["grad_norm_at_step"])
    assert_close("grad_norms", used, arrays["grad_norm"], relative=GRADIENT)
    final = golden.released(m, {path: leaf for path, leaf in trees.flatten(state.params).items() if leaf is not None})
    recorded = {name.removeprefix("final:"): x for name, x in arrays.items() if name.startswith("final:")}
    for name, expected in recorded.items():
        assert_close("final:" + re.sub(r"\d+", "N", name), final[name], expected, absolute=WEIGHT)
    if spec["final_stored"].startswith("all"):
        assert final.keys() == recorded.keys()
