"""Conversion tables: which tensor of a released file is which parameter, and how its axes lie there.

A line is (source key, parameter path, layout):

    ("blocks.{L}.attn.proj.weight", "blocks/attn/o/w", "D (N H) -> N H D")

The layout is an einops pattern from the source's axes to the parameter's; read backwards it exports. Axis sizes come
from the architecture, so both shapes are known before a tensor is looked at. `{L}` stands for a layer's number and
stacks the layers on a new first axis of one parameter; any other name in braces (`{i}`) also stands for a number, but
the layers stay apart and the path holds it too.

Nothing is skipped in silence: a source key that no line uses must match a line of an ignore list, which gives the
reason in words, and a parameter that no line fills must be named as fresh by the caller.
"""

import contextlib
import dataclasses
import difflib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import einops
import numpy as np

from mmjax.config import TextConfig
from mmjax.convert.lazy import LazyTensor, contiguous

Table = Sequence[tuple[str, str, str]]
Ignored = Sequence[tuple[str, str]]  # (regular expression for a whole key, why it is left out)

DTYPES = ("float16", "bfloat16", "float32")
STACK_BYTES = 2**20  # layers smaller than this are gathered and written as one slice


class ConversionError(ValueError):
    """Files that cannot be converted; the message lists everything that is wrong with them."""


class Problems(list[str]):
    """What is wrong, collected so that it is said once."""

    def check(self, task: str) -> None:
        """Raises ConversionError if there is anything."""
        if self:
            count = f"{len(self)} problem" + "s" * (len(self) > 1)
            raise ConversionError(f"{task}: {count}.\n  " + "\n  ".join(line.replace("\n", "\n  ") for line in self))


class Computed(LazyTensor):
    """A tensor that a function gives whenever it is read, instead of a file."""

    def __init__(self, key: str, shape: tuple[int, ...], dtype: np.dtype, compute: Callable[[], np.ndarray]):
        super().__init__(Path("computed"), key, np.dtype(dtype), tuple(shape), contiguous(shape), 0)
        object.__setattr__(self, "read", compute)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter and the source tensors that it is made of while it is written (`mmjax.checkpoints.frozen.Slices`)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    layout: str
    sizes: Mapping[str, int]
    tensors: tuple[LazyTensor, ...]  # one a layer if stacked
    stacked: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        return 1 if self.stacked and self.nbytes // len(self.tensors) >= STACK_BYTES else self.shape[0]

    def slices(self) -> Iterator[np.ndarray]:
        """Arrays `[rows, ...]` in order."""
        pieces = (_rearrange(tensor.read(), self.layout, self.sizes) for tensor in self.tensors)
        if not self.stacked:
            yield from pieces
        elif self.rows == 1:
            yield from (piece[None] for piece in pieces)
        else:
            yield np.stack(list(pieces))


@dataclasses.dataclass
class Inspected:
    """Released files that were checked and not yet converted.

    parts:      the fields of the family's config
    parameters: by path
    generation: {"bos_token_id", "eos_token_id", "pad_token_id"}
    sources:    the files by option
    tokenizer:  folder whose tokenizer belongs to the language model
    fresh:      parameters of the model that no source holds: training starts them anew
    constant:   parameters that no source holds and that have a known value
    replaced:   the base's parameters that an adapter has others for
    words:      the merges file of the text sense
    """

    parts: dict[str, Any]
    parameters: dict[str, Parameter]
    text: TextConfig
    generation: dict[str, Any]
    sources: dict[str, Sequence[Path]]
    tokenizer: Path
    fresh: tuple[str, ...] = ()
    constant: dict[str, float] = dataclasses.field(default_factory=dict)
    replaced: dict[str, Parameter] = dataclasses.field(default_factory=dict)
    words: Path | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A table's line with its numbers filled in: one parameter."""

    path: str
    keys: tuple[str, ...]  # one a layer if stacked, else one
    key_shape: tuple[int, ...]
    shape: tuple[int, ...]
    layout: str
    sizes: dict[str, int]  # of the axes in the layout
    stacked: bool

    def backwards(self) -> str:
        left, right = self.layout.split("->")
        return f"{right.strip()} -> {left.strip()}"


def expand(table: Table, sizes: Mapping[str, int], layers: Mapping[str, Sequence[int]] | None = None) -> list[Entry]:
    """The entries of a table for an architecture.

    sizes:  extent of every axis letter, such as {"D": 4096, "N": 32, "H": 128}
    layers: the numbers that each name in braces stands for, such as {"L": range(32), "c": (0, 2, 4)}
    """
    entries = []
    for key, path, layout in table:
        name = next(iter(re.findall(r"{(\w+)}", key)), None)
        numbers = (layers or {})[name] if name else ()
        used = {axis: sizes[axis] for axis in re.findall(r"[A-Za-z_]\w*", layout)}
        left, right = (_shape(side, sizes) for side in layout.split("->"))
        if name == "L":
            keys = tuple(key.format(L=n) for n in numbers)
            entries.append(Entry(path, keys, left, (len(keys), *right), layout, used, True))
        else:
            numbered = [{name: n} for n in numbers] if name else [{}]
            entries.extend(
                Entry(path.format(**n), (key.format(**n),), left, right, layout, used, False) for n in numbered)
    return entries


def _shape(side: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """"D (N H)" -> (sizes D, N·H)."""
    axes = re.findall(r"\([^)]*\)|\S+", side)
    return tuple(
        math.prod(int(name) if name.isdigit() else sizes[name] for name in axis.strip("()").split()) for axis in axes)


def forward(
    entries: Sequence[Entry], tensors: Mapping[str, LazyTensor], ignored: Ignored, source: str, problems: Problems
) -> dict[str, Parameter]:
    """The parameters that `entries` make of `tensors`; nothing is read yet.

    Adds to `problems` every key that is missing, of another shape, of a mixed dtype, or neither used nor ignored.
    """
    parameters = {}
    missing, shapes = [], []
    for entry in entries:
        found = [tensors[key] for key in entry.keys if key in tensors]
        missing += [key for key in entry.keys if key not in tensors]
        wrong = [(key, tensors[key].shape) for key in entry.keys
                 if key in tensors and tuple(tensors[key].shape) != entry.key_shape]
        shapes += [f"{source}: {key} has shape {list(shape)}, expected {list(entry.key_shape)} ({entry.layout} with "
                   f"{', '.join(f'{axis}={size}' for axis, size in entry.sizes.items())})" for key, shape in wrong]
        dtypes = {str(tensor.dtype) for tensor in found}
        shapes += [f"{source}: {tensor.key} is {tensor.dtype}; weights are {', '.join(DTYPES)}"
                   for tensor in found if str(tensor.dtype) not in DTYPES]
        if len(dtypes) > 1:
            shapes.append(f"{source}: the layers of {entry.keys[0]} have different dtypes: {', '.join(sorted(dtypes))}")
        if len(found) == len(entry.keys) and not wrong and len(dtypes) == 1:
            parameters[entry.path] = Parameter(
                entry.shape, np.dtype(found[0].dtype), entry.layout, entry.sizes, tuple(found), entry.stacked)
    used = {key for entry in entries for key in entry.keys}
    extra = [key for key in tensors if key not in used and reason(key, ignored) is None]
    problems.extend(f"{source}: {key} is missing" for key in missing)
    problems.extend(shapes)
    problems.extend(f"{source}: {key} {list(tensors[key].shape)} is neither used nor known as something to leave out"
                     for key in extra)
    return parameters


def flat_tensors(path: Path, found: Any, problems: Problems) -> dict[str, LazyTensor]:
    """`found`, the content of a file, if it is one table of tensors; else a problem and nothing."""
    if isinstance(found, dict) and found:
        others = [f"{key!r} ({type(value).__name__})" for key, value in found.items()
                  if not isinstance(key, str) or not isinstance(value, LazyTensor)]
        if not others:
            return found
        problems.append(f"{path.name} holds more than tensors: {', '.join(others)}.")
    else:
        problems.append(f"{path.name} is not a table of tensors, nor does it hold one under 'model'.")
    return {}


def read_json(path: Path, problems: Problems) -> dict[str, Any]:
    """A JSON object; if the file holds none, a problem and nothing."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path} is not readable JSON: {error}")
        return {}
    if not isinstance(values, dict):
        problems.append(f"{path} holds no JSON object.")
        return {}
    return values


def sizes_from_shapes(tensors: Mapping[str, LazyTensor], where: Mapping[str, Sequence[str]], block: str = "") -> dict[str, int]:
    """The sizes of an architecture that a file's tensors tell.

    where: by key, the names of the sizes that its axes have; "" is an axis that says nothing new
    block: a regular expression for the beginning of a block's keys, its group the number; gives "depth"

    A tensor that is missing or has other axes says nothing; its line of the table reports it.
    """
    found: dict[str, int] = {}
    for key, names in where.items():
        shape = tensors[key].shape if key in tensors else ()
        if len(shape) == len(names):
            found = dict(zip(names, shape, strict=True)) | found
    found.pop("", None)
    numbers = [int(match[1]) for match in (re.match(block, key) for key in tensors) if match] if block else []
    return found | ({"depth": max(numbers) + 1} if numbers else {})


def unknown_name(name: str, known: Collection[str]) -> str:
    """Says that a name is unknown, with the closest known one."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown {name!r}; " + (f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}.")


def reason(key: str, ignored: Ignored) -> str | None:
    """Why a key is left out on purpose; None if it is not."""
    return next((why for pattern, why in ignored if re.fullmatch(pattern, key)), None)


def backward(entries: Sequence[Entry], arrays: Mapping[str, Any]) -> dict[str, Computed]:
    """The released tensors, from parameters that can be sliced (numpy, jax or tensorstore arrays); nothing is read yet.

    Raises ConversionError naming every parameter that is absent or has another shape.
    """
    problems = Problems()
    problems.extend(f"{entry.path} is missing" for entry in entries if entry.path not in arrays)
    problems.extend(
        f"{entry.path} has shape {list(arrays[entry.path].shape)}, expected {list(entry.shape)}"
        for entry in entries if entry.path in arrays and tuple(arrays[entry.path].shape) != entry.shape)
    problems.check("Cannot export")
    return {
        key: Computed(key, entry.key_shape, _dtype(arrays[entry.path]), _reader(entry, arrays[entry.path], number))
        for entry in entries for number, key in enumerate(entry.keys)
    }


def _dtype(array: Any) -> np.dtype:
    dtype = array.dtype
    return np.dtype(getattr(dtype, "numpy_dtype", dtype))  # tensorstore has its own dtype class


def _reader(entry: Entry, array: Any, number: int) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        piece = array[number] if entry.stacked else array
        piece = np.asarray(piece.read().result() if hasattr(piece, "read") else piece)
        return _rearrange(piece, entry.backwards(), entry.sizes)

    return read


def _rearrange(array: np.ndarray, layout: str, sizes: Mapping[str, int]) -> np.ndarray:
    """`einops.rearrange`, laid out in C order.

    Transposing is most of a conversion's work. It is copied block by block, each block small enough that the cache
    still holds the lines it read when their next elements are wanted: three times as fast as one copy of the whole.
    """
    view = einops.rearrange(array, layout, **sizes)
    if view.flags.c_contiguous:
        return view
    steps = [1] * view.ndim
    steps[int(np.argmin(view.strides))] = 512  # read along this axis
    steps[-1] = 128  # write along this one
    result = np.empty(view.shape, view.dtype)
    for corner in itertools.product(*map(range, [0] * view.ndim, view.shape, steps)):
        block = tuple(slice(first, first + step) for first, step in zip(corner, steps, strict=True))
        result[block] = view[block]
    return result


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder that appears under its name when it is complete."""
    partial = out.with_name(f".{out.name[:40]}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
