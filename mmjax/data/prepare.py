"""Writes data of any format as a data set of TensorFlow Datasets, without TensorFlow: `mmjax data prepare`.

Images are stored with their original bytes, records in their order. Shard k has the source's records from
k · shard_size on. It is written under a temporary name, and a line is added to the manifest when it is complete. So the
command can be stopped at any time: shards with a line are kept, others are made again. The source is read once and
never kept in memory.
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

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmjax import files
from mmjax.config import Source
from mmjax.data import formats, images, manifest
from mmjax.data.formats import FORMATS, Account, Record
from mmjax.data.formats.account import printable
from mmjax.data.formats.tfds import example, features
from mmjax.data.manifest import PARTIAL, Making, Manifest, Shard

ERRORS = "prepare_errors.jsonl"
SPLIT, VERSION = "train", "1.0.0"
MOST_BYTES = 2**28  # maximum size of an image file
READERS = 16  # threads that read the source's images
AHEAD = 64  # records that are prefetched
COMPARED = 32  # number of shards whose record names are compared with the source


class _PreparedRecord(NamedTuple):
    """The bytes of a record, or the reason why it is left out."""

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
    follow_links: bool = False,
    list_all: bool = False,
) -> Manifest:
    """Writes a source's records into a folder, which the format `tfds` and TensorFlow Datasets can read.

    format, source, root: the format, path and root of the data, as in `Source`
    name:       name of the data set; None for that of the format
    shard_size: number of the source's records in a file
    decode:     decode every image, to find truncated ones; otherwise only the file's header is checked
    follow_links: whether links may lead out of the root
    list_all:   print every item of the source that is left out, not only their numbers

    Records that cannot be used are left out and named in `prepare_errors.jsonl` in the folder. A second call resumes
    after an interruption and makes missing or damaged shards again. Raises ValueError if the folder was begun with
    other arguments or for another source, or if no record can be used, OSError if it cannot be written (complete shards
    are kept), and the errors of the source's reader.
    """
    console = console or Console(markup=False)
    name = format if name is None else name
    _check_arguments(format, name, shard_size)
    files.refuse(Source(format, source, root=root).url_problems("source", "root") + files.url_problems({"out": out}))
    records = formats.read(Source(format, source, root=root, follow_links=follow_links))
    local = os.path.abspath(source) if os.path.exists(source) else source  # the same, whatever the working directory
    making = Making(format, local, root and os.path.abspath(root), name, shard_size, decode, len(records),
                    follow_links)
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
                prepared = _prefetch(pool, lambda index: _prepared(records, index, decode), _numbers(making, number))
                shards[number] = _write(folder, making, number, prepared, lambda: bar.advance(task))
        result = Manifest(making, shards)
        if not result.records:
            raise ValueError(f"None of the {making.records} records of {source} can be used: see {folder / ERRORS}.")
        _write_dataset_info(folder, result)
        account = _account(folder, records, result)
        for line in (account.line(source), *(account.listing() if list_all else ())):
            console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
    return result


def _account(folder: Path, records: Sequence[Record], result: Manifest) -> Account:
    """Returns the account of a source, with the records that are left out."""
    account = Account.of(records).copy()
    lines = (json.loads(line) for line in _lines_of(folder / ERRORS, result.shards)) if result.left_out else ()
    for line in lines:
        account.reject("records that cannot be used", f"{line['name']}: {line['problem']}")
    return account


def verify(folder: str | Path, console: Console | None = None) -> Manifest:
    """Compares every shard's checksum with the manifest.

    Raises ValueError naming the damaged shards, or if the folder was not made by `prepare`, or not completely.
    """
    console = console or Console(markup=False)
    stored = manifest.read(folder)
    if stored is None:
        raise ValueError(f"{folder} was not made by mmjax data prepare: there is no {manifest.FILE} in it.")
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        shards = bar.track(stored.shards.values(), description="shards")
        manifest.check(folder, stored, (manifest.shard_problem(folder, shard, checksum=True) for shard in shards))
    return stored


def _check_arguments(format: str, name: str, shard_size: int) -> None:
    problems = []
    if format not in FORMATS:
        problems.append(f"there is no format {format}; there are {', '.join(FORMATS)}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        problems.append(f"name = {name!r}, but must have letters a to z, digits and _, and begin with a letter")
    if shard_size < 1:
        problems.append(f"shard_size = {shard_size}, but must be 1 or more")
    if problems:
        raise ValueError("The data cannot be prepared with these arguments:\n  " + "\n  ".join(problems))


def _begin(folder: Path, making: Making, records: Sequence[Record]) -> Manifest:
    """Removes unfinished files and returns the manifest of the complete shards.

    Raises ValueError if the folder was begun with other arguments.
    """
    stored = manifest.read(folder)
    if stored is None:
        if others := sorted(path.name for path in folder.iterdir() if path.name != manifest.FILE + PARTIAL):
            raise ValueError(f"{folder} has other files in it, such as {', '.join(others[:3])}. Name an empty folder, "
                             "or one that does not exist.")
        stored = Manifest(making, {})
    wanted = dataclasses.asdict(making)
    if changed := {key: old for key, old in dataclasses.asdict(stored.making).items() if old != wanted[key]}:
        raise ValueError(
            f"{folder} was begun with other arguments:\n  "
            + "\n  ".join(f"{key} = {old!r}, now {wanted[key]!r}" for key, old in changed.items())
            + f"\nRepeat the command as it was, or name another folder: {stored.making.command(folder)}")
    _compare(folder, stored, records)
    for partial in folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    kept = {number: shard for number, shard in stored.shards.items() if manifest.shard_problem(folder, shard) is None}
    if (folder / ERRORS).is_file():
        files.replace(folder / ERRORS, _lines_of(folder / ERRORS, kept))
    result = Manifest(making, kept)
    manifest.write(folder, result)
    return result


def _compare(folder: Path, stored: Manifest, records: Sequence[Record]) -> None:
    """Raises ValueError if the source's records of some shards have other names now."""
    shards = list(stored.shards.values())
    for shard in shards[::max(1, len(shards) // COMPARED)]:
        numbers = _numbers(stored.making, shard.number)
        for number, name in ((numbers[0], shard.first), (numbers[-1], shard.last)):
            if (now := _name(records, number)) != name:
                raise ValueError(f"{stored.making.source} has changed since {folder} was begun: its record {number} "
                                 f"was {name!r} and is {now!r}. Name another folder, or delete this one.")


def _name(records: Sequence[Record], number: int) -> str:
    try:
        return records[number].name
    except (ValueError, OSError):
        return str(number)


def _lines_of(path: Path, shards: Iterable[int]) -> Iterator[str]:
    """Yields the lines about these shards, without an incomplete last line."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            try:
                shard = files.parse_json(line)["shard"] if line.endswith("\n") else None
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is damaged: {line[:80]!r} is not a line of it. Delete the folder and prepare "
                                 "the data again.") from error
            if shard in shards:
                yield line


def _numbers(making: Making, shard: int) -> range:
    """Returns the indices of the source's records in a shard."""
    return range(shard * making.shard_size, min((shard + 1) * making.shard_size, making.records))


def _prefetch(pool: concurrent.futures.Executor, function: Callable[[int], _PreparedRecord],
              numbers: Iterable[int]) -> Iterator[_PreparedRecord]:
    """Yields the results of a function in order, computed ahead by the pool."""
    pending: collections.deque[concurrent.futures.Future[_PreparedRecord]] = collections.deque()
    for number in numbers:
        pending.append(pool.submit(function, number))
        if len(pending) > AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _prepared(records: Sequence[Record], number: int, decode: bool) -> _PreparedRecord:
    record = None
    try:
        record = records[number]
        if record.problem is not None:
            raise ValueError(record.problem)
        return _PreparedRecord(record.name, example(record, [_image_bytes(image, decode) for image in record.images]))
    except (ValueError, OSError) as error:
        name, image = (str(number), None) if record is None else (record.name, record.image)
        file = None if image is None else str(getattr(image, "file", image))
        return _PreparedRecord(name, None, {"record": number, "name": name, "file": file, "problem": str(error)})


def _image_bytes(image: Any, decode: bool) -> bytes:
    """Returns an image's bytes. Raises OSError or ValueError if it is missing, too large or not an image."""
    if hasattr(image, "read"):
        content = image.read()
    elif not os.path.isfile(image):  # neither a folder nor a pipe, which would block
        raise ValueError(images.no_image(image))
    elif (size := os.path.getsize(image)) > MOST_BYTES:
        raise ValueError(f"{image} has {size} bytes, more than the {MOST_BYTES} that are read.")
    else:
        content = Path(image).read_bytes()
    try:
        with images.open_file(io.BytesIO(content), len(content)) as opened:
            if decode:
                opened.load()
    except Exception as error:  # decoders raise any error for damaged bytes
        raise ValueError(f"{image} is not an image that can be read: {error}") from error
    return content


def _write(folder: Path, making: Making, number: int, prepared: Iterable[_PreparedRecord],
           advance: Callable[[], None]) -> Shard:
    """Writes one shard; raises OSError if that fails."""
    from array_record.python.array_record_module import ArrayRecordWriter

    path = Path(_template(folder, making).sharded_filepath(shard_index=number, num_shards=making.shards))
    partial = path.with_name(path.name + PARTIAL)
    first, last, errors, count = None, "", [], 0
    try:
        writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")  # images are compressed already
        try:
            for record in prepared:
                first, last = record.name if first is None else first, record.name
                if record.example is None:
                    errors.append({"shard": number} | record.error)
                else:
                    writer.write(record.example)
                    count += 1
                advance()
        finally:
            writer.close()
        files.sync(partial)
        shard = Shard(number, path.name, count, len(errors), partial.stat().st_size, files.sha256(partial),
                      first or "", last)
        if errors:
            manifest.append(folder / ERRORS, map(manifest.line_of, errors))
        os.replace(partial, path)
        manifest.append(folder / manifest.FILE, [manifest.line_of(shard)])
    except (RuntimeError, OSError) as error:  # array_record raises RuntimeError, also for a full disk
        raise OSError(f"{path} cannot be written: {error}. Complete shards are kept: once there is room "
                      f"({shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free), the same command resumes."
                      ) from error
    finally:
        partial.unlink(missing_ok=True)
    return shard


# ---- metadata of TensorFlow Datasets ----


def _template(folder: Path, making: Making) -> Any:
    from tensorflow_datasets.core import ShardedFileTemplate

    return ShardedFileTemplate(data_dir=folder, dataset_name=making.name, split=SPLIT, filetype_suffix="array_record")


def _write_dataset_info(folder: Path, stored: Manifest) -> None:
    """Writes the metadata files of the data set; `dataset_info.json` last."""
    from tensorflow_datasets import core

    making, shards = stored.making, [stored.shards[number] for number in range(stored.making.shards)]
    info = core.DatasetInfo(
        builder=core.DatasetIdentity(
            name=making.name, version=core.Version(VERSION), data_dir=str(folder), module_name=__name__),
        features=features(), disable_shuffling=True,
        description=f"{making.format} {making.source}, prepared by mmjax: the records in their order, images "
                    "unchanged. `image` and `prompt` hold one or none.")
    info.set_file_format("array_record")
    info.set_splits(core.SplitDict([core.SplitInfo(
        name=SPLIT, shard_lengths=[shard.records for shard in shards], num_bytes=sum(shard.size for shard in shards),
        filename_template=_template(folder, making))]))
    with tempfile.TemporaryDirectory(dir=folder, suffix=PARTIAL) as partial:
        info.write_to_directory(partial)
        for file in sorted(Path(partial).iterdir(), key=lambda path: path.name == "dataset_info.json"):
            os.replace(file, folder / file.name)


def summary(result: Manifest, folder: str | Path) -> list[str]:
    """Returns lines with the contents of a prepared folder and the number of records that are left out."""
    size = sum(shard.size for shard in result.shards.values())
    lines = [f"{result.records:,} records in {result.making.shards:,} shards, {size / 2**20:,.1f} MiB, are in {folder}"
             f". To train on them: --data.format tfds --data.path {folder}"]
    if result.left_out:
        share = result.left_out / result.making.records
        lines.append(f"{result.left_out:,} of {result.making.records:,} records ({share:.2%}) cannot be used and are "
                     f"left out: {Path(folder) / ERRORS}")
    return lines
