"""An opened checkpoint or run, and the statistics of every stored tensor."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from mmjax.models.language_model import LanguageModelConfig

SLICE_BYTES = 16 * 2**20  # read at once from a tensor


@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments of the finite values of a tensor or a layer; `bad` counts the values that are not finite."""

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
    """Statistics of a parameter. `layers` has those of each layer of a stacked parameter; it is empty for others."""

    path: str
    shape: tuple[int, ...]
    whole: Moments
    layers: tuple[Moments, ...]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """An opened checkpoint or run.

    source:  the checkpoint, with the run's architecture if it is a run
    card:    the checkpoint's config.json
    read:    `{path: rows}` of every stored parameter
    tensors: `{path: statistics}`
    run:     the run's folder, or None
    fresh:   parameters that were in no file and that no run has trained
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

    def matching_llm(self, patterns: Sequence[str]) -> dict[str, Tensor]:
        """Returns the tensors of the language model that match; the patterns are of paths below `llm/`."""
        return {path: tensor for path, tensor in self.tensors.items()
                if path.startswith("llm/") and trees.matches(path.removeprefix("llm/"), patterns)}

    @property
    def llm(self) -> LanguageModelConfig:
        return self.source.config.llm

    def comes_from(self, path: str) -> str:
        """Returns the file that a parameter came from, for a message."""
        sources = self.card.get("sources", {})
        conversion = self.source.family.conversion
        for pattern, option in conversion.origins if conversion else ():
            if re.fullmatch(pattern, path) and option in sources:
                files = sources[option] if isinstance(sources[option], list) else [sources[option]]
                names = [file["file"] for file in files]
                return f"--{option}: {', '.join(names[:2])}{', …' if len(names) > 2 else ''}"
        return f"the run {self.run}" if self.run else "a file that config.json does not name"


@dataclasses.dataclass(frozen=True)
class StoredRows:
    """Reads rows of a parameter along its first axis, as float32. `layered`: that axis is the layers."""

    shape: tuple[int, ...]
    get: Callable[[int, int], np.ndarray]
    layered: bool

    def __call__(self, first: int, end: int) -> np.ndarray:
        return np.asarray(self.get(first, end)).astype(np.float32)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yields (first, end) of slices: layers of a stacked parameter, or as many rows as `SLICE_BYTES` allow."""
        row = 4 * math.prod(self.shape[1:])
        step = 1 if self.layered else max(1, SLICE_BYTES // max(row, 1))
        return ((first, min(first + step, self.shape[0])) for first in range(0, self.shape[0], step))


def inspect_folder(folder: Path) -> tuple[Inspection, list[Finding]]:
    """Returns the inspection, without statistics, and the findings about its files.

    Raises FileNotFoundError or ValueError if there is no checkpoint at all, or its config.json is damaged.
    """
    run = folder if (folder / converted.RUN_CARD).is_file() else None
    source = converted.read_run(folder) if run else ConvertedCheckpoint.open(folder)
    card = converted.read_checkpoint_card(source.folder)
    wanted = shapes(source.family, source.config)
    trained, findings = _trained(run) if run else ({}, [])
    try:
        stored = frozen_weights.arrays(source.folder / "weights")
    except FileNotFoundError:
        raise
    except Exception as error:
        return Inspection(source, card, {}, {}, run), [*findings, damaged(source.folder, error)]
    axes = source.family.all_axes(source.config)

    def rows(path: str, shape: tuple[int, ...], get: Callable[[int, int], np.ndarray]) -> StoredRows:
        return StoredRows(shape, get, trees.lookup(path, axes)[0] == "layer")

    read = {path: rows(path, tuple(array.shape), functools.partial(_stored, array))
            for path, array in stored.items() if path in wanted and path not in trained}
    read |= {path: rows(path, leaf.shape, functools.partial(_rows, np.asarray(leaf)))
             for path, leaf in trained.items() if path in wanted}
    fresh = tuple(path for path in source.fresh if path not in trained)
    present = {path: value for path, value in (stored | trained).items() if not path.startswith(REPLACED)}
    expected = {path: shape for path, shape in wanted.items() if path not in fresh}
    if wrong := trees.compare(expected, present):
        findings.append(Finding(
            "parameters", "wrong", f"{len(wrong)} parameters are not those of the architecture in config.json: "
            f"{some(wrong)}. Convert the files that belong together again.", {"parameters": wrong}))
    else:
        count = sum(math.prod(values.shape) for values in read.values())
        findings.append(Finding("parameters", "ok", f"{len(read)} tensors, {count:,} numbers, which match the "
                                "architecture.", {"tensors": len(read), "numbers": count}))
    unreadable = any(finding.verdict == "wrong" for finding in findings if finding.name == "run")
    return Inspection(source, card, read, {}, run, () if unreadable else fresh), findings


def damaged(folder: Path, error: Exception) -> Finding:
    """Returns the finding for weights that cannot be read; the errors of TensorStore, Orbax and files differ."""
    return Finding("files", "wrong", f"{folder / 'weights'} cannot be read, it is damaged: "
                   f"{str(error).splitlines()[0][:300]}. Convert or copy the checkpoint again.")


def _stored(array: Any, first: int, end: int) -> np.ndarray:
    return array[first:end].read().result()


def _rows(array: np.ndarray, first: int, end: int) -> np.ndarray:
    return array[first:end]


def _trained(run: Path) -> tuple[dict[str, Any], list[Finding]]:
    """Returns (the trained parameters of a run, findings about its checkpoints)."""
    try:
        trained = converted.trained_params(run)
    except (ValueError, OSError) as error:
        return {}, [Finding("run", "wrong", str(error))]
    step = training_checkpoints.saved(run / "checkpoints")[-1]
    return trained, [Finding("run", "ok", f"The checkpoint of step {step} is unchanged since it was saved; "
                             f"{len(trained)} tensors are trained.", {"step": step, "trained": sorted(trained)})]


def statistics(path: str, rows: StoredRows) -> Tensor:
    """Returns the statistics of a tensor, which is read slice by slice."""
    parts = [Moments.of(rows(*bounds)) for bounds in rows.ranges()]
    return Tensor(path, rows.shape, functools.reduce(Moments.__add__, parts, Moments()),
                  tuple(parts) if rows.layered else ())
