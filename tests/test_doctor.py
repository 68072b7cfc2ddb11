"""`mmjax doctor`: a healthy checkpoint passes, and each kind of damage is called by its name."""

import dataclasses
import functools
import json
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from mmjax import cli, doctor
from mmjax.checkpoints import frozen as frozen_weights
from mmjax.config import WeightsConfig
from mmjax.convert import torch_file, write
from mmjax.data import scenes as world
from mmjax.doctor import outputs
from mmjax.doctor.inspection import Moments, inspect_folder, statistics
from mmjax.training import run
from tests import small
from tests.convert import released
from tests.parity import imagebind_golden

SHIPPED = files("mmjax") / "assets" / "scenes"


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="mmjax-doctor-")


@functools.cache
def scenes() -> Path:
    """MiniGPT-4 on the shipped towers, which were trained; its projector was not."""
    out = Path(_folder().name) / "scenes"
    write.command("minigpt4")(SHIPPED / "eva_vit.pth", SHIPPED / "llama", out, qformer=SHIPPED / "blip2_pretrained.pth",
                              arch=SHIPPED / "arch.json")
    return out


@functools.cache
def minigpt_v2() -> Path:
    """The reference set's, with LoRA and without Q-Former."""
    ckpt, out = small.GOLDEN / "ckpt", Path(_folder().name) / "v2"
    write.command("minigpt4")(ckpt / "eva_vit.pth", ckpt / "llama_hf", out, projector=ckpt / "minigpt_v2.pth",
                              lora=ckpt / "minigpt_v2.pth", arch=small.GOLDEN / "model_sizes.json")
    return out


@functools.cache
def imagebind_llm() -> Path:
    """The reference set's, fine-tuned, without the towers that do as these three do and only take time."""
    golden, out = imagebind_golden.folder(), Path(_folder().name) / "imagebind"
    towers, kept = Path(_folder().name) / "imagebind.pth", ("vision", "text", "audio")
    torch_file.save(towers, {key: value for key, value in released.tensors(golden / "imagebind.pth").items()
                             if key.split(".")[1] in kept})
    write.command("imagebind_llm")(towers, golden / "llama_meta", out, adapter=golden / "adapter.pth",
                                   arch=golden / "config.json")
    return out


class Whole:
    """An array as a parameter to be saved."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.rows = array, array.shape, array.dtype, len(array)

    def slices(self):
        yield self.array


def damaged(source: Path, out: Path, **changes) -> Path:
    """A copy of a checkpoint with parameters replaced: `path__with__underscores=function(array)`."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("weights"))
    held = {path: array.read().result() for path, array in frozen_weights.arrays(source / "weights").items()}
    for name, change in changes.items():
        path = name.replace("__", "/")
        held[path] = change(held[path].copy())
    frozen_weights.save(out / "weights", {path: Whole(np.asarray(array)) for path, array in held.items()})
    return out


def wrong(findings, verdict="wrong"):
    """{name of the check: its words, joined}"""
    told: dict[str, str] = {}
    for finding in findings:
        if finding.verdict == verdict:
            told[finding.name] = told.get(finding.name, "") + finding.words
    return told


def random_like(x):
    return np.random.default_rng(0).normal(0, x.std(), x.shape).astype(x.dtype)


def with_(index, value):
    def change(x):
        x[index] = value
        return x
    return change


# ---- healthy ----


def test_healthy_one_passes():
    """Its language model knows only its own small world, and no English sentence can judge it."""
    found = doctor.examine(scenes())
    assert wrong(found) == {}
    assert set(wrong(found, "warning")) == {"never trained", "plain text"}
    assert "projector/w, projector/b" in wrong(found, "warning")["never trained"]
    assert "is not for English" in wrong(found, "warning")["plain text"]
    names = {finding.name for finding in found}
    assert names >= {"parameters", "finite", "empty", "layers", "delta", "word vectors", "tokenizer", "special ids",
                     "round trip", "beginning", "outputs", "images"}
    assert json.loads(doctor.to_json(scenes(), found))["verdict"] == "warning"


def test_its_own_sentences_are_known():
    captions = [world.caption(scene) for scene in world.scenes("held_out", 6)]
    text = next(finding for finding in doctor.examine(scenes(), texts=captions) if finding.name == "plain text")
    assert text.verdict == "ok", text.figures
    assert text.figures["loss"] < text.figures["uniform"] - 2 < text.figures["shuffled"]


@pytest.mark.slow  # the same of random weights, for another family, in the test below
def test_random_weights_are_as_good_as_uniform():
    """The reference set's weights are random: its losses are those of nobody who knows anything."""
    found = wrong(doctor.examine(small.checkpoint()))
    assert "As good as uniform" in found["plain text"] and "llm/embedding" in found["plain text"]
    assert set(found) == {"plain text", "word vectors"}


def test_other_families_are_tried():
    found = doctor.examine(imagebind_llm())
    assert set(wrong(found)) == {"plain text", "word vectors"}  # random weights, but nothing else
    assert "As good as uniform" in wrong(found)["plain text"] and "llm/embedding" in wrong(found)["plain text"]
    ok = wrong(found, "ok")
    assert "open in every layer" in ok["gates"] and "add something" in ok["LoRA"]
    assert "stages of seeing are finite" in ok["outputs"] and "moves the logits" in ok["images"]


# ---- damaged weights ----


DAMAGES = [  # name of the check, what is said, how
    ("finite", "attn/q/w has 1 numbers that are not finite, in layer 1. It came from --llm: pytorch_model.bin",
     {"llm__layers__attn__q__w": with_((1, 0, 0, 0), np.nan)}),
    ("finite", "vit/pos has 2 numbers that are not finite. It came from --vit: eva_vit.pth",
     {"vit__pos": with_((slice(2), 0), np.inf)}),
    ("empty", "llm/embedding has only zeros. It came from --llm", {"llm__embedding": np.zeros_like}),
    ("empty", "llm/layers/mlp/up/w has only zeros in layer 2", {"llm__layers__mlp__up__w": with_(2, 0)}),
    ("empty", "vit/pos has only zeros. It came from --vit: eva_vit.pth", {"vit__pos": np.zeros_like}),
    ("word vectors", "llm/head/w looks like fresh random numbers", {"llm__head__w": random_like}),
    ("word vectors", "llm/embedding: 256 of 512 tokens are zeros", {"llm__embedding": with_(slice(256, None), 0)}),
    ("layers", "Layers 0 and 2 of llm are bit for bit the same in 1 of 7 matrices (llm/layers/attn/v/w)",
     {"llm__layers__attn__v__w": lambda x: x[[0, 1, 0]]}),
    ("layers", "of qformer are bit for bit the same",
     {"qformer__layer_1__mlp__fc1__w": None}),
    ("delta", "is a delta, not a model", {
        name: lambda x: np.random.default_rng(1).normal(0, 1e-3, x.shape).astype(x.dtype) for name in
        ("llm__norm__scale", "llm__layers__attn_norm__scale", "llm__layers__mlp_norm__scale")}),
]


@pytest.mark.parametrize(("name", "words", "changes"), DAMAGES, ids=[f"{i}-{d[0]}" for i, d in enumerate(DAMAGES)])
def test_damage_is_named(name, words, changes, tmp_path):
    if changes == {"qformer__layer_1__mlp__fc1__w": None}:
        other = frozen_weights.arrays(scenes() / "weights")["qformer/layer_0/mlp/fc1/w"].read().result()
        changes = {"qformer__layer_1__mlp__fc1__w": lambda x: other}
    found = wrong(doctor.examine(damaged(scenes(), tmp_path / "damaged", **changes), quick=True))
    assert words in found[name]
    assert set(found) == {name}, "and nothing else is called wrong"


def test_another_order_of_magnitude_is_a_warning(tmp_path):
    out = damaged(scenes(), tmp_path / "damaged", llm__layers__mlp__down__w=lambda x: x * np.array(
        [1, 1, 100], x.dtype)[:, None, None])
    assert "llm/layers/mlp/down/w of layer 2 is" in wrong(doctor.examine(out, quick=True), "warning")["layers"]


@pytest.mark.parametrize(("changes", "words"), [
    ({"llm__embedding": np.zeros_like}, "Look at llm/embedding first"),
    ({"llm__head__w": random_like}, "Look at llm/head/w first"),
    ({name: lambda x: x * 1e-3 for name in ("llm__norm__scale", "llm__layers__attn_norm__scale",
                                            "llm__layers__mlp_norm__scale")}, "Look at llm/layers/attn_norm/scale"),
])
def test_losses_point_at_the_parameter(changes, words, tmp_path):
    found = wrong(doctor.examine(damaged(scenes(), tmp_path / "damaged", **changes)))
    assert "As good as uniform" in found["plain text"] and words in found["plain text"]


def test_first_stage_that_is_not_finite_is_named(tmp_path):
    """What overflows only while it computes, no stored number shows."""
    out = damaged(scenes(), tmp_path / "damaged", vit__patch__w=lambda x: x / np.abs(x).max() * np.float32(3e38))
    found = wrong(doctor.examine(out))
    assert set(found) == {"outputs"}
    assert "appears at vit_patches first, which reads vit/patch" in found["outputs"]


def test_closed_gates_and_idle_lora(tmp_path):
    names = [path.replace("/", "__") for path in frozen_weights.metadata(imagebind_llm() / "weights")
             if path.endswith(("gate", "lora_b")) and not path.startswith("replaced")]
    out = damaged(imagebind_llm(), tmp_path / "damaged", **dict.fromkeys(names, np.zeros_like))
    found = wrong(doctor.examine(out))
    assert "Every gate of llm/layers/attn/gate is closed" in found["gates"] and "adapter.pth" in found["gates"]
    assert "LoRA adds nothing" in found["LoRA"]
    assert "nothing of it reaches the language model" in found["images"]


def test_some_idle_lora_is_a_warning(tmp_path):
    out = damaged(minigpt_v2(), tmp_path / "damaged", llm__layers__attn__q__lora_b=with_(0, 0))
    assert "in 1 of 6 matrices" in wrong(doctor.examine(out, quick=True), "warning")["LoRA"]


def test_missing_and_damaged_files(tmp_path):
    out = tmp_path / "other"
    shutil.copytree(scenes(), out)
    card = json.loads((out / "config.json").read_text())
    card["architecture"]["llm"]["dim"] += 2
    (out / "config.json").write_text(json.dumps(card))
    found = doctor.examine(out)
    assert "llm/embedding" in wrong(found)["parameters"]
    assert "repair parameters first" in wrong(found, "warning")["outputs"]

    out = tmp_path / "cut"
    shutil.copytree(scenes(), out)
    for path in (out / "weights").rglob("d/*"):
        path.write_bytes(bytes(path.stat().st_size))
    assert "it is damaged" in wrong(doctor.examine(out))["files"]


# ---- tokenizer ----


def retokenised(out: Path, name: str, change) -> Path:
    shutil.copytree(scenes(), out)
    path = out / "tokenizer" / name
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(held | change))
    return out


@pytest.mark.parametrize(
    ("file", "change", "name", "words"),
    [
        (
            "added_tokens.json",
            {"<new>": 600},
            "tokenizer",
            "601 tokens (added ones included), the embedding table 512 rows",
        ),
        (
            "special_tokens_map.json",
            {"bos_token": "</s>"},
            "special ids",
            "There is no BOS: the tokenizer begins a text with '</s>' (id 2), which is its end",
        ),
        ("special_tokens_map.json", {"bos_token": "nowhere"}, "tokenizer", "bos_token 'nowhere' is neither in"),
    ],
)
def test_tokenizer_is_judged(file, change, name, words, tmp_path):
    found = wrong(doctor.examine(retokenised(tmp_path / "other", file, change), quick=True))
    assert words in found[name] and set(found) == {name}


def test_generation_ids_are_judged(tmp_path):
    for ids, verdict, words in (({"eos_token_id": 5}, "warning", "eos 2 (generation: 5)"),
                                ({"eos_token_id": [2, 512]}, "wrong", "eos_token_id 512 have no row"),
                                ({"eos_token_id": 1}, "wrong", "Answers never end: eos_token_id is 1 (its beginning)"),
                                ({"eos_token_id": []}, "wrong", "Answers never end: eos_token_id is -1 (no token)")):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(scenes(), out)
        card = json.loads((out / "config.json").read_text())
        card["generation"] |= ids
        (out / "config.json").write_text(json.dumps(card))
        assert words in wrong(doctor.examine(out, quick=True), verdict)["special ids"]


# ---- runs ----


def test_runs(tmp_path):
    """A healthy one; one whose base was converted anew from other files; one whose checkpoint has changed."""
    base = tmp_path / "base"
    shutil.copytree(scenes(), base)
    run.train(small.run_config(tmp_path / "run", steps=2, weights=WeightsConfig(checkpoint=str(base), dtype="float32")))
    found = doctor.examine(tmp_path / "run")
    assert wrong(found) == {} and "never trained" not in wrong(found, "warning")
    assert "All 118 frozen tensors" in wrong(found, "ok")["base weights"]

    shutil.rmtree(base)
    damaged(scenes(), base, llm__head__w=lambda x: x * np.float32(1.001))
    patient, _ = inspect_folder(tmp_path / "run")
    numbers = {path: statistics(path, rows) for path, rows in patient.read.items()}
    patient = dataclasses.replace(patient, tensors=numbers)
    assert (
        "not those that the run was trained with: llm/head/w." in wrong(outputs.base_weights(patient))["base weights"]
    )

    seal = next((tmp_path / "run" / "checkpoints").glob("2/seal.json"))
    seal.write_text(seal.read_text().replace('"position"', '"Position"'))
    found = doctor.examine(tmp_path / "run")
    assert "seal.json has changed" in wrong(found)["run"] and "never trained" not in wrong(found, "warning")


# ---- the parts ----


def test_moments_leave_out_what_is_not_finite():
    x = np.array([1.0, -2.0, np.nan, np.inf, 3.0], np.float32)
    m = Moments.of(x)
    assert (m.count, m.bad, m.low, m.high) == (5, 2, -2, 3)
    assert m.mean == pytest.approx(2 / 3) and m.rms == pytest.approx(np.sqrt(14 / 3))
    assert Moments.of(x[:2]) + Moments.of(x[2:]) == m


FIGURES = {"loss": 9.0, "shuffled": 9.1, "uniform": 10.37, "entropy": 5.0, "tokens a word": 1.2}


@pytest.mark.parametrize(("changes", "look_at", "verdict", "words"), [
    ({"loss": 2.2, "shuffled": 7.0}, [], "ok", "knows the language"),
    ({"loss": 10.37, "shuffled": 10.37, "entropy": 10.37}, [], "wrong", "absent, zero or vanishingly small"),
    ({}, [], "wrong", "a Vicuna delta added to another LLaMA"),
    ({"loss": 7.0}, ["llm/head/w"], "warning", "Look at llm/head/w first"),
    ({"loss": 12.0, "tokens a word": 3.0}, [], "warning", "is not for English"),
    ({"loss": 12.0, "tokens a word": 3.0}, ["llm/head/w"], "wrong", "or worse"),
])
def test_judged(changes, look_at, verdict, words):
    found, told = outputs.judged(FIGURES | changes, look_at)
    assert found == verdict and words in told


def test_command(monkeypatch, capsys, tmp_path):
    out = damaged(scenes(), tmp_path / "damaged", vit__pos=np.zeros_like)
    for folder, status in ((scenes(), 0), (out, 1), (tmp_path / "nowhere", 2)):
        args = ["mmjax", "doctor", str(folder), "--quick", "--json", str(tmp_path / "out.json")]
        monkeypatch.setattr("sys.argv", args)
        if status:
            with pytest.raises(SystemExit) as stopped:
                cli.main()
            assert stopped.value.code == status
        else:
            cli.main()
        if status < 2:
            told = json.loads((tmp_path / "out.json").read_text())
            assert told["verdict"] == ("wrong" if status else "warning")
            assert ("vit/pos" in capsys.readouterr().out) == bool(status)


def test_quick_loads_no_model(monkeypatch):
    monkeypatch.setattr("mmjax.inference.loaded.load", lambda *args, **kwargs: pytest.fail("loaded"))
    assert doctor.examine(scenes(), quick=True)
