"""How far a score may be off by chance: a seeded percentile bootstrap over the items.

N items   C images   K columns   R rounds

A score of a whole data set is seen as a function of column sums over its items: accuracy of (right, 1), corpus BLEU of
ten counts. Drawing the items anew then means weighing rows of a matrix, so that 1000 rounds over 40,000 items take
seconds, and corpus scores are computed from the counts of every draw, not averaged over items.

Where several items share an image the images are drawn and all items of an image come with it: a model that
misreads an image is wrong about it several times, and items drawn one by one would count that as independent evidence
and make the interval too narrow.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

ROUNDS = 1000
CONFIDENCE = 0.95
_AT_ONCE = 4_000_000  # numbers of rows drawn at once: 32 MB


@dataclasses.dataclass(frozen=True)
class Figure:
    """A score, and the interval that holds it with 95 % confidence."""

    value: float
    low: float
    high: float


def figures(
    columns: np.ndarray, of_sums: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    images: Sequence[Hashable] | None = None, rounds: int = ROUNDS, seed: int = 0,
) -> dict[str, Figure]:
    """The scores that a function makes of column sums, each with the interval over `rounds` draws of the images.

    columns:  [N,K] what each item adds to the sums
    of_sums:  float64[R,K] to named scores float64[R]; row by row
    images: N keys; items with the same one are drawn together. None where every item has its own

    The same seed gives the same interval. Raises ValueError for no items, or a number of keys other than N.
    """
    columns = np.asarray(columns, np.float64)
    if columns.ndim != 2 or not len(columns):
        raise ValueError(f"a score needs items, each with its columns; got an array of the shape {columns.shape}")
    values = of_sums(columns.sum(axis=0, keepdims=True))
    drawn = of_sums(_drawn_sums(_by_image(columns, images), rounds, seed))
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    ends = {name: np.quantile(scores, tails) for name, scores in drawn.items()}
    return {name: Figure(float(value[0]), *map(float, ends[name])) for name, value in values.items()}


def means(
    values: Mapping[str, Sequence[float] | np.ndarray], images: Sequence[Hashable] | None = None,
    rounds: int = ROUNDS, seed: int = 0,
) -> dict[str, Figure]:
    """The mean over items of each of several named values a item, with their intervals; see `figures`."""
    columns = np.stack([*(np.asarray(each, np.float64) for each in values.values())], axis=1)
    columns = np.concatenate([columns, np.ones((len(columns), 1))], axis=1)
    return figures(columns, lambda sums: {name: sums[:, place] / sums[:, -1] for place, name in enumerate(values)},
                   images, rounds, seed)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """A share of two counts; 0 where there is nothing to count."""
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below != 0)


def _by_image(columns: np.ndarray, images: Sequence[Hashable] | None) -> np.ndarray:
    """[C,K] the sums over the items of each image."""
    if images is None:
        return columns
    if len(images) != len(columns):
        raise ValueError(f"there are {len(columns)} items, but {len(images)} images")
    numbers: dict[Hashable, int] = {}
    places = [numbers.setdefault(image, len(numbers)) for image in images]
    sums = np.zeros((len(numbers), columns.shape[1]))
    np.add.at(sums, places, columns)
    return sums


def _drawn_sums(rows: np.ndarray, rounds: int, seed: int) -> np.ndarray:
    """[R,K] the sums of as many rows as there are, drawn with replacement, in each round."""
    random = np.random.default_rng(seed)
    count = len(rows)
    sums = np.empty((rounds, rows.shape[1]))
    step = max(1, _AT_ONCE // count)
    for first in range(0, rounds, step):
        some = min(step, rounds - first)
        drawn = random.integers(0, count, (some, count)) + np.arange(some)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=some * count).reshape(some, count)
        sums[first : first + some] = times @ rows
    return sums
