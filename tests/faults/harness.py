"""Does faults to runs, lets them go on, and compares what they end with: see `worker.FAULTS`."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.checkpoints import training as training_checkpoints
from tests import small

ROOT = Path(__file__).parents[2]
PATIENCE = 300  # seconds for a run
# Of `worker.FAULTS`; that module is for its own process.
KILLS = ("killed behind a step", "killed in a line", "killed as a save begins", "killed before a seal",
         "killed with half a seal", "killed behind a seal", "killed behind a save", "killed in a removal",
         "killed as the card is written")
# How a run ends to which something else is done: the status, and what the log must say, for another refusal may have
# the same status.
ENDS = {"full disk": (2, r"The checkpoint of step \d+ could not be saved in .*: (.|\n)*File too large"),
        "SIGTERM": (75, r"SIGTERM: saving after the steps in progress\.\n(.|\n)*Saved at step \d+;"),
        "SIGTERM storm": (75, r"SIGTERM: saving after the steps in progress\.\n(.|\n)*Saved at step \d+;")}
# Of metrics.jsonl: no two runs have the same.
TIMES = ("samples_per_second", "tokens_per_second", "waiting_share", "gflops_per_second")


@dataclasses.dataclass(frozen=True)
class End:
    """How a process of a run ended. steps: seconds that it was at its steps, None if it did not come so far"""

    status: int
    steps: float | None
    log: str


class Bench:
    """A folder with what runs need, and the process that starts them."""

    def __init__(self, folder: Path):
        self.folder, self._started = folder, 0
        shutil.copytree(small.images(), folder / "images")
        for number in (2, 5):
            file = folder / "images" / "image" / f"{number}.jpg"
            file.write_bytes(file.read_bytes()[:100])
        settings = {"MMJAX_COMPILATION_CACHE": str(folder / "compiled"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                    "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PLATFORMS": "cpu",
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "COLUMNS": "1000"}
        with (folder / "worker.log").open("w") as log:
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.worker"], cwd=ROOT, env=os.environ | settings, bufsize=0,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)

    def run(self, out: Path, fault: tuple[str, int] | None = None, kill_after: float | None = None,
            options: tuple[str, ...] = ()) -> End:
        """Starts or goes on with the run in a folder, until it ends.

        fault:      a name of `worker.FAULTS` and at which call
        kill_after: seconds of steps behind which it is killed
        """
        self._started += 1
        log = self.folder / f"{self._started}.log"
        args = ["train", "--config", "tests/faults/config.py", "--out", str(out), "--data.path",
                str(self.folder / "images"), "--weights.checkpoint", str(small.checkpoint()), *options]
        self._worker.stdin.write((json.dumps({"args": args, "log": str(log), "fault": fault}) + "\n").encode())
        began = None
        while True:
            word, *number = self._line(None if began is None or kill_after is None else
                                       began + kill_after - time.monotonic())
            if word == "pid":
                process = _process(int(number[0]))
            elif word == "steps":
                began = time.monotonic()
            elif word == "late":
                _kill(process)
                kill_after = None
            elif word == "ended":
                if process is not None:
                    os.close(process)
                return End(int(number[0]), began and time.monotonic() - began, log.read_text(errors="replace"))

    def _line(self, wait: float | None) -> list[str]:
        """The worker's next words, or "late" if there are none so soon."""
        ready, _, _ = select.select([self._worker.stdout], [], [], PATIENCE if wait is None else max(wait, 0))
        if ready:
            line = self._worker.stdout.readline().decode().split()
            if line:
                return line
        if wait is not None and not ready:
            return ["late"]
        raise RuntimeError(f"A run does not end, or could not begin: see the newest log in {self.folder}.")

    def close(self) -> None:
        self._worker.stdin.close()
        self._worker.wait(PATIENCE)
        self._worker.stdout.close()


def _process(number: int) -> int | None:
    """A pidfd, which stays this process's when its number is given to another one; None if it has ended."""
    try:
        return os.pidfd_open(number)
    except ProcessLookupError:
        return None


def _kill(process: int | None) -> None:
    if process is not None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            signal.pidfd_send_signal(process, signal.SIGKILL)


def whole(out: Path) -> list[int]:
    """The steps whose checkpoints are as they were saved."""
    folder, steps = out / "checkpoints", []
    for step in training_checkpoints.saved(folder) if folder.is_dir() else ():
        try:
            training_checkpoints.verify(folder / str(step))
        except training_checkpoints.DamagedError:
            continue
        steps.append(step)
    return steps


def outcome(out: Path) -> dict[str, Any]:
    """Everything a run ends with that does not depend on how fast it was: to be compared with `same`."""
    steps = training_checkpoints.saved(out / "checkpoints")
    step = steps[-1]
    losses = [training_checkpoints.verify(out / "checkpoints" / str(each)).loss for each in steps]
    place = out / "checkpoints" / str(step)
    arrays = {path: np.asarray(leaf) for path, leaf in training_checkpoints.arrays(place.absolute()).items()}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "step": step,
        "best": min(loss for loss in losses if loss is not None),
        "arrays": {path: (array.dtype.name, array.shape, array.tobytes()) for path, array in arrays.items()},
        "progress": training_checkpoints.verify(place),
        "metrics": [{name: value for name, value in line.items() if name not in TIMES} for line in lines],
        "data_errors": (out / "data_errors.jsonl").read_text(),
    }


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Which parts of two outcomes are not the same, the arrays by name."""
    parts = [part for part in expected if part != "arrays" and found[part] != expected[part]]
    arrays = [path for path in expected["arrays"].keys() | found["arrays"].keys()
              if found["arrays"].get(path) != expected["arrays"].get(path)]
    return parts + sorted(arrays)


@dataclasses.dataclass
class Counts:
    """What a campaign did and found. lost: processes that ended with less saved than the one before had"""

    runs: int = 0
    same: int = 0
    ended: dict[str, int] = dataclasses.field(default_factory=dict)
    lost: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)

    def note(self, what: str) -> None:
        self.ended[what] = self.ended.get(what, 0) + 1

    @property
    def kills(self) -> int:
        return sum(number for what, number in self.ended.items() if what.startswith("killed"))


class Campaign:
    """Runs to which faults are done until they have ended as the one that is left alone."""

    def __init__(self, bench: Bench, options: tuple[str, ...] = ()):
        self.bench, self.options, self.counts = bench, options, Counts()
        self.untouched = bench.folder / "untouched"
        self.bench.run(self.untouched, options=options)
        self.expected = outcome(self.untouched)
        self.steps = self.expected["step"]

    @functools.cached_property
    def seconds(self) -> float:
        """How long the steps of a whole run take, now that they need not be compiled any more."""
        return self.bench.run(self.bench.folder / "timed", options=self.options).steps

    def new(self) -> Path:
        self.counts.runs += 1
        return self.bench.folder / f"run{self.counts.runs}"

    def fault(self, out: Path, name: str, call: int | None, kill_after: float | None = None) -> None:
        """One process of a run that a fault is done to."""
        before = max(whole(out), default=0)
        end = self.bench.run(out, call if call is None else (name, call), kill_after, self.options)
        status, words = ENDS.get(name, (-signal.SIGKILL, ""))
        expected = end.status == status and re.search(words, end.log) is not None
        self.counts.note(name if expected else "ended before the fault" if end.status == 0 else "otherwise")
        if not (expected or end.status == 0) or "Traceback" in end.log:
            self.counts.problems.append(f"{out.name}, {name} {call}: status {end.status}\n{end.log}")
        if max(whole(out), default=0) < before:
            self.counts.lost += 1
            self.counts.problems.append(f"{out.name}, {name} {call}: had step {before}, has {whole(out)}")

    def finish(self, out: Path) -> str:
        """Lets a run go on to its end and compares it; what it said."""
        end = self.bench.run(out, options=self.options)
        wrong = [f"status {end.status}\n{end.log}"] if end.status else differences(outcome(out), self.expected)
        if wrong:
            self.counts.problems.append(f"{out.name} is not as the untouched run: {', '.join(wrong)}")
        else:
            self.counts.same += 1
        return end.log

    def series(self, random: np.random.Generator, faults: int) -> None:
        """One run that is killed at random, by the clock or at a weak place of the program, and then finished."""
        out = self.new()
        for _ in range(faults):
            if random.random() < 0.5:
                # a run that goes on has fewer steps left, and one that never advances would teach nothing
                left = self.seconds * (1 - max(whole(out), default=0) / self.steps)
                self.fault(out, "killed by the clock", None, random.uniform(0.02, 1) * left)
            else:
                names = [name for name in KILLS if name != "killed as the card is written"]
                self.fault(out, str(random.choice(names)), int(random.integers(3)))
        self.fault(out, "killed as the card is written", int(random.integers(2)))
        self.finish(out)

    def named(self, name: str, calls: tuple[int, ...]) -> None:
        """One run with the same fault several times."""
        out = self.new()
        for call in calls:
            self.fault(out, name, call)
        self.finish(out)

    def damaged(self, file: str, random: np.random.Generator, cut: bool) -> None:
        """A finished run of which a file of the newest checkpoint is changed, or cut off, does its last steps anew."""
        out = self.new()
        shutil.copytree(self.untouched, out)
        path = out / "checkpoints" / str(self.steps) / file
        content = bytearray(path.read_bytes())
        if cut:
            del content[random.integers(len(content)) :]
        else:
            content[random.integers(len(content))] ^= 1 << random.integers(8)
        path.write_bytes(content)
        said = self.finish(out)
        self.counts.note("fell back" if "is damaged" in said else "file that nothing is read from")
        if ("is damaged" in said) == (path.name in training_checkpoints.LATER):
            self.counts.problems.append(f"{out.name}, {file}: said\n{said}")


def damageable(out: Path) -> list[str]:
    """The files of a run's newest checkpoint."""
    place = out / "checkpoints" / str(training_checkpoints.saved(out / "checkpoints")[-1])
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
