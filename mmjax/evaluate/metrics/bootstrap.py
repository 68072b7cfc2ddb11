"""Confidence intervals of scores: a seeded percentile bootstrap over the items.

N items   C images   K columns   R rounds

A score of a data set is a function of column sums over its items: accuracy is one of (right, 1), corpus BLEU one of ten
counts. A resampled score then needs only a weighted sum of rows, so 1000 rounds over 40,000 items take seconds. Corpus
scores are computed from the counts of each sample, not averaged over items.

If several items share an image, images are sampled, each with all of its items: errors on one image are not
independent, and sampling items one by one would give too narrow an interval.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

ROUNDS = 1000
CONFIDENCE = 0.95
_AT_ONCE = 4_000_000  # row numbers sampled at once: 32 MB


@dataclasses.dataclass(frozen=True)
class Figure:
    """A score and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def figures(
    columns: np.ndarray, of_sums: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    images: Sequence[Hashable] | None = None, rounds: int = ROUNDS, seed: int = 0,
) -> dict[str, Figure]:
    """Returns the scores that a function computes from column sums, each with its interval over `rounds` samples.

    columns: [N,K], the summands of each item
    of_sums: float64[R,K] to named scores float64[R]; row by row
    images:  N keys; items with the same key are sampled together. None if no items share an image

    The same seed gives the same interval. Raises ValueError for no items, or a number of keys other than N.
    """
    columns = np.asarray(columns, np.float64)
    if columns.ndim != 2 or not len(columns):
        raise ValueError(f"a score needs items, each with its columns; got an array of the shape {columns.shape}")
    values = of_sums(columns.sum(axis=0, keepdims=True))
    sampled = of_sums(_sampled_sums(_sums_by_image(columns, images), rounds, seed))
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    ends = {name: np.quantile(scores, tails) for name, scores in sampled.items()}
    return {name: Figure(float(value[0]), *map(float, ends[name])) for name, value in values.items()}


def means(
    values: Mapping[str, Sequence[float] | np.ndarray], images: Sequence[Hashable] | None = None,
    rounds: int = ROUNDS, seed: int = 0,
) -> dict[str, Figure]:
    """Returns the mean of each of several values per item, with its interval; see `figures`."""
    columns = np.stack([*(np.asarray(each, np.float64) for each in values.values())], axis=1)
    columns = np.concatenate([columns, np.ones((len(columns), 1))], axis=1)
    return figures(columns, lambda sums: {name: sums[:, index] / sums[:, -1] for index, name in enumerate(values)},
                   images, rounds, seed)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Returns the ratio of two counts; 0 where the denominator is 0."""
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below != 0)


def _sums_by_image(columns: np.ndarray, images: Sequence[Hashable] | None) -> np.ndarray:
    """Returns the sums over the items of each image, [C,K]."""
    if images is None:
        return columns
    if len(images) != len(columns):
        raise ValueError(f"there are {len(columns)} items, but {len(images)} images")
    numbers: dict[Hashable, int] = {}
    rows = [numbers.setdefault(image, len(numbers)) for image in images]
    sums = np.zeros((len(numbers), columns.shape[1]))
    np.add.at(sums, rows, columns)
    return sums


def _sampled_sums(rows: np.ndarray, rounds: int, seed: int) -> np.ndarray:
    """Returns the sum of `len(rows)` rows sampled with replacement, for each round: [R,K]."""
    random = np.random.default_rng(seed)
    count = len(rows)
    sums = np.empty((rounds, rows.shape[1]))
    step = max(1, _AT_ONCE // count)
    for first in range(0, rounds, step):
        some = min(step, rounds - first)
        sampled = random.integers(0, count, (some, count)) + np.arange(some)[:, None] * count
        times = np.bincount(sampled.ravel(), minlength=some * count).reshape(some, count)
        sums[first : first + some] = times @ rows
    return sums
