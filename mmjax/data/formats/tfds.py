"""Reads data sets of TensorFlow Datasets in the format array_record, in any order and without TensorFlow.

`mmjax data prepare` makes them of the other formats, with an example for each record (`FIELDS`). In other data sets the
image and the text are found by the types and names of the features.
"""

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
from mmjax.data.formats.account import Account
from mmjax.data.formats.record import Record
from mmjax.data.formats.rows import FOLLOW, Lazy, caption_text, parse_options
from mmjax.data.formats.tar_index import describe_stamp

FIELDS = ("answer", "image", "input", "name", "prompt", "turns")  # of a prepared data set, those of `Record`
CAPTIONS = ("caption", "captions", "text", "answer", "description", "title")  # default names of the text feature
OPTIONS = ("split", "image", "text", "texts")
KEPT = 32  # cached examples, since the image is read after its record
SPARE = 256  # files that a process has open besides those of large data sets


def tfds(path: str, root: None = None, follow_links: bool = False) -> Sequence[Record]:
    """Reads a data set that is prepared on this machine in the format array_record.

    path: its folder (with `dataset_info.json`), or its name `NAME[/CONFIG][:VERSION]`, also as `tfds:NAME`, which is
          looked up in the folder of TensorFlow Datasets (TFDS_DATA_DIR, or ~/tensorflow_datasets). Nothing is
          downloaded. Options follow a `?`, joined by `&`: `split=` (default: train, or the only one; also
          `split=train[:10%]`), `image=` and `text=`, the features to use if they are ambiguous (such as
          `text=captions/text`), and `texts=N`: N records for every example, with its first N texts (repeated if it has
          fewer). By default there is one record, with the first text

    For data of `mmjax data prepare` the records are those of its source, and the sizes of all shards are checked.
    Raises ValueError or FileNotFoundError if the data set is missing, incomplete, damaged or in another format, or its
    features are ambiguous; also for a `root`, because the data set includes the images.

    follow_links: whether shards may be links that lead out of the folder
    """
    if root is not None:
        raise ValueError(f"The images of {path} are in the data set itself: leave out the root, {root}.")
    return Examples(path, follow_links)


@dataclass(frozen=True)
class Stored:
    """An image in a data set. It is pickled as path and number, and the data set is opened when the image is read.

    file:  the path for `tfds`
    index: of the image among those of the example
    """

    file: str
    number: int
    examples: "Examples" = field(compare=False, repr=False)
    index: int = 0

    def read(self) -> bytes:
        """Returns the original bytes. Raises OSError if the shard is damaged, ValueError if it has no image."""
        return self.examples.image(self.number, self.index)

    def __str__(self) -> str:
        return f"{self.file}, example {self.number}" + f", image {self.index}" * bool(self.index)

    def __reduce__(self) -> Any:
        return _stored, (self.file, self.number, self.examples.follow_links, self.index)


def _stored(file: str, number: int, follow_links: bool, index: int) -> Stored:
    return Stored(file, number, _opened(file, follow_links), index)


@functools.lru_cache(maxsize=16)
def _opened(file: str, follow_links: bool) -> "Examples":
    return Examples(file, follow_links)


class Examples(Lazy):
    """The records of a data set, which are pickled as the path."""

    def __init__(self, path: str, follow_links: bool = False) -> None:
        from tensorflow_datasets import decode

        folder_or_name, options = parse_options(path, OPTIONS)
        folder_or_name = os.path.expanduser(folder_or_name.removeprefix("tfds:"))
        builder = _builder(folder_or_name)
        split = _split(path, builder, options.get("split"))
        self.path, self._title, self.follow_links = path, builder.info.name, follow_links
        self._prepared = set(builder.info.features) == set(FIELDS)
        self._image, self._text, self._texts = "image", "answer", 1
        if not self._prepared:
            self._image, self._text = _choose_features(path, builder.info.features, options)
            self._texts = _count(path, options.get("texts", "1"))
        elif given := options.keys() - {"split"}:
            raise ValueError(f"{path}: {', '.join(sorted(given))} cannot be chosen in what mmjax data prepare made.")
        try:
            self._stored = builder.as_data_source(
                split, deserialize_method=decode.DeserializeMethod.RAW_BYTES, file_format="array_record")
            self._shards = builder.info.splits[split].file_instructions
        except Exception as error:  # any error for invalid names and numbers
            raise ValueError(f"{path} cannot be read, its dataset_info.json is damaged: {error}") from error
        self._ends = np.cumsum([shard.take for shard in self._shards])
        self.files = tuple(shard.filename for shard in self._shards)
        _check(builder.data_dir, self.files, follow_links)
        self.account = self._account(builder.data_dir)
        self._example = functools.lru_cache(KEPT)(self._read)

    def __reduce__(self) -> Any:
        return Examples, (self.path, self.follow_links)

    def fingerprints(self) -> dict[str, str]:
        """Returns `{shard: SHA-256}` of a prepared data set, of any other data set `{shard: size and time}`."""
        stored = manifest.read(os.path.dirname(self.files[0])) if self._prepared else None
        if stored is None:
            return {file: describe_stamp(file) for file in self.files}
        known = {shard.file: shard.sha256 for shard in stored.shards.values()}
        return {file: f"SHA-256 {known.get(os.path.basename(file))}" for file in self.files}

    def _account(self, folder: str) -> Account:
        account = Account("examples" if self._texts == 1 else "texts", len(self), len(self))
        if self._prepared and (stored := manifest.read(folder)) and stored.left_out:
            account.found += stored.left_out
            account.leave("records left out when it was prepared (prepare_errors.jsonl)", count=stored.left_out)
        return account

    def __len__(self) -> int:
        return int(self._ends[-1]) * self._texts

    def name(self, number: int) -> str:
        example, text = divmod(number, self._texts)
        return f"{self._title}:{example}" + (f".{text}" if self._texts > 1 else "")

    def record(self, number: int) -> Record:
        example, text = divmod(number, self._texts)
        stored = self._example(example)
        count = len(_values(stored, self._image))
        image = Stored(self.path, example, self) if count else None
        if self._prepared:
            return _record(stored, [Stored(self.path, example, self, index) for index in range(count)])
        texts = _values(stored, self._text)
        if image is None or not texts:
            raise ValueError(f"there is nothing in the feature {self._text if image else self._image}")
        return Record(
            self.name(number), image, caption_text({self._text: texts[text % len(texts)].decode()}, self._text)
        )

    def image(self, number: int, index: int = 0) -> bytes:
        """Returns an image of an example; raises the errors of `Stored.read`."""
        images = _values(self._example(number), self._image)
        if index >= len(images):
            raise ValueError(f"example {number} of {self.path} has no image" + f" {index}" * bool(index))
        return images[index]

    def _read(self, number: int) -> Any:
        """Returns a tf.train.Example."""
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            return tf_example_pb2.Example.FromString(self._stored[number])
        except Exception as error:  # RuntimeError of array_record, or errors of protobuf
            shard = self._shards[int(np.searchsorted(self._ends, number, side="right"))].filename
            raise OSError(f"example {number} cannot be read, {shard} is damaged: {error}. Copy it again, or prepare it "
                          "again (`mmjax data verify` lists all damaged ones of a folder made by mmjax data prepare)."
                          ) from error


# ---- a record as an example, and back ----


def features() -> Any:
    """Returns the features of a prepared data set. `prompt` has one or none, as none can be optional."""
    from tensorflow_datasets import features as kinds

    return kinds.FeaturesDict({
        "name": kinds.Text(),
        "image": kinds.Sequence(kinds.Image()),
        "answer": kinds.Text(),
        "prompt": kinds.Sequence(kinds.Text()),
        "input": kinds.Text(),
        "turns": kinds.Sequence({"question": kinds.Text(), "answer": kinds.Text()}),
    })


def example(record: Record, images: Sequence[bytes]) -> bytes:
    """Returns a record and its images' bytes as serialised by `features().serialize_example`, ten times faster.

    Raises ValueError for text that cannot be encoded as UTF-8.
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
    values["image"] = list(images)
    stored = {key: tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=several))
              for key, several in values.items()}
    whole = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=stored))
    return whole.SerializeToString(deterministic=True)  # the same source makes the same shards


def _record(stored: Any, images: Sequence[Stored]) -> Record:
    name, answer, prompt, given, questions, answers = (
        [value.decode() for value in _values(stored, key)]
        for key in ("name", "answer", "prompt", "input", "turns/question", "turns/answer"))
    if not (len(name) == len(answer) == len(given) == 1):
        raise ValueError("the example is not as mmjax data prepare writes them")
    return Record(name[0], images[0] if images else None, answer[0], prompt[0] if prompt else None, given[0],
                  tuple(zip(questions, answers, strict=True)), others=tuple(images[1:]))


def _values(stored: Any, feature: str) -> Sequence[bytes]:
    """Returns the flat list of values of an image or text feature of a tf.train.Example."""
    values = stored.features.feature
    for key in (feature, f"{feature}/ragged_flat_values"):
        if key in values:
            return values[key].bytes_list.value
    return ()


# ---- data sets and their features ----


def _builder(path: str) -> Any:
    """Returns the tfds.core.DatasetBuilder of a folder or a name; raises ValueError or FileNotFoundError."""
    import tensorflow_datasets
    from tensorflow_datasets.core.read_only_builder import builder_from_files  # tfds.builder uses the network

    if not os.path.isdir(path):
        if path.startswith((".", os.sep)):
            raise FileNotFoundError(f"There is no folder {path}.")
        files.require_local({"TFDS_DATA_DIR": os.environ.get("TFDS_DATA_DIR")})
        try:
            return builder_from_files(path)
        except ValueError as error:  # also for a name that cannot be one
            raise FileNotFoundError(
                f"{path} is neither a folder nor a data set that TensorFlow Datasets has prepared on this machine. "
                "Nothing is downloaded here: prepare it with TensorFlow Datasets, in the format array_record, or name "
                f"the folder that has its dataset_info.json. It says: {error}") from error
    if not os.path.isfile(os.path.join(path, "dataset_info.json")):
        if stored := manifest.read(path):
            manifest.check(path, stored)
            raise ValueError(f"{path} was not prepared completely. The same command resumes: "
                             f"{stored.making.command(path)}")
        raise FileNotFoundError(f"{path} is not a data set: there is no dataset_info.json in it. Name the folder that "
                                "has it, of one version (such as coco_captions/2014/1.1.0).")
    try:
        return tensorflow_datasets.builder_from_directory(path)
    except Exception as error:  # of its JSON readers
        raise ValueError(f"{path} is not a data set, or damaged: its dataset_info.json or features.json cannot be read:"
                         f" {error}") from error


def _split(path: str, builder: Any, split: str | None) -> str:
    """Returns the split to read; raises ValueError if it is ambiguous, or not stored as array_record."""
    stored = sorted(kind.value for kind in builder.info.available_file_formats())
    if "array_record" not in stored:
        raise ValueError(
            f"{path} is stored as {', '.join(stored)}, which cannot be read in any order and without TensorFlow. "
            "Prepare it in the format array_record: tfds build NAME --file_format=array_record.")
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


def _check(folder: str, files: Sequence[str], follow_links: bool) -> None:
    """Checks the shards, and raises the process's limit of open files so that it can open all of them.

    Raises FileNotFoundError or ValueError if some are missing, not below the folder (links are followed), or, if the
    sizes are known, of another size.
    """
    if stored := manifest.read(folder):
        manifest.check(folder, stored)
    base = os.path.realpath(folder)
    outside = [file for file in files if not os.path.realpath(file).startswith(base + os.sep)]
    inside = [file for file in outside if os.path.abspath(file).startswith(os.path.abspath(folder) + os.sep)]
    if outside and not (follow_links and len(inside) == len(outside)):
        links = (f": it is a link that leads to {os.path.realpath(inside[0])}. Allow links that lead out of the "
                 f"folder ({FOLLOW})") if inside else ""
        raise ValueError(f"{len(outside)} shards are not below {folder}, such as {(inside or outside)[0]}{links}.")
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
    """Yields ("image" or "text", name) of the image and text features, also of those in sequences."""
    from tensorflow_datasets import features as kinds

    if isinstance(feature, kinds.FeaturesDict):
        for key in sorted(feature):  # the order is not fixed
            yield from _features(feature[key], f"{name}/{key}" if name else key)
    elif type(feature) is kinds.Sequence:
        yield from _features(feature.feature, name)
    elif type(feature) is kinds.Image:  # not what inherits from it, such as masks
        yield "image", name
    elif isinstance(feature, kinds.Tensor) and not feature.shape and feature.np_dtype == np.object_:
        yield "text", name


def _choose_features(path: str, features: Any, options: Mapping[str, str]) -> tuple[str, str]:
    """Returns the names of the image and the text feature. Raises ValueError if one is missing or ambiguous."""
    available = list(_features(features))
    problems, chosen = [], []
    for kind, defaults in (("image", ("image",)), ("text", CAPTIONS)):
        names = [name for each, name in available if each == kind]
        default = [name for name in names if name.rpartition("/")[2].lower() in defaults]
        wanted = options.get(kind)
        fits = [name for name in names if name == wanted] if wanted else default if len(default) == 1 else names
        if len(fits) == 1:
            chosen += fits
        else:
            problems.append((f"{kind}={wanted} is none of them" if wanted else f"the {kind} is ambiguous")
                            + f": it has the {kind} features {', '.join(names) or '(none)'}")
    if problems:
        raise ValueError(f"{path} cannot be read as images with texts:\n  " + "\n  ".join(problems)
                         + f"\nSay which to take: {path.partition('?')[0]}?image=NAME&text=NAME")
    image, text = chosen
    return image, text


def _count(path: str, texts: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,3}", texts):
        raise ValueError(f"{path}: texts={texts}, but must be a positive integer.")
    return int(texts)
