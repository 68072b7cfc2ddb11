"""What a run writes down as it goes: `metrics.jsonl` and `data_errors.jsonl` in its folder, one JSON object a line.

What an interrupted run wrote beyond its last checkpoint goes when it goes on, and is written again. Of several
processes the first one writes, for all of them.
"""

import dataclasses
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmjax import files, trees
from mmjax.config import RunConfig
from mmjax.data.pipeline import PipelineBatch
from mmjax.training import distributed, optim


class JsonlLog:
    """A file of JSON lines that is added to, of which those are kept whose `field` is below a number.

    kept: how many those are. A last line that was being written when the run was killed is none.

    Raises OSError naming the file where it cannot be written, ValueError if another line than the last is not JSON.
    """

    def __init__(self, path: Path, field: str, below: int):
        self._path = path
        text = path.read_text(errors="replace") if path.exists() and distributed.is_primary() else ""
        lines = text.splitlines()
        whole = [line for number, line in enumerate(lines, 1)
                 if (found := self._parsed(line, number, len(lines))) is not None and found[field] < below]
        self.kept = len(whole)
        if (kept := "".join(line + "\n" for line in whole)) != text:
            files.replace(path, kept)

    def _parsed(self, line: str, number: int, of: int) -> dict[str, Any] | None:
        try:
            return json.loads(line)
        except ValueError as error:
            if number == of:
                return None
            raise ValueError(f"{self._path}, line {number} is not JSON: {error}. Mend or remove that line.") from error

    def __enter__(self) -> "JsonlLog":
        self._file = self._path.open("ab", buffering=0) if distributed.is_primary() else None
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file:
            self._file.close()

    def write(self, line: dict[str, Any]) -> None:
        if not self._file:
            return
        left = (json.dumps(line) + "\n").encode()
        try:
            while left:  # of a disk that is getting full, only what had room is written
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def sync(self) -> None:
        """Waits until everything is on the disk: what comes before a checkpoint must not be lost with it there."""
        if self._file:
            os.fsync(self._file.fileno())


class BadData(JsonlLog):
    """`data_errors.jsonl`: one line each time that a record could not be used, of all processes.

    count: such times since the run began, before an interruption too
    tried: records tried since then
    """

    def __init__(self, path: Path, position: int, config: RunConfig):
        super().__init__(path, "position", position)
        self._data = config.data
        self.count, self.tried = distributed.all_sum(self.kept)[0], 0

    def add(self, item: PipelineBatch) -> bool:
        """Whether there are now more of them than the configuration allows."""
        bad = [dataclasses.asdict(record) for record in item.bad]
        found = distributed.all_gather_objects(bad) if distributed.all_sum(len(bad))[0] else []
        for record in {(each["position"], each["attempt"]): each for each in found}.values():  # rows may be several's
            self.write(record)
            self.count += 1
        self.tried = item.end + self.count
        return self._data.too_bad(self.count, self.tried)


class Metrics(JsonlLog):
    """`metrics.jsonl`: one line each `log_every` steps, and the first and the last.

    Speeds and the share of waiting are of the steps since the line before, or since the run went on; everything else
    is of this step alone. Of several processes, real tokens and waiting are the first one's.

    peak: operations a second of all devices, if known: then "mfu" is the share of them that the model used, else
          "gflops_per_second" says how many those were
    """

    def __init__(self, path: Path, started: int, position: int, config: RunConfig, peak: float | None = None):
        super().__init__(path, "step", started)
        self._config, self._peak = config, peak
        self._begin(position)

    def _begin(self, position: int) -> None:
        self._since, self._waited, self._from, self._real = time.monotonic(), 0.0, position, 0
        self._operations: int | None = 0

    def add(self, item: PipelineBatch, metrics: dict[str, Any], trained: Any, waited: float, operations: int | None) -> None:
        """waited:     seconds that the step had to wait for its batch
        operations: of the step, see `mmjax.cost.flops.Flops.useful`; None if they cannot be told
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
        if self._operations:
            line |= utilization(self._operations / seconds, self._peak)
        if gates := open_gates(trained):
            line["gates"] = gates
        self.write(line)
        self._begin(item.end)


def utilization(speed: float, peak: float | None) -> dict[str, float]:
    """Operations a second as their share of the devices' peak, if that is known; in three digits."""
    name, value = ("gflops_per_second", speed / 1e9) if peak is None else ("mfu", speed / peak)
    return {name: float(f"{value:.3g}")}


def open_gates(trained: Any) -> list[float]:
    """How far each layer's gate is open, as the mean of |tanh|; nothing if no gate is trained."""
    gates = [leaf for path, leaf in trees.flatten(trained).items()
             if leaf is not None and re.fullmatch(r"llm/layers/(attn/)?gate", path)]
    return [round(float(layer), 6) for gate in gates for layer in np.abs(np.tanh(np.asarray(gate))).mean(-1)]
