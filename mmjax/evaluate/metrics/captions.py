"""Captions against several references: BLEU-1 to 4, ROUGE-L and CIDEr-D as COCO's scorer computes them, without Java.

N captions   R rounds

The formulas, constants and conventions are those of coco-caption (pycocoevalcap), to its last digits but for rounding.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mmjax.evaluate.metrics.tokens import tokens

ORDERS = 4  # n-grams of 1 to 4 words
BETA = 1.2  # ROUGE-L: how much more recall counts than precision
SIGMA = 6.0  # CIDEr-D: of the Gaussian over the difference in length
_SMALL, _TINY = 1e-9, 1e-15  # bleu_scorer.py: added below and above, so that 0 of 0 is 0

Words = Sequence[str]


def tokenised(captions: Iterable[str]) -> list[list[str]]:
    """Every caption's tokens."""
    return [tokens(caption) for caption in captions]


def ngrams(words: Words) -> list[Counter[tuple[str, ...]]]:
    """How often each n-gram stands in a caption, for n = 1 to 4."""
    return [Counter(zip(*(words[place:] for place in range(n)), strict=False)) for n in range(1, ORDERS + 1)]


def bleu_columns(answer: Words, references: Sequence[Words]) -> np.ndarray:
    """float64[10]: what a caption adds to corpus BLEU.

    The n-grams that match (each at most as often as in the reference that has most of it) and the n-grams that there
    are, for n = 1 to 4; its length; the length of the reference that is closest in length, of equals the shorter one.
    """
    most: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(ORDERS)]
    for reference in references:
        for known, counts in zip(most, ngrams(reference), strict=True):
            known |= counts
    matches = [(counts & known).total() for counts, known in zip(ngrams(answer), most, strict=True)]
    there = [max(0, len(answer) - n) for n in range(ORDERS)]
    closest = min((abs(len(reference) - len(answer)), len(reference)) for reference in references)[1]
    return np.array([*matches, *there, len(answer), closest], np.float64)


def bleu(sums: np.ndarray) -> dict[str, np.ndarray]:
    """[R,10] sums of `bleu_columns` to BLEU-1 to 4, float64[R] each: the geometric mean of the precisions, times the
    brevity penalty exp(1 - reference length / length) where the captions are shorter."""
    matches, there = sums[:, :ORDERS], sums[:, ORDERS : 2 * ORDERS]
    length = (sums[:, 8] + _TINY) / (sums[:, 9] + _SMALL)
    brevity = np.exp(np.minimum(0.0, 1 - 1 / length))
    products = np.cumprod((matches + _TINY) / (there + _SMALL), axis=1)
    return {f"BLEU-{n}": products[:, n - 1] ** (1 / n) * brevity for n in range(1, ORDERS + 1)}


def rouge_l(answer: Words, references: Sequence[Words]) -> float:
    """F of the longest common subsequence: best precision and best recall over the references, which need not be the
    same one's, with beta 1.2. A caption without tokens gets 0."""
    common = [_longest_common(answer, reference) for reference in references]
    precision = max(length / max(1, len(answer)) for length in common)
    recall = max(length / max(1, len(reference)) for length, reference in zip(common, references, strict=True))
    if not (precision and recall):
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(first: Words, second: Words) -> int:
    """Length of the longest sequence of tokens that stands in both, in order, with gaps."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, 1):
            above = row[place]
            row[place] = before + 1 if word == other else max(above, row[place - 1])
            before = above
    return row[-1]


def cider_d(answers: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """float64[N]: CIDEr-D of each caption, 0 to 10; the score of the data set is their mean.

    n-grams are weighed by how few of the N images have them in a reference, so a caption's score depends on the whole
    set, and of a single image every weight, and the score, is 0.
    """
    counted = [[ngrams(reference) for reference in each] for each in references]
    seen: Counter[tuple[str, ...]] = Counter()
    for each in counted:
        seen.update({ngram for reference in each for counts in reference for ngram in counts})
    most = math.log(max(1, len(references)))
    weights = {ngram: most - math.log(count) for ngram, count in seen.items()}
    return np.array([_cider(ngrams(answer), each, weights, most)
                     for answer, each in zip(answers, counted, strict=True)])


def _cider(answer: Sequence[Counter], references: Sequence[Sequence[Counter]], weights: Mapping[tuple, float],
           most: float) -> float:
    """Ten times the mean over n and references of the clipped cosine, times the penalty for another length."""
    said = [_weighed(counts, weights, most) for counts in answer]
    total = 0.0
    for reference in references:
        # cider_scorer.py: the length that is compared is the number of pairs of words
        other = math.exp(-((answer[1].total() - reference[1].total()) ** 2) / (2 * SIGMA**2))
        for mine, counts in zip(said, reference, strict=True):
            theirs = _weighed(counts, weights, most)
            lengths = math.hypot(*mine.values()) * math.hypot(*theirs.values())
            if lengths:
                shared = sum(min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in mine.items()
                             if ngram in theirs)
                total += shared / lengths * other
    return 10 * total / (ORDERS * len(references))


def _weighed(counts: Counter, weights: Mapping[tuple, float], most: float) -> dict[tuple, float]:
    """n-grams' counts times their weights; one that no reference has weighs most."""
    return {ngram: count * weights.get(ngram, most) for ngram, count in counts.items()}
