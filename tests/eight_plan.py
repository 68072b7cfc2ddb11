"""Compiled programs and plans that need eight (virtual) devices; run by test_eight_devices.py."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 8)
pytestmark = pytest.mark.extended

from mmjax import sharding, trees  # noqa: E402
from mmjax.config import DataConfig, MeshConfig, OptimConfig, RunConfig, TextConfig, WeightsConfig  # noqa: E402
from mmjax.cost import hardware, hlo, plan  # noqa: E402
from mmjax.families import minigpt4  # noqa: E402
from mmjax.training import optim, steps  # noqa: E402
from tests import tiny  # noqa: E402

L, B, D = 3, 16, 32


def found(mesh, function, *arguments):
    """arguments: (shape, spec)"""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
              for shape, spec in arguments]
    with sharding.use_mesh(mesh):
        return hlo.collectives(jax.jit(function).lower(*shapes).compile().as_text(), mesh)


def test_data_parallel_gradients():
    mesh = sharding.make_mesh(MeshConfig(data=8))
    (one,) = found(mesh, jax.grad(lambda w, x: (x @ w).sum()), ((D, D), ()), ((B, D), ("data",)))
    assert (one.kind, one.axes, one.group_size, one.dtype, one.times) == ("all-reduce", ("data",), 8, "f32", 1)
    assert one.bytes in (4 * D * D, 4 * D)  # XLA may sum before it spreads


def test_a_scan_gathers_a_layer_at_a_time():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))

    def layers(w, x):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, PartitionSpec())
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, w)[0]

    (one,) = found(mesh, layers, ((L, D, D), (None, "fsdp")), ((B, D), ("fsdp",)))
    assert (one.kind, one.axes, one.times, one.bytes) == ("all-gather", ("fsdp",), L, 4 * D * D)
    assert one.sent == L * 4 * D * D * 7 // 8


def test_tensor_parallel_sums():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    (one,) = found(mesh, lambda x, w: jax.lax.with_sharding_constraint(x @ w, PartitionSpec(("data", "fsdp"))),
                   ((B, D), (("data", "fsdp"), "tensor")), ((D, D), ("tensor",)))
    assert (one.kind, one.axes, one.group_size, one.bytes) == ("all-reduce", ("tensor",), 2, 4 * D * B // 4)


def config(mesh, **changes):
    defaults = dict(
        out="runs/x", weights=WeightsConfig(checkpoint="nowhere/tiny", family="minigpt4", dtype="float32"),
        data=DataConfig(path="data/x", prompts=("<Img><ImageHere></Img> Hi",), batch_size=8, length_multiple=8),
        text=TextConfig(max_txt_len=6, max_context_len=9), optim=OptimConfig(accumulate=2), mesh=mesh)
    return RunConfig(**(defaults | changes))


def test_a_plan_under_data_parallelism():
    """Only gradients of what is trained, and numbers, cross devices; nothing but places is assumed of the state."""
    made = plan.plan(config(MeshConfig(data=8)), "local")
    cfg = tiny.MINIGPT4
    gradients = {4 * cfg.soft_width * cfg.llm.dim, 4 * cfg.llm.dim}
    assert {one.bytes for one in made.collectives if one.shape} == gradients
    assert {one.axes for one in made.collectives} == {("data",)}
    assert sum(not one.shape for one in made.collectives) <= 4
    assert made.memory.fits and made.memory.temporaries > 0 and made.compiled > 0
    assert made.rows == 8 and made.length == 16  # 1 + at most 9 of the prompt + 6


def test_the_state_is_as_a_run_has_it():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    settings = config(MeshConfig(2, 2, 2), trained=("projector/.*", "llm/layers/attn/q/w"))
    source, _ = plan.architecture(settings, None)
    step = plan.AbstractStep.of(settings, source, mesh, 16)
    flat = trees.flatten(tiny.params("minigpt4", tiny.MINIGPT4))
    places = sharding.shardings(flat, minigpt4.FAMILY.all_axes(tiny.MINIGPT4), mesh)
    with sharding.use_mesh(mesh):
        params = trees.unflatten({path: jax.device_put(leaf, places[path]) for path, leaf in flat.items()})
        trained, frozen = trees.split(params, trees.mask(params, settings.trained))
        state = steps.start(trained, optim.optimizer(settings.optim), settings.seed)
        everywhere = NamedSharding(mesh, PartitionSpec())  # where `mmjax.training.resume` puts what has no place yet
        state = jax.tree.map(lambda leaf: leaf if isinstance(leaf.sharding, NamedSharding)
                             else jax.device_put(leaf, everywhere), state)
    for expected, got in ((state, step.state), (frozen, step.frozen)):
        assert jax.tree.structure(expected) == jax.tree.structure(got)
        for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
    batch = jax.device_put(tiny.batch(rows=8, length=16), sharding.batch_sharding(mesh))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), batch) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), step.batch)
    held = {name: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
            for name, tree in (("frozen", frozen), ("trained", state.params), ("batch", batch))}
    assert {name: step.held[name] for name in held} == held


SEVEN = dataclasses.replace(
    config(MeshConfig(data=8)), weights=WeightsConfig(checkpoint="nowhere/minigpt4-7b"), remat=True)


def advised(settings, temporaries, limit):
    """What is advised for 7B on eight devices of so much memory, in GiB."""
    place = dataclasses.replace(hardware.find("local"), memory=int(limit * hardware.GIB))
    source, _ = plan.architecture(settings, None)
    mesh = sharding.make_mesh(settings.mesh)
    held = plan.AbstractStep.of(settings, source, mesh, 16).held
    memory = plan.Memory(**held, layout=0, temporaries=int(temporaries * hardware.GIB), program=0, limit=place.memory)
    made = plan.Plan("minigpt4", "x", "v5e:2x4", dict(mesh.shape), settings.data.batch_size, 16, {}, memory, None, None,
                     None, None, {}, None, [], [])
    assert not made.memory.fits
    return plan.advice(settings, source, place, made)


def test_advice_is_arithmetic():
    """14.6 GiB of weights are halved by sharing them in two or as int8; 4 are temporaries, 0.04 all else."""
    batch = dataclasses.replace(SEVEN.data, batch_size=64)
    lines = advised(dataclasses.replace(SEVEN, data=batch), temporaries=4, limit=15.75)
    assert [line.split(":")[0] for line in lines[:3]] == [
        "--data.batch-size 16", "--mesh.data 4 --mesh.fsdp 2", "--weights.frozen-dtype int8"]
    assert lines[1] == "--mesh.data 4 --mesh.fsdp 2: about 11.33 GiB of 15.75 GiB."
    assert lines[-1] == "These are estimates: plan again with them."


def test_advice_of_two_together():
    lines = advised(SEVEN, temporaries=0.2, limit=1.5)  # eight share 14.6 GiB: 1.8 each, as int8 0.9
    assert [line.split(":")[0] for line in lines[:-1]] == ["--mesh.data 1 --mesh.fsdp 8 --weights.frozen-dtype int8"]


def test_no_advice_but_a_larger_slice():
    (line,) = advised(SEVEN, temporaries=0.2, limit=0.5)
    assert "no mesh, batch size or int8 makes it fit" in line and "than v5e:2x4" in line


def test_remat_comes_first():
    lines = advised(dataclasses.replace(SEVEN, remat=False), temporaries=4, limit=15.75)
    assert lines[0].startswith("--remat gate or feed_forward or full: of the 4.00 GiB of temporaries")
    lines = advised(dataclasses.replace(SEVEN, remat="gate"), temporaries=4, limit=15.75)
    assert lines[0].startswith("--remat feed_forward or full: of the 4.00 GiB of temporaries")


@pytest.mark.parametrize(("changes", "message"), [
    ({"data": DataConfig(path="x", batch_size=12)}, "batch_size = 12 cannot be cut into 8 .*; 16 would work"),
    ({"mesh": MeshConfig(data=1, fsdp=1, tensor=8)}, "parameters do not fit the mesh"),
    ({"mesh": MeshConfig(data=3)}, "does not fill 8 device"),
])
def test_what_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        plan.plan(config(**({"mesh": MeshConfig(data=8)} | changes)), "local")
