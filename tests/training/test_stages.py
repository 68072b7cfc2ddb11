"""The shipped configurations of every stage, on small sets that lie as the real ones do.

Of a configuration only the checkpoint (a tiny one), the places of files, the batch and the number of steps change.
"""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np

import mmjax
from mmjax.checkpoints import training as training_checkpoints
from mmjax.config import RunConfig, load
from mmjax.convert import torch_file
from tests.convert import released
from tests.data import layouts

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = 3


def shortened(name: str, folder: Path, sources: dict[str, Path], start_from: str | None = None) -> RunConfig:
    """The configuration, with everything it names below `folder`, and only the first two tars of each source."""
    config = load(str(CONFIGS / f"{name}.py"))

    def inside(path: str) -> str:
        return path and str(folder / re.sub(r"\{00000\.\.\d+\}", "{00000..00001}", path))

    mixture = tuple(dataclasses.replace(source, path=inside(source.path)) for source in config.data.mixture)
    weights = dataclasses.replace(
        config.weights, checkpoint=inside(config.weights.checkpoint), start_from=start_from and inside(start_from),
        sources={key: str(path) for key, path in sources.items()})
    return dataclasses.replace(
        config, out=inside(config.out), weights=weights,
        data=dataclasses.replace(config.data, path=inside(config.data.path), mixture=mixture, batch_size=2),
        optim=dataclasses.replace(config.optim, epochs=1, steps_per_epoch=STEPS, warmup_steps=1), log_every=1)


def trained(config: RunConfig) -> dict[str, np.ndarray]:
    """What a run of this configuration has learnt; its losses were finite and no record of its data was replaced."""
    done = mmjax.train(config)
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert all(math.isfinite(line["loss"]) and line["loss"] > 0 for line in lines)
    assert not (done.folder / "data_errors.jsonl").read_text()
    return training_checkpoints.trained(done.folder / "checkpoints")


def test_minigpt4_stage_2_stands_on_stage_1(tmp_path):
    """Stage 1 on LAION's and CC-SBU's tars with captions alone, stage 2 on CC-SBU-align with its prompts."""
    for number in range(2):
        layouts.tar(tmp_path / "data" / "laion" / f"{number:05d}.tar", layouts.members())
        layouts.tar(tmp_path / "data" / "cc_sbu" / f"{number:05d}.tar", layouts.members())
    layouts.cc_sbu_align(tmp_path / "data" / "cc_sbu_align")
    sources = {key: path for key, path in released.MINIGPT4.items() if key != "projector"}

    first = trained(shortened("minigpt4_stage1", tmp_path, sources))
    second = trained(dataclasses.replace(
        shortened("minigpt4_stage2", tmp_path, sources, start_from="runs/minigpt4_stage1"), seed=7))
    assert first.keys() == second.keys() == {"projector/w", "projector/b"}
    # a projector that starts anew, from another seed, differs everywhere; three steps move it by their learning rates
    assert np.std(first["projector/w"]) > 0.01
    assert 0 < np.abs(first["projector/w"] - second["projector/w"]).max() < 1e-3


def test_imagebind_llm_is_finetuned_on_what_it_was_pretrained_to(tmp_path):
    """Pretraining on tab-separated captions, fine-tuning on Alpaca's and LLaVA's rows together."""
    data = tmp_path / "data"
    layouts.imagebind_llm_pretrain(data, lambda rows: [row.update(caption="A dog.") for row in rows])
    talks = [{"id": str(number), "image": f"{number}.jpg", "conversations": [
        {"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": caption},
        {"from": "human", "value": "And?"}, {"from": "gpt", "value": "No more."}]}
        for number, caption in enumerate(layouts.CAPTIONS)]
    told = [{"instruction": "Name a dog.", "input": "", "output": "Rex"},
            {"instruction": "Sort.", "input": "b, a", "output": "a, b"}]
    layouts.put_json(data / "llava_instruct_150k.json", talks)
    layouts.put_json(data / "alpaca_gpt4_data.json", told)
    layouts.put(data / "finetune.yaml", "META:\n  - alpaca_gpt4_data.json\n  - llava_instruct_150k.json\n")

    towers = released.tensors(released.IMAGEBIND / "imagebind.pth")  # all but the images' only take time
    torch_file.save(tmp_path / "vision.pth", {key: value for key, value in towers.items() if ".vision." in key})
    sources = released.IMAGEBIND_LLM | {"imagebind": tmp_path / "vision.pth"}

    first = trained(shortened("imagebind_llm_pretrain", tmp_path, sources))
    second = trained(shortened("imagebind_llm_finetune", tmp_path, sources, start_from="runs/imagebind_llm_pretrain"))
    assert {"query", "llm/layers/attn/gate"} < first.keys() and {"llm/norm/scale"} < second.keys()
    assert not first.keys() & second.keys()


def test_minigpt_v2(tmp_path):
    layouts.cc_sbu_align(tmp_path / "data" / "captions")
    learnt = trained(shortened("minigpt_v2", tmp_path, released.V2))
    assert {path.split("/")[0] for path in learnt} == {"projector", "llm"}


def test_llama_adapter(tmp_path):
    rows = [{"instruction": f"Name dog {number}.", "input": "", "output": "Rex"} for number in range(3)]
    layouts.put_json(tmp_path / "data" / "alpaca_data.json", rows)
    layouts.put(tmp_path / "data" / "alpaca.yaml", "META: [alpaca_data.json]\n")
    sources = {key: path for key, path in released.ADAPTER_V1.items() if key != "adapter"}
    assert "query" in trained(shortened("llama_adapter", tmp_path, sources))
