"""The bind network of ImageBind-LLM, and the mixing of senses before it (imagebind_LLM/llama/llama_adapter.py;
Han et al. 2023).

B rows   E ImageBind's space   D language model   F feed-forward   K neighbours   V stored vectors

    mixed = Σ weight · unit(feature)         T_I = bind(mixed [B,1,E])  [B,1,D]
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.models.layers import LayerNorm, Project, RMSNorm, unit


@dataclasses.dataclass(frozen=True)
class BindConfig:
    inputs: int = 1_024
    dim: int = 4_096
    hidden: int = 16_384
    depth: int = 3
    eps: float = 1e-6
    legacy: bool = False  # the form of older files: LayerNorm with its own eps, and biases in the blocks


BIND_7B = BindConfig()
TINY = BindConfig(inputs=20, dim=16, hidden=24)
LEGACY_EPS = 1e-5

AXES = (
    (r"proj/w", ("sense", "embed")),
    (r"proj/b|block_\d+/norm/(scale|bias)|block_\d+/down/b", ("embed",)),
    (r"block_\d+/(gate|up)/w", ("embed", "ff")),
    (r"block_\d+/(gate|up)/b", ("ff",)),
    (r"block_\d+/down/w", ("ff", "embed")),
)


class BindBlock(nn.Module):
    """x + down(silu(gate(n)) · up(n)), n = norm(x)."""

    cfg: BindConfig

    @nn.compact
    def __call__(self, x):
        c = self.cfg
        norm = LayerNorm(LEGACY_EPS, name="norm") if c.legacy else RMSNorm(c.eps, name="norm")
        gate, up = (Project((c.dim, c.hidden), use_bias=c.legacy, name=name) for name in ("gate", "up"))
        down = Project((c.hidden, c.dim), use_bias=c.legacy, name="down")
        n = norm(x)
        return x + down("BTF,FD->BTD", jax.nn.silu(gate("BTD,DF->BTF", n)) * up("BTD,DF->BTF", n))


class Bind(nn.Module):
    """The bind network: [B,T,E] -> [B,T,D]. Blocks are numbered from 1, as in the files."""

    cfg: BindConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        c = self.cfg
        x = Project((c.inputs, c.dim), use_bias=True, name="proj")("BTE,ED->BTD", x.astype(self.dtype))
        for i in range(1, c.depth + 1):
            x = BindBlock(c, name=f"block_{i}")(x)
        return x


def mix(features: Sequence[jax.Array], weights: Sequence[float]) -> jax.Array:
    """Returns the weighted mean of the features scaled to length 1, float32[B,E]; it is not normalised again.

    The original adds 1e-6 to the sum of the weights, so a single feature is scaled by 0.999999.
    """
    total = sum(weights) + 1e-6
    return sum(weight / total * unit(x.astype(jnp.float32)) for x, weight in zip(features, weights, strict=True))


def nearest(query: jax.Array, vectors: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the `count` nearest vectors by inner product: (products float32[B,K], indices int[B,K]), best first.

    query: [B,E]   vectors: [V,E]
    """
    return jax.lax.top_k(jnp.einsum("BE,VE->BV", query, vectors, precision="highest"), count)


def recall(query: jax.Array, vectors: jax.Array, count: int = 10, sharpness: float = 20.0,
           weight: float = 0.5) -> jax.Array:
    """Moves each row's mix towards its nearest image features: [B,E] -> [B,E], of length 1.

    vectors:   [V,E], of length 1
    sharpness: the neighbours are weighted by softmax(product · sharpness)
    weight:    of the neighbours' mean; the mix itself has weight 1 - `weight`
    """
    products, indices = nearest(query, vectors, count)
    shares = jax.nn.softmax(products * sharpness, axis=-1)
    neighbours = unit(jnp.einsum("BK,BKE->BE", shares, vectors[indices], precision="highest"))
    return unit((1 - weight) * query + weight * neighbours)
