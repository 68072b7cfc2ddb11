"""Preprocessing, caption cleaning, resized position tables, chat templates, against the original's."""

import re

import jax
import numpy as np
import pytest
from PIL import Image

from mmjax.data import images
from mmjax.data.formats import clean_caption
from mmjax.models.layers import resize_positions
from mmjax.models.pixels import normalise
from tests.parity import golden
from tests.parity.close import EMBEDDING, assert_close

RECORDED = [(case.name, array) for case in golden.cases("pictures") for array in case.arrays]


@pytest.mark.parametrize(("name", "array"), RECORDED)
def test_image(name, array):
    """`IMAGE.eval_SIZE`, `IMAGE.resized_u8_SIZE`, either of them cut to rows or summed up by channel."""
    case = golden.load(name)
    image, what = array.split(".")
    kind, size, detail = re.fullmatch(r"(eval|resized_u8)_(\d+)_?(.*)", what).groups()
    with Image.open(golden.folder() / "cases" / case.spec["pictures"][image]["file"]) as opened:
        pixels = images.load(opened, int(size))
    found = pixels if kind == "resized_u8" else normalise(pixels)
    if rows := re.fullmatch(r"rows_(\d+)(?:_to)?_(\d+)", detail):
        first, last = map(int, rows.groups())
        found = found[first : last + 1] if kind == "resized_u8" else found[:, first : last + 1]
    if detail == "channel_mean_std":
        expected = case.arrays[array]
        found = np.stack([found.mean((1, 2), dtype=np.float64), found.std((1, 2), dtype=np.float64)])
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    else:
        np.testing.assert_array_equal(found, case.arrays[array])


@golden.each("pictures")
def test_normalising_on_the_device(case):
    """Compiled, as the model does it, XLA rounds differently: by two units in the last place of values up to 2.6."""
    image = next(iter(case.spec["pictures"].values()))
    with Image.open(golden.folder() / "cases" / image["file"]) as opened:
        pixels = images.load(opened, 56)[None, None]
    np.testing.assert_allclose(jax.jit(normalise)(pixels), normalise(pixels), rtol=0, atol=6e-7)


@golden.each("pictures")
def test_clean_captions(case):
    for pair in case.spec["captions"]:
        assert clean_caption(pair["inp"]) == pair["out"]
    for pair in case.spec.get("captions_max5", []):
        assert "a photo of " + clean_caption(pair["inp"], 5) == pair["out"]


@golden.each("positions")
def test_resized_positions(case):
    patch = case.spec["patch"]
    for size in case.spec["images"]:
        for name in case.holds(f"pos_embed_{size}px"):
            resized = resize_positions(case.arrays["pos_embed_in"][0], size // patch)
            assert_close("pos_embed", resized[None], case.arrays[name], absolute=EMBEDDING)
    for name in case.holds("big_in_16x16"):
        table, expected = case.arrays[name][0], case.arrays["big_out_32x32"]
        side = round((expected.shape[1] - 1) ** 0.5)
        assert_close("pos_embed", resize_positions(table, side)[None], expected, absolute=EMBEDDING)
