"""LLaMA decoder (Touvron et al. 2023), with grouped key heads, tied or untied head, LoRA, and gated injection.

B batch   T query tokens   S key tokens   P prompts   L layers   D model   F feed-forward
N query heads   K key and value heads   G = N/K   H head   V vocabulary   R LoRA rank

The layers are one module scanned over stacked weights, or, to decode on a CPU, one module per layer (see
`mmjax.inference.layouts`). The key-value cache is an argument and a result. An injection gives each layer either
prompts, which attention reads in addition to its keys, or one vector, which is added to every token. Both are
multiplied by gates that start at zero.

    "head":             attention += tanh(gate)[head] · softmax(q·k(prompts))·v(prompts)
    "layer", "shared":  x += gate · vector            at the input of each layer

Mirrors transformers' modeling_llama.py (4.30), for LoRA peft 0.2.0, and for gates and biases
imagebind_LLM/llama/llama.py (Zhang et al. 2023; Gao et al. 2023; Han et al. 2023).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mmjax.models import remat
from mmjax.models.kernels import XLA, Kernels
from mmjax.models.language_model import Axes, LanguageModelConfig, Matrices
from mmjax.models.layers import Project, RMSNorm, einsum, embedding_lookup, in_float32, uniform_fan_in
from mmjax.models.masks import AttentionMask


@dataclasses.dataclass(frozen=True)
class LlamaConfig(LanguageModelConfig):
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
    tied: bool = False  # the embedding table is also the output head
    lora_rank: int = 0  # 0: no LoRA
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    lora_on: tuple[str, ...] = ("q", "v")  # of q, k, v, o, gate, up, down
    bias_on: tuple[str, ...] = ()  # likewise; these biases start at zero
    injection: str = ""  # "": none, "head": prompts and a gate per head, "layer", "shared": a vector and a scalar gate
    gate_tanh: bool = True  # False: head gates without tanh, as in LLaMA-Adapter v1's inference code
    new_gate: bool = False  # one more factor per layer on the head gates (LLaMA-Adapter v2)

    def __post_init__(self):
        if self.injection not in ("", "head", "layer", "shared"):
            raise ValueError(f"injection = {self.injection!r}: '' (none), 'head', 'layer' or 'shared'")

    unrolls = True
    no_decay = (r"(layers/)?gate",)  # one axis in the original; a head gate has four there
    skipped_without_gradient = (r"layers/attn/(new_)?gate",)  # one parameter a layer in the original: torch skips it
    gates = (r"(layers/)?(attn/)?gate",)
    norm_scales = (r"(layers/(attn|mlp)_)?norm/scale",)

    @property
    def tanh_gates(self) -> bool:
        return self.injection == "head" and self.gate_tanh

    @property
    def axes(self) -> Axes:
        return AXES

    @property
    def matrices(self) -> Matrices:
        return MATRICES

    def build(self, **fields: Any) -> "Llama":
        """Returns the module of this config; `fields` are those of `Llama`."""
        return Llama(self, **fields)


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
MATRICES = (
    (r"layers/(\d+/)?attn/[qkv]/w", (-3,)),  # D N H
    (r"layers/(\d+/)?attn/o/w", (-3, -2)),  # N H D
    (r"layers/(\d+/)?mlp/(gate|up|down)/w|head/w", (-2,)),  # D F, F D, D V
    (r"embedding", (-1,)),  # V D: as a head it sums over D too
)


def rope(x: jax.Array, positions: jax.Array, theta: float, kernels: Kernels = XLA) -> jax.Array:
    """Rotates element j against element j + H/2 by position · theta^(-2j/H). x [B,T,N,H], positions int[B,T]."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * jnp.concatenate([frequency, frequency])
    sin = jnp.sin(angle) * jnp.where(jnp.arange(2 * half) < half, -1.0, 1.0)
    return (x.astype(jnp.float32) * jnp.cos(angle) + kernels.swap_halves(x) * sin).astype(x.dtype)


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
        self.drop = nn.Dropout(self.dropout, rng_collection="llm")

    def __call__(self, letters: str, x: jax.Array) -> jax.Array:
        x_axes, w_axes, y_axes = letters.replace("->", ",").split(",")
        inputs, outputs = w_axes[: self.contracted], w_axes[self.contracted :]
        low = einsum(f"{x_axes},{inputs}R->BTR", self.drop(x, deterministic=not self.has_rng("llm")), self.lora_a)
        update = einsum(f"BTR,R{outputs}->{y_axes}", low, self.lora_b)
        return super().__call__(letters, x) + (self.alpha / self.rank) * update


def projection(cfg: LlamaConfig, transposed: bool, name: str, shape: tuple[int, ...], contracted: int = 1) -> Project:
    """Returns a linear map of a layer, with the bias and the LoRA that the config adds to it."""
    common = {"contracted": contracted, "use_bias": name in cfg.bias_on, "zero_bias": True, "transposed": transposed,
              "name": name}
    if cfg.lora_rank and name in cfg.lora_on:
        return LoraProject(shape, rank=cfg.lora_rank, alpha=cfg.lora_alpha, dropout=cfg.lora_dropout, **common)
    return Project(shape, **common)


def update_cache(cache: dict[str, jax.Array], start: int | jax.Array, axis: int,
                 **new: jax.Array) -> dict[str, jax.Array]:
    """Writes new keys and values to the slots from `start` on, along `axis`, and returns the cache."""
    return {name: jax.lax.dynamic_update_slice_in_dim(cache[name], x.astype(cache[name].dtype), start, axis)
            for name, x in new.items()}


def heads_to_front(x: jax.Array) -> jax.Array:
    """[B,T,K,H] -> [K,B,T,1,H]."""
    return jnp.moveaxis(x, 2, 0)[..., None, :]


def attend_heads_first(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`attend` for keys and values [K,B,S,1,H]; on a CPU 2 to 4 times as fast for one token per row.

    XLA on a CPU multiplies a batch of matrices without copying them only if the batch is one axis, the first.
    """
    (B, T, N, H), (K, _, S, _, _) = q.shape, k.shape
    G = N // K
    q = jnp.moveaxis(q.reshape(B, T, K, G, H) * H**-0.5, 2, 0).reshape(K * B, T * G, H)
    scores = einsum("ZQH,ZSH->ZQS", q, k.reshape(K * B, S, H)).astype(jnp.float32).reshape(K, B, T, G, S)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(K * B, T * G, S)
    out = einsum("ZQS,ZSH->ZQH", weights, v.reshape(K * B, S, H))
    return jnp.moveaxis(out.reshape(K, B, T, G, H), 0, 2).reshape(B, T, N, H)


class LlamaAttention(nn.Module):
    """Self-attention with rotary positions over this call's keys, or over a cache that they are written into."""

    cfg: LlamaConfig
    transposed: bool = False
    kernels: Kernels = XLA

    @nn.compact
    def __call__(self, x, injection, positions, mask, cache, start):
        # x [B,T,D]  injection [B,P,D]  positions int[B,T]  mask AttentionMask
        # cache None or {"k", "v": [B,S,K,H]}, or of an unrolled layer [K,B,S,1,H]
        c = self.cfg
        project = functools.partial(projection, c, self.transposed)
        to_q = project("q", (c.dim, c.heads, c.head_dim))
        to_k = project("k", (c.dim, c.kv_heads, c.head_dim))
        to_v = project("v", (c.dim, c.kv_heads, c.head_dim))
        q, k, v = to_q("BTD,DNH->BTNH", x), to_k("BTD,DKH->BTKH", x), to_v("BTD,DKH->BTKH", x)
        q, k = (rope(each, positions, c.rope_theta, self.kernels) for each in (q, k))
        if cache is None:
            out = self.kernels.attend(q, k, v, mask)
        elif cache["k"].ndim == 5:
            cache = update_cache(cache, start, 2, k=heads_to_front(k), v=heads_to_front(v))
            out = attend_heads_first(q, cache["k"], cache["v"], mask.dense(q.shape[1], cache["k"].shape[2]))
        else:
            cache = update_cache(cache, start, 1, k=k, v=v)
            out = self.kernels.attend(q, cache["k"], cache["v"], mask)
        if c.injection == "head":
            gate = self.param("gate", nn.initializers.zeros_init(), (c.heads,))
            factor = self.param("new_gate", nn.initializers.ones_init(), (1,)) if c.new_gate else 1.0
            if injection is not None:
                gate = (jnp.tanh(gate.astype(jnp.float32)) if c.gate_tanh else gate) * factor
                out = out + in_float32(jnp.multiply, self.read(q, injection, to_k, to_v), gate[:, None])
        return project("o", (c.heads, c.head_dim, c.dim), contracted=2)("BTNH,NHD->BTD", out), cache

    def read(self, q, prompts, to_k, to_v):
        """Attention from queries [B,T,N,H] to prompts [B,P,D]: [B,T,N,H], or [B,1,N,H] for a single prompt.

        Prompts have no positions, are not normalised, and use the matrices without LoRA (as in the original).
        """
        v = to_v.matmul("BPD,DKH->BPKH", prompts)
        if prompts.shape[1] == 1:  # a softmax over one key is 1
            return jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
        return self.kernels.attend(q, to_k.matmul("BPD,DKH->BPKH", prompts), v)


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    cfg: LlamaConfig
    transposed: bool = False

    @nn.compact
    def __call__(self, x):
        D, F = self.cfg.dim, self.cfg.hidden
        project = functools.partial(projection, self.cfg, self.transposed)
        gate, up = (checkpoint_name(project(name, (D, F))("BTD,DF->BTF", x), name) for name in (remat.GATE, remat.UP))
        return project("down", (F, D))("BTF,FD->BTD", jax.nn.silu(gate) * up)


class LlamaBlock(nn.Module):
    cfg: LlamaConfig
    transposed: bool = False
    kernels: Kernels = XLA

    @nn.compact
    def __call__(self, x, cache, injection, positions, mask, start, shared_gate):
        c = self.cfg
        if c.injection in ("layer", "shared"):
            per_layer = c.injection == "layer"
            gate = self.param("gate", nn.initializers.zeros_init(), (1,)) if per_layer else shared_gate
            if injection is not None:
                x = x + in_float32(jnp.multiply, injection, gate)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        normed = RMSNorm(c.eps, name="attn_norm")(x)
        attention = LlamaAttention(c, self.transposed, self.kernels, name="attn")
        out, cache = attention(normed, injection, positions, mask, cache, start)
        x = checkpoint_name(x + out, remat.RESIDUAL)
        return x + GatedFeedForward(c, self.transposed, name="mlp")(RMSNorm(c.eps, name="mlp_norm")(x)), cache


class UnrolledLayers(nn.Module):
    """The layers as modules "0", "1", ..., called like the scanned ones; the cache is a tuple of one per layer."""

    cfg: LlamaConfig
    transposed: bool = False
    kernels: Kernels = XLA

    @nn.compact
    def __call__(self, x, cache, injection, *rest):
        caches = []
        for layer in range(self.cfg.depth):
            inputs = (None if each is None else each[layer] for each in (cache, injection))
            x, updated = LlamaBlock(self.cfg, self.transposed, self.kernels, name=str(layer))(x, *inputs, *rest)
            caches.append(updated)
        return x, None if cache is None else tuple(caches)


class Llama(nn.Module):
    """The decoder: embedded tokens in, hidden states out. `embed` gives the former, `logits` takes the latter.

    remat:       what each layer recomputes in the backward pass, see `mmjax.models.remat`
    kernels:     how attention is computed
    scan_layers: scan the layers over stacked weights. Otherwise each layer has its own weights and its own cache (see
                 `mmjax.inference.layouts.unstack`); such a model is for decoding and has no `remat`
    transposed_weights: store the matrices of unstacked layers and of the head as [outputs, inputs]
    """

    cfg: LlamaConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool | str = False
    scan_layers: bool = True
    transposed_weights: bool = False
    kernels: Kernels = XLA

    def setup(self):
        if self.scan_layers and self.transposed_weights:
            raise ValueError("transposed_weights is for unstacked layers: set scan_layers=False.")
        c, transposed = self.cfg, self.transposed_weights
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (c.vocab, c.dim))
        self.layers = UnrolledLayers(c, transposed, self.kernels) if not self.scan_layers else nn.scan(
            nn.remat(LlamaBlock, prevent_cse=False, policy=remat.POLICIES[self.remat]),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "llm": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.depth,
        )(c, transposed, self.kernels)
        self.norm = RMSNorm(c.eps)
        shared = c.injection == "shared"
        self.gate = self.param("gate", nn.initializers.zeros_init(), (1,)) if shared else None
        if not c.tied:
            self.head = Project((c.dim, c.vocab), transposed=transposed)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Returns the embedded tokens, int[B,T] -> [B,T,D], without scaling."""
        # Where the table's columns are sharded over fsdp, each device looks up its columns for the rows of all devices.
        # Without these constraints XLA gathers everything on every device on some meshes.
        tokens = nn.with_logical_constraint(tokens, ("lookup", "length"))
        x = embedding_lookup(self.embedding, tokens, self.dtype)
        x = nn.with_logical_constraint(x, ("lookup", "length", "embed"))
        return nn.with_logical_constraint(x, ("batch", "length", "embed"))

    def __call__(self, x, positions, mask: AttentionMask, cache=None, start=0, injection=None):
        """x [B,T,D], positions int[B,T], mask: what the queries see -> (hidden [B,T,D] after the final norm, cache).

        With a cache (see `empty_cache`) this call's keys and values go to the slots start .. start+T-1, and the
        queries read all S slots through the mask.
        injection: [L,B,P,D], the prompts of each layer, or its vector (P = 1); zeros add nothing; None: no injection
        """
        if injection is not None:
            injection = injection.astype(x.dtype)
        x, cache = self.layers(x, cache, injection, positions, mask, start, self.gate)
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns the logits, [B,T,D] -> float32[B,T,V]."""
        if self.cfg.tied:
            return einsum("BTD,VD->BTV", hidden, self.embedding, jnp.float32)
        return self.head.matmul("BTD,DV->BTV", hidden, jnp.float32)

    def empty_cache(self, rows: int, length: int) -> Any:
        """Returns a cache of zeros for B = `rows`, S = `length`: {"k", "v": [L,B,S,K,H]}, or, without `scan_layers`,
        L times {"k", "v": [K,B,S,1,H]}.

        Rows and slots are the same axes in both, so that code that repeats or reorders rows works for both.
        """
        L, K, H = self.cfg.depth, self.cfg.kv_heads, self.cfg.head_dim

        def zeros(*shape: int) -> dict[str, jax.Array]:
            return {name: jnp.zeros(shape, self.dtype) for name in "kv"}

        if not self.scan_layers:
            return tuple(zeros(K, rows, length, 1, H) for _ in range(L))
        return zeros(L, rows, length, K, H)
