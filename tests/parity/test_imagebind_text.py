"""ImageBind-LLM's tokens, prompts and data sets, and the way from a sample to words, against the original's."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml

from mmjax.batch import Sample
from mmjax.config import ALPACA, ALPACA_INPUT, DataConfig, TextConfig
from mmjax.data import senses
from mmjax.data.formats import FORMATS, imagebind_llm_finetune, imagebind_llm_pretrain
from mmjax.data.images import load
from mmjax.data.neighbours import Recall, read
from mmjax.data.pipeline import sample
from mmjax.data.text import NO_TARGET, rows
from mmjax.models.pixels import normalise
from mmjax.tokenizer import Tokenizer
from tests.parity import imagebind_golden as golden
from tests.parity.close import assert_close

DATA = DataConfig()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(golden.folder() / "tokenizer.model", folder)
    return Tokenizer.from_folder(folder)


def spec(name):
    return json.loads((golden.folder() / "cases" / name / "case.json").read_text(encoding="utf-8"))


def settings(words: int, tokenizer: Tokenizer) -> TextConfig:
    return TextConfig(ALPACA, ALPACA_INPUT, tokenizer.eos_text, joint=True, max_txt_len=words)


def check_rows(samples, tokenizer, tokens, labels, mask):
    """Rows at the original's length, whose padding is id 0 and whose labels are 0 where there is no target."""
    batch = rows(samples, tokenizer, settings(tokens.shape[1], tokenizer), 0, length=tokens.shape[1])
    np.testing.assert_array_equal(batch.valid, mask.astype(bool))
    np.testing.assert_array_equal(np.where(batch.valid, batch.tokens, 0), tokens)
    np.testing.assert_array_equal(np.where(batch.loss_mask, batch.tokens, NO_TARGET), labels)
    assert set(batch.padded_length) == {tokens.shape[1]} and (batch.soft_index == -1).all()


# ---- tokens ----


@pytest.mark.parametrize("given", spec("tokenizer")["samples"], ids=lambda given: repr(given["text"][:20]))
def test_spelling(given, tokenizer):
    assert tokenizer.encode(given["text"], special=False) == given["ids_plain"]
    assert [tokenizer.bos, *given["ids_plain"], tokenizer.eos] == given["ids_bos_eos"]
    assert tokenizer.decode(given["ids_plain"]) == given["decoded_plain"]


@pytest.mark.parametrize("given", spec("tokenizer")["decode"], ids=lambda given: str(given["ids"]))
def test_reading(given, tokenizer):
    """The original writes a mark for the unknown piece; here it is left out with the other special tokens."""
    assert tokenizer.decode(given["ids"]) == given["text"].replace(" \u2047 ", "")


def test_special_ids(tokenizer):
    case = spec("tokenizer")
    assert (tokenizer.bos, tokenizer.eos, tokenizer.unk) == (case["bos_id"], case["eos_id"], case["unk_id"])
    assert tokenizer.vocab_size == case["n_words"]


# ---- prompts ----


def text_of(prompt, given, tokenizer):
    """The ids of a prompt to be continued, without BOS."""
    batch = rows([Sample(prompt=prompt, input=given or "")], tokenizer, settings(1, tokenizer), 0)
    bos, *ids = batch.tokens[0]
    assert bos == tokenizer.bos and batch.valid.all() and not batch.loss_mask.any()
    return ids


@pytest.mark.parametrize("row", spec("prompts")["rows"], ids=lambda row: repr(row["instruction"]))
def test_prompts(row, tokenizer):
    instruction = row["instruction"]
    prompt = str(tuple(instruction)) if row["instruction_is_tuple"] else instruction
    assert text_of(prompt, row["input"], tokenizer) == tokenizer.encode(row["prompt"], special=False)


@golden.each(lambda case: "prompt_ids" in case.spec)
def test_prompts_to_be_continued(case, tokenizer):
    batch = rows([Sample(prompt=prompt) for prompt in case.spec["prompts"]], tokenizer,
                 TextConfig(joint=True, max_txt_len=1), 0)
    for ids, tokens, valid in zip(case.spec["prompt_ids"], batch.tokens, batch.valid, strict=True):
        np.testing.assert_array_equal(tokens[valid], ids)


# ---- data sets ----


def standin(path, shape):
    """The images of these cases went through a simpler transform: a square of that size."""
    return normalise(load(path, shape[-1]))


@pytest.fixture(params=["dataset", "dataset_pretrain"])
def meta(request):
    """The YAML file of a case."""
    (path,) = (golden.folder() / "cases" / request.param).glob("*.yaml")
    return path


def test_formats_read_the_cases(meta):
    count = len(yaml.safe_load(meta.read_text())["META"])
    (reader,) = [read for name, read in FORMATS.items() if name.endswith(meta.stem)]
    assert len(reader(str(meta))) >= count
    assert list(reader(str(meta))) == list(reader(str(meta.parent)))


@pytest.mark.parametrize("kind", ["plain", "released"])
def test_finetune_rows(kind, tokenizer):
    case = golden.load("dataset")
    records = imagebind_llm_finetune(str(golden.folder() / "cases" / case.name),
                                     tuple_prompts=kind == "released")
    assert [record.answer for record in records] == case.spec["answers"]
    samples = [sample(record, "", DATA) for record in records]
    prompts = [text_of(one.prompt, one.input, tokenizer) for one in samples]
    assert prompts == [tokenizer.encode(prompt, special=False) for prompt in case.spec[f"prompts_{kind}"]]
    for words in case.spec["max_words"]:
        arrays = [case.arrays[f"{kind}_w{words}_{name}"] for name in ("tokens", "labels", "mask")]
        check_rows(samples, tokenizer, *arrays)


def test_finetune_images():
    case = golden.load("dataset")
    records = imagebind_llm_finetune(str(golden.folder() / "cases" / case.name))
    used = [None if name == "zeros" else str(golden.folder() / "cases" / case.name / name)
            for name in case.spec["image_used"]]
    assert [record.image for record in records] == used
    for number, record in enumerate(records):
        for name in case.holds(f"image_{number}"):
            assert_close(name, standin(record.image, case.arrays[name].shape), case.arrays[name], absolute=1e-6)


def test_rows_of_text_alone_see_zeros():
    case = golden.load("dataset")
    records = imagebind_llm_finetune(str(golden.folder() / "cases" / case.name))
    blind = [sample(record, "", DATA) for record in records if record.image is None]
    cfg = golden.imagebind_config()
    fields = senses.stack(blind, cfg)
    assert not fields["image_valid"].any()  # the model makes zeros of these: tests/families
    assert fields["images"].shape[:2] == fields["image_valid"].shape == (len(blind), 1)
    np.testing.assert_array_equal(fields["weights"]["image"], np.ones(len(blind)))


def test_pretrain_rows(tokenizer):
    case = golden.load("dataset_pretrain")
    records = imagebind_llm_pretrain(str(golden.folder() / "cases" / case.name))
    assert [record.answer for record in records] == case.spec["captions_as_used"]
    assert {record.prompt for record in records} == {case.spec["instruction"]}
    samples = [sample(record, "", DATA) for record in records]
    assert {tuple(text_of(one.prompt, one.input, tokenizer)) for one in samples} == {
        tuple(tokenizer.encode(case.spec["prompt"], special=False))}
    assert case.spec["max_words"] == case.arrays["tokens"].shape[1]
    check_rows(samples, tokenizer, *(case.arrays[name] for name in ("tokens", "labels", "mask")))
    images = np.stack([standin(record.image, case.arrays["images"].shape) for record in records])
    assert_close("images", images, case.arrays["images"], absolute=1e-6)


# ---- from samples to words ----


@golden.each(lambda case: "knn" in case.name and "decoded" in case.spec)
def test_words_of_several_senses_and_the_cache(case):
    """The whole way, as a user goes it. Ids and scores of this and the other cases: test_imagebind_llm."""
    m = golden.model(golden.adapter(case))
    told = {name: float(weight) for name, weight in re.findall(r"(\w+) \(([\d.]+)\)", case.spec["description"])}
    samples = [Sample(images=[case.arrays["image"][row]], prompt=prompt,
                      media={name: case.arrays[name][row] for name in case.holds(*told) if name != "image"},
                      weights={name: told[name] for name in case.holds(*told)})
               for row, prompt in enumerate(case.spec["prompts"])]
    recall = Recall(read(golden.folder() / "knn_vectors.npy"))
    words = m.generate(samples, case.spec["max_gen_len"], recall=recall, prompt_template="")
    assert words == [text.strip() for text in case.spec["decoded"]]
