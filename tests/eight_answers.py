"""Answers on eight (virtual) devices; run by test_eight_devices.py."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

jax.config.update("jax_num_cpu_devices", 8)

import mmjax  # noqa: E402
from mmjax import sharding  # noqa: E402
from mmjax.config import MeshConfig  # noqa: E402
from mmjax.data import scenes  # noqa: E402
from mmjax.evaluate import Choices  # noqa: E402
from mmjax.inference import predictions  # noqa: E402
from tests import small  # noqa: E402

ASKS = [predictions.Request(str(n), mmjax.Sample(images=[scenes.draw(scene)], prompt="What is it? " * (1 + n % 2)),
                            ("red", "a large green star", "no")[:2 + n % 2])
        for n, scene in enumerate(scenes.scenes("train", 5))]


def answers(mesh, out, ranked):
    model = mmjax.load(small.checkpoint(), mesh, dtype="float32")
    answerer = (
        Choices(model, 3) if ranked else predictions.TextAnswerer(model, predictions.Decoding(max_new_tokens=4), 3)
    )
    assert answerer.rows % sharding.num_shards(mesh, "batch") == 0
    predictions.predict(out, ASKS, answerer, {part: {} for part in predictions.COMPARED}, Console(quiet=True))
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.extended
@pytest.mark.parametrize(("ranked", "cfg"), [(True, MeshConfig(data=4, fsdp=2)), (False, MeshConfig())],
                         ids=["ranked", "in words"])
def test_eight_devices_answer_as_one(tmp_path, ranked, cfg):
    one = answers(sharding.make_mesh(MeshConfig(), jax.devices()[:1]), tmp_path / "one.jsonl", ranked)
    eight = answers(sharding.make_mesh(cfg), tmp_path / "eight.jsonl", ranked)
    assert [line["answer"] for line in eight] == [line["answer"] for line in one]
    for line, expected in zip(eight, one, strict=True):
        np.testing.assert_allclose(line.get("losses", 0), expected.get("losses", 0), rtol=1e-5)
    assert len({str(line | {"id": ""}) for line in one}) > 1
