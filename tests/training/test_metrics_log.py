"""Files of JSON lines that a killed run left as they were."""

import json
import types

import numpy as np
import pytest

from mmjax.config import OptimConfig, RunConfig
from mmjax.training import metrics_log
from mmjax.training.metrics_log import JsonlLog

WHOLE = '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def kept(path, below=9):
    lines = JsonlLog(path, "step", below)
    return lines.kept, path.read_text()


@pytest.mark.parametrize("cut", range(len(WHOLE) - len('{"step": 2}\n'), len(WHOLE) + 1))
def test_a_line_that_was_being_written_goes(tmp_path, cut):
    (tmp_path / "a").write_text(WHOLE[:cut])
    count = 3 if cut >= len(WHOLE) - 1 else 2
    assert kept(tmp_path / "a") == (count, "".join(WHOLE.splitlines(True)[:count]))


def test_bytes_that_are_no_text_go_if_they_are_last(tmp_path):
    (tmp_path / "a").write_bytes(WHOLE.encode() + b"\x00\xff\x00")
    assert kept(tmp_path / "a", below=2) == (2, '{"step": 0}\n{"step": 1}\n')


def test_another_broken_line_is_named_and_stays(tmp_path):
    text = WHOLE.replace('1}', "")
    (tmp_path / "a").write_text(text)
    with pytest.raises(ValueError, match=r"a, line 2 is not JSON: .* Repair or remove that line"):
        kept(tmp_path / "a")
    assert (tmp_path / "a").read_text() == text


def test_lines_are_there_as_soon_as_they_are_written(tmp_path):
    with JsonlLog(tmp_path / "a", "step", 0) as lines:
        lines.write({"step": 0})
        lines.sync()
        assert (tmp_path / "a").read_text() == '{"step": 0}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"), JsonlLog(tmp_path / "folder", "step", 0):
        pass
    with (
        pytest.raises(OSError, match="No space left on device: .*full"),
        JsonlLog(tmp_path / "full", "step", 0) as lines,
    ):
        lines._file.close()
        lines._file = open("/dev/full", "ab", buffering=0)
        lines.write({"step": 0})


@pytest.mark.parametrize(("peak", "told"), [(None, ("gflops_per_second", 3.0)), (4e9, ("mfu", 0.75))])
def test_operations_a_second_since_the_line_before(tmp_path, monkeypatch, peak, told):
    """Three steps of 1, 2 and 3 G of operations, the clock moves by a second a step; lines of steps 0 and 2."""
    now = [0.0]
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: now[0])
    config = RunConfig(log_every=2, optim=OptimConfig(epochs=1, steps_per_epoch=3))
    measured = {"loss": 1.0, "grad_norm": 1.0, "tokens": 4}
    batch = types.SimpleNamespace(valid=np.ones((2, 8), bool), tokens=np.ones((2, 8), int),
                                  features=None, images=None, segments=None)
    with metrics_log.MetricsLog(tmp_path / "metrics.jsonl", 0, 0, config, peak) as log:
        for number in range(3):
            now[0] += 1
            item = types.SimpleNamespace(number=number, batch=batch, end=2 * number + 2)
            log.add(item, measured, 0.0, [1_000_000_000, 2_000_000_000, 4_000_000_000][number])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2]
    name, last = told
    assert lines[0][name] == last / 3 and lines[1][name] == last  # 1 G in one second, 6 G in two
    assert len({"mfu", "gflops_per_second"} & lines[0].keys()) == 1


def test_a_step_that_cannot_be_counted_leaves_no_figure(tmp_path):
    config = RunConfig(log_every=2, optim=OptimConfig(epochs=1, steps_per_epoch=2))
    batch = types.SimpleNamespace(valid=np.ones((2, 8), bool), tokens=np.ones((2, 8), int),
                                  features=None, images=None, segments=None)
    with metrics_log.MetricsLog(tmp_path / "metrics.jsonl", 1, 0, config) as log:
        log.add(types.SimpleNamespace(number=1, batch=batch, end=2), {"loss": 1.0, "grad_norm": 1.0, "tokens": 4},
                0.0, None)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["step"] == 1 and not {"mfu", "gflops_per_second"} & line.keys()
