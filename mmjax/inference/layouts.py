"""Memory layouts of parameters for decoding: transformations of the tree that never change what a model is."""

import functools
from typing import Any

import jax
import numpy as np

from mmjax import trees
from mmjax.models import int8
from mmjax.models.layers import transpose_weight


def unstack(params: dict[str, Any], transposed: bool = False) -> dict[str, Any]:
    """A family's parameters for its module with `scan_layers=False`: "llm/layers/attn/q/w" as ".../0/attn/q/w" and so on.

    XLA on a CPU copies the weights of each layer out of the stack, in every step, at a fifth of the speed of reading
    them where they are. A layer's arrays are views into the stacked ones (save a few small ones that begin off the 64
    bytes that XLA wants), so this costs no memory as long as both are kept or dropped together.

    transposed: for `transposed_weights=True`: the matrices of the layers and of the head are transposed copies, which
                take as much memory as the originals and are faster for several rows

    Raises ValueError for arrays that are not on one CPU device, which nothing can look into.
    """
    language = params["llm"]
    stacks = jax.tree.leaves(language["layers"])
    if wrong := {str(stack.sharding) for stack in stacks if not on_one_cpu(stack)}:
        raise ValueError(f"Layers can be unstacked on one CPU device; these are on {', '.join(sorted(wrong))}. Decode "
                         "with them as they are, scanned.")
    layers = {str(layer): jax.tree.map(functools.partial(view, layer), language["layers"])
              for layer in range(len(stacks[0]))}
    flat = trees.flatten(params | {"llm": language | {"layers": layers}})
    if transposed:
        flat |= {path: transpose_weight(leaf, len(int8.summed(path, len(leaf.shape)))) for path, leaf in flat.items()
                 if path.startswith("llm/") and path.endswith("/w")}
    return trees.unflatten(flat)


def on_one_cpu(x: jax.Array) -> bool:
    return [device.platform for device in x.devices()] == ["cpu"]


def view(layer: int, stack: jax.Array) -> jax.Array:
    """`stack[layer]`, in the same memory where it may be."""
    return jax.device_put(np.asarray(stack)[layer], *stack.devices(), may_alias=True)
