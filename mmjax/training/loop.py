"""The loop over the steps of a run. It dispatches each step before it reads the metrics of the one before.

So the devices have the next step when they end one, and the host logs, checks and fetches batches meanwhile. Metrics
are sums over all devices: every process reads the same numbers and decides the same, without asking the others. A step
whose numbers cannot be used changes nothing (`steps.train_step`), so it is early enough to stop one step later. All
metrics are read before a checkpoint is saved.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmjax import compilation
from mmjax.batch import Batch
from mmjax.checkpoints import training as training_checkpoints
from mmjax.config import RunConfig
from mmjax.cost import flops
from mmjax.data import pipeline
from mmjax.training import metrics_log, preemption, steps


class TrainingStopped(RuntimeError):
    """Training cannot continue; the message says why, which checkpoint is the last good one, and what to do."""


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """The operations of a training step, to report the utilisation of the devices.

    count: returns the operations of a step for a state and a batch; None if unknown
    peak:  operations a second of all devices; None if unknown
    """

    count: Callable[[steps.TrainState, Batch], flops.Flops | None]
    peak: float | None

    def format_throughput(self, operations: int | None, seconds: float) -> str:
        """Returns text for the progress line, such as "  mfu 0.52"; "" if unknown."""
        if operations is None:
            return ""
        (name, value), = metrics_log.utilization(operations / seconds, self.peak).items()
        return f"  mfu {value:.2f}" if name == "mfu" else f"  {value:,.0f} GFLOP/s"


class StepClock:
    """A context manager that records when dispatched steps end, in a thread of its own."""

    def __enter__(self) -> "StepClock":
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "step-clock")
        return self

    def __exit__(self, *_: Any) -> None:
        self._thread.shutdown()

    def end_of(self, array: jax.Array) -> concurrent.futures.Future[float]:
        """Returns the time (`time.monotonic`) at which an array is computed, once it is. To be called in the order in
        which the arrays are computed."""

        def wait() -> float:
            array.block_until_ready()
            return time.monotonic()

        return self._thread.submit(wait)


@dataclasses.dataclass(frozen=True)
class DispatchedStep:
    """A step whose metrics have not been read.

    metrics:             as `steps.train_step` returns them
    flops:               of the step; None if unknown
    requested, received: times at which the loop asked for its batch and had it
    ended:               the time at which its metrics are computed
    """

    item: pipeline.PipelineBatch
    metrics: Mapping[str, jax.Array]
    flops: flops.Flops | None
    requested: float
    received: float
    ended: concurrent.futures.Future[float]


class MetricsReader:
    """Reads the metrics of dispatched steps in order: checks them, logs them, and shows them in the progress line.

    progress: of the run after the last step that was read
    loss:     of that step; None before the first
    """

    def __init__(self, config: RunConfig, progress: training_checkpoints.Progress, work: StepFlops,
                 checkpoints: training_checkpoints.Checkpoints, log: metrics_log.MetricsLog,
                 bad: metrics_log.DataErrorsLog, show: Callable[[str], None]):
        self.progress, self.loss = progress, None
        self._config, self._work, self._checkpoints = config, work, checkpoints
        self._log, self._bad, self._show = log, bad, show
        self._ended: float | None = None

    def read(self, step: DispatchedStep) -> None:
        """Waits for a step, the next one in order. Raises TrainingStopped if its numbers cannot be used."""
        ended, metrics, item = step.ended.result(), jax.device_get(step.metrics), step.item
        check_records(self._config, item, metrics, self._bad, self._checkpoints)
        check_step(self._config, item, metrics, self._checkpoints)
        self.loss = float(metrics["loss"])
        idle = step.requested if self._ended is None else max(step.requested, self._ended)
        operations = None if step.flops is None else step.flops.useful(int(metrics["tokens"]))
        self._log.add(item, metrics, max(step.received - idle, 0.0), operations)
        # the first step compiles
        speed = "" if self._ended is None else self._work.format_throughput(operations, ended - self._ended)
        self._show(f"loss {self.loss:.3f}{speed}")
        self.progress = self.progress.after(self.loss, item.end)
        if is_due(self._config, item.number + 1):
            self.progress = self.progress.due()
        self._ended = ended


def is_due(config: RunConfig, done: int) -> bool:
    """Returns whether a checkpoint is due after that many steps."""
    return done % config.save_every == 0 or done == config.optim.steps


def progress_bar(config: RunConfig, console: Console) -> Progress:
    return Progress(TextColumn(config.phase or "training"), BarColumn(), MofNCompleteColumn(),
                    TextColumn("{task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def loop(
    config: RunConfig,
    started: int,
    progress: training_checkpoints.Progress,
    advance: Callable[[steps.TrainState, pipeline.PipelineBatch, Batch], tuple[steps.TrainState, dict[str, Any]]],
    diagnose: Callable[[float, steps.TrainState], None],
    work: StepFlops,
    state: steps.TrainState,
    batches: Iterator[tuple[pipeline.PipelineBatch, Batch]],
    checkpoints: training_checkpoints.Checkpoints,
    stop: preemption.StopSignal,
    console: Console,
) -> tuple[steps.TrainState, float | None]:
    """Trains from step `started` to the last step or a stop signal. Returns the state and the last loss.

    progress: of the run, at step `started`
    advance:  dispatches one training step
    diagnose: checks the first loss of a run
    work:     operations of the steps
    batches:  each batch as it was read, and on the devices

    Raises TrainingStopped.
    """
    out = Path(config.out)
    with (metrics_log.MetricsLog(out / "metrics.jsonl", started, progress.position, config, work.peak) as log,
          metrics_log.DataErrorsLog(out / "data_errors.jsonl", progress.position, config) as bad,
          progress_bar(config, console) as bar, StepClock() as clock):
        task = bar.add_task("", total=config.optim.steps, completed=started, loss="")
        reader = MetricsReader(config, progress, work, checkpoints, log, bad,
                               lambda text: bar.update(task, advance=1, loss=text))
        unread: collections.deque[DispatchedStep] = collections.deque()

        def read(most: int) -> None:
            """Reads until at most that many steps are unread."""
            while len(unread) > most:
                reader.read(unread.popleft())

        requested = time.monotonic()
        for item, batch in batches:
            received, first = time.monotonic(), item.number == started
            with compilation.announce("the training step", console) if first else contextlib.nullcontext():
                state, metrics = advance(state, item, batch)
            for number in metrics.values():
                number.copy_to_host_async()
            unread.append(DispatchedStep(item, metrics, work.count(state, batch), requested, received,
                                         clock.end_of(metrics["loss"])))
            read(most=0 if first else 1)
            if item.number == 0 and config.check_first_loss:
                diagnose(reader.loss, state)
            checkpoints.check()
            done = item.number + 1
            if (stopping := stop.should_stop(done)) or is_due(config, done):
                read(most=0)
                log.sync()
                bad.sync()
                checkpoints.save(done, state, reader.progress)
            if stopping:
                break
            requested = time.monotonic()
    return state, reader.loss


def check_records(config: RunConfig, item: pipeline.PipelineBatch, metrics: Mapping[str, Any],
                  bad: metrics_log.DataErrorsLog, checkpoints: training_checkpoints.Checkpoints) -> None:
    """Logs the unusable records of a step's batch, of all processes. Raises TrainingStopped if there are too many."""
    if bad.add(item, int(metrics["unusable"])):
        raise TrainingStopped(
            f"{bad.count} of the first {bad.tried} records that were tried cannot be used, more than "
            f"data.max_bad_share = {config.data.max_bad_share} allows. {Path(config.out) / 'data_errors.jsonl'} lists "
            f"them. Repair them, or increase data.max_bad_share. {last_good(checkpoints)}")


def check_step(config: RunConfig, item: pipeline.PipelineBatch, metrics: Mapping[str, Any],
               checkpoints: training_checkpoints.Checkpoints) -> None:
    """Raises TrainingStopped if the step had no targets, or its numbers are not finite: then it changed nothing."""
    if not int(metrics["tokens"]):
        raise TrainingStopped(
            f"Batch {item.number} has no token to learn: all its answers are empty or cut off "
            f"(text.max_txt_len = {config.text.max_txt_len}). {samples(item)} {last_good(checkpoints)}")
    if not bool(metrics["applied"]):
        raise TrainingStopped(
            f"The loss, a gradient or the update of batch {item.number} is not finite (loss {float(metrics['loss'])}, "
            f"gradient norm {float(metrics['grad_norm'])}). The update was not applied. {samples(item)} "
            f"{last_good(checkpoints)}")


def samples(item: pipeline.PipelineBatch) -> str:
    return f"Its samples: {', '.join(item.names)}."


def last_good(checkpoints: training_checkpoints.Checkpoints) -> str:
    if checkpoints.latest is None:
        return "No checkpoint has been saved yet."
    return f"The last good checkpoint is of step {checkpoints.latest}; the same command resumes from there."
