"""Choices: how many are right, and POPE's figures for yes and no."""

import re
from collections.abc import Sequence

import numpy as np

from mmjax.evaluate.metrics.bootstrap import ratio

_NO = frozenset(("No", "no", "not"))
_LETTER = re.compile(r"\(?([a-z])(?:$|[).:]+(?:\s|$))")


def says_yes(answer: str) -> bool:
    """Yes or no, read from words as POPE's evaluate.py does it: no if the first sentence has the word No, no or not.

    Everything else is a yes, an empty answer too; commas do not count, words end at spaces.
    """
    return _NO.isdisjoint(answer.partition(".")[0].replace(",", "").split(" "))


def read_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Which of the choices an answer in words is: its place, or None if it is none of them.

    It is the first that equals it, letter case, outer spaces and a period at the end aside; or else the one that it
    names by a letter: "B", "(b)", "B.", "B) a dog".
    """
    said = _plain(answer)
    for place, choice in enumerate(choices):
        if _plain(choice) == said:
            return place
    letter = _LETTER.match(said)
    place = ord(letter[1]) - ord("a") if letter else len(choices)
    return place if place < len(choices) else None


def _plain(words: str) -> str:
    return words.strip().removesuffix(".").strip().lower()


def yes_no_columns(said: Sequence[bool], right: Sequence[bool]) -> np.ndarray:
    """float64[N,4] for each answer whether it is a true yes, a false yes, a true no, a false no."""
    said, right = np.asarray(said, bool), np.asarray(right, bool)
    return np.stack([said & right, said & ~right, ~said & ~right, ~said & right], axis=1).astype(np.float64)


def yes_no_figures(sums: np.ndarray) -> dict[str, np.ndarray]:
    """[R,4] counts to accuracy, precision, recall, F1 of yes, and the share of yes; a share of nothing is 0."""
    true_yes, false_yes, true_no, false_no = sums.T
    total = sums.sum(axis=1)
    return {
        "accuracy": ratio(true_yes + true_no, total),
        "precision": ratio(true_yes, true_yes + false_yes),
        "recall": ratio(true_yes, true_yes + false_no),
        "F1": ratio(2 * true_yes, 2 * true_yes + false_yes + false_no),
        "yes share": ratio(true_yes + false_yes, total),
    }
