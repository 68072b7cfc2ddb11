"""The logs of a run: `metrics.jsonl` and `data_errors.jsonl` in its folder, one JSON object a line.

When a run resumes, lines beyond its last checkpoint are removed; they are written again. Only the primary process
writes, for all processes.
"""

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from mmjax import files
from mmjax.config import RunConfig
from mmjax.data.pipeline import PipelineBatch
from mmjax.training import distributed, optim


class JsonlLog:
    """Appends JSON lines to a file; existing lines stay only if their `field` is below the number `below`.

    kept: number of lines that stay. A last line that is incomplete, because the run was killed, is removed.

    Raises OSError naming the file if it cannot be written, ValueError if a line other than the last is not JSON.
    """

    def __init__(self, path: Path, field: str, below: int):
        self._path = path
        text = path.read_text(errors="replace") if path.exists() and distributed.is_primary() else ""
        lines = text.splitlines()
        whole = [line for number, line in enumerate(lines, 1)
                 if (parsed := self._parse(line, number, len(lines), field)) is not None and parsed[field] < below]
        self.kept = len(whole)
        if (kept := "".join(line + "\n" for line in whole)) != text:
            files.replace(path, kept)

    def _parse(self, line: str, number: int, last: int, field: str) -> dict[str, Any] | None:
        try:
            parsed = files.parse_json(line)
        except ValueError as error:
            if number == last:
                return None
            raise ValueError(f"{self._path}, line {number} is not JSON: {error}. Repair or remove that line."
                             ) from error
        if not isinstance(parsed, dict) or not isinstance(parsed.get(field), (int, float)):
            raise ValueError(f"{self._path}, line {number} must be an object with a number {field!r}. Repair or remove "
                             "that line.")
        return parsed

    def __enter__(self) -> "JsonlLog":
        self._file = self._path.open("ab", buffering=0) if distributed.is_primary() else None
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file:
            self._file.close()

    def write(self, line: dict[str, Any]) -> None:
        if not self._file:
            return
        remaining = (json.dumps(line) + "\n").encode()
        try:
            while remaining:  # on a nearly full disk, `write` may write only a part
                remaining = remaining[self._file.write(remaining) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def sync(self) -> None:
        """Flushes the file to disk, so that no line before a checkpoint is lost once the checkpoint exists."""
        if self._file:
            os.fsync(self._file.fileno())


class DataErrorsLog(JsonlLog):
    """`data_errors.jsonl`: one line each time that a record could not be used, for all processes.

    count: number of lines since the run began, including those before an interruption
    tried: records read since the run began
    """

    def __init__(self, path: Path, position: int, config: RunConfig):
        super().__init__(path, "position", position)
        self._data = config.data
        self.count, self.tried = distributed.all_sum(self.kept)[0], 0

    def add(self, item: PipelineBatch, count: int) -> bool:
        """Writes a batch's unusable records; returns whether there are now more than the configuration allows.

        count: their number in the batches of all processes, which exchange them if there are any
        """
        bad = distributed.all_gather_objects([dataclasses.asdict(record) for record in item.bad]) if count else []
        # Several processes may read the same rows.
        for record in {(record["position"], record["attempt"]): record for record in bad}.values():
            self.write(record)
            self.count += 1
        self.tried = item.end + self.count
        return self._data.too_bad(self.count, self.tried)


class MetricsLog(JsonlLog):
    """`metrics.jsonl`: one line every `log_every` steps, and one for the first and the last step.

    Speeds and the share of waiting are averages over the steps since the previous line or the resume; everything else
    describes this step alone. With several processes, real tokens, images and waiting are those of the primary process.

    peak: operations a second of all devices, or None. If known, lines have "mfu", the share of it that the model used;
          if not, "gflops_per_second"
    """

    def __init__(self, path: Path, started: int, position: int, config: RunConfig, peak: float | None = None):
        super().__init__(path, "step", started)
        self._config, self._peak = config, peak
        self._start_window(position)

    def _start_window(self, position: int) -> None:
        self._since, self._waited, self._from, self._real = time.monotonic(), 0.0, position, 0
        self._operations: int | None = 0

    def add(self, item: PipelineBatch, metrics: Mapping[str, Any], waited: float, operations: int | None) -> None:
        """Adds a step, and writes a line if one is due.

        metrics:    see `steps.train_step`
        waited:     seconds that the devices waited for the step's batch
        operations: the step's, see `mmjax.cost.flops.Flops.useful`; None if unknown
        """
        self._waited += waited
        self._operations = None if None in (operations, self._operations) else self._operations + operations
        real = int(item.batch.valid.sum())
        self._real += real
        last = item.number + 1 == self._config.optim.steps
        if item.number % self._config.log_every and not last:
            return
        seconds = time.monotonic() - self._since
        line = {
            "step": item.number,
            "loss": float(metrics["loss"]),
            "lr": float(optim.learning_rate(self._config.optim, item.number)),
            "grad_norm": float(metrics["grad_norm"]),
            "targets": int(metrics["tokens"]),
            "samples_per_second": round((item.end - self._from) / seconds, 2),
            "tokens_per_second": round(jax.process_count() * self._real / seconds, 1),
            "real_token_share": round(real / item.batch.tokens.size, 4),
            "waiting_share": round(self._waited / seconds, 4),
        }
        if (share := _image_share(item)) is not None:
            line["image_share"] = share
        if self._operations:
            line |= utilization(self._operations / seconds, self._peak)
        if "gates" in metrics:
            line["gates"] = [round(float(gate), 6) for gate in metrics["gates"]]
        self.write(line)
        self._start_window(item.end)


def _image_share(item: PipelineBatch) -> float | None:
    """Returns the share of the encoded images of packed rows that samples have; None if there are none."""
    batch = item.batch
    images = batch.images if batch.features is None else batch.features
    if batch.segments is None or images is None:
        return None
    return round(item.images / (images.shape[0] * images.shape[1]), 4)


def utilization(speed: float, peak: float | None) -> dict[str, float]:
    """Returns {"mfu": share of the peak}, or {"gflops_per_second": ...} if the peak is unknown, in three digits."""
    name, value = ("gflops_per_second", speed / 1e9) if peak is None else ("mfu", speed / peak)
    return {name: float(f"{value:.3g}")}
