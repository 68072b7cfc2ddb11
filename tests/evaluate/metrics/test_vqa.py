"""The VQA challenge's normalisation and accuracy: facts of its script, and its definition told slowly."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmjax.evaluate.metrics import vqa
from tests.evaluate.metrics import steady

FACTS = {
    "The Dog": "dog",
    "a dog and an apple": "dog and apple",
    "Two": "2",
    "none": "0",
    "ten": "10",
    "eleven": "eleven",
    "dont": "don't",
    "thats": "that's",
    "hes": "he's",
    "couldnt've": "couldn't've",
    "couldn'tve": "couldn't've",
    "yall'd've": "y'all'd've",
    "somebody'd": "somebodyd",
    "twas": "'twas",
    "im": "im",  # the table has "Im", which lower case never is
    "shell": "shell",
    "red.": "red",
    "3.5": "3.5",
    "3.": "3",
    ".5": ".5",
    "p.m.": "pm",
    "1,000": "1000",
    "red,blue": "red blue",
    "red, blue": "red blue",
    "red / blue": "red blue",
    "red/blue": "red blue",
    "well-lit": "well lit",
    "well-lit - room": "welllit room",  # one mark beside a space: all of its kind go without a trace
    "1,000 well-lit": "1000 welllit",  # a comma between digits: so do all marks
    "girl's": "girl's",
    "2:50": "2:50",
    "yes!": "yes",
    "what?": "what",
    "yes\tno": "yes no",
    "": "",
    "the": "",
}


@pytest.mark.parametrize("answer", FACTS)
def test_normalisation(answer):
    assert vqa.normalise(answer) == FACTS[answer]


def test_every_contraction_comes_out_whole():
    """114 of the script's 120: four have a capital letter, which never comes, two stay as they are."""
    assert len(vqa.CONTRACTIONS) == 114
    for short, long in vqa.CONTRACTIONS.items():
        assert vqa.normalise(short) == long
        assert long == "somebodyd" or vqa.normalise(long) in (long, "somebodyd")


def test_accuracy_leaves_each_person_out_once():
    ten = ["yes"] * 3 + ["no"] * 7
    assert vqa.accuracy("yes", ten) == pytest.approx((3 * (2 / 3) + 7) / 10)
    assert vqa.accuracy("no", ten) == 1
    assert vqa.accuracy("maybe", ten) == 0
    assert vqa.accuracy("yes", ["yes"] * 2 + ["no"] * 8) == pytest.approx((2 * (1 / 3) + 8 * (2 / 3)) / 10)
    assert vqa.capped_matches("yes", ten) == 1
    assert vqa.capped_matches("Yes", ["yes"] + ["no"] * 9) == pytest.approx(1 / 3)


def test_answers_are_only_normalised_where_people_differ():
    assert vqa.accuracy("two", ["2"] * 10) == 0
    assert vqa.accuracy("two", ["2"] * 9 + ["3"]) == 1
    assert vqa.accuracy("Yes", ["yes"] * 10) == 1
    assert vqa.accuracy(" yes\n", ["yes"] * 10) == 1


answers = st.sampled_from(["yes", "Yes.", "no", "two", "2", "a dog", "dog", ""])


@steady
@given(answers, st.lists(answers, min_size=1, max_size=10))
def test_accuracy_is_its_definition(answer, references):
    """The mean over all sets of all but one annotator of min(1, matches in the set / 3)."""
    same = len(set(references)) == 1
    said, people = answer, references
    if not same:
        said, people = vqa.normalise(answer), [vqa.normalise(each) for each in references]
    sets = list(itertools.combinations(people, len(people) - 1))
    slow = sum(min(1, sum(each.lower() == said.lower() for each in some) / 3) for some in sets) / len(sets)
    assert vqa.accuracy(answer, references) == pytest.approx(slow)


@steady
@given(st.text(max_size=30))
def test_lower_case_and_spaces_are_settled(answer):
    found = vqa.normalise(answer)
    assert found == " ".join(found.split()) and not set(found.split()) & {"a", "an", "the"}


def test_exact_matches():
    assert vqa.exact("Yes ", ["yes"]) == 1 and vqa.exact("yes.", ["yes"]) == 0
    assert vqa.exact_normalised("Yes.", ["yes"]) == 1 and vqa.exact_normalised("no", ["yes"]) == 0
