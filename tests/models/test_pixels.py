"""Normalised pixels, on the host and on the device."""

from pathlib import Path

import jax
import numpy as np
import pytest

from mmjax.models.pixels import MEAN, STD, normalise

CASES = Path(__file__).parents[1] / "golden" / "minigpt4" / "cases"


@pytest.mark.parametrize("image", ["astronaut", "chelsea"])
def test_normalising_gives_the_original_arrays(image):
    """Bit for bit on the host; compiled, XLA multiplies by reciprocals where the original divides: 4 last bits."""
    with np.load(CASES / "n_preprocess.npz") as arrays:
        expected = arrays[f"{image}.eval_56"]
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (MEAN, STD))
    pixels = np.rint((expected * std + mean) * 255).astype(np.uint8).transpose(1, 2, 0)
    for leading in ((), (1,), (2, 3)):
        given = np.broadcast_to(pixels, (*leading, *pixels.shape))
        found = normalise(given)
        assert (found.dtype, found.shape) == (np.float32, (*leading, *expected.shape))
        np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))
    np.testing.assert_allclose(jax.jit(normalise)(pixels), expected, rtol=0, atol=6e-7)


def test_normalised_images_pass_unchanged():
    images = np.ones((1, 1, 3, 28, 28), np.float32)
    assert normalise(images) is images
