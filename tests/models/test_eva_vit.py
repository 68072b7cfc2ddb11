"""Properties of the image tower. Its numbers: tests/parity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import trees
from mmjax.models.eva_vit import TINY, EvaVit, FusedQKV, VitBlock
from mmjax.models.layers import bicubic, resize_positions
from tests import tiny

IMAGES = np.random.default_rng(0).normal(size=(2, 3, TINY.image_size, TINY.image_size)).astype(np.float32)
DROPPING = dataclasses.replace(TINY, drop_path=0.5)


@functools.cache
def params():
    return tiny.module_params(EvaVit(TINY), IMAGES)


@functools.cache
def tower(cfg):
    return tiny.jit(lambda params, images, rngs: EvaVit(cfg).apply({"params": params}, images, rngs=rngs))


def slow_bicubic(line, target):
    """torch's formula (aten/src/ATen/native/UpSample.h), a sample at a time."""
    a, source = -0.75, len(line)

    def near(x):
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x):
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    out = []
    for i in range(target):
        at = source / target * (i + 0.5) - 0.5
        whole = int(np.floor(at))
        t = at - whole
        taps = [line[min(max(whole + k, 0), source - 1)] for k in (-1, 0, 1, 2)]
        out.append(np.dot([far(t + 1), near(t), near(1 - t), far(2 - t)], taps))
    return np.array(out)


@pytest.mark.parametrize(("source", "target"), [(4, 4), (4, 6), (4, 3), (16, 32), (16, 10), (3, 1)])
def test_bicubic(source, target):
    matrix = bicubic(source, target)
    assert matrix.shape == (target, source)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    line = np.random.default_rng(0).normal(size=source)
    np.testing.assert_allclose(matrix @ line, slow_bicubic(line, target), atol=1e-6)
    if source == target:
        np.testing.assert_array_equal(matrix, np.eye(source))


def test_positions_are_resized_as_a_image_and_the_class_row_is_kept():
    table = np.random.default_rng(0).normal(size=(1 + 16, 5)).astype(np.float32)
    resized = np.asarray(resize_positions(jnp.asarray(table), 6))
    assert resized.shape == (1 + 36, 5)
    np.testing.assert_array_equal(resized[0], table[0])
    grid = table[1:].reshape(4, 4, 5)
    rows = np.stack([[slow_bicubic(grid[:, w, d], 6) for d in range(5)] for w in range(4)])  # [w, D, h]
    both = np.stack([[slow_bicubic(rows[:, d, h], 6) for d in range(5)] for h in range(6)])  # [h, D, w]
    np.testing.assert_allclose(resized[1:].reshape(6, 6, 5), both.transpose(0, 2, 1), atol=1e-5)
    np.testing.assert_array_equal(resize_positions(table, 4), table)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images of 3x28x28, got \(3, 28, 35\)"):
        EvaVit(TINY).apply({"params": params()}, np.zeros((1, 3, 28, 35), np.float32))


def test_patches_come_in_raster_order_behind_the_class_token():
    """Where the blocks add nothing, a image that is dark but for one patch changes that patch's token alone."""
    closed = trees.map_with_path(
        lambda path, leaf: 0 * leaf if trees.matches(path, ("blocks/(attn/o|mlp/fc2)/.",)) else leaf, params())
    dark = np.zeros((3, 3, 28, 28), np.float32)
    dark[1, :, 0:7, 21:28] = 1  # first row of patches, last column
    dark[2, :, 21:28, 7:14] = 1
    tokens = tower(TINY)(closed, dark, {})
    changed = np.abs(tokens[1:] - tokens[:1]).max(-1) > 0
    assert [np.flatnonzero(row).tolist() for row in changed] == [[1 + 3], [1 + 12 + 1]]


def test_keys_have_no_bias():
    x = np.zeros((1, 2, TINY.dim), np.float32)
    module = FusedQKV(TINY)
    weights = tiny.module_params(module, x)
    assert weights.keys() == {"w", "q_b", "v_b"}
    q, k, v = module.apply({"params": weights}, x)
    np.testing.assert_array_equal(q[0, 0], weights["q_b"])
    np.testing.assert_array_equal(k, 0)
    np.testing.assert_array_equal(v[0, 0], weights["v_b"])


def test_drop_path_acts_only_when_given_randomness():
    undisturbed = tower(DROPPING)(params(), IMAGES, {})
    np.testing.assert_array_equal(undisturbed, tower(TINY)(params(), IMAGES, {}))
    dropped = [tower(DROPPING)(params(), IMAGES, {"vit": jax.random.key(seed)}) for seed in range(4)]
    assert len({np.asarray(each).tobytes() for each in dropped}) > 1


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    branch = np.random.default_rng(0).normal(size=(2000, 2, 3)).astype(np.float32)

    def drop(rate):
        return VitBlock(DROPPING).apply(
            {}, branch, jnp.float32(rate), method="drop_path", rngs={"vit": jax.random.key(0)}
        )

    np.testing.assert_array_equal(drop(0.0), branch)
    dropped = drop(0.25)
    scale = np.asarray(dropped / branch)
    np.testing.assert_allclose(scale, np.broadcast_to(scale[:, :1, :1], scale.shape), rtol=1e-5)
    np.testing.assert_allclose(np.unique(scale.round(4)), [0, 1.3333])
    assert abs(scale.mean() - 1) < 0.03
