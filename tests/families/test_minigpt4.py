"""MiniGPT-4 around its towers. Its numbers: tests/parity."""

import dataclasses
import functools

import numpy as np
import pytest

from mmjax.families.minigpt4 import MiniGPT4
from mmjax.families.model import place_soft_tokens
from mmjax.models import eva_vit
from mmjax.models.eva_vit import EvaVit
from mmjax.models.layers import LayerNorm
from mmjax.models.pixels import normalise
from tests import tiny

WITHOUT = dataclasses.replace(tiny.MINIGPT4, qformer=None)


@functools.cache
def params(cfg=tiny.MINIGPT4):
    return tiny.params("minigpt4", cfg)


@functools.cache
def compiled(cfg, method):
    return tiny.jit(lambda params, argument: MiniGPT4(cfg).apply({"params": params}, argument, method=method))


def soft_tokens(images, cfg=tiny.MINIGPT4):
    batch = dataclasses.replace(tiny.batch(len(images), image_count=0), images=images)
    return compiled(cfg, "soft_tokens")(params(cfg), batch)


def two_images():
    """Rows with two images each: one shape, so that the tests share what is compiled."""
    return tiny.batch(rows=2, image_count=2)


def encode(batch):
    return compiled(tiny.MINIGPT4, "encode")(params(), batch)[0]


@pytest.mark.parametrize("index", [
    [[-1, 0, 1, 2, -1, -1]],  # whole
    [[-1, 0, -1, 2, 1, -1]],  # a hole, another order
    [[2, 3, -1, -1, 4, 5]],  # cut on the left: the first soft tokens are gone
    [[-1] * 6, [0, -1, -1, -1, -1, 5]],  # a row without images beside one with
])
def test_place(index):
    index = np.array(index)
    random = np.random.default_rng(0)
    words, soft = random.normal(size=(len(index), 6, 3)), random.normal(size=(len(index), 6, 3))
    placed = np.asarray(place_soft_tokens(words.astype(np.float32), soft.astype(np.float32), index))
    for row, at in np.ndindex(index.shape):
        k = index[row, at]
        np.testing.assert_allclose(placed[row, at], words[row, at] if k < 0 else soft[row, k], rtol=1e-6)


def test_soft_tokens_of_each_row_come_from_its_own_images():
    images = two_images().images
    found = soft_tokens(images)
    assert found.shape == (2, 2 * tiny.Q, tiny.MINIGPT4.llm.dim)
    swapped = soft_tokens(images[::-1, ::-1])  # rows and images the other way round
    halves = np.asarray(found).reshape(2, 2, tiny.Q, -1)
    np.testing.assert_allclose(np.asarray(swapped).reshape(halves.shape), halves[::-1, ::-1], atol=1e-5)
    assert np.abs(halves[0, 0] - halves[0, 1]).max() > 1e-3


def test_soft_tokens_stand_where_the_batch_says():
    batch = two_images()
    found, soft, words = encode(batch), soft_tokens(batch.images), params()["llm"]["embedding"][batch.tokens]
    expected = np.array(words)
    expected[:, 1:1 + 2 * tiny.Q] = soft
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_without_images_words_alone():
    batch = tiny.batch(rows=2, image_count=0)
    words = params()["llm"]["embedding"][batch.tokens]
    np.testing.assert_array_equal(encode(batch), words)
    nowhere = dataclasses.replace(batch, images=two_images().images)
    np.testing.assert_array_equal(encode(nowhere), words)


def test_without_qformer_four_patches_in_raster_order_become_one_soft_token():
    cfg, p = WITHOUT, params(WITHOUT)
    assert cfg.image_tokens == 16 // 4
    assert "qformer" not in p
    images = np.random.default_rng(0).normal(size=(1, 1, 3, 28, 28)).astype(np.float32)
    tower = tiny.jit(lambda p, x: LayerNorm(1e-5).apply(
        {"params": p["ln_vision"]}, EvaVit(eva_vit.TINY).apply({"params": p["vit"]}, x)))
    tokens = np.asarray(tower(p, images[0]))[0]
    w, b = (np.asarray(p["projector"][name]) for name in "wb")
    expected = [np.concatenate([tokens[1 + 4 * k + j] for j in range(4)]) @ w + b for k in range(4)]
    np.testing.assert_allclose(soft_tokens(images, cfg)[0], expected, atol=2e-5)


def test_images_may_come_normalised():
    pixels = two_images().images
    np.testing.assert_allclose(soft_tokens(pixels), soft_tokens(normalise(pixels)), atol=1e-5)
