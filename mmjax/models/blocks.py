"""The blocks of plain vision transformers, stacked (Dosovitskiy et al. 2020).

B batch   T tokens   D model   S queries, keys, values   N heads   H head
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.models.kernels import XLA, Kernels
from mmjax.models.layers import FeedForward, LayerNorm, Project, gelu


class SelfAttention(nn.Module):
    """Attention without a mask; one matrix, with biases, computes queries, keys and values. [B,T,D] -> [B,T,D]."""

    heads: int
    kernels: Kernels = XLA

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D, N = x.shape[-1], self.heads
        H = D // N
        q, k, v = jnp.moveaxis(Project((D, 3, N, H), use_bias=True, name="qkv")("BTD,DSNH->BTSNH", x), 2, 0)
        return Project((N, H, D), contracted=2, use_bias=True, name="o")("BTNH,NHD->BTD", self.kernels.attend(q, k, v))


class Block(nn.Module):
    """The pre-norm block of a plain ViT (Dosovitskiy et al. 2020), with the signature that `nn.scan` needs."""

    heads: int
    hidden: int
    eps: float
    activation: Callable[[jax.Array], jax.Array] = gelu
    kernels: Kernels = XLA

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        x = x + SelfAttention(self.heads, self.kernels, name="attn")(LayerNorm(self.eps, name="norm1")(x))
        x = x + FeedForward(self.hidden, self.activation, name="mlp")(LayerNorm(self.eps, name="norm2")(x))
        return x, None


BLOCKS_AXES = (  # of `Block`s stacked as "blocks"
    (r"blocks/norm[12]/(scale|bias)", ("layer", "embed")),
    (r"blocks/attn/qkv/w", ("layer", "embed", "qkv", "heads", "head")),
    (r"blocks/attn/qkv/b", ("layer", "qkv", "heads", "head")),
    (r"blocks/attn/o/w", ("layer", "heads", "head", "embed")),
    (r"blocks/mlp/fc1/w", ("layer", "embed", "ff")),
    (r"blocks/mlp/fc1/b", ("layer", "ff")),
    (r"blocks/mlp/fc2/w", ("layer", "ff", "embed")),
    (r"blocks/(attn/o|mlp/fc2)/b", ("layer", "embed")),
)


def blocks(depth: int, heads: int, hidden: int, eps: float,
           activation: Callable[[jax.Array], jax.Array] = gelu, kernels: Kernels = XLA) -> nn.Module:
    """Returns `depth` blocks as one module named "blocks", scanned over stacked weights: [B,T,D] -> ([B,T,D], None)."""
    stacked = nn.scan(Block, variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True}, length=depth)
    return stacked(heads, hidden, eps, activation, kernels, name="blocks")
