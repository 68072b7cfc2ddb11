"""Encodes a run's images once with its frozen encoder, so that training reads features instead of images.

N images at once   K crops of each

A feature is what `Model.feature` returns for one image: for MiniGPT-4 the projector's input, [Q,E]; for ImageBind-LLM
the mix of senses of the image alone, [E]; for LLaMA-Adapter v2 CLIP's output, [S,E]. One host encodes all images.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmjax import files, sharding, trees
from mmjax.batch import Batch, Sample
from mmjax.checkpoints import converted
from mmjax.checkpoints.restore import ModelSpec
from mmjax.config import RunConfig, WeightsConfig
from mmjax.data import collate, images, pipeline
from mmjax.data import features as stored
from mmjax.data.features import Card, Features, ImageBytes, ImageNames, Writer
from mmjax.data.formats import Record
from mmjax.families import shapes
from mmjax.families.base import ImageSpec

CROPS = 4  # of an image that is cropped at random
RANDOM = "random crops"  # the part of an image that the encoder sees
VISIBLE = {"center_crop": "the middle", "stretch": "the whole, squashed", "pad": "the whole, padded"}
ERRORS = "features_errors.jsonl"
AHEAD = 3  # batches of images that are read while one is encoded
console = Console(stderr=True, markup=False)


@dataclasses.dataclass(frozen=True)
class EncodeResult:
    """The result of `make`.

    images: number of images that have features, the image of zeros included
    added:  number of them that this call encoded
    unread: number of images that could not be read; `features_errors.jsonl` lists them
    nbytes: size of all features
    """

    folder: Path
    card: Card
    images: int
    added: int
    unread: int

    @property
    def nbytes(self) -> int:
        return self.images * self.card.crops * self.card.nbytes


# ---- the identity of an encoder ----


def encoder(source: converted.ConvertedCheckpoint, weights: WeightsConfig,
            earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Returns what identifies an encoder, without reading its weights.

    files:        SHA-256 of the released files that the encoder's parameters were converted from
    architecture: of the encoder's parts, image size included
    dtypes:       of its activations and of its large matrices
    trained:      a hash of its parameters that earlier runs trained (`earlier`, by path); None if there are none

    Raises ValueError for a family without an image encoder, and for a checkpoint that does not name its files.
    """
    parts, config = source.family.encoder, source.config
    if not parts or config.image_size is None:
        raise ValueError(f"The model of {source.folder} has no image encoder whose features could be stored: set "
                         "data.features = None.")
    path = source.folder / converted.CARD
    files = converted.read_checkpoint_card(source.folder).get("sources", {})
    used = {part: getattr(config, part) for part in parts}
    if unknown := [part for part, cfg in used.items() if cfg is not None and "sha256" not in files.get(part, {})]:
        raise ValueError(f"{path} does not name the source file of {', '.join(unknown)}, so its features cannot be "
                         "distinguished from another encoder's. Convert the checkpoint again.")
    return {
        "files": {part: files[part]["sha256"] for part, cfg in used.items() if cfg is not None},
        "architecture": {part: cfg and dataclasses.asdict(cfg) for part, cfg in used.items()},
        "dtypes": [weights.dtype, weights.frozen_dtype or weights.dtype],
        "trained": _hash({path: leaf for path, leaf in (earlier or {}).items() if source.family.in_encoder(path)}),
    }


def _hash(parameters: dict[str, Any]) -> str | None:
    if not parameters:
        return None
    digest = hashlib.sha256()
    for path in sorted(parameters):
        array = np.asarray(parameters[path])
        digest.update(f"{path} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def transform(config: RunConfig, model: Any) -> dict[str, Any]:
    """Returns how images become the encoder's input: the side of the square, and the part of an image in it."""
    cut = RANDOM if config.data.random_crop else VISIBLE[model.images.fit]
    return {"size": model.image_size, "cut": cut}


def load(config: RunConfig, source: converted.ConvertedCheckpoint, rules: Sequence[str],
         records: Sequence[Sequence[Record]], earlier: dict[str, Any] | None = None) -> Features:
    """Opens the features of `config.data.features` for a run.

    source:  with the run's architecture
    rules:   path rules of the parameters that the run trains
    records: of each of its sources
    earlier: trained parameters of earlier runs

    Raises FileNotFoundError or ValueError if there are no features, if the run trains the encoder, or if encoder,
    transform or images differ from those of the features.
    """
    family = source.family
    trained = [path for path in shapes(family, source.config) if family.in_encoder(path) and trees.matches(path, rules)]
    if trained or config.drop_path:
        what = f"{trained[0]} and {len(trained) - 1} more of its parameters" if trained else "drop_path"
        raise ValueError(f"data.features = {config.data.features}: this run trains the encoder ({what}), so its "
                         "features change with every step. Set data.features = None, or leave the encoder frozen.")
    features = Features(config.data.features)
    stored.check(features.folder, features.card, encoder(source, config.weights, earlier),
                 transform(config, source.config))
    features = features.of(config.data.sources, records)
    console.print(f"Features are read from {features.folder} in place of images; the encoder is not loaded.",
                  highlight=False)
    return features


# ---- encoding ----


def make(config: RunConfig, source: converted.ConvertedCheckpoint, folder: Path, crops: int | None = None,
         dtype: str | None = None, batch_size: int = 64) -> EncodeResult:
    """Encodes the images of a run's data that `folder` has no features of, and stores their features.

    source:     with the run's architecture
    crops:      number of crops of each image, if images are cropped at random; None for 4
    dtype:      of the stored numbers; None for the encoder's dtype, which is exact
    batch_size: crops that are encoded at once

    `features_errors.jsonl` lists images that cannot be read. Raises ValueError for a model without an image encoder,
    for crops of images that are not cropped and for a folder with other features, BlockingIOError if another process
    writes to the folder, and what the sources' readers raise.
    """
    if jax.process_count() > 1:
        raise ValueError(f"Features are encoded by one process, this is one of {jax.process_count()}: run `mmjax data "
                         "features` on one host, with `out` where all hosts can read it.")
    files.require_local({"folder": folder})
    earlier = _earlier(config)
    encoder_card = encoder(source, config.weights, earlier)
    collate.check_model(config.data, source.config)
    spec = ModelSpec(source, sharding.make_mesh(config.mesh), config.weights.dtype, config.weights.frozen_dtype)
    card = Card(encoder_card, transform(config, source.config), _crops(config, crops),
                config.data.seed if config.data.random_crop else 0, dtype or config.weights.dtype,
                feature_shape(spec))
    records = pipeline.read(config.data)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())
    with Writer(folder, card) as writer, Progress(*columns, console=console) as bar:
        names = writer.names(config.data.sources, records)
        keys, indices = _images(records, names, not source.config.image_tokens, bar)
        new = indices[stored.missing(writer.keys, keys)]
        unread = 0
        if len(new):
            rows, encode = _encoder(spec, earlier, card, batch_size)
            chunk = rows // card.crops
            with concurrent.futures.ThreadPoolExecutor(config.data.threads) as pool:
                opened = _prefetch(pool, _ImageReader(records, names, card, source.config.images), new, AHEAD * chunk)
                task = bar.add_task("encoding", total=len(new))
                unread = _store(opened, encode, chunk, writer, lambda n: bar.advance(task, n))
    return EncodeResult(folder, writer.card, len(writer.index), len(new) - unread, unread)


def summary(result: EncodeResult) -> Iterator[str]:
    """Yields lines that describe the result of `make`."""
    card = result.card
    shape = " x ".join(map(str, card.shape))
    yield (f"{result.folder}: {result.images:,} images, {result.added:,} of them new, {card.crops} x {shape} "
           f"{card.dtype} each: {card.crops * card.nbytes / 1e6:.3f} MB an image, {result.nbytes / 1e9:.3f} GB in all")
    if result.unread:
        yield f"{result.unread:,} images cannot be read; {result.folder / ERRORS} lists them"
    yield f"To train on them: --data.features {result.folder}"


def _crops(config: RunConfig, crops: int | None) -> int:
    if not config.data.random_crop:
        if crops not in (None, 1):
            raise ValueError(f"crops = {crops}, but this run's images are not cropped at random (data.random_crop): "
                             "each has one feature.")
        return 1
    if crops is not None and crops < 1:
        raise ValueError(f"crops = {crops}: at least 1")
    return CROPS if crops is None else crops


def _earlier(config: RunConfig) -> dict[str, Any] | None:
    """Returns the trained parameters of earlier runs. A run that does not exist yet is assumed not to train the
    encoder; if it does, the later run refuses the features."""
    start_from = config.weights.start_from
    if start_from is None:
        return None
    if not (Path(start_from) / converted.RUN_CARD).is_file():
        console.print(f"The run {start_from} does not exist yet; its encoder is assumed to be the checkpoint's.",
                      highlight=False)
        return None
    return converted.trained_params(Path(start_from))


def feature_shape(spec: ModelSpec) -> tuple[int, ...]:
    """Returns the shape of one image's feature."""
    config = spec.source.config
    blank = np.zeros((config.image_size, config.image_size, 3), np.uint8)
    params = trees.unflatten(shapes(spec.source.family, config))
    return jax.eval_shape(_feature(spec.module), params, _batch([blank], config)).shape[1:]


def _feature(module: Any) -> Callable[[Any, Batch], jax.Array]:
    """Returns a function from (params, batch of one image a row) to the features [N,...]."""

    def feature(params: Any, batch: Batch) -> jax.Array:
        features = module.apply({"params": params}, batch, method="feature")
        return features[:, 0] if module.cfg.image_tokens else features  # with image tokens [N,F,...]

    return feature


def _batch(images: Sequence[np.ndarray | None], model: Any) -> Batch:
    """Returns rows of one image each, without text; None is the image of zeros. `model` is the family's config."""
    samples = [Sample(images=[] if image is None else [image]) for image in images]
    zeros = np.zeros((len(samples), 1), np.int32)
    batch = Batch(tokens=zeros, soft_index=zeros - 1, valid=zeros == 0, loss_mask=zeros != 0, positions=zeros,
                  padded_length=zeros[:, 0] + 1)
    return dataclasses.replace(batch, **collate.inputs(samples, model))


def _images(records: Sequence[Sequence[Record]], names: ImageNames, with_blank: bool,
            bar: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Returns (keys uint64[M,2], indices int64[M,2]) of the records' images; an index is (source, record).

    with_blank: the image of zeros comes first, with the index (-1, -1)
    """
    total = sum(map(len, records))
    keys, indices = np.empty((total + 1, 2), np.uint64), np.empty((total + 1, 2), np.int64)
    count = 0
    if with_blank:
        keys[0], indices[0], count = stored.key(names(None)), -1, 1
    task = bar.add_task("listing", total=total)
    for source, its_records in enumerate(records):
        for index in range(len(its_records)):
            bar.advance(task)
            try:
                record = its_records[index]
            except (ValueError, OSError):  # training skips them too
                continue
            if record.image is not None and record.problem is None:
                keys[count], indices[count] = stored.key(names(record.image)), (source, index)
                count += 1
    return keys[:count], indices[:count]


@dataclasses.dataclass(frozen=True)
class _OpenedImage:
    """An image ready for the encoder, as K crops; or a description of its problem."""

    name: str
    file: str
    key: np.ndarray
    content: int = 0
    crops: tuple[np.ndarray | None, ...] = ()
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class _ImageReader:
    """Opens images by their index, see `_images`."""

    records: Sequence[Sequence[Record]]
    names: ImageNames
    card: Card
    images: ImageSpec

    def __call__(self, index: np.ndarray) -> _OpenedImage:
        source, number = map(int, index)
        if source < 0:
            return _OpenedImage("", "", stored.key(self.names(None)), crops=(None,) * self.card.crops)
        record = self.records[source][number]
        name = self.names(record.image)
        opened = _OpenedImage(record.name, str(record.image), stored.key(name))
        try:
            held = ImageBytes.of(record.image)
            whole = images.rgb(held)
        except (ValueError, OSError) as error:
            return dataclasses.replace(opened, problem=str(error))
        crops = tuple(self._crop(whole, name, crop) for crop in range(self.card.crops))
        return dataclasses.replace(opened, content=stored.content_hash(held.content), crops=crops)

    def _crop(self, whole: Any, name: str, crop: int) -> np.ndarray:
        random = stored.crop_random(self.card.seed, name, crop) if self.card.transform["cut"] == RANDOM else None
        return images.read(whole, self.images, random)


def _store(opened: Iterator[_OpenedImage], encode: Callable[[Sequence[_OpenedImage]], np.ndarray], chunk_size: int,
           writer: Writer, advance: Callable[[int], None]) -> int:
    """Encodes images in chunks and stores their features; returns the number of images that could not be read."""
    unread = 0
    with (writer.folder / ERRORS).open("w") as errors:
        while chunk := list(itertools.islice(opened, chunk_size)):
            for image in chunk:
                if image.problem is not None:
                    line = {"name": image.name, "file": image.file, "problem": image.problem}
                    errors.write(json.dumps(line) + "\n")
                    unread += 1
            if good := [image for image in chunk if image.problem is None]:
                for image, features in zip(good, encode(good), strict=True):
                    writer.add(image.key, image.content, features)
            advance(len(chunk))
    return unread


def _prefetch(pool: concurrent.futures.Executor, reader: _ImageReader, indices: np.ndarray,
              limit: int) -> Iterator[_OpenedImage]:
    """Yields the images at these indices in order, with at most `limit` of them open."""
    pending: collections.deque[concurrent.futures.Future[_OpenedImage]] = collections.deque()
    for index in indices:
        pending.append(pool.submit(reader, index))
        if len(pending) >= limit:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _encoder(spec: ModelSpec, earlier: dict[str, Any] | None, card: Card,
             batch_size: int) -> tuple[int, Callable[[Sequence[_OpenedImage]], np.ndarray]]:
    """Returns the number of rows of a call, and a function from at most that many crops' images to features [n,K,...].

    Loads only the encoder.
    """
    source, mesh = spec.source, spec.mesh
    params = trees.flatten(spec.restore(None, earlier, source.family.in_encoder))
    # Flax requires a module's own parameters whichever method is called; these are not read.
    params |= {path: jnp.zeros(shape.shape, spec.dtype) for path, shape in shapes(source.family, source.config).items()
               if "/" not in path}
    module = spec.module.clone(kernels=spec.module.kernels.for_encoding())
    params, batch_sharding, feature = trees.unflatten(params), sharding.batch_sharding(mesh), _feature(module)
    call = jax.jit(lambda params, batch: feature(params, batch).astype(card.dtype))
    num_shards = sharding.num_shards(mesh, "batch")
    rows = -(-max(batch_size, card.crops) // num_shards) * num_shards

    def encode(images: Sequence[_OpenedImage]) -> np.ndarray:
        crops = [crop for image in images for crop in image.crops]
        filled = crops + crops[-1:] * (rows - len(crops))  # one shape, one compiled function
        with sharding.use_mesh(mesh):
            batch = jax.device_put(_batch(filled, source.config), batch_sharding)
            features = np.asarray(call(params, batch))[:len(crops)]
        return features.reshape(len(images), card.crops, *features.shape[1:])

    return rows, encode
