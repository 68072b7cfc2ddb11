"""The base class of the families' modules, `LanguageModel`, and helpers of their encoders.

B rows   T tokens   P prompts   L layers   D model   V vocabulary
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.batch import Batch
from mmjax.models.kernels import XLA, Kernels
from mmjax.models.masks import causal_mask


def for_every_layer(prompts: jax.Array, depth: int) -> jax.Array:
    """Pads the prompts of the last A layers with zeros for the layers below: [A,B,P,D] -> [L,B,P,D]; L = `depth`."""
    return jnp.pad(prompts, ((depth - len(prompts), 0), (0, 0), (0, 0), (0, 0)))


def place_soft_tokens(x: jax.Array, soft: jax.Array, soft_index: jax.Array) -> jax.Array:
    """Writes soft tokens into the embedded tokens: x [B,T,D], soft [G,M,D] -> [B,T,D].

    G divides B: B/G consecutive rows have a list of M soft tokens. A slot with `soft_index` [B,T] >= 0 gets the soft
    token of that number of its row's list.
    """
    index = jnp.maximum(soft_index, 0).reshape(len(soft), -1, 1)
    chosen = jnp.take_along_axis(soft, index, axis=1).reshape(x.shape)
    return jnp.where(soft_index[..., None] >= 0, chosen, x)


def _as_in_format1(rng: Any) -> Any:
    """Returns a random stream of the language model as in format 1, where its name was `llama`. Flax folds the names of
    modules into the stream; with this a seed gives the same LoRA and the same dropout as before."""
    return dataclasses.replace(rng, suffix=(*rng.suffix[:-1], "llama"))


class LanguageModel(nn.Module):
    """An encoder and a language model. A family creates its encoder in `setup` and encodes a batch in `encode`.

    The language model is the module that `cfg.llm.build(...)` returns; its parameters are below `llm/`. The protocol of
    both is `mmjax.models.language_model`.

    dtype: of the activations; parameters of another dtype are cast when they are used
    remat: what the layers recompute in the backward pass, see `mmjax.config.RunConfig`
    kernels: how attention is computed, in the encoder too
    scan_layers, transposed_weights: of a language model that `unrolls`; others accept the defaults alone
    """

    cfg: Any
    dtype: jnp.dtype = jnp.float32
    remat: bool | str = False
    scan_layers: bool = True
    transposed_weights: bool = False
    kernels: Kernels = XLA

    def setup(self):
        self.llm = self._language_model()
        if self.llm.scope is not None:
            self.llm.scope.rngs = {name: _as_in_format1(rng) for name, rng in self.llm.scope.rngs.items()}

    def _language_model(self, **fields: Any) -> nn.Module:
        layout = {"scan_layers": self.scan_layers, "transposed_weights": self.transposed_weights}
        if self.cfg.llm.unrolls:
            fields |= layout
        elif layout != {"scan_layers": True, "transposed_weights": False}:
            raise ValueError(f"{type(self.cfg.llm).__name__} has one layout of its layers: keep scan_layers=True and "
                             "transposed_weights=False.")
        return self.cfg.llm.build(dtype=self.dtype, remat=self.remat, kernels=self.kernels, **fields)

    def encode(self, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """Returns (embedded tokens with soft tokens in their slots [B,T,D], injection [L,B,P,D] or None)."""
        raise TypeError(f"{type(self).__name__} does not define `encode`.")

    def embed(self, tokens):
        """Returns the embedded tokens, int[B,T] -> [B,T,D]."""
        return self.llm.embed(tokens)

    def decode(self, x, positions, mask, cache=None, start=0, injection=None):
        """See the language model's `__call__`."""
        if self.cfg.llm.learned_positions:  # padding may be longer than the table
            positions = jnp.minimum(positions, self.cfg.llm.max_positions - 1)
        return self.llm(x, positions, mask, cache, start, injection)

    def logits(self, hidden):
        """Returns the logits, [B,T,D] -> float32[B,T,V]."""
        return self.llm.logits(hidden)

    def hidden(self, batch: Batch) -> jax.Array:
        """Returns the input of `logits`, [B,T,D]. Raises ValueError for packed rows if the family has an injection."""
        x, injection = self.encode(batch)
        if injection is not None and batch.segments is not None:
            raise ValueError("These rows are packed, but this family injects vectors per row, which all samples "
                             "of a row would read. Use one sample per row.")
        hidden, _ = self.decode(x, batch.positions, causal_mask(batch.valid, batch.segments), injection=injection)
        return hidden

    def __call__(self, batch: Batch) -> jax.Array:
        """Returns the logits, float32[B,T,V]; raises as `hidden` does."""
        return self.logits(self.hidden(batch))

    def empty_cache(self, rows: int, length: int):
        """Returns a key-value cache of zeros for `decode`."""
        return self._language_model(parent=None).empty_cache(rows, length)


def example_batch(image_size: int | None = None, media: dict[str, jax.Array] | None = None, mixed: bool = False,
                  rows: int = 1, length: int = 8) -> Batch:
    """Returns a batch of zeros to initialize every parameter. mixed: the images and media get weights, as senses do."""
    zeros = jnp.zeros((rows, length), jnp.int32)
    images = None if image_size is None else jnp.zeros((rows, 1, 3, image_size, image_size))
    names = [*(["image"] if images is not None else []), *(media or {})]
    return Batch(
        tokens=zeros,
        soft_index=zeros - 1,
        valid=zeros == 0,
        loss_mask=zeros == 0,
        positions=zeros,
        padded_length=jnp.full(rows, length, jnp.int32),
        images=images,
        media=media,
        weights={name: jnp.ones(rows) for name in names} if mixed else None,
    )
