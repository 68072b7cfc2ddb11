"""Q-Former, the query path of BLIP-2's BERT (minigpt4/models/Qformer.py; Li et al. 2023).

B batch   Q queries   S image tokens   D model   E image width   N heads   H head   F feed-forward

Post-norm layers: queries attend to each other, in every `cross_every`-th layer also to the image tokens, then pass
the feed-forward of the query branch. The text branch and its embeddings are left out: MiniGPT-4 never uses them.
The layers have different parameters, so they are not scanned; there are few and they are small.
"""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from mmjax.models.kernels import XLA, Kernels
from mmjax.models.layers import FeedForward, LayerNorm, Project, repeat_rows


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    queries: int = 32
    dim: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3_072
    cross_every: int = 2
    eps: float = 1e-12
    dropout: float = 0.1  # used only while the Q-Former is trained


QFORMER_BASE = QFormerConfig()
TINY = QFormerConfig(queries=4, dim=24, depth=2, heads=4, hidden=40)

AXES = (
    (r"query_tokens", ("position", "embed")),
    (r"norm/(scale|bias)", ("embed",)),
    (r"layer_\d+/(attn|cross|mlp)_norm/(scale|bias)", ("embed",)),
    (r"layer_\d+/attn/[qkv]/w|layer_\d+/cross/q/w", ("embed", "qformer_heads", "head")),
    (r"layer_\d+/cross/[kv]/w", ("image", "qformer_heads", "head")),
    (r"layer_\d+/(attn|cross)/[qkv]/b", ("qformer_heads", "head")),
    (r"layer_\d+/(attn|cross)/o/w", ("qformer_heads", "head", "embed")),
    (r"layer_\d+/mlp/fc1/w", ("embed", "ff")),
    (r"layer_\d+/mlp/fc1/b", ("ff",)),
    (r"layer_\d+/mlp/fc2/w", ("ff", "embed")),
    (r"layer_\d+/((attn|cross)/o|mlp/fc2)/b", ("embed",)),
)


class Dropout(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x):
        active = self.has_rng("qformer")
        return nn.Dropout(self.rate, rng_collection="qformer")(x, deterministic=not active)


class QFormerAttention(nn.Module):
    """Attention from queries x [B,Q,D] to `source` [B,S,E] (the queries themselves, or the image tokens)."""

    cfg: QFormerConfig
    kernels: Kernels = XLA

    @nn.compact
    def __call__(self, x, source):
        D, N = self.cfg.dim, self.cfg.heads
        E, H = source.shape[-1], D // N
        q = Project((D, N, H), use_bias=True, name="q")("BQD,DNH->BQNH", x)
        k = Project((E, N, H), use_bias=True, name="k")("BSE,ENH->BSNH", source)
        v = Project((E, N, H), use_bias=True, name="v")("BSE,ENH->BSNH", source)
        out = self.kernels.attend(q, k, v, drop=Dropout(self.cfg.dropout))
        return Project((N, H, D), contracted=2, use_bias=True, name="o")("BQNH,NHD->BQD", out)


class Layer(nn.Module):
    cfg: QFormerConfig
    crosses: bool
    kernels: Kernels = XLA

    @nn.compact
    def __call__(self, x, image):
        def add(branch, name):
            return LayerNorm(self.cfg.eps, name=name)(x + Dropout(self.cfg.dropout)(branch))

        x = nn.with_logical_constraint(x, ("batch", "query", "embed"))
        x = add(QFormerAttention(self.cfg, self.kernels, name="attn")(x, x), "attn_norm")
        if self.crosses:
            x = add(QFormerAttention(self.cfg, self.kernels, name="cross")(x, image), "cross_norm")
        return add(FeedForward(self.cfg.hidden, name="mlp")(x), "mlp_norm")


class QFormer(nn.Module):
    """Image tokens [B,S,E], including the class token -> [B,Q,D]."""

    cfg: QFormerConfig
    dtype: jnp.dtype = jnp.float32
    kernels: Kernels = XLA

    @nn.compact
    def __call__(self, image):
        c = self.cfg
        queries = self.param("query_tokens", nn.initializers.normal(0.02), (c.queries, c.dim))
        x = repeat_rows(queries, image.shape[0], self.dtype)
        x = Dropout(c.dropout)(LayerNorm(c.eps, name="norm")(x))
        for i in range(c.depth):
            x = Layer(c, i % c.cross_every == 0, self.kernels, name=f"layer_{i}")(x, image)
        return x
