"""Scores of short answers: the VQA challenge's normalisation and accuracy, and the metrics of GQA and VizWiz.

The rules are those of the challenge's script (GT-Vision-Lab/VQA, vqaEval.py, VQAEval) in MiniGPT-4's copy
(common/vqa_tools). Where the script differs from the description on the challenge's page, it follows the script, which
published results were computed with:

- answers are normalised only if the annotators gave different ones; if all agree, an answer must be equal to theirs,
  ignoring case ("two" does not match "2")
- a punctuation mark is replaced by a space. It is removed instead if, anywhere in the answer, that mark is next to a
  space or a comma is between digits: "well-lit" becomes "well lit", and "1,000 well-lit" becomes "1000 welllit"
- a period is removed unless a digit follows it, whatever precedes it
"""

import functools
import re
from collections.abc import Sequence

_PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"  # neither the apostrophe nor the colon: "girl's", "2:50"
_PERIOD = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")
_MOST_PERIODS = 32  # that one call of the script removes: it passes a flag with the value 32 as the count
_NUMBERS = {word: str(number) for number, word in enumerate(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))


def _contractions() -> dict[str, str]:
    """Returns the script's table of contractions that lack an apostrophe: `{misspelling: contraction}`.

    Of a contraction with one apostrophe that is left out; of one with two, either of them.
    """
    one = (
        "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
        "isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
        "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd "
        "there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've "
        "when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all "
        "you'd you'll you're you've").split()
    two = (
        "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've "
        "something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've").split()
    table = {word.replace("'", ""): word for word in one}
    for word in two:
        start, middle, end = word.split("'")
        table |= {f"{start}{middle}'{end}": word, f"{start}'{middle}{end}": word}
    at = "'ow's'at"
    table |= {"ow's'at": at, "'ows'at": at, "'ow'sat": at}
    table |= {form: "y'all'd've" for form in ("yall'd've", "y'alld've", "y'all'dve")}
    return table | {"somebody'd": "somebodyd"}  # the only entry of the table that removes an apostrophe


CONTRACTIONS = _contractions()


@functools.lru_cache(maxsize=1 << 16)  # annotators repeat answers
def normalise(answer: str) -> str:
    """Normalises an answer for comparison: lower case, without punctuation, articles and final periods, numbers up to
    ten as digits, contractions with their apostrophes.

    >>> normalise("The two dogs, they dont run!")
    "2 dogs they don't run"
    """
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(answer).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(answer: str) -> str:
    grouped = _THOUSANDS.search(answer) is not None
    kept = answer
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        kept = kept.replace(mark, "" if beside_space or grouped else " ")
    return _PERIOD.sub("", kept, count=_MOST_PERIODS)


def accuracy(answer: str, references: Sequence[str]) -> float:
    """Returns the VQA accuracy of an answer, 0 to 1: min(matches / 3, 1), averaged over leaving out each reference.

    references: the annotators' answers, ten in VQAv2, OK-VQA and VizWiz. With fewer than four the accuracy is below 1
    """
    given, answer = [_one_line(reference) for reference in references], _one_line(answer)
    if len(set(given)) > 1:
        given, answer = [normalise(reference) for reference in given], normalise(answer)
    matches = [reference.lower() == answer.lower() for reference in given]
    total = sum(matches)
    return sum(min((total - match) / 3, 1.0) for match in matches) / len(matches) if matches else 0.0


def capped_matches(answer: str, references: Sequence[str]) -> float:
    """Returns min(number of equal references / 3, 1), ignoring case: MiniGPT-v2's score for VizWiz (eval_vqa.py).

    With exactly three equal references it is above the VQA accuracy, which leaves out each of them once.
    """
    return min(sum(reference.lower() == answer.lower() for reference in references) / 3, 1.0)


def exact(answer: str, references: Sequence[str]) -> float:
    """Returns 1 if an answer is equal to one of the references, ignoring case and outer spaces; else 0.

    MiniGPT-v2's score for GQA and VSR, which have one reference.
    """
    return float(answer.lower().strip() in {reference.lower().strip() for reference in references})


def exact_normalised(answer: str, references: Sequence[str]) -> float:
    """Returns `exact` of the normalised answer and references."""
    return float(normalise(_one_line(answer)) in {normalise(_one_line(reference)) for reference in references})


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
