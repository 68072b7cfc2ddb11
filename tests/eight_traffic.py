"""What crosses devices in a training step; needs eight (virtual) devices, run by test_eight_devices.py.

With TPU in the environment the same is asserted of the program for a slice of eight chips (libtpu compiles it here).
"""

import collections
import math
import os
import re

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
pytestmark = pytest.mark.extended

from mmjax import sharding  # noqa: E402
from mmjax.config import DataConfig, MeshConfig, OptimConfig, RunConfig, TextConfig, WeightsConfig  # noqa: E402
from mmjax.cost import hardware, hlo, plan  # noqa: E402
from mmjax.families import minigpt4, shapes  # noqa: E402
from tests import tiny  # noqa: E402

TPU = os.environ.get("TPU")
WHERE, DTYPE = (TPU, "bfloat16") if TPU else ("local", "float32")
CFG = tiny.MINIGPT4
TRAINED = {tuple(sorted((CFG.soft_width, CFG.llm.dim))), (CFG.llm.dim,)}  # in whichever order XLA lays them out


def program(mesh, remat, frozen_dtype=None, trained=None):
    """The text of the step that a run would compile, and the mesh with its devices."""
    config = RunConfig(
        out="runs/x", mesh=mesh, remat=remat, trained=trained, optim=OptimConfig(),
        text=TextConfig(max_txt_len=6, max_context_len=9),
        weights=WeightsConfig(checkpoint="nowhere/tiny", family="minigpt4", dtype=DTYPE, frozen_dtype=frozen_dtype),
        data=DataConfig(path="data/x", prompts=("<Img><ImageHere></Img> Hi",), batch_size=8, length_multiple=8))
    source, _ = plan.architecture(config, None)
    devices = sharding.make_mesh(mesh, hardware.find(WHERE).devices)
    compiled, _ = plan._compile(plan.AbstractStep.of(config, source, devices, 16))
    return compiled.as_text(), devices


def traffic(mesh, remat=False, frozen_dtype=None):
    return hlo.collectives(*program(mesh, remat, frozen_dtype))


def squeezed(shape):
    return tuple(size for size in shape if size != 1)


def stacked():
    """{path: shape} of the matrices of all layers, the layers first."""
    return {path: leaf.shape for path, leaf in shapes("minigpt4", CFG).items()
            if re.match("(llm/layers|vit/blocks)/.*/w", path)}


def test_data_parallel_devices_exchange_gradients_of_what_is_trained_and_numbers():
    found = traffic(MeshConfig(data=8))
    assert {one.kind for one in found} <= {"all-reduce", "reduce-scatter", "all-gather"}  # the halves of an all-reduce
    assert {math.prod(one.shape) for one in found} <= {1, *map(math.prod, TRAINED)}
    assert any(tuple(sorted(squeezed(one.shape))) in TRAINED and len(squeezed(one.shape)) == 2 for one in found)


@pytest.mark.parametrize("remat", [False, True])
def test_sharded_devices_gather_each_frozen_layer_once_a_pass(remat):
    found = traffic(MeshConfig(data=1, fsdp=8), remat)
    for one in found:
        if one.kind == "all-reduce":  # of matrices, only gradients; vectors may be gathered as sums
            assert len(squeezed(one.shape)) < 2 or tuple(sorted(squeezed(one.shape))) in TRAINED, one
        if one.kind == "all-to-all":  # from a cut vocabulary's width to the rows
            assert "embed" in one.scope, one
    gathered = collections.Counter()
    for one in found:
        if one.kind == "all-gather" and len(squeezed(one.shape)) >= 2 and one.times > 1:
            gathered[math.prod(one.shape)] += one.times
            assert one.times == CFG.llm.depth == CFG.vit.depth
            if TPU:
                assert one.dtype == "bf16", one
    assert passed(2) <= gathered <= passed(3 if remat else 2)  # for what is computed again a matrix may be gathered too


def passed(passes):
    """{size: how many matrices of it there are in so many passes}; of the image tower there is one."""
    count = collections.Counter()
    for path, shape in stacked().items():
        count[math.prod(shape[1:])] += (passes if path.startswith("llm/") else 1) * shape[0]
    return count


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=1, fsdp=8), MeshConfig(2, 2, 2)])
def test_no_frozen_gradient_is_made(mesh):
    """The backward pass of the layer scan would write it, a layer at a time, into an array of all layers."""
    text, devices = program(mesh, remat=True)
    places = sharding.shardings(shapes("minigpt4", CFG), minigpt4.FAMILY.all_axes(CFG), devices)
    frozen = {size for path, shape in stacked().items()
              for size in (squeezed(shape), squeezed(places[path].shard_shape(shape)))}
    assert frozen and not written(text) & frozen
    q = "llm/layers/attn/q/w"
    trained, _ = program(mesh, remat=True, trained=(q,))
    shape = stacked()[q]
    assert written(trained) & {squeezed(shape), squeezed(places[q].shard_shape(shape))}


def written(text):
    """Shapes of the arrays that are written part by part."""
    return {squeezed(tuple(map(int, found.split(","))))
            for found in re.findall(r"= \w+\[([\d,]+)\]\S* dynamic-update-slice\(", text)}


@pytest.mark.skipif(not TPU, reason="on a CPU XLA makes them float32 first")
def test_int8_weights_cross_as_int8():
    found = [one for one in traffic(MeshConfig(data=1, fsdp=8), frozen_dtype="int8")
             if one.kind == "all-gather" and one.times > 1 and len(squeezed(one.shape)) > 1]
    assert found and {one.dtype for one in found} == {"s8"}
