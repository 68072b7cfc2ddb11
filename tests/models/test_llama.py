"""Properties of the decoder. Its numbers: tests/parity."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import trees
from mmjax.convert.adapter import adapted
from mmjax.families import FAMILIES
from mmjax.families import llama as family
from mmjax.inference.layouts import unstack
from mmjax.models import int8
from mmjax.models.llama import TINY, Llama, LlamaConfig, LoraProject, rope
from mmjax.models.masks import cached_mask, causal_mask
from tests import tiny

B, T = 2, 7
GROUPED, EQUAL = TINY, dataclasses.replace(TINY, kv_heads=TINY.heads)
LORA = dataclasses.replace(TINY, lora_rank=3, lora_alpha=6.0)
HEAD, LAYER, SHARED = (dataclasses.replace(TINY, injection=form) for form in ("head", "layer", "shared"))
FORMS = {"one prompt": (HEAD, 1), "prompts": (HEAD, 3), "layer": (LAYER, 1), "shared": (SHARED, 1)}  # config, P
POSITIONS = np.tile(np.arange(T, dtype=np.int32), (B, 1))
ALL = np.ones((B, T), bool)


@functools.cache
def params(cfg):
    return tiny.params("llama", family.TextLlamaConfig(cfg))["llm"]


def logits(cfg, params, x, positions, valid, injection=None, remat=False, rngs=None):
    """x [B,T,D], positions int[B,T], valid bool[B,T], injection [L,B,P,D] -> [B,T,V]."""
    model = Llama(cfg, remat=remat)
    hidden, _ = model.apply({"params": params}, x, positions, causal_mask(valid), injection=injection, rngs=rngs)
    return model.apply({"params": params}, hidden, method="logits")


@functools.cache
def forward(cfg):
    """`logits` compiled for a configuration."""
    return tiny.jit(functools.partial(logits, cfg))


def vectors(seed=0, length=T):
    return np.random.default_rng(seed).normal(size=(B, length, TINY.dim)).astype(np.float32)


def injected(count, seed=2):
    """[L,B,P,D] for P = `count`."""
    return np.random.default_rng(seed).normal(size=(TINY.depth, B, count, TINY.dim)).astype(np.float32)


def replaced(params, pattern, function):
    """Parameters of which those whose path matches are given to a function."""
    return trees.map_with_path(lambda path, leaf: function(leaf) if trees.matches(path, [pattern]) else leaf, params)


GATES = "(layers/)?(attn/)?gate"


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


CACHED = {"grouped heads": (GROUPED, 0), "equal heads": (EQUAL, 0), **FORMS}


@pytest.mark.parametrize(("cfg", "count"), CACHED.values(), ids=CACHED)
def test_cached_decoding_equals_the_full_pass(cfg, count):
    """A prefill of 4 and single steps, over a cache that held rubbish, one row padded on the left."""
    x, S = vectors(), T + 2
    valid = ALL.copy()
    valid[1, :2] = False
    injection = injected(count) if count else None
    expected = forward(cfg)(params(cfg), x, POSITIONS, valid, injection)
    model = Llama(cfg)

    @tiny.jit
    def step(params, x, positions, valid, cache, start):
        mask = cached_mask(valid, start)
        hidden, cache = model.apply({"params": params}, x, positions, mask, cache, start, injection)
        return model.apply({"params": params}, hidden, method="logits"), cache

    cache = jax.tree.map(lambda slots: slots + 100, model.empty_cache(B, S))
    assert {name: slots.shape for name, slots in cache.items()} == dict.fromkeys(
        "kv", (cfg.depth, B, S, cfg.kv_heads, cfg.head_dim))
    slots = np.pad(valid, ((0, 0), (0, S - T)), constant_values=True)  # none sees a slot after its own
    found = []
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 7)):
        here = slice(start, stop)
        words, cache = step(params(cfg), x[:, here], POSITIONS[:, here], slots, cache, start)
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
    assert (
        np.abs(expected - forward(TINY)(tiny.params("llama", family.TextLlamaConfig(TINY))["llm"], *inputs)).max() > 0.1
    )


def test_lora_dropout_acts_when_given_randomness():
    """Without any it does not: `test_merged_lora_equals_unmerged`."""
    assert LORA.lora_dropout > 0
    dropping = tiny.jit(lambda params, *inputs, key: logits(LORA, params, *inputs, rngs={"llm": key}))
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
            return (logits(HEAD, params, vectors(), POSITIONS, ALL, injected(2), remat=remat) ** 2).mean()

        return tiny.jit(jax.grad(loss))(params(HEAD))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max()),
                 gradients(True), gradients(False))


@pytest.mark.parametrize(("cfg", "count"), FORMS.values(), ids=FORMS)
def test_closed_gates_and_fresh_lora_and_biases_leave_plain_llama_bit_for_bit(cfg, count):
    """In one compiled function each, as they are used."""
    cfg = adapted(cfg, 3)
    inputs, injection = (vectors(), POSITIONS, ALL), injected(count)
    closed = replaced(params(cfg), f"{GATES}|.*/(lora_b|b)", np.zeros_like)
    plain = {path: leaf for path, leaf in trees.flatten(closed).items() if path in trees.flatten(params(TINY))}
    expected = forward(TINY)(trees.unflatten(plain), *inputs)
    np.testing.assert_array_equal(forward(cfg)(closed, *inputs, injection), expected)
    for part in (GATES, ".*/lora_b", ".*/b"):
        changed = replaced(closed, part, np.ones_like)
        assert np.abs(forward(cfg)(changed, *inputs, injection) - expected).max() > 0.1


@pytest.mark.parametrize(("cfg", "count"), FORMS.values(), ids=FORMS)
def test_closed_gates_learn_and_what_lies_behind_them_does_not_yet(cfg, count):
    @tiny.jit
    def slopes(params, injection):
        def loss(params, injection):
            return (logits(cfg, params, vectors(), POSITIONS, ALL, injection) ** 2).mean()

        return jax.grad(loss, (0, 1))(params, injection)

    of_params, of_injection = slopes(replaced(params(cfg), GATES, np.zeros_like), injected(count))
    gates = [leaf for path, leaf in trees.flatten(of_params).items() if trees.matches(path, [GATES])]
    assert len(gates) == 1 and np.all(gates[0])
    assert not np.any(of_injection)
    assert np.all(np.any(slopes(params(cfg), injected(count))[1], axis=-1))


@pytest.mark.parametrize(("cfg", "count"), [FORMS["one prompt"], FORMS["prompts"], FORMS["layer"]])
def test_zeros_in_a_layer_are_nothing_injected(cfg, count):
    """Layers below the injected ones are given zeros, and may have gates that are not closed."""
    injection = injected(count)
    injection[0] = 0
    closed = replaced(params(cfg), GATES, lambda gate: gate * np.array([[0], [1]], np.float32))
    inputs = vectors(), POSITIONS, ALL, injection
    np.testing.assert_array_equal(forward(cfg)(params(cfg), *inputs), forward(cfg)(closed, *inputs))


def test_prompts_are_read_by_attention():
    """Copies of a prompt are read as the prompt alone, and their order does not matter."""
    inputs, three = (vectors(), POSITIONS, ALL), injected(3)
    run = functools.partial(forward(HEAD), params(HEAD), *inputs)
    np.testing.assert_allclose(run(np.repeat(three[:, :, :1], 3, axis=2)), run(three[:, :, :1]), atol=5e-6)
    np.testing.assert_allclose(run(three[:, :, ::-1]), run(three), atol=5e-6)
    assert np.abs(run(three) - run(three.mean(2, keepdims=True))).max() > 1e-3


def test_rows_read_their_own_prompts():
    inputs, injection = (vectors(), POSITIONS, ALL), injected(3)
    run = functools.partial(forward(HEAD), params(HEAD), *inputs)
    other = injection.copy()
    other[:, 1] += 1
    changed = np.abs(run(other) - run(injection)).max((1, 2))
    assert changed[0] == 0 < changed[1]


def test_factors_of_head_gates():
    """tanh(gate) · new_gate, without tanh where the config says so."""
    raw, factored = (dataclasses.replace(HEAD, **more) for more in ({"gate_tanh": False}, {"new_gate": True}))
    inputs = vectors(), POSITIONS, ALL, injected(3)
    weights = params(HEAD)
    half = replaced(weights, GATES, lambda gate: 0.5 * jnp.tanh(gate))
    both = trees.unflatten(trees.flatten(weights) | {"layers/attn/new_gate": np.full((TINY.depth, 1), 0.5, np.float32)})
    np.testing.assert_allclose(forward(raw)(half, *inputs), forward(factored)(both, *inputs), atol=5e-6)
    assert np.abs(forward(raw)(half, *inputs) - forward(HEAD)(weights, *inputs)).max() > 1e-3


def test_unknown_injection_is_refused():
    with pytest.raises(ValueError, match="'token': '' .none., 'head', 'layer' or 'shared'"):
        LlamaConfig(injection="token")


def test_rope_turns_complex_numbers():
    """Element j and j + H/2 are one complex number, transposed by position · theta^(-2j/H)."""
    H, theta = 8, 100.0
    x = np.random.default_rng(0).normal(size=(2, 5, 3, H)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 7, 0, 40, 1000]])
    numbers = x[..., : H // 2].astype(np.float64) + 1j * x[..., H // 2 :]
    angles = np.array([[[p * theta ** (-2 * j / H) for j in range(H // 2)] for p in row] for row in positions])
    transposed = numbers * np.exp(1j * angles)[:, :, None]
    found = rope(x, positions, theta)
    np.testing.assert_allclose(found, np.concatenate([transposed.real, transposed.imag], -1), atol=2e-4)
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


# Layers with weights of their own

BIASED = dataclasses.replace(adapted(HEAD, 3), new_gate=True)
APART = {**CACHED, "LoRA and biases": (BIASED, 3), "tied": (dataclasses.replace(TINY, tied=True), 0)}


def apart(params, transposed=False):
    return unstack({"llm": params}, TINY.matrices, transposed)["llm"]


def in_steps(model, params, injection):
    """Logits [B,T,V] of a prefill of 4 and single steps, over a cache that held rubbish, one row padded on the left."""

    @tiny.jit
    def step(params, x, positions, valid, cache, start):
        mask = cached_mask(valid, start)
        hidden, cache = model.apply({"params": params}, x, positions, mask, cache, start, injection)
        return model.apply({"params": params}, hidden, method="logits"), cache

    cache = jax.tree.map(lambda slots: slots + 100, model.empty_cache(B, T))
    valid = ALL.copy()
    valid[1, :2] = False
    found = []
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 7)):
        here = slice(start, stop)
        words, cache = step(params, vectors()[:, here], POSITIONS[:, here], valid, cache, start)
        found.append(words)
    assert {slots.shape[1:3] for slots in jax.tree.leaves(cache)} == {(B, T)}
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize(("cfg", "count"), APART.values(), ids=APART)
def test_unrolled_layers_equal_scanned_ones(cfg, count):
    injection = injected(count) if count else None
    expected = in_steps(Llama(cfg), params(cfg), injection)
    for transposed in (False, True):
        found = in_steps(
            Llama(cfg, scan_layers=False, transposed_weights=transposed), apart(params(cfg), transposed), injection
        )
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_unrolled_layers_without_a_cache():
    inputs = vectors(), POSITIONS, causal_mask(ALL)
    hidden, cache = tiny.jit(Llama(TINY, scan_layers=False).apply)({"params": apart(params(TINY))}, *inputs)
    assert cache is None
    np.testing.assert_allclose(hidden, Llama(TINY).apply({"params": params(TINY)}, *inputs)[0], atol=1e-5)


def test_unrolled_layers_of_int8():
    rules = LORA.matrices
    held = trees.unflatten({
        path: int8.quantise(leaf, int8.summed(path, leaf.ndim, rules)) if int8.holds(path, rules) else leaf
        for path, leaf in trees.flatten(params(LORA)).items()})
    expected = in_steps(Llama(LORA), held, None)
    for transposed in (False, True):
        weights = apart(held, transposed)
        assert isinstance(weights["layers"]["1"]["mlp"]["up"]["w"], int8.Int8)
        found = in_steps(Llama(LORA, scan_layers=False, transposed_weights=transposed), weights, None)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("family_name", FAMILIES)
def test_unstacked_parameters_are_those_of_the_unrolled_module(family_name):
    family = FAMILIES[family_name]
    cfg = family.presets["tiny"]
    stacked = tiny.params(family_name, cfg)
    for transposed in (True, False):
        module = family.Model(cfg, scan_layers=False, transposed_weights=transposed)
        expected = jax.eval_shape(module.init, jax.random.key(0), family.example(cfg))["params"]
        found = trees.flatten(unstack(stacked, cfg.llm.matrices, transposed))
        assert not trees.compare(trees.flatten(expected), found)
    for path, stack in trees.flatten(stacked["llm"]["layers"]).items():
        for layer in range(cfg.llm.depth):
            np.testing.assert_array_equal(found[f"llm/layers/{layer}/{path}"], stack[layer])
    assert {path for path, leaf in trees.flatten(stacked).items() if found.get(path) is leaf} == {
        path for path in trees.flatten(stacked) if not path.startswith("llm/layers/")}


def test_matrices_of_unstacked_layers_are_views():
    stack = params(TINY)["layers"]["mlp"]["up"]["w"]
    addresses = [apart(params(TINY))["layers"][str(layer)]["mlp"]["up"]["w"].unsafe_buffer_pointer()
                 for layer in range(TINY.depth)]
    step = stack.nbytes // TINY.depth
    assert addresses == [stack.unsafe_buffer_pointer() + layer * step for layer in range(TINY.depth)]


def test_layers_that_cannot_be_looked_into_are_refused():
    class Elsewhere:
        sharding = "a TPU"

        def devices(self):
            return [types.SimpleNamespace(platform="tpu")]

    with pytest.raises(ValueError, match="one CPU device; these are on a TPU. Decode"):
        apart({"layers": {"attn": {"q": {"w": Elsewhere()}}}})


def test_a_form_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="transposed_weights is for unstacked layers"):
        Llama(TINY, transposed_weights=True).init(
            jax.random.key(0), jnp.zeros((1, 2, TINY.dim)), jnp.zeros((1, 2), int), None
        )
