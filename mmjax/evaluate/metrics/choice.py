"""Reads choices from generated answers, and computes POPE's scores of yes and no."""

import re
from collections.abc import Sequence

import numpy as np

from mmjax.evaluate.metrics.bootstrap import ratio

_NO = frozenset(("No", "no", "not"))
_LETTER = re.compile(r"\(?([a-z])(?:$|[).:]+(?:\s|$))")


def is_yes(answer: str) -> bool:
    """Returns whether a generated answer counts as yes, by POPE's evaluate.py: unless the first sentence has the word
    No, no or not.

    An empty answer is a yes. Commas are removed, and words are separated by spaces.
    """
    return _NO.isdisjoint(answer.partition(".")[0].replace(",", "").split(" "))


def read_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Returns the index of the choice that a generated answer names, or None if it names none.

    It is the first choice that is equal to the answer, ignoring case, outer spaces and a period at the end; otherwise
    the one whose letter the answer begins with: "B", "(b)", "B.", "B) a dog".
    """
    plain = _plain(answer)
    for index, choice in enumerate(choices):
        if _plain(choice) == plain:
            return index
    letter = _LETTER.match(plain)
    index = ord(letter[1]) - ord("a") if letter else len(choices)
    return index if index < len(choices) else None


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().lower()


def yes_no_columns(answers: Sequence[bool], right: Sequence[bool]) -> np.ndarray:
    """Returns float64[N,4]: whether each answer is a true yes, a false yes, a true no, a false no."""
    yes, right = np.asarray(answers, bool), np.asarray(right, bool)
    return np.stack([yes & right, yes & ~right, ~yes & ~right, ~yes & right], axis=1).astype(np.float64)


def yes_no_figures(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Returns accuracy, precision, recall and F1 of yes, and the share of yes, from counts [R,4]; 0 for 0 / 0."""
    true_yes, false_yes, true_no, false_no = sums.T
    total = sums.sum(axis=1)
    return {
        "accuracy": ratio(true_yes + true_no, total),
        "precision": ratio(true_yes, true_yes + false_yes),
        "recall": ratio(true_yes, true_yes + false_no),
        "F1": ratio(2 * true_yes, 2 * true_yes + false_yes + false_no),
        "yes share": ratio(true_yes + false_yes, total),
    }
