"""Several samples in one row: who goes where, and that a model makes of them what it makes of samples on their own."""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax import trees
from mmjax.batch import Sample
from mmjax.config import DataConfig, TextConfig
from mmjax.data import images
from mmjax.data.collate import Collator
from mmjax.data.packing import Groups, Size, pack
from mmjax.data.text import rows, tokenize
from mmjax.families import FAMILIES, llama, minigpt4
from mmjax.models.masks import causal_mask
from mmjax.tokenizer import Tokenizer
from mmjax.training import steps
from tests import tiny

TOKENIZER = Tokenizer.from_folder(Path(__file__).parents[1] / "golden" / "minigpt4" / "ckpt" / "llama_hf")
TEXT = TextConfig("###Human: {} ###Assistant: ", end_sym="###", max_txt_len=40)
PROMPT = "<Img><ImageHere></Img> What is it?"
CONFIG = dataclasses.replace(  # without Q-Former, which compiles longest
    tiny.MINIGPT4, qformer=None, llm=dataclasses.replace(tiny.MINIGPT4.llm, vocab=TOKENIZER.vocab_size))
Q, SIZE = CONFIG.image_tokens, CONFIG.image_size
LENGTH, ROWS, IMAGES = 80, 2, 3
ROOM = Size(LENGTH, IMAGES)


def image(seed):
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


STREAM = (  # the third stands behind the first, the fourth behind the second; the fifth has no room
    Sample(images=[image(0)], turns=[(PROMPT, "Two x$$y children."), ("Where are they?", "In the park.")]),
    Sample(images=[image(1), image(2)], prompt="<ImageHere> or <ImageHere>?", answer="The cat, then the dog."),
    Sample(prompt="Name a color.", answer="Red"),
    Sample(images=[image(3)], prompt=PROMPT, answer="A dog on a table."),
    Sample(images=[image(4)], prompt=PROMPT, answer="a b c d e f g h i j k l m n o p q r s t"),
)


def make(samples=STREAM, text=TEXT, config=CONFIG, length=LENGTH, rows=ROWS, most_images=IMAGES,
         group_rows=1):
    """A batch of the first samples of a stream, and how many it took."""
    collator, tokenized = Collator(TOKENIZER, text, config, Groups(group_rows, most_images)), []
    sizes = (tokenized.append(collator.tokenize(sample)) or size(tokenized[-1]) for sample in samples)
    placed = pack(sizes, Size(length, most_images), rows, group_rows)
    return collator.batch([[tokenized[number] for number in row] for row in placed], length), sum(map(len, placed))


def size(tokenized):
    return Size(tokenized.length, len(tokenized.sample.images))


def apart(samples, config=CONFIG):
    """The same samples, one a row."""
    return dataclasses.replace(rows(samples, TOKENIZER, TEXT, config.image_tokens),
                               images=images.stack(samples, config.images))


def places(batch):
    """(row, where) of every sample of packed rows, in order of rows and segments."""
    return [(row, np.flatnonzero(batch.segments[row] == segment))
            for row in range(len(batch.segments)) for segment in range(batch.segments[row].max() + 1)]


def order(samples):
    """The samples' numbers in the order of `places`."""
    sizes = [Size(rows([sample], TOKENIZER, TEXT, Q).tokens.shape[1], len(sample.images)) for sample in samples]
    return list(itertools.chain(*pack(sizes, ROOM, ROWS)))


@functools.cache
def trained_and_frozen():
    """Weights of a deviation of 0.05: with tiny's 0.2 float32 alone moves gradients by 1e-6, unpacked ones too."""
    params = trees.map_with_path(lambda path, leaf: leaf if path.endswith("scale") else leaf / 4,
                                 tiny.params("minigpt4", CONFIG))
    return trees.split(params, trees.mask(params, minigpt4.TRAINED))


@functools.cache
def compiled():
    def objective(trained, frozen, batch):
        return steps.loss(minigpt4.MiniGPT4(CONFIG), trees.merge(trained, frozen), batch)

    return tiny.jit(jax.value_and_grad(objective, has_aux=True))


def measured(batch):
    """(loss, number of targets, logits, gradients of the projector in one vector); two shapes are compiled in all"""
    (loss, aux), grads = compiled()(*trained_and_frozen(), batch)
    return loss, int(aux["tokens"]), np.asarray(aux["logits"]), flat(grads)


def logits(batch):
    return measured(batch)[2]


def flat(grads):
    return np.concatenate([np.ravel(leaf) for leaf in trees.flatten(grads).values() if leaf is not None])


# ---- which sample goes where ----


def test_each_goes_into_the_first_row_with_room_and_the_first_without_ends_the_batch():
    sizes = [Size(5), Size(4), Size(6), Size(1), Size(4), Size(1)]
    assert pack(sizes, Size(10), 2) == [[0, 1, 3], [2, 4]]
    assert pack(sizes, Size(10), 1) == [[0, 1]]  # the fourth would fit, but those taken are the first
    assert pack(sizes[:1], Size(10), 3) == [[0], [], []]


def test_images_take_room_too():
    assert pack([Size(1, 1), Size(1, 2), Size(1), Size(1, 1)], Size(10, 2), 2) == [[0, 2, 3], [1]]
    assert pack([Size(1, 2), Size(1, 2)], Size(10, 2), 1) == [[0]]


def test_rows_of_a_group_share_the_room_for_images():
    sizes = [Size(4, 1)] * 12
    assert pack(sizes, Size(10, 3), 4, 2) == [[0, 1], [2], [3, 4], [5]]
    assert pack(sizes, Size(10, 3), 3, 2) == [[0, 1], [2], [3, 4]]  # the last group is not whole
    assert pack([Size(4, 1)] * 3 + [Size(4)] * 9, Size(10, 3), 2, 2) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(("images", "shards", "expected"), [
    (None, 1, (4, 13)), (None, 4, (1, 4)), (3.2, 2, (2, 7)), (3, 2, (2, 6)), (3.2, 1, (4, 13)), (0.1, 4, (1, 1))])
def test_a_shard_is_a_group(images, shards, expected):
    data = DataConfig(path="x", batch_size=4, pack_length=512, pack_images=images)
    assert Groups.of(data, shards) == expected
    assert Groups.of(dataclasses.replace(data, pack_length=None), shards) is None


def test_a_stream_is_read_up_to_the_first_without_room():
    stream = iter([Size(6), Size(6), Size(3), Size(1)])
    assert pack(stream, Size(10), 1) == [[0]]
    assert list(stream) == [Size(3), Size(1)]


@pytest.mark.parametrize(("size", "message"), [
    (Size(11), "Sample 1 .* 11 tokens and 0 images, but a row has room for 10 and 2"),
    (Size(3, 3), "Sample 1 .* 3 tokens and 3 images"),
])
def test_what_does_not_fit_into_an_empty_row_is_named(size, message):
    with pytest.raises(ValueError, match=message):
        pack([Size(2, 1), size], Size(10, 2), 2)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.builds(Size, st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=40),
       st.integers(12, 30), st.integers(1, 4), st.integers(2, 5), st.integers(1, 4))
def test_batches_of_a_stream_hold_every_sample_once(sizes, length, rows, most, group_rows):
    start, seen = 0, []
    while start < len(sizes):
        placed = pack(sizes[start:], Size(length, most), rows, group_rows)
        assert placed == pack(iter(sizes[start:]), Size(length, most), rows, group_rows)
        for row in placed:
            assert row == sorted(row)
            assert sum(sizes[start + number].tokens for number in row) <= length
        for first in range(0, rows, group_rows):
            group = itertools.chain(*placed[first:first + group_rows])
            assert sum(sizes[start + number].images for number in group) <= most
        taken = sorted(itertools.chain(*placed))
        assert taken == list(range(len(taken))) and taken
        seen += [start + number for number in taken]
        start += len(taken)
    assert seen == list(range(len(sizes)))


def caption_sizes(count=4000):
    """Places of caption samples: log-normal captions, median 80 tokens and deviation 0.6, cut to 8 .. 400; 32 soft
    tokens, BOS, and a prompt in its template of 18 to 24 tokens."""
    random = np.random.default_rng(0)
    captions = np.clip(np.round(random.lognormal(np.log(80), 0.6, count)), 8, 400).astype(int)
    return captions + 32 + 1 + random.integers(18, 25, count)


def test_little_of_packed_caption_rows_is_padding():
    sizes = caption_sizes()
    longest = sizes[:len(sizes) // 12 * 12].reshape(-1, 12).max(1)
    padded = sizes[:len(longest) * 12].sum() / (12 * longest.sum())
    assert 0.5 < padded < 0.6
    shares, images, start = [], [], 0
    length, rows, most = 1024, 4, 26  # one image every 160 tokens
    while len(sizes) - start > length * rows // sizes.min():
        taken = sum(map(len, pack((Size(int(n), 1) for n in sizes[start:]), Size(length, most), rows, rows)))
        shares.append(sizes[start:start + taken].sum() / (length * rows))
        images.append(taken / most)
        start += taken
    assert len(shares) > 50
    assert np.mean(shares) >= 0.90
    assert np.mean(images) >= 0.97  # of the images that are encoded, the rest are black ones


# ---- the batch ----


def test_segments_hold_the_places_of_text_rows():
    batch, taken = make()
    alone = apart(STREAM[:taken])
    assert taken == 4 and batch.tokens.shape == (ROWS, LENGTH)
    numbers = order(STREAM[:taken])
    assert numbers != sorted(numbers)  # a later sample stands in an earlier row
    before = dict.fromkeys(range(ROWS), 0)
    for (row, here), number in zip(places(batch), numbers, strict=True):
        np.testing.assert_array_equal(np.diff(here), 1)
        for name in ("tokens", "valid", "loss_mask", "positions"):
            np.testing.assert_array_equal(getattr(batch, name)[row, here], getattr(alone, name)[number, :len(here)])
        soft = alone.soft_index[number, :len(here)]
        np.testing.assert_array_equal(batch.soft_index[row, here], np.where(soft < 0, -1, soft + Q * before[row]))
        for source in STREAM[number].images:
            np.testing.assert_array_equal(batch.images[row, before[row]], source)
            before[row] += 1
    for row, count in before.items():
        assert not batch.images[row, count:].any()
    assert batch.images.shape == (ROWS, IMAGES, SIZE, SIZE, 3) and batch.images.dtype == np.uint8
    empty = batch.segments < 0
    assert not (batch.valid | batch.loss_mask | (batch.soft_index >= 0))[empty].any()
    assert (batch.tokens[empty] == TOKENIZER.pad).all()
    assert (batch.padded_length == LENGTH).all()
    assert {batch.segments.dtype, batch.positions.dtype, batch.soft_index.dtype} == {np.dtype(np.int32)}


def test_the_token_behind_a_border_is_no_target():
    """Of any form of sample: the loss of place t + 1 is told from place t, here of the segment before."""
    text = dataclasses.replace(TEXT, prompt_template="")
    kinds = [*STREAM[:4], Sample(answer="Red"), Sample(turns=[("", "$$")]), Sample(images=[image(5)], answer="x"),
             Sample(prompt="Continue")]
    joint = dataclasses.replace(text, joint=True)
    words = [Sample(prompt=prompt, answer="A dog.") for prompt in ("", "What?", "Where is it?")]
    for batch, taken in (make(kinds, text, length=400, rows=1, most_images=5),
                         make(words, joint, llama.PRESETS["tiny"], 200, 1, 0)):
        borders = np.flatnonzero(np.diff(batch.segments[0]) != 0) + 1
        assert len(borders) == taken > 1  # the last one is the padding's
        assert not batch.loss_mask[0, borders].any() and not batch.loss_mask[0, 0]
        assert (batch.tokens[0, borders[:-1]] == TOKENIZER.bos).all() and (batch.positions[0, borders[:-1]] == 0).all()


def test_holes_are_those_of_the_unpacked_batch():
    bare, full = Sample(answer="Red"), Sample(prompt="Name a color.", answer="Red")
    text = dataclasses.replace(TEXT, prompt_template="")
    for samples, seen in (([bare, full], False), ([bare, bare], True)):
        batch, _ = make(samples, text, rows=1)
        assert [bool(batch.valid[0, here[0]]) for _, here in places(batch)] == [seen, True]
        np.testing.assert_array_equal(rows(samples, TOKENIZER, text, Q).valid[:, 0], [seen, True])
    batch, _ = make(STREAM[:1], rows=1)
    pads = (batch.tokens == TOKENIZER.pad) & (batch.segments == 0) & (batch.soft_index < 0)
    assert pads.any() and not batch.valid[pads].any() and batch.loss_mask[pads].all()


def test_images_whose_soft_tokens_are_cut_off_keep_their_number():
    short = dataclasses.replace(TEXT, max_context_len=8)
    batch, _ = make([STREAM[1], STREAM[3]], short, rows=1)
    (_, first), (_, second) = places(batch)
    seen = batch.soft_index[0, first].max() + 1
    assert 0 < seen < 2 * Q
    found = batch.soft_index[0, second]
    assert found[found >= 0][0] == 2 * Q
    np.testing.assert_array_equal(batch.images[0, 2], image(3))


def test_the_end_of_a_stream_leaves_rows_empty():
    batch, taken = make(STREAM[:1])
    assert taken == 1
    np.testing.assert_array_equal(batch.segments.max(1), [0, -1])
    assert batch.tokens.shape == (ROWS, LENGTH) and batch.images.shape[:2] == (ROWS, IMAGES)


def test_shapes_are_the_callers_whatever_the_samples():
    words = [Sample(prompt="Name a color.", answer="Red")]
    for samples in (STREAM, words):
        assert make(samples)[0].images.shape == (ROWS, IMAGES, SIZE, SIZE, 3)
    normalised = [dataclasses.replace(STREAM[3], images=[CONFIG.images.normalise(image(0))])]
    assert make(normalised)[0].images.shape == (ROWS, IMAGES, 3, SIZE, SIZE)
    assert make(words, config=llama.PRESETS["tiny"], most_images=0)[0].images is None


def test_a_stream_goes_on_behind_what_was_taken():
    _, taken = make()
    assert taken == 4
    batch, taken = make(STREAM[taken:])
    assert taken == 1
    np.testing.assert_array_equal(batch.images[0, 0], image(4))


def test_rows_of_a_group_have_one_list_of_images():
    """All images of both rows, in order; the slots of the second row go on where those of the first one end."""
    apart_rows, _ = make()
    batch, taken = make(most_images=5, group_rows=2)
    assert taken == 4 and batch.images.shape == (1, 5, SIZE, SIZE, 3)
    used = [apart_rows.soft_index[row].max() // Q + 1 for row in range(ROWS)]
    expected = np.concatenate([images[:count] for images, count in zip(apart_rows.images, used, strict=True)])
    np.testing.assert_array_equal(batch.images[0, :4], expected)
    assert not batch.images[0, 4:].any()
    moved = np.where(apart_rows.soft_index < 0, 0, Q * np.array([0, used[0]])[:, None])
    np.testing.assert_array_equal(batch.soft_index, apart_rows.soft_index + moved)
    for name in ("tokens", "valid", "loss_mask", "positions", "segments"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(apart_rows, name))


# ---- what a model makes of it ----


def relative(found, expected):
    return np.linalg.norm(np.subtract(found, expected)) / np.linalg.norm(expected)


@pytest.mark.parametrize("group", [{}, {"group_rows": 2, "most_images": 4}], ids=["a list a row", "one list"])
def test_loss_and_gradients_are_those_of_samples_on_their_own(group):
    batch, taken = make(**group)
    loss, targets, _, grads = measured(batch)
    expected, count, _, reference = measured(apart(STREAM[:taken]))
    assert targets == count > 0
    assert relative(loss, expected) < 1e-6
    assert relative(grads, reference) < 1e-6
    together = dataclasses.replace(batch, segments=np.zeros_like(batch.segments))
    assert relative(measured(together)[3], reference) > 1e-3  # the comparison sees what segments keep apart


def test_logits_are_those_of_samples_on_their_own():
    batch, taken = make()
    found, alone = logits(batch), logits(apart(STREAM[:taken]))
    for (row, here), number in zip(places(batch), order(STREAM[:taken]), strict=True):
        np.testing.assert_allclose(found[row, here], alone[number, :len(here)], rtol=1e-5, atol=1e-6)


def test_segments_do_not_see_each_other():
    """Another segment's words and images change no bit, though it stands before."""
    batch, _ = make()
    before = logits(batch)
    (row, first), *others = places(batch)
    tokens, images = batch.tokens.copy(), batch.images.copy()
    tokens[row, first] = (tokens[row, first] + 7) % TOKENIZER.vocab_size
    images[row, 0] = image(9)
    for changed in (dataclasses.replace(batch, tokens=tokens), dataclasses.replace(batch, images=images)):
        after = logits(changed)
        assert np.abs(after[row, first] - before[row, first]).max() > 1e-3
        for other, here in others:
            np.testing.assert_array_equal(after[other, here], before[other, here])


def test_a_hidden_beginning_sees_itself_and_no_other_segment():
    bare, full = Sample(answer="Red"), Sample(prompt="Name a color.", answer="Red")
    text = dataclasses.replace(TEXT, prompt_template="")
    batch, _ = make([full, bare], text)
    (_, first), (_, second) = places(batch)
    assert not batch.valid[0, second[0]]
    changed = dataclasses.replace(batch, tokens=np.where(batch.segments == 0, 5, batch.tokens))
    before, after = logits(batch), logits(changed)
    np.testing.assert_array_equal(after[0, second], before[0, second])
    assert (after[0, first] != before[0, first]).any()


def test_mask():
    valid = np.array([[1, 1, 0, 1, 1, 0]], bool)
    segments = np.array([[0, 0, 1, 1, 1, -1]])
    expected = [[1, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0],
                [0, 0, 1, 0, 0, 0],  # hidden: nobody else sees it
                [0, 0, 0, 1, 0, 0],
                [0, 0, 0, 1, 1, 0],
                [0, 0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(causal_mask(valid, segments).dense(6, 6)[0], np.array(expected, bool))
    one = np.zeros_like(segments)
    np.testing.assert_array_equal(causal_mask(valid, one).dense(6, 6), causal_mask(valid).dense(6, 6))


# ---- refusals ----


@pytest.mark.parametrize(("sample", "message"), [
    (Sample(images=[image(0)], prompt="What?", answer="x"), "(?s)placeholders do not match:.*0 <ImageHere>"),
    (Sample(prompt="word " * 99, answer="x"), "Sample 1 of the batch does not fit into a row: .* room for 80 and 3"),
    (Sample(images=[image(0)] * 4, prompt="<ImageHere>" * 4, answer="x"), "Sample 1 of the batch does not fit"),
    (Sample(prompt="a", answer="x", weights={"image": 1.0}), "have media or weights"),
])
def test_a_sample_that_cannot_be_packed_is_named(sample, message):
    with pytest.raises(ValueError, match=message):
        make([STREAM[2], sample])


def test_other_refusals():
    with pytest.raises(ValueError, match="at least one sample"):
        make([])
    with pytest.raises(ValueError, match="have images, but this is a language model"):
        make(config=llama.PRESETS["tiny"])
    with pytest.raises(ValueError, match=r"(?s)1 of 1 packed rows do not fit into 20 slots:\n  row 0: \d+ tokens"):
        Collator(TOKENIZER, TEXT, CONFIG, Groups(1, IMAGES)).batch([tokenize(STREAM[:2], TOKENIZER, TEXT, Q)], 20)


@pytest.mark.parametrize("family", ["imagebind_llm", "llama_adapter"])
def test_families_that_inject_are_refused(family):
    cfg = FAMILIES[family].presets["tiny"]
    with pytest.raises(ValueError, match="one injection for each row"):
        make(config=cfg, most_images=0)
    example = FAMILIES[family].example(cfg)
    segments = np.zeros(example.tokens.shape, np.int32)
    with pytest.raises(ValueError, match="These rows are packed"):
        jax.eval_shape(lambda batch: FAMILIES[family].Model(cfg).init(jax.random.key(0), batch),
                       dataclasses.replace(example, segments=segments))
