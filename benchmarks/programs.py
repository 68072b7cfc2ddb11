"""The programs that `benchmarks.compiled` judges, at released width: encoders, a part of the language model, and the
training steps of the shipped configs.

Their arguments are shapes with shardings, from the builders of training and `mmjax plan` (`ModelSpec`, `AbstractStep`),
so kernels, memory layouts and dtypes are those of a run on the same devices. Nothing is allocated.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmjax import config as configs
from mmjax import sharding, trees
from mmjax.checkpoints.converted import ConvertedCheckpoint
from mmjax.checkpoints.restore import ModelSpec
from mmjax.config import DataConfig, MeshConfig, RunConfig, WeightsConfig
from mmjax.cost import flops, plan
from mmjax.families import FAMILIES
from mmjax.training import run

ROOT = Path(__file__).parents[1]
DTYPE = "bfloat16"
IMAGES, CLIPS = 16, 3  # a batch of the encoders; a sound file has three clips
# In its docstring each config names the slice that it is planned for, and the mesh.
PLANNED = re.compile(r"--topology \w+:([\dx]+) --mesh\.fsdp (\d+)")


@dataclasses.dataclass(frozen=True)
class Needed:
    """What a program needs, of all devices together.

    operations: of its matrix products
    backward:   parts of the model that a gradient passes
    """

    operations: int
    backward: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Built:
    """A jitted function and its arguments on a mesh, as shapes.

    count:   returns what it needs
    weights: the parameters by part
    others:  arrays that a device has to read or write once
    """

    call: Any
    arguments: tuple[Any, ...]
    mesh: Mesh
    count: Callable[[], Needed]
    weights: Mapping[str, Any]
    others: Any

    def lower(self) -> Any:
        """Returns the `jax.stages.Lowered` of the program."""
        with sharding.use_mesh(self.mesh):
            return self.call.lower(*self.arguments)

    def floor_bytes(self, needed: Needed) -> int:
        """Returns the bytes that a device cannot avoid to move: its weights, as they are once fsdp has gathered them,
        for each pass that reads them, and `others`."""
        return plan.nbytes(self.others) + sum(_gathered_bytes(tree) * (2 if part in needed.backward else 1)
                                              for part, tree in self.weights.items())


@dataclasses.dataclass(frozen=True)
class Program:
    """How a program is built.

    title:     what it does
    build:     returns the program for a mesh
    mesh:      of the devices
    devices:   number of devices
    per_token: the program is a loop over tokens; its figures are those of one iteration
    """

    title: str
    build: Callable[[Mesh], Built]
    mesh: MeshConfig = MeshConfig()
    devices: int = 1
    per_token: bool = False


def _gathered_bytes(tree: Any) -> int:
    """Returns the bytes of a device's weights once they are gathered along fsdp: only the tensor axis shards them."""

    def size(leaf: Any) -> int:
        shards = math.prod(leaf.sharding.mesh.shape[name] for name in leaf.sharding.spec if name == "tensor")
        return math.prod(leaf.shape) * leaf.dtype.itemsize // shards

    return sum(map(size, jax.tree.leaves(tree)))


# ---- encoders ----


def _spec(family: str, preset: str, mesh: Mesh) -> ModelSpec:
    found = FAMILIES[family]
    return ModelSpec(ConvertedCheckpoint(Path(preset), found, found.presets[preset], found.prompt.text, {}, ()), mesh,
                     DTYPE)


def _forward(spec: ModelSpec, parts: str, method: Callable[..., Any], inputs: Any) -> Built:
    """The forward pass of the parts of a model whose paths the pattern matches; `method` is called as `(module,
    inputs)`."""
    params = trees.unflatten(spec.param_specs(lambda path: trees.matches(path, [parts])))
    module = spec.module.clone(kernels=spec.module.kernels.for_encoding())
    call = jax.jit(lambda params, inputs: module.apply({"params": params}, inputs, method=method))

    def count() -> Needed:
        traced = jax.make_jaxpr(call)(params, inputs)
        return Needed(sum(operations for _, operations in flops.products(traced.jaxpr)))

    return Built(call, (params, inputs), spec.mesh, count, params, inputs)


def _rows(mesh: Mesh, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(DTYPE), sharding=sharding.batch_sharding(mesh))


def vit(mesh: Mesh) -> Built:
    spec = _spec("minigpt4", "minigpt4-7b", mesh)
    side = spec.source.config.image_size
    return _forward(spec, "vit/.*", lambda module, images: module.vit(images), _rows(mesh, IMAGES, 3, side, side))


def imagebind(mesh: Mesh) -> Built:
    spec = _spec("imagebind_llm", "imagebind-llm-7b", mesh)
    towers = spec.source.config.imagebind.towers
    inputs = {"vision": _rows(mesh, IMAGES, *towers["vision"].input_shape),
              "audio": _rows(mesh, IMAGES, CLIPS, *towers["audio"].input_shape)}
    return _forward(spec, "query|imagebind/(vision|audio)/.*", lambda module, inputs: module.imagebind(inputs), inputs)


# ---- training ----


def _step(config: RunConfig, depth: int | None, mesh: Mesh) -> Built:
    """The training step of a run, with the number of rows rounded up so that the mesh divides it.

    depth: number of the language model's layers; None: all
    """
    shards = sharding.num_shards(mesh, "batch")
    rows = math.ceil(config.data.batch_size / shards) * shards
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows))
    run.check(config)
    source, _ = plan.architecture(config, None)
    if depth is not None:
        llm = dataclasses.replace(source.config.llm, depth=depth)
        source = dataclasses.replace(source, config=dataclasses.replace(source.config, llm=llm))
    step = plan.AbstractStep.of(config, source, mesh, plan.row_length(config, source)[0])

    def count() -> Needed:
        found = flops.train_step(step.module, step.state.params, step.frozen, step.batch)
        return Needed(found.model, frozenset(part for part, operations in found.backward.items() if operations))

    weights = trees.merge(step.state.params, step.frozen)
    if not source.config.llm.tied:  # a step reads only the rows of its tokens
        weights = weights | {"llm": {name: leaf for name, leaf in weights["llm"].items() if name != "embedding"}}
    # The update reads and writes the optimizer's state, and writes the parameters.
    optimizer = dataclasses.replace(step.state, params=None)
    others = (step.batch, step.state.params, optimizer, optimizer)
    return Built(step.call, (step.state, step.frozen, step.batch), mesh, count, weights, others)


# The language model alone: the images' features are read, and only the projector below it is trained.
LLM_TRAIN = RunConfig(
    out="runs/compiled", weights=WeightsConfig(checkpoint="checkpoints/minigpt4-7b", family="minigpt4", dtype=DTYPE),
    data=DataConfig(path="data", batch_size=2, pack_length=1_024, pack_images=4, features="features"))
DEPTH = 8


def _steps() -> Iterator[tuple[str, Program]]:
    """The training step of every shipped config, on the slice that its docstring plans for."""
    for path in sorted((ROOT / "configs").glob("*.py")):
        if not (planned := PLANNED.search(path.read_text(encoding="utf-8"))):
            continue  # an embedded default, for a CPU
        devices, fsdp = math.prod(map(int, planned[1].split("x"))), int(planned[2])
        config = configs.load(str(path))
        title = f"training step of configs/{path.name}"
        yield f"step:{path.stem}", Program(title, functools.partial(_step, config, None),
                                           MeshConfig(fsdp=fsdp), devices)
        if path.stem == "minigpt4_stage2":
            int8 = dataclasses.replace(config.weights, frozen_dtype="int8")
            yield f"step:{path.stem}:int8", Program(f"{title}, int8 weights on one chip", functools.partial(
                _step, dataclasses.replace(config, weights=int8), None))


PROGRAMS: Mapping[str, Program] = {
    "vit": Program(f"ViT-G, forward, {IMAGES} images", vit),
    "imagebind": Program(f"ImageBind's towers, forward, {IMAGES} images and {IMAGES} sounds of {CLIPS} clips",
                         imagebind),
    "llm_train": Program(f"LLaMA 7B, {DEPTH} layers, packed 2 x 1,024: forward, backward, loss",
                         functools.partial(_step, LLM_TRAIN, DEPTH)),
    **dict(_steps()),
}
