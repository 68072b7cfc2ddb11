"""The loss made chunk by chunk, against the plain one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import trees
from mmjax.families import FAMILIES, llama, minigpt4
from mmjax.training import losses, steps
from tests import tiny

TIED = dataclasses.replace(llama.PRESETS["tiny"], llm=dataclasses.replace(llama.PRESETS["tiny"].llm, tied=True))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 4 places, so that there are several, the last not full."""
    monkeypatch.setattr(losses, "MIN_CHUNK", 4)


def both(family, cfg, rules, batch):
    """{"plain", "chunked": (loss, gradients of what is trained)}"""
    params, module = tiny.params(family, cfg), FAMILIES[family].Model(cfg)
    trained, frozen = trees.split(params, trees.mask(params, rules))
    means = {"plain": lambda params: steps.loss(module, params, batch)[0],
             "chunked": lambda params: steps.mean_loss(module, params, batch)}
    return {name: tiny.jit(jax.value_and_grad(lambda trained, mean=mean: mean(trees.merge(trained, frozen))))(trained)
            for name, mean in means.items()}


def assert_same(found):
    np.testing.assert_allclose(found["chunked"][0], found["plain"][0], rtol=1e-6)
    plain, chunked = (trees.flatten(found[name][1]) for name in ("plain", "chunked"))
    assert plain.keys() == chunked.keys()
    for path, gradient in plain.items():
        if gradient is not None:
            scale = np.abs(gradient).max()
            assert scale > 0
            np.testing.assert_allclose(chunked[path], gradient, atol=1e-6 * max(scale, 1), err_msg=path)


@pytest.mark.parametrize(("family", "cfg", "rules"), [
    ("minigpt4", tiny.MINIGPT4, minigpt4.TRAINED),
    ("llama", llama.PRESETS["tiny"], ("llm/head/w", "llm/norm/scale")),
    ("llama", TIED, ("llm/embedding",)),  # it gets gradients from both of its ends
], ids=["frozen head", "trained head", "trained table that is the head"])
def test_loss_and_gradients_are_the_plain_ones(small_chunks, family, cfg, rules):
    assert_same(both(family, cfg, rules, tiny.batch(rows=3, length=11, image_count=int(family == "minigpt4"))))


def test_every_place_a_target(small_chunks):
    batch = tiny.batch(rows=3, length=11, image_count=0)
    assert_same(both("llama", llama.PRESETS["tiny"], ("llm/norm/scale",),
                     dataclasses.replace(batch, loss_mask=np.ones_like(batch.loss_mask))))


def toy(places=24, width=5, words=7):
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(2, places // 2, width)), jnp.float32)
    ids = jnp.asarray(random.integers(0, words, (2, places // 2)))
    weights = random.random(places) + 0.1
    weights[random.permutation(places)[12:]] = 0
    weights = jnp.asarray(weights.reshape(2, -1), jnp.float32)
    return hidden, ids, weights, jnp.asarray(random.normal(size=(width, words)), jnp.float32)


def summed(hidden, ids, weights, head):
    log_p = jax.nn.log_softmax(hidden @ head)
    return -(weights * jnp.take_along_axis(log_p, ids[..., None], axis=-1)[..., 0]).sum()


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_and_scale(small_chunks, groups):
    hidden, ids, weights, head = toy()

    def chunked(hidden, head):
        return 3 * losses.weighted_sum(lambda x: x @ head, hidden, ids, weights, groups)

    found = jax.value_and_grad(chunked, (0, 1))(hidden, head)
    expected = jax.value_and_grad(lambda hidden, head: 3 * summed(hidden, ids, weights, head), (0, 1))(hidden, head)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)
    np.testing.assert_allclose(chunked(hidden, head), expected[0], rtol=1e-6)  # without a gradient


def test_places_without_weight_are_not_even_looked_at(small_chunks):
    hidden, ids, weights, head = toy()
    poisoned = jnp.where(weights[..., None] == 0, jnp.nan, hidden)
    assert int((weights != 0).sum()) == 3 * losses.MIN_CHUNK  # full chunks
    value, gradient = jax.value_and_grad(
        lambda hidden: losses.weighted_sum(lambda x: x @ head, hidden, ids, weights))(poisoned)
    np.testing.assert_allclose(value, summed(hidden, ids, weights, head), rtol=1e-6)
    assert not gradient[weights == 0].any() and np.isfinite(gradient).all()


def test_a_step_has_no_room_for_all_logits():
    """Of a model that is little more than its vocabulary."""
    wide = dataclasses.replace(tiny.MINIGPT4, qformer=None, llm=dataclasses.replace(
        tiny.MINIGPT4.llm, vocab=8_192))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tiny.params("minigpt4", wide))
    trained, frozen = trees.split(params, trees.mask(params, minigpt4.TRAINED))
    module, batch = minigpt4.MiniGPT4(wide), tiny.batch(rows=16, length=64)
    logits = 4 * 16 * 64 * 8_192

    def room(mean):
        gradient = jax.jit(jax.grad(lambda trained, frozen: mean(trees.merge(trained, frozen))))
        return tiny.compiled(gradient, trained, frozen).memory_analysis().temp_size_in_bytes

    assert room(lambda params: steps.loss(module, params, batch)[0]) > logits
    assert room(lambda params: steps.mean_loss(module, params, batch)) < logits
