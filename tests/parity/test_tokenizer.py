"""Token ids and decoded text, against the original's tokenizer."""

import json
import shutil

import numpy as np

from mmjax.batch import Sample
from mmjax.config import TextConfig
from mmjax.data.text import rows
from mmjax.tokenizer import Tokenizer
from tests.parity import golden


def with_special_tokens(tmp_path, special_map, **config):
    """The set's tokenizer with another special_tokens_map.json, and other entries in tokenizer_config.json."""
    shutil.copy(golden.llama_folder() / "tokenizer.model", tmp_path)
    old = json.loads((golden.llama_folder() / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(old | config), encoding="utf-8")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special_map), encoding="utf-8")
    return Tokenizer.from_folder(tmp_path)


@golden.each("tokenizer")
def test_special_ids_and_size(case):
    tokenizer = golden.tokenizer()
    got = {"bos": tokenizer.bos, "eos": tokenizer.eos, "unk": tokenizer.unk, "pad": tokenizer.pad,
           "len": tokenizer.vocab_size}
    assert got == {name: case.spec[name] for name in got}


@golden.each("tokenizer")
def test_ids_of_every_text(case):
    tokenizer = golden.tokenizer()
    assert case.spec["texts"]
    for entry in case.spec["texts"]:
        ids = tokenizer.encode(entry["text"])
        assert ids == entry["ids"], entry["text"]
        assert [tokenizer.bos, *ids] == entry["ids_with_bos"], entry["text"]


@golden.each("tokenizer")
def test_text_of_every_id_list(case):
    tokenizer = golden.tokenizer()
    assert case.spec["decode"]
    for entry in case.spec["decode"]:
        assert tokenizer.decode(entry["ids"]) == entry["skip_special"], entry["ids"]
        assert tokenizer.decode(entry["ids"], skip_special=False) == entry["keep_special"], entry["ids"]


@golden.each("tokenizer", where=lambda case: "batch" in case.spec)
def test_padded_and_truncated_batch(case):
    batch = case.spec["batch"]
    text = TextConfig(end_sym="", max_txt_len=batch["max_length"])
    got = rows([Sample(answer=words) for words in batch["texts"]], golden.tokenizer(), text, image_tokens=0)
    np.testing.assert_array_equal(got.tokens[:, 1:], batch["input_ids"])
    np.testing.assert_array_equal(got.valid[:, 1:], np.array(batch["attention_mask"], bool))


@golden.each("tokenizer", where=lambda case: "differs_when_special_tokens_are_plain_strings" in case.spec)
def test_plain_special_tokens_strip_their_neighbours(case, tmp_path):
    spec, usual = case.spec, golden.tokenizer()
    names = {name: usual.decode([spec[name[:3]]], skip_special=False)
             for name in ("bos_token", "eos_token", "unk_token")}
    tokenizer = with_special_tokens(tmp_path, names)
    expected = {entry["text"]: entry["ids"] for entry in spec["texts"]}
    expected |= {entry["text"]: entry["ids"] for entry in spec["differs_when_special_tokens_are_plain_strings"]}
    assert {text: tokenizer.encode(text) for text in expected} == expected


@golden.each("tokenizer", where=lambda case: "vicuna_style_map" in case.spec)
def test_bos_comes_from_the_special_tokens_map(case, tmp_path):
    vicuna = case.spec["vicuna_style_map"]
    tokenizer = with_special_tokens(tmp_path, vicuna["special_tokens_map"], bos_token=vicuna["tokenizer_config_bos"])
    assert [getattr(tokenizer, name) for name in ("bos", "eos", "unk", "pad")] == [
        vicuna[name] for name in ("bos", "eos", "unk", "pad")]
    assert tokenizer.vocab_size == case.spec["len"]
    words = tokenizer.decode(vicuna["with_bos"])
    assert [tokenizer.bos, *tokenizer.encode(words)] == vicuna["with_bos"]
