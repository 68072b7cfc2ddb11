"""The order in which the loop dispatches steps, reads their metrics and saves, with a simulated device."""

import json
import types
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mmjax.checkpoints.training import Progress
from mmjax.config import DataConfig, OptimConfig, RunConfig
from mmjax.data.pipeline import BadRecord, PipelineBatch
from mmjax.training import distributed, loop

GOOD = {"loss": np.float32(2), "grad_norm": np.float32(1), "tokens": np.int32(3), "applied": np.True_,
        "unusable": np.int32(0)}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Number:
    """A metric; reading it is an event, and takes until the step's end."""

    def __init__(self, run, step, name, value, end):
        self.run, self.step, self.name, self.value, self.end = run, step, name, value, end

    def copy_to_host_async(self):
        pass

    def block_until_ready(self):
        return self

    def __array__(self, *_, **__):
        if self.name == "loss":
            self.run.events.append(("read", self.step))
        self.run.now = max(self.run.now, self.end)
        return np.asarray(self.value)


class Simulated:
    """A run of the loop on a device whose steps take `seconds`, with what happened, in order, in `events`.

    metrics: {step: what differs from GOOD};  batch_seconds: {step: seconds that its batch takes}
    bad:     {step: unusable records};        stop: the number of steps after which `should_stop` is True
    """

    def __init__(self, out, monkeypatch, steps=6, metrics=(), batch_seconds=(), bad=(), stop=None, started=0,
                 seconds=1.0, **config):
        self.events, self.now, self.end, self.saved, self.collectives = [], 0.0, 0.0, [], 0
        self.metrics, self.batch_seconds, self.bad = dict(metrics), dict(batch_seconds), dict(bad)
        self.stop, self.started, self.seconds = stop, started, seconds
        self.config = RunConfig(out=str(out), data=config.pop("data", DataConfig(path="x")),
                                optim=OptimConfig(epochs=1, steps_per_epoch=steps),
                                **{"save_every": 3, "log_every": 1, "check_first_loss": False} | config)
        monkeypatch.setattr(loop.time, "monotonic", lambda: self.now)
        gather = distributed._all_gather
        monkeypatch.setattr(distributed, "_all_gather", lambda array: self.count() or gather(array))
        monkeypatch.setattr(loop.StepClock, "end_of", self.end_of)

    def count(self):
        self.collectives += 1

    def end_of(self, loss):
        def result():
            self.now = max(self.now, loss.end)
            return loss.end

        return types.SimpleNamespace(result=result)

    def batches(self):
        for number in range(self.started, self.config.optim.steps):
            self.now += self.batch_seconds.get(number, 0.0)
            batch = types.SimpleNamespace(valid=np.ones((2, 8), bool), tokens=np.ones((2, 8), int),
                                          features=None, images=None, segments=None)
            records = tuple(BadRecord(number, attempt, "x", "name", "file", "cut off")
                            for attempt in range(self.bad.get(number, 0)))
            yield PipelineBatch(number, 2 * number + 2, (f"a{number}", f"b{number}"), batch, records), None

    def advance(self, state, item, batch):
        self.events.append(("dispatch", item.number))
        self.end = max(self.now, self.end) + self.seconds
        metrics = GOOD | {"unusable": np.int32(len(item.bad))} | self.metrics.get(item.number, {})
        return state + 1, {name: Number(self, item.number, name, value, self.end) for name, value in metrics.items()}

    def save(self, step, state, progress):
        self.events.append(("save", step))
        self.saved.append((step, state, progress))

    def should_stop(self, done):
        return done == self.stop

    def run(self, diagnose=lambda loss, state: None):
        checkpoints = types.SimpleNamespace(
            latest=self.started or None, check=lambda: None, save=self.save)
        try:
            return loop.loop(self.config, self.started, Progress(), self.advance, diagnose,
                             loop.StepFlops(lambda state, batch: None, None), self.started, self.batches(),
                             checkpoints, self, Console(quiet=True))
        finally:
            self.lines = lines(Path(self.config.out) / "metrics.jsonl")


def test_each_step_is_dispatched_before_the_one_before_is_read(tmp_path, monkeypatch):
    simulated = Simulated(tmp_path, monkeypatch)
    assert simulated.run() == (6, 2.0)
    assert simulated.events == [
        ("dispatch", 0), ("read", 0),  # the one that compiles
        ("dispatch", 1), ("dispatch", 2), ("read", 1), ("read", 2), ("save", 3),
        ("dispatch", 3), ("dispatch", 4), ("read", 3), ("dispatch", 5), ("read", 4), ("read", 5), ("save", 6)]
    assert [line["step"] for line in simulated.lines] == list(range(6))
    assert [(step, state, progress.position, progress.loss) for step, state, progress in simulated.saved] == [
        (3, 3, 6, 2.0), (6, 6, 12, 2.0)]


def test_no_step_asks_the_other_processes(tmp_path, monkeypatch):
    simulated = Simulated(tmp_path, monkeypatch)
    simulated.run()
    assert simulated.collectives == 1  # the lines of data_errors.jsonl that are there at the start


@pytest.mark.parametrize(("metrics", "words"), [
    ({"loss": np.float32(np.nan), "applied": np.False_}, "batch 4 is not finite .loss nan.*Its samples: a4, b4"),
    ({"tokens": np.int32(0), "applied": np.False_}, "Batch 4 has no token to learn.*Its samples: a4, b4"),
])
def test_a_refused_step_stops_the_run_and_is_named(tmp_path, monkeypatch, metrics, words):
    simulated = Simulated(tmp_path, monkeypatch, 9, {4: metrics}, started=2)
    with pytest.raises(loop.TrainingStopped, match=f"{words}.*The last good checkpoint is of step 2"):
        simulated.run()
    assert simulated.events[-3:] == [("read", 3), ("dispatch", 5), ("read", 4)]
    assert [step for step, *_ in simulated.saved] == [3]
    assert [line["step"] for line in simulated.lines] == [2, 3]


def test_a_refused_step_is_never_saved(tmp_path, monkeypatch):
    """It is read before the checkpoint that is due after it, or after the next step."""
    for bad in (1, 2):
        simulated = Simulated(tmp_path, monkeypatch, 9, {bad: {"applied": np.False_}})
        with pytest.raises(loop.TrainingStopped, match=f"batch {bad} is not finite.*No checkpoint has been saved"):
            simulated.run()
        assert simulated.saved == []


def test_a_run_that_is_told_to_stop_reads_all_and_saves(tmp_path, monkeypatch):
    simulated = Simulated(tmp_path, monkeypatch, 9, stop=5)
    simulated.run()
    assert simulated.events[-4:] == [("dispatch", 4), ("read", 3), ("read", 4), ("save", 5)]
    step, state, progress = simulated.saved[-1]
    assert (step, state, progress.position, progress.count, progress.loss) == (5, 5, 10, 2, None)


def test_the_first_loss_is_checked_before_the_second_step(tmp_path, monkeypatch):
    simulated = Simulated(tmp_path, monkeypatch, check_first_loss=True)
    seen = []
    simulated.run(lambda loss, state: seen.append((loss, state, len(simulated.events))))
    assert seen == [(2.0, 1, 2)]


def test_unusable_records_are_logged_with_their_step_and_may_stop_the_run(tmp_path, monkeypatch):
    simulated = Simulated(tmp_path, monkeypatch, bad={1: 1, 4: 1}, data=DataConfig(path="x", max_bad_share=0.001))
    with pytest.raises(loop.TrainingStopped, match="2 of the first 12 records that were tried cannot be used"):
        simulated.run()
    assert simulated.events[-2:] == [("dispatch", 5), ("read", 4)]
    assert [line["position"] for line in lines(tmp_path / "data_errors.jsonl")] == [1, 4]


def test_the_device_waits_only_once_its_steps_have_ended(tmp_path, monkeypatch):
    """Steps of 4 s. A batch that takes 3 s is there in time; one of 6 s is 2 s late."""
    simulated = Simulated(tmp_path, monkeypatch, batch_seconds={0: 5.0, 2: 3.0, 4: 6.0}, seconds=4.0, save_every=9)
    waited = []
    add = loop.metrics_log.MetricsLog.add

    def noted(self, item, metrics, seconds, operations):
        waited.append(seconds)
        simulated.now += 1e-9  # the window of a line is not empty
        add(self, item, metrics, seconds, operations)

    monkeypatch.setattr(loop.metrics_log.MetricsLog, "add", noted)
    simulated.run()
    assert waited == pytest.approx([5.0, 0.0, 0.0, 0.0, 2.0, 0.0], abs=1e-6)
