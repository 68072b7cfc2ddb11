"""EVA ViT-G, the image tower of BLIP-2 and MiniGPT-4 (minigpt4/models/eva_vit.py; Fang et al. 2022).

B batch   C colours   P, Q patch sides   T tokens   D model   N heads   H head   F feed-forward   L blocks

Pre-norm blocks, keys without bias, exact GELU, no final norm and no head: the output is the last block's tokens, the
class token included. Relative positions and layer scale of other EVA models are left out.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.models.kernels import XLA, Kernels, scan_rows
from mmjax.models.layers import (
    FeedForward,
    LayerNorm,
    Project,
    einsum,
    in_float32,
    repeat_rows,
    resize_positions,
    uniform_fan_in,
)


@dataclasses.dataclass(frozen=True)
class VitConfig:
    image_size: int = 224
    patch: int = 14
    dim: int = 1_408
    depth: int = 39
    heads: int = 16
    hidden: int = 6_144
    table: int = 16  # side of the stored position table; the forward pass resizes it to the grid of patches
    eps: float = 1e-6
    drop_path: float = 0.0  # rate of the last block, rising linearly from 0; used only while the tower is trained

    @property
    def grid(self) -> int:
        return self.image_size // self.patch


JOINED = 4  # neighbouring patches that MiniGPT-4 without a Q-Former joins into one token
EVA_VIT_G = VitConfig()
EVA_VIT_G_448 = VitConfig(image_size=448)
TINY = VitConfig(image_size=28, patch=7, dim=32, depth=2, heads=4, hidden=48, table=4)

AXES = (
    (r"patch/w", ("colour", "patch", "patch_", "embed")),
    (r"patch/b|cls", ("embed",)),
    (r"pos", ("position", "embed")),
    (r"blocks/norm[12]/(scale|bias)", ("layer", "embed")),
    (r"blocks/attn/qkv/w", ("layer", "embed", "qkv", "heads", "head")),
    (r"blocks/attn/qkv/[qv]_b", ("layer", "heads", "head")),
    (r"blocks/attn/o/w", ("layer", "heads", "head", "embed")),
    (r"blocks/mlp/fc1/w", ("layer", "embed", "ff")),
    (r"blocks/mlp/fc1/b", ("layer", "ff")),
    (r"blocks/mlp/fc2/w", ("layer", "ff", "embed")),
    (r"blocks/(attn/o|mlp/fc2)/b", ("layer", "embed")),
)


class FusedQKV(nn.Module):
    """Computes queries, keys and values with one matrix; keys have no bias. [B,T,D] -> [3,B,T,N,H]."""

    cfg: VitConfig

    @nn.compact
    def __call__(self, x):
        D, N = self.cfg.dim, self.cfg.heads
        w = self.param("w", uniform_fan_in(D), (D, 3, N, D // N))
        q_b = self.param("q_b", nn.initializers.zeros_init(), (N, D // N))
        v_b = self.param("v_b", nn.initializers.zeros_init(), (N, D // N))
        bias = jnp.stack([q_b, jnp.zeros_like(q_b), v_b])
        return in_float32(jnp.add, einsum("BTD,DSNH->SBTNH", x, w), bias[:, None, None])


class VitAttention(nn.Module):
    cfg: VitConfig
    kernels: Kernels = XLA

    @nn.compact
    def __call__(self, x):
        D, N = self.cfg.dim, self.cfg.heads
        out = self.kernels.attend(*FusedQKV(self.cfg, name="qkv")(x))
        return Project((N, D // N, D), contracted=2, use_bias=True, name="o")("BTNH,NHD->BTD", out)


class VitBlock(nn.Module):
    """A pre-norm block; each branch of a sample is dropped with probability `drop_rate` (stochastic depth)."""

    cfg: VitConfig
    kernels: Kernels = XLA

    @nn.compact
    def __call__(self, x, drop_rate):
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        c = self.cfg
        x = x + self.drop_path(VitAttention(c, self.kernels, name="attn")(LayerNorm(c.eps, name="norm1")(x)), drop_rate)
        x = x + self.drop_path(FeedForward(c.hidden, name="mlp")(LayerNorm(c.eps, name="norm2")(x)), drop_rate)
        return x, None

    def drop_path(self, branch, rate):
        if self.cfg.drop_path == 0 or not self.has_rng("vit"):
            return branch
        kept = jax.random.bernoulli(self.make_rng("vit"), 1 - rate, (branch.shape[0], 1, 1))
        return jnp.where(kept, branch / (1 - rate).astype(branch.dtype), 0)


class EvaVit(nn.Module):
    """float[B,3,image_size,image_size] -> [B, 1 + grid², D]."""

    cfg: VitConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    kernels: Kernels = XLA

    @nn.compact
    def __call__(self, images):
        c = self.cfg
        B = images.shape[0]
        if images.shape[1:] != (3, c.image_size, c.image_size):
            raise ValueError(f"This tower takes images of 3x{c.image_size}x{c.image_size}, got {images.shape[1:]}.")
        patches = images.astype(self.dtype).reshape(B, 3, c.grid, c.patch, c.grid, c.patch)
        patch = Project((3, c.patch, c.patch, c.dim), contracted=3, use_bias=True, name="patch")
        x = patch("BChPwQ,CPQD->BhwD", patches).reshape(B, c.grid * c.grid, c.dim)
        cls = self.param("cls", nn.initializers.normal(0.02), (c.dim,))
        x = jnp.concatenate([repeat_rows(cls[None], B, self.dtype), x], axis=1)
        pos = self.param("pos", nn.initializers.normal(0.02), (1 + c.table**2, c.dim))
        x = in_float32(jnp.add, x, resize_positions(pos, c.grid))
        blocks = nn.scan(
            nn.remat(VitBlock, prevent_cse=False) if self.remat else VitBlock,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "vit": True},
            length=c.depth,
        )
        layers = blocks(c, self.kernels, name="blocks")
        return scan_rows(layers, x, jnp.linspace(0, c.drop_path, c.depth), heads=c.heads, kernels=self.kernels)
