"""Data sets of TensorFlow Datasets in its format array_record, read in any order and without TensorFlow.

`mmjax data prepare` makes them of the other formats, a record for a record (`FIELDS`). Of any other one with an image
and a text the two are found by the kinds and names of its features.
"""

import difflib
import functools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmjax import files
from mmjax.data import manifest
from mmjax.data.formats.record import Record
from mmjax.data.formats.rows import Lazy, caption_text

FIELDS = ("answer", "image", "input", "name", "prompt", "turns")  # of a prepared data set, those of `Record`
CAPTIONS = ("caption", "captions", "text", "answer", "description", "title")  # names of what is learnt, if not told
OPTIONS = ("split", "image", "text", "texts")
KEPT = 32  # examples kept read, for the image is asked for after its record
SPARE = 256  # files that a process has open beside those of large data sets


def tfds(path: str, root: None = None) -> Sequence[Record]:
    """A data set that lies prepared on this machine, in the format array_record.

    path: its folder (with `dataset_info.json`), or its name `NAME[/CONFIG][:VERSION]`, also as `tfds:NAME`, which is
          looked up where TensorFlow Datasets keeps them (TFDS_DATA_DIR, or ~/tensorflow_datasets). Nothing is
          downloaded. Behind a `?`, joined by `&`, may stand `split=` (else train, or the only one; `split=train[:10%]`
          too), `image=` and `text=`, the features to take where that is not clear (such as `text=captions/text`), and
          `texts=N`: N records of every example, with its first N texts (over again if it has fewer). Else there is one
          with its first

    Of what `mmjax data prepare` made the records are as they were in its source, and the sizes of all shards are
    checked. Raises ValueError or FileNotFoundError saying what is not there, not finished, damaged, in another format,
    or which features there are to choose from; also for a `root`, because the images lie in the data set.
    """
    if root is not None:
        raise ValueError(f"The images of {path} lie in the data set itself: leave out the root, {root}.")
    return Examples(path)


@dataclass(frozen=True)
class Stored:
    """An image in a data set. Pickled it is the path and the number, and the data set is opened where it is read.

    file: the path as `tfds` takes it
    """

    file: str
    number: int
    examples: "Examples" = field(compare=False, repr=False)

    def read(self) -> bytes:
        """The bytes as they were put in. Raises OSError if the shard is damaged, ValueError if it has no image."""
        return self.examples.image(self.number)

    def __str__(self) -> str:
        return f"{self.file}, example {self.number}"

    def __reduce__(self) -> Any:
        return _stored, (self.file, self.number)


def _stored(file: str, number: int) -> Stored:
    return Stored(file, number, _opened(file))


@functools.lru_cache(maxsize=16)
def _opened(file: str) -> "Examples":
    return Examples(file)


class Examples(Lazy):
    """The records of a data set. Pickled it is its path."""

    def __init__(self, path: str) -> None:
        from tensorflow_datasets import decode

        place, options = _options(path)
        builder = _builder(place)
        split = _split(path, builder, options.get("split"))
        self.path, self._title = path, builder.info.name
        self._prepared = set(builder.info.features) == set(FIELDS)
        self._image, self._text, self._texts = "image", "answer", 1
        if not self._prepared:
            self._image, self._text = _chosen(path, builder.info.features, options)
            self._texts = _count(path, options.get("texts", "1"))
        elif given := options.keys() - {"split"}:
            raise ValueError(f"{path}: {', '.join(sorted(given))} cannot be chosen in what mmjax data prepare made.")
        try:
            self._stored = builder.as_data_source(
                split, deserialize_method=decode.DeserializeMethod.RAW_BYTES, file_format="array_record")
            self._shards = builder.info.splits[split].file_instructions
        except Exception as error:  # whatever comes of names and numbers that cannot be
            raise ValueError(f"{path} cannot be read, its dataset_info.json is damaged: {error}") from error
        self._ends = np.cumsum([shard.take for shard in self._shards])
        _check(builder.data_dir, [shard.filename for shard in self._shards])
        self._example = functools.lru_cache(KEPT)(self._read)

    def __reduce__(self) -> Any:
        return Examples, (self.path,)

    def __len__(self) -> int:
        return int(self._ends[-1]) * self._texts

    def name(self, number: int) -> str:
        example, text = divmod(number, self._texts)
        return f"{self._title}:{example}" + (f".{text}" if self._texts > 1 else "")

    def record(self, number: int) -> Record:
        example, text = divmod(number, self._texts)
        stored = self._example(example)
        image = Stored(self.path, example, self) if _values(stored, self._image) else None
        if self._prepared:
            return _record(stored, image)
        texts = _values(stored, self._text)
        if image is None or not texts:
            raise ValueError(f"there is nothing in the feature {self._text if image else self._image}")
        return Record(
            self.name(number), image, caption_text({self._text: texts[text % len(texts)].decode()}, self._text)
        )

    def image(self, number: int) -> bytes:
        """The first image of an example; raises OSError or ValueError as `Stored.read` does."""
        images = _values(self._example(number), self._image)
        if not images:
            raise ValueError(f"example {number} of {self.path} has no image")
        return images[0]

    def _read(self, number: int) -> Any:
        """A tf.train.Example."""
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            return tf_example_pb2.Example.FromString(self._stored[number])
        except Exception as error:  # the reader of the files raises RuntimeError, protobuf errors of its own
            shard = self._shards[int(np.searchsorted(self._ends, number, side="right"))].filename
            raise OSError(f"example {number} cannot be read, {shard} is damaged: {error}. Copy it again, or prepare it "
                          "again (`mmjax data verify` lists all damaged ones of a folder made by mmjax data prepare)."
                          ) from error


# ---- a record as an example, and back ----


def features() -> Any:
    """What is in a prepared data set. `image` and `prompt` hold one or none: there is nothing that means none alone."""
    from tensorflow_datasets import features as kinds

    return kinds.FeaturesDict({
        "name": kinds.Text(),
        "image": kinds.Sequence(kinds.Image()),
        "answer": kinds.Text(),
        "prompt": kinds.Sequence(kinds.Text()),
        "input": kinds.Text(),
        "turns": kinds.Sequence({"question": kinds.Text(), "answer": kinds.Text()}),
    })


def example(record: Record, image: bytes | None) -> bytes:
    """A record and its image's bytes as `features().serialize_example` would write them, in a tenth of its time.

    Raises ValueError for text that is none (UTF-8).
    """
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    texts = {
        "name": [record.name],
        "answer": [record.answer],
        "prompt": [] if record.prompt is None else [record.prompt],
        "input": [record.input],
        "turns/question": [question for question, _ in record.turns],
        "turns/answer": [answer for _, answer in record.turns],
    }
    values = {key: [text.encode() for text in several] for key, several in texts.items()}
    values["image"] = [] if image is None else [image]
    stored = {key: tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=several))
              for key, several in values.items()}
    whole = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=stored))
    return whole.SerializeToString(deterministic=True)  # the same source makes the same shards


def _record(stored: Any, image: Stored | None) -> Record:
    name, answer, prompt, given, questions, answers = (
        [value.decode() for value in _values(stored, key)]
        for key in ("name", "answer", "prompt", "input", "turns/question", "turns/answer"))
    if not (len(name) == len(answer) == len(given) == 1):
        raise ValueError("the example is not as mmjax data prepare writes them")
    return Record(name[0], image, answer[0], prompt[0] if prompt else None, given[0],
                  tuple(zip(questions, answers, strict=True)))


def _values(stored: Any, feature: str) -> Sequence[bytes]:
    """What a tf.train.Example holds of an image or text feature, in one list however it is nested."""
    held = stored.features.feature
    for key in (feature, f"{feature}/ragged_flat_values"):
        if key in held:
            return held[key].bytes_list.value
    return ()


# ---- finding a data set, and what is in it ----


def _options(path: str) -> tuple[str, dict[str, str]]:
    """The data set's folder or name, and what is said behind the `?`. Raises ValueError for what it does not know."""
    place, mark, rest = path.partition("?")
    options = {}
    for part in rest.split("&") if mark else ():
        key, given, value = part.partition("=")
        if key not in OPTIONS or not value:
            close = difflib.get_close_matches(key, OPTIONS, 1)
            hint = f"Did you mean {close[0]}=...?" if close else f"There are {', '.join(OPTIONS)}."
            raise ValueError(f"{path}: {part!r} is none of the settings KEY=VALUE of a data set. {hint}")
        options[key] = value
    return os.path.expanduser(place.removeprefix("tfds:")), options


def _builder(place: str) -> Any:
    """tfds.core.DatasetBuilder of a folder or a name; raises ValueError or FileNotFoundError if there is none."""
    import tensorflow_datasets
    from tensorflow_datasets.core.read_only_builder import builder_from_files  # tfds.builder would ask the network

    if not os.path.isdir(place):
        if place.startswith((".", os.sep)):
            raise FileNotFoundError(f"There is no folder {place}.")
        files.require_local({"TFDS_DATA_DIR": os.environ.get("TFDS_DATA_DIR")})
        try:
            return builder_from_files(place)
        except ValueError as error:  # also for a name that cannot be one
            raise FileNotFoundError(
                f"{place} is neither a folder nor a data set that TensorFlow Datasets has prepared on this machine. "
                "Nothing is downloaded here: prepare it with TensorFlow Datasets, in the format array_record, or name "
                f"the folder that has its dataset_info.json. It says: {error}") from error
    if not os.path.isfile(os.path.join(place, "dataset_info.json")):
        if made := manifest.read(place):
            manifest.check(place, made)
            raise ValueError(f"{place} was not prepared completely. The same command resumes: "
                             f"{made.making.command(place)}")
        raise FileNotFoundError(f"{place} is no data set: there is no dataset_info.json in it. Name the folder that "
                                "has it, of one version (such as coco_captions/2014/1.1.0).")
    try:
        return tensorflow_datasets.builder_from_directory(place)
    except Exception as error:  # whatever its readers of JSON raise
        raise ValueError(f"{place} is no data set, or damaged: its dataset_info.json or features.json cannot be read: "
                         f"{error}") from error


def _split(path: str, builder: Any, split: str | None) -> str:
    """Which split to read; raises ValueError if that is not clear, or if it is not stored as array_record."""
    stored = sorted(kind.value for kind in builder.info.available_file_formats())
    if "array_record" not in stored:
        raise ValueError(
            f"{path} is stored as {', '.join(stored)}, which is not read in any order, nor without TensorFlow. Prepare "
            "it in the format array_record: tfds build NAME --file_format=array_record.")
    splits = builder.info.splits
    if split is None:
        named = [name for name in splits if name == "train"] or list(splits)
        if len(named) != 1:
            raise ValueError(f"{path} has {len(named)} splits: {', '.join(named)}. Name one of them: {path}"
                             f"{'&' if '?' in path else '?'}split=NAME.")
        (split,) = named
    try:
        count = splits[split].num_examples
    except (KeyError, ValueError, AssertionError) as error:
        raise ValueError(f"{path}: there is no split {split!r}; there are {', '.join(splits)}. {error}") from error
    if not count:
        raise ValueError(f"{path}: there are no records in the split {split!r}.")
    return split


def _check(folder: str, files: Sequence[str]) -> None:
    """Lets the process open all the shards.

    Raises FileNotFoundError or ValueError if some are not there, or not below the folder, links followed, or, where the
    sizes are known, have others.
    """
    if made := manifest.read(folder):
        manifest.check(folder, made)
    base = os.path.realpath(folder)
    if outside := [file for file in files if not os.path.realpath(file).startswith(base + os.sep)]:
        raise ValueError(f"{len(outside)} shards are not below {folder}, such as {', '.join(outside[:5])}.")
    if absent := [file for file in files if not os.path.isfile(file)]:
        raise FileNotFoundError(f"{len(absent)} of {len(files)} shards are not there, such as {', '.join(absent[:5])}. "
                                "Copy the data set again.")
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    if len(files) + SPARE > most:  # every shard that was once read from stays open
        raise ValueError(f"{folder} has {len(files)} shards, but a process may have {hard} files open here. Prepare "
                         "the data set with larger shards, or raise the limit (ulimit -Hn).")
    if len(files) > SPARE and soft != resource.RLIM_INFINITY:  # the shards of several data sets add up
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + len(files), most), hard))


def _features(feature: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """("image" or "text", its name) of the images and texts; sequences of them count as what they hold."""
    from tensorflow_datasets import features as kinds

    if isinstance(feature, kinds.FeaturesDict):
        for key in sorted(feature):  # they come in any order
            yield from _features(feature[key], f"{name}/{key}" if name else key)
    elif type(feature) is kinds.Sequence:
        yield from _features(feature.feature, name)
    elif type(feature) is kinds.Image:  # not what inherits from it, such as masks
        yield "image", name
    elif isinstance(feature, kinds.Tensor) and not feature.shape and feature.np_dtype == np.object_:
        yield "text", name


def _chosen(path: str, features: Any, options: Mapping[str, str]) -> tuple[str, str]:
    """The names of the image and of the text. Raises ValueError if one is not there, or is not clear."""
    found = list(_features(features))
    problems, chosen = [], []
    for kind, usual in (("image", ("image",)), ("text", CAPTIONS)):
        there = [name for each, name in found if each == kind]
        named = [name for name in there if name.rpartition("/")[2].lower() in usual]
        wanted = options.get(kind)
        fits = [name for name in there if name == wanted] if wanted else named if len(named) == 1 else there
        if len(fits) == 1:
            chosen += fits
        else:
            problems.append((f"{kind}={wanted} is none of them" if wanted else f"which one is the {kind} is not clear")
                            + f": it has the {kind} features {', '.join(there) or '(none)'}")
    if problems:
        raise ValueError(f"{path} cannot be read as images with texts:\n  " + "\n  ".join(problems)
                         + f"\nSay which to take: {path.partition('?')[0]}?image=NAME&text=NAME")
    image, text = chosen
    return image, text


def _count(path: str, texts: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,3}", texts):
        raise ValueError(f"{path}: texts={texts}, but must be a whole number from 1 on.")
    return int(texts)
