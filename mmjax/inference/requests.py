"""What a model is asked: samples from a file of JSON lines, from a folder of images, or from a benchmark.

The lines come from anywhere, so all of them are looked at before any is used. Images and other files are only named
here; one that cannot be opened shows when its turn comes.
"""

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
from mmjax.data.formats.rows import field, image_path, parse_json, shown, text
from mmjax.data.text import PLACEHOLDER
from mmjax.families.base import PromptStyle

KEYS = ("id", "image", "images", "prompt", "media", "weights")
WORDED = ("text",)  # of the other senses: what stands in the line is what is given, not the name of a file
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2")
MOST_NAMED = 20  # problems that one error names


@dataclasses.dataclass(frozen=True)
class Request:
    """One sample that is to be answered, without an answer of its own.

    id:      no other sample of the same file has it
    sample:  its images, and its other senses where they lie in files, are paths
    choices: answers of which one is to be chosen; none where the model answers in its own words
    """

    id: str
    sample: Sample
    choices: tuple[str, ...] = ()


def read_jsonl(path: str | Path, root: str | Path | None = None) -> list[Request]:
    """Of a file with one JSON object a line: {"id"?, "image" or "images"?, "prompt", "media"?, "weights"?}.

    root: the folder below which all files lie; None for that of `path`

    "image" is a name, "images" a list of them; "media" gives other senses by name: "text" in words, all others as the
    name of a .wav or .npy file; "weights" are those of the senses in their mix. A prompt says by `<ImageHere>` where
    its images stand, or not at all, and then they stand in front. Without "id" a line is known by its number, from 1
    on. Blank lines are none.

    Raises FileNotFoundError, or ValueError naming every line that cannot be used.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There are no samples at {path}. Expected a file with one JSON object a line.")
    folder = str(path.absolute().parent if root is None else root)
    asks, problems = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                asks.append(_ask(folder, number, line))
            except ValueError as error:
                problems.append(f"line {number}: {error}")
    problems += _repeated(asks)
    if problems:
        more = [f"and {len(problems) - MOST_NAMED} more"] if len(problems) > MOST_NAMED else []
        raise ValueError(f"{len(problems)} lines of {path} cannot be used:\n  "
                         + "\n  ".join(problems[:MOST_NAMED] + more)
                         + '\nA line is {"image": "NAME", "prompt": "WORDS"}, with "images", "media", "weights" and '
                         f'"id" where needed; files are looked for below {folder}.')
    if not asks:
        raise ValueError(f"{path} has no lines.")
    return asks


def images(folder: str | Path, prompt: str) -> list[Request]:
    """Every image of a folder and those in it, in the order of their names, each with the same prompt and known by
    its name. Raises FileNotFoundError if there is none, ValueError for a prompt that shows several and for names that
    are no text."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                   if path.suffix.lower() in SUFFIXES and path.is_file())
    if not names:
        raise FileNotFoundError(f"{folder} has no images ({', '.join(SUFFIXES)}).")
    if strange := [ascii(name) for name in names if not is_text(name)]:
        raise ValueError(f"{len(strange)} images in {folder} have names that are not UTF-8 and cannot be written "
                         f"down: {', '.join(strange[:MOST_NAMED])}. Rename them.")
    if prompt.count(PLACEHOLDER) > 1:
        raise ValueError(f"The prompt shows {prompt.count(PLACEHOLDER)} images, but is asked about one at a time.")
    return [Request(name, Sample(images=[str(folder / name)], prompt=prompt)) for name in names]


def is_text(words: str) -> bool:
    """Whether UTF-8 can write it: bytes that were none become surrogates on their way in."""
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True


def with_images(sample: Sample, style: PromptStyle) -> Sample:
    """The sample with its images in front of a prompt that does not say where they stand, for families whose images
    take slots of the text."""
    if PLACEHOLDER in sample.prompt:
        return sample
    return dataclasses.replace(sample, prompt=style.with_images(sample.prompt, len(sample.images)))


def read_sense(name: str, value: Any) -> Any:
    """What a sample gives to a sense: the array in a .npy file, all else as it is. Raises ValueError naming the file
    that cannot be read."""
    if name in WORDED or not isinstance(value, str) or not value.endswith(".npy"):
        return value
    try:
        return read_npy(value)
    except (ValueError, OSError) as error:
        raise ValueError(files.url_problem(value) or f"{value} is not an array that can be read: {error}") from error


def digest(asks: Sequence[Request]) -> str:
    """SHA-256 of everything that is asked, with files by their names without the folder: they may be moved."""
    found = hashlib.sha256()
    for ask in asks:
        sample = ask.sample
        told = [ask.id, sample.prompt, sample.input, sample.turns, [_named(image) for image in sample.images],
                {name: value if name in WORDED else _named(value) for name, value in sample.media.items()},
                sample.weights, ask.choices]
        found.update(json.dumps(told, sort_keys=True).encode() + b"\n")
    return found.hexdigest()


def _named(value: Any) -> Any:
    """A file by its name, an array by its numbers, anything else by how it is written."""
    if isinstance(value, (str, os.PathLike)):
        return os.path.basename(value)
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value)).hexdigest()]
    return [_named(part) for part in value] if isinstance(value, (list, tuple)) else str(value)


def _ask(root: str, number: int, line: bytes) -> Request:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {shown(row)}")
    if unknown := sorted(row.keys() - set(KEYS)):
        raise ValueError(f"unknown {', '.join(map(shown, unknown))}; a line has {', '.join(KEYS)}")
    name = str(number) if "id" not in row else _id(row)
    prompt, names = text(row, "prompt"), _images(row)
    if (places := prompt.count(PLACEHOLDER)) not in (0, len(names)):
        raise ValueError(f"{places} {PLACEHOLDER} in the prompt for {len(names)} images")
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
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"'images' must be names, but has {shown(wrong[0])}")
    return names


def _media(root: str, row: dict[str, Any]) -> dict[str, str]:
    given = field(row, "media", dict) if "media" in row else {}
    return {name: text(given, name) if name in WORDED else image_path(root, text(given, name)) for name in given}


def _weights(row: dict[str, Any]) -> dict[str, float]:
    given = field(row, "weights", dict) if "weights" in row else {}
    return {name: float(field(given, name, int, float)) for name in given}


def _repeated(asks: Sequence[Request]) -> list[str]:
    seen: set[str] = set()
    twice = [ask.id for ask in asks if ask.id in seen or seen.add(ask.id)]
    return [f"id {shown(name)} is that of an earlier line" for name in dict.fromkeys(twice)]
