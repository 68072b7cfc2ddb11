"""The features of a run's images: its frozen encoder runs over each of them once, and training reads what came out.

N images at once   K crops of each

Stored is what `Model.feature` gives of one image: of MiniGPT-4 what the projector reads, [Q,E]; of ImageBind-LLM the
mix of senses that a image alone makes, [E]; of LLaMA-Adapter v2 what CLIP sees, [S,E]. One host makes them.
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
from mmjax.data import features as stored
from mmjax.data import images, pipeline
from mmjax.data.collate import inputs
from mmjax.data.features import Card, Features, Held, ImageNames, Writer
from mmjax.data.formats import Record
from mmjax.families import shapes
from mmjax.families.base import ImageSpec

CROPS = 4  # of a image that is cropped at random
RANDOM = "random crops"  # what the encoder sees of an image
SEEN = {"center_crop": "the middle", "stretch": "the whole, squashed", "pad": "the whole, padded"}
ERRORS = "features_errors.jsonl"
AHEAD = 3  # batches whose images are read while one is computed
console = Console(stderr=True, markup=False)


@dataclasses.dataclass(frozen=True)
class Made:
    """What a call of `make` did.

    images: that there are features of now, the image of zeros among them
    added:    of them now
    unread:   images that could not be read; `features_errors.jsonl` names them
    nbytes:   of all features
    """

    folder: Path
    card: Card
    images: int
    added: int
    unread: int

    @property
    def nbytes(self) -> int:
        return self.images * self.card.crops * self.card.nbytes


# ---- what features are of ----


def encoder(source: converted.ConvertedCheckpoint, weights: WeightsConfig, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """What a feature depends on beside its image; known without reading a weight of the encoder.

    files:        SHA-256 of the released files that the encoder's parameters were converted from
    architecture: of the encoder's parts, image size included
    dtypes:       in which it computes, and in which its large matrices are held if in another
    trained:      a hash of those of its parameters that earlier runs have trained (`earlier`, by path); None of none

    Raises ValueError for a family without an encoder of images, and for a checkpoint that does not name its files.
    """
    parts, config = source.family.encoder, source.config
    if not parts or config.image_size is None:
        raise ValueError(f"The model of {source.folder} has no encoder of images whose features could be stored: set "
                         "data.features = None.")
    path = source.folder / converted.CARD
    files = converted.read_checkpoint_card(source.folder).get("sources", {})
    used = {part: getattr(config, part) for part in parts}
    if unknown := [part for part, cfg in used.items() if cfg is not None and "sha256" not in files.get(part, {})]:
        raise ValueError(f"{path} does not say of which file {', '.join(unknown)} is, so that features cannot be told "
                         "from another encoder's. Convert the checkpoint again.")
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
    """How images become the encoder's input: the side of the square, and what of a image is in it."""
    cut = RANDOM if config.data.random_crop else SEEN[model.images.fit]
    return {"size": model.image_size, "cut": cut}


def load(config: RunConfig, source: converted.ConvertedCheckpoint, rules: Sequence[str], records: Sequence[Sequence[Record]],
         earlier: dict[str, Any] | None = None) -> Features:
    """The features that `config.data.features` names, for a run.

    source:  with the run's architecture
    rules:   of the parameters that the run trains
    records: of each of its sources
    earlier: what the runs before it have trained

    Raises FileNotFoundError or ValueError if the run trains the encoder, if there are none, if another encoder or
    transform made them, or if the images are others.
    """
    family = source.family
    trained = [path for path in shapes(family, source.config) if family.in_encoder(path) and trees.matches(path, rules)]
    if trained or config.drop_path:
        what = f"{trained[0]} and {len(trained) - 1} more of its parameters" if trained else "drop_path"
        raise ValueError(f"data.features = {config.data.features}: this run trains the encoder ({what}), so that its "
                         "features change from step to step. Set data.features = None, or leave the encoder frozen.")
    features = Features(config.data.features)
    stored.check(features.folder, features.card, encoder(source, config.weights, earlier),
                 transform(config, source.config))
    features = features.of(config.data.sources, records)
    console.print(f"Images are read as features from {features.folder}; their encoder is not loaded.",
                  highlight=False)
    return features


# ---- making them ----


def make(config: RunConfig, source: converted.ConvertedCheckpoint, folder: Path, crops: int | None = None,
         dtype: str | None = None, batch_size: int = 64) -> Made:
    """Runs a run's frozen encoder over every image of its data and stores what `folder` does not hold yet.

    source:     with the run's architecture
    crops:      of each image, where they are cropped at random; None for 4 there
    dtype:      of the stored numbers; None for the dtype in which the encoder runs, which is exact
    batch_size: crops that the encoder gets at once

    Images that cannot be read are named in `features_errors.jsonl`. Raises ValueError for a model without an encoder
    of images or without crops and for a folder with other features, BlockingIOError if another process is adding to
    it, and what the sources' readers raise.
    """
    if jax.process_count() > 1:
        raise ValueError(f"Features are made by one host, this is one of {jax.process_count()}: run `mmjax data "
                         "features` on one of them alone, with `out` where all can read it.")
    files.require_local({"folder": folder})
    earlier = _earlier(config)
    made_by = encoder(source, config.weights, earlier)
    spec = ModelSpec(source, sharding.make_mesh(config.mesh), config.weights.dtype, config.weights.frozen_dtype)
    card = Card(made_by, transform(config, source.config), _crops(config, source.config, crops),
                config.data.seed if config.data.random_crop else 0, dtype or config.weights.dtype,
                feature_shape(spec))
    records = pipeline.read(config.data)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())
    with Writer(folder, card) as writer, Progress(*columns, console=console) as bar:
        names = writer.names(config.data.sources, records)
        keys, places = _images(records, names, not source.config.image_tokens, bar)
        new = places[stored.missing(writer.keys, keys)]
        unread = 0
        if len(new):
            rows, encode = _encoder(spec, earlier, card, batch_size)
            at_once = rows // card.crops
            with concurrent.futures.ThreadPoolExecutor(config.data.threads) as pool:
                opened = _ahead(pool, _ImageReader(records, names, card, source.config.images), new, AHEAD * at_once)
                task = bar.add_task("encoding", total=len(new))
                unread = _store(opened, encode, at_once, writer, lambda n: bar.advance(task, n))
    return Made(folder, writer.card, len(writer.index), len(new) - unread, unread)


def summary(made: Made) -> Iterator[str]:
    """What a call of `make` did, in words."""
    card = made.card
    shape = " x ".join(map(str, card.shape))
    yield (f"{made.folder}: {made.images:,} images, {made.added:,} of them new, {card.crops} x {shape} "
           f"{card.dtype} each: {card.crops * card.nbytes / 1e6:.3f} MB a image, {made.nbytes / 1e9:.3f} GB in all")
    if made.unread:
        yield f"{made.unread:,} images cannot be read; {made.folder / ERRORS} names them"
    yield f"To train on them: --data.features {made.folder}"


def _crops(config: RunConfig, model: Any, crops: int | None) -> int:
    if config.data.random_crop and model.images.fit != "center_crop":
        raise ValueError(f"This model's images are read with the fit {model.images.fit!r}, not cropped: set "
                         "data.random_crop = False.")
    if not config.data.random_crop:
        if crops not in (None, 1):
            raise ValueError(f"crops = {crops}, but this run's images are not cropped at random (data.random_crop): "
                             "one feature of each is all there is.")
        return 1
    if crops is not None and crops < 1:
        raise ValueError(f"crops = {crops}: at least 1")
    return CROPS if crops is None else crops


def _earlier(config: RunConfig) -> dict[str, Any] | None:
    """What the runs before it have trained. One that is yet to come is taken to leave the encoder alone; if it does
    not, the run refuses the features."""
    before = config.weights.start_from
    if before is None:
        return None
    if not (Path(before) / converted.RUN_CARD).is_file():
        console.print(f"The run {before} is not there yet; its encoder is taken to be the checkpoint's.",
                      highlight=False)
        return None
    return converted.trained_params(Path(before))


def feature_shape(spec: ModelSpec) -> tuple[int, ...]:
    """Of one image's feature."""
    config = spec.source.config
    blank = np.zeros((config.image_size, config.image_size, 3), np.uint8)
    params = trees.unflatten(shapes(spec.source.family, config))
    return jax.eval_shape(_feature(spec.module), params, _batch([blank], config)).shape[1:]


def _feature(module: Any) -> Callable[[Any, Batch], jax.Array]:
    """(params, batch of one image a row) -> its features [N,...]."""

    def feature(params: Any, batch: Batch) -> jax.Array:
        found = module.apply({"params": params}, batch, method="feature")
        return found[:, 0] if module.cfg.image_tokens else found  # there they are [N,F,...]

    return feature


def _batch(images: Sequence[np.ndarray | None], model: Any) -> Batch:
    """Rows of one image each, without words; None is the image of zeros. `model` is the family's config."""
    samples = [Sample(images=[] if image is None else [image]) for image in images]
    none = np.zeros((len(samples), 1), np.int32)
    batch = Batch(tokens=none, soft_index=none - 1, valid=none == 0, loss_mask=none != 0, positions=none,
                  padded_length=none[:, 0] + 1)
    return dataclasses.replace(batch, **inputs(samples, model))


def _images(records: Sequence[Sequence[Record]], names: ImageNames, with_nothing: bool,
              bar: Progress) -> tuple[np.ndarray, np.ndarray]:
    """(keys uint64[M,2], places int64[M,2]) of the records' images; a place is the source's number and the record's.

    with_nothing: the image of zeros comes first, at (-1, -1)
    """
    total = sum(map(len, records))
    keys, places = np.empty((total + 1, 2), np.uint64), np.empty((total + 1, 2), np.int64)
    count = 0
    if with_nothing:
        keys[0], places[0], count = stored.key(names(None)), -1, 1
    task = bar.add_task("looking", total=total)
    for number, its in enumerate(records):
        for place in range(len(its)):
            bar.advance(task)
            try:
                record = its[place]
            except (ValueError, OSError):  # training passes over them as well
                continue
            if record.image is not None and record.problem is None:
                keys[count], places[count] = stored.key(names(record.image)), (number, place)
                count += 1
    return keys[:count], places[:count]


@dataclasses.dataclass(frozen=True)
class _OpenedImage:
    """A image, ready for the encoder: its K crops; or what is wrong with it."""

    name: str
    file: str
    key: np.ndarray
    content: int = 0
    crops: tuple[np.ndarray | None, ...] = ()
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class _ImageReader:
    """Opens images by their places, see `_images`."""

    records: Sequence[Sequence[Record]]
    names: ImageNames
    card: Card
    images: ImageSpec

    def __call__(self, place: np.ndarray) -> _OpenedImage:
        source, number = map(int, place)
        if source < 0:
            return _OpenedImage("", "", stored.key(self.names(None)), crops=(None,) * self.card.crops)
        record = self.records[source][number]
        name = self.names(record.image)
        opened = _OpenedImage(record.name, str(record.image), stored.key(name))
        try:
            held = Held.of(record.image)
            whole = images.rgb(held)
        except (ValueError, OSError) as error:
            return dataclasses.replace(opened, problem=str(error))
        crops = tuple(self._crop(whole, name, crop) for crop in range(self.card.crops))
        return dataclasses.replace(opened, content=stored.content_hash(held.content), crops=crops)

    def _crop(self, whole: Any, name: str, crop: int) -> np.ndarray:
        random = stored.crop_random(self.card.seed, name, crop) if self.card.transform["cut"] == RANDOM else None
        return images.read(whole, self.images, random)


def _store(opened: Iterator[_OpenedImage], encode: Callable[[Sequence[_OpenedImage]], np.ndarray], at_once: int, writer: Writer,
           advance: Callable[[int], None]) -> int:
    """Stores the features of images, so many computed at once; how many images could not be read."""
    unread = 0
    with (writer.folder / ERRORS).open("w") as errors:
        while chunk := list(itertools.islice(opened, at_once)):
            for each in chunk:
                if each.problem is not None:
                    line = {"name": each.name, "file": each.file, "problem": each.problem}
                    errors.write(json.dumps(line) + "\n")
                    unread += 1
            if good := [each for each in chunk if each.problem is None]:
                for each, features in zip(good, encode(good), strict=True):
                    writer.add(each.key, each.content, features)
            advance(len(chunk))
    return unread


def _ahead(pool: concurrent.futures.Executor, reader: _ImageReader, places: np.ndarray, most: int) -> Iterator[_OpenedImage]:
    """The images at these places in order, so many of them opened at a time."""
    waiting: collections.deque[concurrent.futures.Future[_OpenedImage]] = collections.deque()
    for place in places:
        waiting.append(pool.submit(reader, place))
        if len(waiting) >= most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _encoder(spec: ModelSpec, earlier: dict[str, Any] | None, card: Card,
             batch_size: int) -> tuple[int, Callable[[Sequence[_OpenedImage]], np.ndarray]]:
    """How many rows are computed at once, and what computes the features [n,K,...] of no more images than that.

    Of the model only the encoder is read.
    """
    source, mesh = spec.source, spec.mesh
    params = trees.flatten(spec.restore(None, earlier, source.family.in_encoder))
    # A module asks for the parameters that are its own, whichever of its methods is called. Nothing reads these.
    params |= {path: jnp.zeros(shape.shape, spec.dtype) for path, shape in shapes(source.family, source.config).items()
               if "/" not in path}
    params, place, feature = trees.unflatten(params), sharding.batch_sharding(mesh), _feature(spec.module)
    call = jax.jit(lambda params, batch: feature(params, batch).astype(card.dtype))
    ways = sharding.num_shards(mesh, "batch")
    rows = -(-max(batch_size, card.crops) // ways) * ways

    def encode(images: Sequence[_OpenedImage]) -> np.ndarray:
        crops = [crop for each in images for crop in each.crops]
        filled = crops + crops[-1:] * (rows - len(crops))  # one shape, one compiled function
        with sharding.use_mesh(mesh):
            found = np.asarray(call(params, jax.device_put(_batch(filled, source.config), place)))[:len(crops)]
        return found.reshape(len(images), card.crops, *found.shape[1:])

    return rows, encode
