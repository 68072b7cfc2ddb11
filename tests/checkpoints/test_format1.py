"""Checkpoints and runs of format 1, in which the language model was named `llama`; `tests/data_format1` holds some."""

import functools
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import mmjax
from mmjax import trees
from mmjax.checkpoints import converted, format1
from mmjax.checkpoints import training as training_checkpoints
from mmjax.config import DataConfig, OptimConfig, RunConfig, TextConfig, WeightsConfig
from mmjax.convert import torch_file
from mmjax.convert.export import export
from mmjax.training import run

FOLDER = Path(__file__).parents[1] / "data_format1"
CHECKPOINT, RUN = FOLDER / "checkpoint", FOLDER / "run"
PARTS = {"vit": "vit.pth", "qformer": "qformer.pth", "projector": "trained.pth",
         "llm/pytorch_model-00001-of-00001.bin": "llama/pytorch_model.bin"}  # what is written, and what it was made of
CONFIG = RunConfig(
    out="run", trained=("projector/.*", "qformer/.*", "llm/.*/lora_[ab]"),
    weights=WeightsConfig(checkpoint="checkpoint", dtype="float32"),
    data=DataConfig(path="pictures", prompts=("<Img><ImageHere></Img> What is it?",), batch_size=2, length_multiple=64),
    text=TextConfig(prompt_template="###Human: {} ###Assistant: ", end_sym="###", max_txt_len=32),
    optim=OptimConfig(init_lr=1e-2, warmup_steps=1, epochs=2, steps_per_epoch=3, accumulate=2),
    log_every=1, save_every=2, keep=1, check_first_loss=False)


@functools.cache
def expected():
    return json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """All of it where it may be written to, and where the run's relative paths hold."""
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def digests(path):
    """SHA-256 of the tensors in a .pth."""
    held = torch_file.load(path)
    return {key: hashlib.sha256(tensor.read().tobytes()).hexdigest() for key, tensor in held.get("model", held).items()}


# ---- names ----


@pytest.mark.parametrize(("old", "new"), [
    ("llama/norm/scale", "llm/norm/scale"),
    ("replaced/llama/layers/mlp_norm/scale", "replaced/llm/layers/mlp_norm/scale"),
    ("params/llama/layers/attn/q/lora_a", "params/llm/layers/attn/q/lora_a"),
    ("opt_state/0/mu/llama/gate", "opt_state/0/mu/llm/gate"),
    ("projector/w", "projector/w"), ("vit/llama_like/w", "vit/llama_like/w"), ("llm/norm/scale", "llm/norm/scale")])
def test_paths(old, new):
    assert format1.rename(old) == new


@pytest.mark.parametrize(("old", "new"), [  # the rules that families and configs had, and some that users may have
    (r"query|llama/(layers/)?(attn/)?gate", r"query|llm/(layers/)?(attn/)?gate"),
    (r"llama/(layers/(attn|mlp)_)?norm/scale", r"llm/(layers/(attn|mlp)_)?norm/scale"),
    (r"llama/layers/.*/(b|lora_[ab])", r"llm/layers/.*/(b|lora_[ab])"),
    (r"visual/.*|query|llama/layers/attn/(new_)?gate", r"visual/.*|query|llm/layers/attn/(new_)?gate"),
    (r"(projector|llama)/.*", r"(projector|llm)/.*"), (r"(?:llama|vit)/.*", r"(?:llm|vit)/.*"), ("llama.*", "llm.*"),
    (r"bind/.*", r"bind/.*"), (r".*/llama/w", r".*/llama/w"), ("my_llama/.*", "my_llama/.*")])
def test_rules(old, new):
    assert format1.rule(old) == new


def test_what_a_card_lacks_stays_absent():
    """So that reading it can say what it lacks."""
    assert format1.checkpoint_card({"format": 1}) == format1.run_card({"format": 1}) == {"format": 1}
    damaged = {"architecture": None, "sources": 3, "fresh": "llama", "config": [], "trained": None}
    assert format1.checkpoint_card(damaged) == format1.run_card(damaged) == damaged


# ---- what is kept ----


def test_what_is_kept_has_the_old_names():
    for folder, name in ((CHECKPOINT, "config.json"), (RUN, "run.json")):
        card = json.loads((folder / name).read_text())
        assert card["format"] == format1.FORMAT < converted.FORMAT
        assert "llama" in card["architecture"] and "llm" not in card["architecture"]
    assert "llama/.*/lora_[ab]" in card["trained"] and "llama/.*/lora_[ab]" in card["config"]["trained"]
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 700_000


# ---- the checkpoint ----


def test_a_checkpoint_is_read_with_todays_names():
    source = converted.ConvertedCheckpoint.open(CHECKPOINT)
    assert str(source.family) == "minigpt4" and source.config.llm.lora_rank == 2
    card = converted.read_checkpoint_card(CHECKPOINT)
    assert card["format"] == converted.FORMAT and {"llm", "vit", "qformer"} <= card["sources"].keys()
    model = mmjax.load(CHECKPOINT, dtype="float32")
    assert {path.split("/")[0] for path in trees.flatten(model.params)} == {
        "vit", "ln_vision", "qformer", "projector", "llm"}
    quantised = mmjax.load(CHECKPOINT, dtype="float32", frozen_dtype="int8")
    assert np.asarray(quantised.params["llm"]["layers"]["mlp"]["up"]["w"].values).dtype == np.int8


@pytest.mark.parametrize("part", PARTS)
def test_a_checkpoint_is_exported_bit_equal(tmp_path, part):
    name, file = part.split("/")[0], PARTS[part]
    export(CHECKPOINT, name, tmp_path / name)
    released = {key.removeprefix(f"{file}:"): digest for key, digest in expected()["tensors"].items()
                if key.startswith(f"{file}:")}
    assert digests(tmp_path / part) == released


# ---- the run ----


def test_a_run_is_read_with_todays_names():
    model = mmjax.load(RUN, dtype="float32")
    before = mmjax.load(CHECKPOINT, dtype="float32")
    changed = {path for path, leaf in trees.flatten(model.params).items()
               if np.any(np.asarray(leaf) != np.asarray(trees.flatten(before.params)[path]))}
    trained = converted.trained_params(RUN)
    assert changed == set(trained) == {path for path in trees.flatten(model.params)
                                       if trees.matches(path, CONFIG.trained)}
    assert "llm/layers/attn/q/lora_a" in changed
    config = converted.read_run_card(RUN)["config"]
    assert config["trained"] == list(CONFIG.trained)
    assert config["data"]["pack_images"] == 4 and "pack_pictures" not in config["data"]


def test_a_run_is_exported(tmp_path):
    export(RUN, "projector", tmp_path / "out.pth")
    found, trained = torch_file.load(tmp_path / "out.pth")["model"], converted.trained_params(RUN)
    np.testing.assert_array_equal(found["llama_proj.weight"].read(), np.asarray(trained["projector/w"]).T)
    assert any(key.endswith("q_proj.lora_A.weight") for key in found)


def test_a_run_goes_on_and_ends_as_it_would_have(copied):
    """Dropout of LoRA and of the Q-Former, the summed gradients and Adam's moments are the old run's.

    The last bits are not: GELU and rotary positions have been computed otherwise since (docs/decisions/0019), and other
    vector instructions or another jaxlib add in another order.
    """
    done = run.train(CONFIG)
    assert done.step == CONFIG.optim.steps
    lines = [json.loads(line) for line in (copied / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    state = training_checkpoints.arrays(copied / "run" / "checkpoints" / "6")
    with np.load(FOLDER / "expected.npz") as arrays:
        wanted = {format1.rename(path): array for path, array in arrays.items()}
    assert state.keys() == wanted.keys()
    np.testing.assert_allclose(losses, expected()["losses"], rtol=0, atol=1e-5)
    for path, array in wanted.items():
        found = np.asarray(state[path])
        assert found.dtype == array.dtype and found.shape == array.shape, path
        if not path.endswith("/k/b"):  # a softmax does not see it: its gradient is what rounding leaves
            np.testing.assert_allclose(found, array, rtol=0, atol=1e-4, err_msg=path)
    card = json.loads((copied / "run" / "run.json").read_text())
    assert card["format"] == converted.FORMAT and "llm" in card["architecture"]
    assert [path.name for path in (copied / "run" / "checkpoints").iterdir()] == ["6"]
