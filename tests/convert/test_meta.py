"""Meta's LLaMA folders: the table, shards, params.json, and back."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from mmjax.convert import meta, write
from mmjax.convert.export import export
from mmjax.convert.lazy import LazyTensor
from mmjax.convert.tables import Problems, forward
from mmjax.families import FAMILIES, shapes
from mmjax.models.llama import LLAMA_7B, LLAMA_13B, TINY, LlamaConfig
from tests.convert.released import (
    CKPT,
    IMAGEBIND,
    assert_same,
    assert_there_and_back,
    described,
    edited,
    llama_tensors,
    meta_folder,
    params,
    refused,
    tensors,
)

ONE, TWO = IMAGEBIND / "llama_meta", IMAGEBIND / "llama_meta_2shards"


def opened(folder):
    problems = Problems()
    release = meta.open_release(folder, problems)
    assert not problems
    return release


# --------------------------------------------------------------------------------------------------------- table


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_there_and_back(dtype):
    assert_there_and_back(meta.entries(TINY), dtype)


@pytest.mark.parametrize("cfg", [TINY, LLAMA_7B, LLAMA_13B])
def test_table_fills_the_model_exactly(cfg):
    expected = {path: shape.shape for path, shape in shapes("llama", FAMILIES["llama"].Config(cfg)).items()}
    assert {entry.path: entry.shape for entry in meta.entries(cfg)} == expected


def test_rows_of_a_head_change_places():
    release = opened(ONE)
    held, cfg = tensors(ONE / "consolidated.00.pth"), release.cfg
    parameters = forward(release.entries, release.tensors, release.ignored, "file", Problems())
    q, v = (np.concatenate(list(parameters[f"llm/layers/attn/{name}/w"].slices()))[2] for name in "qv")
    H = cfg.head_dim
    for place in range(H):  # pair i of a head is its rows 2i, 2i+1 there, and i, i+H/2 here
        i, t = place // 2, place % 2
        row = held["layers.2.attention.wq.weight"][3 * H + place]
        np.testing.assert_array_equal(q[:, 3, t * (H // 2) + i], row)
        np.testing.assert_array_equal(v[:, 3, place], held["layers.2.attention.wv.weight"][3 * H + place])


# ------------------------------------------------------------------------------------------------------ conversion


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "one"
    write.command("llama")(llm=ONE, out=out)
    return out


def test_folder(converted):
    card = described(converted)
    assert card["generation"] == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert card["architecture"]["llm"]["vocab"] == 600 and card["architecture"]["llm"]["hidden"] == 96
    assert [file["file"] for file in card["sources"]["llm"]] == ["consolidated.00.pth"]
    assert [path.name for path in (converted / "tokenizer").iterdir()] == ["tokenizer.model"]  # from beside the folder
    assert params(converted)["llm/embedding"].dtype == np.float16


def test_shards_are_the_same_model(converted, tmp_path):
    write.command("llama")(llm=TWO, out=tmp_path / "two")
    assert_same(params(tmp_path / "two"), params(converted))
    assert [file["file"] for file in described(tmp_path / "two")["sources"]["llm"]] == [
        "consolidated.00.pth", "consolidated.01.pth"]


def test_shards_stay_in_their_files(monkeypatch):
    seen = []
    read = LazyTensor.read
    monkeypatch.setattr(LazyTensor, "read", lambda tensor: seen.append(tensor.key) or read(tensor))
    release = opened(TWO)
    assert seen and all(key.endswith("norm.weight") for key in seen)  # the copies, to see that they are copies
    seen.clear()
    release.tensors["layers.0.feed_forward.w2.weight"].read()
    assert seen == ["layers.0.feed_forward.w2.weight"] * 2


def test_both_formats_come_back(converted, tmp_path):
    export(converted, "llama-meta", tmp_path / "meta")
    export(converted, "llama", tmp_path / "hf")
    written = tensors(tmp_path / "meta" / "consolidated.00.pth")
    assert_same(written, {key: value for key, value in tensors(ONE / "consolidated.00.pth").items()
                          if "rope" not in key})
    original = json.loads((ONE / "params.json").read_text())
    assert json.loads((tmp_path / "meta" / "params.json").read_text()) == original | {"vocab_size": 600}
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == (IMAGEBIND / "tokenizer.model").read_bytes()
    for name in ("meta", "hf"):
        write.command("llama")(llm=tmp_path / name, out=tmp_path / f"{name}_again")
        assert_same(params(tmp_path / f"{name}_again"), params(converted))
        again = described(tmp_path / f"{name}_again")
        assert all(again[field] == described(converted)[field] for field in ("architecture", "generation", "text"))


def test_rope_agrees_with_transformers_permutation(converted, tmp_path):
    """From Meta to HF: view [heads, hd/2, 2, dim], swap axes 1 and 2, flatten."""
    export(converted, "llama", tmp_path / "hf")
    hf = llama_tensors(tmp_path / "hf")
    wk = tensors(ONE / "consolidated.00.pth")["layers.1.attention.wk.weight"]
    expected = wk.reshape(4, 4, 2, 32).swapaxes(1, 2).reshape(32, 32)
    np.testing.assert_array_equal(hf["model.layers.1.self_attn.k_proj.weight"], expected)


def test_a_hugging_face_model_in_metas_format(tmp_path):
    """Its vocabulary has added tokens, which Meta's tokenizer does not: its size stands in params.json."""
    write.command("llama")(llm=CKPT / "llama_hf", out=tmp_path / "hf")
    export(tmp_path / "hf", "llama-meta", tmp_path / "meta")
    problems = Problems()
    cfg = meta.read_params(tmp_path / "meta", None, problems)
    told = described(tmp_path / "hf")["architecture"]["llm"]
    assert not problems and dataclasses.asdict(cfg) == {
        name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}


# ----------------------------------------------------------------------------------------------------- params.json


@pytest.mark.parametrize("dim, multiple_of, multiplier, hidden", [
    (4_096, 256, None, 11_008), (5_120, 256, None, 13_824), (6_656, 256, None, 17_920), (8_192, 256, None, 22_016),
    (8_192, 4_096, 1.3, 28_672),
])
def test_released_feed_forwards(dim, multiple_of, multiplier, hidden):
    assert meta.hidden_size(dim, multiple_of, multiplier) == hidden


@pytest.mark.parametrize("cfg", [
    LLAMA_7B, LLAMA_13B, LlamaConfig(dim=64, heads=4, kv_heads=2, head_dim=16, hidden=101, eps=1e-5, rope_theta=5e5),
    LlamaConfig(dim=8_192, depth=80, heads=64, kv_heads=8, hidden=28_672, eps=1e-5),
])
def test_params_come_back(tmp_path, cfg):
    (tmp_path / "params.json").write_text(json.dumps(meta.params(cfg)))
    problems = Problems()
    assert meta.read_params(tmp_path, None, problems) == cfg and not problems


@pytest.mark.parametrize("change, said", [
    ({"dim": "32"}, "dim is '32', expected a whole number from 1 to"),
    ({"n_heads": None}, "n_heads is None, expected a whole number from 1 to"),
    ({"n_heads": 5}, "5 heads (5 of keys and values) do not divide a width of 32"),
    ({"n_kv_heads": 3}, "4 heads (3 of keys and values) do not divide"),
    ({"norm_eps": -1}, "norm_eps is -1, expected a number above 0"),
    ({"use_scaled_rope": True}, "use_scaled_rope = True is not LLaMA-1's or Llama-2's"),
    ({"multiple_of": 7}, "w1.weight has shape [96, 32], expected [91, 32]"),
    ({"n_layers": 5}, "layers.4.feed_forward.w2.weight is missing"),
    ({"n_layers": 3}, "layers.3.attention.wq.weight [32, 32] is neither used nor known"),
    ({"n_kv_heads": 2}, "wk.weight has shape [32, 32], expected [16, 32]"),
    ({"dim": 64}, "says dim 64 and vocab_size 600, and a shard holds 32 columns of 600 rows of tok_embeddings.weight, "
                  "so there should be 2"),
    ({"vocab_size": 601}, "tok_embeddings.weight has 600 rows, params.json says vocab_size 601"),
])
def test_params_that_do_not_fit(tmp_path, change, said):
    assert said in refused(tmp_path, write.command("llama"), llm=meta_folder(tmp_path / "llama", **change))


@pytest.mark.parametrize("text", ["{", "[1]", "null"])
def test_params_that_are_none(tmp_path, text):
    folder = meta_folder(tmp_path / "llama")
    (folder / "params.json").write_text(text)
    assert refused(tmp_path, write.command("llama"), llm=folder).count("\n") == 1


# ---------------------------------------------------------------------------------------------------------- shards


def test_missing_files(tmp_path):
    folder = meta_folder(tmp_path / "llama", TWO)
    (folder / "consolidated.00.pth").unlink()
    message = refused(tmp_path, write.command("llama"), llm=folder)
    assert "has consolidated.01.pth, but not consolidated.00.pth" in message
    (folder / "consolidated.01.pth").unlink()
    assert "has no consolidated.00.pth. Give a folder" in refused(tmp_path, write.command("llama"), llm=folder)
    shutil.copyfile(TWO / "consolidated.00.pth", folder / "consolidated.00.pth")
    message = refused(tmp_path, write.command("llama"), llm=folder)
    assert "so there should be 2 shards; there are 1" in message and "1 problem." in message
    (folder / "params.json").unlink()
    assert "has consolidated*, but no params.json" in refused(tmp_path, write.command("llama"), llm=folder)


def test_no_tokenizer(tmp_path):
    folder = meta_folder(tmp_path / "llama")
    (folder / "tokenizer.model").unlink()
    assert "There is no tokenizer.model in" in refused(tmp_path, write.command("llama"), llm=folder)


def test_fewer_rows_than_words(tmp_path):
    folder = meta_folder(tmp_path / "llama")
    held = tensors(ONE / "consolidated.00.pth")
    edited(ONE / "consolidated.00.pth", folder / "consolidated.00.pth",
           tok_embeddings__weight=held["tok_embeddings.weight"][:599], output__weight=held["output.weight"][:599])
    message = refused(tmp_path, write.command("llama"), llm=folder)
    assert "tok_embeddings.weight has 599 rows, params.json says vocab_size 600" in message
    assert "tok_embeddings.weight has 599 rows, the tokenizer in" in message


def test_shards_that_do_not_belong_together(tmp_path):
    folder = meta_folder(tmp_path / "llama", TWO)
    edited(TWO / "consolidated.01.pth", folder / "consolidated.01.pth",
           layers__1__attention__wq__weight=np.zeros((8, 32), np.float16), layers__0__ffn_norm__weight=None,
           norm__weight=np.full(32, 7, np.float16), output__weight=np.zeros((300, 32), np.float32))
    message = refused(tmp_path, write.command("llama"), llm=folder)
    for line in ("layers.1.attention.wq.weight has different dtypes or shapes in the shards: "
                 "float16 [8, 32], float16 [16, 32]",
                 "layers.0.ffn_norm.weight is missing in the shards [1]", "norm.weight differs between the shards",
                 "output.weight has different dtypes or shapes in the shards: float16 [300, 32], float32 [300, 32]",
                 "4 problems"):
        assert line in message


def test_a_stray_tensor_in_shards(tmp_path):
    folder = meta_folder(tmp_path / "llama", TWO)
    for number, name in enumerate(("consolidated.00.pth", "consolidated.01.pth")):
        edited(TWO / name, folder / name, extra__weight=np.full(3, number, np.float16))
    assert "extra.weight [3] is neither used nor known" in refused(tmp_path, write.command("llama"), llm=folder)


def test_a_damaged_shard(tmp_path):
    folder = meta_folder(tmp_path / "llama", TWO)
    (folder / "consolidated.01.pth").write_bytes((TWO / "consolidated.01.pth").read_bytes()[:5_000])
    message = refused(tmp_path, write.command("llama"), llm=folder)
    assert "consolidated.01.pth is cut off or damaged" in message and "1 problem." in message


def test_a_delta_needs_a_transformers_folder(tmp_path):
    message = refused(tmp_path, write.command("llama"), llm=ONE, delta=CKPT / "llama_hf")
    assert "is in Meta's format. Convert it with" in message


def test_a_folder_with_both_is_read_as_transformers(tmp_path, converted):
    export(converted, "llama", tmp_path / "hf")
    shutil.copyfile(ONE / "params.json", tmp_path / "hf" / "params.json")
    assert not meta.recognised(tmp_path / "hf") and meta.recognised(ONE)


def test_export_to_metas_format_needs_its_tokenizer(tmp_path, converted):
    shutil.copytree(converted, tmp_path / "model")
    (tmp_path / "model" / "tokenizer" / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="has no tokenizer.model, which"):
        export(tmp_path / "model", "llama-meta", tmp_path / "meta")
    assert not (tmp_path / "meta").exists()
