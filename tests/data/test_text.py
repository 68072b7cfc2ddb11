"""Rows of token ids: what the reference cases do not reach. Their ids, masks and targets: tests/parity."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.batch import Sample
from mmjax.config import TextConfig
from mmjax.data.text import answer_slots, prompt_slots, rows
from mmjax.tokenizer import Tokenizer
from tests.parity.original import crop_left

TOKENIZER = Tokenizer.from_folder(Path(__file__).parents[1] / "golden" / "minigpt4" / "ckpt" / "llama_hf")
Q = 3  # soft tokens of a image
TEXT = TextConfig(end_sym="</s>", max_txt_len=40)
PROMPT = "<Img><ImageHere></Img> What is it?"
FIELDS = ("tokens", "soft_index", "valid", "loss_mask", "positions")


def make(*samples, text=TEXT, **options):
    return rows(samples, TOKENIZER, text, Q, **options)


def words(text):
    return TOKENIZER.encode(text)


def test_layout_of_one_row():
    sample = Sample(images=["a", "b"], prompt="x <ImageHere> and <ImageHere>?", answer="two")
    batch = make(sample, text=dataclasses.replace(TEXT, prompt_template="Q: {} A:"), length=40)
    pad = [TOKENIZER.pad] * Q
    prompt = [TOKENIZER.bos, *words("Q: x "), *pad, *words(" and "), *pad, *words("? A:")]
    answer = words("two</s>")
    n = len(prompt) + len(answer)
    np.testing.assert_array_equal(batch.tokens[0], [*prompt, *answer] + [TOKENIZER.pad] * (40 - n))
    np.testing.assert_array_equal(batch.soft_index[0][batch.soft_index[0] >= 0], np.arange(2 * Q))
    first = 1 + len(words("Q: x "))
    np.testing.assert_array_equal(batch.soft_index[0, first:first + Q], np.arange(Q))
    np.testing.assert_array_equal(batch.valid[0], np.arange(40) < n)
    np.testing.assert_array_equal(np.flatnonzero(batch.loss_mask[0]), np.arange(len(prompt), n))
    assert batch.padded_length == [n]
    assert batch.images is None
    assert {name: getattr(batch, name).dtype.name for name in FIELDS} == {
        "tokens": "int32", "soft_index": "int32", "valid": "bool", "loss_mask": "bool", "positions": "int32"}


def test_images_without_a_prompt_stand_alone_whatever_the_template():
    text = dataclasses.replace(TEXT, prompt_template="Q: {} A:", max_context_len=2)
    batch = make(Sample(images=["a"], answer="x"), Sample(images=["a", "b"], answer="x"), text=text)
    np.testing.assert_array_equal((batch.soft_index >= 0).sum(axis=1), [Q, 2 * Q])
    np.testing.assert_array_equal(batch.soft_index[1, 1:1 + 2 * Q], np.arange(2 * Q))


def test_first_and_neighbouring_segments_may_be_empty():
    sample = Sample(images=["a", "b"], prompt="<ImageHere><ImageHere>", answer="x")
    np.testing.assert_array_equal(make(sample).soft_index[0, 1:1 + 2 * Q], np.arange(2 * Q))


def test_prompt_to_be_continued_is_neither_cut_nor_a_target():
    sample = Sample(images=["a"], prompt=PROMPT)
    short = dataclasses.replace(TEXT, max_context_len=4)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(make(sample, text=short), name), getattr(make(sample), name))
    assert not make(sample).loss_mask.any()
    assert make(sample).valid.all()
    learned = make(dataclasses.replace(sample, answer="x"), text=short)
    assert learned.valid.sum() == 1 + 4 + len(words("x</s>"))


def test_text_only_prompts_are_not_cut():
    short = dataclasses.replace(TEXT, max_context_len=2)
    assert make(Sample(prompt="Name a color.", answer="Red"), text=short).padded_length[0] > 6


def test_bos_of_an_empty_prompt():
    bare, full = Sample(answer="Red"), Sample(prompt="Name a color.", answer="Red")
    np.testing.assert_array_equal(make(bare, bare).valid[:, 0], [True, True])
    np.testing.assert_array_equal(make(bare, full).valid[:, 0], [False, True])
    np.testing.assert_array_equal(make(Sample(), full).valid[:, 0], [True, True])


def test_conversation():
    text = dataclasses.replace(TEXT, prompt_template="[INST] {} [/INST]", max_txt_len=100)
    batch = make(Sample(images=["a"], turns=[(PROMPT, "A dog."), ("Where?", "There.")]), text=text)
    parts = [words("A dog.</s>"), words("<s>[INST] Where? [/INST]"), words("There.</s>")]
    start = batch.tokens.shape[1] - sum(map(len, parts))
    np.testing.assert_array_equal(batch.tokens[0, start:], sum(parts, []))
    targets = [number != 1 for number, part in enumerate(parts) for _ in part]
    np.testing.assert_array_equal(batch.loss_mask[0], [False] * start + targets)
    cut = make(Sample(images=["a"], turns=[(PROMPT, "A dog."), ("Where?", "There.")]),
               text=dataclasses.replace(text, max_txt_len=5))
    np.testing.assert_array_equal(cut.tokens[0], batch.tokens[0, :start + 5])


def test_pad_piece_in_an_answer_and_in_a_conversation():
    assert TOKENIZER.pad in words("x$$y</s>")
    caption, talk = make(Sample(answer="x$$y")), make(Sample(turns=[("", "x$$y")]))
    hole = caption.tokens[0] == TOKENIZER.pad
    np.testing.assert_array_equal(caption.tokens, talk.tokens)
    np.testing.assert_array_equal(caption.valid[0], np.ones_like(hole))
    np.testing.assert_array_equal(caption.loss_mask[0, 1:], ~hole[1:])
    np.testing.assert_array_equal(talk.valid[0], ~hole)
    np.testing.assert_array_equal(talk.loss_mask[0, 1:], np.ones_like(hole[1:]))


def test_all_rows_with_a_wrong_number_of_placeholders_are_named():
    with pytest.raises(ValueError) as error:
        make(Sample(images=["a"], prompt="What is it?", answer="x"),
             Sample(images=["a"], prompt=PROMPT, answer="x"),
             Sample(prompt=PROMPT, answer="x"),
             Sample(images=["a"], prompt="<ImageHere> or <ImageHere>"),
             Sample(images=["a", "b"], turns=[(PROMPT, "x"), ("<ImageHere>?", "y")]))
    message = str(error.value)
    for expected in ("row 0: 0 <ImageHere> for 1 images", "row 2: 1 <ImageHere> for 0 images",
                     "row 3: 2 <ImageHere> for 1 images", "row 4: 1 <ImageHere> for 2 images",
                     "row 4: <ImageHere> in a later question"):
        assert expected in message
    assert "row 1" not in message


def test_rows_that_do_not_fit_are_all_named():
    samples = [Sample(prompt="a b c d e f", answer="x"), Sample(prompt="a", answer="x"), Sample(prompt="a b c d e f g")]
    lengths = make(*samples).valid.sum(axis=1)
    assert make(*samples, length=int(max(lengths))).tokens.shape == (3, max(lengths))
    with pytest.raises(ValueError, match="2 of 3 rows do not fit into 6 slots") as error:
        make(*samples, length=6)
    assert f"row 0: {lengths[0]} tokens" in str(error.value)
    assert f"row 2: {lengths[2]} tokens" in str(error.value)


def test_other_refusals():
    with pytest.raises(ValueError, match="at least one sample"):
        make()
    for template in ("no place", "{} and {}"):
        with pytest.raises(ValueError, match="must have one '{}'"):
            make(Sample(prompt="a"), text=dataclasses.replace(TEXT, prompt_template=template))


def test_braces_in_a_prompt_are_words():
    text = dataclasses.replace(TEXT, prompt_template="[INST] {} [/INST]")
    batch = make(Sample(prompt="{<10>} {}"), text=text)
    np.testing.assert_array_equal(batch.tokens[0, 1:], words("[INST] {<10>} {} [/INST]"))


SAMPLES = st.builds(
    lambda images, piece, answer, turns: Sample(
        images=["a"] * images, prompt=piece.join(["x"] + ["<ImageHere>"] * images), answer=answer,
        turns=[] if turns is None else [(piece + "<ImageHere>" * images, "y")] + turns),
    st.integers(0, 3), st.text("ab $é", max_size=6), st.none() | st.text("dog $", max_size=12),
    st.none() | st.lists(st.tuples(st.text("ab ?", max_size=5), st.text("cd$ ", max_size=5)), max_size=2))


@settings(max_examples=60, deadline=None)
@given(st.lists(SAMPLES, min_size=1, max_size=4), st.integers(1, 16), st.integers(1, 12), st.integers(1, 30))
def test_rows_hold_their_places_and_nothing_else(samples, multiple, max_txt_len, max_context_len):
    text = dataclasses.replace(TEXT, max_txt_len=max_txt_len, max_context_len=max_context_len)
    batch = make(*samples, text=text, multiple=multiple)
    T = batch.tokens.shape[1]
    assert T % multiple == 0
    assert (batch.padded_length == batch.padded_length[0]).all()
    for row, sample in enumerate(samples):
        places = prompt_slots(sample, TOKENIZER, text, Q) + answer_slots(sample, TOKENIZER, text)
        n = 1 + len(places)
        assert n <= batch.padded_length[row]
        assert batch.tokens[row, 0] == TOKENIZER.bos
        for name in ("tokens", "soft_index", "valid", "loss_mask"):
            fields = [getattr(place, name.removesuffix("s") if name == "tokens" else name) for place in places]
            np.testing.assert_array_equal(getattr(batch, name)[row, 1:n], fields)
        assert not (batch.valid[row, n:] | batch.loss_mask[row, n:] | (batch.soft_index[row, n:] >= 0)).any()
        assert (batch.tokens[row, n:] == TOKENIZER.pad).all()
        assert (batch.positions[row] == np.arange(T)).all()
        assert batch.soft_index[row].max() < max(1, Q * len(sample.images))
        assert not (batch.loss_mask[row] & (batch.soft_index[row] >= 0)).any()
    wider = make(*samples, text=text, length=T + 5)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(wider, name)[:, :T], getattr(batch, name))


def test_crop_left_keeps_the_end_of_every_row():
    batch = make(Sample(images=["a"], prompt=PROMPT), Sample(prompt="Hi"), multiple=8)
    lengths = batch.valid.sum(axis=1)
    keep = int(lengths[0]) - 4
    cut = crop_left(batch, keep)
    assert cut.tokens.shape == (2, keep)
    np.testing.assert_array_equal(cut.valid.sum(axis=1), np.minimum(lengths, keep))
    for name in ("tokens", "soft_index"):
        np.testing.assert_array_equal(getattr(cut, name)[0], getattr(batch, name)[0, 4:lengths[0]])
        np.testing.assert_array_equal(getattr(cut, name)[1, :lengths[1]], getattr(batch, name)[1, :lengths[1]])
    np.testing.assert_array_equal(cut.positions, [np.arange(keep)] * 2)
    np.testing.assert_array_equal(cut.padded_length, np.minimum(batch.padded_length, keep))
    whole = crop_left(batch, 1000)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(whole, name), getattr(batch, name))
    with pytest.raises(ValueError, match="greater than max_new_tokens"):
        crop_left(batch, 0)


# ---- prompt and answer as one text ----


JOINT = TextConfig("Q: {} A:", "Q: {} ({}) A:", end_sym="</s>", joint=True, max_txt_len=40)


def joint(*samples, text=JOINT, **options):
    return rows(samples, TOKENIZER, text, 0, **options)


def spelt(text):
    return TOKENIZER.encode(text, special=False)


def test_layout_of_a_joint_row():
    batch = joint(Sample(images=["a"], prompt="What?", answer="A dog<s>."), length=40)
    known, ids = [TOKENIZER.bos, *spelt("Q: What? A:")], [TOKENIZER.bos, *spelt("Q: What? A:A dog<s>."), TOKENIZER.eos]
    np.testing.assert_array_equal(batch.tokens[0], ids + [TOKENIZER.pad] * (40 - len(ids)))
    np.testing.assert_array_equal(batch.valid[0], np.arange(40) < len(ids))
    np.testing.assert_array_equal(np.flatnonzero(batch.loss_mask[0]), np.arange(len(known), len(ids)))
    assert (batch.soft_index == -1).all() and batch.padded_length == [40]


def test_targets_begin_where_the_prompt_alone_would_end():
    text = dataclasses.replace(JOINT, prompt_template="", end_sym="")
    word = next(word for word in ("dog", "house", "image", "the") if len(spelt(word)) <= len(spelt(word[:2])))
    whole = word + " and a cat"
    batch = joint(Sample(prompt=word[:2], answer=whole[2:]), text=text)
    np.testing.assert_array_equal(batch.tokens[0], [TOKENIZER.bos, *spelt(whole)])
    places = np.arange(1 + len(spelt(word[:2])), 1 + len(spelt(whole)))
    np.testing.assert_array_equal(np.flatnonzero(batch.loss_mask[0]), places)


def test_an_end_that_is_not_eos_is_part_of_the_text():
    batch = joint(Sample(prompt="What?", answer="A dog."), text=dataclasses.replace(JOINT, end_sym="###"))
    np.testing.assert_array_equal(batch.tokens[0], [TOKENIZER.bos, *spelt("Q: What? A:A dog.###")])


@pytest.mark.parametrize("kept", [1, 5, 12])
def test_a_joint_row_is_cut_as_a_whole(kept):
    sample = Sample(prompt="What?", answer="A dog and a cat and a bird.")
    whole, cut = joint(sample), joint(sample, text=dataclasses.replace(JOINT, max_txt_len=kept))
    assert cut.tokens.shape == (1, kept) and cut.padded_length == [kept]
    np.testing.assert_array_equal(cut.tokens, whole.tokens[:, :kept])
    np.testing.assert_array_equal(cut.loss_mask, whole.loss_mask[:, :kept])


def test_a_joint_prompt_to_be_continued_is_not_cut():
    batch = joint(Sample(prompt="What?", input="a house"), text=dataclasses.replace(JOINT, max_txt_len=2))
    np.testing.assert_array_equal(batch.tokens[0], [TOKENIZER.bos, *spelt("Q: What? (a house) A:")])
    assert batch.padded_length == [batch.tokens.shape[1]]


def test_the_unknown_piece_is_no_joint_target(monkeypatch):
    monkeypatch.setattr(TOKENIZER._model, "encode", lambda text: [7] * len(text) if text == "x" else [7, 8, 0, 9])
    batch = joint(Sample(prompt="x", answer="y"), text=TextConfig(joint=True, end_sym=""))
    np.testing.assert_array_equal(batch.loss_mask, [[False, False, True, False, True]])


def test_braces_in_a_prompt_stay():
    batch = joint(Sample(prompt="{} or {}", input="{}"))
    np.testing.assert_array_equal(batch.tokens[0], [TOKENIZER.bos, *spelt("Q: {} or {} ({}) A:")])


def test_an_input_beside_images_that_take_places():
    text = dataclasses.replace(TEXT, input_template="Q: {} ({}) A:")
    batch = make(Sample(images=["a"], prompt="x <ImageHere>", input="y", answer="z"), text=text)
    ids = [TOKENIZER.bos, *words("Q: x "), *[TOKENIZER.pad] * Q, *words(" (y) A:"), *words("z</s>")]
    np.testing.assert_array_equal(batch.tokens[0], ids)


def test_images_that_take_no_places_leave_no_trace_in_a_row():
    text = dataclasses.replace(TEXT, prompt_template="Q: {} A:")
    seeing, blind = (rows([Sample(images=images, prompt=prompt, answer="x") for prompt in ("", "<image> y")],
                          TOKENIZER, text, 0) for images in (["a"], []))
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(seeing, name), getattr(blind, name), name)


@pytest.mark.parametrize("text", [JOINT, dataclasses.replace(TEXT, prompt_template="Q: {} A:", input_template="{}{}")])
@pytest.mark.parametrize("prompt", ["<Img><ImageHere></Img> What is it? ", "What <ImageHere>is it?",
                                    "What is it? <Img><ImageHere></Img>"])
def test_marks_of_images_that_take_no_places_are_left_out(prompt, text):
    """So the readers that write for MiniGPT-4 feed the other families too."""
    for marked, plain in ((Sample(images=["a"], prompt=prompt, answer="x"), Sample(prompt="What is it?", answer="x")),
                          (Sample(images=["a"], prompt="y", input=prompt), Sample(prompt="y", input="What is it?"))):
        seeing, blind = (rows([sample], TOKENIZER, text, 0) for sample in (marked, plain))
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(seeing, name), getattr(blind, name), name)


def test_prompts_without_marks_keep_their_spaces():
    batch = joint(Sample(images=["a"], prompt=" What? "))
    np.testing.assert_array_equal(batch.tokens[0], [TOKENIZER.bos, *spelt("Q:  What?  A:")])


def test_a_conversation_about_a_image_that_takes_no_places():
    turns = [("What?", "x"), ("And?", "y")]
    marked = [(f"<Img><ImageHere></Img> {turns[0][0]} ", "x"), turns[1]]
    seeing, blind = (rows([Sample(images=images, turns=each)], TOKENIZER, TEXT, 0)
                     for images, each in ((["a"], marked), ([], turns)))
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(seeing, name), getattr(blind, name), name)


@pytest.mark.parametrize(("sample", "text", "image_tokens", "message"), [
    (Sample(turns=[("a", "b")]), JOINT, 0, "row 1: a conversation, but with joint = True a row is one prompt and one "
                                           "answer; the format imagebind_llm_finetune reads the first pair"),
    (Sample(turns=[("a", "b")], input="c"), TEXT, 0, "row 1: an input and a conversation"),
    (Sample(prompt="a", input="c"), TEXT, 0, "row 1: an input, but the text settings have no input_template"),
    (Sample(images=["p"], prompt="<ImageHere> or <ImageHere>"), JOINT, 0, "row 1: 2 <ImageHere> for 1 images"),
    (Sample(prompt="<ImageHere> a"), JOINT, 0, "row 1: 1 <ImageHere> for 0 images"),
    (Sample(prompt="a", input="<ImageHere>"), JOINT, 0, "Or write none: images of this model take no slots."),
    (Sample(turns=[("a", "b"), ("<ImageHere>", "d")]), TEXT, 0, "row 1: <ImageHere> in a later question"),
    (Sample(prompt="a"), JOINT, 3, "joint = True is for models whose images take no slots"),
    (Sample(prompt="a"), dataclasses.replace(JOINT, input_template="{}"), 0, "must have two '{}'"),
])
def test_rows_that_do_not_fit_the_settings(sample, text, image_tokens, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rows([Sample(prompt="fine", answer="x"), sample], TOKENIZER, text, image_tokens)
