"""Conversion tables, which map the tensors of released files to parameters.

A line is (source key, parameter path, layout):

    ("blocks.{L}.attn.proj.weight", "blocks/attn/o/w", "D (N H) -> N H D")

The layout is an einops pattern from the source's axes to the parameter's; read backwards it exports. Axis sizes come
from the architecture, so both shapes are known before a tensor is read. `{L}` is the number of a layer; the layers are
stacked on a new first axis of one parameter. Any other name in braces (`{i}`) is a number too, but each layer is a
parameter of its own, whose path contains the number.

No key is skipped silently: a source key that no line uses must match a line of an ignore list, which states the
reason, and the caller must list the parameters that no line fills as fresh.
"""

import collections
import contextlib
import dataclasses
import difflib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import einops
import numpy as np

from mmjax.config import TextConfig
from mmjax.convert.lazy import LazyTensor, contiguous
from mmjax.convert.notes import note

Table = Sequence[tuple[str, str, str]]
Ignored = Sequence[tuple[str, str]]  # (regular expression for a whole key, why it is left out)

DTYPES = ("float16", "bfloat16", "float32")
LISTED = 12  # problems of one kind and file that are listed one by one
STACK_BYTES = 2**20  # layers smaller than this are gathered and written as one slice


class ConversionError(ValueError):
    """Raised for files that cannot be converted; the message lists all problems."""


class Problems(list[str]):
    """A list of problems, which are reported together.

    left_out: how many tensors of a file are left out on purpose, by (file, reason)
    """

    def __init__(self, *lines: str):
        super().__init__(lines)
        self.left_out: collections.Counter[tuple[str, str]] = collections.Counter()

    def check(self, task: str) -> None:
        """Raises ConversionError listing the problems if there are any."""
        if self:
            count = f"{len(self)} problem" + "s" * (len(self) > 1)
            raise ConversionError(f"{task}: {count}.\n  " + "\n  ".join(line.replace("\n", "\n  ") for line in self))


class Computed(LazyTensor):
    """A tensor that a function computes whenever it is read."""

    def __init__(self, key: str, shape: tuple[int, ...], dtype: np.dtype, compute: Callable[[], np.ndarray]):
        super().__init__(Path("computed"), key, np.dtype(dtype), tuple(shape), contiguous(shape), 0)
        object.__setattr__(self, "read", compute)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A `mmjax.checkpoints.frozen.SlicedParameter` that is read from its source tensors while it is written."""

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
        """Yields arrays `[rows, ...]` in order; layers of a narrower dtype are cast to the parameter's."""
        pieces = (_rearrange(tensor.read().astype(self.dtype, copy=False), self.layout, self.sizes)
                  for tensor in self.tensors)
        if not self.stacked:
            yield from pieces
        elif self.rows == 1:
            yield from (piece[None] for piece in pieces)
        else:
            yield np.stack(list(pieces))


@dataclasses.dataclass
class SourceCheckpoint:
    """Released files that were checked and can be converted.

    parts:      the fields of the family's config
    parameters: by path
    generation: {"bos_token_id", "eos_token_id", "pad_token_id"}
    sources:    the files by option
    tokenizer:  folder with the language model's tokenizer
    fresh:      parameters that are in no source; training initializes them
    constant:   parameters that are in no source and have a known value
    replaced:   parameters of the base that an adapter replaces
    words:      merges file of the text sense
    left_out:   number of tensors that are left out on purpose, by (file, reason)
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
    left_out: Mapping[tuple[str, str], int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of a table with its numbers filled in: one parameter."""

    path: str
    keys: tuple[str, ...]  # one a layer if stacked, else one
    key_shape: tuple[int, ...]
    shape: tuple[int, ...]
    layout: str
    sizes: dict[str, int]  # of the axes in the layout
    stacked: bool

    def backwards(self) -> str:
        """Returns the layout of the export."""
        left, right = self.layout.split("->")
        return f"{right.strip()} -> {left.strip()}"


def expand(table: Table, sizes: Mapping[str, int], layers: Mapping[str, Sequence[int]] | None = None) -> list[Entry]:
    """Returns the entries of a table for an architecture.

    sizes:  size of every axis letter, such as {"D": 4096, "N": 32, "H": 128}
    layers: numbers for each name in braces, such as {"L": range(32), "c": (0, 2, 4)}
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


def block_table(source: str, target: str, *, norm: str = "norm", qkv: str = "attn.qkv.", o: str = "attn.proj",
                fc1: str = "mlp.fc1", fc2: str = "mlp.fc2", qkv_bias: Table | None = None) -> Table:
    """Returns the table of pre-norm transformer blocks, whose keys and paths begin with `source` and `target`.

    S q, k and v   D model   F feed-forward   N heads   H head

    qkv_bias: lines that replace the line of one bias of queries, keys and values; keys and paths are those in a block
    """
    lines = (
        (f"{norm}1.weight", "norm1/scale", "D -> D"),
        (f"{norm}1.bias", "norm1/bias", "D -> D"),
        (f"{qkv}weight", "attn/qkv/w", "(S N H) D -> D S N H"),
        *(qkv_bias or ((f"{qkv}bias", "attn/qkv/b", "(S N H) -> S N H"),)),
        (f"{o}.weight", "attn/o/w", "D (N H) -> N H D"),
        (f"{o}.bias", "attn/o/b", "D -> D"),
        (f"{norm}2.weight", "norm2/scale", "D -> D"),
        (f"{norm}2.bias", "norm2/bias", "D -> D"),
        (f"{fc1}.weight", "mlp/fc1/w", "F D -> D F"),
        (f"{fc1}.bias", "mlp/fc1/b", "F -> F"),
        (f"{fc2}.weight", "mlp/fc2/w", "D F -> F D"),
        (f"{fc2}.bias", "mlp/fc2/b", "D -> D"),
    )
    return tuple((f"{source}.{{L}}.{key}", f"{target}/{path}", layout) for key, path, layout in lines)


def _shape(side: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """"D (N H)" -> (sizes D, N·H)."""
    axes = re.findall(r"\([^)]*\)|\S+", side)
    return tuple(
        math.prod(int(name) if name.isdigit() else sizes[name] for name in axis.strip("()").split()) for axis in axes)


def forward(
    entries: Sequence[Entry], tensors: Mapping[str, LazyTensor], ignored: Ignored, source: str, problems: Problems
) -> dict[str, Parameter]:
    """Returns the parameters that `entries` define from `tensors`; nothing is read yet.

    Adds to `problems` every key that is missing, of another shape, of a dtype that no weights have, or neither used nor
    ignored. Layers of different dtypes get the widest of them, and a line that says so.
    """
    used = {key for entry in entries for key in entry.keys}
    if used and tensors and not used & tensors.keys():
        problems.append(f"{source} holds none of the {len(used)} tensors that are expected, such as "
                        f"{entries[0].keys[0]}; its tensors are {_some(tensors)}. It is another file.")
        return {}
    parameters, shapes, mixed = {}, [], {}
    for entry in entries:
        found = [tensors[key] for key in entry.keys if key in tensors]
        wrong = [(key, tensors[key].shape) for key in entry.keys
                 if key in tensors and tuple(tensors[key].shape) != entry.key_shape]
        shapes += [f"{source}: {key} has shape {list(shape)}, expected {list(entry.key_shape)} ({entry.layout} with "
                   f"{', '.join(f'{axis}={size}' for axis, size in entry.sizes.items())})" for key, shape in wrong]
        shapes += [dtype_problem(source, tensor) for tensor in found if str(tensor.dtype) not in DTYPES]
        dtypes = {str(tensor.dtype) for tensor in found}
        if len(found) == len(entry.keys) and not wrong and dtypes <= {*DTYPES}:
            dtype = widest(tensor.dtype for tensor in found)
            if len(dtypes) > 1:
                mixed.setdefault((*sorted(dtypes), str(dtype)), []).append(entry.keys[0])
            parameters[entry.path] = Parameter(
                entry.shape, dtype, entry.layout, entry.sizes, tuple(found), entry.stacked)
    missing = [key for entry in entries for key in entry.keys if key not in tensors]
    problems.extend(shorten([f"{source}: {key} is missing" for key in missing], f"{source}: {{}} more are missing"))
    problems.extend(shorten(shapes, f"{source}: {{}} more have other shapes or dtypes"))
    problems.extend(shorten(_unknown_keys(tensors, used, ignored, source, problems),
                            f"{source}: {{}} more are neither used nor known"))
    for (*dtypes, dtype), keys in mixed.items():
        note(f"{source}: the layers of {_some(keys)} have different dtypes ({', '.join(dtypes)}); stored as {dtype}.")
    return parameters


def widest(dtypes: Iterable[Any]) -> np.dtype:
    """Returns the dtype that holds the numbers of all: float32 for float16 with bfloat16."""
    first, *more = {np.dtype(dtype) for dtype in dtypes}
    return np.dtype(np.float32) if more else first


def dtype_problem(source: str, tensor: LazyTensor) -> str:
    """Returns what is wrong with a tensor whose dtype no parameter has, and how to save it."""
    said = f"{source}: {tensor.key} is {tensor.dtype}; weights are {', '.join(DTYPES)}. "
    if np.issubdtype(tensor.dtype, np.complexfloating):
        return said + ("No model here has complex parameters: such a tensor is a buffer. Save the rest with PyTorch: "
                       "{k: v for k, v in weights.items() if not v.is_complex()}")
    if str(tensor.dtype).startswith("float8"):
        return said + ("float8 weights usually have scale factors in other tensors: save the model as bfloat16 with "
                       "the program that made it. Without such factors: {k: v.to(torch.bfloat16) for k, v in "
                       "weights.items()}")
    if np.issubdtype(tensor.dtype, np.floating):
        return said + "Save it again with PyTorch: {k: v.to(torch.float32) for k, v in weights.items()}"
    return said + "Quantised weights are not read; take the same model in float16 or bfloat16."


def _unknown_keys(tensors: Mapping[str, LazyTensor], used: Collection[str], ignored: Ignored, source: str,
                  problems: Problems) -> list[str]:
    """Returns a line for each tensor that is neither used nor ignored, and counts the ignored ones."""
    lines = []
    for key, tensor in tensors.items():
        if key in used:
            continue
        if (why := reason(key, ignored)) is not None:
            problems.left_out[source, why] += 1
        elif np.issubdtype(tensor.dtype, np.complexfloating):
            lines.append(dtype_problem(source, tensor))
        else:
            lines.append(f"{source}: {key} {list(tensor.shape)} is neither used nor known as a key to ignore")
    return lines


def shorten(lines: Sequence[str], more: str) -> list[str]:
    """Returns the first lines, and `more` with the number of the others in place of its {}."""
    return [*lines[:LISTED], *([more.format(len(lines) - LISTED)] if len(lines) > LISTED else [])]


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def flat_tensors(path: Path, content: Any, problems: Problems) -> dict[str, LazyTensor]:
    """Returns a file's content if it is a flat dict of tensors; otherwise adds a problem and returns {}."""
    if isinstance(content, dict) and content:
        invalid = [f"{key!r} ({type(value).__name__})" for key, value in content.items()
                   if not isinstance(key, str) or not isinstance(value, LazyTensor)]
        if not invalid:
            return content
        problems.append(f"{path.name} holds more than tensors: {', '.join(invalid)}.")
    else:
        problems.append(f"{path.name} is not a dict of tensors, and has none under 'model', 'module' or 'state_dict'.")
    return {}


def read_json(path: Path, problems: Problems) -> dict[str, Any]:
    """Returns the JSON object in a file; if there is none, adds a problem and returns {}."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path} is not readable JSON: {error}")
        return {}
    if not isinstance(values, dict):
        problems.append(f"{path} holds no JSON object.")
        return {}
    return values


def sizes_from_shapes(tensors: Mapping[str, LazyTensor], axes: Mapping[str, Sequence[str]],
                      block: str = "") -> dict[str, int]:
    """Returns the sizes of an architecture that follow from the shapes of tensors.

    axes:  by key, the name of the size of each axis; "" for an axis that is not used
    block: regular expression for the beginning of a block's keys, whose group is the number; gives "depth"

    Tensors that are missing or have another rank are skipped; their lines of the table report them.
    """
    found: dict[str, int] = {}
    for key, names in axes.items():
        shape = tensors[key].shape if key in tensors else ()
        if len(shape) == len(names):
            found = dict(zip(names, shape, strict=True)) | found
    found.pop("", None)
    numbers = [int(match[1]) for match in (re.match(block, key) for key in tensors) if match] if block else []
    return found | ({"depth": max(numbers) + 1} if numbers else {})


def unknown_name(name: str, known: Collection[str]) -> str:
    """Returns a message that a name is unknown, with the closest known one."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown {name!r}; " + (f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}.")


def reason(key: str, ignored: Ignored) -> str | None:
    """Returns the reason why a key is ignored; None if it is not."""
    return next((why for pattern, why in ignored if re.fullmatch(pattern, key)), None)


def backward(entries: Sequence[Entry], arrays: Mapping[str, Any]) -> dict[str, Computed]:
    """Returns the released tensors of sliceable parameters (numpy, jax or tensorstore arrays); nothing is read yet.

    Raises ConversionError listing every parameter that is missing or has another shape.
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
    return np.dtype(getattr(dtype, "numpy_dtype", dtype))  # tensorstore has a dtype class of its own


def _reader(entry: Entry, array: Any, number: int) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        piece = array[number] if entry.stacked else array
        piece = np.asarray(piece.read().result() if hasattr(piece, "read") else piece)
        return _rearrange(piece, entry.backwards(), entry.sizes)

    return read


def _rearrange(array: np.ndarray, layout: str, sizes: Mapping[str, int]) -> np.ndarray:
    """Returns the result of `einops.rearrange` in C order.

    Transposing takes most of a conversion's time. The copy is done in blocks that are small enough for the CPU's cache,
    which is three times as fast as one copy of the whole.
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
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `out` when the block ends without an error."""
    partial = out.with_name(f".{out.name[:40]}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
