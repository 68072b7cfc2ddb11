"""The shards of a prepared data set: which there are, how they were made, and whether they are as they were written.

A folder's manifest is a file of lines of JSON. The first says what the shards are made of. Every other one is of a
shard, and is written when the shard lies there whole; a shard that is made again has a later line, which counts.
"""

import dataclasses
import json
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmjax import files

FILE = "prepare.jsonl"
PARTIAL = ".partial"  # ends the name of what is being written
SHOWN = 20  # damaged shards that an error names


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records.

    number:      of the shard; it is made of the source's records from number · `Making.shard_size` on
    records:     how many are in it
    left_out:    how many of the source's are not, because they cannot be used
    size:        bytes of the file
    sha256:      of the file
    first, last: names of the first and last record of the source that it is made of
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
    """What shards are made of, and how; see `mmjax.data.prepare.prepare`.

    records: how many the source has
    """

    format: str
    source: str
    root: str | None
    name: str
    shard_size: int
    decode: bool
    records: int

    @property
    def shards(self) -> int:
        return -(-self.records // self.shard_size)

    def command(self, folder: str | Path) -> str:
        """The command line that makes them in a folder."""
        words = ["mmjax", "data", "prepare", self.format, self.source, "--out", str(folder), "--name", self.name,
                 "--shard-size", str(self.shard_size)]
        words += [] if self.root is None else ["--root", self.root]
        return shlex.join(words + (["--decode"] if self.decode else []))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """shards: by their numbers, as far as they are made"""

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
    """A folder's manifest; None if it has none. Raises ValueError if a line of it is not as it was written.

    The last line may be half of one: whoever was to write it was stopped.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    head, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] or [""]
    try:
        making, shards = Making(**json.loads(head)), [Shard(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}. Copy the folder again, or delete it and prepare the data again."
                         ) from error
    return Manifest(making, {shard.number: shard for shard in shards})


def write(folder: str | Path, manifest: Manifest) -> None:
    """Puts a manifest in the place of the folder's, if it has one."""
    lines = [manifest.making, *manifest.shards.values()]
    files.replace(Path(folder) / FILE, (line_of(line) for line in lines))


def line_of(line: Making | Shard | dict[str, Any]) -> str:
    return json.dumps(line if isinstance(line, dict) else dataclasses.asdict(line)) + "\n"


def append(path: Path, lines: Iterable[str]) -> None:
    """Adds lines to the end of a file; they are on the disk when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def trouble(folder: str | Path, shard: Shard, checksum: bool = False) -> str | None:
    """What is wrong with a shard's file: that it is not there, or has another size, or, if wanted, checksum."""
    path = Path(folder) / shard.file
    if not path.is_file():
        return f"{shard.file} is not there"
    if (size := path.stat().st_size) != shard.size:
        return f"{shard.file} has {size} bytes, but was written with {shard.size}"
    if checksum and (found := files.sha256(path)) != shard.sha256:
        return f"{shard.file} has the SHA-256 {found}, but was written with {shard.sha256}"
    return None


def check(folder: str | Path, manifest: Manifest, looks: Iterable[str | None] | None = None) -> None:
    """Raises ValueError naming the damaged shards and what to do about them, or saying that not all are made.

    looks: what `trouble` found; None to look at the sizes of all
    """
    again = manifest.making.command(folder)
    if not manifest.whole:
        raise ValueError(f"{folder} has {len(manifest.shards)} of {manifest.making.shards} shards: it was not prepared "
                         f"to the end. The same command goes on: {again}")
    if looks is None:
        looks = (trouble(folder, shard) for shard in manifest.shards.values())
    if wrong := list(filter(None, looks)):
        shown = "\n  ".join(wrong[:SHOWN]) + (f"\n  and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else "")
        raise ValueError(f"{len(wrong)} of the {len(manifest.shards)} shards of {folder} are damaged:\n  {shown}\n"
                         f"Copy them again. Or delete them and repeat the command, which makes these anew and no "
                         f"others: {again}")
