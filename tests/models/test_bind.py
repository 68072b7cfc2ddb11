"""Properties of the bind network and of what is mixed before it. Their numbers: tests/parity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import trees
from mmjax.models.bind import AXES, BIND_7B, TINY, Bind, mix, nearest, recall
from mmjax.models.layers import unit
from tests import tiny

LEGACY = dataclasses.replace(TINY, legacy=True)


def shapes(cfg):
    x = jax.ShapeDtypeStruct((1, 1, cfg.inputs), jnp.float32)
    return trees.flatten(jax.eval_shape(Bind(cfg).init, jax.random.key(0), x)["params"])


def test_released_size():
    assert sum(leaf.size for leaf in shapes(BIND_7B).values()) == 608_190_464
    legacy = shapes(dataclasses.replace(BIND_7B, legacy=True))
    assert sum(leaf.size for leaf in legacy.values()) == 608_190_464 + 3 * (4_096 + 16_384 + 16_384 + 4_096)


@pytest.mark.parametrize("cfg", [TINY, LEGACY])
def test_every_parameter_has_axes(cfg):
    for path, leaf in shapes(cfg).items():
        assert len(trees.lookup(path, AXES)) == len(leaf.shape), path


@pytest.mark.parametrize("cfg", [TINY, LEGACY])
def test_blocks_that_add_nothing_leave_the_projection(cfg):
    x = np.random.default_rng(0).normal(size=(2, 1, cfg.inputs)).astype(np.float32)
    params = tiny.module_params(Bind(cfg), x)
    closed = trees.map_with_path(lambda path, leaf: leaf * 0 if "/down/" in path else leaf, params)
    expected = x @ params["proj"]["w"] + params["proj"]["b"]
    np.testing.assert_allclose(Bind(cfg).apply({"params": closed}, x), expected, atol=1e-5)


def vectors(count, seed=0):
    return unit(jnp.asarray(np.random.default_rng(seed).normal(size=(count, 8)), jnp.float32))


def test_mix_is_not_normalised_again():
    first, second = vectors(2, 1), 7 * vectors(2, 2)  # the length of a feature does not count
    expected = (3 * np.asarray(first) + np.asarray(second) / 7) / (4 + 1e-6)
    np.testing.assert_allclose(mix([first, second], [3, 1]), expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(mix([second], [2.0]), axis=-1), 2 / (2 + 1e-6), rtol=1e-6)


def test_nearest_is_exact_and_ordered():
    stored, query = vectors(30), 0.3 * vectors(4, 1)
    products, indices = nearest(query, stored, 5)
    every = np.asarray(query) @ np.asarray(stored).T
    np.testing.assert_array_equal(indices, np.argsort(-every, axis=1)[:, :5])
    np.testing.assert_allclose(products, -np.sort(-every, axis=1)[:, :5], atol=1e-6)


def test_recall_treats_each_row_on_its_own():
    stored, query = vectors(30), 0.7 * vectors(4, 1)
    run = functools.partial(recall, vectors=stored, count=3, sharpness=20.0, weight=0.5)
    np.testing.assert_allclose(run(query), np.concatenate([run(row[None]) for row in query]), atol=1e-6)


def test_recall_between_its_limits():
    stored, query = vectors(30), 0.7 * vectors(4, 1)
    np.testing.assert_allclose(recall(query, stored, weight=0.0), unit(query), atol=1e-6)
    _, indices = nearest(query, stored, 1)
    np.testing.assert_allclose(recall(query, stored, 5, 1e6, 1.0), stored[indices[:, 0]], atol=1e-6)
