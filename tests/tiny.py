"""What tests of models and of training share: tiny random weights, batches that fit them, and quick compiling."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import trees
from mmjax.batch import Batch
from mmjax.families import minigpt4, shapes

MINIGPT4 = minigpt4.PRESETS["tiny"]
V, Q = MINIGPT4.llm.vocab, MINIGPT4.image_tokens


@functools.cache
def quick_options() -> dict[str, Any]:
    """Compiler options with which these small programs compile in a fifth of the time and run a little slower."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True,
               "xla_cpu_use_fusion_emitters": False}
    return {name: value for name, value in options.items() if _is_known(name, value)}


def _is_known(name: str, value: Any) -> bool:
    """Whether the installed XLA has this option."""
    try:
        jax.jit(lambda x: x + 1, compiler_options={name: value})(0)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def jit(function: Callable) -> Callable:
    return jax.jit(function, compiler_options=quick_options())


def compiled(function: Any, *args: Any) -> Any:
    """A jitted function compiled quickly for these arguments."""
    return function.lower(*args).compile(compiler_options=quick_options())


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of a `jax.extend.core.Jaxpr` and of all that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            called = value if hasattr(value, "eqns") else getattr(value, "jaxpr", None)
            if hasattr(called, "eqns"):
                yield from equations(called)


def copied(tree: Any) -> Any:
    """Arrays of their own, for a step that reuses the memory of its state. Through numpy, nothing is compiled."""
    return jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)), tree)


def drawn(path: str, shape: Any, random: np.random.Generator) -> jax.Array:
    mean, spread = (1.0, 0.1) if path.endswith("scale") else (0.0, 0.2)
    return jnp.asarray(random.normal(mean, spread, shape.shape), jnp.float32)


def params(family: str, cfg: Any, seed: int = 0) -> dict[str, Any]:
    """Random weights, none of them 0 or 1. numpy draws them: compiling jax's generator takes longer than a test."""
    random = np.random.default_rng(seed)
    return trees.unflatten({path: drawn(path, shape, random) for path, shape in shapes(family, cfg).items()})


def module_params(module: Any, *inputs: Any, seed: int = 0) -> dict[str, Any]:
    """The same for any linen module."""
    random = np.random.default_rng(seed)
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return trees.map_with_path(lambda path, shape: drawn(path, shape, random), variables.get("params", {}))


def batch(rows: int = 4, length: int = 12, image_count: int = 1, seed: int = 0) -> Batch:
    """`[word][soft tokens][words][padding]`, rows of different lengths; targets from place 2 + Q·image_count on."""
    random = np.random.default_rng(seed)
    size, soft = MINIGPT4.image_size, Q * image_count
    places = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    valid = places < length - np.arange(rows)[:, None] % 3
    images = random.integers(0, 256, (rows, image_count, size, size, 3), np.uint8) if image_count else None
    return Batch(
        tokens=random.integers(1, V, (rows, length), np.int32),
        soft_index=np.where((places >= 1) & (places <= soft), places - 1, -1).astype(np.int32),
        valid=valid,
        loss_mask=valid & (places >= 2 + soft),
        positions=places,
        padded_length=np.full(rows, length, np.int32),
        images=images,
    )


def share_images(batch: Batch, lists: int) -> Batch:
    """The same batch with so many lists of images, each of consecutive rows, as packed rows have."""
    rows, count = batch.images.shape[:2]
    first = np.arange(rows)[:, None] % (rows // lists) * count * Q
    return dataclasses.replace(
        batch, images=batch.images.reshape(lists, -1, *batch.images.shape[2:]),
        soft_index=np.where(batch.soft_index < 0, -1, batch.soft_index + first).astype(np.int32))
