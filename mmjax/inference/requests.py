"""Requests to a model: samples from a file of JSON lines or from a folder of images.

All lines are checked before any is used. Images and other files are not opened here: one that cannot be opened fails
when it is answered.
"""

import collections
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import files
from mmjax.batch import Sample
from mmjax.data.arrays import read_npy
from mmjax.data.formats.rows import field, image_path, shown, text
from mmjax.data.text import PLACEHOLDER
from mmjax.families.base import PromptStyle

KEYS = ("id", "image", "images", "prompt", "media", "weights")
INLINE = ("text",)  # senses whose value in a line is the input itself, not the name of a file
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2")
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


def read_jsonl(path: str | Path, root: str | Path | None = None) -> list[Request]:
    """Reads a file with one JSON object a line: {"id"?, "image" or "images"?, "prompt", "media"?, "weights"?}.

    root: the folder of all files; None for the folder of `path`

    "image" is a file name, "images" a list of them. "media" has other senses by name: "text" as a string, all others
    as the name of a .wav or .npy file. "weights" are the weights of the senses in their mix. A prompt may mark the
    positions of its images by `<ImageHere>`; without it they precede the prompt. The default "id" is the line's number,
    from 1. Blank lines are ignored.

    Raises FileNotFoundError, or ValueError naming every invalid line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There are no samples at {path}. Expected a file with one JSON object a line.")
    folder = str(path.absolute().parent if root is None else root)
    requests, problems = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                requests.append(_parse(folder, number, line))
            except ValueError as error:
                problems.append(f"line {number}: {error}")
    problems += _duplicates(requests)
    if problems:
        more = [f"and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
        raise ValueError(f"{len(problems)} lines of {path} cannot be used:\n  "
                         + "\n  ".join(problems[:MAX_LISTED] + more)
                         + '\nA line is {"image": "NAME", "prompt": "TEXT"}, with "images", "media", "weights" and '
                         f'"id" where needed; file names are relative to {folder}.')
    if not requests:
        raise ValueError(f"{path} has no lines.")
    return requests


def images(folder: str | Path, prompt: str) -> list[Request]:
    """Returns a request with the same prompt for every image below a folder, sorted by name; the name is the id.

    Raises FileNotFoundError if there is no image, ValueError for a prompt with several images and for names that are
    not UTF-8."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                   if path.suffix.lower() in SUFFIXES and path.is_file())
    if not names:
        raise FileNotFoundError(f"{folder} has no images ({', '.join(SUFFIXES)}).")
    if invalid := [ascii(name) for name in names if not is_text(name)]:
        raise ValueError(f"{len(invalid)} images in {folder} have names that are not UTF-8: "
                         f"{', '.join(invalid[:MAX_LISTED])}. Rename them.")
    if prompt.count(PLACEHOLDER) > 1:
        raise ValueError(f"The prompt has {prompt.count(PLACEHOLDER)} images, but each request has one.")
    return [Request(name, Sample(images=[str(folder / name)], prompt=prompt)) for name in names]


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
    """Returns the input of a sense: the array of a .npy file, any other value unchanged. Raises ValueError naming a
    file that cannot be read."""
    if name in INLINE or not isinstance(value, str) or not value.endswith(".npy"):
        return value
    try:
        return read_npy(value)
    except (ValueError, OSError) as error:
        raise ValueError(files.url_problem(value) or f"{value} cannot be read as an array: {error}") from error


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
    prompt, names = text(row, "prompt"), _images(row)
    if (count := prompt.count(PLACEHOLDER)) not in (0, len(names)):
        raise ValueError(f"{count} {PLACEHOLDER} in the prompt for {len(names)} images")
    return Request(name, Sample(images=[image_path(root, each) for each in names], media=_media(root, row),
                                weights=_weights(row), prompt=prompt))


def _id(row: dict[str, Any]) -> str:
    return text(row, "id") if isinstance(row["id"], str) else str(field(row, "id", int))


def _images(row: dict[str, Any]) -> list[str]:
    if "image" in row and "images" in row:
        raise ValueError("both 'image' and 'images'; give one of them")
    if "image" in row:
        return [text(row, "image")]
    names = field(row, "images", list) if "images" in row else []
    if invalid := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"'images' must be names, but has {shown(invalid[0])}")
    return names


def _media(root: str, row: dict[str, Any]) -> dict[str, str]:
    media = field(row, "media", dict) if "media" in row else {}
    return {name: text(media, name) if name in INLINE else image_path(root, text(media, name)) for name in media}


def _weights(row: dict[str, Any]) -> dict[str, float]:
    weights = field(row, "weights", dict) if "weights" in row else {}
    return {name: float(field(weights, name, int, float)) for name in weights}


def _duplicates(requests: Sequence[Request]) -> list[str]:
    counts = collections.Counter(request.id for request in requests)
    return [f"id {shown(name)} is that of an earlier line" for name, count in counts.items() if count > 1]
