"""Properties of the decoder. Its numbers: tests/parity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.families import llama as family
from mmjax.families.base import causal_mask
from mmjax.models.llama import TINY, Llama, LoraProject, rope
from tests import tiny

B, T = 2, 7
GROUPED, EQUAL = TINY, dataclasses.replace(TINY, kv_heads=TINY.heads)
LORA = dataclasses.replace(TINY, lora_rank=3, lora_alpha=6.0)
POSITIONS = np.tile(np.arange(T, dtype=np.int32), (B, 1))
ALL = np.ones((B, T), bool)


@functools.cache
def params(cfg):
    return tiny.params("llama", family.Config(cfg))["llama"]


def logits(cfg, params, x, positions, valid, remat=False, rngs=None):
    """x [B,T,D], positions int[B,T], valid bool[B,T] -> [B,T,V]."""
    model = Llama(cfg, remat=remat)
    hidden, _ = model.apply({"params": params}, x, positions, causal_mask(valid), rngs=rngs)
    return model.apply({"params": params}, hidden, method="logits")


@functools.cache
def forward(cfg):
    """`logits` compiled for a configuration."""
    return tiny.jit(functools.partial(logits, cfg))


def vectors(seed=0, length=T):
    return np.random.default_rng(seed).normal(size=(B, length, TINY.dim)).astype(np.float32)


def test_causality_by_gradient():
    """No logit depends on a later vector, and every logit on every earlier one."""
    weights = vectors(1)[:1, :, :1]

    def mixed(x, params):
        return (logits(TINY, params, x, POSITIONS[:1], ALL[:1]) * weights).sum(-1)[0]

    slopes = tiny.jit(jax.jacrev(mixed))(vectors()[:1], params(TINY))
    depends = np.asarray(np.abs(slopes).max((1, 3)) > 0)
    np.testing.assert_array_equal(depends, np.tri(T, dtype=bool))


@pytest.mark.parametrize("padded", [[5, 6], [0, 1], [0, 3, 6]], ids=["right", "left", "holes"])
def test_padding_changes_nothing_at_real_positions(padded):
    valid = ALL.copy()
    valid[:, padded] = False
    x, other = vectors(0), vectors(1)
    other[:, valid[0]] = x[:, valid[0]]
    found, expected = (forward(TINY)(params(TINY), each, POSITIONS, valid) for each in (other, x))
    np.testing.assert_array_equal(found[:, valid[0]], expected[:, valid[0]])
    assert np.abs(found - expected)[:, padded].max() > 0.01


def test_padded_row_equals_the_short_row():
    x = vectors()
    valid = ALL.copy()
    valid[:, 4:] = False
    long = forward(TINY)(params(TINY), x, POSITIONS, valid)
    short = forward(TINY)(params(TINY), x[:, :4], POSITIONS[:, :4], ALL[:, :4])
    np.testing.assert_allclose(long[:, :4], short, atol=2e-6)


@pytest.mark.parametrize("cfg", [GROUPED, EQUAL], ids=["grouped heads", "equal heads"])
def test_cached_decoding_equals_the_full_pass(cfg):
    """A prefill of 4 and single steps, over a cache that held rubbish, one row padded on the left."""
    x, S = vectors(), T + 2
    valid = ALL.copy()
    valid[1, :2] = False
    expected = forward(cfg)(params(cfg), x, POSITIONS, valid)
    model = Llama(cfg)

    @tiny.jit
    def step(params, x, positions, mask, cache, start):
        hidden, cache = model.apply({"params": params}, x, positions, mask, cache, start)
        return model.apply({"params": params}, hidden, method="logits"), cache

    cache = jax.tree.map(lambda slots: slots + 100, model.empty_cache(B, S))
    assert {name: slots.shape for name, slots in cache.items()} == dict.fromkeys(
        "kv", (cfg.depth, B, S, cfg.kv_heads, cfg.head_dim))
    mask = np.pad(np.tri(T, dtype=bool) & valid[:, None], ((0, 0), (0, 0), (0, S - T)))
    found = []
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 7)):
        here = slice(start, stop)
        words, cache = step(params(cfg), x[:, here], POSITIONS[:, here], mask[:, here], cache, start)
        found.append(words)
    found = np.concatenate(found, axis=1)
    np.testing.assert_allclose(found[valid], np.asarray(expected)[valid], atol=5e-6)


def test_fresh_lora_changes_nothing():
    tuned = jax.tree.map(lambda leaf: leaf, params(LORA))
    plain = jax.tree.map(lambda leaf: leaf, params(LORA))
    for name in "qv":
        tuned["layers"]["attn"][name]["lora_b"] *= 0
        plain["layers"]["attn"][name] = {"w": tuned["layers"]["attn"][name]["w"]}
    inputs = vectors(), POSITIONS, ALL
    np.testing.assert_array_equal(forward(LORA)(tuned, *inputs), forward(TINY)(plain, *inputs))
    fresh = LoraProject((4, 2, 3), rank=2).init(jax.random.key(0), "BTD,DNH->BTNH", jnp.ones((1, 1, 4)))["params"]
    assert not fresh["lora_b"].any()
    assert fresh["lora_a"].all()


def test_merged_lora_equals_unmerged():
    merged = jax.tree.map(lambda leaf: leaf, params(LORA))
    for name in "qv":
        part = params(LORA)["layers"]["attn"][name]
        added = jnp.einsum("LDR,LRNH->LDNH", part["lora_a"], part["lora_b"], precision="highest")
        merged["layers"]["attn"][name] = {"w": part["w"] + LORA.lora_alpha / LORA.lora_rank * added}
    inputs = vectors(), POSITIONS, ALL
    found, expected = forward(LORA)(params(LORA), *inputs), forward(TINY)(merged, *inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected - forward(TINY)(tiny.params("llama", family.Config(TINY))["llama"], *inputs)).max() > 0.1


def test_lora_dropout_acts_when_given_randomness():
    """Without any it does not: `test_merged_lora_equals_unmerged`."""
    assert LORA.lora_dropout > 0
    dropping = tiny.jit(lambda params, *inputs, key: logits(LORA, params, *inputs, rngs={"llama": key}))
    inputs = params(LORA), vectors(), POSITIONS, ALL
    first, again, other = (dropping(*inputs, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3 < np.abs(first - forward(LORA)(*inputs)).max()


def test_tied_head_is_the_embedding():
    cfg = dataclasses.replace(TINY, tied=True)
    assert "head" not in params(cfg)
    untied = params(cfg) | {"head": {"w": params(cfg)["embedding"].T}}
    inputs = vectors(), POSITIONS, ALL
    np.testing.assert_allclose(forward(cfg)(params(cfg), *inputs), forward(TINY)(untied, *inputs), atol=1e-5)


def test_recomputing_layers_keeps_the_gradients():
    def gradients(remat):
        def loss(params):
            return (logits(TINY, params, vectors(), POSITIONS, ALL, remat=remat) ** 2).mean()

        return tiny.jit(jax.grad(loss))(params(TINY))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max()),
                 gradients(True), gradients(False))


def test_rope_turns_complex_numbers():
    """Element j and j + H/2 are one complex number, turned by position · theta^(-2j/H)."""
    H, theta = 8, 100.0
    x = np.random.default_rng(0).normal(size=(2, 5, 3, H)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 7, 0, 40, 1000]])
    numbers = x[..., : H // 2].astype(np.float64) + 1j * x[..., H // 2 :]
    angles = np.array([[[p * theta ** (-2 * j / H) for j in range(H // 2)] for p in row] for row in positions])
    turned = numbers * np.exp(1j * angles)[:, :, None]
    found = rope(x, positions, theta)
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], -1), atol=2e-4)
    np.testing.assert_array_equal(found[0, 0], x[0, 0])


def test_rope_scores_depend_on_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def score(at_q, at_k):
        return (rope(q, np.array([[at_q]]), 1e4) * rope(k, np.array([[at_k]]), 1e4)).sum()

    np.testing.assert_allclose(score(9, 4), score(25, 20), rtol=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_embedding_is_a_plain_table():
    tokens = np.array([[3, 0, 95]])
    found = Llama(TINY).apply({"params": params(TINY)}, tokens, method="embed")
    np.testing.assert_array_equal(found, params(TINY)["embedding"][tokens])
    narrow = Llama(TINY, jnp.bfloat16).apply({"params": params(TINY)}, tokens, method="embed")
    assert narrow.dtype == jnp.bfloat16


def test_logits_are_float32_whatever_the_activations():
    model = Llama(TINY, jnp.bfloat16)
    hidden = jax.ShapeDtypeStruct((B, T, TINY.dim), jnp.bfloat16)

    def run(params, x):
        hidden, _ = model.apply({"params": params}, x, POSITIONS, causal_mask(ALL))
        return hidden, model.apply({"params": params}, hidden, method="logits")

    made = jax.eval_shape(run, params(TINY), hidden)
    assert [part.dtype for part in made] == [jnp.bfloat16, jnp.float32]
