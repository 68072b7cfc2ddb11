"""How attention is computed: `Kernels`, a field of the modules that attend. It never changes what attention is.

B batch   T query tokens   S key tokens   N query heads   K key and value heads   G = N/K   H head

    "xla"     the dense form, the reference: scores and weights are arrays [B,K,G,T,S]
    "splash"  JAX's fused kernel for TPUs (Pallas): causal attention within rows, block by block, which leaves out the
              blocks after the diagonal and writes no scores
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import DenyList
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec

from mmjax.models.layers import einsum
from mmjax.models.masks import AttentionMask
from mmjax.models.remat import ATTENTION, QKV

CHOICES = ("auto", "xla", "splash")
SUBLANES, LANES = 8, 128  # of a TPU's tile; the splash kernel takes rows of a multiple of LANES
SCORES_BYTES = 64 * 2**20  # half of a TPU's VMEM
BLOCKS = (512, 384, 256, 128)  # of the splash kernel; the largest that divides a row is used
PADDING = -1  # id of the slots that pad a row; `causal_mask` gives it to no token


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The implementations that a module uses.

    attention:      "splash" is used for causal bfloat16 attention of whole rows, "xla" for all other attention
    float32_scores: "xla" keeps scores in float32. False: it rounds them to the dtype of the queries before the softmax,
                    for devices where XLA writes them to memory
    swap_by_product: halves of vectors are swapped by a product with a permutation, which uses all lanes of a TPU
    scores_bytes:   an encoder processes as many rows at a time as have scores of this size in a layer, so that XLA can
                    keep them in the memory beside the arithmetic; None: all rows at once
    interpret:      interpret kernels on any platform, slowly and in any dtype; for tests
    """

    attention: Literal["xla", "splash"] = "xla"
    float32_scores: bool = True
    swap_by_product: bool = False
    scores_bytes: int | None = None
    interpret: bool = False

    @property
    def fused(self) -> bool:
        return self.attention != "xla"

    def __str__(self) -> str:
        if not self.fused:
            return "all attention is computed by XLA"
        return ("causal attention is computed by the splash kernel, with rows padded to a multiple of "
                f"{LANES} slots; all other attention by XLA")

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask | None = None,
               drop: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """Scaled dot-product attention. q [B,T,N,H], k and v [B,S,K,H] -> [B,T,N,H].

        Key head j is shared by the query heads j·G .. j·G + G - 1. mask: None hides nothing;
        drop: dropout of the weights [B,K,G,T,S]
        """
        mask = AttentionMask() if mask is None else mask
        if self._can_splash(q, k, mask) and drop is None:
            return _splash(q, k, v, mask, self.interpret)
        dense = mask.dense(q.shape[1], k.shape[1])
        return attend(q, k, v, dense, drop, jnp.float32 if self.float32_scores else q.dtype)

    def swap_halves(self, x: jax.Array) -> jax.Array:
        """Returns vectors [B,T,N,H] with their halves along H swapped, in float32; no number is rounded."""
        size = x.shape[-1]
        if not self.swap_by_product:
            return jnp.roll(x.astype(jnp.float32), size // 2, axis=-1)
        return einsum("BTNH,HI->BTNI", x, jnp.roll(jnp.eye(size, dtype=x.dtype), size // 2, axis=-1), jnp.float32)

    def _can_splash(self, q: jax.Array, k: jax.Array, mask: AttentionMask) -> bool:
        whole_rows = mask.causal and mask.start is None and q.shape[1] == k.shape[1]
        return (self.attention == "splash" and whole_rows and (self.interpret or q.dtype == jnp.bfloat16)
                and q.shape[0] % _num_shards("batch") == 0)

    def for_encoding(self) -> "Kernels":
        """Returns the kernels for a program that only encodes: on a TPU, a few rows at a time.

        Within a training step libtpu 0.0.42 crashes while it compiles such a scan over rows.
        """
        return dataclasses.replace(self, scores_bytes=SCORES_BYTES) if self.swap_by_product else self

    def rows_at_once(self, rows: int, tokens: int, heads: int) -> int:
        """Returns how many of the rows [B,T,D] of an encoder each device should process at once, see `scores_bytes`."""
        local = rows // _num_shards("batch")
        if self.scores_bytes is None or rows % _num_shards("batch") or not local:
            return rows
        of_a_row = 4 * heads * (tokens + -tokens % SUBLANES) * (tokens + -tokens % LANES)
        return next(count for count in range(local, 0, -1)
                    if local % count == 0 and (count == 1 or count * of_a_row <= self.scores_bytes))


XLA = Kernels()


def select(platform: str, attention: str = "auto") -> Kernels:
    """Returns the kernels for devices of a platform ("cpu", "gpu" or "tpu").

    attention: "auto" selects splash on a TPU and XLA elsewhere. Raises ValueError for "splash" on another platform and
               for an unknown name
    """
    if attention not in CHOICES:
        raise ValueError(f"attention = {attention!r}: one of {', '.join(CHOICES)}")
    if attention == "splash" and platform != "tpu":
        raise ValueError(f"attention = 'splash': this kernel is for TPUs, but the devices are of the platform "
                         f"{platform!r}. Use 'auto' or 'xla'.")
    if platform != "tpu":
        return Kernels(float32_scores=platform != "gpu")
    return Kernels("xla" if attention == "xla" else "splash", swap_by_product=True)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None,
           drop: Callable[[jax.Array], jax.Array] | None = None, scores_dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """The dense form of `Kernels.attend`. mask: bool[B,T,S] (True is seen) or None

    A query that sees nothing returns the mean of all values, as with the original's additive masks, and never NaN.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    # The head axes are moved before the token axis: XLA on a CPU is faster that way, and elsewhere equally fast.
    q = jnp.moveaxis(q.reshape(B, T, K, N // K, H) * H**-0.5, 1, 3)
    q, k, v = (checkpoint_name(x, QKV) for x in (q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)))
    scores = einsum("BKGTH,BKSH->BKGTS", q, k, scores_dtype).astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = weights if drop is None else drop(weights)
    out = checkpoint_name(einsum("BKGTS,BKSH->BKGTH", weights, v), ATTENTION)
    return jnp.moveaxis(out, 3, 1).reshape(B, T, N, H)


def scan_rows(layers: nn.Module, x: jax.Array, *others: Any, heads: int, kernels: Kernels) -> jax.Array:
    """Calls `layers(x, *others)`, which returns (x, None), with as many rows of x [B,T,D] at a time as
    `Kernels.rows_at_once` says."""
    B, T, _ = x.shape
    rows, shards = kernels.rows_at_once(B, T, heads), _num_shards("batch")
    if rows * shards >= B:
        return layers(x, *others)[0]
    parts = jnp.moveaxis(x.reshape(shards, -1, rows, *x.shape[1:]), 1, 0)

    def part(layers: nn.Module, carry: None, x: jax.Array) -> tuple[None, jax.Array]:
        out = layers(x.reshape(shards * rows, *x.shape[2:]), *others)[0]
        return carry, out.reshape(x.shape)

    scanned = nn.scan(part, variable_broadcast="params", variable_axes={"intermediates": 0},
                      split_rngs={"params": False, DenyList("params"): True})
    return jnp.moveaxis(scanned(layers, None, parts)[1], 0, 1).reshape(B, *x.shape[1:])


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, interpret: bool) -> jax.Array:
    B, T, N, H = q.shape
    padding = -T % LANES
    q, k, v = (checkpoint_name(jnp.swapaxes(x, 1, 2), QKV) for x in (q * H**-0.5, k, v))
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (q, k, v))
    ids = [jnp.zeros((B, T), jnp.int32) if ids is None else ids for ids in (mask.query_ids, mask.key_ids)]
    ids = [jnp.pad(each, ((0, 0), (0, padding)), constant_values=PADDING) for each in ids]

    def rows(q: jax.Array, k: jax.Array, v: jax.Array, query_ids: jax.Array, key_ids: jax.Array) -> jax.Array:
        kernel = _splash_kernel(q.shape[1], T + padding, interpret)
        return jax.vmap(kernel)(q, k, v, splash_attention_kernel.SegmentIds(query_ids, key_ids))

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        of_queries, of_keys = (nn.logical_to_mesh_axes(("batch", heads, "length", "head"))
                               for heads in ("heads", "kv_heads"))
        of_ids = PartitionSpec(*of_queries[:1])
        rows = jax.shard_map(rows, in_specs=(of_queries, of_keys, of_keys, of_ids, of_ids), out_specs=of_queries,
                             check_vma=False)
    # The kernel names its output for its own backward pass. What follows needs it if its weights are trained.
    return checkpoint_name(jnp.swapaxes(rows(q, k, v, *ids)[:, :, :T], 1, 2), ATTENTION)


def _splash_kernel(heads: int, length: int, interpret: bool) -> Callable[..., jax.Array]:
    """Returns the kernel of one row: q [N,T,H], k and v [K,T,H], ids int32[T] -> [N,T,H]."""
    block = next(size for size in BLOCKS if length % size == 0)
    # One kernel computes all gradients if it has whole rows. It would round that of the queries for each block of keys.
    of_queries = {"use_fused_bwd_kernel": True} if block == length else {"block_q_dq": block, "block_kv_dq": block}
    masks = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads)
    return splash_attention_kernel.make_splash_mha_single_device(
        masks, residual_checkpoint_name=ATTENTION, interpret=interpret,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, **of_queries))


def _num_shards(axis: str) -> int:
    """Returns the number of shards of a dimension with a logical axis on the mesh of the current trace."""
    mesh = jax.sharding.get_abstract_mesh()
    (names,) = nn.logical_to_mesh_axes((axis,)) if not mesh.empty else (None,)
    names = (names,) if isinstance(names, str) else names or ()
    return functools.reduce(lambda shards, name: shards * mesh.shape[name], names, 1)
