"""Collates samples into batches: text, and images or other inputs of a model's senses."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmjax.batch import Batch, Sample
from mmjax.config import DataConfig, RunConfig, TextConfig
from mmjax.data import images, packing, senses, text
from mmjax.data.features import Features
from mmjax.data.text import Tokenized
from mmjax.families.base import FamilyConfig
from mmjax.tokenizer import WORDS, Tokenizer


def collate(samples: Sequence[Sample | Tokenized], tokenizer: Tokenizer, settings: TextConfig, config: FamilyConfig,
            length: int | None = None, multiple: int = 1) -> Batch:
    """Returns a batch with one sample in each row; `length` and `multiple` are those of `text.rows`.

    Raises ValueError naming the rows, images or settings that cannot be used.
    """
    plain = [_sample(sample) for sample in samples]
    check_senses(plain, config)
    rows = text.rows(samples, tokenizer, settings, config.image_tokens, length, multiple)
    return dataclasses.replace(rows, **inputs(plain, config, tokenizer.folder / WORDS))


def inputs(samples: Sequence[Sample], config: FamilyConfig, merges: Path | None = None) -> dict[str, Any]:
    """Returns the fields of a `Batch` that the encoder of a model reads. merges: file of the text sense's merges"""
    if config.senses:
        return senses.stack(samples, config.media, merges)
    return {"images": None if config.images is None else images.stack(samples, config.images)}


@dataclasses.dataclass(frozen=True)
class Collator:
    """Makes batches of a run's samples; see `mmjax.data.pipeline.CollatorProtocol`.

    config:   the config of the family
    groups:   of packed rows; None if rows are not packed
    features: stored outputs of the encoder, read in place of images; None to read images
    """

    tokenizer: Tokenizer
    text: TextConfig
    config: FamilyConfig
    groups: packing.Groups | None = None
    features: Features | None = None

    def __post_init__(self):
        if self.groups is not None:
            packing.check(self.config)

    @staticmethod
    def of(config: RunConfig, tokenizer: Tokenizer, model: FamilyConfig,
           features: Features | None = None, shards: int = 1) -> "Collator":
        """Returns the collator of a run; `model` is the config of the model that it trains. shards: of a batch"""
        return Collator(tokenizer, config.text, model, packing.Groups.of(config.data, shards), features)

    @property
    def blank(self) -> np.ndarray:
        if self.features is not None:
            return self.features.blank
        side = self.config.image_size or 1  # a language model without an encoder has no images
        return np.zeros((side, side, 3), np.uint8)

    def tokenize(self, sample: Sample) -> Tokenized:
        """Tokenises a sample. Raises ValueError naming what the model or the text settings do not support."""
        check_senses([sample], self.config)
        tokenized = text.tokenize([sample], self.tokenizer, self.text, self.config.image_tokens)[0]
        llm = self.config.llm
        if llm.learned_positions and tokenized.length > llm.max_positions:
            raise ValueError(f"This sample has {tokenized.length} tokens, images included, but the language model has "
                             f"{llm.max_positions} positions. Shorten its text, or lower text.max_txt_len.")
        return tokenized

    def image(self, image: Any, random: np.random.Generator | None) -> np.ndarray:
        """Returns uint8[S,S,3], float32[3,S,S] for a normalised image, or the image's feature.

        Raises the errors of `images.load` and `Features.find`.
        """
        if self.features is not None:
            return self.features.feature_of(image, random)
        return images.read(image, self.config.images, random)

    def batch(self, rows: Sequence[Sequence[Tokenized]], length: int) -> Batch:
        """Returns the batch of rows of tokenised samples. Raises the errors of `collate`."""
        if self.features is None and self.groups is None:
            return collate([sample for (sample,) in rows], self.tokenizer, self.text, self.config, length)
        size, most = self.groups or (1, None)
        samples = [[sample.sample for row in rows[start:start + size] for sample in row]
                   for start in range(0, len(rows), size)]
        if self.features is not None:
            features = self.features.stack(samples, self.config.image_tokens > 0, most)
            return dataclasses.replace(self._tokens(rows, length), features=features)
        return dataclasses.replace(self._tokens(rows, length), images=_packed_images(samples, self.config, most))

    def _tokens(self, rows: Sequence[Sequence[Tokenized]], length: int) -> Batch:
        slots = self.config.image_tokens
        if self.groups is None:
            return text.rows([sample for (sample,) in rows], self.tokenizer, self.text, slots, length)
        return packing.packed(rows, self.tokenizer, self.text, slots, length, self.groups.rows)


def check_model(data: DataConfig, model: FamilyConfig) -> None:
    """Raises ValueError for settings of the data that a model does not support: random crops, packed rows."""
    images = model.images
    if data.random_crop and not (images and images.fit == "center_crop"):
        raise ValueError("data.random_crop is for models that crop images; this model "
                         + (f"reads images with the fit {images.fit!r}" if images else "reads no images")
                         + ". Set data.random_crop = False.")
    if data.pack_length is not None:
        packing.check(model)


def batch_spec(config: FamilyConfig, rows: int, length: int, sharding: Any, groups: packing.Groups | None = None,
               feature: jax.ShapeDtypeStruct | None = None) -> Batch:
    """Returns the batch that a `Collator` makes of rows with an image each, as shapes; nothing is allocated.

    groups:  of packed rows; None if rows are not packed
    feature: of one image, if features are read in place of images
    """

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

    def list_of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        """Of images: a list for each row, or for each group."""
        size, count = groups or (1, 1)
        return jax.ShapeDtypeStruct((rows // size, count, *shape), dtype, sharding=sharding)

    numbers, flags = array(np.int32, length), array(np.bool_, length)
    batch = Batch(numbers, numbers, flags, flags, numbers, array(np.int32),
                  segments=None if groups is None else numbers)
    spec = config.images
    if spec is None:
        return batch
    if feature is not None:
        made = list_of if spec.tokens else array
        return dataclasses.replace(batch, features=made(feature.dtype, *feature.shape))
    pixels = list_of(np.uint8, spec.size, spec.size, 3)
    if config.senses:
        return dataclasses.replace(batch, images=pixels, image_valid=array(np.bool_, 1),
                                   weights={"image": array(np.float32)})
    return dataclasses.replace(
        batch, images=pixels if spec.tokens else list_of(np.float32, 3, spec.size, spec.size))


def _packed_images(groups: Sequence[Sequence[Sample]], config: FamilyConfig, most: int) -> np.ndarray | None:
    """Returns `Batch.images` of the samples of each group, [G,N,...] with N = `most`; black images follow a group's."""
    if config.images is None:
        return None
    joined = [Sample(images=[image for sample in group for image in sample.images]) for group in groups]
    pixels = images.stack(joined, config.images)
    if pixels is None:
        return np.zeros((len(groups), most, config.image_size, config.image_size, 3), np.uint8)
    return np.pad(pixels, [(0, 0), (0, most - pixels.shape[1])] + [(0, 0)] * (pixels.ndim - 2))


def _sample(sample: Sample | Tokenized) -> Sample:
    return sample.sample if isinstance(sample, Tokenized) else sample


def check_senses(samples: Sequence[Sample], config: FamilyConfig) -> None:
    """Raises ValueError naming the rows with inputs that a model does not read."""
    if config.senses:
        return
    if mixed := [row for row, sample in enumerate(samples) if sample.media or sample.weights]:
        raise ValueError(f"Rows {mixed} have media or weights, but this model does not mix senses.")
    if config.images is None and (with_images := [row for row, sample in enumerate(samples) if sample.images]):
        raise ValueError(f"Rows {with_images} have images, but this is a language model without an image encoder.")
