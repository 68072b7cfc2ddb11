"""Whole runs: train, stop, go on; what stops a run; what it leaves behind."""

import dataclasses
import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax import trees
from mmjax.checkpoints import training as training_checkpoints
from mmjax.checkpoints.converted import ConvertedCheckpoint
from mmjax.config import DataConfig, MeshConfig, Source, TextConfig
from mmjax.convert import torch_file
from mmjax.cost import plan
from mmjax.families import FAMILIES
from mmjax.training import loop, metrics_log, run, steps
from tests import small


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def looked():
    """The shape of the batch each time that the model of the finished run below was traced to be trained."""
    return []


@pytest.fixture(scope="module")
def finished(tmp_path_factory, looked):
    """Below a folder whose name is a pattern for files and for what is printed; the runs compared with it are not."""
    folder, mean_loss = tmp_path_factory.mktemp("finished") / "exp [1] *?" / "x[/b]", steps.mean_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "mean_loss", lambda *args: looked.append(args[2].tokens.shape) or mean_loss(*args))
        return run.train(small.run_config(folder))


def packed(config):
    """The same run with several samples in a row."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, pack_length=192, pack_images=3))


@pytest.fixture(scope="module")
def finished_packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished_packed") / "{x} 100%#~"
    return run.train(packed(small.run_config(folder)))


@pytest.mark.parametrize("rows", ["apart", "packed"])
def test_stopped_and_resumed_is_the_same_run(rows, request, tmp_path, monkeypatch):
    config = small.run_config(tmp_path / "run")
    finished = request.getfixturevalue("finished" if rows == "apart" else "finished_packed")
    config = config if rows == "apart" else packed(config)
    add = metrics_log.MetricsLog.add

    def interrupted(self, item, *rest):
        add(self, item, *rest)
        if item.number == 2:  # one step beyond the checkpoint
            raise KeyboardInterrupt

    monkeypatch.setattr(metrics_log.MetricsLog, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train(config)
    monkeypatch.undo()
    resumed = run.train(config)

    assert resumed.step == finished.step == 4
    first, second = (training_checkpoints.trained(r.folder / "checkpoints") for r in (finished, resumed))
    assert first.keys() == second.keys() == {"projector/b", "projector/w"}
    for path in first:
        np.testing.assert_array_equal(first[path], second[path])
    assert [line["loss"] for line in metrics(resumed.folder)] == [line["loss"] for line in metrics(finished.folder)]
    assert [line["step"] for line in metrics(resumed.folder)] == [0, 1, 2, 3]


def test_packed_rows_hold_more_samples_and_less_padding(finished, finished_packed):
    share, packed_share = (np.mean([line["real_token_share"] for line in metrics(done.folder)])
                           for done in (finished, finished_packed))
    assert packed_share > share
    ends = [training_checkpoints.Checkpoints(done.folder / "checkpoints").progress().position
            for done in (finished, finished_packed)]
    assert ends[0] == 8 < ends[1]


def test_a_finished_run_may_go_on_with_packed_rows(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    config = packed(small.run_config(tmp_path / "run"))
    longer = dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps_per_epoch=5))
    assert run.train(longer).step == 5


@pytest.fixture(scope="module")
def half_broken(tmp_path_factory):
    """The images, half of them cut off."""
    folder = tmp_path_factory.mktemp("half_broken") / "images"
    shutil.copytree(small.images(), folder)
    for number in range(4):
        file = folder / "image" / f"{number}.jpg"
        file.write_bytes(file.read_bytes()[:100])
    return folder


def mixture(half_broken, max_bad_share):
    sources = Source("cc_sbu_align", str(small.images()), 1), Source("cc_sbu_align", str(half_broken), 3)
    return DataConfig(mixture=sources, prompts=(small.PROMPT,), batch_size=2, length_multiple=64,
                      max_bad_share=max_bad_share)


def test_bad_images_are_replaced_and_named(half_broken, tmp_path, monkeypatch):
    config = small.run_config(tmp_path / "run", data=mixture(half_broken, 0.5))
    add, seen = metrics_log.MetricsLog.add, []

    def interrupted(self, item, *rest):
        add(self, item, *rest)
        seen.append(item)
        if len(seen) == 3:  # one step beyond the checkpoint
            raise KeyboardInterrupt

    monkeypatch.setattr(metrics_log.MetricsLog, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train(config)
    assert run.train(config).step == 4
    assert [item.number for item in seen] == [0, 1, 2, 2, 3]
    assert (seen[2].names, seen[2].bad) == (seen[3].names, seen[3].bad)
    lines = [json.loads(line) for line in (tmp_path / "run" / "data_errors.jsonl").read_text().splitlines()]
    bad = [dataclasses.asdict(record) for item in (*seen[:2], *seen[3:]) for record in item.bad]
    assert lines == bad and len(bad) > 1
    assert {int(line["name"]) for line in lines} <= set(range(4))
    assert all(line["source"] == str(half_broken) and line["file"] in line["problem"] for line in lines)


def test_too_many_bad_images_stop_the_run(half_broken, tmp_path):
    config = small.run_config(tmp_path / "run", data=mixture(half_broken, 0.0))
    with pytest.raises(run.TrainingStopped, match=r"of the first \d+ records .* data.max_bad_share = 0.0 allows"):
        run.train(config)
    assert (tmp_path / "run" / "data_errors.jsonl").read_text()


def test_prompt_without_a_place_for_the_image_stops_at_once(tmp_path):
    data = DataConfig(path=str(small.images()), prompts=(small.PROMPT, "Describe it."), batch_size=2)
    with pytest.raises(ValueError, match="0 <ImageHere> for 1 images"):
        run.train(small.run_config(tmp_path / "run", data=data))
    assert not (tmp_path / "run" / "data_errors.jsonl").exists()


def test_images_that_are_squashed_are_not_cropped(tmp_path):
    data = DataConfig(path=str(small.images()), prompts=(small.PROMPT,), random_crop=True, batch_size=2)
    with pytest.raises(ValueError, match=r"fit 'stretch'\. Set data\.random_crop = False"):
        run.train(small.run_config(tmp_path / "run", data=data))


def test_rows_of_a_family_that_injects_are_not_packed(tmp_path):
    """Refused before any weight is read, in the plan's words."""
    family = FAMILIES["llama_adapter"]
    source = ConvertedCheckpoint(tmp_path, family, family.presets["tiny"], TextConfig(), {}, ())
    config = small.run_config(tmp_path / "run", data=DataConfig(path=str(small.images()), batch_size=2, pack_length=64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConvertedCheckpoint, "open", lambda folder: source)
        with pytest.raises(ValueError, match=r"one injection for each row: set data\.pack_length = None"):
            run.set_up(config)
        with pytest.raises(ValueError, match=r"one injection for each row: set data\.pack_length = None"):
            plan.architecture(config, None)


def test_metrics_tell_how_much_the_model_computes(finished):
    assert all(line["gflops_per_second"] > 0 and "mfu" not in line for line in metrics(finished.folder))


def test_operations_are_counted_from_the_trace_that_the_step_has(finished, looked):
    assert looked and len(looked) == len(set(looked))


@pytest.mark.parametrize(("peak", "operations", "told"), [
    (1e12, 5 * 10**11, "  mfu 0.25"), (None, 5 * 10**11, "  250 GFLOP/s"), (1e12, None, ""), (None, None, "")])
def test_progress_line_tells_how_much_of_the_devices_is_used(peak, operations, told):
    assert loop.StepFlops(lambda state, batch: None, peak).format_throughput(operations, seconds=2.0) == told


def test_finished_run_has_nothing_left_to_do(finished, capsys):
    again = run.train(small.run_config(finished.folder, log_every=3))
    assert again.step == finished.step
    said = " ".join(capsys.readouterr().err.split())
    assert "Resuming at step 4 of 4. Changed since it began: log_every 1 -> 3." in said
    assert len(metrics(finished.folder)) == 4


def test_finished_run_cannot_be_made_shorter(finished):
    before = (finished.folder / "run.json").read_text()
    with pytest.raises(ValueError, match="is at step 4, beyond .* = 3"):
        run.train(small.run_config(finished.folder, steps=3))
    assert (finished.folder / "run.json").read_text() == before


def test_run_is_loaded_and_exported(finished, tmp_path):
    base, trained = (mmjax.load(folder, dtype="float32") for folder in (small.checkpoint(), finished.folder))
    assert trained.text.prompt_template == "###Human: {} ###Assistant: "
    before, after = trees.flatten(base.params), trees.flatten(trained.params)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {"projector/b", "projector/w"}

    mmjax.export(finished.folder, "projector", tmp_path / "projector.pth")
    exported = torch_file.load(tmp_path / "projector.pth")["model"]
    np.testing.assert_array_equal(exported["llama_proj.weight"].read(), after["projector/w"].T)
    np.testing.assert_array_equal(exported["llama_proj.bias"].read(), after["projector/b"])


def test_second_stage_starts_from_the_first(finished, tmp_path):
    config = small.run_config(tmp_path / "run", steps=1)
    config = dataclasses.replace(
        config, weights=dataclasses.replace(config.weights, start_from=str(finished.folder)),
        optim=dataclasses.replace(config.optim, init_lr=0.0, warmup_lr=0.0, min_lr=0.0))
    second = run.train(config)
    first, then = (training_checkpoints.trained(r.folder / "checkpoints") for r in (finished, second))
    for path in first:
        np.testing.assert_array_equal(first[path], then[path])


def test_unfrozen_qformer_is_trained(tmp_path):
    rules = ("projector/.*", "qformer/.*")
    done = run.train(small.run_config(tmp_path / "run", steps=1, trained=rules))
    trained = training_checkpoints.trained(done.folder / "checkpoints")
    before = trees.flatten(mmjax.load(small.checkpoint(), dtype="float32").params)
    assert {path.split("/")[0] for path in trained} == {"projector", "qformer"}
    still = {path for path in trained if np.array_equal(trained[path], before[path])}
    # a constant added to all scores of a query changes nothing: the key biases of attention get no gradient
    assert all("/k/b" in path for path in still), still


def test_update_that_is_not_finite_stops_the_run(tmp_path):
    config = small.run_config(tmp_path / "run")
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, init_lr=math.inf, warmup_steps=0))
    with pytest.raises(run.TrainingStopped, match=r"batch 0 is not finite.*samples: \d, \d\. No checkpoint"):
        run.train(config)


def test_batch_without_targets_stops_the_run(tmp_path):
    config = small.run_config(tmp_path / "run", text=TextConfig(max_txt_len=0))
    with pytest.raises(run.TrainingStopped, match=r"Batch 0 has no token to learn.*max_txt_len = 0"):
        run.train(config)


def test_first_loss_of_a_dead_language_model():
    dead = {"llm": {"embedding": jnp.zeros((600, 4)), "norm": {"scale": jnp.ones(4)}}}
    with pytest.raises(run.TrainingStopped, match=r"ln\(600\).*all zero: frozen/llm/embedding"):
        run.check_first_loss(math.log(600) + 1e-3, 600, {"frozen": dead})
    run.check_first_loss(5.0, 600, {"frozen": dead})


@pytest.mark.parametrize(("changes", "message"), [
    ({"out": ""}, "out: name the folder of the run"),
    ({"log_every": 0}, "log_every"),
    ({"mesh": MeshConfig(data=3)}, "does not fill"),
    ({"trained": ("projektor/.*",)}, "projektor"),
    ({"trained": ("(projector/.*",)}, r"trained: '\(projector/\.\*' is not a regular expression"),
    ({"image_size": 55}, "image_size = 55: must be a multiple of 14"),
    ({"keep": 0}, "keep: at least 1"),
    ({"drop_path": 2.0}, "drop_path = 2.0"),
    ({"data": DataConfig(path="nowhere", length_multiple=0)}, r"data\.length_multiple = 0"),
    ({"data": DataConfig(path="nowhere", max_bad_share=1.0)}, r"data\.max_bad_share = 1\.0: at least 0, below 1"),
    ({"data": DataConfig(path="nowhere", mixture=(Source("jsonl", "x"),))}, r"root, or data\.mixture: name one"),
    ({"data": DataConfig(mixture=(Source("jsonl", "x", 0.0), Source("odd", "")))},
     r"(?s)data\.format = 'odd'.*format 'odd' has no path.*ratio = 0\.0 of x: above 0"),
    ({"data": DataConfig(path="nowhere", batch_size=2)}, "nowhere is not in the CC-SBU-align layout"),
])
def test_configuration_that_cannot_run(tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run.train(dataclasses.replace(small.run_config(tmp_path / "run"), **changes))
