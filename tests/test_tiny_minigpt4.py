"""The embedded default: its shipped weights, and (slow) the whole job with the scores that the README gives."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mmjax
from mmjax import config, evaluate
from mmjax.data import scenes

CONFIG = Path(__file__).parents[1] / "configs" / "tiny_minigpt4.py"


def in_folder(folder, **changes):
    job = config.load(str(CONFIG))
    return dataclasses.replace(
        job, out=str(folder / "run"), weights=dataclasses.replace(job.weights, checkpoint=str(folder / "base")),
        data=dataclasses.replace(job.data, path=str(folder / "scenes"), **changes.pop("data", {})), **changes)


def test_two_steps_from_nothing(tmp_path):
    """Converts, draws, trains, scores and reports; two steps teach nothing, so the scores only have to be there."""
    job = in_folder(tmp_path, data={"batch_size": 4, "scenes": config.ScenesConfig(count=8, held_out=4)})
    job = dataclasses.replace(job, optim=dataclasses.replace(job.optim, steps_per_epoch=2, warmup_steps=1))
    done = mmjax.train(job)
    assert done.step == 2 and np.isfinite(done.loss)
    assert [row[0] for row in done.scores[1:]] == list(evaluate.ROWS.values())
    page = (tmp_path / "run" / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") > 4
    assert json.loads((tmp_path / "run" / "scores.json").read_text()) == done.scores


def test_shipped_language_model_reads_words(tmp_path):
    """It never saw a image: given the words in the image's place it writes the caption."""
    from mmjax.convert import write

    job = config.load(str(CONFIG))
    write.command("llama")(job.weights.sources["llm"], tmp_path / "words")
    model = mmjax.load(tmp_path / "words", dtype="float32")
    template = job.text.prompt_template
    scene = next(scene for scene in scenes.scenes("held_out", 50) if len(scene.things) == 1)
    thing = scene.things[0]
    shown = " ".join([thing.shape, thing.size, thing.color, thing.place, *["none"] * 8])
    prompt = template.replace("{}", f"<Img> {shown} </Img> {scenes.PROMPTS[0]}")
    words = model.generate([mmjax.Sample(prompt=prompt)], 40, stop=["###"])[0]
    assert scenes.parse(words) == [thing]


@pytest.mark.slow
def test_scores(tmp_path):
    """The README's command, in a process of its own that optimises its programs."""
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    command = [sys.executable, CONFIG.parents[1] / "train.py", "--config", CONFIG]
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    table = json.loads((tmp_path / "runs" / "tiny_minigpt4" / "scores.json").read_text())
    held_out, blind, new_pairs, *_ = next(row[1:] for row in table if row[0] == evaluate.ROWS["mean"])
    assert held_out >= 0.98
    assert blind <= 0.35
    assert new_pairs >= 0.90
