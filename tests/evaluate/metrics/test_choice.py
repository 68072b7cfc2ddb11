"""Choices read from words, and POPE's figures."""

import numpy as np
import pytest

from mmjax.evaluate.metrics import choice

YES = {"Yes": True, "yes, it is": True, "No": False, "no.": False, "No, there is.": False, "There is not": False,
       "It is. No": True, "NO": True, "nothing": True, "": True, "I do not know": False, "\nNo": True}


@pytest.mark.parametrize("answer", YES)
def test_yes_as_pope_reads_it(answer):
    assert choice.is_yes(answer) == YES[answer]


CHOICES = ("A dog", "two cats", "b")
READ = {"a dog": 0, "Two cats.": 1, " two cats ": 1, "A": 0, "(b)": 1, "b": 2, "B. two cats": 1, "C) b": 2, "c.": 2,
        "D": None, "a cat": None, "": None, "the dog": None, "(c": 2}


@pytest.mark.parametrize("answer", READ)
def test_a_choice_in_words(answer):
    assert choice.read_choice(answer, CHOICES) == READ[answer]


def test_yes_no_figures():
    said = [True, True, False, False, True]
    right = [True, False, False, True, True]
    columns = choice.yes_no_columns(said, right)
    np.testing.assert_array_equal(columns.sum(axis=0), [2, 1, 1, 1])
    found = {name: float(score[0]) for name, score in choice.yes_no_figures(columns.sum(axis=0)[None]).items()}
    assert found == pytest.approx(
        {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "F1": 2 / 3, "yes share": 3 / 5})


def test_shares_of_nothing_are_zero():
    found = choice.yes_no_figures(choice.yes_no_columns([False], [False]).sum(axis=0)[None])
    assert [float(found[name][0]) for name in ("accuracy", "precision", "recall", "F1")] == [1, 0, 0, 0]
