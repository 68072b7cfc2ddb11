"""Samples to batches: text, and pictures or whatever else a model's senses take."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.batch import Batch, Sample
from mmjax.config import TextConfig
from mmjax.data import images, packing, senses, text
from mmjax.data.features import Features
from mmjax.data.packing import Size
from mmjax.tokenizer import WORDS, Tokenizer


def collate(samples: Sequence[Sample], tokenizer: Tokenizer, settings: TextConfig, config: Any,
            length: int | None = None, multiple: int = 1) -> Batch:
    """Samples to a batch, one a row; `config` is the family's, `length` and `multiple` are those of `text.rows`.

    Raises ValueError naming the rows, pictures or settings that cannot be used.
    """
    _check_senses(samples, config)
    rows = text.rows(samples, tokenizer, settings, config.image_tokens, length, multiple)
    if config.senses:
        media, weights = senses.stack(samples, config.imagebind, tokenizer.folder / WORDS)
        return dataclasses.replace(rows, media=media, weights=weights)
    pictures = None if config.image_size is None else images.stack(samples, config)
    return dataclasses.replace(rows, images=pictures)


@dataclasses.dataclass(frozen=True)
class Collator:
    """How a run's samples become batches; see `mmjax.data.pipeline.Collator`.

    config:        the family's
    most_pictures: pictures of every packed row; None where rows are not packed
    features:      what the encoder makes of the pictures, read in place of them; None: pictures are
    """

    tokenizer: Tokenizer
    text: TextConfig
    config: Any
    most_pictures: int | None = None
    features: Features | None = None

    def __post_init__(self):
        if self.most_pictures is not None:
            packing.check(self.config)

    @property
    def blank(self) -> np.ndarray:
        if self.features is not None:
            return self.features.blank
        side = self.config.image_size or 1  # of a language model alone there are no pictures
        return np.zeros((side, side, 3), np.uint8)

    def size(self, sample: Sample) -> Size:
        """See `pipeline.Collator`. Raises ValueError naming what this model or the text settings do not take."""
        _check_senses([sample], self.config)
        ((places,), _) = text.row_places([sample], self.tokenizer, self.text, self.config.image_tokens)
        return Size(len(places), len(sample.images))

    def picture(self, image: Any, random: np.random.Generator | None) -> np.ndarray:
        """uint8[S,S,3], or of one that comes normalised float32[3,S,S]; or its feature. Raises ValueError as
        `images.load` and `Features.find` do."""
        if self.features is not None:
            return self.features.picture(image, random)
        return images.load(image, self.config.image_size, self.config.crops, random)

    def batch(self, rows: Sequence[Sequence[Sample]], length: int) -> Batch:
        """Raises ValueError as `collate` does."""
        if self.features is not None:
            feature = self.features.stack(rows, self.config.image_tokens > 0, self.most_pictures)
            media = None if feature is None else {"feature": feature}
            return dataclasses.replace(self._words(rows, length), media=media)
        if self.most_pictures is None:
            return collate([sample for (sample,) in rows], self.tokenizer, self.text, self.config, length)
        return dataclasses.replace(
            self._words(rows, length), images=_stacked(rows, self.config, self.most_pictures))

    def _words(self, rows: Sequence[Sequence[Sample]], length: int) -> Batch:
        places = self.config.image_tokens
        if self.most_pictures is None:
            return text.rows([sample for (sample,) in rows], self.tokenizer, self.text, places, length)
        return packing.packed(rows, self.tokenizer, self.text, places, length)


def _stacked(rows: Sequence[Sequence[Sample]], config: Any, most: int) -> np.ndarray | None:
    """`Batch.images` of packed rows, [B,F,...] with F = `most`: behind a row's own pictures stand black ones."""
    if config.image_size is None:
        return None
    together = [Sample(images=[picture for sample in row for picture in sample.images]) for row in rows]
    pictures = images.stack(together, config)
    if pictures is None:
        return np.zeros((len(rows), most, config.image_size, config.image_size, 3), np.uint8)
    return np.pad(pictures, [(0, 0), (0, most - pictures.shape[1])] + [(0, 0)] * (pictures.ndim - 2))


def _check_senses(samples: Sequence[Sample], config: Any) -> None:
    if config.senses:
        return
    if more := [row for row, sample in enumerate(samples) if sample.media or sample.weights]:
        raise ValueError(f"Rows {more} have media or weights, but this model does not mix senses.")
    if config.image_size is None and (seeing := [row for row, sample in enumerate(samples) if sample.images]):
        raise ValueError(f"Rows {seeing} have pictures, but this is a language model without a picture tower.")
