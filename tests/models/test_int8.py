import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax import sharding, trees
from mmjax.checkpoints import frozen as frozen_weights
from mmjax.config import MeshConfig
from mmjax.families import FAMILIES, shapes
from mmjax.inference import generate, loaded
from mmjax.models import int8
from mmjax.models.int8 import Int8
from mmjax.models.layers import einsum, embedding_lookup
from mmjax.training import steps
from tests import small, tiny
from tests.checkpoints.test_frozen import Sliced

RANDOM = np.random.default_rng(0)
CONFIG = tiny.MINIGPT4
MODULE = FAMILIES["minigpt4"].Model(CONFIG)
MATRICES = FAMILIES["minigpt4"].all_matrices(CONFIG)  # every family has the same


def draw(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


@tiny.jit
def held(params):
    """Parameters with all matrices as int8 that may be."""
    return trees.unflatten({
        path: int8.quantise(leaf, int8.summed(path, leaf.ndim, MATRICES)) if int8.holds(path, MATRICES) else leaf
        for path, leaf in trees.flatten(params).items()})


@tiny.jit
def widened(params):
    """The same numbers, every `Int8` multiplied out."""
    return jax.tree.map(lambda leaf: int8.wide(leaf) if isinstance(leaf, Int8) else leaf, params,
                        is_leaf=lambda leaf: isinstance(leaf, Int8))


def wide():
    return tiny.params("minigpt4", CONFIG)


def split(params):
    return trees.split(params, trees.mask(params, FAMILIES["minigpt4"].trained))


def test_it_is_the_nearest():
    w = draw(3, 6, 5) * jnp.exp(draw(3, 1, 5))
    made = int8.quantise(w, (1,))
    assert made.scale.shape == (3, 1, 5) and made.values.dtype == jnp.int8
    np.testing.assert_array_less(np.abs(int8.wide(made) - w), np.broadcast_to(made.scale / 2 * 1.0001, w.shape))
    np.testing.assert_array_equal(np.abs(made.values).max(axis=1), 127)


def test_a_channel_of_zeros_stays_zero_and_one_that_is_not_finite_stays_so():
    w = jnp.ones((4, 3)).at[:, 0].set(0).at[1, 1].set(jnp.nan)
    found = np.asarray(einsum("BD,DF->BF", jnp.ones((2, 4)), int8.quantise(w, (0,))))
    assert (found[:, 0] == 0).all() and np.isnan(found[:, 1]).all()
    np.testing.assert_allclose(found[:, 2], 4, rtol=1e-6)


@pytest.mark.parametrize("letters, shape, axes", [
    ("BTD,DNH->BTNH", (6, 2, 5), (0,)),
    ("BTD,DSNH->SBTNH", (6, 3, 2, 5), (0,)),
    ("BTD,VD->BTV", (7, 6), (1,)),
    ("BTNH,NHD->BTD", (2, 5, 6), (0, 1)),
])
def test_einsum_equals_the_product_with_the_wide_matrix(letters, shape, axes):
    x = draw(2, 4, 2, 5) if letters.startswith("BTN") else draw(2, 4, 6)
    w = int8.quantise(draw(*shape), axes)

    def both(x, w):
        return jax.value_and_grad(lambda x: jnp.square(einsum(letters, x, w)).sum())(x)

    for found, expected in zip(both(x, w), both(x, int8.wide(w)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_a_product_in_bfloat16_is_rounded_once_more_at_most():
    x, w = draw(3, 64).astype(jnp.bfloat16), int8.quantise(draw(64, 5), (0,))
    found, expected = einsum("BD,DF->BF", x, w), einsum("BD,DF->BF", x.astype(jnp.float32), w)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-7, atol=2**-7)


def test_a_tpu_gets_what_is_summed_over_before_the_last_axis():
    assert int8.order((32, 4096, 32, 128), (1,)).major_to_minor == (0, 2, 1, 3)
    assert int8.order((32, 32, 128, 4096), (1, 2)).major_to_minor == (0, 1, 2, 3)
    assert int8.order((39, 1408, 3, 16, 88), (1,)) is None  # XLA itself puts heads this narrow elsewhere
    assert int8.order((32000, 4096), (1,)) is None


def test_look_up():
    table, ids = int8.quantise(draw(7, 6), (1,)), jnp.array([[3, 0], [6, 3]])
    np.testing.assert_array_equal(embedding_lookup(table, ids, jnp.float32), int8.wide(table)[ids])


@pytest.mark.parametrize("family, preset", [
    ("minigpt4", "minigpt4-7b"), ("imagebind_llm", "imagebind-llm-7b"), ("llama_adapter", "llama-adapter-v2-7b")])
def test_every_large_matrix_is_in_the_table(family, preset):
    sizes = {path: math.prod(shape.shape) for path, shape in shapes(family, FAMILIES[family].presets[preset]).items()}
    assert sum(size for path, size in sizes.items() if not int8.holds(path, MATRICES)) < 0.01 * sum(sizes.values())


def test_every_line_of_the_table_is_of_some_parameter():
    paths = [path for family in FAMILIES for path in shapes(family, FAMILIES[family].presets["tiny"])]
    for pattern, _ in MATRICES:
        assert any(trees.matches(path, [pattern]) for path in paths), pattern


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_scaled_where_it_is_used(family):
    """A scale that is not one of the product's channels could not be traced."""
    config = FAMILIES[family].presets["tiny"]
    module = FAMILIES[family].Model(config)
    params = jax.eval_shape(held, trees.unflatten(shapes(family, config)))
    logits = jax.eval_shape(lambda params: module.apply({"params": params}, FAMILIES[family].example(config)), params)
    assert logits.dtype == jnp.float32


@tiny.jit
def logits_and_gradients(trained, frozen):
    def loss(trained):
        value, aux = steps.loss(MODULE, trees.merge(trained, frozen), tiny.batch())
        return value, aux["logits"]

    (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(trained)
    return logits, grads


def off(found, expected):
    """|found - expected| / |expected|, all numbers as one long vector."""
    return float(optax.global_norm(jax.tree.map(jnp.subtract, found, expected)) / optax.global_norm(expected))


def test_a_model_equals_the_one_with_wide_matrices():
    """In its logits and in the gradients of what is trained, and is near the one that was not rounded."""
    params = held(wide())
    found, same, unrounded = (logits_and_gradients(*split(params)) for params in (params, widened(params), wide()))
    np.testing.assert_allclose(found[0], same[0], rtol=1e-6, atol=1e-6 * np.abs(same[0]).max())
    assert off(found[1], same[1]) < 2e-6
    for part, expected in zip(found, unrounded, strict=True):
        assert 1e-4 < off(part, expected) < 0.1


def test_a_training_step_keeps_and_changes_no_matrix():
    """The matrices of all layers are nowhere in float32, not even for the backward pass."""
    trained, frozen = split(held(wide()))
    assert not any(isinstance(leaf, Int8) for leaf in trees.flatten(trained).values())
    before, optimizer = steps.fingerprint(frozen), optax.adam(1e-2)
    state = steps.start(tiny.copied(trained), optimizer, 0)
    lowered = steps.train_step(MODULE, optimizer).lower(state, frozen, tiny.batch())
    L, D, F = CONFIG.llm.depth, CONFIG.llm.dim, CONFIG.llm.hidden
    assert f"tensor<{L}x{D}x{F}xi8>" in lowered.as_text() and f"tensor<{L}x{D}x{F}xf32>" not in lowered.as_text()
    step, losses = lowered.compile(compiler_options=tiny.quick_options()), []
    for _ in range(3):
        state, metrics = step(state, frozen, tiny.batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] and steps.fingerprint(frozen) == before


def test_a_fingerprint_sees_one_value():
    w = held(wide())["llm"]["layers"]["mlp"]["up"]["w"]
    changed = dataclasses.replace(w, values=w.values.at[0, 0, 0].add(1))
    assert steps.fingerprint(changed) != steps.fingerprint(w)


def test_greedy_words_are_those_of_the_wide_matrices():
    config = FAMILIES["llama"].presets["tiny"]
    params = held(tiny.params("llama", config))
    settings = generate.GenerateConfig(max_new_tokens=6, stop=())
    found, expected = (generate.generate(FAMILIES["llama"].Model(config), params, tiny.batch(image_count=0), settings)
                       for params in (params, widened(params)))
    np.testing.assert_array_equal(found.sequences, expected.sequences)


def mesh():
    devices = jax.devices()[: 8 if jax.device_count() >= 8 else 1]
    return sharding.make_mesh(MeshConfig(data=1, fsdp=len(devices) // 2 or 1, tensor=-1), devices)


@pytest.mark.parametrize("slice_bytes", [1, 2**20])
def test_restoring_quantises_what_is_stored(tmp_path, monkeypatch, slice_bytes):
    """The sum runs over a dimension that is cut; the scales lie where their channels do."""
    monkeypatch.setattr(frozen_weights, "SLICE_BYTES", slice_bytes)
    w = np.asarray(draw(3, 8, 4)).astype(np.float16)
    frozen_weights.save(tmp_path / "weights", {"w": Sliced(w, 1), "b": Sliced(w[0], 8)})
    place = jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec(None, "fsdp", "tensor"))
    found = frozen_weights.restore(tmp_path / "weights", {"w": int8.shapes(w.shape, place, (1,)),
                                                          "b": jax.ShapeDtypeStruct(w.shape[1:], jnp.float32)})
    expected = int8.quantise(jnp.asarray(w), (1,))
    jax.tree.map(np.testing.assert_array_equal, found, {"w": expected, "b": w[0].astype(np.float32)})
    assert found["w"].values.sharding.is_equivalent_to(place, 3)
    assert found["w"].scale.sharding.spec == jax.sharding.PartitionSpec(None, None, "tensor")


def test_loading_and_its_size():
    found = loaded.load(small.checkpoint(), frozen_dtype="int8").params
    expected = held(loaded.load(small.checkpoint()).params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    sizes = [(leaf.nbytes, 2 * leaf.size) for leaf in trees.flatten(found).values() if isinstance(leaf, Int8)]
    int8_bytes, bfloat16_bytes = map(sum, zip(*sizes, strict=True))
    assert int8_bytes < 0.6 * bfloat16_bytes  # at full size 0.501: these channels are short, so that scales count


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="frozen_dtype = 'int4'"):
        loaded.load(small.checkpoint(), frozen_dtype="int4")
