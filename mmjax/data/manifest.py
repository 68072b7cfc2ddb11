"""The manifest of a prepared data set, which lists its shards, their origin and their checksums.

It is a file of JSON lines. The first line describes the origin of the shards. Every other line describes a shard, and
is written when the shard is complete; of several lines about one shard the last is valid.
"""

import dataclasses
import json
import os
import reprlib
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmjax import files

FILE = "prepare.jsonl"
PARTIAL = ".partial"  # suffix of files that are being written
SHOWN = 20  # maximum number of damaged shards that an error names


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records.

    number:      index of the shard; it holds the source's records from number · `Making.shard_size` on
    records:     number of records in it
    left_out:    number of the source's records that are left out because they cannot be used
    size:        of the file in bytes
    sha256:      of the file
    first, last: names of the first and last record of the source
    """

    number: int
    file: str
    records: int
    left_out: int
    size: int
    sha256: str
    first: str
    last: str

    def __post_init__(self) -> None:
        if os.path.basename(self.file) != self.file:
            raise ValueError(f"{self.file!r} is not the name of a file in the folder")


@dataclasses.dataclass(frozen=True)
class Making:
    """The origin of the shards and their options; see `mmjax.data.prepare.prepare`.

    records:      number of records of the source
    follow_links: whether links may lead out of the root
    """

    format: str
    source: str
    root: str | None
    name: str
    shard_size: int
    decode: bool
    records: int
    follow_links: bool = False

    @property
    def shards(self) -> int:
        return -(-self.records // self.shard_size)

    def command(self, folder: str | Path) -> str:
        """Returns the command line that makes the shards in a folder."""
        args = ["mmjax", "data", "prepare", self.format, self.source, "--out", str(folder), "--name", self.name,
                 "--shard-size", str(self.shard_size)]
        args += [] if self.root is None else ["--root", self.root]
        args += ["--follow-links"] if self.follow_links else []
        return shlex.join(args + (["--decode"] if self.decode else []))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The manifest of a folder. shards: the complete ones by number"""

    making: Making
    shards: dict[int, Shard]

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards.values())

    @property
    def left_out(self) -> int:
        return sum(shard.left_out for shard in self.shards.values())

    @property
    def whole(self) -> bool:
        return len(self.shards) == self.making.shards


def read(folder: str | Path) -> Manifest | None:
    """Returns a folder's manifest; None if it has none. Raises ValueError for a damaged line.

    An incomplete last line is ignored: the process that wrote it was stopped.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    head, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] or [""]
    try:
        making = Making(**files.parse_json(head))
        shards = [Shard(**files.parse_json(line)) for line in lines]
        _check(making, shards)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}. Copy the folder again, or delete it and prepare the data again."
                         ) from error
    return Manifest(making, {shard.number: shard for shard in shards})


def _check(*lines: Any) -> None:
    """Raises ValueError for values of another type than their field's."""
    for line in (lines[0], *lines[1]):
        for field in dataclasses.fields(line):
            value = getattr(line, field.name)
            kinds = {"str": str, "int": int, "bool": bool, "str | None": (str, type(None))}
            kind = kinds[field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "str | None")]
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                raise ValueError(f"{field.name} is {reprlib.repr(value)}")
    if lines[0].shard_size < 1:
        raise ValueError(f"shard_size is {lines[0].shard_size}")


def write(folder: str | Path, manifest: Manifest) -> None:
    """Writes a folder's manifest and replaces an existing one."""
    lines = [manifest.making, *manifest.shards.values()]
    files.replace(Path(folder) / FILE, (line_of(line) for line in lines))


def line_of(line: Making | Shard | dict[str, Any]) -> str:
    """Returns a line of JSON."""
    return json.dumps(line if isinstance(line, dict) else dataclasses.asdict(line)) + "\n"


def append(path: Path, lines: Iterable[str]) -> None:
    """Appends lines to a file and flushes them to the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def shard_problem(folder: str | Path, shard: Shard, checksum: bool = False) -> str | None:
    """Returns the problem of a shard's file: it is missing, or its size or, with `checksum`, its checksum differs."""
    path = Path(folder) / shard.file
    if not path.is_file():
        return f"{shard.file} is missing"
    if (size := path.stat().st_size) != shard.size:
        return f"{shard.file} has {size} bytes, but was written with {shard.size}"
    if checksum and (digest := files.sha256(path)) != shard.sha256:
        return f"{shard.file} has the SHA-256 {digest}, but was written with {shard.sha256}"
    return None


def check(folder: str | Path, manifest: Manifest, problems: Iterable[str | None] | None = None) -> None:
    """Raises ValueError naming the damaged shards and what to do, or if shards are not complete.

    problems: results of `shard_problem`; None to check the sizes of all shards
    """
    again = manifest.making.command(folder)
    if not manifest.whole:
        raise ValueError(f"{folder} has {len(manifest.shards)} of {manifest.making.shards} shards: it was not prepared "
                         f"completely. The same command resumes: {again}")
    if problems is None:
        problems = (shard_problem(folder, shard) for shard in manifest.shards.values())
    if damaged := list(filter(None, problems)):
        shown = "\n  ".join(damaged[:SHOWN]) + (f"\n  and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else "")
        raise ValueError(f"{len(damaged)} of the {len(manifest.shards)} shards of {folder} are damaged:\n  {shown}\n"
                         f"Copy them again, or delete them and repeat the command, which makes only these again: "
                         f"{again}")
