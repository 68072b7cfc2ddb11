"""Rows, masks and targets, prompts and answers, against the original's."""

import re

import numpy as np

from mmjax.data.conversation import Template, Transcript
from mmjax.data.text import answer_slots, prompt_slots, rows
from tests.parity import golden
from tests.parity.original import answer_of_chat, answer_of_generate, crop_left

IGNORED = -100


def case_rows(case, samples=None, **options):
    samples = golden.samples(case) if samples is None else samples
    return rows(samples, golden.tokenizer(), golden.text_config(case), golden.image_tokens(case), **options)


@golden.each("forward")
def test_rows_padded_as_the_original(case):
    """At the original's row length the rows are the original's: its two kinds of padding end up side by side."""
    batch = case_rows(case)
    batch = case_rows(case, length=int(batch.padded_length[0]))
    expected = {"attention_mask": batch.valid.astype(np.int32),
                "targets": np.where(batch.loss_mask, batch.tokens, IGNORED)}
    for name in case.holds(*expected):
        np.testing.assert_array_equal(expected[name], case.arrays[name], name)
    for name in case.holds("attention_mask", "targets", "inputs_embeds"):
        assert case.arrays[name].shape[:2] == batch.tokens.shape
    np.testing.assert_array_equal(batch.positions, [np.arange(batch.tokens.shape[1])] * len(batch.tokens))


@golden.each("forward")
def test_prompt_and_answer_blocks(case):
    """The parts before assembly, each padded by itself."""
    tokenizer, text = golden.tokenizer(), golden.text_config(case)
    prompts = [prompt_slots(sample, tokenizer, text, golden.image_tokens(case)) for sample in golden.samples(case)]
    answers = [answer_slots(sample, tokenizer, text) for sample in golden.samples(case)]

    def block(parts, fill, value):
        width = max(map(len, parts))
        return [[value(place) for place in part] + [fill] * (width - len(part)) for part in parts]

    expected = {"cond_atts": block(prompts, 0, lambda place: int(place.valid)),
                "regress_token_ids": block(answers, tokenizer.pad, lambda place: place.token),
                "regress_atts": block(answers, 0, lambda place: int(place.valid)),
                "part_targets": block(answers, IGNORED, lambda place: place.token if place.loss_mask else IGNORED)}
    for name in case.holds(*expected):
        np.testing.assert_array_equal(expected[name], case.arrays[name], name)


@golden.each("generate")
def test_generation_rows_are_the_left_padded_ones(case):
    batch = case_rows(case)
    assert not batch.loss_mask.any()
    for name in case.holds("attention_mask"):
        np.testing.assert_array_equal(case.arrays[name], batch.valid[:, ::-1])  # no holes: moved to the right end


@golden.each("chat")
def test_chat_context_and_its_left_cut(case):
    room = case.spec["kwargs"]["max_new_tokens"]
    for number, (sample, turn) in enumerate(zip(golden.chat_turns(case), case.spec["turns"], strict=True)):
        batch = case_rows(case, [sample])
        assert batch.tokens.shape == (1, turn["context_tokens"])
        cut = crop_left(batch, turn["max_length"] - room)
        for name in case.holds(f"inputs_embeds_{number}"):
            assert case.arrays[name].shape[:2] == cut.tokens.shape
        np.testing.assert_array_equal(cut.tokens, batch.tokens[:, -cut.tokens.shape[1]:])
        np.testing.assert_array_equal(cut.soft_index, batch.soft_index[:, -cut.tokens.shape[1]:])


def test_one_vector_for_each_id():
    """Prompt ids are not recorded, but their embeddings are: throughout the set an id has one vector and no other has
    it, so the ids of all prompts hang together with those of the answers, which the tests above compare.
    """
    vectors = {}  # all models of a set share one embedding table

    def meet(tokens, soft_index, embeds):
        for token, soft, vector in zip(tokens, soft_index, embeds, strict=True):
            if soft < 0:
                assert vectors.setdefault(int(token), vector.tobytes()) == vector.tobytes(), (case.name, token)

    for case in golden.cases("forward"):
        for embeds in (case.arrays[name] for name in case.holds("inputs_embeds")):
            batch = case_rows(case, length=embeds.shape[1])
            for row in range(len(embeds)):  # padding included: the original pads with the pad token's vector
                meet(batch.tokens[row], batch.soft_index[row], embeds[row])
    for case in golden.cases("generate"):
        for embeds in (case.arrays[name] for name in case.holds("inputs_embeds")):
            batch = case_rows(case)
            for row, n in enumerate(batch.valid.sum(axis=1)):  # the original pads with zeros, on the left
                meet(batch.tokens[row, :n], batch.soft_index[row, :n], embeds[row, -n:])
    for case in golden.cases("chat"):
        for number, sample in enumerate(golden.chat_turns(case)):
            for embeds in (case.arrays[name] for name in case.holds(f"inputs_embeds_{number}")):
                batch = crop_left(case_rows(case, [sample]), embeds.shape[1])
                meet(batch.tokens[0], batch.soft_index[0], embeds[0])
    assert len(set(vectors.values())) == len(vectors)


@golden.each("generate", where=lambda case: "sequences" in case.arrays)
def test_answers_of_generate(case):
    assert [answer_of_generate(ids, golden.tokenizer()) for ids in case.arrays["sequences"]] == case.spec["answers"]


@golden.each("chat")
def test_chat_prompts_and_answers(case):
    spec = case.spec
    talk = Transcript(Template(spec["system"], tuple(spec["roles"]), spec["sep"])).show("a image")
    for number, turn in enumerate(spec["turns"]):
        talk = talk.ask(turn["question"])
        assert talk.sample().prompt == turn["prompt"]
        assert talk.sample().images == ["a image"]
        for name in case.holds(f"sequences_{number}"):
            assert answer_of_chat(case.arrays[name][0], golden.tokenizer()) == turn["answer"]
        talk = talk.answer(turn["answer"])
    assert [list(message) for message in talk.messages] == spec["messages"]


@golden.each("templates")
def test_prompts_of_the_chat_templates(case):
    for given in case.spec["templates"]:
        talk = Transcript(Template(given["system"], tuple(given["roles"]), given["sep"], given["sep2"]))
        prompts = []
        for step in given["flow"]:
            action, words = re.fullmatch(r"(upload image|ask|answer)(?: '(.*)')?", step).groups()
            if action == "upload image":
                talk = talk.show("a image")
            elif action == "ask":
                talk = talk.ask(words)
                prompts.append(talk.sample().prompt)
            else:
                talk = talk.answer(words)
        assert prompts == given["prompts"]
    if two := case.spec.get("two_separators"):
        template = Template(two["system"], ("", ""), two["sep"], two["sep2"])
        assert template.prompt([tuple(message) for message in two["messages"]]) == two["prompt"]
