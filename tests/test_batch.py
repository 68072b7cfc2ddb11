import dataclasses

import jax
import pytest

from mmjax.batch import Sample
from tests import tiny


def test_batches_pass_through_jit_with_and_without_images():
    seen = []
    double = jax.jit(lambda batch: seen.append(batch.images is None) or jax.tree.map(lambda x: x + x, batch))
    for images in (1, 0):
        batch = tiny.batch(image_count=images)
        doubled = double(batch)
        assert (doubled.tokens == 2 * batch.tokens).all()
        assert (doubled.images is None) == (images == 0)
    assert seen == [False, True]


def test_samples_share_nothing_and_do_not_change():
    first, second = Sample(prompt="a"), Sample(prompt="b")
    first.images.append("x.png")
    first.turns.append(("a", "b"))
    assert second == Sample(prompt="b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.answer = "c"
