"""Data of any format as a data set of TensorFlow Datasets, written without TensorFlow: `mmjax data prepare`.

Images go in as the bytes they are, records in their order. Shard k is made of the source's records from
k · shard_size on, under another name until it is whole; then a line of the manifest says so. So it does not matter when
it is stopped: what has a line is kept, all else is made anew. The source is read once and never held in memory.
"""

import collections
import concurrent.futures
import dataclasses
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmjax import files
from mmjax.config import Source
from mmjax.data import images, manifest
from mmjax.data.formats import FORMATS, Record
from mmjax.data.formats.tfds import example, features
from mmjax.data.manifest import PARTIAL, Making, Manifest, Shard

ERRORS = "prepare_errors.jsonl"
SPLIT, VERSION = "train", "1.0.0"
MOST_BYTES = 2**28  # more than any image has that is meant well
READERS = 16  # threads that read the source's images
AHEAD = 64  # records that are read before their turn to be written
COMPARED = 32  # shards of which it is checked that they are of this source


class _PreparedRecord(NamedTuple):
    """What a record becomes: bytes, or why it is left out."""

    name: str
    example: bytes | None
    error: dict[str, Any] | None = None


def prepare(
    format: str,
    source: str,
    out: str | Path,
    name: str | None = None,
    root: str | None = None,
    shard_size: int = 4_096,
    decode: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Writes a source's records into a folder from which the format `tfds`, or TensorFlow Datasets, reads them.

    format, source, root: what is read, as in `Source`
    name:       of the data set (the format's if not given)
    shard_size: of the source's records that go into a file
    decode:     decode every image, to find those that are cut off; otherwise a file's head tells whether it is one

    Records that cannot be used are left out and named in `prepare_errors.jsonl` in the folder. Called again after it
    was stopped it goes on; shards that are not there or have another size are made anew. Raises ValueError if the
    folder was begun with other arguments or for another source, or if no record can be used, OSError if it cannot be
    written (the shards that are done stay), and what the source's reader raises.
    """
    console = console or Console(markup=False)
    name = format if name is None else name
    _check_arguments(format, name, shard_size)
    files.refuse(Source(format, source, root=root).url_problems("source", "root") + files.url_problems({"out": out}))
    records = FORMATS[format](source, root)
    local = os.path.abspath(source) if os.path.exists(source) else source  # the same, whatever the working directory
    making = Making(format, local, root and os.path.abspath(root), name, shard_size, decode, len(records))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with files.exclusive_lock(folder, "preparing data"):
        shards = dict(_begin(folder, making, records).shards)
        missing = [number for number in range(making.shards) if number not in shards]
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn(), TimeRemainingColumn())
        with (Progress(*columns, console=console, disable=not console.is_terminal) as bar,
              concurrent.futures.ThreadPoolExecutor(READERS) as pool):
            done = sum(len(_numbers(making, number)) for number in shards)
            task = bar.add_task(name, total=making.records, completed=done)
            for number in missing:
                looks = _ahead(pool, lambda place: _look(records, place, decode), _numbers(making, number))
                shards[number] = _write(folder, making, number, looks, lambda: bar.advance(task))
        made = Manifest(making, shards)
        if not made.records:
            raise ValueError(f"None of the {making.records} records of {source} can be used: see {folder / ERRORS}.")
        _describe(folder, made)
    return made


def verify(folder: str | Path, console: Console | None = None) -> Manifest:
    """Compares every shard's checksum with what was written.

    Raises ValueError naming the shards that are damaged, or if the folder was not made by `prepare`, or not to the end.
    """
    console = console or Console(markup=False)
    made = manifest.read(folder)
    if made is None:
        raise ValueError(f"{folder} was not made by mmjax data prepare: there is no {manifest.FILE} in it.")
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        shards = bar.track(made.shards.values(), description="shards")
        manifest.check(folder, made, (manifest.trouble(folder, shard, checksum=True) for shard in shards))
    return made


def _check_arguments(format: str, name: str, shard_size: int) -> None:
    problems = []
    if format not in FORMATS:
        problems.append(f"there is no format {format}; there are {', '.join(FORMATS)}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        problems.append(f"name = {name!r}, but must be of the letters a to z, digits and _, a letter first")
    if shard_size < 1:
        problems.append(f"shard_size = {shard_size}, but must be 1 or more")
    if problems:
        raise ValueError("Nothing can be prepared like this:\n  " + "\n  ".join(problems))


def _begin(folder: Path, making: Making, records: Sequence[Record]) -> Manifest:
    """What a folder has already, without what was not finished. Raises ValueError if it is of another making."""
    made = manifest.read(folder)
    if made is None:
        if others := sorted(path.name for path in folder.iterdir() if path.name != manifest.FILE + PARTIAL):
            raise ValueError(f"{folder} has other files in it, such as {', '.join(others[:3])}. Name an empty folder, "
                             "or one that is not there yet.")
        made = Manifest(making, {})
    wanted = dataclasses.asdict(making)
    if changed := {key: old for key, old in dataclasses.asdict(made.making).items() if old != wanted[key]}:
        raise ValueError(
            f"{folder} was begun with other arguments:\n  "
            + "\n  ".join(f"{key} = {old!r}, now {wanted[key]!r}" for key, old in changed.items())
            + f"\nRepeat the command as it was, or name another folder: {made.making.command(folder)}")
    _compare(folder, made, records)
    for rest in folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
    kept = {number: shard for number, shard in made.shards.items() if manifest.trouble(folder, shard) is None}
    if (folder / ERRORS).is_file():
        files.replace(folder / ERRORS, _lines_of(folder / ERRORS, kept))
    made = Manifest(making, kept)
    manifest.write(folder, made)
    return made


def _compare(folder: Path, made: Manifest, records: Sequence[Record]) -> None:
    """Raises ValueError if the records that some shards were made of have other names now."""
    shards = list(made.shards.values())
    for shard in shards[::max(1, len(shards) // COMPARED)]:
        numbers = _numbers(made.making, shard.number)
        for number, name in ((numbers[0], shard.first), (numbers[-1], shard.last)):
            if (now := _name(records, number)) != name:
                raise ValueError(f"{made.making.source} has changed since {folder} was begun: its record {number} was "
                                 f"{name!r} and is {now!r}. Name another folder, or delete this one.")


def _name(records: Sequence[Record], number: int) -> str:
    try:
        return records[number].name
    except (ValueError, OSError):
        return str(number)


def _lines_of(path: Path, shards: Iterable[int]) -> Iterator[str]:
    """The lines about these shards; half a line at the end is of none."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n") and json.loads(line)["shard"] in shards:
                yield line


def _numbers(making: Making, shard: int) -> range:
    """The source's records that a shard is made of."""
    return range(shard * making.shard_size, min((shard + 1) * making.shard_size, making.records))


def _ahead(pool: concurrent.futures.Executor, look: Callable[[int], _PreparedRecord], numbers: Iterable[int]) -> Iterator[_PreparedRecord]:
    """The results in order, some of them ahead of their turn."""
    waiting: collections.deque[concurrent.futures.Future[_PreparedRecord]] = collections.deque()
    for number in numbers:
        waiting.append(pool.submit(look, number))
        if len(waiting) > AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _look(records: Sequence[Record], number: int, decode: bool) -> _PreparedRecord:
    record = None
    try:
        record = records[number]
        if record.problem is not None:
            raise ValueError(record.problem)
        content = None if record.image is None else _image_bytes(record.image, decode)
        return _PreparedRecord(record.name, example(record, content))
    except (ValueError, OSError) as error:
        name, image = (str(number), None) if record is None else (record.name, record.image)
        file = None if image is None else str(getattr(image, "file", image))
        return _PreparedRecord(name, None, {"record": number, "name": name, "file": file, "problem": str(error)})


def _image_bytes(image: Any, decode: bool) -> bytes:
    """An image's bytes. Raises OSError or ValueError if it is not there, or not an image of a size to be decoded."""
    if hasattr(image, "read"):
        content = image.read()
    elif not os.path.isfile(image):  # neither a folder nor a pipe that would be waited for
        raise ValueError(f"No image at {image}.")
    elif (size := os.path.getsize(image)) > MOST_BYTES:
        raise ValueError(f"{image} has {size} bytes, more than the {MOST_BYTES} that are read.")
    else:
        content = Path(image).read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=images.KINDS) as opened:
            images.check_pixels(opened, len(content))
            if decode:
                opened.load()
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise ValueError(f"{image} is not an image that can be read: {error}") from error
    return content


def _write(folder: Path, making: Making, number: int, looks: Iterable[_PreparedRecord], advance: Callable[[], None]) -> Shard:
    """Makes one shard; raises OSError if it cannot be written."""
    from array_record.python.array_record_module import ArrayRecordWriter

    path = Path(_template(folder, making).sharded_filepath(shard_index=number, num_shards=making.shards))
    beside = path.with_name(path.name + PARTIAL)
    first, last, errors, count = None, "", [], 0
    try:
        writer = ArrayRecordWriter(str(beside), "group_size:1,uncompressed")  # images are compressed already
        try:
            for look in looks:
                first, last = look.name if first is None else first, look.name
                if look.example is None:
                    errors.append({"shard": number} | look.error)
                else:
                    writer.write(look.example)
                    count += 1
                advance()
        finally:
            writer.close()
        files.sync(beside)
        shard = Shard(number, path.name, count, len(errors), beside.stat().st_size, files.sha256(beside),
                      first or "", last)
        if errors:
            manifest.append(folder / ERRORS, map(manifest.line_of, errors))
        os.replace(beside, path)
        manifest.append(folder / manifest.FILE, [manifest.line_of(shard)])
    except (RuntimeError, OSError) as error:  # the former is what the writer raises, also for a full disk
        raise OSError(f"{path} cannot be written: {error}. What is done stays: once there is room "
                      f"({shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free), the same command goes on."
                      ) from error
    finally:
        beside.unlink(missing_ok=True)
    return shard


# ---- what TensorFlow Datasets wants to know ----


def _template(folder: Path, making: Making) -> Any:
    from tensorflow_datasets.core import ShardedFileTemplate

    return ShardedFileTemplate(data_dir=folder, dataset_name=making.name, split=SPLIT, filetype_suffix="array_record")


def _describe(folder: Path, made: Manifest) -> None:
    """Writes the files that make the folder a data set; `dataset_info.json` last."""
    from tensorflow_datasets import core

    making, shards = made.making, [made.shards[number] for number in range(made.making.shards)]
    info = core.DatasetInfo(
        builder=core.DatasetIdentity(
            name=making.name, version=core.Version(VERSION), data_dir=str(folder), module_name=__name__),
        features=features(), disable_shuffling=True,
        description=f"{making.format} {making.source}, prepared by mmjax: the records in their order, images as they "
                    "are. `image` and `prompt` hold one or none.")
    info.set_file_format("array_record")
    info.set_splits(core.SplitDict([core.SplitInfo(
        name=SPLIT, shard_lengths=[shard.records for shard in shards], num_bytes=sum(shard.size for shard in shards),
        filename_template=_template(folder, making))]))
    with tempfile.TemporaryDirectory(dir=folder, suffix=PARTIAL) as beside:
        info.write_to_directory(beside)
        for file in sorted(Path(beside).iterdir(), key=lambda path: path.name == "dataset_info.json"):
            os.replace(file, folder / file.name)


def summary(made: Manifest, folder: str | Path) -> list[str]:
    """What to tell whoever prepared a folder: how much is in it, and what is not."""
    size = sum(shard.size for shard in made.shards.values())
    lines = [f"{made.records:,} records in {made.making.shards:,} shards, {size / 2**20:,.1f} MiB, are in {folder}. To "
             f"learn from them: --data.format tfds --data.path {folder}"]
    if made.left_out:
        share = made.left_out / made.making.records
        lines.append(f"{made.left_out:,} of {made.making.records:,} records ({share:.2%}) cannot be used and are left "
                     f"out: {Path(folder) / ERRORS}")
    return lines
