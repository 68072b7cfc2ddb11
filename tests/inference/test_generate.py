"""`generate` on tiny random LLaMA models, against slow references written from section 6 of the specification.

The references run the whole model on every prefix, without cache, one row and one beam at a time.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import trees
from mmjax.batch import Batch
from mmjax.families import llama
from mmjax.inference import generate as g
from mmjax.inference.generate import GenerateConfig
from mmjax.models.llama import LlamaConfig

V, T, NEW = 13, 6, 8
TINY = llama.TextLlamaConfig(LlamaConfig(vocab=V, depth=2, dim=16, heads=4, kv_heads=2, head_dim=4, hidden=24))
MODEL = llama.TextLlama(TINY)


class Watched(llama.TextLlama):
    """Remembers which ids it was fed, and how often it was traced."""

    fed = []
    traces = []

    def embed(self, tokens):
        jax.debug.callback(lambda ids: self.fed.append(np.asarray(ids)), tokens)
        return super().embed(tokens)

    def encode(self, batch):
        self.traces.append(batch.tokens.shape)
        return super().encode(batch)


@functools.cache
def params(seed=0):
    """Random weights, drawn by numpy: compiling jax's generator for all of them takes longer than any test here."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), llama.example(TINY))["params"]

    def draw(path, shape):
        # A wide head makes some ids much likelier than others, so that rounding decides nothing.
        mean, spread = (1.0, 0.1) if path.endswith("scale") else (0.0, 0.8 if "head" in path else 0.4)
        return jnp.asarray(random.normal(mean, spread, shape.shape), jnp.float32)

    return trees.map_with_path(draw, shapes)


def rows(prompts, length=T, offsets=None):
    """Prompts as rows of `length` places, each beginning at its offset (0: padding on the right)."""
    tokens = np.zeros((len(prompts), length), np.int32)
    valid = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        places = slice(start := (offsets or [0] * len(prompts))[row], start + len(prompt))
        tokens[row, places], valid[row, places] = prompt, True
    zeros = np.zeros_like(tokens)
    return Batch(tokens, zeros - 1, valid, valid, zeros + np.arange(length, dtype=np.int32), valid.sum(1))


def random_prompts(seed):
    random = np.random.default_rng(seed)
    return [random.integers(0, V, random.integers(1, T + 1)).tolist() for _ in range(8)]


def run(prompts, config, seed=0, model=MODEL, **arguments):
    """Tests share what is compiled: eight rows with scores, or one row without."""
    return g.generate(model, params(seed), rows(prompts), config, **arguments)


def ids_of(generated):
    """The rows without their padding; checks that only padding was taken away."""
    result = []
    for ids, length in zip(np.asarray(generated.sequences), np.asarray(generated.lengths), strict=True):
        assert len(set(ids[length:].tolist())) <= 1
        result.append(ids[:length].tolist())
    return result


# The references.

@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params, batch):
    return model.apply({"params": params}, batch)


def next_logits(seed, prompt, written):
    """float64[len(written),V]: the logits behind the prompt and the ids written so far, the dummy left out."""
    texts = [prompt + ids[1:] for ids in written]
    padded = texts + [[0]] * (4 - len(texts))  # one shape, one compilation
    logits = np.asarray(_forward(MODEL, params(seed), rows(padded, T + NEW)), np.float64)
    return np.stack([logits[row, len(text) - 1] for row, text in enumerate(texts)])


def penalise(scores, ids, config):
    scores = scores.copy()
    for token in set(ids):
        scores[token] *= config.repetition_penalty if scores[token] < 0 else 1 / config.repetition_penalty
    if len(ids) < config.min_length and config.eos >= 0:
        scores[config.eos] = -np.inf
    return scores


def stops(ids, config):
    return any(tuple(ids[1:][-len(stop):]) == stop for stop in config.stop)


def reference_greedy(seed, prompt, config):
    ids = [config.bos]
    while len(ids) <= config.max_new_tokens and not (len(ids) > 1 and ids[-1] == config.eos) and not stops(ids, config):
        [scores] = next_logits(seed, prompt, [ids])
        ids = ids + [int(np.argmax(penalise(scores, ids, config)))]
    return ids


def reference_beams(seed, prompt, config):
    """(ids, score) of the best beam."""
    J, W = config.num_beams, 1 + config.max_new_tokens
    open_beams = [(-1e9 if beam else 0.0, [config.bos]) for beam in range(J)]
    finished, done = [], False  # (score, ids)
    for length in range(1, W):
        candidates = []
        for (total, ids), logits in zip(open_beams, next_logits(seed, prompt, [ids for _, ids in open_beams]),
                                        strict=True):
            log_probs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            candidates += [(total + score, ids + [token])
                           for token, score in enumerate(penalise(log_probs, ids, config))]
        candidates.sort(key=lambda candidate: -candidate[0])
        open_beams = []
        for rank, (total, ids) in enumerate(candidates):
            if ids[-1] == config.eos or stops(ids, config):
                counted = length if ids[-1] == config.eos else length + 1
                finished += [(total / counted**config.length_penalty, ids)] if rank < J else []
            elif len(open_beams) < J:
                open_beams.append((total, ids))
        finished = sorted(finished, key=lambda beam: -beam[0])[:J]
        attainable = candidates[0][0] / (length + 1) ** config.length_penalty
        if len(finished) == J and (config.early_stopping or finished[-1][0] >= attainable):
            done = True
            break
    if not done:
        finished += [(total / W**config.length_penalty, ids) for total, ids in open_beams]
    score, ids = max(finished, key=lambda beam: beam[0])
    return ids, score


GREEDY = {
    "plain": GenerateConfig(max_new_tokens=NEW, do_sample=True, temperature=0.0),
    "penalties": GenerateConfig(max_new_tokens=NEW, repetition_penalty=1.6, min_length=5, bos=4, eos=3, pad=-1,
                                stop=((0,), *((i, i + 1) for i in range(V - 1)), (1,) * 2 * NEW)),
}
BEAMS = {
    "plain": GenerateConfig(max_new_tokens=NEW, num_beams=3),
    "long": GenerateConfig(max_new_tokens=NEW, num_beams=2, length_penalty=1.7, eos=4, bos=0,
                           stop=((5, 6), (7, 7), (8,), (9, 10, 11), (9,))),
    "short": GenerateConfig(max_new_tokens=NEW, num_beams=4, length_penalty=-1.0, repetition_penalty=1.3, pad=-1),
    "minimum": GenerateConfig(max_new_tokens=NEW, num_beams=3, length_penalty=0.0, min_length=6,
                              repetition_penalty=0.8, bos=5),
    "early": GenerateConfig(max_new_tokens=NEW, num_beams=3, early_stopping=True, eos=7, stop=((1, 2), (3,))),
}
SAMPLE = GenerateConfig(max_new_tokens=NEW, do_sample=True, temperature=1.5, top_k=6, top_p=0.8)
STRATEGIES = {"greedy": GREEDY["plain"], "sample": SAMPLE, "beams": BEAMS["plain"]}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_is_the_best_word_of_a_full_pass_each_time(name):
    config, ends = GREEDY[name], set()
    for seed in range(4):
        prompts = random_prompts(seed)
        generated = run(prompts, config, seed, return_scores=True)
        scores = np.asarray(generated.step_scores)
        for row, (prompt, ids) in enumerate(zip(prompts, ids_of(generated), strict=True)):
            assert ids == reference_greedy(seed, prompt, config)
            assert scores[:len(ids) - 1, row].argmax(-1).tolist() == ids[1:]
            expected = penalise(next_logits(seed, prompt, [[config.bos]])[0], [config.bos], config)
            np.testing.assert_allclose(scores[0, row], expected, rtol=1e-4, atol=1e-4)
            ends.add("eos" if ids[-1] == config.eos else "stop" if stops(ids, config) else "length")
    assert ends == {"eos", "length"} | ({"stop"} if config.stop else set())


@pytest.mark.parametrize("name", BEAMS)
def test_beam_search_equals_the_slow_reference(name):
    config, ends = BEAMS[name], set()
    for seed in range(6):
        prompts = random_prompts(seed)
        generated = run(prompts, config, seed, return_scores=True)
        expected = [reference_beams(seed, prompt, config) for prompt in prompts]
        assert ids_of(generated) == [ids for ids, _ in expected]
        np.testing.assert_allclose(generated.scores, [score for _, score in expected], rtol=1e-4, atol=1e-5)
        ends |= {"eos" if ids[-1] == config.eos else "stop" if stops(ids, config) else "length" for ids, _ in expected}
    assert ends >= {"eos"} | ({"stop"} if config.stop else set())
    assert len(ends) > 1

    assert generated.step_scores.shape == (NEW, len(prompts) * config.num_beams, V)
    log_probs = np.asarray(jax.nn.log_softmax(next_logits(seed, prompts[-1], [[config.bos]])[0]), np.float64)
    for beam in range(config.num_beams):
        np.testing.assert_allclose(generated.step_scores[0, -1 - beam], penalise(log_probs, [config.bos], config),
                                   rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_batch_equals_its_rows_alone(name):
    config, prompts = STRATEGIES[name], random_prompts(0)
    keys = jax.random.split(jax.random.key(1), len(prompts))
    together = ids_of(run(prompts, config, key=keys, return_scores=True))
    alone = [ids_of(run([prompt], config, key=keys[i:i + 1]))[0] for i, prompt in enumerate(prompts)]
    assert together == alone
    assert len(set(map(tuple, together))) > 4


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_place_of_the_padding_changes_nothing(name):
    batch, keys = rows([[3, 1, 4]] * 8, offsets=[0, 3, 2, 1] * 2), jnp.stack([jax.random.key(7)] * 8)
    first, *others = ids_of(g.generate(MODEL, params(), batch, STRATEGIES[name], keys, return_scores=True))
    assert others == [first] * 7


def test_one_compilation_no_padding_fed_and_an_end_with_the_last_row():
    # Of 13 ids 5 end a row, so most runs end long before `max_new_tokens`.
    config = GenerateConfig(max_new_tokens=30, pad=-1, eos=-1, stop=tuple((i,) for i in range(5)))
    steps = []
    for seed in range(4):
        Watched.fed.clear()
        # an equal module and config, not the same objects
        model = Watched(llama.TextLlamaConfig(dataclasses.replace(TINY.llm)))
        generated = run(random_prompts(seed), dataclasses.replace(config), seed, model=model)
        jax.effects_barrier()
        fed, lengths = Watched.fed, np.asarray(generated.lengths)
        assert len(set(lengths)) > 1
        assert (np.asarray(generated.sequences)[np.arange(31) >= lengths[:, None]] == config.pad).all()
        assert min(ids.min() for ids in fed) >= 0 and max(ids.max() for ids in fed) < V
        assert len(fed) == lengths.max() - 1  # the prompt, then every id but the dummy and the last
        steps.append(len(fed))
    assert min(steps) < 20
    assert len(Watched.traces) == 1


def test_the_dummy_first_id_is_no_part_of_a_stop_sequence():
    sequences = jnp.array([[7, 8, 0], [8, 7, 8]])
    stop = ((7, 8),)
    assert g.ends_with(sequences, 2, stop).tolist() == [False, False]
    assert g.ends_with(sequences, 3, stop).tolist() == [False, True]


def test_sampling_draws_from_the_filtered_distribution():
    drawn, calls = np.zeros(V), 250
    for seed in range(calls):
        generated = run([[1, 2, 3]] * 8, SAMPLE, key=jax.random.key(seed), return_scores=True)
        drawn += np.bincount(np.asarray(generated.sequences)[:, 1], minlength=V) / (8 * calls)
    probabilities = np.asarray(jax.nn.softmax(generated.step_scores[0, 0]))
    assert 2 <= (probabilities > 0).sum() <= 6
    np.testing.assert_array_equal(drawn[probabilities == 0], 0)
    np.testing.assert_allclose(drawn, probabilities, atol=4 * 0.5 * (8 * calls)**-0.5)


def test_the_seed_decides_and_rows_differ():
    first, again, other = (ids_of(run([[1, 2, 3]] * 8, SAMPLE, key=jax.random.key(seed), return_scores=True))
                           for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len(set(map(tuple, first))) > 1


def test_each_step_draws_anew():
    indifferent = jnp.zeros((2, V))
    config = GenerateConfig(max_new_tokens=20, do_sample=True, top_k=0, eos=-1)
    keys = jax.random.split(jax.random.key(0), 2)
    strategy, numbers = g.compiled(config)
    rows = g._first_tokens(strategy, numbers, indifferent, keys, None)
    for _ in range(19):
        rows = g._next_tokens(strategy, numbers, indifferent, keys, rows)
    assert all(len(set(ids[1:].tolist())) > 5 for ids in np.asarray(rows.sequences))


def test_sampling_without_a_key_is_refused():
    with pytest.raises(ValueError, match="needs a key"):
        run([[1]], SAMPLE)


def test_minimum_length_and_filters_by_hand():
    scores = jnp.array([[1.0, 3.0, 2.0, 2.0]])
    inf = jnp.inf
    np.testing.assert_array_equal(g.min_length(scores, 2, 3, eos=1), [[1, -inf, 2, 2]])
    np.testing.assert_array_equal(g.min_length(scores, 3, 3, eos=1), scores)
    np.testing.assert_array_equal(g.min_length(scores, 2, 3, eos=-1), scores)
    np.testing.assert_array_equal(g.top_k(scores, 2), [[-inf, 3, 2, 2]])  # ties stay
    np.testing.assert_array_equal(g.top_k(scores, 9), scores)
    np.testing.assert_array_equal(g.top_p(scores, 1e-9), [[-inf, 3, -inf, -inf]])
    np.testing.assert_array_equal(g.top_p(jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])), 0.65) > -inf, [0, 0, 1, 1])
    tied = jnp.log(jnp.array([0.25, 0.5, 0.25]))
    np.testing.assert_array_equal(g.top_p(tied, 0.5) > -inf, [0, 1, 0])  # enough is enough
    np.testing.assert_array_equal(g.top_p_inclusive(tied, 0.5) > -inf, [1, 1, 0])  # until it is exceeded; no ties
    np.testing.assert_array_equal(g.top_p_inclusive(scores, 0.0), [[-inf, 3, -inf, -inf]])
    for inclusive, kept in ((False, 1), (True, 2)):
        config = GenerateConfig(do_sample=True, top_k=0, top_p=0.5, top_p_inclusive=inclusive)
        assert (g.filter_scores(*g.compiled(config), tied) > -inf).sum() == kept
    seen = g.seen_tokens(jnp.array([[2, 0, 3], [1, 1, 0]]), 2, 4)
    np.testing.assert_array_equal(seen, [[1, 0, 1, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(g.repetition_penalty(jnp.array([2.0, -2.0, 2.0]), jnp.array([True, True, False]), 2),
                                  [1, -4, 2])


def test_every_wrong_setting_is_named_at_once():
    with pytest.raises(ValueError) as error:
        GenerateConfig(max_new_tokens=0, num_beams=0, temperature=-1.0, top_k=-1, top_p=0.0, repetition_penalty=0.0,
                       min_length=-1, stop=((),))
    for name in ("max_new_tokens = 0", "num_beams = 0", "temperature = -1.0", "top_k = -1", "top_p = 0.0",
                 "repetition_penalty = 0.0", "min_length = -1", "stop = ((),)"):
        assert name in str(error.value)
    for wrong, words in (
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"stop": [[1]]}, "stop"),
        ({"stop": (1,)}, "stop"),
        ({"temperature": 1e-40}, "temperature = 1e-40"),
        ({"temperature": math.inf}, "temperature"),
        ({"length_penalty": math.nan}, "length_penalty"),
        ({"repetition_penalty": math.inf}, "repet"),
        ({"bos": None}, "bos = None, but must be a token id"),
        ({"eos": None}, "eos = None, but must be a token id .*-1: nothing ends a row"),
        ({"eos": [2, 3]}, r"eos = \[2, 3\], but must be a token id .of several give the others as `stop`"),
        ({"pad": None}, "pad = None, but must be a token id .a model without one takes `eos`"),
        ({"do_sample": True, "num_beams": 2}, "beam sampling is not supported"),
    ):
        with pytest.raises(ValueError, match=words):
            GenerateConfig(**wrong)
    assert not GenerateConfig(do_sample=True, temperature=0.0, num_beams=2).sampling


@pytest.mark.parametrize("more", [{}, {"do_sample": True, "temperature": 5.0, "top_k": 0}, {"num_beams": 3}],
                         ids=["greedy", "drawn", "beams"])
def test_suppressed_tokens_are_never_generated(more):
    key = jax.random.key(0) if more.get("do_sample") else None
    config = GenerateConfig(max_new_tokens=6, eos=-1, **more)
    free = g.generate(MODEL, params(), rows(random_prompts(0)), config, key=key)
    unwanted = tuple(sorted({token for row in ids_of(free) for token in row[1:]}))[: V // 2]
    assert len(unwanted) > 2
    config = dataclasses.replace(config, suppress_tokens=unwanted)
    found = g.generate(MODEL, params(), rows(random_prompts(0)), config, key=key)
    assert not {token for row in ids_of(found) for token in row[1:]} & set(unwanted)
