"""BLEU-1 to 4, ROUGE-L and CIDEr-D of captions with several references, as COCO's scorer computes them, without Java.

N captions   R rounds

The formulas, constants and conventions are those of coco-caption (pycocoevalcap); the results agree up to rounding.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mmjax.evaluate.metrics.tokens import tokens

ORDERS = 4  # n-grams of 1 to 4 words
BETA = 1.2  # ROUGE-L: weight of recall relative to precision
SIGMA = 6.0  # CIDEr-D: of the Gaussian of the difference in length
_SMALL, _TINY = 1e-9, 1e-15  # bleu_scorer.py: added to denominator and numerator, so that 0 / 0 is 0

Words = Sequence[str]


def tokenised(captions: Iterable[str]) -> list[list[str]]:
    """Returns the tokens of each caption."""
    return [tokens(caption) for caption in captions]


def ngrams(words: Words) -> list[Counter[tuple[str, ...]]]:
    """Returns the number of occurrences of each n-gram in a caption, for n = 1 to 4."""
    return [Counter(zip(*(words[start:] for start in range(n)), strict=False)) for n in range(1, ORDERS + 1)]


def bleu_columns(answer: Words, references: Sequence[Words]) -> np.ndarray:
    """Returns the counts of a caption that corpus BLEU is computed from, float64[10].

    They are, for n = 1 to 4, the number of matching n-grams (each at most as often as in the reference that has it most
    often) and of all n-grams; the length; and the length of the reference closest in length, the shorter one of two.
    """
    most: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(ORDERS)]
    for reference in references:
        for known, counts in zip(most, ngrams(reference), strict=True):
            known |= counts
    matches = [(counts & known).total() for counts, known in zip(ngrams(answer), most, strict=True)]
    totals = [max(0, len(answer) - n) for n in range(ORDERS)]
    closest = min((abs(len(reference) - len(answer)), len(reference)) for reference in references)[1]
    return np.array([*matches, *totals, len(answer), closest], np.float64)


def bleu(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Returns BLEU-1 to 4, float64[R] each, from sums of `bleu_columns` [R,10]: the geometric mean of the precisions,
    times the brevity penalty exp(1 - reference length / length) if the captions are shorter."""
    matches, totals = sums[:, :ORDERS], sums[:, ORDERS : 2 * ORDERS]
    length = (sums[:, 8] + _TINY) / (sums[:, 9] + _SMALL)
    brevity = np.exp(np.minimum(0.0, 1 - 1 / length))
    products = np.cumprod((matches + _TINY) / (totals + _SMALL), axis=1)
    return {f"BLEU-{n}": products[:, n - 1] ** (1 / n) * brevity for n in range(1, ORDERS + 1)}


def rouge_l(answer: Words, references: Sequence[Words]) -> float:
    """Returns the F score of the longest common subsequence, with beta 1.2; 0 for a caption without tokens.

    Precision and recall are each the maximum over the references, possibly of two different ones.
    """
    common = [_longest_common(answer, reference) for reference in references]
    precision = max(length / max(1, len(answer)) for length in common)
    recall = max(length / max(1, len(reference)) for length, reference in zip(common, references, strict=True))
    if not (precision and recall):
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(first: Words, second: Words) -> int:
    """Returns the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for index, other in enumerate(second, 1):
            above = row[index]
            row[index] = before + 1 if word == other else max(above, row[index - 1])
            before = above
    return row[-1]


def cider_d(answers: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """Returns the CIDEr-D of each caption, float64[N], 0 to 10; the score of the data set is their mean.

    An n-gram's weight is log(N / number of images with it in a reference), so the score of a caption depends on the
    whole set. For a single image all weights, and the score, are 0.
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
    """Returns ten times the mean over n and references of the clipped cosine times the penalty of the length."""
    weighted = [_weighted(counts, weights, most) for counts in answer]
    total = 0.0
    for reference in references:
        # cider_scorer.py: the length is the number of bigrams
        penalty = math.exp(-((answer[1].total() - reference[1].total()) ** 2) / (2 * SIGMA**2))
        for mine, counts in zip(weighted, reference, strict=True):
            theirs = _weighted(counts, weights, most)
            lengths = math.hypot(*mine.values()) * math.hypot(*theirs.values())
            if lengths:
                shared = sum(min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in mine.items()
                             if ngram in theirs)
                total += shared / lengths * penalty
    return 10 * total / (ORDERS * len(references))


def _weighted(counts: Counter, weights: Mapping[tuple, float], most: float) -> dict[tuple, float]:
    """Returns the counts of n-grams times their weights; `most` is the weight of one that is in no reference."""
    return {ngram: count * weights.get(ngram, most) for ngram, count in counts.items()}
