"""Prompts cut at their left end, as `Chat` of MiniGPT-4 does; what mmjax does instead is in `mmjax.inference.chat`."""

import dataclasses

import numpy as np

from mmjax.batch import Batch


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
