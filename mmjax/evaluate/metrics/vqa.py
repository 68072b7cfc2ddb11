"""Short answers to questions: the VQA challenge's normalisation and accuracy, and what GQA and VizWiz are scored by.

The rules are those of the challenge's published script (GT-Vision-Lab/VQA, vqaEval.py, VQAEval), read in the form in
which MiniGPT-4 brings it along (common/vqa_tools). Where that one departs from what the challenge's page says in words,
the script is followed, because published figures come from it:

- an answer is only normalised where the annotators gave different ones; where all agree it must be theirs, letter case
  aside. ("two" is then no "2".)
- a punctuation mark becomes a space, but goes without leaving one if that mark stands beside a space, or any comma
  between digits, anywhere in the answer: "well-lit" is "well lit", and "1,000 well-lit" is "1000 welllit"
- a period goes unless a digit follows it, whatever stands before it
"""

import functools
import re
from collections.abc import Sequence

_PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"  # neither the apostrophe nor the colon: "girl's", "2:50"
_PERIOD = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")
_MOST_PERIODS = 32  # what one call of the script takes out: it passes a flag, of the value 32, as the number
_NUMBERS = {word: str(number) for number, word in enumerate(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))


def _contractions() -> dict[str, str]:
    """What the script writes for a contraction that lacks an apostrophe.

    Its table as families: whole words whose apostrophes are left out, those with two of them with either one left out.
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
    return table | {"somebody'd": "somebodyd"}  # the one line of the table that takes an apostrophe away


CONTRACTIONS = _contractions()


@functools.lru_cache(maxsize=1 << 16)  # people give the same answers
def normalise(answer: str) -> str:
    """An answer as it is compared: lower case, without punctuation, articles and periods at the ends of words, number
    words up to ten as digits, contractions with their apostrophes.

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
    """The VQA accuracy of an answer, 0 to 1: right if three people gave it, averaged over leaving out each of them.

    references: what people answered, ten in VQAv2, OK-VQA and VizWiz. Two or three that agree are never enough: of n
                references that all match, the others of each are n - 1.
    """
    given, said = [_one_line(reference) for reference in references], _one_line(answer)
    if len(set(given)) > 1:
        given, said = [normalise(reference) for reference in given], normalise(said)
    matches = [reference.lower() == said.lower() for reference in given]
    total = sum(matches)
    return sum(min((total - match) / 3, 1.0) for match in matches) / len(matches) if matches else 0.0


def capped_matches(answer: str, references: Sequence[str]) -> float:
    """min(people who gave this answer / 3, 1), letter case aside: MiniGPT-v2's figure for VizWiz (eval_vqa.py).

    Above the VQA accuracy where exactly three agree: that leaves each of them out once.
    """
    return min(sum(reference.lower() == answer.lower() for reference in references) / 3, 1.0)


def exact(answer: str, references: Sequence[str]) -> float:
    """1 if an answer in lower case is one of the references, letter case and outer spaces aside; else 0.

    MiniGPT-v2's figure for GQA and VSR, where there is one reference.
    """
    return float(answer.lower().strip() in {reference.lower().strip() for reference in references})


def exact_normalised(answer: str, references: Sequence[str]) -> float:
    """`exact` of what `normalise` makes of both."""
    return float(normalise(_one_line(answer)) in {normalise(_one_line(reference)) for reference in references})


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
