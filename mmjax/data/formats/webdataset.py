"""Reads images with captions in tars, as img2dataset writes LAION, CC and SBU for MiniGPT-4's first stage.

Nothing is unpacked: the tars' headers are read once to index images and captions (`tar_index` caches the index on
disk), and a caption is read when its record is accessed. In memory a sample takes 40 bytes and its key.
"""

import concurrent.futures
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import track

from mmjax import files
from mmjax.config import REMOTE
from mmjax.data.formats import tar_index
from mmjax.data.formats.account import Account, Items
from mmjax.data.formats.record import Member, Record
from mmjax.data.formats.rows import Lazy, caption_text, shown
from mmjax.data.formats.tar_index import TarIndex

NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)  # webdataset: base_plus_ext
KINDS = {"jpg": "image", "jpeg": "image", "png": "image", "webp": "image", "txt": "text", "json": "json"}
MOST_BYTES = {"image": 2**28, "text": 2**20, "json": 2**20}  # maximum sizes
MOST_SHARDS = 1_000_000
THREADS = 8  # that read headers concurrently from disks and buckets
LONGEST_KEY = 200
REST = "(the rest.)"  # key of the lost samples of a damaged tar; other keys have no dot after their folder
BRACE = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def webdataset(path: str, root: None = None, follow_links: bool = False) -> Sequence[Record]:
    """Reads tars whose members are grouped by name: KEY.jpg (or jpeg, png, webp) with KEY.txt or KEY.json.

    path: a tar, several by braces (`laion/{00000..10488}.tar`), or a folder of them; local or gs://, s3://, hf://

    The caption is the text, or the JSON's `caption` or `text`. Other members are left out, which the account of the
    records counts. An archive behind the end of the first in a tar (`cat a.tar b.tar`) is read too. A sample that
    cannot be used is a record with a problem; so is, once, the rest of a damaged tar. Raises FileNotFoundError or
    ValueError naming files that are missing or not tars, or a URL that is not supported or needs a missing package;
    also for a `root`, because the images are in the tars. The tars may be links; a link in a tar is never followed,
    whatever `follow_links` is.
    """
    try:
        return _read(path, root)
    except ImportError as error:  # of a package that epath needs for the scheme
        raise ValueError(f"{path} cannot be read on this machine: {error}") from error


def _read(path: str, root: None) -> Sequence[Record]:
    if root is not None:
        raise ValueError(f"The images of {path} are in the tars themselves: leave out the root, {root}.")
    tars, cache, account = shards(path), tar_index.folder(), Account("samples and other members")

    def read_index(file: str) -> TarIndex | ValueError | None:
        try:
            return tar_index.cached(file, cache, index) if epath.Path(file).is_file() else None
        except ValueError as error:
            return error

    console = Console(stderr=True, markup=False)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        indices = list(track(pool.map(read_index, tars), "headers of tars", len(tars), console=console,
                             transient=True, disable=not console.is_terminal))
    if absent := [file for file, each in zip(tars, indices, strict=True) if each is None]:
        raise FileNotFoundError(f"{len(absent)} of {len(tars)} tars do not exist, such as {', '.join(absent[:5])}.")
    if problems := [str(each) for each in indices if isinstance(each, ValueError)]:
        raise ValueError(f"{len(problems)} of the {len(tars)} tars of {path} cannot be used:\n  "
                         + "\n  ".join(problems[:20]))
    for file, each in zip(tars, indices, strict=True):
        account.add(_account(os.path.basename(file), each))
    if os.path.isdir(path):
        others = [file.name for file in sorted(Path(path).iterdir()) if not _is_shard(file.name)]
        account.found += len(others)
        if others:
            account.leave("files that are no .tar", *others)
    samples = Samples(tars, indices, account)
    if not len(samples):
        raise ValueError(f"The {len(tars)} tars of {path} hold no images with captions. They have "
                         + (", ".join(f"{items.count:,} {reason}" for reason, items in account.left.items())
                            or "no members") + ".")
    return samples


def _account(name: str, index: TarIndex) -> Account:
    """Returns the account of a tar with that name."""
    account = Account("", index.members, len(index.keys))
    for groups, add in ((index.left, account.leave), (index.odd, account.notice)):
        for reason, items in groups.items():
            add(reason, *(f"{name}:{each}" for each in items.names), count=items.count)
    return account


def _is_shard(name: str) -> bool:
    return re.fullmatch(r"[^.].*\.tar", name, re.DOTALL) is not None


def shards(path: str) -> list[str]:
    """Returns the tars of a path, in order. Raises ValueError if there are none or too many, or for URLs of other
    schemes than those of `REMOTE`."""
    remote = REMOTE["webdataset"]
    if problem := files.url_problem(path, remote):
        raise ValueError(problem)
    if os.path.isdir(path) or "{" not in path and epath.Path(path).is_dir():
        # not `glob`, which also interprets the folder's name as a pattern
        found = sorted(str(file) for file in epath.Path(path).iterdir() if _is_shard(file.name))
    else:
        found = list(itertools.islice(_expanded(path), MOST_SHARDS + 1))
    if not found or len(found) > MOST_SHARDS:
        raise ValueError(f"{path} matches {'more than a million tars' if found else 'no tars'}.")
    if problem := next(filter(None, (files.url_problem(file, remote) for file in found)), None):
        raise ValueError(problem)
    return found


def _expanded(pattern: str) -> Iterator[str]:
    match = BRACE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, several = match.groups()
    if several is not None:
        middles: Any = several.split(",")
    else:
        middles = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    for middle in middles:
        for rest in _expanded(pattern[match.end():]):
            yield pattern[:match.start()] + middle + rest


class Samples(Lazy):
    """The samples of several tars, one after the other."""

    def __init__(self, files: Sequence[str], indices: Sequence[TarIndex], account: Account) -> None:
        self.files, self.indices, self.account = tuple(files), indices, account
        self.ends = np.cumsum([len(index.keys) for index in indices])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def fingerprints(self) -> dict[str, str]:
        """Returns `{tar: size, time of its last change, and a digest of its headers}`."""
        return {file: f"{tar_index.describe_stamp(file)}, headers {index.digest[:16]}"
                for file, index in zip(self.files, self.indices, strict=True)}

    def name(self, number: int) -> str:
        shard, index = self._locate(number)
        return f"{os.path.basename(self.files[shard])}:{self.indices[shard].keys[index].decode(errors='replace')}"

    def record(self, number: int) -> Record:
        shard, number_in_tar = self._locate(number)
        file, index = self.files[shard], self.indices[shard]
        if number_in_tar in index.problems:
            raise ValueError(index.problems[number_in_tar])
        offset, size, caption_offset, caption_size, is_json = map(int, index.places[number_in_tar])
        content = Member(file, caption_offset, caption_size).read()
        return Record(self.name(number), Member(file, offset, size), _caption(content, bool(is_json)))

    def _locate(self, number: int) -> tuple[int, int]:
        """Returns the indices of the tar and of the sample in it."""
        shard = int(np.searchsorted(self.ends, number, side="right"))
        return shard, number - int(self.ends[shard]) + len(self.indices[shard].keys)


def _caption(content: bytes, is_json: bool) -> str:
    if not is_json:
        if problem := files.not_text(content):
            raise ValueError(f"the caption {problem}")
        return caption_text({"caption": content.decode("utf-8-sig")}, "caption")
    row = files.parse_json(content)
    return caption_text(row, "text" if isinstance(row, dict) and "caption" not in row else "caption")


class _TarReader:
    """Sorts the members of a tar into samples and other members; see `index`.

    samples:  (offset, size) of the members of each sample by kind; a sample is (number of its archive, key)
    problems: of samples that cannot be used
    """

    def __init__(self, size: int) -> None:
        self.size, self.members, self.archives = size, 0, 1
        self.samples: dict[tuple[int, str], dict[str, tuple[int, int]]] = {}
        self.problems: dict[tuple[int, str], str] = {}
        self.left: dict[str, Items] = {}
        self.odd: dict[str, Items] = {}

    def add(self, header: "TarMember") -> None:
        """Adds a member."""
        shown_name, named = printable(header.name), NAME.fullmatch(header.name)
        if header.archive + 1 > self.archives:
            self.archives = header.archive + 1
            self.odd.setdefault("archives behind the end of the first", Items()).add([f"from {shown_name} on"])
        if header.kind == FOLDER:
            return
        kind = KINDS.get(named[2].lower()) if named else None
        if kind is None:
            self.members += 1
            self.left.setdefault(_left_reason(named), Items()).add([shown_name])
            return
        if not is_utf8(header.name):
            self.odd.setdefault("members whose names are not UTF-8", Items()).add([shown_name])
        key = header.archive, named[1]
        sample = self.samples.setdefault(key, {})
        if problem := f"has two members {named[2]!r}" if kind in sample else _problem(header, kind, self.size):
            self.problems.setdefault(key, problem)
        sample[kind] = header.offset, header.size

    def lose(self, problem: str) -> None:
        """Adds a sample that stands for everything that cannot be read."""
        key = self.archives, REST
        self.samples[key], self.problems[key] = {}, problem

    def index(self) -> TarIndex:
        """Returns the index of the members that were added."""
        places = np.zeros((len(self.samples), 5), np.int64)
        for place, (key, sample) in zip(places, self.samples.items(), strict=True):
            caption = "text" if "text" in sample else "json"
            if {"text", "json"} <= sample.keys():
                self.members += 1
                self.left.setdefault("members .json beside a .txt", Items()).add([printable(key[1])])
            if key in self.problems:
                continue
            if "image" in sample and caption in sample:
                place[:] = *sample["image"], *sample[caption], caption == "json"
            else:
                self.problems[key] = f"has no {'caption' if 'image' in sample else 'image'}"
        keys = np.array([key.encode("utf-8", "surrogateescape")[:LONGEST_KEY] for _, key in self.samples], np.bytes_)
        problems = {place: self.problems[key] for place, key in enumerate(self.samples) if key in self.problems}
        return TarIndex(keys, places, problems, self.members + len(self.samples), self.left, self.odd)


def index(file: str) -> TarIndex:
    """Returns the index of a tar, from its headers alone. Raises ValueError if it is not a tar, or compressed."""
    last = None
    with epath.Path(file).open("rb") as archive:
        size = archive.seek(0, os.SEEK_END)
        if not size:
            raise ValueError(f"{file} is not a tar, or a compressed one: it is empty (0 bytes). Copy it again")
        reader = _TarReader(size)
        try:
            for header in _headers(archive, size):
                last = printable(header.name)
                reader.add(header)
        except ValueError as error:
            if last is None:
                archive.seek(0)
                raise ValueError(f"{file} is not a tar, or a compressed one: "
                                 f"{files.not_text(archive.read(64)) or error}") from error
            reader.lose(f"{file} is damaged after {last!r}, the samples after it are lost: {error}")
    return reader.index()


def _left_reason(named: re.Match[str] | None) -> str:
    """Returns why a member is not part of a sample. named: match of its name with `NAME`"""
    if named is None:
        return "members without a suffix, or hidden ones"
    if "." in named[2]:
        return "members with two dots in their names (the suffix begins at the first)"
    return f"members with the suffix {shown('.' + named[2])}"


def printable(name: str) -> str:
    """Returns a member's name for messages; bytes that are not UTF-8 are replaced."""
    return name[:LONGEST_KEY].encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def is_utf8(name: str) -> bool:
    return not any("\udc80" <= char <= "\udcff" for char in name)


def _problem(header: "TarMember", kind: str, size: int) -> str | None:
    """Returns why a member must not be read; None if it may."""
    name = printable(header.name)
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        return f"the name {name!r} leads out of the tar"
    if header.kind not in FILES:
        return f"{name!r} is a link or a sparse or special file"
    if header.size > MOST_BYTES[kind]:
        return f"{name!r} has {header.size} bytes, more than the {MOST_BYTES[kind]} that are read"
    if header.offset + header.size > size:
        return f"{name!r} is cut off: the tar ends before it does"
    return None


# ---- the tar format, as POSIX (pax) and GNU write it ----
# Python's tarfile treats a damaged header as the end of the archive, keeps every member in memory, and is slower.

BLOCK = 512
FILES = (b"0", b"\0", b"7")
EMPTY = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes: nothing follows the header
FOLDER, SPARSE, LONG_NAME, LONG_LINK, PAX, PAX_OF_ALL = b"5", b"S", b"L", b"K", b"x", b"g"
PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=\n]+)=")


class TarMember(NamedTuple):
    """A member: its name, its type flag, the offset and size of its bytes, and the number of its archive in the file.
    """

    name: str
    kind: bytes
    offset: int
    size: int
    archive: int = 0


def _headers(archive: IO[bytes], end: int) -> Iterator[TarMember]:
    """Yields the members of a tar of `end` bytes, and of archives that follow behind its end. Raises ValueError with
    the position of an error."""
    position, extra, number = 0, {}, 0  # pax records of the next member by keyword; number of the archive
    while position < end or not position:
        archive.seek(position)
        block = archive.read(BLOCK)
        if block and not block.strip(b"\0"):
            if (following := _after_zeros(archive, position)) is None:
                return
            position, extra, number = following, {}, number + 1
            continue
        name, kind, size = _text(block[:100]), block[156:157], _number(block[124:136])
        checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
        if len(block) < BLOCK or checksum != _number(block[148:156]) or size < 0:
            if number:
                raise ValueError(f"it goes on behind its end, but not with a tar: {end - position} bytes from byte "
                                 f"{position} on are not read")
            raise ValueError(f"there is no header at byte {position}")
        start = position + BLOCK
        if kind in (PAX, PAX_OF_ALL, LONG_NAME, LONG_LINK):
            content = archive.read(size) if size <= MOST_BYTES["text"] else b""
            if len(content) < size:
                raise ValueError(f"the names at byte {position} cannot have {size} bytes")
            if kind == PAX:
                extra |= _pax(content)
            elif kind == LONG_NAME:
                extra[b"path"] = content.partition(b"\0")[0]
            position = start + _padded(size)
            continue
        more = block[482] if kind == SPARSE else 0
        while more:  # further blocks of a sparse file's map
            block = archive.read(BLOCK)
            start += BLOCK
            more = block[504] if len(block) == BLOCK else 0
        if block[257:263] == b"ustar\0" and block[345]:
            name = f"{_text(block[345:500])}/{name}"
        if b"path" in extra:
            name = extra[b"path"].decode(errors="surrogateescape")
        if b"size" in extra:
            if not re.fullmatch(rb"\d{1,20}", extra[b"size"]):
                raise ValueError(f"the member at byte {position} has the size {extra[b'size'][:40]!r}")
            size = int(extra[b"size"])
        if any(key.startswith(b"GNU.sparse.") for key in extra):
            kind = SPARSE
        elif kind == FILES[1] and name.endswith("/"):
            kind = FOLDER
        yield TarMember(name, kind, start, size, number)
        position, extra = start + (0 if kind in EMPTY else _padded(size)), {}
    if position > end:
        raise ValueError("the tar ends within it")


def _after_zeros(archive: IO[bytes], position: int) -> int | None:
    """Returns the position of the first block from `position` on that is not all zeros; None if there is none."""
    archive.seek(position)
    while chunk := archive.read(2**20):
        if rest := len(chunk.lstrip(b"\0")):
            return position + (len(chunk) - rest) // BLOCK * BLOCK
        position += len(chunk)
    return None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")


def _number(field: bytes) -> int:
    """Returns the number of octal digits, or of base 256 after a byte 0x80; -1 for anything else."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1


def _pax(content: bytes) -> dict[bytes, bytes]:
    """Returns the records `LENGTH KEYWORD=VALUE` of a pax header."""
    records, position = {}, 0
    while position < len(content) and content[position]:
        record = PAX_RECORD.match(content, position)
        stop = position + int(record[1]) if record else 0
        if record is None or not record.end() < stop <= len(content):
            raise ValueError(f"{content[position:position + 40]!r} is not a pax header")
        records[record[2]] = content[record.end():stop - 1]
        position = stop
    return records
