"""AdamW and the schedule. Against recorded rates and a recorded run: tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import optim, trees
from mmjax.config import OptimConfig
from mmjax.families import FAMILIES, shapes
from tests import tiny

FLAT = OptimConfig(init_lr=0.1, min_lr=0.1, warmup_steps=0, weight_decay=0.5, epochs=1, steps_per_epoch=100)


def update(cfg, gradients, params, state=None):
    optimizer = optim.optimizer(cfg)
    return tiny.jit(optimizer.update)(gradients, optimizer.init(params) if state is None else state, params)


@pytest.mark.parametrize("preset", ["minigpt4-7b", "minigpt-v2-7b"])
def test_weight_decay_acts_on_what_has_two_axes_in_the_original(preset):
    """minigpt4/common/optims.py: nothing with fewer than two axes decays (its class token has three: 1, 1, D)."""
    module = FAMILIES["minigpt4"]
    decays = optim.decay_mask(trees.unflatten(shapes("minigpt4", module.PRESETS[preset])))
    for path, found in trees.flatten(decays).items():
        axes = {"heads" if "heads" in name or name == "head" else name for name in trees.lookup(path, module.AXES)}
        assert found == (len(axes - {"layer"}) >= 2 or path == "vit/cls"), path


def test_decay_shrinks_matrices_and_leaves_biases():
    params = {"projector": {"w": jnp.full((2, 2), 3.0), "b": jnp.full(2, 3.0)}, "llama": None}
    updates, _ = update(FLAT, jax.tree.map(jnp.zeros_like, params), params)
    np.testing.assert_allclose(updates["projector"]["w"], -0.1 * 0.5 * 3, rtol=1e-6)
    np.testing.assert_array_equal(updates["projector"]["b"], 0)
    assert updates["llama"] is None


def test_state_exists_for_the_trained_part_alone():
    params = {"projector": {"w": jnp.ones((2, 3)), "b": None}, "llama": {"embedding": None}}
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(optim.optimizer(FLAT).init(params)))
    assert sizes == [1, 1, 6, 6]  # two counters, two moments


def test_two_steps_of_adamw():
    cfg = dataclasses.replace(FLAT, beta1=0.8, beta2=0.9, eps=1e-3, epochs=2, steps_per_epoch=1, min_lr=0.0)
    p, m, v, state = np.array([[2.0]]), 0.0, 0.0, None
    params = {"x": {"w": jnp.asarray(p, jnp.float32)}}
    for step, g in enumerate((0.3, -1.2)):
        lr = 0.1 * (1 + np.cos(np.pi * step / 2)) / 2
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        expected = -lr * (m / (1 - 0.8 ** (step + 1)) / (np.sqrt(v / (1 - 0.9 ** (step + 1))) + 1e-3) + 0.5 * p)
        updates, state = update(cfg, {"x": {"w": jnp.full((1, 1), g)}}, params, state)
        np.testing.assert_allclose(updates["x"]["w"], expected, rtol=1e-5)
        p = p + expected
        params = jax.tree.map(jnp.add, params, updates)


@pytest.mark.parametrize(("clip", "factor"), [(None, 1), (1.0, 1 / 5), (10.0, 1)])
def test_clipping_scales_the_whole_gradient(clip, factor):
    params = {"a": {"w": jnp.zeros((1, 1))}, "b": {"w": jnp.zeros((1, 1))}}
    gradients = {"a": {"w": jnp.full((1, 1), 3.0)}, "b": {"w": jnp.full((1, 1), 4.0)}}
    _, state = update(dataclasses.replace(FLAT, clip=clip), gradients, params)
    adam = next(part for part in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(part, "mu"))
    np.testing.assert_allclose(adam.mu["a"]["w"], 0.1 * 3 * factor, rtol=1e-6)
    np.testing.assert_allclose(adam.mu["b"]["w"], 0.1 * 4 * factor, rtol=1e-6)


def test_accumulating_sums_and_uses_the_rate_of_the_last_step():
    """Three gradients and a pause at each but the last; one update as of their sum, at the rate of step 2 of 6."""
    params = {"x": {"w": jnp.full((1, 2), 2.0)}}
    gradients = [{"x": {"w": jnp.array([[a, b]])}} for a, b in ((1.0, 0.1), (2.0, -0.4), (-0.5, 0.1))]
    cfg = dataclasses.replace(FLAT, eps=1.0, epochs=1, steps_per_epoch=6, min_lr=0.0, accumulate=3)
    state = None
    for number, gradient in enumerate(gradients):
        updates, state = update(cfg, gradient, params, state)
        assert bool(jnp.any(updates["x"]["w"])) == (number == 2)
    rate = optim.learning_rate(cfg, 2)
    alone = dataclasses.replace(FLAT, eps=1.0, init_lr=rate, min_lr=rate)
    expected, _ = update(alone, jax.tree.map(lambda *g: sum(g), *gradients), params)
    np.testing.assert_allclose(updates["x"]["w"], expected["x"]["w"], rtol=1e-6)


SCHEDULE = OptimConfig(init_lr=1e-3, min_lr=1e-4, warmup_lr=1e-5, warmup_steps=4, epochs=3, steps_per_epoch=10)


def rates(cfg):
    return optim.learning_rate(cfg, np.arange(cfg.steps))


def test_warm_up_is_a_line_and_then_the_cosine_of_the_whole_run():
    found = rates(SCHEDULE)
    np.testing.assert_allclose(found[:4], 1e-5 + (1e-3 - 1e-5) * np.arange(4) / 4)
    np.testing.assert_allclose(found[4:], 1e-4 + 9e-4 * (1 + np.cos(np.pi * np.arange(4, 30) / 30)) / 2)
    assert (np.diff(found[4:]) < 0).all()
    assert 1e-4 < found[-1] < 1.1e-4


def test_warm_up_longer_than_an_epoch_begins_again():
    found = rates(dataclasses.replace(SCHEDULE, warmup_steps=14))
    np.testing.assert_allclose(found[10:14], found[:4])
    assert found[9] > found[10]
    np.testing.assert_array_equal(found[14:], rates(SCHEDULE)[14:])


def test_negative_warm_up_rate_means_the_full_rate_at_once():
    found = rates(dataclasses.replace(SCHEDULE, warmup_lr=-1.0))
    np.testing.assert_allclose(found[:4], 1e-3)
    np.testing.assert_array_equal(found[4:], rates(SCHEDULE)[4:])


def test_no_warm_up():
    assert rates(dataclasses.replace(SCHEDULE, warmup_steps=0))[0] == 1e-3


@pytest.mark.parametrize("warmup_steps", [0, 4, 14, 30])
def test_rates_stay_within_their_ends_and_compile_to_the_same(warmup_steps):
    cfg = dataclasses.replace(SCHEDULE, warmup_steps=warmup_steps)
    assert (rates(cfg) >= 1e-5).all() and (rates(cfg) <= 1e-3).all()
    compiled = tiny.jit(lambda step: optim.learning_rate(cfg, step, jnp))(np.arange(30))
    np.testing.assert_allclose(compiled, rates(cfg), rtol=1e-5)
