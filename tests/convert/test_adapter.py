"""Adapter files of ImageBind-LLM and LLaMA-Adapter: tables, conversion of the golden set, and what is refused."""

import argparse
import dataclasses
import gzip
import json

import ml_dtypes
import numpy as np
import pytest

from mmjax import cli
from mmjax.checkpoints import frozen as frozen_weights
from mmjax.config import ALPACA, ALPACA_INPUT, TextConfig
from mmjax.convert import adapter, torch_file, write
from mmjax.convert.export import export
from mmjax.families import config_from_dict, imagebind_llm, llama_adapter, shapes
from mmjax.models.llama import TINY
from mmjax.tokenizer import WORDS
from tests.convert.released import (
    ADAPTER_V1,
    ADAPTER_V2,
    IMAGEBIND,
    IMAGEBIND_LLM,
    assert_same,
    assert_there_and_back,
    described,
    edited,
    params,
    refused,
    tensors,
)

ADAPTER, PRETRAIN, LEGACY, ARTICLE = (
    IMAGEBIND / name for name in ("adapter.pth", "adapter_pretrain.pth", "adapter_legacy.pth", "bind_network.pth"))
NORMS = [path for _, path, _ in adapter.NORMS]
TINY_LLM = imagebind_llm.PRESETS["tiny"]
TINY_ADAPTER = llama_adapter.PRESETS["tiny"]


def token(cfg, injection):
    return dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, injection=injection))


FULL = imagebind_llm.with_phase(TINY_LLM, "finetune")
V2 = dataclasses.replace(TINY_ADAPTER, llm=dataclasses.replace(
    adapter.adapted(TINY_ADAPTER.llm, 3), new_gate=True))
V1 = dataclasses.replace(TINY_ADAPTER, clip=None, visual=None)
MODELS = {  # family, architecture, and what its adapter file holds
    "pretrain": ("imagebind_llm", TINY_LLM, adapter.imagebind_llm_entries(TINY_LLM, ())),
    "finetune": ("imagebind_llm", FULL, adapter.imagebind_llm_entries(FULL, NORMS)),
    "token": ("imagebind_llm", token(FULL, "layer"), adapter.imagebind_llm_entries(token(FULL, "layer"), NORMS)),
    "shared": ("imagebind_llm", token(TINY_LLM, "shared"),
               adapter.imagebind_llm_entries(token(TINY_LLM, "shared"), ())),
    "v1": ("llama_adapter", V1, adapter.llama_adapter_entries(V1, ())),
    "v2": ("llama_adapter", V2, adapter.llama_adapter_entries(V2, NORMS)),
}


# ---------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, dtype):
    assert_there_and_back(MODELS[name][2], dtype)


@pytest.mark.parametrize("name", MODELS)
def test_tables_fill_what_is_trained_exactly(name):
    """Every parameter but the towers' and the base's matrices."""
    family, cfg, entries = MODELS[name]
    base = {f"llm/layers/{part}/w" for part in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up",
                                                  "mlp/down")} | {"llm/embedding", "llm/head/w"}
    held = {entry.path: entry.shape for entry in entries}
    expected = {path: shape.shape for path, shape in shapes(family, cfg).items()
                if path not in base and not path.startswith(("imagebind/", "clip/"))}
    assert held == {path: shape for path, shape in expected.items() if path in held or path not in NORMS}


def test_keys_are_the_releases():
    held = {entry.path: entry.keys[0] for entry in MODELS["finetune"][2]}
    assert held["llm/layers/mlp/down/lora_a"] == "llama.layers.0.feed_forward.lora_w2_l1.weight"
    assert held["llm/layers/mlp/up/b"] == "llama.layers.0.feed_forward.w3.bias"
    assert held["llm/layers/mlp/gate/lora_b"] == "llama.layers.0.feed_forward.lora_w1_l2.weight"
    assert held["query"] == "prefix_query.weight" and held["bind/block_2/up/w"] == "image_bind_f3_2.weight"
    v1 = {entry.path: entry.keys for entry in MODELS["v1"][2]}
    assert v1 == {"query": ("adapter_query.weight",),
                  "llm/layers/attn/gate": tuple(f"layers.{n}.attention.gate" for n in range(TINY.depth))}


# ------------------------------------------------------------------------------------------------------ conversion


def test_card_and_tokenizer(adapted):
    card = described(adapted / "finetune")
    assert card["family"] == "imagebind_llm" and card["fresh"] == []
    assert card["text"] == dataclasses.asdict(TextConfig(
        ALPACA, ALPACA_INPUT, end_sym="</s>", joint=True, max_txt_len=512))
    assert card["generation"] == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert set(card["sources"]) == {"imagebind", "adapter", "words", "llm"}
    made = card["architecture"]
    assert made["query_layers"] == 4 and made["bind"]["hidden"] == 128 and made["imagebind"]["out"] == 24
    assert (made["llm"]["lora_rank"], made["llm"]["lora_alpha"], made["llm"]["lora_dropout"]) == (16, 16.0, 0.0)
    assert made["llm"]["bias_on"] == ["q", "o", "gate", "up", "down"] and made["llm"]["injection"] == "head"
    words = adapted / "finetune" / "tokenizer" / WORDS
    assert words.read_bytes() == (IMAGEBIND / "bpe_tiny.txt.gz").read_bytes()
    assert described(adapted / "pretrain")["architecture"]["llm"]["lora_rank"] == 0


def test_values(adapted):
    held, file = params(adapted / "finetune"), tensors(ADAPTER)
    np.testing.assert_array_equal(held["llm/layers/attn/gate"][3], file["llama.layers.3.attention.gate"][0, :, 0, 0])
    np.testing.assert_array_equal(held["query"][:, 0], file["prefix_query.weight"])
    np.testing.assert_array_equal(
        held["llm/layers/attn/o/lora_a"][1].reshape(32, 16), file["llama.layers.1.attention.lora_wo_l1.weight"].T)
    bias = file["llama.layers.2.attention.wq.bias"].reshape(4, 4, 2)  # heads, pairs, which of the pair
    np.testing.assert_array_equal(held["llm/layers/attn/q/b"][2], bias.swapaxes(1, 2).reshape(4, 8))
    np.testing.assert_array_equal(held["llm/layers/attn/v/lora_b"][0].reshape(16, 32),
                                  file["llama.layers.0.attention.lora_wv_l2.weight"].T)


def test_norms_take_the_bases_place(adapted):
    held, base = params(adapted / "finetune"), tensors(IMAGEBIND / "llama_meta" / "consolidated.00.pth")
    assert {path for path in held if path.startswith("replaced/")} == {f"replaced/{path}" for path in NORMS}
    np.testing.assert_array_equal(held["llm/norm/scale"], tensors(ADAPTER)["llama.norm.weight"])
    np.testing.assert_array_equal(held["replaced/llm/norm/scale"], base["norm.weight"])
    np.testing.assert_array_equal(held["replaced/llm/layers/mlp_norm/scale"][2], base["layers.2.ffn_norm.weight"])
    assert not any(path.startswith("replaced/") for path in params(adapted / "pretrain"))


def test_legacy(adapted):
    held = params(adapted / "legacy")
    assert described(adapted / "legacy")["architecture"]["bind"]["legacy"]
    np.testing.assert_array_equal(held["llm/norm/scale"], tensors(LEGACY)["llma.norm.weight"])
    assert {path for path in held if path.startswith("replaced/")} == {"replaced/llm/norm/scale"}


def test_what_a_bind_network_alone_leaves_fresh(adapted, tmp_path):
    card, held = described(adapted / "article"), params(adapted / "article")
    assert card["fresh"] == ["query", "llm/layers/attn/gate"] and card["architecture"]["query_layers"] == 4
    assert_same({path: held[path] for path in held if path.startswith("bind/")},
                {path: value for path, value in params(adapted / "pretrain").items() if path.startswith("bind/")})
    write.command("imagebind_llm")(out=tmp_path / "shared", **IMAGEBIND_LLM, adapter=ARTICLE, injection="token-shared")
    assert described(tmp_path / "shared")["fresh"] == ["llm/gate"]


def test_token_form_of_a_released_adapter(adapted):
    card, held = described(adapted / "token"), params(adapted / "token")
    assert card["fresh"] == ["llm/layers/gate"] and card["architecture"]["llm"]["injection"] == "layer"
    same = params(adapted / "finetune")
    assert_same(held, {path: same[path] for path in same if path not in ("query", "llm/layers/attn/gate")})


def test_nothing_to_start_from(tmp_path):
    arch = json.loads((IMAGEBIND / "config.json").read_text()) | {"query_layer": 3}
    (tmp_path / "arch.json").write_text(json.dumps(arch))
    write.command("imagebind_llm")(out=tmp_path / "out", **IMAGEBIND_LLM | {"arch": tmp_path / "arch.json"})
    card = described(tmp_path / "out")
    assert card["architecture"]["query_layers"] == 3 and card["architecture"]["bind"]["hidden"] == 128
    made = config_from_dict(imagebind_llm.ImageBindLLMConfig, card["architecture"])
    assert card["fresh"] == [entry.path for entry in adapter.imagebind_llm_entries(made, ())]
    assert not frozen_weights.metadata(tmp_path / "out" / "weights").keys() & set(card["fresh"])


def test_llama_adapters(adapted):
    v1, v2 = described(adapted / "v1"), described(adapted / "v2")
    assert (v1["architecture"]["query_layers"], v1["architecture"]["query_len"]) == (3, 5)
    assert v1["architecture"]["visual"] is None and not v1["architecture"]["llm"]["lora_rank"]
    assert (v2["architecture"]["query_layers"], v2["architecture"]["query_len"]) == (3, 4)
    assert v2["architecture"]["llm"]["new_gate"] and v2["architecture"]["llm"]["lora_rank"] == 2
    np.testing.assert_array_equal(params(adapted / "v1")["query"],
                                  tensors(ADAPTER_V1["adapter"])["adapter_query.weight"].reshape(3, 5, 32))


def test_llama_adapters_afresh(tmp_path):
    write.command("llama_adapter")(out=tmp_path / "v1", **ADAPTER_V1 | {"adapter": None}, raw_gates=True)
    card = described(tmp_path / "v1")
    assert card["fresh"] == ["query", "llm/layers/attn/gate"] and not card["architecture"]["llm"]["gate_tanh"]
    write.command("llama_adapter")(out=tmp_path / "v2", **ADAPTER_V2 | {"adapter": None})
    card = described(tmp_path / "v2")
    assert {path.split("/")[0] for path in card["fresh"]} == {"visual", "query", "llm"}
    assert (card["architecture"]["query_layers"], card["architecture"]["query_len"]) == (3, 4)


def test_the_same_from_a_transformers_folder(adapted, tmp_path):
    export(adapted / "finetune", "llama", tmp_path / "hf")
    write.command("imagebind_llm")(out=tmp_path / "out", **IMAGEBIND_LLM | {"llm": tmp_path / "hf"}, adapter=ADAPTER)
    assert_same(params(tmp_path / "out"), params(adapted / "finetune"))


def test_training_checkpoint(adapted, tmp_path):
    """The whole state dict, and what the training program needs to go on."""
    base = tensors(IMAGEBIND / "llama_meta_2shards" / "consolidated.00.pth")  # the shapes of what is left out are free
    base |= {key: value for key, value in tensors(IMAGEBIND / "llama_meta" / "consolidated.00.pth").items()
             if "norm" in key}
    whole = ({f"llama.{key}": value for key, value in base.items()} | tensors(ADAPTER)
             | {f"image_bind.{key}": value for key, value in tensors(IMAGEBIND / "imagebind.pth").items()})
    torch_file.save(tmp_path / "checkpoint-3.pth", {
        "model": whole, "optimizer": {"state": {0: {"step": 3.0}}, "param_groups": [{"lr": 1e-4}]}, "epoch": 3,
        "scaler": {}, "args": vars(argparse.Namespace(lr=None, output_dir="out"))})
    write.command("imagebind_llm")(out=tmp_path / "out", **IMAGEBIND_LLM, adapter=tmp_path / "checkpoint-3.pth")
    assert_same(params(tmp_path / "out"), params(adapted / "finetune"))


def test_command_line(adapted, tmp_path):
    options = [part for name, path in IMAGEBIND_LLM.items() for part in (f"--{name}", str(path))]
    cli.COMMANDS["convert"](["imagebind-llm", *options, "--adapter", str(PRETRAIN), "--out", str(tmp_path / "out")])
    assert_same(params(tmp_path / "out"), params(adapted / "pretrain"))
    options = [part for name, path in ADAPTER_V1.items() for part in (f"--{name}", str(path))]
    cli.COMMANDS["convert"](["llama-adapter", *options, "--out", str(tmp_path / "v1")])
    assert_same(params(tmp_path / "v1"), params(adapted / "v1"))


# -------------------------------------------------------------------------------------------------------- refusals


def test_everything_wrong_is_said_at_once(tmp_path):
    bad = edited(ADAPTER, tmp_path / "bad.pth", llama__layers__2__attention__gate=None, ema=np.zeros(3, np.float32),
                 llama__layers__1__attention__lora_wk_l2__weight=np.zeros((32, 8), np.float32),
                 llama__layers__0__ffn_norm__weight=None, llama__layers__3__attention__wk__bias=np.ones(32, np.float32),
                 llama__layers__0__feed_forward__w2__bias=np.zeros(32, np.float16))
    message = refused(tmp_path, write.command("imagebind_llm"), **IMAGEBIND_LLM, adapter=bad)
    for line in ("bad.pth: llama.layers.2.attention.gate is missing", "bad.pth: ema [3] is neither used nor known",
                 "lora_wk_l2.weight has shape [32, 8], expected [32, 16]",
                 "bad.pth: llama.layers.0.ffn_norm.weight is missing", "attention.wk.bias [32] is neither used",
                 "5 problems"):
        assert line in message


def test_lora_without_its_rank(tmp_path):
    changes = {f"llama__layers__{n}__attention__lora_wq_l1__weight": None for n in range(4)}
    bad = edited(ADAPTER, tmp_path / "bad.pth", **changes)
    message = refused(tmp_path, write.command("imagebind_llm"), **IMAGEBIND_LLM, adapter=bad)
    assert "without it the rank is unknown" in message


def test_files_that_do_not_belong_together(tmp_path):
    file = tensors(PRETRAIN)
    narrow = edited(PRETRAIN, tmp_path / "narrow.pth", image_bind_proj__weight=file["image_bind_proj.weight"][:, :20])
    message = refused(tmp_path, write.command("imagebind_llm"), **IMAGEBIND_LLM, adapter=narrow)
    assert "reads features of 20, but --imagebind makes features of 24" in message
    small = tmp_path / "small.pth"
    torch_file.save(small, {key: value[:16] if value.shape[0] == 32 else value[..., :16] for key, value in
                            tensors(ARTICLE).items() if key != "linear_0.weight"}
                    | {"linear_0.weight": tensors(ARTICLE)["linear_0.weight"][:16]})
    message = refused(tmp_path, write.command("imagebind_llm"), **IMAGEBIND_LLM, adapter=small)
    assert "makes vectors of 16, but --llm has a width of 32: these files do not belong together" in message
    tall = edited(PRETRAIN, tmp_path / "tall.pth", prefix_query__weight=np.zeros((6, 32), np.float32))
    arch = {"imagebind": json.loads((IMAGEBIND / "config.json").read_text())["imagebind"]}
    (tmp_path / "arch.json").write_text(json.dumps(arch))
    assert "injects into 6 layers, but --llm has only 4" in refused(
        tmp_path, write.command("imagebind_llm"), **IMAGEBIND_LLM | {"arch": tmp_path / "arch.json"}, adapter=tall)


@pytest.mark.parametrize("function, arguments, said", [
    (write.command("imagebind_llm"), IMAGEBIND_LLM | {"adapter": ADAPTER_V2["adapter"]},
     "it is LLaMA-Adapter's. Convert it"),
    (write.command("llama_adapter"), ADAPTER_V1 | {"adapter": ADAPTER},
     "It is ImageBind-LLM's: convert it with imagebind-llm"),
    (write.command("llama_adapter"), ADAPTER_V2 | {"adapter": ADAPTER_V1["adapter"]}, "v1's, which reads no images"),
    (write.command("llama_adapter"), ADAPTER_V2 | {"clip": None}, "v2's, which reads images: give its CLIP as --clip"),
    (write.command("imagebind_llm"), IMAGEBIND_LLM | {"adapter": IMAGEBIND / "imagebind.pth"},
     "imagebind.pth is ImageBind; it was given as --adapter. Give it as --imagebind."),
    (write.command("imagebind_llm"), IMAGEBIND_LLM | {"injection": "tokens"},
     "expected one of released, token, token-shared"),
    (write.command("llama_adapter"), ADAPTER_V1 | {"llm": IMAGEBIND}, "is it a LLaMA's config.json?"),
])
def test_the_wrong_file(tmp_path, function, arguments, said):
    assert said in refused(tmp_path, function, **arguments)


def test_gates_of_the_token_form_in_the_released_one(tmp_path):
    bad = edited(PRETRAIN, tmp_path / "bad.pth", gate=np.zeros(4, np.float32))
    assert "gate [4] is neither used nor known" in refused(
        tmp_path, write.command("imagebind_llm"), **IMAGEBIND_LLM, adapter=bad)


@pytest.mark.parametrize("change, said", [
    ({"query_layers": 4}, "unknown 'query_layers'; did you mean 'query_layer'?"),
    ({"query_layer": 3}, "prefix_query.weight has 4 rows; expected 3 layers of 1 prompts"),
    ({"query_layer": "4"}, "query_layer is '4', expected a whole number above 0"),
    ({"query_len": 2}, "query_len is 2; ImageBind-LLM has one prompt per layer"),
    ({"image_dim": 25}, "image_dim is 25, but the bind network's is 24"),
    ({"bind_hidden": 64}, "bind_hidden is 64, but the bind network's is 128"),
    ({"imagebind": 3}, "imagebind is 3, expected a table of fields"),
])
def test_arch_of_imagebind_llm(tmp_path, change, said):
    arch = json.loads((IMAGEBIND / "config.json").read_text()) | change
    (tmp_path / "arch.json").write_text(json.dumps(arch))
    arguments = IMAGEBIND_LLM | {"arch": tmp_path / "arch.json", "adapter": ADAPTER}
    assert said in refused(tmp_path, write.command("imagebind_llm"), **arguments)


@pytest.mark.parametrize("arguments, part, change, said", [
    (ADAPTER_V1, "adapter_v1", {"adapter_length": 5}, "unknown 'adapter_length'; did you mean"),
    (ADAPTER_V1, "adapter_v1", {"adapter_len": 0}, "adapter_v1.adapter_len is 0, expected a whole number above 0"),
    (ADAPTER_V1, "adapter_v1", {"adapter_len": 4}, "adapter_query.weight has 15 rows; expected 3 layers of 4 prompts"),
    (ADAPTER_V2, "adapter_v2", {"query_layer": 2}, "adapter_query.weight has 12 rows; expected 2 layers of 4 prompts"),
    (ADAPTER_V2, "adapter_v2", {"query_len": 3}, "query_len is 3, but the adapter's tensors say 4"),
    (ADAPTER_V2, "adapter_v2", {"lora_rank": 4}, "lora_rank is 4, but the adapter's tensors say 2"),
    (ADAPTER_V2, "adapter_v2", {"query_layer": "3"}, "query_layer is '3', expected a whole number above 0"),
])
def test_arch_of_llama_adapter(tmp_path, arguments, part, change, said):
    arch = json.loads((IMAGEBIND / "config.json").read_text())
    (tmp_path / "arch.json").write_text(json.dumps(arch | {part: arch[part] | change}))
    assert said in refused(tmp_path, write.command("llama_adapter"), **arguments | {"arch": tmp_path / "arch.json"})


def test_words_that_do_not_fit(tmp_path):
    few = tmp_path / "few.txt.gz"
    few.write_bytes(gzip.compress(b"header\na b\nc d\n"))
    for words, said in ((few, "holds 2 merges, but the text tower's 604 tokens need 90"),
                        (ADAPTER, "cannot be read as a gzip file of merges"),
                        (tmp_path / "none.gz", "No such file")):
        assert said in refused(tmp_path, write.command("imagebind_llm"), **IMAGEBIND_LLM, words=words)
    blind = edited(IMAGEBIND_LLM["imagebind"], tmp_path / "blind.pth", **{
        key.replace(".", "__"): None for key in tensors(IMAGEBIND_LLM["imagebind"]) if ".text." in key})
    message = refused(tmp_path, write.command("imagebind_llm"), **IMAGEBIND_LLM | {"imagebind": blind},
                      words=IMAGEBIND / "bpe_tiny.txt.gz")
    assert "was given as --words, but ImageBind's file has no text tower" in message
