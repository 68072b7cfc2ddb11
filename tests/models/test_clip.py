"""Properties of CLIP's image tower. Its numbers: tests/parity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import trees
from mmjax.models.clip import AXES, CLIP_VIT_L14, EPS, TINY, Clip, quick_gelu
from tests import tiny

SIZE = TINY.image_size
IMAGES = np.random.default_rng(0).normal(size=(2, 3, SIZE, SIZE)).astype(np.float32)


@functools.cache
def params():
    return tiny.module_params(Clip(TINY), IMAGES)


@functools.cache
def tower():
    return tiny.jit(lambda params, images: Clip(TINY).apply({"params": params}, images))


@functools.cache
def released_shapes():
    c = CLIP_VIT_L14
    image = jax.ShapeDtypeStruct((1, 3, c.image_size, c.image_size), np.float32)
    return trees.flatten(jax.eval_shape(Clip(c).init, jax.random.key(0), image)["params"])


def test_released_size():
    """As many parameters as transformers' CLIPVisionModelWithProjection of openai/clip-vit-large-patch14."""
    assert sum(leaf.size for leaf in released_shapes().values()) == 303_966_208


def test_every_parameter_has_axes():
    for path, leaf in released_shapes().items():
        names = trees.lookup(path, AXES)
        assert len(names) == len(leaf.shape) and len(set(names)) == len(names), path


def norm(x, weights):
    """The norm by its formula, of a plain array."""
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS)
    return x * np.asarray(weights["scale"]) + np.asarray(weights["bias"])


def test_every_token_is_normed_and_projected():
    """Where the blocks add nothing, the tower is two norms around positions and patches, and a matrix."""
    closed = trees.map_with_path(
        lambda path, leaf: 0 * leaf if trees.matches(path, ("blocks/(attn/o|mlp/fc2)/.",)) else leaf, params())
    side, grid = TINY.patch, TINY.grid
    patches = [IMAGES[:, :, r * side:(r + 1) * side, c * side:(c + 1) * side] for r, c in np.ndindex(grid, grid)]
    embedded = np.einsum("TBCPQ,CPQD->BTD", np.stack(patches), np.asarray(closed["patch"]["w"], np.float64))
    tokens = np.concatenate([np.broadcast_to(closed["cls"], (2, 1, TINY.dim)), embedded], axis=1)
    tokens = norm(norm(tokens + np.asarray(closed["pos"]), closed["pre_norm"]), closed["post_norm"])
    got = tower()(closed, IMAGES)
    assert got.shape == (2, 1 + grid**2, TINY.out)
    np.testing.assert_allclose(got, tokens @ np.asarray(closed["out"]["w"], np.float64), atol=1e-5)


def test_every_token_sees_every_patch():
    changed = IMAGES.copy()
    changed[:, :, -1, -1] += 1  # a pixel of the last patch
    moved = np.abs(tower()(params(), changed) - tower()(params(), IMAGES)).max(-1)
    assert (moved > 1e-4).all()


def test_quick_gelu():
    x = np.linspace(-5, 5, 101)
    np.testing.assert_allclose(quick_gelu(x), x / (1 + np.exp(-1.702 * x)), atol=1e-6)
    assert 1e-3 < np.abs(quick_gelu(x) - jax.nn.gelu(x, approximate=False)).max() < 0.03  # another function, but near


def test_bfloat16_stays_near_float32():
    exact = tower()(params(), IMAGES)
    low = tiny.jit(Clip(TINY, jnp.bfloat16).apply)({"params": params()}, IMAGES)
    assert low.dtype == jnp.bfloat16
    assert np.abs(low.astype(np.float32) - exact).max() < 0.1 * np.abs(exact).max()


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images of 3x28x28, got \(3, 28, 35\)"):
        Clip(TINY).apply({"params": params()}, np.zeros((1, 3, 28, 35), np.float32))
