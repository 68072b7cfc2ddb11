"""Properties of the Q-Former. Its numbers: tests/parity."""

import dataclasses
import functools

import jax
import numpy as np

from mmjax import trees
from mmjax.models.qformer import TINY, QFormer
from tests import tiny

IMAGE = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)


@functools.cache
def params():
    return tiny.module_params(QFormer(TINY), IMAGE)


@functools.cache
def run():
    model = QFormer(dataclasses.replace(TINY, dropout=0.3))
    return tiny.jit(lambda p, image, rngs: model.apply({"params": p}, image, rngs=rngs))


def test_dropout_acts_only_when_given_randomness():
    plain = tiny.jit(lambda p, x: QFormer(dataclasses.replace(TINY, dropout=0.0)).apply({"params": p}, x))
    undisturbed = run()(params(), IMAGE, {})
    np.testing.assert_array_equal(undisturbed, plain(params(), IMAGE))
    first, again, other = (run()(params(), IMAGE, {"qformer": jax.random.key(seed)}) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1 < np.abs(first - undisturbed).max()


def test_only_every_other_layer_looks_at_the_image():
    for every, expected in ((2, {0, 2, 4}), (3, {0, 3})):
        model = QFormer(dataclasses.replace(TINY, depth=5, cross_every=every))
        paths = trees.flatten(jax.eval_shape(model.init, jax.random.key(0), IMAGE)["params"])
        for part in ("cross/", "cross_norm/"):
            assert {int(path[len("layer_")]) for path in paths if f"/{part}" in path} == expected
        assert {path.split("/")[0] for path in paths} == {"query_tokens", "norm"} | {f"layer_{i}" for i in range(5)}


def test_images_of_a_batch_do_not_mix_and_every_token_is_read():
    changed = IMAGE.copy()
    before = run()(params(), IMAGE, {})
    for token in range(5):
        changed[0] = IMAGE[0]
        changed[0, token] += 1
        after = run()(params(), changed, {})
        np.testing.assert_array_equal(after[1], before[1])
        assert np.abs(after[0] - before[0]).max(-1).min() > 1e-4  # every query saw it
