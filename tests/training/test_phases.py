"""ImageBind-LLM's two phases as runs: what each trains, how the second stands on the first, and what is left."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest

import mmjax
from mmjax import trees
from mmjax.checkpoints import training as training_checkpoints
from mmjax.config import DataConfig, OptimConfig, RunConfig, TextConfig, WeightsConfig
from mmjax.convert import torch_file, write
from mmjax.data import scenes
from mmjax.families import imagebind_llm
from mmjax.training import run
from tests import small

GOLDEN = small.GOLDEN.parent / "imagebind_llm"


@functools.cache
def base(folder):
    out = folder / "base"
    write.command("imagebind_llm")(GOLDEN / "imagebind.pth", GOLDEN / "llama_meta", out, arch=GOLDEN / "config.json")
    return out


def config(folder, phase, **changes) -> RunConfig:
    data = {"pretrain": DataConfig(path=str(folder / "captions"), prompts=("Describe.",), batch_size=2),
            "finetune": DataConfig(format="imagebind_llm_finetune", path=str(folder / "asked"), batch_size=2)}[phase]
    start = str(folder / "pretrain") if phase == "finetune" else None
    defaults = dict(
        out=str(folder / phase), phase=phase, data=data,
        weights=WeightsConfig(checkpoint=str(base(folder)), dtype="float32", start_from=start),
        text=TextConfig(joint=True, end_sym="</s>", max_txt_len=64),
        optim=OptimConfig(schedule="half_cycle", init_lr=1e-2, min_lr=0.0, warmup_steps=1, epochs=1, steps_per_epoch=3,
                          beta2=0.95, average=True),
        log_every=1, save_every=2)
    return RunConfig(**(defaults | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both phases, trained."""
    folder = tmp_path_factory.mktemp("phases")
    shown = scenes.scenes("train", 4, most=1)
    scenes.write(folder / "captions", shown)
    scenes.write_finetune(folder / "asked", shown)
    run.train_phases({phase: config(folder, phase) for phase in ("pretrain", "finetune")})
    return folder


def test_each_phase_trains_its_own(folder):
    wanted = {"pretrain": {"bind", "query", "llm/layers/attn/gate"}, "finetune": {"llm"}}
    for phase, tops in wanted.items():
        trained = training_checkpoints.trained(folder / phase / "checkpoints")
        assert all(trees.matches(path, imagebind_llm.PHASES[phase]) for path in trained)
        assert {path if path in tops else path.split("/")[0] for path in trained} == tops
        assert json.loads((folder / phase / "run.json").read_text())["trained"] == list(imagebind_llm.PHASES[phase])


def test_second_phase_stands_on_the_first(folder):
    """What the first trained is in the loaded model, bit for bit, and the adapter's LoRA beside it."""
    model = mmjax.load(folder / "finetune", dtype="float32")
    held = trees.flatten(model.params)
    first, second = (training_checkpoints.trained(folder / phase / "checkpoints") for phase in ("pretrain", "finetune"))
    for path, leaf in {**first, **second}.items():
        np.testing.assert_array_equal(held[path], leaf)
    assert np.abs(held["llm/layers/attn/gate"]).max() > 0
    assert np.abs(held["llm/layers/mlp/down/lora_b"]).max() > 0


def test_gates_are_in_the_metrics_of_the_phase_that_trains_them(folder):
    def lines(phase):
        return [json.loads(line) for line in (folder / phase / "metrics.jsonl").read_text().splitlines()]

    gates = [line["gates"] for line in lines("pretrain")]
    depth = mmjax.load(folder / "pretrain", dtype="float32").config.llm.depth
    assert [len(layers) for layers in gates] == [depth] * 3
    assert gates[0] == [0.0] * depth  # the first step has the learning rate 0
    assert min(gates[-1]) > 0
    assert all("gates" not in line for line in lines("finetune"))


def test_finetuned_run_is_exported_as_an_adapter(folder, tmp_path):
    mmjax.export(folder / "finetune", "adapter", tmp_path / "adapter.pth")
    written = torch_file.load(tmp_path / "adapter.pth")["model"]
    keys = torch_file.load(GOLDEN / "adapter.pth")["model"].keys()
    assert written.keys() == keys
    out = tmp_path / "again"
    write.command("imagebind_llm")(
        GOLDEN / "imagebind.pth",
        GOLDEN / "llama_meta",
        out,
        adapter=tmp_path / "adapter.pth",
        arch=GOLDEN / "config.json",
    )
    before, after = (trees.flatten(mmjax.load(path, dtype="float32").params) for path in (folder / "finetune", out))
    assert before.keys() == after.keys()
    for path in before:
        np.testing.assert_array_equal(before[path], after[path])


def test_words_of_a_image_and_a_sound(folder):
    model = mmjax.load(folder / "finetune", dtype="float32")
    random = np.random.default_rng(0)
    image = scenes.draw(scenes.scenes("held_out", 1, most=1)[0])
    heard = random.normal(size=(3, 1, 32, 60)).astype(np.float32)
    samples = [mmjax.Sample(images=[image], prompt="Describe."),
               mmjax.Sample(images=[image], media={"audio": heard}, weights={"audio": 0.5}, prompt="Describe."),
               mmjax.Sample(media={"audio": heard}, prompt="Describe.")]
    together = model.generate(samples, max_new_tokens=4)
    assert together == [model.generate([sample], max_new_tokens=4)[0] for sample in samples]


def test_run_before_is_gone(folder, tmp_path):
    shutil.copytree(folder / "finetune", tmp_path / "finetune")
    card = json.loads((tmp_path / "finetune" / "run.json").read_text())
    card["checkpoint"] = str(base(folder))
    (tmp_path / "finetune" / "run.json").write_text(json.dumps(card))
    with pytest.raises(FileNotFoundError, match=r"started from the run .*pretrain, which is not there.*start_from"):
        mmjax.load(tmp_path / "finetune")


@pytest.mark.parametrize(("changes", "message"), [
    ({"phase": "stage2"}, "phase = 'stage2': the family imagebind_llm has pretrain, finetune"),
    ({"optim": OptimConfig(schedule="steps")}, "optim.schedule = 'steps': one of whole_cosine, half_cycle"),
    ({"data": DataConfig(format="laion", path="x")}, "data.format = 'laion': one of cc_sbu_align"),
    ({"weights": WeightsConfig(checkpoint="x", family="t5")}, "weights.family = 't5': one of .*minigpt4"),
    ({"weights": WeightsConfig(checkpoint="x", sources={"vit": "y"})},
     "weights.family = '': one of .*minigpt4.*, the family of weights.sources"),
    ({"weights": WeightsConfig(checkpoint="x", family="llama", sources={"vit": "y"})},
     "weights.sources has vit; a conversion of llama takes delta, llm"),
])
def test_configuration_that_cannot_run(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run.train(dataclasses.replace(config(folder, "pretrain", out=str(tmp_path / "run")), **changes))
