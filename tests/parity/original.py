"""What MiniGPT-4's own code does around its model and mmjax does otherwise; the reference set recorded it so."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import linen as nn

from mmjax.batch import Batch
from mmjax.evaluate.rank import losses
from mmjax.tokenizer import Tokenizer

NO_CHOICE = 9999.0  # the loss of a candidate that a row does not have


def crop_left(batch: Batch, keep: int) -> Batch:
    """Prompts to be continued, each cut to its last `keep` tokens; positions start at 0 again.

    As `Chat` of the original does with a context that leaves no room for the answer: soft tokens count, and BOS goes
    first. Raises ValueError if nothing would be kept.
    """
    if keep < 1:
        raise ValueError(f"Cannot keep {keep} tokens of a prompt: max_length must be greater than max_new_tokens.")
    lengths = batch.valid.sum(axis=1)  # such rows have no holes
    places = np.arange(min(keep, batch.tokens.shape[1]))
    source = np.maximum(lengths - keep, 0)[:, None] + places

    def take(array: np.ndarray) -> np.ndarray:
        return np.take_along_axis(array, source, axis=1)

    return dataclasses.replace(
        batch, tokens=take(batch.tokens), soft_index=take(batch.soft_index), valid=take(batch.valid),
        loss_mask=take(batch.loss_mask), positions=batch.positions[:, places],
        padded_length=np.minimum(batch.padded_length, keep))


def answer_of_generate(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The answer in a generated sequence, as `MiniGPTBase.generate` reads it (evaluation prompts)."""
    ids = ids[1:] if len(ids) and ids[0] == 0 else ids  # a dummy first id 0 would be a word of some vocabularies
    words = tokenizer.decode(ids).split("</s>")[0].replace("<s>", "")
    return words.split("[/INST]")[-1].strip()


def answer_of_chat(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The answer in a generated sequence, as `Chat.answer` reads it and stores it in the conversation."""
    return tokenizer.decode(ids).split("###")[0].split("Assistant:")[-1].strip()


def multi_select(module: nn.Module, params: Any, candidates: Sequence[Batch],
                 counts: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(losses float32[B,A], ranks int[B,A] best first) of A answers to the same B prompts.

    candidates: for each answer the batch that scores it; its loss is each row's sum over the padded length - 1, so a
                rank depends on the other rows of the batch
    counts:     how many of the candidates each row really has; the others come last
    """
    found = np.stack([np.asarray(losses(module, params, batch)) for batch in candidates], axis=1)
    if counts is not None:
        absent = np.arange(found.shape[1]) >= np.asarray(counts)[:, None]
        found = np.where(absent, np.float32(NO_CHOICE), found)
    return found, np.argsort(found, axis=1, kind="stable")
