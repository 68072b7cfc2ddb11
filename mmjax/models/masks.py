"""What attention sees: a description of the mask that every implementation of attention reads.

B batch   T query tokens   S key tokens
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

UNSEEN = int(np.iinfo(np.int32).min)  # the id of keys that no query sees


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """A query sees the keys that have its id and, if `causal`, are in its slot or before it.

    causal:    queries see no later keys
    query_ids: int32[B,T], None: all of them are 0
    key_ids:   int32[B,S], None: all of them are 0; `UNSEEN` for keys that no query sees
    start:     slot of the first query among the keys of a cache; None: queries and keys are the same slots

    `AttentionMask()` hides nothing.
    """

    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    query_ids: jax.Array | None = None
    key_ids: jax.Array | None = None
    start: int | jax.Array | None = None

    def dense(self, queries: int, keys: int) -> jax.Array | None:
        """Returns the mask of T = `queries` and S = `keys`, bool[B or 1,T,S], True where a key is seen; None: all."""
        seen = None
        if self.causal:
            start = 0 if self.start is None else self.start
            seen = (jnp.arange(keys) <= start + jnp.arange(queries)[:, None])[None]
        if self.query_ids is not None or self.key_ids is not None:
            same_id = jnp.zeros((1, 1), jnp.int32)
            query_ids, key_ids = (same_id if ids is None else ids for ids in (self.query_ids, self.key_ids))
            same = query_ids[:, :, None] == key_ids[:, None, :]
            seen = same if seen is None else seen & same
        return seen


def causal_mask(valid: jax.Array, segments: jax.Array | None = None) -> AttentionMask:
    """Returns the mask of rows bool[B,T] in which each token sees the valid tokens of its segment up to itself.

    segments: as in `Batch.segments`; None: each row is one segment

    A token that would see nothing sees itself alone, so that its output depends on no other token.
    """
    T = valid.shape[1]
    segments = jnp.zeros(valid.shape, jnp.int32) if segments is None else jnp.asarray(segments, jnp.int32)
    plain = AttentionMask(True, segments, jnp.where(valid, segments, UNSEEN))
    alone = ~plain.dense(T, T).any(-1)
    own = -2 - jnp.arange(T)  # segments are -1 or more
    return AttentionMask(True, *(jnp.where(alone, own, ids) for ids in (plain.query_ids, plain.key_ids)))


def cached_mask(valid: jax.Array, start: int | jax.Array) -> AttentionMask:
    """Returns the mask of queries in the slots `start`, `start` + 1, ... that see the `valid` slots bool[B,S] of a
    cache up to their own."""
    return AttentionMask(True, None, jnp.where(valid, 0, UNSEEN), start)
