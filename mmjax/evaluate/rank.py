"""Choices ranked by their loss: multiple choice, yes or no, A to E.

B rows   A candidate answers
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import linen as nn

from mmjax import sharding
from mmjax.batch import Batch
from mmjax.data import text
from mmjax.inference.loaded import Loaded
from mmjax.inference.predictions import Opened, read, rows
from mmjax.inference.requests import Request
from mmjax.training import steps

MULTIPLE = 32  # of the places that rows are padded to, so that few lengths are compiled
UNCUT = 1_000_000  # tokens, more than any row has: an answer that is cut would look likelier than it is
Rule = Literal["sum", "mean", "original"]


@functools.partial(jax.jit, static_argnums=0)
def losses(module: nn.Module, params: Any, batch: Batch) -> jax.Array:
    """float32[B]: each row's sum over its padded length - 1."""
    return steps.loss(module, params, batch, reduction="none")[0]


@functools.partial(jax.jit, static_argnums=0)
def encode(module: nn.Module, params: Any, batch: Batch) -> jax.Array:
    """What the encoder makes of a batch's images and other senses, float32 or as the module computes."""
    return module.apply({"params": params}, batch, method="feature")


@dataclasses.dataclass(frozen=True)
class Choices:
    """Chooses among each sample's answers by their losses; see `mmjax.inference.predictions.Answerer`.

    batch_size: rounded up to what the mesh can divide
    text:       fields of `TextConfig` that differ from the model's

    Of every sample a line holds, by choice, the "losses" in nats (summed over the answer and the end symbol), the
    "tokens" that is of, and the "padded" length by which the original divides; so that every rule of `chosen` can be
    applied later. "answer" is the choice with the lowest loss. Samples stay in their order, for the padded length is
    that of the batch's longest row. What the encoder sees is computed once for all choices.
    """

    model: Loaded
    batch_size: int = 16
    text: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    window = 1

    @property
    def rows(self) -> int:
        return rows(self.model, self.batch_size)

    @property
    def settings(self) -> dict[str, Any]:
        return {"ranked": True, "batch_size": self.rows, **dataclasses.asdict(self._text)}

    @property
    def _text(self) -> Any:
        return dataclasses.replace(self.model.text, **{"max_txt_len": UNCUT, "max_context_len": UNCUT, **self.text})

    def open(self, ask: Request) -> Opened:
        """Raises ValueError for what is wrong with the sample, and if it has no choices."""
        if not ask.choices:
            raise ValueError("there are no choices")
        ask = read(ask, self.model)
        batch = self.model.batch([ask.sample], **dataclasses.asdict(self._text))
        return Opened(ask, batch.tokens.shape[1])

    def answer(self, asks: Sequence[Request], first: int) -> list[dict[str, Any]]:
        filled = [*asks, *[asks[-1]] * (self.rows - len(asks))]
        with sharding.use_mesh(self.model.mesh):
            shown = self._shown(filled)
            columns = [self._column(filled, place, shown) for place in range(max(len(ask.choices) for ask in asks))]
        found = []
        for ask, *scores in zip(asks, *(column[:len(asks)] for column in columns), strict=True):
            own = scores[:len(ask.choices)]
            if not np.isfinite([loss for loss, *_ in own]).all():
                found.append({"error": "a choice has no finite loss: `mmjax doctor` tells which part of the model is "
                                       "broken"})
                continue
            line = dict(zip(("losses", "tokens", "padded"), map(list, zip(*own, strict=True)), strict=True))
            found.append({"answer": ask.choices[chosen(line)], **line})
        return found

    def _shown(self, asks: Sequence[Request]) -> dict[str, Any]:
        """The fields of a `Batch` for what these samples show: features where the family has an encoder, or images."""
        model, place = self.model, sharding.batch_sharding(self.model.mesh)
        batch = model.batch([ask.sample for ask in asks], **dataclasses.asdict(self._text))
        if not model.family.encoder or batch.images is None and batch.media is None:
            return {"images": jax.device_put(batch.images, place)}
        return {"features": encode(model.module, model.params, jax.device_put(batch, place))}

    def _column(self, asks: Sequence[Request], place: int, shown: Mapping[str, Any]) -> list[tuple[float, int, int]]:
        """(loss in nats, tokens it is of, padded length) of each row's choice at that place; of one with fewer choices,
        its last."""
        answers = [ask.choices[min(place, len(ask.choices) - 1)] for ask in asks]
        samples = [dataclasses.replace(ask.sample, answer=answer) for ask, answer in zip(asks, answers, strict=True)]
        batch = text.rows(samples, self.model.tokenizer, self._text, self.model.config.image_tokens, multiple=MULTIPLE)
        whole = dataclasses.replace(jax.device_put(batch, sharding.batch_sharding(self.model.mesh)), **shown)
        found = np.asarray(losses(self.model.module, self.model.params, whole), np.float64)
        found *= batch.padded_length - 1
        tokens = batch.loss_mask[:, 1:].sum(axis=1)
        return [(float(loss), int(count), int(length))
                for loss, count, length in zip(found, tokens, batch.padded_length, strict=True)]


def chosen(line: Mapping[str, Sequence[float]], rule: Rule = "sum") -> int:
    """The place of the best choice of a line that `Choices` made; the first of those that are equally good.

    sum:      the likeliest answer as a whole: the lowest sum of its tokens' losses
    mean:     the lowest loss a token, which does not favour short answers
    original: the sum over the padded length - 1 of the batch that scored it (minigpt_base.py: multi_select)
    """
    per = {"sum": [1] * len(line["losses"]), "mean": line["tokens"], "original": [n - 1 for n in line["padded"]]}[rule]
    return int(np.argmin(np.divide(line["losses"], per)))
