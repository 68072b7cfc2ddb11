"""AdamW, accumulation and the schedules. Against recorded rates and recorded runs: tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import trees
from mmjax.config import OptimConfig
from mmjax.families import FAMILIES, shapes
from mmjax.models.llama import TINY
from mmjax.training import optim
from tests import tiny

FLAT = OptimConfig(init_lr=0.1, min_lr=0.1, warmup_steps=0, weight_decay=0.5, epochs=1, steps_per_epoch=100)


def update(cfg, gradients, params, state=None):
    optimizer = optim.optimizer(cfg, TINY)
    return tiny.jit(optimizer.update)(gradients, optimizer.init(params) if state is None else state, params)


@pytest.mark.parametrize("preset", ["minigpt4-7b", "minigpt-v2-7b"])
def test_weight_decay_acts_on_what_has_two_axes_in_the_original(preset):
    """minigpt4/common/optims.py: nothing with fewer than two axes decays (its class token has three: 1, 1, D)."""
    family = FAMILIES["minigpt4"]
    cfg = family.presets[preset]
    decays = optim.decay_mask(trees.unflatten(shapes(family, cfg)))
    for path, found in trees.flatten(decays).items():
        axes = {
            "heads" if "heads" in name or name == "head" else name for name in trees.lookup(path, family.all_axes(cfg))
        }
        assert found == (len(axes - {"layer"}) >= 2 or path == "vit/cls"), path


def test_weight_decay_of_gates():
    """Those of heads have four axes in the original (1, N, 1, 1), those of tokens one. tests/parity has all others."""
    gates = {"gate": 0, "layers": {"gate": 0, "attn": {"gate": 0, "new_gate": 0}, "mlp": {"gate": {"w": 0, "b": 0}}}}
    decays = trees.flatten(optim.decay_mask({"llm": gates, "query": 0}, TINY))
    assert {path for path, decay in decays.items() if decay} == {
        "llm/layers/attn/gate", "llm/layers/attn/new_gate", "llm/layers/mlp/gate/w", "query"}


def test_decay_shrinks_matrices_and_leaves_biases():
    params = {"projector": {"w": jnp.full((2, 2), 3.0), "b": jnp.full(2, 3.0)}, "llm": None}
    updates, _ = update(FLAT, jax.tree.map(jnp.zeros_like, params), params)
    np.testing.assert_allclose(updates["projector"]["w"], -0.1 * 0.5 * 3, rtol=1e-6)
    np.testing.assert_array_equal(updates["projector"]["b"], 0)
    assert updates["llm"] is None


def test_gates_of_layers_without_prompts_are_skipped():
    """In the original each is a parameter of its own, without a gradient. What shares a tensor there does decay."""
    params = {"llm": {"layers": {"attn": {"gate": jnp.full((2, 3), 2.0)}}}, "query": jnp.full((2, 1, 3), 2.0)}
    gradients = jax.tree.map(lambda leaf: jnp.zeros_like(leaf).at[1].set(1e-3), params)
    updates, _ = update(dataclasses.replace(FLAT, eps=1.0), gradients, params)
    gate, query = updates["llm"]["layers"]["attn"]["gate"], updates["query"][:, 0]
    np.testing.assert_array_equal(gate[0], 0)
    np.testing.assert_allclose(query[0], -0.1 * 0.5 * 2, rtol=1e-6)
    np.testing.assert_array_equal(gate[1], query[1])
    assert (gate[1] < -0.1).all()


def test_state_exists_for_the_trained_part_alone():
    params = {"projector": {"w": jnp.ones((2, 3)), "b": None}, "llm": {"embedding": None}}
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


def moved(cfg, gradients):
    """float64[steps]: one weight, after each step with its gradient."""
    params, state, found = {"x": {"w": jnp.full((1, 1), 2.0)}}, None, []
    optimizer = optim.optimizer(cfg)
    step, state = tiny.jit(optimizer.update), optimizer.init(params)
    for gradient in gradients:
        updates, state = step({"x": {"w": jnp.full((1, 1), gradient)}}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        found.append(params["x"]["w"].item())
    return np.array(found)


def test_averaging_drops_what_an_epoch_leaves_over():
    """Epochs of five steps and windows of two: the fifth gradient acts nowhere, and the sixth opens a window."""
    gradients = np.array([1.0, 0.5, -2.0, 0.2, 100.0, 0.3, 0.4, 1.0, -0.5, 100.0])
    cfg = dataclasses.replace(FLAT, eps=1.0, epochs=2, steps_per_epoch=5, accumulate=2, average=True)
    found = moved(cfg, gradients)
    used = moved(dataclasses.replace(cfg, accumulate=1), [0.75, -0.9, 0.35, 0.25])
    np.testing.assert_allclose(found, [2, *np.repeat(used, [2, 3, 2, 2])], rtol=1e-6)


def test_summing_goes_on_over_the_ends_of_epochs():
    gradients = np.array([1.0, 0.5, -2.0, 0.2, 1.5, -0.5])
    cfg = dataclasses.replace(FLAT, eps=1.0, epochs=2, steps_per_epoch=3, accumulate=2)
    used = moved(dataclasses.replace(cfg, accumulate=1), gradients.reshape(3, 2).sum(1))
    np.testing.assert_allclose(moved(cfg, gradients), [2, *np.repeat(used, [2, 2, 1])], rtol=1e-6)


@pytest.mark.parametrize(("wrong", "words"), [
    ({"schedule": "cosine"}, "whole_cosine, half_cycle"),
    ({"accumulate": 101, "average": True}, "lower optim.accumulate"),
])
def test_settings_that_cannot_train_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        optim.optimizer(dataclasses.replace(FLAT, **wrong))


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


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 4, 14, 30])
def test_rates_stay_within_their_ends_and_compile_to_the_same(warmup_steps, schedule):
    cfg = dataclasses.replace(SCHEDULE, schedule=schedule, warmup_steps=warmup_steps, accumulate=3)
    assert (rates(cfg) >= (1e-5 if schedule == "whole_cosine" else 0)).all() and (rates(cfg) <= 1e-3).all()
    compiled = tiny.jit(lambda step: optim.learning_rate(cfg, step, jnp))(np.arange(30))
    np.testing.assert_allclose(compiled, rates(cfg), rtol=1e-5)


HALF = dataclasses.replace(SCHEDULE, schedule="half_cycle")


def test_half_a_cycle_begins_at_nothing_and_follows_the_warm_up():
    found = rates(HALF)
    np.testing.assert_allclose(found[:4], 1e-3 * np.arange(4) / 4, atol=1e-20)
    np.testing.assert_allclose(found[4:], 1e-4 + 9e-4 * (1 + np.cos(np.pi * np.arange(26) / 26)) / 2)
    assert found[4] == 1e-3
    assert (rates(dataclasses.replace(HALF, warmup_steps=0))[[0, 15]] == [1e-3, (1e-3 + 1e-4) / 2]).all()


@pytest.mark.parametrize("average", [False, True])
def test_steps_of_a_window_share_the_first_ones_rate(average):
    """Windows of four in epochs of ten: averaged, each epoch begins one."""
    cfg = dataclasses.replace(HALF, accumulate=4, average=average)
    first = [0, 4, 8, 10, 14, 18, 20, 24, 28] if average else [0, 4, 8, 12, 16, 20, 24, 28]
    np.testing.assert_array_equal(rates(cfg), np.repeat(rates(HALF)[first], np.diff([*first, 30])))


def test_updates_use_the_rate_in_force():
    """A gradient of always 1 moves the weight by just the rate, if nothing is remembered and nothing decays."""
    for average in (False, True):
        cfg = dataclasses.replace(HALF, accumulate=4, average=average, weight_decay=0.0, beta1=0.0, beta2=0.0, eps=0.0)
        steps = np.diff(moved(cfg, np.ones(30)), prepend=2.0)
        ends = [3, 7, 13, 17, 23, 27] if average else [3, 7, 11, 15, 19, 23, 27]
        np.testing.assert_allclose(steps[ends], -rates(cfg)[ends], rtol=1e-3)
        assert not np.delete(steps, ends).any()
