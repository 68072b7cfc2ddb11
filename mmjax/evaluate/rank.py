"""Ranks choices by their loss: multiple choice, yes or no, A to E.

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
from mmjax.inference.predictions import OpenedRequest, read, rows
from mmjax.inference.requests import Request
from mmjax.training import steps

MULTIPLE = 32  # rows are padded to a multiple of this length, so that few lengths are compiled
UNCUT = 1_000_000  # tokens, more than any row has: a truncated answer would have too low a loss
Rule = Literal["sum", "mean", "original"]


@functools.partial(jax.jit, static_argnums=0)
def losses(module: nn.Module, params: Any, batch: Batch) -> jax.Array:
    """Returns float32[B]: each row's summed loss over its padded length - 1."""
    return steps.loss(module, params, batch, reduction="none")[0]


@functools.partial(jax.jit, static_argnums=0)
def encode(module: nn.Module, params: Any, batch: Batch) -> jax.Array:
    """Returns the features of a batch's images and other senses, in float32 or the module's dtype."""
    return module.apply({"params": params}, batch, method="feature")


@dataclasses.dataclass(frozen=True)
class Choices:
    """Chooses among each sample's choices by their losses; see `mmjax.inference.predictions.Answerer`.

    batch_size: rounded up to what the mesh can divide
    text:       fields of `TextConfig` that differ from the model's

    The line of a sample has, for each choice, the "losses" in nats (summed over the answer and the end symbol), the
    number of "tokens" of the sum, and the "padded" length by which the original divides, so that every rule of `chosen`
    can be applied later. "answer" is the choice with the lowest loss. Samples stay in their order, because the padded
    length is that of the batch's longest row. Features are computed once for all choices.
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

    def open(self, request: Request) -> OpenedRequest:
        """Reads the inputs of a request. Raises ValueError if the sample cannot be used or has no choices."""
        if not request.choices:
            raise ValueError("there are no choices")
        request = read(request, self.model)
        batch = self.model.batch([request.sample], **dataclasses.asdict(self._text))
        return OpenedRequest(request, batch.tokens.shape[1])

    def answer(self, requests: Sequence[Request], first: int) -> list[dict[str, Any]]:
        filled = [*requests, *[requests[-1]] * (self.rows - len(requests))]
        count = max(len(request.choices) for request in requests)
        with sharding.use_mesh(self.model.mesh):
            inputs = self._inputs(filled)
            columns = [self._column(filled, index, inputs) for index in range(count)]
        lines = []
        for request, *scores in zip(requests, *(column[:len(requests)] for column in columns), strict=True):
            scores = scores[:len(request.choices)]
            if not np.isfinite([loss for loss, *_ in scores]).all():
                lines.append({"error": "a choice has no finite loss: `mmjax doctor` shows which part of the model is "
                                       "broken"})
                continue
            line = dict(zip(("losses", "tokens", "padded"), map(list, zip(*scores, strict=True)), strict=True))
            lines.append({"answer": request.choices[chosen(line)], **line})
        return lines

    def _inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Returns the `Batch` fields that the choices share: features if the family has an encoder, else images."""
        model, rows = self.model, sharding.batch_sharding(self.model.mesh)
        batch = model.batch([request.sample for request in requests], **dataclasses.asdict(self._text))
        if not model.family.encoder or batch.images is None and batch.media is None:
            return {"images": jax.device_put(batch.images, rows)}
        return {"features": encode(model.module, model.params, jax.device_put(batch, rows))}

    def _column(self, requests: Sequence[Request], index: int,
                inputs: Mapping[str, Any]) -> list[tuple[float, int, int]]:
        """Returns (loss in nats, tokens, padded length) of each row's choice with that index, or of its last one."""
        answers = [request.choices[min(index, len(request.choices) - 1)] for request in requests]
        samples = [dataclasses.replace(request.sample, answer=answer)
                   for request, answer in zip(requests, answers, strict=True)]
        batch = text.rows(samples, self.model.tokenizer, self._text, self.model.config.image_tokens, multiple=MULTIPLE)
        whole = dataclasses.replace(jax.device_put(batch, sharding.batch_sharding(self.model.mesh)), **inputs)
        sums = np.asarray(losses(self.model.module, self.model.params, whole), np.float64)
        sums *= batch.padded_length - 1
        tokens = batch.loss_mask[:, 1:].sum(axis=1)
        return [(float(loss), int(count), int(length))
                for loss, count, length in zip(sums, tokens, batch.padded_length, strict=True)]


def chosen(line: Mapping[str, Sequence[float]], rule: Rule = "sum") -> int:
    """Returns the index of the best choice of a line of `Choices`; of equal ones the first.

    sum:      the most likely answer as a whole: the lowest sum of its tokens' losses
    mean:     the lowest loss per token, which does not favour short answers
    original: the sum over the padded length - 1 of the batch that scored it (minigpt_base.py: multi_select)
    """
    per = {"sum": [1] * len(line["losses"]), "mean": line["tokens"], "original": [n - 1 for n in line["padded"]]}[rule]
    return int(np.argmin(np.divide(line["losses"], per)))
