"""A family declared outside `mmjax/` goes through every command, and no file of the package names it."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

import mmjax
from mmjax.config import DataConfig, OptimConfig, RunConfig, WeightsConfig
from mmjax.convert import torch_file
from mmjax.cost import plan
from mmjax.families import register
from mmjax.inference import chat
from mmjax.parity import NO_TARGET
from mmjax.parity import stages as stages_of
from mmjax.training import run
from tests import small
from tests.outside import patchwork
from tests.outside.commands import call, check_data_and_features, check_killed_run, encoder_file, forget, saved

ROOT = Path(__file__).parents[2]
QUESTION = "<ImageHere> What is it?"
KNOWN_GOOD = ("parameters", "run", "outputs", "base weights")  # findings of the doctor


forget(patchwork.FAMILY)  # importing it has registered it, and the other tests know nothing of it


@pytest.fixture(scope="module", autouse=True)
def registered():
    yield register(patchwork.FAMILY)
    forget(patchwork.FAMILY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("patchwork")


@pytest.fixture(scope="module")
def checkpoint(folder):
    call("convert", "patchwork", "--patches", encoder_file(folder / "patches.pth"), "--llm",
         small.GOLDEN / "ckpt" / "llama_hf", "--out", folder / "checkpoint")
    return folder / "checkpoint"


def config(checkpoint, out, **data) -> RunConfig:
    return RunConfig(
        out=str(out), weights=WeightsConfig(str(checkpoint), dtype="float32"),
        data=DataConfig(path=str(small.images()), prompts=(QUESTION,), batch_size=2, pack_length=96, pack_images=2,
                        **data),
        text=patchwork.TEXT, optim=OptimConfig(init_lr=1e-2, warmup_steps=1, epochs=1, steps_per_epoch=4), log_every=1,
        save_every=2)


@pytest.fixture(scope="module")
def trained(checkpoint, folder):
    """The folder of a finished run."""
    run.train(config(checkpoint, folder / "run"))
    return folder / "run"


def test_a_killed_run_ends_as_the_one_that_was_left_alone(checkpoint, trained, folder):
    check_killed_run(config, checkpoint, trained, folder)


def test_data_are_checked_and_features_train_as_the_encoder_does(checkpoint, trained, folder):
    check_data_and_features(config, checkpoint, trained, folder)


def test_it_generates_chats_and_is_evaluated(trained, folder, capsys):
    image = small.images() / "image" / "0.jpg"
    call("generate", "--checkpoint", trained, "--image", image, "--prompt", "What is it?", "--max-new-tokens", 4)
    words = capsys.readouterr().out.strip()
    model = mmjax.load(trained, dtype="float32")
    assert words and words == model.generate([mmjax.Sample(images=[image], prompt=QUESTION)], max_new_tokens=4)[0]
    talk = chat.Conversation(chat.template_of(model))
    chat.add_input(model, talk, "image", chat.read_input(model, "image", image))
    talk.ask("What is it?")
    assert isinstance("".join(chat.reply(model, talk, chat.ChatSettings(max_new_tokens=4))), str)
    lines = folder / "questions.jsonl"
    item = {"image": str(image), "prompt": "What?", "choices": ["red", "blue"], "answer": 0}
    lines.write_text(json.dumps(item) + "\n")
    call("evaluate", "--benchmark", "jsonl_choices", "--data", lines, "--root", "/", "--checkpoint", trained, "--out",
         folder / "scores", "--dtype", "float32")
    assert json.loads((folder / "scores" / "scores.json").read_text())


def test_parts_are_written_as_they_were_read(checkpoint, trained, folder):
    call("export", "--checkpoint", checkpoint, "--part", "patches", "--out", folder / "again.pth")
    before, after = (torch_file.load(folder / name) for name in ("patches.pth", "again.pth"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key].read(), tensor.read())
    call("export", "--checkpoint", trained, "--part", "projector", "--out", folder / "projector.pth")
    held = saved(trained)
    np.testing.assert_array_equal(torch_file.load(folder / "projector.pth")["2.weight"].read(),
                                  held["params/fc2/w"].T)


def test_it_is_planned_as_it_is_fed(checkpoint, folder):
    made = plan.plan(config(checkpoint, folder / "unused"), "local")
    assert made.family == "patchwork" and made.memory.total > 0


def test_the_doctor_and_parity_know_it(trained, folder, capsys):
    with contextlib.suppress(SystemExit):  # what it says of random weights
        call("doctor", trained, "--json", folder / "doctor.json")
    found = json.loads((folder / "doctor.json").read_text())["findings"]
    assert {f["name"]: f["verdict"] for f in found if f["name"] in KNOWN_GOOD} == dict.fromkeys(KNOWN_GOOD, "ok")
    model = mmjax.load(trained, dtype="float32")
    sample = mmjax.Sample(images=[small.images() / "image" / "0.jpg"], prompt=QUESTION, answer="A dog.")
    batch = model.batch([sample])
    found = stages_of(model.module, model.family, model.params, batch, has_targets=True)
    tokens = np.where(batch.soft_index >= 0, -1, batch.tokens)
    inputs = {"tokens": tokens, "valid": batch.valid, "images": model.config.images.normalise(batch.images),
              "targets": np.where(batch.loss_mask, tokens, NO_TARGET)}
    np.savez(folder / "reference.npz", **inputs, **{name: np.asarray(x) for name, x in found.items()})
    call("parity", trained, "--reference", folder / "reference.npz")
    assert "All" in capsys.readouterr().out


def test_no_file_of_the_package_names_it():
    files = (ROOT / "mmjax").rglob("*.py")
    assert not [path for path in files if "patchwork" in path.read_text(encoding="utf-8").lower()]
    assert len(Path(patchwork.__file__).read_text(encoding="utf-8").splitlines()) <= 150
