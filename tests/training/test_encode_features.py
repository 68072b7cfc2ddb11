"""Features of real, tiny models: what they are, and that a run on them is the run on images."""

import contextlib
import dataclasses
import functools
import io
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax import cli, evaluate, trees
from mmjax.checkpoints import converted
from mmjax.checkpoints import training as training_checkpoints
from mmjax.checkpoints.restore import ModelSpec
from mmjax.config import DataConfig, OptimConfig, RunConfig, ScenesConfig, TextConfig, WeightsConfig
from mmjax.convert import write
from mmjax.data import images, packing, pipeline, scenes
from mmjax.data.collate import Collator
from mmjax.data.features import Features, ImageNames, crop_random
from mmjax.families import FAMILIES, shapes
from mmjax.training import encode_features, run
from tests import small, tiny

GOLDEN = small.GOLDEN.parent / "imagebind_llm"
CONFIG = """
from pathlib import Path
from tests import small

def config():
    return small.run_config(Path({out!r}))
"""


def with_features(config, folder, out):
    return dataclasses.replace(config, out=str(out), data=dataclasses.replace(config.data, features=str(folder)))


def opened(config):
    """The checkpoint with the run's architecture."""
    run.prepare(config)
    source = converted.ConvertedCheckpoint.open(config.weights.checkpoint)
    return source.of(run.architecture(source, config))


def load(config, rules=("projector/.*",), earlier=None):
    return encode_features.load(config, opened(config), rules, pipeline.read(config.data), earlier)


@pytest.fixture(scope="module")
def minigpt4(tmp_path_factory):
    """(config, folder of its features), made by the command."""
    folder = tmp_path_factory.mktemp("minigpt4")
    (folder / "config.py").write_text(CONFIG.format(out=str(folder / "run")))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        cli.COMMANDS["data"](["features", "--config", str(folder / "config.py"), "--out", str(folder / "features")])
    assert f"{folder / 'features'}: 8 images, 8 of them new, 1 x 8 x 48 float32 each: 0.002 MB" in said.getvalue()
    return small.run_config(folder / "run"), folder / "features"


@pytest.fixture(scope="module")
def imagebind(tmp_path_factory):
    """(config, folder of its features): images, and among them text alone."""
    folder = tmp_path_factory.mktemp("imagebind")
    write.command("imagebind_llm")(GOLDEN / "imagebind.pth", GOLDEN / "llama_meta", folder / "base",
                                   adapter=GOLDEN / "adapter_pretrain.pth", arch=GOLDEN / "config.json")
    data = folder / "asked"
    scenes.write_finetune(data, scenes.scenes("train", 3, most=1))
    asked = json.loads((data / "finetune.json").read_text())[::3]
    alone = [{"instruction": "Name a colour.", "input": "", "output": colour} for colour in ("red", "green", "blue")]
    (data / "finetune.json").write_text(json.dumps(asked + alone))
    config = RunConfig(
        out=str(folder / "run"), phase="pretrain",
        weights=WeightsConfig(checkpoint=str(folder / "base"), dtype="float32"),
        data=DataConfig(format="imagebind_llm_finetune", path=str(data), batch_size=4, length_multiple=64),
        text=TextConfig(joint=True, end_sym="</s>", max_txt_len=64),
        optim=OptimConfig(schedule="half_cycle", init_lr=1e-3, warmup_steps=1, epochs=1, steps_per_epoch=3, beta2=0.95),
        log_every=1)
    encode_features.make(config, opened(config), folder / "features")
    return config, folder / "features"


def llama_adapter(folder):
    data = GOLDEN / "cases" / "adapter_v2"
    write.command("llama_adapter")(GOLDEN / "llama_meta", folder / "base", adapter=data / "adapter_v2.pth",
                                   clip=data / "clip_visual.pth", arch=GOLDEN / "config.json")
    weights = WeightsConfig(checkpoint=str(folder / "base"), dtype="float32")
    return small.run_config(folder / "run", weights=weights)


def seen(config, images):
    """`Model.feature` of each image alone, by the whole model of ImageBind-LLM."""
    model = mmjax.load(config.weights.checkpoint, dtype="float32")
    batch = model.batch([mmjax.Sample(images=[image], prompt="Describe.", answer="x") for image in images])
    feature = tiny.jit(functools.partial(model.module.apply, method="feature"))({"params": model.params}, batch)
    return np.asarray(feature)


def batches(config, found, rows, length, **settings):
    """The same samples as a batch of images and as one of features."""
    source = opened(config)
    for given in (None, found):
        collator = Collator(source.tokenizer, config.text, source.config, features=given, **settings)
        yield collator.batch([[filled(collator, sample) for sample in row] for row in rows], length)


def filled(collator, sample):
    """A sample tokenised, with its images opened."""
    tokenized = collator.tokenize(sample)
    images = [collator.image(image, None) for image in sample.images]
    return dataclasses.replace(tokenized, sample=dataclasses.replace(sample, images=images))


def test_llama_adapter_reads_features_in_place_of_images(tmp_path):
    config = llama_adapter(tmp_path)
    encode_features.make(config, opened(config), tmp_path / "features")
    found = load(with_features(config, tmp_path / "features", "run"), ("visual/.*",))
    model = mmjax.load(config.weights.checkpoint, dtype="float32")
    image = pipeline.read(config.data)[0][0].image
    samples = [mmjax.Sample(images=its, prompt="What?", answer="A dog.") for its in ([image], [])]
    shown, read = batches(config, found, [[sample] for sample in samples], 64)
    assert read.images is None and read.features.shape == (2, *found.card.shape)
    query = tiny.jit(functools.partial(model.module.apply, method="visual_query"))
    wanted = query({"params": model.params}, shown)
    without = {name: part for name, part in model.params.items() if name != "clip"}
    np.testing.assert_allclose(query({"params": without}, read), wanted, atol=1e-5)
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-2


def test_packed_rows_of_features(minigpt4):
    config, _ = minigpt4
    found = load(with_features(*minigpt4, "run"))
    images = [record.image for record in pipeline.read(config.data)[0]][:4]
    samples = [mmjax.Sample(images=[image], prompt=small.PROMPT, answer="A dog.") for image in images]
    shown, read = batches(config, found, [samples[:3], samples[3:]], 192, groups=packing.Groups(1, 5))
    for field in ("tokens", "soft_index", "valid", "loss_mask", "positions", "segments"):
        np.testing.assert_array_equal(getattr(read, field), getattr(shown, field))
    feature = read.features
    assert read.images is None and shown.images.shape[:2] == feature.shape[:2] == (2, 5)
    np.testing.assert_array_equal(feature[0, :3], [found.find(image) for image in images[:3]])
    np.testing.assert_array_equal(feature[1, 0], found.find(images[3]))
    assert not feature[0, 3:].any() and not feature[1, 1:].any()


def trained(config, monkeypatch):
    """(trained parameters, what was restored) of a run."""
    held = {}
    announce = run.announce
    monkeypatch.setattr(run, "announce", lambda source, params, *rest: (
        held.update(trees.flatten(params)), announce(source, params, *rest)))
    done = mmjax.train(config)
    return training_checkpoints.trained(done.folder / "checkpoints"), held


def test_minigpt4_run_on_features_is_the_run_on_images(minigpt4, tmp_path, monkeypatch):
    config, folder = minigpt4
    data = dataclasses.replace(config.data, scenes=ScenesConfig(held_out=1))
    config = dataclasses.replace(config, out=str(tmp_path / "images"), data=data)
    scored = []
    monkeypatch.setattr(evaluate.scenes, "report_scenes", lambda model, *rest: scored.append(model.params))
    wanted, _ = trained(config, monkeypatch)
    found, held = trained(with_features(config, folder, tmp_path / "features"), monkeypatch)
    assert {path.split("/")[0] for path in held} == {"llm", "projector"}  # nothing of the encoder
    assert found.keys() == wanted.keys()
    for path in wanted:
        np.testing.assert_allclose(found[path], wanted[path], rtol=0, atol=1e-6)
    start = trees.flatten(mmjax.load(config.weights.checkpoint, dtype="float32").params)
    assert max(np.abs(wanted[path] - start[path]).max() for path in wanted) > 1e-4
    whole, again = map(trees.flatten, scored)  # to be scored, the whole model is loaded
    assert whole.keys() == again.keys() == start.keys()
    for path in whole:
        np.testing.assert_allclose(again[path], whole[path], rtol=0, atol=1e-6)
    card = json.loads((tmp_path / "features" / "run.json").read_text())
    assert card["features"]["shape"] == [8, 48]
    assert card["features"]["encoder"] == json.loads((folder / "features.json").read_text())["encoder"]
    assert json.loads((tmp_path / "images" / "run.json").read_text())["features"] is None


def test_imagebind_run_on_features_is_the_run_on_images(imagebind, tmp_path, monkeypatch):
    config, folder = imagebind
    (records,) = pipeline.read(config.data)
    assert [record.image for record in records].count(None) == 3
    assert len(Features(folder).index) == 3 + 1  # one for all text alone
    wanted, _ = trained(dataclasses.replace(config, out=str(tmp_path / "images")), monkeypatch)
    found, held = trained(with_features(config, folder, tmp_path / "features"), monkeypatch)
    assert {path.split("/")[0] for path in held} == {"llm", "bind", "query"}
    for path in wanted:
        np.testing.assert_allclose(found[path], wanted[path], rtol=0, atol=1e-6)
    start = trees.flatten(mmjax.load(config.weights.checkpoint, dtype="float32").params)
    for path in ("bind/proj/w", "query", "llm/layers/attn/gate"):
        assert np.abs(wanted[path] - start[path]).max() > 1e-4


def test_made_again_adds_nothing(minigpt4):
    config, folder = minigpt4
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    made = encode_features.make(config, opened(config), folder)
    assert (made.images, made.added, made.unread) == (8, 0, 0)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_images_that_cannot_be_read_are_replaced_as_without_features(minigpt4, tmp_path):
    """And the others' are rounded to bfloat16, which they are stored in here."""
    config, folder = minigpt4
    exact = load(with_features(config, folder, "run"))
    data = tmp_path / "images"
    shutil.copytree(small.images(), data)
    for number in (2, 5):
        (data / "image" / f"{number}.jpg").write_bytes(b"no image")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(data), max_bad_share=0.5))
    made = encode_features.make(config, opened(config), tmp_path / "features", dtype="bfloat16", batch_size=3)
    assert (made.images, made.added, made.unread) == (6, 6, 2)
    assert made.nbytes == 6 * 8 * 48 * 2
    lines = [json.loads(line) for line in (tmp_path / "features" / "features_errors.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["2", "5"]
    assert all(line["file"] == str(data / "image" / f"{line['name']}.jpg") and line["file"] in line["problem"]
               for line in lines)

    found = load(with_features(config, tmp_path / "features", "run"))
    for number in (0, 7):
        rounded, whole = (each.find(str(path / "image" / f"{number}.jpg"))
                          for each, path in ((found, data), (exact, small.images())))
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_allclose(rounded.astype(np.float32), whole, rtol=2**-8, atol=1e-6)
    source, steps = opened(config), []
    for given in (None, found):
        collator = Collator(source.tokenizer, config.text, source.config, features=given)
        made = pipeline.batches(pipeline.read(config.data), config.data, collator)
        steps.append([next(made) for _ in range(8)])
    assert [step.names for step in steps[0]] == [step.names for step in steps[1]]
    replaced = [[(bad.position, bad.attempt, bad.name) for step in its for bad in step.bad] for its in steps]
    assert replaced[0] == replaced[1] and replaced[0]


def test_random_crops(imagebind, tmp_path):
    config, folder = imagebind
    random = dataclasses.replace(config, data=dataclasses.replace(config.data, random_crop=True))
    made = encode_features.make(random, opened(random), tmp_path / "features", crops=3, batch_size=5)
    assert made.images == 4 and made.nbytes == 4 * 3 * made.card.nbytes
    found = load(with_features(random, tmp_path / "features", "run"))
    names = ImageNames({str(folder.parent / "asked"): 0})
    image = next(record.image for record in pipeline.read(config.data)[0] if record.image)
    size = opened(config).config.image_size
    shown = [images.load(image, size, "center_crop", crop_random(config.data.seed, names(image), crop))
             for crop in range(3)]
    stored = np.stack([found.find(image, crop) for crop in range(3)])
    np.testing.assert_allclose(stored, seen(config, shown), atol=2e-6)
    assert np.abs(stored[0] - stored[1]).max() > 1e-4
    drawn = {found.feature_of(image, np.random.default_rng(seed)).tobytes() for seed in range(30)}
    assert drawn == {row.tobytes() for row in stored}
    with pytest.raises(ValueError, match="crops: 3 -> 2"):
        encode_features.make(random, opened(random), tmp_path / "features", crops=2)
    with pytest.raises(ValueError, match="this model reads images with the fit 'stretch'"):
        squashed = small.run_config(tmp_path)
        encode_features.make(dataclasses.replace(squashed, data=random.data), opened(squashed), tmp_path / "other")
    with pytest.raises(ValueError, match="not cropped at random"):
        encode_features.make(config, opened(config), tmp_path / "other", crops=2)
    with pytest.raises(ValueError, match="transform.cut: 'the middle' -> 'random crops'"):
        load(with_features(random, folder, "run"))


# ---- what a run refuses ----


@pytest.mark.parametrize(("changes", "rules", "message"), [
    ({"image_size": 28}, ("projector/.*",), r"encoder\.architecture\.vit\.image_size: 56 -> 28"),
    ({"dtype": "bfloat16"}, ("projector/.*",), r"encoder\.dtypes: \['float32', 'float32'\] -> \['bfloat16'"),
    ({"frozen_dtype": "int8"}, ("projector/.*",), r"-> \['float32', 'int8'\]"),
    ({}, ("projector/.*", "qformer/.*"), r"this run trains the encoder \(qformer/.* and \d+ more of its parameters\)"),
    ({}, ("projector/.*|ln_vision/scale",), r"trains the encoder \(ln_vision/scale and 0 more"),
    ({"drop_path": 0.1}, ("projector/.*",), r"trains the encoder \(drop_path\)"),
])
def test_run_that_cannot_use_these_features(minigpt4, changes, rules, message):
    config = with_features(*minigpt4, "run")
    weights = {name: value for name, value in changes.items() if "dtype" in name}
    config = dataclasses.replace(config, weights=dataclasses.replace(config.weights, **weights),
                                 **{name: value for name, value in changes.items() if name not in weights})
    with pytest.raises(ValueError, match=message):
        load(config, rules)


def test_another_encoders_features(minigpt4, tmp_path):
    """Files are told apart by their SHA-256, and a checkpoint that does not say it cannot be used."""
    config = with_features(*minigpt4, "run")
    source, records = opened(config), pipeline.read(config.data)
    card = json.loads((source.folder / "config.json").read_text())
    files = card["sources"]
    files["vit"]["sha256"] = "0" * 64
    (tmp_path / "config.json").write_text(json.dumps(card))
    other = dataclasses.replace(source, folder=tmp_path)
    with pytest.raises(ValueError, match=r"(?s)encoder [0-9a-f]{16} -> [0-9a-f]{16}.*encoder\.files\.vit: .* -> '000"):
        encode_features.load(config, other, (), records)
    files["projector"]["sha256"] = "0" * 64
    files["vit"] = json.loads((source.folder / "config.json").read_text())["sources"]["vit"]
    (tmp_path / "config.json").write_text(json.dumps(card))
    encode_features.load(config, other, (), records)  # the projector is no part of the encoder
    del files["qformer"]
    (tmp_path / "config.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="does not name the source file of qformer"):
        encode_features.load(config, other, (), records)


def test_encoder_that_an_earlier_run_has_trained(minigpt4, tmp_path, monkeypatch):
    config, folder = minigpt4
    path = "qformer/query_tokens"
    before = trees.flatten(mmjax.load(config.weights.checkpoint, dtype="float32").params)[path]
    earlier = {path: before + 0.5, "projector/b": np.zeros(32, np.float32)}
    with pytest.raises(ValueError, match=r"encoder\.trained: None -> '[0-9a-f]{64}'"):
        load(with_features(config, folder, "run"), earlier=earlier)
    load(with_features(config, folder, "run"), earlier={"projector/b": earlier["projector/b"]})

    (tmp_path / "run.json").write_text("{}")
    monkeypatch.setattr(converted, "trained_params", lambda folder: {path: earlier[path]})
    read, restored = ModelSpec.restore, {}

    def stopped(*arguments):
        restored.update(trees.flatten(read(*arguments)))
        raise KeyboardInterrupt  # what follows is nothing new

    monkeypatch.setattr(ModelSpec, "restore", stopped)
    config = dataclasses.replace(config, weights=dataclasses.replace(config.weights, start_from=str(tmp_path)))
    with pytest.raises(KeyboardInterrupt):
        encode_features.make(config, opened(config), tmp_path / "features")
    np.testing.assert_array_equal(restored[path], earlier[path])
    assert {path.split("/")[0] for path in restored} == {"vit", "ln_vision", "qformer"}
    card = json.loads((tmp_path / "features" / "features.json").read_text())
    assert card["encoder"] == json.loads(json.dumps(encode_features.encoder(opened(config), config.weights, earlier)))


def test_run_that_is_yet_to_come(minigpt4, tmp_path, capsys):
    config, folder = minigpt4
    weights = dataclasses.replace(config.weights, start_from=str(tmp_path / "before"))
    made = encode_features.make(dataclasses.replace(config, weights=weights), opened(config), folder)
    assert made.added == 0
    assert "before does not exist yet" in " ".join(capsys.readouterr().err.split())


def test_model_without_an_encoder(tmp_path):
    out = tmp_path / "llama"
    write.command("llama")(small.GOLDEN / "ckpt" / "llama_hf", out)
    config = small.run_config(tmp_path / "run", weights=WeightsConfig(checkpoint=str(out), dtype="float32"))
    with pytest.raises(ValueError, match=r"has no image encoder .*: set data\.features = None"):
        encode_features.make(config, opened(config), tmp_path / "features")
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_is_described(family):
    """Each part is one of the configuration's, and its rule matches parameters that nothing trains by default."""
    family = FAMILIES[family]
    cfg = family.presets["tiny"]
    paths = list(shapes(family, cfg))
    for part, rule in family.encoder.items():
        assert hasattr(cfg, part)
        found = [path for path in paths if trees.matches(path, [rule])]
        assert found and all(map(family.in_encoder, found))
        for rules in (family.trained, *family.phases.values()):
            assert not any(trees.matches(path, rules) for path in found)
