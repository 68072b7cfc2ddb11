"""Batches of every family and every shipped configuration, against what is said of them before any record is read."""

import collections
import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

from mmjax import sharding
from mmjax.batch import Batch, Sample
from mmjax.checkpoints.converted import ConvertedCheckpoint
from mmjax.config import DataConfig, RunConfig, TextConfig, WeightsConfig, load
from mmjax.cost import plan
from mmjax.data import features, pipeline
from mmjax.data.collate import Collator, batch_spec, collate
from mmjax.data.features import Card, Features, ImageBytes, Writer
from mmjax.data.formats import Record
from mmjax.data.packing import Groups
from mmjax.data.pipeline import Order
from mmjax.data.text import rows, tokenize
from mmjax.families import FAMILIES, imagebind_llm, llama_adapter, minigpt4
from mmjax.tokenizer import Tokenizer
from mmjax.training import encode_features, run
from tests import small

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENIZER = Tokenizer.from_folder(small.GOLDEN / "ckpt" / "llama_hf")
OWN = sorted(name for name, family in FAMILIES.items() if family.Model.__module__.startswith("mmjax."))
PACKED = {"pack_length": 700, "pack_images": 3}


def tiny(family, name=""):
    """A family's smallest model, with the parts that a shipped configuration's has."""
    cfg = FAMILIES[family].presets["tiny"]
    if name == "minigpt_v2":
        return dataclasses.replace(cfg, qformer=None)
    return dataclasses.replace(cfg, clip=None, visual=None) if name == "llama_adapter" else cfg


def shipped():
    """(name, run, model) of every shipped configuration and phase, and of every family with a run that says little."""
    for path in sorted(CONFIGS.glob("*.py")):
        phases = load(str(path))
        for phase, config in phases.items() if isinstance(phases, dict) else [("", phases)]:
            family = config.weights.family
            yield f"{path.stem}.{phase}".rstrip("."), config, tiny(family, path.stem)
    for family in OWN:
        yield f"the family {family}", RunConfig(weights=WeightsConfig(family=family, dtype="float32")), tiny(family)


def cases():
    """Each of them as it is, packed, and with stored features, where it may be."""
    for (name, config, model), packed, stored in itertools.product(shipped(), (False, True), (False, True)):
        if not (packed and model.injects or stored and model.images is None):
            yield pytest.param(config, model, packed, stored, id=f"{name}{' packed' * packed}{' features' * stored}")


def kinds(batch):
    """{field: shapes and dtypes}"""
    return {field.name: jax.tree.map(lambda leaf: (leaf.shape, np.dtype(leaf.dtype)), getattr(batch, field.name))
            for field in dataclasses.fields(Batch)}


def store(folder, shape, data, dtype):
    """Features of that shape for every image of a run, any numbers."""
    records = pipeline.read(data)
    crops = 2 if data.random_crop else 1
    with Writer(folder, Card({"files": {}}, {}, crops, 0, dtype, shape)) as writer:
        names = writer.names(data.sources, records)
        for record in records[0]:
            vector = np.random.default_rng(0).normal(size=(crops, *shape))
            key = features.key(names(record.image))
            writer.add(key, features.content_hash(ImageBytes.of(record.image).content), vector)
    return Features(folder).of(data.sources, records)


@pytest.mark.parametrize(("config", "model", "packed", "stored"), cases())
def test_a_batch_is_what_its_spec_says(config, model, packed, stored, tmp_path):
    """So that what is planned is what a run feeds."""
    family = FAMILIES[config.weights.family]
    data = dataclasses.replace(
        config.data, format="cc_sbu_align", path=str(small.images()), mixture=(), scenes=None, batch_size=2,
        features=str(tmp_path / "features") if stored else None, **(PACKED if packed else {}))
    config = dataclasses.replace(config, data=data)
    source = ConvertedCheckpoint(Path("tiny"), family, model, config.text, {}, ())
    spec = run.model_spec(config, dataclasses.replace(source, config=run.architecture(source, config)),
                          sharding.make_mesh(config.mesh))
    found = None
    if stored:
        found = store(tmp_path / "features", encode_features.feature_shape(spec), data, config.weights.dtype)
    records = pipeline.read(data)
    if model.images is None:
        records = [[dataclasses.replace(record, image=None) for record in records[0]]]
    collator = Collator.of(config, TOKENIZER, spec.source.config, found)
    step = next(pipeline.batches(records, data, collator))
    length = step.batch.tokens.shape[1]
    assert length == data.pack_length if packed else length % data.length_multiple == 0
    planned = plan.batch_of(config, spec, length)
    assert kinds(step.batch) == kinds(planned)
    feature = jax.ShapeDtypeStruct(found.card.shape, found.dtype) if stored else None
    assert collator.groups == (Groups(2, 6) if packed else None)
    assert kinds(batch_spec(model, 2, length, None, collator.groups, feature)) == kinds(planned)
    assert len(step.names) > 2 if packed else len(step.names) == 2
    assert (step.batch.features is not None) == stored
    assert (step.batch.images is not None) == (model.images is not None and not stored)


def test_every_shipped_configuration_is_tried():
    assert {name.split(".")[0] for name, *_ in shipped()} > {path.stem for path in CONFIGS.glob("*.py")}
    assert {config.weights.family for _, config, _ in shipped()} == {*OWN} >= {
        "imagebind_llm", "llama", "llama_adapter", "minigpt4"}


# ---- a sample is tokenised once ----


class Counting:
    """A tokenizer that notes what it is given."""

    def __init__(self):
        self.seen = []

    def encode(self, text, special=True):
        self.seen.append(text)
        return TOKENIZER.encode(text, special)

    def __getattr__(self, name):
        return getattr(TOKENIZER, name)


SEPARATE = TextConfig("###Human: {} ###Assistant: ", end_sym="###", max_txt_len=40)
JOINT = TextConfig("Q: {} A:", end_sym="</s>", joint=True, max_txt_len=60)


@pytest.mark.parametrize(("text", "model", "texts", "packed"), [
    (SEPARATE, minigpt4.PRESETS["tiny"], 2, False), (SEPARATE, minigpt4.PRESETS["tiny"], 2, True),
    (JOINT, imagebind_llm.PRESETS["tiny"], 2, False), (JOINT, FAMILIES["llama"].presets["tiny"], 2, True),
], ids=["separate", "separate, packed", "joint", "joint, packed"])
def test_a_sample_is_tokenised_once(text, model, texts, packed):
    """Whatever is done to it afterwards: its length, its place in a packed row, its image, its batch.

    texts: of each sample that no other has: of separate ones the question behind the image and the answer, of joint
           ones the prompt and the whole
    """
    image = np.zeros((9, 9, 3), np.uint8) if model.images else None
    mark = "<Img><ImageHere></Img> " if model.image_tokens else ""
    records = [Record(str(n), image, f"Answer {n}.", f"{mark}Is it {n}?") for n in range(100)]
    data = DataConfig(path="somewhere", batch_size=3, **({"pack_length": 150, "pack_images": 4} if packed else {}))
    tokenizer = Counting()
    collator = Collator.of(RunConfig(data=data, text=text), tokenizer, model)
    steps = list(itertools.islice(pipeline.batches([records], data, collator), 4))
    order, counts = Order([len(records)], data), collections.Counter(tokenizer.seen)
    # The sample behind a packed batch has been looked at before it was known to have no room.
    looked = {order(step.end)[1] for step in steps if packed}
    for number in sorted(int(name) for step in steps for name in step.names):
        own = {seen: count for seen, count in counts.items() if f" {number}." in seen or f" {number}?" in seen}
        tried = number == 0  # before the first batch, whether the configuration suits the data
        assert len(own) == texts and set(own.values()) == {1 + (number in looked) + tried}, own
    assert sum(len(step.names) for step in steps) > (20 if packed else 11)


@pytest.mark.parametrize(
    ("text", "model"),
    [(SEPARATE, minigpt4.PRESETS["tiny"]), (JOINT, llama_adapter.PRESETS["tiny"])],
    ids=["separate", "joint"],
)
def test_rows_of_tokenised_samples_are_rows_of_samples(text, model):
    mark = "<Img><ImageHere></Img> " if model.image_tokens else ""
    image = np.zeros((9, 9, 3), np.uint8)
    samples = [Sample(images=[image], prompt=f"{mark}Is it?", answer="A dog."), Sample(prompt="Is it?", answer="No."),
               Sample(answer="No."), Sample(images=[image], prompt=f"{mark}What is it?")]
    tokenizer = Counting()
    tokenized = tokenize(samples, tokenizer, text, model.image_tokens)
    assert [each.length for each in tokenized] == [
        rows([sample], TOKENIZER, text, model.image_tokens).tokens.shape[1] for sample in samples]
    seen = len(tokenizer.seen)
    for made in (rows(tokenized, tokenizer, text, model.image_tokens), collate(tokenized, tokenizer, text, model)):
        wanted = collate(samples, TOKENIZER, text, model)
        for name in ("tokens", "soft_index", "valid", "loss_mask", "positions", "padded_length"):
            np.testing.assert_array_equal(getattr(made, name), getattr(wanted, name), name)
    np.testing.assert_array_equal(made.images, wanted.images)
    assert len(tokenizer.seen) == seen
    with pytest.raises(ValueError, match="read-only"):
        tokenized[0].answer[0] = 0
