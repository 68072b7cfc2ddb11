"""What every family shares: LLaMA behind `encode`, and a way to look at shapes without allocating anything.

B rows   T query tokens   S key tokens   P prompts   L layers   D model   V vocabulary
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.batch import Batch
from mmjax.models.llama import Llama


def causal_mask(valid: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """bool[B,T] -> bool[B,T,T]: each token sees the valid tokens up to itself, in packed rows those of its segment.

    segments: as in `Batch.segments`. A token of a packed row that would see nothing sees itself: attention would give
              it the mean of the whole row, other segments included.
    """
    T = valid.shape[1]
    mask = jnp.tril(jnp.ones((T, T), bool)) & valid[:, None, :]
    if segments is None:
        return mask
    mask &= segments[:, :, None] == segments[:, None, :]
    return mask | (jnp.eye(T, dtype=bool) & ~mask.any(-1, keepdims=True))


def for_every_layer(prompts: jax.Array, depth: int) -> jax.Array:
    """Prompts of the last A layers [A,B,P,D] -> [L,B,P,D], zeros for the layers below, which read none; L = `depth`."""
    return jnp.pad(prompts, ((depth - len(prompts), 0), (0, 0), (0, 0), (0, 0)))


class LanguageModel(nn.Module):
    """An encoder in front of LLaMA. A family adds its towers in `setup` and turns a batch into vectors in `encode`.

    dtype: of the activations; parameters of another dtype are cast where they are used
    remat: recompute the layers in the backward pass
    form:  of LLaMA's layers, see `mmjax.models.llama.Llama`
    """

    cfg: Any
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    form: str = "stacked"

    def setup(self):
        self.llama = Llama(self.cfg.llama, self.dtype, self.remat, self.form)

    def encode(self, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """-> [B,T,D]: words embedded, soft tokens placed; and what is injected into each layer, [L,B,P,D] or None."""
        raise TypeError(f"{type(self).__name__} is a family without `encode`.")

    def embed(self, tokens):
        """int[B,T] -> [B,T,D]."""
        return self.llama.embed(tokens)

    def decode(self, x, positions, mask, cache=None, start=0, injection=None):
        """See `Llama.__call__`."""
        return self.llama(x, positions, mask, cache, start, injection)

    def logits(self, hidden):
        """[B,T,D] -> float32[B,T,V]."""
        return self.llama.logits(hidden)

    def hidden(self, batch: Batch) -> jax.Array:
        """-> [B,T,D], what `logits` takes. Raises ValueError for packed rows where something is injected, one a row."""
        x, injection = self.encode(batch)
        if injection is not None and batch.segments is not None:
            raise ValueError("These rows are packed, but what is injected into the layers is one a row: every sample "
                             "of a row would read the same. Give one sample a row.")
        hidden, _ = self.decode(x, batch.positions, causal_mask(batch.valid, batch.segments), injection=injection)
        return hidden

    def __call__(self, batch: Batch) -> jax.Array:
        """-> float32 logits [B,T,V]; raises as `hidden` does."""
        return self.logits(self.hidden(batch))

    def empty_cache(self, rows: int, length: int):
        """A zero key-value cache for `decode`."""
        return Llama(self.cfg.llama, self.dtype, form=self.form, parent=None).empty_cache(rows, length)


def example_batch(image_size: int | None = None, media: dict[str, jax.Array] | None = None, rows: int = 1,
                  length: int = 8) -> Batch:
    """A batch of zeros that reaches every parameter."""
    zeros = jnp.zeros((rows, length), jnp.int32)
    return Batch(
        tokens=zeros,
        soft_index=zeros - 1,
        valid=zeros == 0,
        loss_mask=zeros == 0,
        positions=zeros,
        padded_length=jnp.full(rows, length, jnp.int32),
        images=None if image_size is None else jnp.zeros((rows, 1, 3, image_size, image_size)),
        media=media,
        weights=None if media is None else {name: jnp.ones(rows) for name in media},
    )
