"""Several samples in one row, so that little of a batch is padding.

B rows   T places   F images a row   S side of an image

A row is `[sample][sample]...[padding]`; each sample is a segment of the places that `text.rows` gives it, with
positions from 0 on. The attention mask keeps segments apart (`families.base.causal_mask`), and as each begins with BOS,
which is never a target, no target is told from the segment before it.

For families whose images are soft tokens among the words (MiniGPT-4, MiniGPT-v2), and for LLaMA alone. ImageBind-LLM
and LLaMA-Adapter are refused: what they inject into the layers is one a row.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.batch import Batch, Sample
from mmjax.config import TextConfig
from mmjax.data import text
from mmjax.data.text import Tokenized
from mmjax.tokenizer import Tokenizer


class Size(NamedTuple):
    """What a sample takes of a row."""

    tokens: int
    images: int = 0

    def within(self, room: "Size") -> bool:
        return self.tokens <= room.tokens and self.images <= room.images


def pack(sizes: Iterable[Size], room: Size, rows: int) -> list[list[int]]:
    """The numbers of the samples that go into each row, in order. First fit: each into the first row with room for it.

    room: of an empty row

    The first sample that no row has room for ends the batch, so those taken are the first of the stream, and the next
    batch starts behind them. No more sizes are asked for. Raises ValueError naming a sample that an empty row has no
    room for.
    """
    placed: list[list[int]] = [[] for _ in range(rows)]
    free = [room] * rows
    for number, size in enumerate(sizes):
        if not size.within(room):
            raise ValueError(
                f"Sample {number} of the batch does not fit into a row: {size.tokens} tokens and {size.images} "
                f"images, a row has room for {room.tokens} and {room.images}. Raise that, or lower max_txt_len or "
                "max_context_len.")
        row = next((row for row in range(rows) if size.within(free[row])), None)
        if row is None:
            break
        placed[row].append(number)
        free[row] = Size(free[row].tokens - size.tokens, free[row].images - size.images)
    return placed


def packed(rows: Sequence[Sequence[Sample | Tokenized]], tokenizer: Tokenizer, settings: TextConfig, image_tokens: int,
           length: int) -> Batch:
    """A batch of rows of several samples each, with `images` left None.

    length: T, the places of every row

    A row's places are those of `text.rows` for all these samples, so the original's holes are where an unpacked batch
    of them has them; `padded_length` is T. Raises ValueError naming the rows whose samples do not fit, and what
    `text.rows` raises.
    """
    pieces, _ = text.row_slots([sample for row in rows for sample in row], tokenizer, settings, image_tokens)
    lengths = iter(map(len, pieces))
    taken = [sum(next(lengths) for _ in row) for row in rows]
    if too_long := [f"row {row}: {n} tokens" for row, n in enumerate(taken) if n > length]:
        raise ValueError(f"{len(too_long)} of {len(rows)} packed rows do not fit into {length} places:\n  "
                         + "\n  ".join(too_long))
    grid = text.empty_grid(len(rows), length, tokenizer)
    positions, segments = np.zeros((len(rows), length), np.int32), np.full((len(rows), length), -1, np.int32)
    following = iter(pieces)
    for row, samples in enumerate(rows):
        start = first_soft = 0
        for segment, sample in enumerate(samples):
            piece = next(following)
            here = row, slice(start, start + len(piece))
            grid[here] = piece
            grid[(*here, text.SOFT)] += np.where(piece[:, text.SOFT] >= 0, first_soft, 0)
            positions[here], segments[here] = np.arange(len(piece)), segment
            start += len(piece)
            images = (sample.sample if isinstance(sample, Tokenized) else sample).images
            first_soft += len(images) * image_tokens
    return text.batch(grid, positions, length, segments)


def check(config: Any) -> None:
    """Raises ValueError for a family that packed rows cannot feed; `config` is the family's."""
    if config.injects:
        raise ValueError("Packing is for models whose images are soft tokens of the text, and for a language model alone. "
                         "What this model injects into its layers is one a row: set data.pack_length = None.")
