"""What is examined: a checkpoint or run, opened, and the statistics of every stored tensor."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import trees
from mmjax.checkpoints import converted
from mmjax.checkpoints import frozen as frozen_weights
from mmjax.checkpoints import training as training_checkpoints
from mmjax.checkpoints.converted import ConvertedCheckpoint
from mmjax.convert.adapter import REPLACED
from mmjax.doctor.finding import Finding, some
from mmjax.families import shapes

SLICE_BYTES = 16 * 2**20  # of a tensor, read at once


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of the finite values of a tensor or a layer; `bad` counts the others."""

    count: int = 0
    bad: int = 0
    total: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    @staticmethod
    def of(x: np.ndarray) -> "Moments":
        wide = np.ascontiguousarray(x, np.float32).reshape(-1)
        count, bad = wide.size, 0
        with np.errstate(over="ignore", invalid="ignore"):
            squares = float(np.dot(wide, wide))
        if not math.isfinite(squares):
            finite = np.isfinite(wide)
            bad, wide = int(count - finite.sum()), wide[finite].astype(np.float64)
            squares = float(np.dot(wide, wide))
        return Moments(count, bad, float(wide.sum(dtype=np.float64)), squares,
                       float(wide.min(initial=math.inf)), float(wide.max(initial=-math.inf)))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.bad + other.bad, self.total + other.total,
                       self.squares + other.squares, min(self.low, other.low), max(self.high, other.high))

    @property
    def mean(self) -> float:
        return self.total / max(self.count - self.bad, 1)

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / max(self.count - self.bad, 1))

    @property
    def constant(self) -> bool:
        return self.low == self.high

    @property
    def zero(self) -> bool:
        return self.low == self.high == 0


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter and its numbers. `layers`: of each one of a stacked parameter; empty for others."""

    path: str
    shape: tuple[int, ...]
    whole: Moments
    layers: tuple[Moments, ...]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What is examined.

    source:  the checkpoint, with the run's architecture if it is a run
    card:    the checkpoint's config.json
    read:    `{path: its rows}`, of every parameter that is there
    tensors: their statistics
    run:     the run's folder, if it is one
    fresh:   parameters that no file held and no run has trained
    """

    source: ConvertedCheckpoint
    card: Mapping[str, Any]
    read: Mapping[str, "StoredRows"]
    tensors: Mapping[str, Tensor]
    run: Path | None = None
    fresh: tuple[str, ...] = ()

    def array(self, path: str) -> np.ndarray:
        return self.read[path](0, self.read[path].shape[0])

    def matching(self, pattern: str) -> dict[str, Tensor]:
        return {path: tensor for path, tensor in self.tensors.items() if re.fullmatch(pattern, path)}

    def comes_from(self, path: str) -> str:
        """Which file it came from, for the end of a sentence."""
        held = self.card.get("sources", {})
        conversion = self.source.family.conversion
        for pattern, option in conversion.origins if conversion else ():
            if re.fullmatch(pattern, path) and option in held:
                files = held[option] if isinstance(held[option], list) else [held[option]]
                names = [file["file"] for file in files]
                return f"--{option}: {', '.join(names[:2])}{', …' if len(names) > 2 else ''}"
        return f"the run {self.run}" if self.run else "a file that config.json does not name"


@dataclasses.dataclass(frozen=True)
class StoredRows:
    """A parameter's rows along the first axis, read as float32 when they are asked for. `layered`: those are layers."""

    shape: tuple[int, ...]
    get: Callable[[int, int], np.ndarray]
    layered: bool

    def __call__(self, first: int, end: int) -> np.ndarray:
        return np.asarray(self.get(first, end)).astype(np.float32)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Of a stacked parameter its layers one by one, of others as many rows as a slice has room for."""
        row = 4 * math.prod(self.shape[1:])
        step = 1 if self.layered else max(1, SLICE_BYTES // max(row, 1))
        return ((first, min(first + step, self.shape[0])) for first in range(0, self.shape[0], step))


def inspect_folder(folder: Path) -> tuple[Inspection, list[Finding]]:
    """The patient, without statistics; and what can be said of its files.

    Raises FileNotFoundError or ValueError if there is no checkpoint at all, or its config.json is damaged.
    """
    run = folder if (folder / converted.RUN_CARD).is_file() else None
    source = converted.read_run(folder) if run else ConvertedCheckpoint.open(folder)
    card = converted.read_checkpoint_card(source.folder)
    wanted = shapes(source.family, source.config)
    trained, found = _trained(run) if run else ({}, [])
    try:
        held = frozen_weights.arrays(source.folder / "weights")
    except FileNotFoundError:
        raise
    except Exception as error:
        return Inspection(source, card, {}, {}, run), [*found, damaged(source.folder, error)]
    axes = source.family.all_axes(source.config)
    read = {path: StoredRows(tuple(array.shape), functools.partial(_stored, array), trees.lookup(path, axes)[0] == "layer")
            for path, array in held.items() if path in wanted and path not in trained}
    read |= {path: StoredRows(leaf.shape, functools.partial(_rows, np.asarray(leaf)), trees.lookup(path, axes)[0] == "layer")
             for path, leaf in trained.items() if path in wanted}
    fresh = tuple(path for path in source.fresh if path not in trained)
    there = {path: rows for path, rows in (held | trained).items() if not path.startswith(REPLACED)}
    missing = {path: shape for path, shape in wanted.items() if path not in fresh}
    if wrong := trees.compare(missing, there):
        found.append(Finding(
            "parameters", "wrong", f"{len(wrong)} parameters are not those of the architecture in config.json: "
            f"{some(wrong)}. Convert the files that belong together again.", {"parameters": wrong}))
    else:
        count = sum(math.prod(rows.shape) for rows in read.values())
        found.append(Finding("parameters", "ok", f"{len(read)} tensors, {count:,} numbers, as the architecture wants "
                             "them.", {"tensors": len(read), "numbers": count}))
    unreadable = any(finding.verdict == "wrong" for finding in found if finding.name == "run")
    return Inspection(source, card, read, {}, run, () if unreadable else fresh), found


def damaged(folder: Path, error: Exception) -> Finding:
    """What could not be read: TensorStore, Orbax and the file system each have their own errors."""
    return Finding("files", "wrong", f"{folder / 'weights'} cannot be read, it is damaged: "
                   f"{str(error).splitlines()[0][:300]}. Convert or copy the checkpoint again.")


def _stored(array: Any, first: int, end: int) -> np.ndarray:
    return array[first:end].read().result()


def _rows(array: np.ndarray, first: int, end: int) -> np.ndarray:
    return array[first:end]


def _trained(run: Path) -> tuple[dict[str, Any], list[Finding]]:
    """(what a run has trained, what can be said of its checkpoints)"""
    try:
        trained = converted.trained_params(run)
    except (ValueError, OSError) as error:
        return {}, [Finding("run", "wrong", str(error))]
    step = training_checkpoints.saved(run / "checkpoints")[-1]
    return trained, [Finding("run", "ok", f"The checkpoint of step {step} is as it was saved; {len(trained)} tensors "
                             "are trained.", {"step": step, "trained": sorted(trained)})]


def statistics(path: str, rows: StoredRows) -> Tensor:
    """Reads a tensor slice by slice."""
    parts = [Moments.of(rows(*bounds)) for bounds in rows.ranges()]
    return Tensor(path, rows.shape, functools.reduce(Moments.__add__, parts, Moments()),
                  tuple(parts) if rows.layered else ())
