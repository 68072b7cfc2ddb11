"""Going on: what may change, which checkpoint, and whole runs that are told to end or find damage."""

import dataclasses
import json
import os
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from mmjax.checkpoints import converted
from mmjax.checkpoints import training as training_checkpoints
from mmjax.checkpoints.training import Checkpoints, DamagedError, Progress
from mmjax.config import DataConfig, MeshConfig, OptimConfig, RunConfig, ScenesConfig, Source, TextConfig, WeightsConfig
from mmjax.training import metrics_log, preemption, resume, run, steps
from tests import small

CONSOLE = Console(stderr=True, width=10_000)
MIXED = DataConfig(mixture=(Source("cc_sbu_align", "a", 2), Source("vqa", "b")))
BEFORE = RunConfig(out="run", weights=WeightsConfig("checkpoint"), data=DataConfig(path="images"))


def difference(tmp_path, before, now):
    card = {"config": dataclasses.asdict(before)}
    (tmp_path / converted.RUN_CARD).write_text(json.dumps(card))
    return resume.differences(now, tmp_path)


def changed(config, part, **fields):
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **fields)})


@pytest.mark.parametrize(("now", "words"), [
    (BEFORE, ""),
    (dataclasses.replace(BEFORE, log_every=3), "Changed since it began: log_every 10 -> 3."),
    (dataclasses.replace(BEFORE, mesh=MeshConfig(fsdp=2), keep=5, keep_best=True),
     "Changed since it began: keep 2 -> 5, keep_best False -> True, mesh.fsdp 1 -> 2."),
    (changed(BEFORE, "optim", init_lr=1.0, epochs=9),
     "Changed since it began: optim.epochs 5 -> 9, optim.init_lr 3e-05 -> 1.0."),
    (changed(BEFORE, "data", path="elsewhere", batch_size=4, pack_length=99),
     "Changed since it began: data.batch_size 12 -> 4, data.pack_length None -> 99, "
     "data.path 'images' -> 'elsewhere'."),
    (changed(BEFORE, "weights", checkpoint="moved"),
     "Changed since it began: weights.checkpoint 'checkpoint' -> 'moved'."),
])
def test_what_says_how_to_go_on_may_change(tmp_path, now, words):
    assert difference(tmp_path, BEFORE, now) == words


@pytest.mark.parametrize(("now", "line"), [
    (dataclasses.replace(BEFORE, phase="finetune"), "phase None -> 'finetune'"),
    (dataclasses.replace(BEFORE, trained=("qformer/.*",)), "trained None -> ['qformer/.*']"),
    (dataclasses.replace(BEFORE, seed=1), "seed 42 -> 1"),
    (dataclasses.replace(BEFORE, image_size=448), "image_size None -> 448"),
    (changed(BEFORE, "weights", dtype="float32"), "weights.dtype 'bfloat16' -> 'float32'"),
    (changed(BEFORE, "weights", start_from="other"), "weights.start_from None -> 'other'"),
    (changed(BEFORE, "data", seed=1), "data.seed 42 -> 1"),
    (changed(BEFORE, "data", prompts=("What?",)), "data.prompts [] -> ['What?']"),
    (changed(BEFORE, "text", end_sym="</s>"), "text.end_sym '###' -> '</s>'"),
    (changed(BEFORE, "optim", accumulate=2), "optim.accumulate 1 -> 2"),
])
def test_what_the_state_was_made_with_may_not_change(tmp_path, now, line):
    now = dataclasses.replace(now, log_every=99)
    with pytest.raises(ValueError) as refused:
        difference(tmp_path, BEFORE, now)
    first, told, what, *_ = str(refused.value).splitlines()
    assert first == f"The run in {tmp_path} cannot resume with these changes:" and told == f"  {line}"
    assert what.startswith("Use the settings it began with; or begin another run")


def test_sources_may_move_but_not_change(tmp_path):
    before = dataclasses.replace(BEFORE, data=MIXED)
    first, second = MIXED.mixture
    moved = dataclasses.replace(BEFORE, data=dataclasses.replace(
        MIXED, mixture=(dataclasses.replace(first, path="c", root="d"), second)))
    assert difference(tmp_path, before, moved) == (
        "Changed since it began: data.mixture.0.path 'a' -> 'c', data.mixture.0.root None -> 'd'.")
    for mixture, line in (((dataclasses.replace(first, ratio=3), second), "data.mixture.0.ratio 2 -> 3"),
                          ((first, dataclasses.replace(second, format="okvqa")), "data.mixture.1.format"),
                          ((first,), "data.mixture ")):
        with pytest.raises(ValueError, match=line):
            difference(tmp_path, before, dataclasses.replace(BEFORE, data=DataConfig(mixture=mixture)))


def test_scenes_that_are_drawn_stay(tmp_path):
    before = changed(BEFORE, "data", scenes=ScenesConfig(count=8))
    assert "held_out 200 -> 9" in difference(tmp_path, before, changed(before, "data", scenes=ScenesConfig(8, 9)))
    with pytest.raises(ValueError, match="data.scenes.count 8 -> 9"):
        difference(tmp_path, before, changed(before, "data", scenes=ScenesConfig(9)))


def test_a_field_that_mmjax_has_got_since_is_no_difference(tmp_path):
    card = {"config": dataclasses.asdict(BEFORE)}
    del card["config"]["keep_best"], card["config"]["text"]["joint"]
    card["config"]["forgotten"] = 1
    (tmp_path / converted.RUN_CARD).write_text(json.dumps(card))
    assert resume.differences(BEFORE, tmp_path) == ""


def test_checkpoints_without_a_card_are_not_gone_on_from(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*run\.json, which describes their run"):
        resume.differences(BEFORE, tmp_path)


def test_frozen_parameters_have_fingerprints_by_name():
    tree = {"vit": {"cls": jnp.arange(3.0), "w": jnp.ones((2, 2), jnp.bfloat16)}, "projector": {"w": None}}
    before = resume.fingerprints(tree)
    assert before.keys() == {"vit/cls", "vit/w"}
    tree["vit"]["cls"] = tree["vit"]["cls"].at[1].set(1.0000001)
    after = resume.fingerprints(tree)
    assert after["vit/w"] == before["vit/w"] and after["vit/cls"] != before["vit/cls"]


def test_other_frozen_parameters_or_data_are_refused(tmp_path):
    saved = Progress(records=(8, 3), frozen={"vit/a": 1, "vit/b": 2, "llm/c": 3})
    resume.check_unchanged(
        saved, dataclasses.replace(saved, frozen={"llm/c": 3, "new": 9}), tmp_path
    )  # without the encoder
    with pytest.raises(ValueError, match="1 of the 3 frozen parameters are not those .*: vit/b. Name its checkpoint"):
        resume.check_unchanged(saved, dataclasses.replace(saved, frozen=saved.frozen | {"vit/b": 7}), tmp_path)
    with pytest.raises(ValueError, match="sources of 8, 3 records; now they have 8, 2, so its position"):
        resume.check_unchanged(saved, dataclasses.replace(saved, records=(8, 2)), tmp_path)


def little(seed):
    return steps.start({"w": jnp.arange(4.0) + seed}, optax.adam(1.0), seed)


@pytest.fixture
def three(tmp_path):
    """Checkpoints of the steps 1, 2 and 3."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, little(step), Progress(step))
    checkpoints.wait()
    yield checkpoints
    checkpoints.close()


def harm(folder):
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def test_the_newest_whole_one_is_gone_on_from(three, capsys):
    assert resume.newest(three, CONSOLE) == 3
    for step in (2, 3):
        harm(three.folder / str(step))
    assert resume.newest(three, CONSOLE) == 1
    said = capsys.readouterr().err
    for step in (2, 3):
        assert f"checkpoints/{step} is damaged: " in said and f"It is kept as {three.folder}/{step}.damaged." in said
    assert three.steps == [1]
    three.save(2, little(5), Progress(2))
    three.wait()
    assert resume.newest(three, CONSOLE) == 2


def test_where_none_is_whole_all_stay(three):
    for step in (1, 2, 3):
        harm(three.folder / str(step))
    with pytest.raises(DamagedError, match=r"(?s)None of the checkpoints can .*/3 is damaged.*/1 is damaged"
                                             r".*to start over"):
        resume.newest(three, CONSOLE)
    assert three.steps == [1, 2, 3]


def test_of_nothing_saved_there_is_no_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert resume.newest(checkpoints, CONSOLE) is None
    checkpoints.close()


def outcome(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = training_checkpoints.trained(folder / "checkpoints")
    return ([(line["step"], line["loss"], line["grad_norm"], line["real_token_share"]) for line in lines],
            {path: np.asarray(leaf).tobytes() for path, leaf in trained.items()})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was told to end behind its third step, and went on."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    add, handler = metrics_log.MetricsLog.add, signal.getsignal(signal.SIGTERM)

    def told(self, item, *rest):
        add(self, item, *rest)
        if item.number == 1:  # step 2 is in progress when the signal is noticed
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_log.MetricsLog, "add", told)
        with pytest.raises(preemption.Preempted):
            run.train(small.run_config(folder))
    signal.signal(signal.SIGTERM, handler)
    assert training_checkpoints.saved(folder / "checkpoints") == [2, 3]
    run.train(small.run_config(folder))
    return folder


def test_a_run_that_is_told_to_end_loses_nothing(finished):
    assert outcome(finished) == outcome(small.finished())


def test_damage_costs_the_steps_since_the_checkpoint_before(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    harm(folder / "checkpoints" / "4")
    with pytest.raises(DamagedError, match="4 is damaged: .* has changed. Start the run again"):
        training_checkpoints.trained(folder / "checkpoints")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    run.train(small.run_config(folder))
    assert "Resuming at step 3 of 4." in capsys.readouterr().err
    assert outcome(folder) == outcome(finished)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["3", "4", "4.damaged"]


def test_other_frozen_weights_are_refused_before_anything_is_written(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    place = folder / "checkpoints" / "4"
    progress = training_checkpoints.verify(place)
    assert progress.records == (8,) and len(progress.frozen) > 20
    (place / training_checkpoints.SEAL).unlink()
    training_checkpoints.seal(place, dataclasses.replace(progress, frozen=progress.frozen | {"llm/norm/scale": 1}))
    before = (folder / converted.RUN_CARD).read_text()
    with pytest.raises(ValueError, match="1 of the .* frozen parameters are not those .*: llm/norm/scale"):
        run.train(small.run_config(folder, log_every=2))
    with pytest.raises(ValueError, match=r"text\.max_txt_len 32 -> 9"):
        run.train(small.run_config(folder, text=TextConfig("###Human: {} ###Assistant: ", max_txt_len=9)))
    with pytest.raises(ValueError, match=r"optim\.accumulate 1 -> 2"):
        run.train(small.run_config(folder, optim=OptimConfig(accumulate=2)))
    assert (folder / converted.RUN_CARD).read_text() == before
