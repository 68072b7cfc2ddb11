"""Caption scores against coco-caption's own classes, and what must hold for any captions."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmjax.evaluate.metrics import captions
from tests.evaluate.metrics import reference, steady

CORPORA = json.loads(reference.FILE.read_text(encoding="utf-8"))["scores"]
sentences = st.lists(st.sampled_from("a b c d e f".split()), min_size=1, max_size=9)
corpora = st.lists(st.tuples(sentences, st.lists(sentences, min_size=1, max_size=3)), min_size=2, max_size=6)


def scores(said, right):
    said, right = [caption.split() for caption in said], [[each.split() for each in some] for some in right]
    sums = sum(map(captions.bleu_columns, said, right))[None]
    return {"BLEU": [float(score[0]) for score in captions.bleu(sums).values()],
            "ROUGE-L": [captions.rouge_l(*pair) for pair in zip(said, right, strict=True)],
            "CIDEr-D": captions.cider_d(said, right).tolist()}


def agree(found, wanted):
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("seed", range(len(CORPORA)))
def test_recorded_scores_of_pycocoevalcap(seed):
    agree(scores(*reference.corpus(seed)), CORPORA[seed])


@pytest.mark.slow
def test_live_pycocoevalcap():
    pytest.importorskip("pycocoevalcap", reason="needs the extra captions")
    for seed in range(1000, 1500):
        agree(scores(*reference.corpus(seed)), reference.published_scores(*reference.corpus(seed)))


@steady
@given(corpora)
def test_captions_that_are_a_reference_are_perfect(corpus):
    """CIDEr-D aside, which weighs n-grams that all images have with nothing."""
    pairs = [(references[0], references) for _, references in corpus]
    sums = sum(captions.bleu_columns(*pair) for pair in pairs)
    for n, score in enumerate(captions.bleu(sums[None]).values(), 1):
        assert score[0] == pytest.approx(1.0, abs=1e-6) or max(len(said) for said, _ in pairs) < n
    assert all(captions.rouge_l(*pair) == pytest.approx(1) for pair in pairs)


def test_cider_of_the_only_reference_is_ten():
    said = [["a", "b", "c", "d"], ["e", "f", "g", "h"]]
    np.testing.assert_allclose(captions.cider_d(said, [[each] for each in said]), 10)


@steady
@given(corpora, st.randoms(use_true_random=False))
def test_the_order_of_images_and_references_does_not_matter(corpus, random):
    places = list(range(len(corpus)))
    random.shuffle(places)
    turned = [(corpus[place][0], corpus[place][1][::-1]) for place in places]
    first, second = ((captions.cider_d(*zip(*each, strict=True)), sum(captions.bleu_columns(*pair) for pair in each))
                     for each in (corpus, turned))
    np.testing.assert_allclose(first[0][places], second[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(first[1], second[1])


@steady
@given(corpora)
def test_scores_stay_in_their_range(corpus):
    cider = captions.cider_d(*zip(*corpus, strict=True))
    assert (cider >= 0).all() and (cider <= 10 + 1e-9).all()
    for pair in corpus:
        assert 0 <= captions.rouge_l(*pair) <= 1 + 1e-12
        assert all(0 <= score[0] <= 1 for score in captions.bleu(captions.bleu_columns(*pair)[None]).values())


@steady
@given(sentences, sentences)
def test_short_captions_pay(reference_words, more):
    """Half of the only reference has all n-grams right, and BLEU-1 is the brevity penalty."""
    whole = reference_words + more
    sums = captions.bleu_columns(reference_words, [whole])[None]
    assert captions.bleu(sums)["BLEU-1"][0] == pytest.approx(np.exp(1 - len(whole) / len(reference_words)), rel=1e-6)


def test_empty_captions_get_nothing():
    assert captions.rouge_l([], [["a"]]) == 0
    assert captions.cider_d([[], ["b"]], [[["a"]], [["b"]]])[0] == 0
    assert captions.bleu(captions.bleu_columns([], [["a"]])[None])["BLEU-1"][0] == 0
