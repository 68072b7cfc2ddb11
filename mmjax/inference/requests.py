"""Requests to a model: samples from a file of JSON lines or from a folder of images.

All lines are checked before any is used. Images and other files are not opened here: one that cannot be opened fails
when it is answered.
"""

import collections
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import files
from mmjax.batch import Sample
from mmjax.data import senses
from mmjax.data.formats.account import Account
from mmjax.data.formats.rows import Root, field, image_names, image_path, lines_of, shown, text
from mmjax.data.images import SUFFIXES
from mmjax.data.text import PLACEHOLDER
from mmjax.families.base import PromptStyle

KEYS = ("id", "image", "images", "prompt", "media", "weights")
INLINE = ("text",)  # senses whose value in a line is the input itself, not the name of a file
OUTSIDE = "links that lead out of the folder (--follow-links allows them)"
MAX_LISTED = 20  # problems that one error lists


@dataclasses.dataclass(frozen=True)
class Request:
    """One sample to answer.

    id:      unique within its file
    sample:  images, and other senses that are files, are paths
    choices: answers to choose from; empty if the model generates its answer
    """

    id: str
    sample: Sample
    choices: tuple[str, ...] = ()


def read_jsonl(path: str | Path, root: str | Path | None = None, follow_links: bool = False,
               account: Account | None = None) -> list[Request]:
    """Reads a file with one JSON object a line: {"id"?, "image" or "images"?, "prompt", "media"?, "weights"?}.

    root:         the folder of all files; None for the folder of `path`
    follow_links: whether links may lead out of that folder
    account:      gets the lines that were found and left out

    "image" is a file name, a list of them, or null for none, "images" a list of them. "media" has other senses by name:
    "text" as a string, all others as the name of a .wav, .npy or, for depth, .png file. "weights" are the weights of
    the senses in their mix. A prompt may mark the positions of its images by `<ImageHere>`; without it they precede the
    prompt. The default "id" is the line's number, from 1. Blank lines are ignored.

    Raises FileNotFoundError, or ValueError naming every invalid line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There are no samples at {path}. Expected a file with one JSON object a line.")
    folder = Root.of(str(path.absolute().parent if root is None else root), follow_links)
    requests, problems = [], []
    lines, blank = lines_of(path)
    for number, line in lines:
        try:
            requests.append(_parse(folder, number + 1, line))
        except ValueError as error:
            problems.append(f"line {number + 1}: {error}")
    problems += _duplicates(requests)
    if problems:
        more = [f"and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
        raise ValueError(f"{len(problems)} lines of {path} cannot be used:\n  "
                         + "\n  ".join(problems[:MAX_LISTED] + more)
                         + '\nA line is {"image": "NAME", "prompt": "TEXT"}, with "images", "media", "weights" and '
                         f'"id" where needed; file names are relative to {folder}.')
    if not requests:
        raise ValueError(f"{path} has no lines.")
    if account is not None:
        account.unit, account.found, account.used = "lines", len(lines) + blank, len(requests)
        if blank:
            account.leave("blank lines", count=blank)
    return requests


def images(folder: str | Path, prompt: str, follow_links: bool = False, account: Account | None = None
           ) -> list[Request]:
    """Returns a request with the same prompt for every image below a folder, sorted by name; the name is the id.

    follow_links: whether links to files and folders may lead out of the folder
    account:      gets the files that were found and left out

    Raises FileNotFoundError if there is no image, ValueError for a prompt with several images and for names that are
    not UTF-8."""
    folder, account = Path(folder), Account("files") if account is None else account
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    account.unit, names = "files", []
    for path, linked_folder in _files_below(folder, follow_links):
        name = path.relative_to(folder).as_posix()
        account.found += 1
        if reason := _left_reason(folder, path, linked_folder, follow_links):
            account.leave(reason, name)
        else:
            names.append(name)
    account.used, names = len(names), sorted(names)
    if not names:
        raise FileNotFoundError(f"{folder} has no images ({', '.join(SUFFIXES)}). {account.line(str(folder))}")
    if invalid := [ascii(name) for name in names if not is_text(name)]:
        raise ValueError(f"{len(invalid)} images in {folder} have names that are not UTF-8: "
                         f"{', '.join(invalid[:MAX_LISTED])}. Rename them.")
    if prompt.count(PLACEHOLDER) > 1:
        raise ValueError(f"The prompt has {prompt.count(PLACEHOLDER)} images, but each request has one.")
    return [Request(name, Sample(images=[str(folder / name)], prompt=prompt)) for name in names]


def _files_below(folder: Path, follow_links: bool) -> Iterator[tuple[Path, bool]]:
    """Yields (path, False) of every file below a folder, and (path, True) of every linked folder that is not entered:
    without `follow_links` none is, with it none that was entered before."""
    entered = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=follow_links):
        for name in sorted(folders):
            path = Path(parent, name)
            if path.is_symlink() and (not follow_links or os.path.realpath(path) in entered):
                folders.remove(name)
                yield path, True
            entered.add(os.path.realpath(path))
        yield from ((Path(parent, name), False) for name in names)


def _left_reason(folder: Path, path: Path, linked_folder: bool, follow_links: bool) -> str | None:
    """Returns why a file or linked folder is not answered; None for an image."""
    base, real = os.path.realpath(folder), os.path.realpath(path)
    outside = real != base and not real.startswith(base.rstrip(os.sep) + os.sep)
    if linked_folder:
        return OUTSIDE if outside and not follow_links else "linked folders whose files are here already"
    if path.name.startswith("._"):
        return "files of macOS whose names begin with ._"
    if path.suffix.lower() not in SUFFIXES:
        return f"files with the suffix {shown(path.suffix.lower())}" if path.suffix else "files without a suffix"
    if outside and not follow_links:
        return OUTSIDE
    return None if path.is_file() else "links that lead nowhere, pipes and devices"


def is_text(text: str) -> bool:
    """Returns whether a string can be encoded as UTF-8. Bytes that were not UTF-8 are decoded to surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def with_images(sample: Sample, style: PromptStyle) -> Sample:
    """Returns the sample with its images in front of the prompt if the prompt does not mark their positions, for
    families whose images take slots of the text."""
    if PLACEHOLDER in sample.prompt:
        return sample
    return dataclasses.replace(sample, prompt=style.with_images(sample.prompt, len(sample.images)))


def read_sense(name: str, value: Any) -> Any:
    """Returns the input of a sense: the array of a file, see `mmjax.data.senses.read_array`; text, and the name of a
    sound, unchanged. Raises ValueError naming a file that cannot be read."""
    if name in INLINE or not isinstance(value, str) or name == "audio":
        return value
    return senses.read_array(name, value)


def digest(requests: Sequence[Request]) -> str:
    """Returns the SHA-256 of requests. Files enter with their names but not their folders, so they may be moved."""
    sha256 = hashlib.sha256()
    for request in requests:
        sample = request.sample
        content = [request.id, sample.prompt, sample.input, sample.turns, [_identity(image) for image in sample.images],
                   {name: value if name in INLINE else _identity(value) for name, value in sample.media.items()},
                   sample.weights, request.choices]
        sha256.update(json.dumps(content, sort_keys=True).encode() + b"\n")
    return sha256.hexdigest()


def _identity(value: Any) -> Any:
    """Returns a file's name, an array's hash, or the string of any other value."""
    if isinstance(value, (str, os.PathLike)):
        return os.path.basename(value)
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value)).hexdigest()]
    return [_identity(part) for part in value] if isinstance(value, (list, tuple)) else str(value)


def _parse(root: str, number: int, line: bytes) -> Request:
    try:
        row = files.parse_json(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {shown(row)}")
    if unknown := sorted(row.keys() - set(KEYS)):
        raise ValueError(f"unknown {', '.join(map(shown, unknown))}; a line has {', '.join(KEYS)}")
    name = str(number) if "id" not in row else _id(row)
    prompt, names = text(row, "prompt"), image_names(row)
    if (count := prompt.count(PLACEHOLDER)) not in (0, len(names)):
        raise ValueError(f"{count} {PLACEHOLDER} in the prompt for {len(names)} images")
    return Request(name, Sample(images=[image_path(root, each) for each in names], media=_media(root, row),
                                weights=_weights(row), prompt=prompt))


def _id(row: dict[str, Any]) -> str:
    return text(row, "id") if isinstance(row["id"], str) else str(field(row, "id", int))


def _media(root: str, row: dict[str, Any]) -> dict[str, str]:
    media = field(row, "media", dict) if "media" in row else {}
    return {name: text(media, name) if name in INLINE else image_path(root, text(media, name)) for name in media}


def _weights(row: dict[str, Any]) -> dict[str, float]:
    weights = field(row, "weights", dict) if "weights" in row else {}
    return {name: float(field(weights, name, int, float)) for name in weights}


def _duplicates(requests: Sequence[Request]) -> list[str]:
    counts = collections.Counter(request.id for request in requests)
    return [f"id {shown(name)} is that of an earlier line" for name, count in counts.items() if count > 1]
