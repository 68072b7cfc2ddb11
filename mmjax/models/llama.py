"""LLaMA decoder (Touvron et al. 2023), with grouped key heads, tied or untied head, LoRA, and gated injection.

B batch   T query tokens   S key tokens   P prompts   L layers   D model   F feed-forward
N query heads   K key and value heads   G = N/K   H head   V vocabulary   R LoRA rank

The layers are one module scanned over stacked weights. The key-value cache is an argument and a result, and so is what
is injected into each layer: prompts that attention reads beside its keys, or one vector that is added to every token.
Both pass gates that start closed.

    "head":             attention += tanh(gate)[head] · softmax(q·k(prompts))·v(prompts)
    "layer", "shared":  x += gate · vector            at the input of each layer

Mirrors transformers' modeling_llama.py (4.30), for LoRA peft 0.2.0, and for gates and biases
imagebind_LLM/llama/llama.py (Zhang et al. 2023; Gao et al. 2023; Han et al. 2023).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.models.layers import Project, RMSNorm, attend, einsum, look_up, uniform_fan_in


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
    lora_on: tuple[str, ...] = ("q", "v")  # of q, k, v, o, gate, up, down
    bias_on: tuple[str, ...] = ()  # likewise; these biases start at zero
    injection: str = ""  # "": none, "head": prompts through a gate a head, "layer", "shared": a vector through scalars
    gate_tanh: bool = True  # False: head gates as they are, as LLaMA-Adapter v1's inference code reads them
    new_gate: bool = False  # one more factor a layer on the head gates (LLaMA-Adapter v2)

    def __post_init__(self):
        if self.injection not in ("", "head", "layer", "shared"):
            raise ValueError(f"injection = {self.injection!r}: '' (none), 'head', 'layer' or 'shared'")


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
    (r"layers/attn/[qkv]/lora_a", ("layer", "embed", "rank")),
    (r"layers/attn/q/lora_b", ("layer", "rank", "heads", "head")),
    (r"layers/attn/[kv]/lora_b", ("layer", "rank", "kv_heads", "head")),
    (r"layers/attn/o/lora_a", ("layer", "heads", "head", "rank")),
    (r"layers/attn/o/lora_b", ("layer", "rank", "embed")),
    (r"layers/attn/q/b", ("layer", "heads", "head")),
    (r"layers/attn/[kv]/b", ("layer", "kv_heads", "head")),
    (r"layers/attn/o/b", ("layer", "embed")),
    (r"layers/attn/gate", ("layer", "heads")),
    (r"layers/(attn/new_)?gate", ("layer", "one")),
    (r"gate", ("one",)),
    (r"layers/mlp/(gate|up)/w", ("layer", "embed", "ff")),
    (r"layers/mlp/down/w", ("layer", "ff", "embed")),
    (r"layers/mlp/(gate|up)/lora_a", ("layer", "embed", "rank")),
    (r"layers/mlp/(gate|up)/lora_b", ("layer", "rank", "ff")),
    (r"layers/mlp/down/lora_a", ("layer", "ff", "rank")),
    (r"layers/mlp/down/lora_b", ("layer", "rank", "embed")),
    (r"layers/mlp/(gate|up)/b", ("layer", "ff")),
    (r"layers/mlp/down/b", ("layer", "embed")),
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
    """W x + (alpha / R) · B (A x), unmerged (Hu et al. 2021); B starts at zero."""

    rank: int = 1
    alpha: float = 16.0
    dropout: float = 0.0

    def setup(self):
        super().setup()
        inputs, outputs = self.shape[: self.contracted], self.shape[self.contracted :]
        self.lora_a = self.param("lora_a", uniform_fan_in(math.prod(inputs)), (*inputs, self.rank))
        self.lora_b = self.param("lora_b", nn.initializers.zeros_init(), (self.rank, *outputs))
        self.drop = nn.Dropout(self.dropout, rng_collection="llama")

    def __call__(self, letters: str, x: jax.Array) -> jax.Array:
        x_axes, w_axes, y_axes = letters.replace("->", ",").split(",")
        inputs, outputs = w_axes[: self.contracted], w_axes[self.contracted :]
        low = einsum(f"{x_axes},{inputs}R->BTR", self.drop(x, deterministic=not self.has_rng("llama")), self.lora_a)
        update = einsum(f"BTR,R{outputs}->{y_axes}", low, self.lora_b)
        return super().__call__(letters, x) + (self.alpha / self.rank) * update


def projection(cfg: LlamaConfig, name: str, shape: tuple[int, ...], contracted: int = 1) -> Project:
    """A layer's linear map with what the config adds to it."""
    common = {"contracted": contracted, "use_bias": name in cfg.bias_on, "zero_bias": True, "name": name}
    if cfg.lora_rank and name in cfg.lora_on:
        return LoraProject(shape, rank=cfg.lora_rank, alpha=cfg.lora_alpha, dropout=cfg.lora_dropout, **common)
    return Project(shape, **common)


class Attention(nn.Module):
    """Self-attention with rotary positions over this call's keys, or over a cache that they are written into."""

    cfg: LlamaConfig

    @nn.compact
    def __call__(self, x, injection, positions, mask, cache, start):
        # x [B,T,D]  injection [B,P,D]  positions int[B,T]  mask bool[B,T,S]  cache {"k", "v": [B,S,K,H]} or None
        c = self.cfg
        to_q = projection(c, "q", (c.dim, c.heads, c.head_dim))
        to_k = projection(c, "k", (c.dim, c.kv_heads, c.head_dim))
        to_v = projection(c, "v", (c.dim, c.kv_heads, c.head_dim))
        q, k, v = to_q("BTD,DNH->BTNH", x), to_k("BTD,DKH->BTKH", x), to_v("BTD,DKH->BTKH", x)
        q, k = rope(q, positions, c.rope_theta), rope(k, positions, c.rope_theta)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache["k"], k.astype(cache["k"].dtype), start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache["v"], v.astype(cache["v"].dtype), start, axis=1)
            cache = {"k": k, "v": v}
        out = attend(q, k, v, mask)
        if c.injection == "head":
            gate = self.param("gate", nn.initializers.zeros_init(), (c.heads,))
            factor = self.param("new_gate", nn.initializers.ones_init(), (1,)) if c.new_gate else 1.0
            if injection is not None:
                gate = (jnp.tanh(gate.astype(jnp.float32)) if c.gate_tanh else gate) * factor
                out = out + gate[:, None].astype(out.dtype) * self.read(q, injection, to_k, to_v)
        return projection(c, "o", (c.heads, c.head_dim, c.dim), contracted=2)("BTNH,NHD->BTD", out), cache

    @staticmethod
    def read(q, prompts, to_k, to_v):
        """What the queries [B,T,N,H] read from prompts [B,P,D]: [B,T,N,H], or [B,1,N,H] of a single prompt.

        Prompts have no positions, are not normalised and pass the bare matrices, without LoRA (as in the original).
        """
        v = einsum("BPD,DKH->BPKH", prompts, to_v.w)
        if prompts.shape[1] == 1:  # a softmax over one key is 1
            return jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
        return attend(q, einsum("BPD,DKH->BPKH", prompts, to_k.w), v)


class FeedForward(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    cfg: LlamaConfig

    @nn.compact
    def __call__(self, x):
        D, F = self.cfg.dim, self.cfg.hidden
        gate = projection(self.cfg, "gate", (D, F))("BTD,DF->BTF", x)
        up = projection(self.cfg, "up", (D, F))("BTD,DF->BTF", x)
        return projection(self.cfg, "down", (F, D))("BTF,FD->BTD", jax.nn.silu(gate) * up)


class Block(nn.Module):
    cfg: LlamaConfig

    @nn.compact
    def __call__(self, x, cache, injection, positions, mask, start, shared_gate):
        c = self.cfg
        if c.injection in ("layer", "shared"):
            own = c.injection == "layer"
            gate = self.param("gate", nn.initializers.zeros_init(), (1,)) if own else shared_gate
            if injection is not None:
                x = x + gate.astype(x.dtype) * injection
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        normed = RMSNorm(c.eps, name="attn_norm")(x)
        out, cache = Attention(c, name="attn")(normed, injection, positions, mask, cache, start)
        x = x + out
        return x + FeedForward(c, name="mlp")(RMSNorm(c.eps, name="mlp_norm")(x)), cache


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
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.depth,
        )(c)
        self.norm = RMSNorm(c.eps)
        shared = c.injection == "shared"
        self.gate = self.param("gate", nn.initializers.zeros_init(), (1,)) if shared else None
        if not c.tied:
            self.head = Project((c.dim, c.vocab))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int[B,T] -> [B,T,D]; no scaling."""
        # Where the table's columns are cut over fsdp, each device looks up its columns for the rows of all of them.
        # Said here because XLA, left alone, gathers everything everywhere on some meshes.
        tokens = nn.with_logical_constraint(tokens, ("lookup", "length"))
        x = nn.with_logical_constraint(look_up(self.embedding, tokens, self.dtype), ("lookup", "length", "embed"))
        return nn.with_logical_constraint(x, ("batch", "length", "embed"))

    def __call__(self, x, positions, mask, cache=None, start=0, injection=None):
        """x [B,T,D], positions int[B,T], mask bool[B,T,S] -> (hidden [B,T,D] after the final norm, cache).

        With a cache ({"k", "v": [L,B,S,K,H]}) this call's keys and values go to the slots start .. start+T-1, and the
        queries read all S slots through the mask.
        injection: [L,B,P,D], for every layer its prompts, or its vector (P = 1); zeros are nothing; None is none at all
        """
        if injection is not None:
            injection = injection.astype(x.dtype)
        x, cache = self.layers(x, cache, injection, positions, mask, start, self.gate)
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B,T,D] -> float32[B,T,V]."""
        if self.cfg.tied:
            return einsum("BTD,VD->BTV", hidden, self.embedding).astype(jnp.float32)
        return self.head("BTD,DV->BTV", hidden).astype(jnp.float32)

    def empty_cache(self, rows: int, length: int) -> dict[str, jax.Array]:
        shape = (self.cfg.depth, rows, length, self.cfg.kv_heads, self.cfg.head_dim)
        return {"k": jnp.zeros(shape, self.dtype), "v": jnp.zeros(shape, self.dtype)}
