"""The tokenizer against facts about Stanford's, and against what that one made of generated captions."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmjax.evaluate.metrics.tokens import tokens
from tests.evaluate.metrics import reference, steady

FACTS = {  # from the Java program, its punctuation left out
    "A man's dog doesn't run.": "a man 's dog does n't run",
    "can't won't cannot gonna I'm they'll": "ca n't wo n't can not gon na i 'm they 'll",
    "T-shirt; a well-known \"quoted\" word": "t-shirt a well-known quoted word",
    "more & (paren) [x] {y}": "more & -lrb- paren -rrb- -lsb- x -rsb- -lcb- y -rcb-",
    "2,000 people at 3:30 p.m. on 5/6": "2,000 people at 3:30 p.m. on 5/6",
    "$5.00 50% £5 €5": "$ 5.00 50 % # 5 $ 5",
    "Mr. Smith etc. sat.": "mr. smith etc. sat",
    "hello...world -- dash — em": "hello world dash em",
    "the tail.Another one": "the tail.another one",
    "o'clock ma'am 'tis rock 'n' roll": "o'clock ma'am 't is rock 'n' roll",
    "dogs' tails, James's": "dogs tails james 's",
    "wow!!! what? yes!": "wow !!! what yes",
    "and/or his/her b/w w/ a": "and/or his/her b/w w / a",
    "it’s “so” don’t": "it 's so do n't",
    "a ½ café AT&T black&white": "a 1/2 café at&t black & white",
    "1 1/2 cups": "1 1/2 cups",
    "dog., cat": "dog. cat",
    "": "",
    " . , ! ": "",
}


@pytest.mark.parametrize("caption", FACTS)
def test_facts(caption):
    assert " ".join(tokens(caption)) == FACTS[caption]


def test_generated_captions_come_out_as_from_java():
    known = json.loads(reference.FILE.read_text(encoding="utf-8"))["tokens"]
    wrong = {caption: (tokens(caption), right) for caption, right in known.items() if tokens(caption) != right}
    assert len(known) > 390 and not wrong


@steady
@given(st.text(max_size=60))
def test_any_text_ends(text):
    """Every place is passed: nothing hangs, and no token holds a space, an upper-case ASCII letter or nothing."""
    assert all(token and not any("A" <= sign <= "Z" or sign.isspace() for sign in token) for token in tokens(text))


@steady
@given(st.lists(st.text("abcdefghijklmnopqrstuvwxyz", min_size=1), max_size=8))
def test_plain_words_stay(words):
    halved = {"cannot", "gonna", "gotta", "lemme", "gimme", "wanna"}
    assert tokens(" ".join(words)) == words or halved & set(words)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_live_java():
    """At most 1 in 1000 captions that are full of traps differs."""
    pytest.importorskip("pycocoevalcap", reason="needs the extra captions")
    sentences = [reference.sentence(seed) for seed in range(10_000, 15_000)]
    pairs = zip(sentences, reference.java_tokens(sentences), strict=True)
    assert sum(tokens(sentence) != right for sentence, right in pairs) <= 5
