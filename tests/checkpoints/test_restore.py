"""Parameters read onto the devices: all of them or some, in their dtypes, and what does not belong there."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax import sharding, trees
from mmjax.checkpoints import restore
from mmjax.checkpoints.converted import ConvertedCheckpoint
from mmjax.config import MeshConfig
from mmjax.families import FAMILIES
from tests import small


def read(**changes):
    source = ConvertedCheckpoint.open(small.checkpoint())
    module = FAMILIES[source.family].Model(source.config, jnp.float32)
    return trees.flatten(restore.read_params(source, module, sharding.make_mesh(MeshConfig(data=1)),
                                             lambda path: jnp.float32, **changes))


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
