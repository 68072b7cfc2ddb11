"""LLaMA decoder (Touvron et al. 2023), with grouped key heads, tied or untied head, and LoRA on q and v.

B batch   T query tokens   S key tokens   L layers   D model   F feed-forward
N query heads   K key and value heads   H head   V vocabulary   R LoRA rank

The layers are one module scanned over stacked weights. The key-value cache is an argument and a result.
Mirrors transformers' modeling_llama.py (4.30) and, for LoRA, peft 0.2.0.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.models.layers import Project, RMSNorm, attend, einsum, uniform_fan_in


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    vocab: int = 32_000
    depth: int = 32
    dim: int = 4_096
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    hidden: int = 11_008
    eps: float = 1e-6
    rope_theta: float = 10_000.0
    max_positions: int = 2_048
    tied: bool = False  # the output head is the embedding table
    lora_rank: int = 0  # 0: no LoRA
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05


LLAMA_7B = VICUNA_7B = LlamaConfig()
LLAMA_13B = VICUNA_13B = LlamaConfig(depth=40, dim=5_120, heads=40, kv_heads=40, hidden=13_824)
LLAMA2_7B_CHAT = LlamaConfig(eps=1e-5, max_positions=4_096)
TINY = LlamaConfig(vocab=96, depth=2, dim=32, heads=4, kv_heads=2, head_dim=8, hidden=48)  # runs on any laptop

AXES = (
    (r"embedding", ("vocab", "embed")),
    (r"head/w", ("embed", "vocab")),
    (r"norm/scale", ("embed",)),
    (r"layers/(attn|mlp)_norm/scale", ("layer", "embed")),
    (r"layers/attn/q/w", ("layer", "embed", "heads", "head")),
    (r"layers/attn/[kv]/w", ("layer", "embed", "kv_heads", "head")),
    (r"layers/attn/o/w", ("layer", "heads", "head", "embed")),
    (r"layers/attn/[qv]/lora_a", ("layer", "embed", "rank")),
    (r"layers/attn/q/lora_b", ("layer", "rank", "heads", "head")),
    (r"layers/attn/v/lora_b", ("layer", "rank", "kv_heads", "head")),
    (r"layers/mlp/(gate|up)/w", ("layer", "embed", "ff")),
    (r"layers/mlp/down/w", ("layer", "ff", "embed")),
)


def rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotates element j against element j + H/2 by position · theta^(-2j/H). x [B,T,N,H], positions int[B,T]."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class LoraProject(Project):
    """W x + (alpha / R) · B (A x), unmerged (Hu et al. 2021); B starts at zero. One contracted axis."""

    rank: int = 1
    alpha: float = 16.0
    dropout: float = 0.0

    def setup(self):
        super().setup()
        self.lora_a = self.param("lora_a", uniform_fan_in(self.shape[0]), (self.shape[0], self.rank))
        self.lora_b = self.param("lora_b", nn.initializers.zeros_init(), (self.rank, *self.shape[1:]))
        self.drop = nn.Dropout(self.dropout, rng_collection="llama")

    def __call__(self, letters: str, x: jax.Array) -> jax.Array:
        low = einsum("BTD,DR->BTR", self.drop(x, deterministic=not self.has_rng("llama")), self.lora_a)
        return super().__call__(letters, x) + (self.alpha / self.rank) * einsum("BTR,RNH->BTNH", low, self.lora_b)


class Attention(nn.Module):
    """Self-attention with rotary positions over this call's keys, or over a cache that they are written into."""

    cfg: LlamaConfig

    @nn.compact
    def __call__(self, x, positions, mask, cache, start):
        # x [B,T,D]  positions int[B,T]  mask bool[B,T,S]  cache {"k", "v": [B,S,K,H]} or None  start int[]
        c = self.cfg
        adapted = {"rank": c.lora_rank, "alpha": c.lora_alpha, "dropout": c.lora_dropout}
        tuned = (lambda *a, **k: LoraProject(*a, **k, **adapted)) if c.lora_rank else Project
        q = tuned((c.dim, c.heads, c.head_dim), name="q")("BTD,DNH->BTNH", x)
        k = Project((c.dim, c.kv_heads, c.head_dim), name="k")("BTD,DKH->BTKH", x)
        v = tuned((c.dim, c.kv_heads, c.head_dim), name="v")("BTD,DKH->BTKH", x)
        q, k = rope(q, positions, c.rope_theta), rope(k, positions, c.rope_theta)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache["k"], k.astype(cache["k"].dtype), start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache["v"], v.astype(cache["v"].dtype), start, axis=1)
            cache = {"k": k, "v": v}
        out = attend(q, k, v, mask)
        return Project((c.heads, c.head_dim, c.dim), contracted=2, name="o")("BTNH,NHD->BTD", out), cache


class FeedForward(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    cfg: LlamaConfig

    @nn.compact
    def __call__(self, x):
        D, F = self.cfg.dim, self.cfg.hidden
        gate = Project((D, F), name="gate")("BTD,DF->BTF", x)
        up = Project((D, F), name="up")("BTD,DF->BTF", x)
        return Project((F, D), name="down")("BTF,FD->BTD", jax.nn.silu(gate) * up)


class Block(nn.Module):
    cfg: LlamaConfig

    @nn.compact
    def __call__(self, x, cache, positions, mask, start):
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        normed = RMSNorm(self.cfg.eps, name="attn_norm")(x)
        out, cache = Attention(self.cfg, name="attn")(normed, positions, mask, cache, start)
        x = x + out
        return x + FeedForward(self.cfg, name="mlp")(RMSNorm(self.cfg.eps, name="mlp_norm")(x)), cache


class Llama(nn.Module):
    """Vectors in, hidden states out; `embed` and `logits` are its two ends.

    remat: recompute each layer in the backward pass instead of keeping its activations
    """

    cfg: LlamaConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self):
        c = self.cfg
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (c.vocab, c.dim))
        self.layers = nn.scan(
            nn.remat(Block, prevent_cse=False) if self.remat else Block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "llama": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.depth,
        )(c)
        self.norm = RMSNorm(c.eps)
        if not c.tied:
            self.head = Project((c.dim, c.vocab))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int[B,T] -> [B,T,D]; no scaling."""
        return jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)

    def __call__(self, x, positions, mask, cache=None, start=0):
        """x [B,T,D], positions int[B,T], mask bool[B,T,S] -> (hidden [B,T,D] after the final norm, cache).

        With a cache ({"k", "v": [L,B,S,K,H]}) this call's keys and values go to the slots start .. start+T-1, and the
        queries read all S slots through the mask.
        """
        x, cache = self.layers(x, cache, positions, mask, start)
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B,T,D] -> float32[B,T,V]."""
        if self.cfg.tied:
            return einsum("BTD,VD->BTV", hidden, self.embedding).astype(jnp.float32)
        return self.head("BTD,DV->BTV", hidden).astype(jnp.float32)

    def empty_cache(self, rows: int, length: int) -> dict[str, jax.Array]:
        shape = (self.cfg.depth, rows, length, self.cfg.kv_heads, self.cfg.head_dim)
        return {"k": jnp.zeros(shape, self.dtype), "v": jnp.zeros(shape, self.dtype)}
