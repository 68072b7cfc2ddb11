"""CLIP's image tower, a ViT (clip/model.py: VisionTransformer; Radford et al. 2021).

B batch   C colours   P, Q patch sides   T tokens   D model   E the space shared with text

The final norm and the projection act on every token, which is what LLaMA-Adapter v2 reads; CLIP itself applies them
to the class token only. The text tower is left out.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.models.blocks import BLOCKS_AXES, blocks
from mmjax.models.kernels import XLA, Kernels, scan_rows
from mmjax.models.layers import LayerNorm, Project, in_float32, repeat_rows

EPS = 1e-5  # torch's default


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    image_size: int = 224
    patch: int = 14
    dim: int = 1_024
    depth: int = 24
    heads: int = 16
    hidden: int = 4_096
    out: int = 768

    @property
    def grid(self) -> int:
        return self.image_size // self.patch


CLIP_VIT_L14 = ClipConfig()
TINY = ClipConfig(image_size=28, patch=7, dim=24, depth=2, heads=3, hidden=40, out=20)

AXES = (
    (r"patch/w", ("colour", "patch", "patch_", "embed")),
    (r"pos", ("position", "embed")),
    (r"cls|(pre|post)_norm/(scale|bias)", ("embed",)),
    *BLOCKS_AXES,
    (r"out/w", ("embed", "image")),
)


def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's approximation of the GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


class Clip(nn.Module):
    """float[B,3,image_size,image_size] -> [B, 1 + grid², E], the class token first."""

    cfg: ClipConfig
    dtype: jnp.dtype = jnp.float32
    kernels: Kernels = XLA

    @nn.compact
    def __call__(self, images):
        c = self.cfg
        B = len(images)
        if images.shape[1:] != (3, c.image_size, c.image_size):
            raise ValueError(f"This tower takes images of 3x{c.image_size}x{c.image_size}, got {images.shape[1:]}.")
        patches = images.astype(self.dtype).reshape(B, 3, c.grid, c.patch, c.grid, c.patch)
        patch = Project((3, c.patch, c.patch, c.dim), contracted=3, name="patch")
        x = patch("BChPwQ,CPQD->BhwD", patches).reshape(B, c.grid**2, c.dim)
        cls = self.param("cls", nn.initializers.normal(0.02), (c.dim,))
        x = jnp.concatenate([repeat_rows(cls[None], B, self.dtype), x], axis=1)
        x = in_float32(jnp.add, x, self.param("pos", nn.initializers.normal(0.02), (1 + c.grid**2, c.dim)))
        x = LayerNorm(EPS, name="pre_norm")(x)
        layers = blocks(c.depth, c.heads, c.hidden, EPS, quick_gelu, self.kernels)
        x = scan_rows(layers, x, heads=c.heads, kernels=self.kernels)
        x = LayerNorm(EPS, name="post_norm")(x)
        return Project((c.dim, c.out), name="out")("BTD,DE->BTE", x)
