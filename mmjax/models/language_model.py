"""The protocol of a language model: what mmjax asks of the module behind `cfg.llm`, whose parameters are below `llm/`.

B rows   T query tokens   S key tokens   P prompts   L layers   D model   V vocabulary   N heads   H head

A language model is a config that inherits `LanguageModelConfig` and a module that has the methods of `Decoder`. Nothing
else in mmjax knows which one it is.

Parameters are named as in the rest of the package, and weight decay and the doctor go by these names: `w` is a matrix,
`embedding` and `pos` are tables, `b` and `bias` are biases, `scale` belongs to a norm, `lora_a` and `lora_b` to LoRA.
Dropout uses the random stream "llm", which exists only while a parameter of the language model is trained.
"""

import abc
from typing import Any, Protocol

import jax
from flax import linen as nn

from mmjax.models.kernels import Kernels
from mmjax.models.masks import AttentionMask

Axes = tuple[tuple[str, tuple[str, ...]], ...]
Matrices = tuple[tuple[str, tuple[int, ...]], ...]


class Decoder(Protocol):
    """The methods of a language model's module. `mmjax.families.model.LanguageModel` calls them, and nothing else."""

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Returns the embedded tokens, int[B,T] -> [B,T,D]: the space that soft tokens are in."""
        ...

    def __call__(self, x: jax.Array, positions: jax.Array, mask: AttentionMask, cache: Any = None,
                 start: int | jax.Array = 0, injection: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """Returns (hidden states [B,T,D], updated cache). They depend on positions and mask, not on the order of slots.

        positions: int[B,T], from 0 in every segment, in any order at padding; below `max_positions` if they are learned
        mask:      which of the S keys a query sees; S = T without a cache
        cache:     what `empty_cache` returns, or None: the tokens read each other. With a cache the new keys and
                   values go to the slots start .. start+T-1, and the queries read all S slots through the mask
        injection: [L,B,P,D] for the layers; None: no injection. A language model without injections raises TypeError
        """
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns the logits, [B,T,D] -> float32[B,T,V]."""
        ...

    def empty_cache(self, rows: int, length: int) -> Any:
        """Returns a cache of zeros: a pytree of arrays [...,B,S,N,H], for B = `rows` and S = `length`. Beam search
        reorders the rows, axis -4."""
        ...


class LanguageModelConfig(abc.ABC):
    """Base class of the language models' configs. A config is a frozen dataclass that inherits this class, defines
    `axes` and `build`, has the first four fields, and overrides the others where its model has such a thing.

    Patterns are regular expressions for the whole path of a parameter below `llm/`.

    vocab:         V, rows of the embedding table
    dim:           D
    depth:         L
    max_positions: positions that the model has, or was trained with; longer prompts are refused
    learned_positions: whether positions are a table of `max_positions` rows; longer training samples are refused, too
    matrices:      (pattern, contracted axes counted from the end) of the matrices that can be stored as int8
    unrolls:       whether `build` accepts `scan_layers=False` and `transposed_weights=True`: the parameters of layer i
                   are then at `layers/i/...` in place of slice i of `layers/...`, and every `w` is stored as [outputs,
                   inputs]. All of them are in `matrices`. False: decoding uses the module as it trains
    no_decay:      patterns of parameters without weight decay, in addition to biases and scales
    skipped_without_gradient: patterns of parameters that the optimizer leaves as they are without a gradient, weight
                   decay included
    gates:         patterns of the gates that an injection passes
    tanh_gates:    whether they pass through tanh
    norm_scales:   patterns of norm scales that are near 0 in a published delta, which is a difference of two models
    """

    vocab: int
    dim: int
    depth: int
    max_positions: int
    learned_positions: bool = False
    matrices: Matrices = ()
    unrolls: bool = False
    no_decay: tuple[str, ...] = ()
    skipped_without_gradient: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()
    tanh_gates: bool = False
    norm_scales: tuple[str, ...] = ()

    @property
    @abc.abstractmethod
    def axes(self) -> Axes:
        """(pattern, logical axes) of every parameter, first match wins. The axis "layer" comes first in stacked
        parameters; the axis "vocab" marks the embedding table and the head."""

    @abc.abstractmethod
    def build(self, *, dtype: Any, remat: bool | str, kernels: Kernels, **fields: Any) -> nn.Module:
        """Returns the module, which has the methods of `Decoder`.

        dtype:   of the activations; parameters of another dtype are cast when they are used
        remat:   what the layers recompute in the backward pass, see `mmjax.models.remat`
        kernels: how attention is computed
        fields:  of `nn.Module` (`parent`), and of a model that `unrolls`: `scan_layers`, `transposed_weights`
        """
