"""Properties of ImageBind's towers. Their numbers: tests/parity."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import trees
from mmjax.families import config_from_dict
from mmjax.models import imagebind
from mmjax.models.imagebind import AXES, IMAGEBIND_HUGE, TINY, ImageBind, ImageBindConfig, Tower, example, windows
from mmjax.models.senses import sense_of
from tests import tiny


def inputs(rows=2, seed=0):
    random = np.random.default_rng(seed)
    return {sense: random.integers(1, c.vocab, (rows, *c.input_shape), np.int32) if c.causal
            else random.normal(size=(rows, *c.input_shape)).astype(np.float32) for sense, c in TINY.towers.items()}


@functools.cache
def params():
    return tiny.module_params(ImageBind(TINY), example(TINY))


@functools.cache
def tower(sense):
    module = Tower(TINY.towers[sense], TINY.out)
    run = tiny.jit(lambda params, x, rngs: module.apply({"params": params}, x, rngs=rngs))
    return lambda x, weights=None, rngs=None: run(weights or params()[sense], x, rngs or {})


def released_shapes(cfg):
    variables = jax.eval_shape(ImageBind(cfg).init, jax.random.key(0), jax.eval_shape(lambda: example(cfg)))
    return trees.flatten(variables["params"])


def test_released_size():
    """1,200,781,057 parameters, as the original counts them, and four factors that it keeps as buffers."""
    count = 0
    for sense, c in IMAGEBIND_HUGE.towers.items():
        D = c.dim
        block = 3 * D * D + 3 * D + D * D + D + 2 * 4 * D * D + 5 * D + 4 * D  # qkv, o, two of the mlp, two norms
        stem = {"vision": 3 * 2 * 14 * 14, "text": 49_408, "imu": 48}.get(sense, 16 * 16) * D
        positions = {"vision": 257, "text": 77, "audio": 229, "depth": 197, "thermal": 197, "imu": 251}[sense] * D
        own = {"vision": D + 2 * D, "text": 0}.get(sense, D + 2 * D)  # class token, and a norm in or behind the stem
        extra = 0 if sense in ("vision", "text") else 2 * D
        count += stem + positions + own + c.depth * (block + extra) + 2 * D + 1_024 * D
    scales = 5
    assert sum(leaf.size for leaf in released_shapes(IMAGEBIND_HUGE).values()) == count + scales
    assert count + scales - 4 == 1_200_781_057


def test_every_parameter_has_axes():
    for path, leaf in released_shapes(IMAGEBIND_HUGE).items():
        names = trees.lookup(path, AXES)
        assert len(names) == len(leaf.shape) and len(set(names)) == len(names), path


def test_config_survives_json():
    for cfg in (IMAGEBIND_HUGE, dataclasses.replace(TINY, text=None, imu=None)):
        assert config_from_dict(ImageBindConfig, json.loads(json.dumps(dataclasses.asdict(cfg)))) == cfg


@pytest.mark.extended
def test_one_call_gives_what_single_towers_give():
    module, given = ImageBind(TINY), inputs()
    together = tiny.jit(module.apply)({"params": params()}, given)
    for sense, x in given.items():
        assert together[sense].dtype == jnp.float32 and together[sense].shape == (2, TINY.out)
        np.testing.assert_allclose(together[sense], tower(sense)(x), atol=1e-5)


@pytest.mark.parametrize("sense", ["vision", pytest.param("audio", marks=pytest.mark.extended)])
def test_clips_are_averaged(sense):
    clips = np.stack([inputs(seed=seed)[sense] for seed in range(3)], axis=1)  # [2, 3, ...]
    got = tiny.jit(ImageBind(TINY).apply)({"params": params()}, {sense: clips})[sense]
    expected = np.mean([tower(sense)(clips[:, i]) for i in range(3)], axis=0)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_image_is_a_video_that_stands_still():
    still = inputs()["vision"]
    moving = np.repeat(still[:, :, None], TINY.vision.frames, axis=2)
    np.testing.assert_array_equal(tower("vision")(still), tower("vision")(moving))


@pytest.mark.extended
def test_words_behind_the_end_change_nothing():
    ids = inputs()["text"] % 30
    ids[:, 5] = TINY.text.vocab - 1  # the end has the highest id
    other = ids.copy()
    other[:, 6:] = (other[:, 6:] + 7) % 30
    np.testing.assert_array_equal(tower("text")(ids), tower("text")(other))
    other[:, 2] = (other[:, 2] + 7) % 30
    assert np.abs(tower("text")(ids) - tower("text")(other)).max() > 1e-3


def test_the_extra_value_is_one_of_the_values():
    """Where queries and values are zero, all keys count alike: the extra value comes out divided by T + 1."""
    cfg, T = TINY.depth, 5
    module = imagebind.TowerAttention(cfg)
    x = np.zeros((1, T, cfg.dim), np.float32)
    weights = trees.map_with_path(lambda path, leaf: leaf * 0, tiny.module_params(module, x))
    N, H = cfg.heads, cfg.dim // cfg.heads
    weights["bias_v"] = np.arange(1.0, 1 + N * H, dtype=np.float32).reshape(N, H)
    weights["o"]["w"] = np.eye(N * H, dtype=np.float32).reshape(N, H, N * H)
    got = module.apply({"params": weights}, x)
    np.testing.assert_allclose(got[0], np.tile(np.arange(1, 1 + N * H) / (T + 1), (T, 1)), rtol=1e-6)


@pytest.mark.extended
@pytest.mark.parametrize(("factor", "length"), [(5.0, 5.0), (1000.0, 100.0)])
def test_features_have_the_length_of_their_factor(factor, length):
    weights = {**params()["depth"], "post": {"log_scale": jnp.log(jnp.array([factor]))}}
    got = tower("depth")(inputs()["depth"], weights)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), length, rtol=1e-5)


@pytest.mark.extended
@pytest.mark.parametrize("sense", ["audio", "imu"])
def test_drop_path_acts_only_when_given_randomness(sense):
    x = inputs()[sense]
    quiet = tower(sense)(x)
    np.testing.assert_array_equal(quiet, tower(sense)(x))
    drawn = [tower(sense)(x, rngs={"imagebind": jax.random.key(seed)}) for seed in range(6)]
    assert len({np.asarray(each).tobytes() for each in drawn}) > 1


def test_windows_overlap_and_leave_out_the_rest():
    x = np.arange(26 * 37).reshape(26, 37)
    cut = windows(x, 16, 10)
    assert cut.shape == (2, 16, 3, 16)
    np.testing.assert_array_equal(cut[1, :, 2], x[10:26, 20:36])


@pytest.mark.extended
def test_bfloat16_stays_near_float32():
    module, given = ImageBind(TINY, jnp.bfloat16), inputs()
    low = tiny.jit(module.apply)({"params": params()}, given)
    for sense, x in given.items():
        exact = tower(sense)(x)
        assert low[sense].dtype == jnp.float32
        assert np.abs(low[sense] - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize(("sense", "shape", "message"), [
    ("vision", (1, 3, 28, 30), r"square images .* got \[3, 28, 30\]"),
    ("vision", (1, 3, 7, 7), "at least 14 pixels"),
    ("audio", (1, 1, 26, 40), r"shape \[1, 26, 36\], got \[1, 26, 40\]"),
    ("text", (1, 77), r"shape \[12\], got \[77\]"),
    ("imu", (1, 6, 40), r"shape \[6, 32\], got \[6, 40\]"),
])
def test_inputs_of_another_shape_are_refused(sense, shape, message):
    with pytest.raises(ValueError, match=message):
        Tower(TINY.towers[sense], TINY.out).apply({"params": params()[sense]}, np.zeros(shape, np.int32))


def test_a_sense_without_tower_is_refused():
    cfg = dataclasses.replace(TINY, imu=None)
    with pytest.raises(ValueError, match="no tower for imu; it has vision, text"):
        ImageBind(cfg).apply({"params": params()}, {"imu": inputs()["imu"]})


def test_names_of_senses():
    assert [sense_of(name) for name in ("Image", "Video", "Audio", "imu")] == ["vision", "vision", "audio", "imu"]
    with pytest.raises(ValueError, match="Unknown sense 'Point'; known are image, video, text"):
        sense_of("Point")
