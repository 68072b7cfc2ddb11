"""Placement rules and meshes. What needs eight devices: test_eight_devices.py."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from mmjax import sharding
from mmjax.config import MeshConfig
from mmjax.families import FAMILIES, shapes
from tests import tiny

AXES = ((r"a/w", ("embed", "heads", "head")), (r".*/table", ("vocab", "embed")), (r"a/b", ("place",)))


def mesh(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def sized(**paths):
    return {path.replace("_", "/"): jax.ShapeDtypeStruct(shape, np.float32) for path, shape in paths.items()}


def test_dimensions_live_where_placement_says():
    placed = sharding.shardings(sized(a_w=(8, 4, 3), a_b=(7,), x_y_table=(6, 4)), AXES, mesh(2, 4, 2))
    assert {path: place.spec for path, place in placed.items()} == {
        "a/w": PartitionSpec("fsdp", "tensor", None),
        "a/b": PartitionSpec(None),
        "x/y/table": PartitionSpec("tensor", "fsdp"),
    }
    assert [sharding.num_shards(mesh(2, 4, 2), axis) for axis in ("batch", "embed", "heads", "head")] == [8, 4, 2, 1]


def test_every_parameter_that_does_not_fit_is_named():
    with pytest.raises(ValueError) as error:
        sharding.shardings(
            sized(a_w=(6, 3, 3), a_b=(7, 7), b_c=(2,), a_table=(8, 8)), AXES, mesh(1, 4, 2))
    message = str(error.value)
    for expected in (
        "3 parameters do not fit the mesh {'data': 1, 'fsdp': 4, 'tensor': 2}",
        "a/w: heads = 3 cannot be cut into 2 (mesh axis tensor); 1 would work",
        "a/b (7, 7): AXES names 1 dimensions",
        "b/c (2,): no line of AXES describes it",
    ):
        assert expected in message
    assert "table" not in message and "embed" not in message


def test_parameters_that_fsdp_does_not_divide_are_sharded_along_another_dimension_or_kept_whole():
    axes = (*AXES, (r"stack/w", ("layer", "embed", "ff")), (r"norm", ("embed",)))
    leaves = sized(a_w=(6, 2, 8), stack_w=(8, 6, 6), norm=(6,), a_table=(4, 8))
    placed = sharding.shardings(leaves, axes, mesh(1, 4, 2))
    assert {path: sharding_.spec for path, sharding_ in placed.items()} == {
        "a/w": PartitionSpec(None, "tensor", "fsdp"),
        "stack/w": PartitionSpec(None, None, "tensor"),  # never along the layers
        "norm": PartitionSpec(None),
        "a/table": PartitionSpec("tensor", "fsdp"),
    }
    assert sharding.exceptions(leaves, axes, mesh(1, 4, 2)) == (
        "fsdp = 4 does not divide embed = 6: 1 parameter (such as a/w) sharded along another dimension; 2 parameters "
        "(such as stack/w) not sharded over it, 0 MB on each device.")
    assert sharding.exceptions(leaves, axes, mesh(1, 2, 2)) is None


@pytest.mark.parametrize("sizes", [
    (3, 1, 1), (4, 1, 1), (8, 2, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (-1, 0, 1), (-2, -4, 1), (16, 1, 1)])
def test_meshes_that_do_not_fill_the_devices(sizes):
    cfg = MeshConfig(*sizes)
    with pytest.raises(ValueError, match=f"data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]} does not fill 8 device"):
        sharding.make_mesh(cfg, range(8))


def test_one_device_is_a_mesh():
    made = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(made.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    cfg = FAMILIES["minigpt4"].presets["tiny"]
    placed = sharding.shardings(shapes("minigpt4", cfg), FAMILIES["minigpt4"].all_axes(cfg), made)
    assert all(place.is_fully_replicated for place in placed.values())


def test_constraints_act_inside_the_mesh_alone():
    made = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with sharding.use_mesh(made):
        assert nn.logical_to_mesh_axes(("batch", "length", "embed")) == PartitionSpec(("data", "fsdp"), None, None)
        assert jax.sharding.get_abstract_mesh().shape == made.shape
    assert jax.sharding.get_abstract_mesh().empty
    x = np.ones((2, 3, 4))
    assert nn.with_logical_constraint(x, ("batch", "length", "embed")) is x


def test_batches_are_cut_by_rows():
    spec = sharding.batch_sharding(mesh(2, 2, 2))
    assert {leaf.shape[0] // spec.shard_shape(leaf.shape)[0] for leaf in jax.tree.leaves(tiny.batch(rows=4))} == {4}
