"""Generated ids, scores and words, chats and ranked choices, against the original's generate, Chat and multi_select."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from mmjax.inference import generate as generation
from tests.parity import golden
from tests.parity.close import EMBEDDING, LOGIT, LOSS, assert_close
from tests.parity.model import model
from tests.parity.original import answer_of_chat, answer_of_generate, crop_left, multi_select
from tests.parity.test_forward import batch_of, capture

LENGTH_TIMES_SUM = 1e-3  # a beam's score with a negative length penalty is a sum times a length


def settings(case, ids, **more):
    return generation.GenerateConfig(**golden.generation_ids(ids), **more)


@functools.cache
def generated(name: str):
    case = golden.load(name)
    m = model(case)
    batch = m.batch(golden.samples(case), **dataclasses.asdict(golden.text_config(case)))
    config = settings(case, case.spec["lm_generation_config"], **case.spec["generate_kwargs"])
    return m, batch, generation.generate(m.module, m.params, batch, config, return_scores=True)


@golden.each("generate")
def test_prompt_vectors(case):
    """The original pads on the left with zero vectors; the prompts themselves are compared."""
    m, batch, _ = generated(case.name)
    (vectors, _), _ = capture(m, batch, method="encode")
    for name in case.holds("inputs_embeds"):
        for row, length in enumerate(batch.valid.sum(axis=1)):
            assert_close(name, vectors[row, :length], case.arrays[name][row, -length:], absolute=EMBEDDING)


@golden.each("generate")
def test_sequences(case):
    m, _, made = generated(case.name)
    sequences = np.asarray(made.sequences)[:, : int(made.lengths.max())]
    for name in case.holds("sequences"):
        np.testing.assert_array_equal(sequences, case.arrays[name])
    words = [answer_of_generate(row.tolist(), m.tokenizer) for row in np.maximum(sequences, 0)]
    assert words == case.spec["answers"]


def test_ids_of_a_generation_config():
    given = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert golden.generation_ids(given) == {"bos": 1, "eos": 2, "pad": 0, "stop": ()}
    assert golden.generation_ids(given | {"pad_token_id": None})["pad"] == 2
    assert golden.generation_ids(given | {"eos_token_id": [7, 9], "pad_token_id": None}) == {
        "bos": 1, "eos": 7, "pad": 7, "stop": ((9,),)}


SHORT = [case.name for case in golden.cases("generate") if "sequences" in case.arrays and
         case.spec["lm_generation_config"].get("pad_token_id") != case.spec["lm_generation_config"]["eos_token_id"] and
         any(case.spec["lm_generation_config"]["eos_token_id"] in row[:-1] for row in case.arrays["sequences"])]


@pytest.mark.parametrize("name", SHORT[:1])
def test_without_a_pad_id_finished_rows_are_filled_with_the_end(name):
    case = golden.load(name)
    ids = case.spec["lm_generation_config"] | {"pad_token_id": None}
    m, batch, made = generated(name)
    without = generation.generate(m.module, m.params, batch, settings(case, ids, **case.spec["generate_kwargs"]))
    lengths = np.asarray(made.lengths)
    np.testing.assert_array_equal(without.lengths, lengths)
    written = np.arange(made.sequences.shape[1]) < lengths[:, None]
    assert not written[:, :lengths.max()].all()
    np.testing.assert_array_equal(without.sequences, np.where(written, made.sequences, ids["eos_token_id"]))


@golden.each("generate")
def test_scores(case):
    """The beam's score; the first step's scores; each step's five best while a row is open."""
    _, _, made = generated(case.name)
    steps, lengths = np.asarray(made.step_scores), np.asarray(made.lengths)
    beams = case.spec["generate_kwargs"].get("num_beams", 1)
    for name in case.holds("sequences_scores"):
        assert_close(name, made.scores, case.arrays[name], absolute=LENGTH_TIMES_SUM)
    for name in case.holds("step0_scores", "step0_log_probs"):
        expected = case.arrays[name]
        seen = np.isfinite(expected)
        np.testing.assert_array_equal(np.isfinite(steps[0]), seen)
        assert_close(name, steps[0][seen], expected[seen], absolute=LOGIT)
    for name in case.holds("top5_ids"):
        assert beams == 1
        expected = case.arrays[name]
        best = np.argsort(-steps, axis=-1, kind="stable")[..., : expected.shape[-1]]
        for step, row in np.ndindex(expected.shape[:2]):
            if step < lengths[row] - 1:
                np.testing.assert_array_equal(best[step, row], expected[step, row])
                scores = case.arrays.get("top5_scores")
                if scores is not None:
                    assert_close("top5_scores", steps[step, row, best[step, row]], scores[step, row], absolute=LOGIT)


@golden.each("chat")
def test_chat(case):
    """Every turn: the vectors that reach the language model (cut on the left), the ids, and the words."""
    m, kwargs = model(case), case.spec["kwargs"]
    config = settings(case, m.generation, do_sample=True, **kwargs)
    for number, (sample, turn) in enumerate(zip(golden.chat_turns(case), case.spec["turns"], strict=True)):
        batch = m.batch([sample], prompt_template="")
        batch = crop_left(batch, turn["max_length"] - kwargs["max_new_tokens"])
        for name in case.holds(f"inputs_embeds_{number}"):
            assert_close("chat", capture(m, batch, method="encode")[0][0], case.arrays[name], absolute=EMBEDDING)
        made = generation.generate(m.module, m.params, batch, config, key=jax.random.key(number))
        ids = np.asarray(made.sequences)[0, : int(made.lengths[0])]
        for name in case.holds(f"sequences_{number}"):
            np.testing.assert_array_equal(ids[None], case.arrays[name])
        assert answer_of_chat(ids.tolist(), m.tokenizer) == turn["answer"]
    for name in case.holds("image_emb"):
        alone = dataclasses.replace(batch, images=golden.images(case)[None])
        soft, _ = capture(m, alone, method="soft_tokens")
        assert_close(name, soft, case.arrays[name], absolute=EMBEDDING)


@golden.each("select")
def test_ranked_choices(case):
    m = model(case)
    batches = [batch_of(case, m, samples) for samples in golden.candidates(case)]
    losses, ranks = multi_select(m.module, m.params, batches)
    for name in case.holds("losses"):
        assert_close(name, losses, case.arrays[name], relative=LOSS)
    for name in case.holds("ranks"):
        np.testing.assert_array_equal(ranks, case.arrays[name])
    for name in case.holds("ranks_num_cand"):
        _, ranks = multi_select(m.module, m.params, batches, case.spec["num_cand"])
        np.testing.assert_array_equal(ranks, case.arrays[name])
