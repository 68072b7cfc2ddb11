"""Intervals: what they must hold, that they are reproducible, and that images are drawn whole."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmjax.evaluate.metrics import bootstrap
from tests.evaluate.metrics import steady


@steady
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 3))
def test_the_interval_holds_the_mean(values, seed):
    figure = bootstrap.means({"score": values}, seed=seed, rounds=300)["score"]
    assert figure.value == pytest.approx(np.mean(values))
    assert min(values) - 1e-9 <= figure.low <= figure.value + 1e-9 and figure.value - 1e-9 <= figure.high


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).random(50)
    first, again, other = (bootstrap.means({"s": values}, seed=seed)["s"] for seed in (1, 1, 2))
    assert first == again and first != other and first.value == other.value


def test_width_is_that_of_the_normal_approximation():
    values = np.random.default_rng(0).random(2000)
    figure = bootstrap.means({"s": values})["s"]
    assert (figure.high - figure.low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(2000), rel=0.1)


def test_it_covers_the_truth_as_often_as_it_says():
    """Of 300 samples of 60 coin throws about 95 in 100 intervals hold 0.3; less than 90 would be 4 sigmas off."""
    draw = np.random.default_rng(0)
    samples = (draw.random(60) < 0.3 for _ in range(300))
    found = [bootstrap.means({"s": sample}, rounds=400, seed=3)["s"] for sample in samples]
    assert 0.90 < np.mean([figure.low <= 0.3 <= figure.high for figure in found]) < 0.99


def test_items_of_one_image_are_no_independent_evidence():
    """400 items that are 40 answers repeated tenfold are as uncertain as 40 items."""
    values = np.random.default_rng(0).random(40)
    images = np.repeat(np.arange(40), 10)
    alone = bootstrap.means({"s": values})["s"]
    together = bootstrap.means({"s": np.repeat(values, 10)}, list(images))["s"]
    apart = bootstrap.means({"s": np.repeat(values, 10)})["s"]
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    assert apart.high - apart.low < 0.5 * (together.high - together.low)


def test_scores_of_sums_are_computed_anew_in_every_draw():
    """A ratio of sums, against one that is drawn with a loop."""
    columns = np.random.default_rng(0).random((30, 2))
    figure = bootstrap.figures(columns, lambda sums: {"r": sums[:, 0] / sums[:, 1]}, rounds=4000)["r"]
    draw = np.random.default_rng(5)
    slow = []
    for _ in range(4000):
        some = columns[draw.integers(0, 30, 30)].sum(axis=0)
        slow.append(some[0] / some[1])
    assert figure.value == pytest.approx(columns[:, 0].sum() / columns[:, 1].sum())
    assert (figure.low, figure.high) == pytest.approx(tuple(np.quantile(slow, (0.025, 0.975))), abs=0.02)


def test_many_rounds_at_once_or_few_are_the_same(monkeypatch):
    values = {"s": np.random.default_rng(0).random(10)}
    whole = bootstrap.means(values, rounds=200)["s"]
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 25)  # two rounds of ten at once
    assert bootstrap.means(values, rounds=200)["s"] == whole


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="needs items"):
        bootstrap.means({"s": []})
    with pytest.raises(ValueError, match="3 items, but 2 images"):
        bootstrap.means({"s": [1, 2, 3]}, ["a", "b"])
