"""Properties of the visual query network. Its numbers: tests/parity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import trees
from mmjax.models.visual import AXES, TINY, VISUAL_7B, VisualQuery
from tests import tiny

P, E, O = 3, 20, 32
FEATURES = np.random.default_rng(0).normal(size=(2, 7, E)).astype(np.float32)
MODULE = VisualQuery(TINY, P, O)


@functools.cache
def params():
    return tiny.module_params(MODULE, FEATURES)


@functools.cache
def network():
    return tiny.jit(lambda params, features: MODULE.apply({"params": params}, features))


@functools.cache
def released_shapes():
    features = jax.ShapeDtypeStruct((1, 257, 768), np.float32)
    module = VisualQuery(VISUAL_7B, 10, 4_096)
    return trees.flatten(jax.eval_shape(module.init, jax.random.key(0), features)["params"])


def test_released_size():
    D, depth = 768, 8
    block = 3 * D * D + 3 * D + D * D + D + 2 * 4 * D * D + 5 * D + 4 * D  # qkv, o, two of the mlp, two norms
    ends = D * D + 3 * D + 10 * D + D * 4_096 + 3 * 4_096
    assert sum(leaf.size for leaf in released_shapes().values()) == depth * block + ends


def test_every_parameter_has_axes():
    for path, leaf in released_shapes().items():
        names = trees.lookup(path, AXES)
        assert len(names) == len(leaf.shape) and len(set(names)) == len(names), path


def test_prompts_are_what_the_queries_read():
    got = network()(params(), FEATURES)
    assert got.shape == (2, P, O)
    other = FEATURES.copy()
    other[0, -1] += 1
    moved = np.abs(network()(params(), other) - got).max((1, 2))
    assert moved[0] > 1e-3 and moved[1] == 0  # by their own row's features, all of them


def test_features_have_no_order():
    shuffled = FEATURES[:, [3, 1, 6, 0, 2, 5, 4]]
    np.testing.assert_allclose(network()(params(), shuffled), network()(params(), FEATURES), atol=1e-5)


def test_prompts_are_normed():
    plain = params() | {"out_norm": {"scale": np.ones(O, np.float32), "bias": np.zeros(O, np.float32)}}
    got = np.asarray(network()(plain, FEATURES))
    np.testing.assert_allclose(got.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(got.var(-1), 1, atol=1e-3)


def test_bfloat16_stays_near_float32():
    exact = network()(params(), FEATURES)
    low = tiny.jit(VisualQuery(TINY, P, O, jnp.bfloat16).apply)({"params": params()}, FEATURES)
    assert low.dtype == jnp.bfloat16
    assert np.abs(low.astype(np.float32) - exact).max() < 0.1 * np.abs(exact).max()
