"""Parameters read onto the devices: all of them or some, in their dtypes, and what does not belong there."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax import sharding, trees
from mmjax.checkpoints.converted import ConvertedCheckpoint
from mmjax.checkpoints.restore import ModelSpec
from mmjax.config import MeshConfig
from mmjax.models.int8 import Int8
from tests import small


def spec(**changes):
    mesh = sharding.make_mesh(MeshConfig(data=1))
    return ModelSpec(ConvertedCheckpoint.open(small.checkpoint()), mesh, **({"dtype": "float32"} | changes))


def read(**changes):
    return trees.flatten(spec().restore(**changes))


def test_dtypes_of_trained_frozen_and_exact_parameters():
    made = spec(dtype="bfloat16", frozen_dtype="int8", trained=("projector/.*", "llm/layers/attn/q/.*"),
                exact=("llm/head/w",))
    assert made.module.dtype == jnp.bfloat16 and not made.module.remat
    assert {path: jnp.dtype(made.param_dtype(path)).name for path in (
        "projector/w", "llm/layers/attn/q/w", "llm/layers/attn/k/w", "llm/head/w", "llm/norm/scale", "vit/pos")} == {
        "projector/w": "float32", "llm/layers/attn/q/w": "float32", "llm/layers/attn/k/w": "int8",
        "llm/head/w": "bfloat16", "llm/norm/scale": "bfloat16", "vit/pos": "bfloat16"}
    wanted = made.param_specs(lambda path: path.startswith("llm/"))
    held = trees.flatten(made.restore(only=lambda path: path.startswith("llm/")))
    assert held.keys() == wanted.keys() and isinstance(held["llm/layers/attn/k/w"], Int8)
    for path, leaf in held.items():
        for got, expected in zip(jax.tree.leaves(leaf), jax.tree.leaves(wanted[path]), strict=True):
            assert (got.shape, got.dtype, got.sharding) == (expected.shape, expected.dtype, expected.sharding), path


def test_some_parameters_are_read_and_some_replaced():
    ones = np.ones(64, np.float32)
    found = read(only=lambda path: path.startswith("projector"),
                 trained={"projector/b": ones, "llm/norm/scale": ones})
    assert found.keys() == {"projector/w", "projector/b"}
    np.testing.assert_array_equal(found["projector/b"], ones)
    assert np.std(found["projector/w"]) > 0


def test_trained_parameters_of_another_model_are_named():
    with pytest.raises(ValueError, match=r"of another model:\n(.*\n)*.*projector/b") as raised:
        read(trained={"projector/b": np.ones(3, np.float32), "gate": np.ones(1, np.float32)})
    assert "gate" in str(raised.value)


def test_parameters_that_were_never_trained_are_named(tmp_path):
    shutil.copytree(small.checkpoint(), tmp_path / "c")
    card = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps(card | {"fresh": ["projector/w", "projector/b"]}))
    with pytest.raises(ValueError, match=r"converted without projector/w, projector/b.*--lora, --adapter\)"):
        mmjax.load(tmp_path / "c", dtype="float32")
    fresh = mmjax.load(tmp_path / "c", dtype="float32", init_fresh=1)
    bound = fresh.config.soft_width**-0.5
    assert 0.9 * bound < np.abs(fresh.params["projector"]["w"]).max() <= bound
