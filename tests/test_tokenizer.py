"""Tokenizer folders: what they may declare, and how they may be broken. The ids themselves: tests/parity."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from mmjax.tokenizer import Tokenizer

LLAMA = Path(__file__).parent / "golden" / "minigpt4" / "ckpt" / "llama_hf"
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def record(content, lstrip=False, rstrip=False, **more):
    return {"content": content, "lstrip": lstrip, "rstrip": rstrip, "normalized": True, "single_word": False} | more


@pytest.fixture
def folder(tmp_path):
    """A folder with the model file alone."""
    shutil.copy(LLAMA / "tokenizer.model", tmp_path)
    return tmp_path


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def test_model_file_alone(folder):
    tokenizer, full = Tokenizer.from_folder(folder), Tokenizer.from_folder(LLAMA)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.unk, tokenizer.pad) == (full.bos, full.eos, full.unk, full.pad)
    assert tokenizer.encode("<s> a dog</s> b") == full.encode("<s> a dog</s> b")


def test_every_piece_between_cuts_gets_its_own_space_marker():
    tokenizer = Tokenizer.from_folder(LLAMA)
    whole = tokenizer.encode("a dog</s>the boat<s>")
    assert whole == [*tokenizer.encode("a dog"), tokenizer.eos, *tokenizer.encode("the boat"), tokenizer.bos]


@pytest.mark.parametrize(("lstrip", "rstrip", "same_as"), [
    (False, False, ("a ", " b")), (True, False, ("a", " b")), (False, True, ("a ", "b")), (True, True, ("a", "b"))])
def test_records_say_which_white_space_a_token_eats(folder, lstrip, rstrip, same_as):
    write(folder, "special_tokens_map.json", NAMES | {"eos_token": record("</s>", lstrip, rstrip)})
    tokenizer = Tokenizer.from_folder(folder)
    left, right = map(tokenizer.encode, same_as)
    assert tokenizer.encode("a </s> b") == [*left, tokenizer.eos, *right]


def test_special_tokens_map_wins_over_the_config(folder):
    write(folder, "tokenizer_config.json", {"bos_token": record("<s>"), "eos_token": "", "unk_token": None})
    write(folder, "special_tokens_map.json", {"bos_token": record("</s>"), "pad_token": None})
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_text, tokenizer.bos, tokenizer.eos) == ("</s>", 2, 2)
    assert 1 not in tokenizer.encode("<s>")  # no longer a special token, so it is spelt out


def test_plain_strings_in_the_config_alone_eat_nothing(folder):
    write(folder, "tokenizer_config.json", NAMES)
    assert Tokenizer.from_folder(folder).encode("a </s> b") == Tokenizer.from_folder(LLAMA).encode("a </s> b")


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_are_new_rows(folder, where):
    size = Tokenizer.from_folder(folder).vocab_size
    write(folder, where, {"[PAD]": size} if where == "added_tokens.json" else
          {"added_tokens_decoder": {"0": record("<unk>", special=True), str(size): record("[PAD]", special=False)}})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.encode("a[PAD]b") == [*tokenizer.encode("a"), size, *tokenizer.encode("b")]
    assert tokenizer.decode(tokenizer.encode("a[PAD]b")) == "a [PAD] b"
    assert tokenizer.pad < size  # still "$$"


def test_added_token_that_is_declared_special_is_skipped(folder):
    size = Tokenizer.from_folder(folder).vocab_size
    write(folder, "added_tokens.json", {"<img>": size})
    write(folder, "special_tokens_map.json", NAMES | {"additional_special_tokens": [record("<img>")]})
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode("a <img> b")
    assert ids == [*tokenizer.encode("a "), size, *tokenizer.encode(" b")]
    assert "<img>" not in tokenizer.decode(ids)
    assert "<img>" in tokenizer.decode(ids, skip_special=False)


def test_pad_is_the_unknown_piece_where_the_vocabulary_lacks_the_pad_piece(folder):
    model = folder / "tokenizer.model"
    model.write_bytes(model.read_bytes().replace(b"\x0a\x02$$", b"\x0a\x02@@"))  # renames the piece "$$"
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.pad == tokenizer.unk == 0


def test_decode_refuses_ids_of_another_vocabulary():
    tokenizer = Tokenizer.from_folder(LLAMA)
    with pytest.raises(ValueError, match=rf"\[-1, {tokenizer.vocab_size}\].*0 to {tokenizer.vocab_size - 1}"):
        tokenizer.decode([3, tokenizer.vocab_size, -1])
    assert tokenizer.decode([]) == ""


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model or tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", bytes(500), None])
def test_damaged_model_file_is_named(folder, content):
    model = folder / "tokenizer.model"
    model.write_bytes(model.read_bytes()[:4000] if content is None else content)
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a sentencepiece model"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_json_file_is_named(folder, name, content):
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=name):
        Tokenizer.from_folder(folder)


def test_special_tokens_that_do_not_exist_are_all_named(folder):
    write(folder, "special_tokens_map.json", {"bos_token": "<begin>", "eos_token": record("<end>")})
    with pytest.raises(ValueError, match="bos_token '<begin>', eos_token '<end>'"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("entry", [7, {"text": "<s>"}])
def test_malformed_declaration(folder, entry):
    write(folder, "special_tokens_map.json", {"bos_token": entry})
    with pytest.raises(ValueError, match="expected a string or a record"):
        Tokenizer.from_folder(folder)


@pytest.fixture
def json_folder(tmp_path):
    """A folder with a byte-level tokenizer.json, as small LLaMA-like models ship it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0} | {letter: 1 + i for i, letter in enumerate(letters)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens(["<|end|>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {
        "bos_token": "<|end|>", "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"})
    return tmp_path


def test_json_folder(json_folder):
    tokenizer = Tokenizer.from_folder(json_folder)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.unk, tokenizer.pad, tokenizer.vocab_size) == (0, 0, 0, 0, 257)
    assert tokenizer.bos_text == "<|end|>"
    ids = tokenizer.encode(" a dog , é<|end|>x")
    assert ids.count(tokenizer.bos) == 1  # the one in the text: none is put in front
    assert tokenizer.decode(ids) == " a dog , éx"
    assert tokenizer.decode(ids, skip_special=False) == " a dog , é<|end|>x"


def test_json_folder_spells_special_tokens_out(json_folder):
    tokenizer = Tokenizer.from_folder(json_folder)
    assert (tokenizer.eos_text, tokenizer.folder) == ("<|end|>", json_folder)
    ids = tokenizer.encode(" a<|end|>b", special=False)
    assert tokenizer.eos not in ids and tokenizer.decode(ids) == " a<|end|>b"
    assert tokenizer.encode("<|end|>") == [tokenizer.eos]


def test_json_folder_that_is_broken(json_folder):
    write(json_folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    with pytest.raises(ValueError, match="no bos_token and no eos_token"):
        Tokenizer.from_folder(json_folder)
    (json_folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(json_folder)


def test_worker_processes_can_have_a_copy():
    tokenizer = pickle.loads(pickle.dumps(Tokenizer.from_folder(LLAMA)))
    assert tokenizer.decode(tokenizer.encode("a dog</s>")) == "a dog"


def test_spelling_knows_no_special_tokens(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.eos_text, tokenizer.folder) == ("</s>", folder)
    assert tokenizer.eos in tokenizer.encode("a</s>b")
    spelt = tokenizer.encode("a</s>b", special=False)
    assert tokenizer.eos not in spelt and tokenizer.decode(spelt) == "a</s>b"
    assert tokenizer.encode("a dog", special=False) == tokenizer.encode("a dog")
