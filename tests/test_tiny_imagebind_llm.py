"""ImageBind-LLM's embedded default: both phases in two steps each, and (slow) the job with the README's scores."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmjax import config, evaluate
from mmjax.data import scenes
from mmjax.training import run

CONFIG = Path(__file__).parents[1] / "configs" / "tiny_imagebind_llm.py"


@pytest.mark.extended
def test_two_steps_of_each_phase(tmp_path):
    """Converts, draws, trains both phases, scores every sense and reports."""
    few = config.ScenesConfig(count=8, held_out=4, most=1)
    phases = {}
    for name, phase in config.load(str(CONFIG)).items():
        start = phase.weights.start_from and str(tmp_path / "pretrain")
        weights = dataclasses.replace(phase.weights, checkpoint=str(tmp_path / "base"), start_from=start)
        phases[name] = dataclasses.replace(
            phase, out=str(tmp_path / name), weights=weights,
            data=dataclasses.replace(phase.data, path=str(tmp_path / phase.data.format), batch_size=4, scenes=few),
            optim=dataclasses.replace(phase.optim, steps_per_epoch=2, warmup_steps=1))
    done = run.train_phases(phases, evaluate.score_job)
    assert done.folder == tmp_path / "finetune" and np.isfinite(done.loss)
    assert done.scores[0] == ["", "held-out", "held-out, blind", "new pairs", "new pairs, blind", "depth",
                              "depth, blind", "depth, cache", "untrained"]
    assert [row[0] for row in done.scores[1:]] == [
        label for name, label in evaluate.ROWS.items() if name != "several"]  # one shape a image
    page = (tmp_path / "finetune" / "report" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Gates</h2>" in page
    assert not (tmp_path / "pretrain" / "report").exists()


@pytest.mark.slow
def test_scores(tmp_path):
    """The README's command, in a process of its own that optimises its programs."""
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    command = [sys.executable, CONFIG.parents[1] / "train.py", "--config", CONFIG]
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    table = json.loads((tmp_path / "runs" / "tiny_imagebind_llm" / "finetune" / "scores.json").read_text())
    columns, rows = table[0], {row[0]: row for row in table[1:]}

    def share(row, column):
        return rows[row][columns.index(column)]

    mean = evaluate.ROWS["mean"]
    assert share(mean, "held-out") >= 0.97
    assert share(mean, "held-out, blind") <= 0.35
    for attribute in ("size", "shape", "place"):
        assert share(attribute, "depth") >= 0.90
    # A depth map has no colour: no more than guessing, and two and a half standard deviations of 200 guesses.
    assert share("color", "depth") <= 1 / len(scenes.COLORS) + 0.06
