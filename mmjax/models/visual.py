"""The visual query network of LLaMA-Adapter v2: learned queries read an image's features and become prompts
(llama_adapter_v2_multimodal7b/llama/llama_adapter.py: forward_visual; Gao et al. 2023).

B batch   S feature tokens   E their width   P queries   T = P + S tokens   D model   O language model

    tokens = [queries; norm(proj(features))]        prompts = norm(out(blocks(tokens)[:P]))
"""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from mmjax.models.blocks import BLOCKS_AXES, blocks
from mmjax.models.kernels import XLA, Kernels
from mmjax.models.layers import LayerNorm, Project, repeat_rows

EPS = 1e-5  # torch's default, which the original also uses in timm's blocks


@dataclasses.dataclass(frozen=True)
class VisualConfig:
    dim: int = 768
    depth: int = 8
    heads: int = 16
    hidden: int = 3_072


VISUAL_7B = VisualConfig()
TINY = VisualConfig(dim=16, depth=2, heads=2, hidden=24)

AXES = (
    (r"proj/w", ("image", "embed")),
    (r"query", ("prompt", "embed")),
    (r"proj/b|(proj|out)_norm/(scale|bias)|out/b", ("embed",)),
    *BLOCKS_AXES,
    (r"out/w", ("visual", "embed")),
)


class VisualQuery(nn.Module):
    """The features of an image [B,S,E] -> prompts [B,P,O]."""

    cfg: VisualConfig
    queries: int
    out: int
    dtype: jnp.dtype = jnp.float32
    kernels: Kernels = XLA

    @nn.compact
    def __call__(self, features):
        c = self.cfg
        B, _, E = features.shape
        x = Project((E, c.dim), use_bias=True, name="proj")("BSE,ED->BSD", features.astype(self.dtype))
        x = LayerNorm(EPS, name="proj_norm")(x)
        query = self.param("query", nn.initializers.normal(1.0), (self.queries, c.dim))
        x = jnp.concatenate([repeat_rows(query, B, x.dtype), x], axis=1)
        x, _ = blocks(c.depth, c.heads, c.hidden, EPS, kernels=self.kernels)(x)
        x = Project((c.dim, self.out), use_bias=True, name="out")("BPD,DO->BPO", x[:, :self.queries])
        return LayerNorm(EPS, name="out_norm")(x)
