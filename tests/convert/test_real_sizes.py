"""Files of the released sizes, by name and shape alone: recognised without --arch, and every parameter is filled.

The names and shapes stand here once more, apart from the tables, as the released files have them (the reference's
section 8); no number is read or written.
"""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from mmjax import trees
from mmjax.convert import convert, llama, torch_file
from mmjax.convert.tables import Computed
from mmjax.families import config_from_dict, shapes
from mmjax.families.minigpt4 import PRESETS, Config
from tests.convert.released import CKPT


def eva_vit():
    D, F = 1408, 6144
    block = {
        "norm1.weight": (D,), "norm1.bias": (D,), "attn.q_bias": (D,), "attn.v_bias": (D,),
        "attn.qkv.weight": (3 * D, D), "attn.proj.weight": (D, D), "attn.proj.bias": (D,), "norm2.weight": (D,),
        "norm2.bias": (D,), "mlp.fc1.weight": (F, D), "mlp.fc1.bias": (F,), "mlp.fc2.weight": (D, F),
        "mlp.fc2.bias": (D,)}
    return {
        "cls_token": (1, 1, D), "pos_embed": (1, 257, D), "patch_embed.proj.weight": (D, 3, 14, 14),
        "patch_embed.proj.bias": (D,), "norm.weight": (D,), "norm.bias": (D,), "head.weight": (1024, D),
        "head.bias": (1024,),
        **{f"blocks.{i}.{name}": shape for i, (name, shape) in itertools.product(range(40), block.items())}}


def norm(name, size):
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def blip2():
    """With the text branch that some releases have and the projection to T5 that others have."""
    D, E, F, V = 768, 1408, 3072, 30523
    bert = "Qformer.bert."
    held = {"query_tokens": (1, 32, D), "temp": (), bert + "embeddings.position_ids": (1, 512),
            bert + "embeddings.word_embeddings.weight": (V, D),
            bert + "embeddings.position_embeddings.weight": (512, D), "Qformer.cls.predictions.bias": (V,)}
    held |= norm("ln_vision", E) | norm(bert + "embeddings.LayerNorm", D)
    held |= linear("t5_proj", D, 2048) | linear("vision_proj", D, 256) | linear("text_proj", D, 256)
    held |= linear("itm_head", D, 2) | linear("Qformer.cls.predictions.transform.dense", D, D)
    held |= norm("Qformer.cls.predictions.transform.LayerNorm", D) | linear("Qformer.cls.predictions.decoder", D, V)
    for i in range(12):
        layer = f"{bert}encoder.layer.{i}."
        for kind, width in [("attention", D)] + [("crossattention", E)] * (i % 2 == 0):
            held |= linear(f"{layer}{kind}.self.query", D, D) | linear(f"{layer}{kind}.self.key", width, D)
            held |= linear(f"{layer}{kind}.self.value", width, D) | linear(f"{layer}{kind}.output.dense", D, D)
            held |= norm(f"{layer}{kind}.output.LayerNorm", D)
        for branch in ("", "_query"):
            held |= linear(f"{layer}intermediate{branch}.dense", D, F) | linear(f"{layer}output{branch}.dense", F, D)
            held |= norm(f"{layer}output{branch}.LayerNorm", D)
    return held


LLAMA_1 = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "silu", "model_type": "llama",
           "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "vocab_size": 32000}
LLAMA_CONFIGS = {
    "7b": LLAMA_1 | {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
                     "num_hidden_layers": 32},
    "13b": LLAMA_1 | {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40,
                      "num_hidden_layers": 40},
}
LLAMA_CONFIGS["llama2-7b"] = LLAMA_CONFIGS["7b"] | {
    "max_position_embeddings": 4096, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
    "rope_scaling": None}


def language_model(config):
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    held = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        held |= {f"{layer}self_attn.{name}_proj.weight": (D, D) for name in "qkvo"}
        held |= {f"{layer}mlp.{name}_proj.weight": (F, D) for name in ("gate", "up")}
        held |= {f"{layer}mlp.down_proj.weight": (D, F), f"{layer}self_attn.rotary_emb.inv_freq": (64,),
                 f"{layer}input_layernorm.weight": (D,), f"{layer}post_attention_layernorm.weight": (D,)}
    return held


def lora():
    name = "llama_model.base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
    return {name.format(i, which, side): shape for i in range(32) for which in "qv"
            for side, shape in (("A", (64, 4096)), ("B", (4096, 64)))}


def projector(inputs, outputs):
    return {"llama_proj.weight": (outputs, inputs), "llama_proj.bias": (outputs,),
            "Qformer.bert.embeddings.position_ids": (1, 512)}


RELEASES = {  # language model, trained checkpoint, has a Q-Former, has LoRA
    "minigpt4-7b": ("7b", projector(768, 4096), True, False),
    "minigpt4-13b": ("13b", projector(768, 5120), True, False),
    "minigpt4-llama2-7b": ("llama2-7b", projector(5632, 4096), False, False),
    "minigpt-v2-7b": ("llama2-7b", projector(5632, 4096) | lora(), False, True),
}


def unread(held, dtype):
    """Tensors that only their shapes are known of; norm scales alone are looked at (is it a delta?)."""
    return {key: Computed(key, shape, dtype, lambda shape=shape: np.ones(shape, dtype)) for key, shape in held.items()}


@pytest.mark.parametrize("preset", RELEASES)
def test_release_is_recognised_and_fills_the_model(tmp_path, monkeypatch, preset):
    size, trained, has_qformer, has_lora = RELEASES[preset]
    files = {
        "eva_vit_g.pth": unread(eva_vit(), np.float16),
        "blip2_pretrained_flant5xxl.pth": {"model": unread(blip2(), np.float32)},
        "pytorch_model.bin": unread(language_model(LLAMA_CONFIGS[size]), np.float16),
        "checkpoint.pth": {"model": unread(trained, np.float32), "optimizer": {}, "config": {}, "scaler": None,
                           "epoch": 3},
    }
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(LLAMA_CONFIGS[size]))
    (tmp_path / "llama" / "tokenizer.model").write_bytes((CKPT / "llama_hf" / "tokenizer.model").read_bytes())
    paths = {name: tmp_path / ("llama" if name == "pytorch_model.bin" else "") / name for name in files}
    for path in paths.values():
        path.touch()
    written = {}
    monkeypatch.setattr(torch_file, "load", lambda path: files[path.name])
    monkeypatch.setattr(llama.Tokenizer, "from_folder", lambda folder: SimpleNamespace(vocab_size=32_000))
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    monkeypatch.setattr(convert.weights, "save", lambda folder, parameters, progress: written.update(parameters))

    checkpoint = paths["checkpoint.pth"]
    convert.minigpt4(
        paths["eva_vit_g.pth"], tmp_path / "llama", tmp_path / "out", projector=checkpoint,
        qformer=paths["blip2_pretrained_flant5xxl.pth"] if has_qformer else None, lora=checkpoint if has_lora else None)

    card = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config_from_dict(Config, card["architecture"]) == PRESETS[preset]
    assert card["fresh"] == [] and bool(card["constant"]) != has_qformer
    assert card["architecture"]["vit"]["image_size"] == (448 if has_lora else 224)
    assert not trees.compare(shapes("minigpt4", PRESETS[preset]), written)
