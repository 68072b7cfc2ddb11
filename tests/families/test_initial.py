"""Parameters as they start: what they are does not depend on how the model computes, and they cost one look at it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import families, trees
from mmjax.families import llama
from tests import tiny

CFG = llama.PRESETS["tiny"]


def test_they_are_the_model_s_own():
    module = llama.TextLlama(CFG, jnp.bfloat16, remat=True)
    own = tiny.jit(lambda key: module.init(key, llama.example(CFG)))(jax.random.key(3))["params"]
    made = tiny.jit(families.initial("llama", CFG))(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, made, own)
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float32")}


def test_their_shapes_and_values_cost_one_look_at_the_model():
    looked = []
    family = dataclasses.replace(llama.FAMILY, example=lambda cfg: looked.append(cfg) or llama.example(cfg))
    shapes = families.shapes(family, CFG)
    made = tiny.jit(lambda: trees.flatten(families.initial(family, CFG)(jax.random.key(0))))()
    assert looked == [CFG]
    assert {path: leaf.shape for path, leaf in made.items()} == {path: leaf.shape for path, leaf in shapes.items()}
