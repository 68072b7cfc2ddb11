"""Several samples in one row, so that little of a batch is padding.

B rows   T places   F pictures a row   S side of a picture

A row is `[sample][sample]...[padding]`; each sample is a segment of the places that `text.rows` gives it, with
positions from 0 on. The attention mask keeps segments apart (`families.base.causal_mask`), and as each begins with BOS,
which is never a target, no target is told from the segment before it.

For families whose pictures are soft tokens among the words (MiniGPT-4, MiniGPT-v2), and for LLaMA alone. ImageBind-LLM
and LLaMA-Adapter are refused: what they inject into the layers is one a row.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mmjax.batch import Batch, Sample
from mmjax.config import TextConfig
from mmjax.data import images, text
from mmjax.tokenizer import Tokenizer


class Size(NamedTuple):
    """What a sample takes of a row."""

    tokens: int
    pictures: int = 0


def pack(sizes: Iterable[Size], length: int, rows: int, most_pictures: int) -> list[list[int]]:
    """The numbers of the samples that go into each row, in order. First fit: each into the first row with room for it.

    length, most_pictures: tokens and pictures that a row has room for

    The first sample that no row has room for ends the batch, so those taken are the first of the stream, and the next
    batch starts behind them. No more sizes are asked for. Raises ValueError naming a sample that an empty row has no
    room for.
    """
    placed: list[list[int]] = [[] for _ in range(rows)]
    free = [Size(length, most_pictures)] * rows
    for number, size in enumerate(sizes):
        if size.tokens > length or size.pictures > most_pictures:
            raise ValueError(
                f"Sample {number} of the batch does not fit into a row: {size.tokens} tokens and {size.pictures} "
                f"pictures, a row has room for {length} and {most_pictures}. Raise that, or lower max_txt_len or "
                "max_context_len.")
        room = (row for row in range(rows)
                if size.tokens <= free[row].tokens and size.pictures <= free[row].pictures)
        row = next(room, None)
        if row is None:
            break
        placed[row].append(number)
        free[row] = Size(free[row].tokens - size.tokens, free[row].pictures - size.pictures)
    return placed


def packed(samples: Iterable[Sample], tokenizer: Tokenizer, settings: TextConfig, config: Any, length: int, rows: int,
           most_pictures: int = 0) -> tuple[Batch, int]:
    """A batch of packed rows from the head of a stream, and how many samples it took.

    samples:       read up to the first that no row has room for; pictures are loaded of those taken alone
    config:        the family's
    length, rows:  T and B
    most_pictures: F, also where a batch has fewer or none: black ones that no soft token refers to fill it up

    A row's places are those of `text.rows` for all samples taken, so the original's holes are where an unpacked batch
    of these samples has them; `padded_length` is T. Rows may be empty once the stream is at its end. Raises ValueError
    for a family that packed rows cannot feed, for no samples at all, and for the first sample that does not fit into a
    row or cannot become one, by its number in the batch.
    """
    _check_family(config, most_pictures)
    read: list[Sample] = []
    sizes: list[Size] = []

    def measured() -> Iterator[Size]:
        for sample in samples:
            read.append(sample)
            sizes.append(_size(len(sizes), sample, tokenizer, settings, config))
            yield sizes[-1]

    placed = pack(measured(), length, rows, most_pictures)
    taken = sum(map(len, placed))
    apart = text.rows(read[:taken], tokenizer, settings, config.image_tokens)

    shape = (rows, length)
    tokens, soft_index = np.full(shape, tokenizer.pad, np.int32), np.full(shape, -1, np.int32)
    valid, loss_mask = np.zeros(shape, bool), np.zeros(shape, bool)
    positions, segments = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    for row, numbers in enumerate(placed):
        start = first_soft = 0
        for segment, number in enumerate(numbers):
            n = sizes[number].tokens
            here = row, slice(start, start + n)
            soft = apart.soft_index[number, :n]
            soft_index[here] = np.where(soft >= 0, soft + first_soft, -1)
            for array, source in ((tokens, apart.tokens), (valid, apart.valid), (loss_mask, apart.loss_mask),
                                  (positions, apart.positions)):
                array[here] = source[number, :n]
            segments[here] = segment
            start += n
            first_soft += sizes[number].pictures * config.image_tokens
    pictures = None
    if most_pictures:
        pictures = _stack([[read[number] for number in numbers] for numbers in placed], config, most_pictures)
    padded_length = np.full(rows, length, np.int32)
    batch = Batch(tokens, soft_index, valid, loss_mask, positions, padded_length, pictures, segments=segments)
    return batch, taken


def _size(number: int, sample: Sample, tokenizer: Tokenizer, settings: TextConfig, config: Any) -> Size:
    if sample.media or sample.weights:
        raise ValueError(f"Sample {number} of the batch has media or weights, but this model does not mix senses.")
    if sample.images and config.image_size is None:
        raise ValueError(f"Sample {number} of the batch has pictures, but this is a language model without a picture "
                         "tower.")
    try:
        alone = text.rows([sample], tokenizer, settings, config.image_tokens)
    except ValueError as error:
        raise ValueError(f"Sample {number} of the batch cannot become a row:\n{error}") from error
    return Size(alone.tokens.shape[1], len(sample.images))


def _stack(rows: list[list[Sample]], config: Any, most: int) -> np.ndarray:
    """`Batch.images` of packed rows, [B,F,...]."""
    together = [Sample(images=[picture for sample in row for picture in sample.images]) for row in rows]
    pictures = images.stack(together, config)
    if pictures is None:
        return np.zeros((len(rows), most, config.image_size, config.image_size, 3), np.uint8)
    return np.pad(pictures, [(0, 0), (0, most - pictures.shape[1])] + [(0, 0)] * 3)


def _check_family(config: Any, most_pictures: int) -> None:
    if config.senses or config.llama.injection:
        raise ValueError("Packing is for models whose pictures are soft tokens among the words (MiniGPT-4, MiniGPT-v2) "
                         "and for LLaMA alone. What this model injects into its layers is one a row: give one sample a "
                         "row.")
    if most_pictures and config.image_size is None:
        raise ValueError(f"most_pictures = {most_pictures}: this is a language model without a picture tower, give 0.")
