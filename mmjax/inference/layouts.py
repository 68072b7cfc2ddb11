"""Memory layouts of parameters for decoding: transformations of the parameter tree that do not change the model."""

import functools
from typing import Any

import jax
import numpy as np

from mmjax import trees
from mmjax.models import int8
from mmjax.models.layers import transpose_weight


def unstack(params: dict[str, Any], matrices: int8.Matrices, transposed: bool = False) -> dict[str, Any]:
    """Returns parameters for a module with `scan_layers=False`: "llm/layers/attn/q/w" becomes ".../0/attn/q/w" etc.

    With a scan, XLA on a CPU copies each layer's weights out of the stack in every step, at a fifth of the speed of
    reading them in place. The unstacked arrays are views of the stacked ones (except a few small ones that are not
    aligned to 64 bytes, as XLA requires), so they take no memory as long as both live equally long.

    matrices:   of the language model, `cfg.llm.matrices`; only read if `transposed`
    transposed: for `transposed_weights=True`: the matrices of the layers and of the head are transposed copies, which
                take as much memory as the originals and are faster for several rows

    Raises ValueError for arrays that are not on one CPU device, of which no views can be taken.
    """
    llm = params["llm"]
    stacks = jax.tree.leaves(llm["layers"])
    if wrong := {str(stack.sharding) for stack in stacks if not on_one_cpu(stack)}:
        raise ValueError(f"Layers can be unstacked on one CPU device; these are on {', '.join(sorted(wrong))}. Decode "
                         "with them as they are, scanned.")
    layers = {str(layer): jax.tree.map(functools.partial(view, layer), llm["layers"])
              for layer in range(len(stacks[0]))}
    flat = trees.flatten(params | {"llm": llm | {"layers": layers}})
    if transposed:
        below = trees.prefixed("llm", matrices)
        flat |= {path: transpose_weight(leaf, len(int8.summed(path, len(leaf.shape), below)))
                 for path, leaf in flat.items() if path.startswith("llm/") and path.endswith("/w")}
    return trees.unflatten(flat)


def on_one_cpu(x: jax.Array) -> bool:
    """Returns whether an array is on exactly one device, a CPU."""
    return [device.platform for device in x.devices()] == ["cpu"]


def view(layer: int, stack: jax.Array) -> jax.Array:
    """Returns `stack[layer]`, as a view if possible."""
    return jax.device_put(np.asarray(stack)[layer], *stack.devices(), may_alias=True)
