"""Packs several samples into one row, so that little of a batch is padding.

B rows   T slots   G groups of rows   N images of a group   S side of an image

A row is `[sample][sample]...[padding]`; each sample is a segment with the slots of `text.rows` and positions from 0
on. The attention mask separates segments (`families.base.causal_mask`). Each begins with BOS, which is never a target,
so no target is predicted from the previous segment.

The images of consecutive rows are one list of a fixed length, from which the rows take as many as they need. There is
one such group of rows for each shard of a batch, so each device encodes the images of its own rows.

For families whose images are soft tokens in the text (MiniGPT-4, MiniGPT-v2), and for a language model alone. Families
that inject vectors into their layers (ImageBind-LLM, LLaMA-Adapter) are refused: they have one injection for each row.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.batch import Batch, Sample
from mmjax.config import DataConfig, TextConfig
from mmjax.data import text
from mmjax.data.text import Tokenized
from mmjax.tokenizer import Tokenizer


class Size(NamedTuple):
    """The number of tokens and images of a sample or a row."""

    tokens: int
    images: int = 0

    def within(self, room: "Size") -> bool:
        """Returns whether this fits into `room`."""
        return self.tokens <= room.tokens and self.images <= room.images


TOKENS_PER_IMAGE = 160  # of a packed row, padding included, for captions of natural length (docs/data.md)


class Groups(NamedTuple):
    """The groups of consecutive packed rows that share a list of images.

    rows:   of a group
    images: of a group's list
    """

    rows: int
    images: int

    @staticmethod
    def of(data: DataConfig, shards: int) -> "Groups | None":
        """Returns the groups of a run's batches, one for each shard; None if rows are not packed."""
        if data.pack_length is None:
            return None
        per_row = data.pack_length / TOKENS_PER_IMAGE if data.pack_images is None else data.pack_images
        rows = data.batch_size // shards
        return Groups(rows, math.ceil(round(rows * per_row, 6)))


def pack(sizes: Iterable[Size], room: Size, rows: int, group_rows: int = 1) -> list[list[int]]:
    """Returns the indices of the samples in each row, in order. First fit: each goes into the first row with room.

    room:       tokens of an empty row, and images of an empty group
    group_rows: rows of a group

    The first sample that fits into no row ends the batch, so the batch has the first samples of the stream and the next
    batch starts after them. No further sizes are consumed. Raises ValueError naming a sample that does not fit into an
    empty row.
    """
    packed_rows: list[list[int]] = [[] for _ in range(rows)]
    tokens, images = [room.tokens] * rows, [room.images] * -(-rows // group_rows)
    for number, size in enumerate(sizes):
        if not size.within(room):
            raise ValueError(
                f"Sample {number} of the batch does not fit into a row: {size.tokens} tokens and {size.images} "
                f"images, but a row has room for {room.tokens} and {room.images}. Raise these, or lower max_txt_len or "
                "max_context_len.")
        row = next((row for row in range(rows) if size.within(Size(tokens[row], images[row // group_rows]))), None)
        if row is None:
            break
        packed_rows[row].append(number)
        tokens[row] -= size.tokens
        images[row // group_rows] -= size.images
    return packed_rows


def packed(rows: Sequence[Sequence[Sample | Tokenized]], tokenizer: Tokenizer, settings: TextConfig, image_tokens: int,
           length: int, group_rows: int = 1) -> Batch:
    """Returns a batch of rows of several samples each, without `images`.

    length:     T, the slots of every row
    group_rows: rows whose images are one list

    The slots of a sample are those of `text.rows` for all these samples, including the slots that the original masks;
    `padded_length` is T. Raises ValueError naming the rows whose samples do not fit, and the errors of `text.rows`.
    """
    segments_slots, _ = text.row_slots([sample for row in rows for sample in row], tokenizer, settings, image_tokens)
    lengths = iter(map(len, segments_slots))
    taken = [sum(next(lengths) for _ in row) for row in rows]
    if too_long := [f"row {row}: {n} tokens" for row, n in enumerate(taken) if n > length]:
        raise ValueError(f"{len(too_long)} of {len(rows)} packed rows do not fit into {length} slots:\n  "
                         + "\n  ".join(too_long))
    grid = text.empty_grid(len(rows), length, tokenizer)
    positions, segments = np.zeros((len(rows), length), np.int32), np.full((len(rows), length), -1, np.int32)
    following, first_soft = iter(segments_slots), 0
    for row, samples in enumerate(rows):
        start, first_soft = 0, first_soft if row % group_rows else 0
        for segment, sample in enumerate(samples):
            slots = next(following)
            index = row, slice(start, start + len(slots))
            grid[index] = slots
            grid[(*index, text.SOFT)] += np.where(slots[:, text.SOFT] >= 0, first_soft, 0)
            positions[index], segments[index] = np.arange(len(slots)), segment
            start += len(slots)
            images = (sample.sample if isinstance(sample, Tokenized) else sample).images
            first_soft += len(images) * image_tokens
    return text.batch(grid, positions, length, segments)


def check(config: Any) -> None:
    """Raises ValueError for a family that does not support packed rows; `config` is the family's."""
    if config.injects:
        raise ValueError("Packing is for models whose images are soft tokens of the text, and for a language model "
                         "alone. This model has one injection for each row: set data.pack_length = None.")
