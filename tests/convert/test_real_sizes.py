"""Files of the released sizes, by name and shape alone: recognised without --arch, and every parameter is filled.

The names and shapes stand here once more, apart from the tables, as the released files have them (the reference's
section 8, and 13 of ImageBind-LLM's); no number is read or written.
"""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from mmjax import trees
from mmjax.convert import adapter as adapter_source
from mmjax.convert import imagebind, llama_adapter, torch_file, vocabulary, write
from mmjax.convert.tables import Computed
from mmjax.families import config_from_dict, imagebind_llm, shapes
from mmjax.families import llama_adapter as adapters
from mmjax.families.minigpt4 import PRESETS, MiniGPT4Config
from mmjax.models.bind import BindConfig
from mmjax.models.clip import CLIP_VIT_L14
from mmjax.models.imagebind import IMAGEBIND_HUGE
from mmjax.models.llama import LLAMA_13B
from mmjax.models.visual import VISUAL_7B
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


@pytest.fixture
def released(tmp_path, monkeypatch):
    """Makes files of {name: content} that only the converter's readers see; what would be written is {path: shape}."""
    files, written = {}, {}

    def place(found, folder=tmp_path):
        files.update(found)
        for name in found:
            (folder / name).write_bytes(b"PK\3\4")
        return [folder / name for name in found]

    monkeypatch.setattr(torch_file, "load", lambda path, members=(): files[path.name])
    small = vocabulary.Tokenizer.from_folder(CKPT / "llama_hf")
    small.vocab_size = 32_000
    monkeypatch.setattr(vocabulary.Tokenizer, "from_folder", lambda folder: small)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    monkeypatch.setattr(write.frozen_weights, "save", lambda folder, parameters, progress: written.update(parameters))
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "tokenizer.model").write_bytes((CKPT / "llama_hf" / "tokenizer.model").read_bytes())
    return SimpleNamespace(place=place, written=written, folder=tmp_path)


@pytest.mark.parametrize("preset", RELEASES)
def test_release_is_recognised_and_fills_the_model(released, preset):
    size, trained, has_qformer, has_lora = RELEASES[preset]
    vit, qformer, checkpoint = released.place({
        "eva_vit_g.pth": unread(eva_vit(), np.float16),
        "blip2_pretrained_flant5xxl.pth": {"model": unread(blip2(), np.float32)},
        "checkpoint.pth": {"model": unread(trained, np.float32), "optimizer": {}, "config": {}, "scaler": None,
                           "epoch": 3},
    })
    folder = released.folder / "llama"
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIGS[size]))
    released.place({"pytorch_model.bin": unread(language_model(LLAMA_CONFIGS[size]), np.float16)}, folder)

    write.command("minigpt4")(vit, folder, released.folder / "out", projector=checkpoint,
                              qformer=qformer if has_qformer else None, lora=checkpoint if has_lora else None)

    card = json.loads((released.folder / "out" / "config.json").read_text())
    assert config_from_dict(MiniGPT4Config, card["architecture"]) == PRESETS[preset]
    assert card["fresh"] == [] and bool(card["constant"]) != has_qformer
    assert card["architecture"]["vit"]["image_size"] == (448 if has_lora else 224)
    assert not trees.compare(shapes("minigpt4", PRESETS[preset]), released.written)


# ------------------------------------------------------------------------------ ImageBind-LLM and LLaMA-Adapter


META = {  # dim, feed-forward, layers, heads, shards
    "7b": (4_096, 11_008, 32, 32, 1),
    "13b": (5_120, 13_824, 40, 40, 2),
}


def meta_shard(size):
    D, F, layers, _, parts = META[size]
    held = {"tok_embeddings.weight": (32_000, D // parts), "output.weight": (32_000 // parts, D), "norm.weight": (D,),
            "rope.freqs": (64,)}
    for i in range(layers):
        layer = f"layers.{i}."
        held |= {f"{layer}attention.w{name}.weight": (D // parts, D) for name in "qkv"}
        held |= {f"{layer}feed_forward.w{name}.weight": (F // parts, D) for name in "13"}
        held |= {f"{layer}attention.wo.weight": (D, D // parts), f"{layer}feed_forward.w2.weight": (D, F // parts),
                 f"{layer}attention_norm.weight": (D,), f"{layer}ffn_norm.weight": (D,),
                 f"{layer}attention.inner_attention.rope.freqs": (64,)}
    return held


def place_meta(released, size):
    D, _, layers, heads, parts = META[size]
    folder = released.folder / "llama"
    (folder / "params.json").write_text(json.dumps({
        "dim": D, "multiple_of": 256, "n_heads": heads, "n_layers": layers, "norm_eps": 1e-6, "vocab_size": -1}))
    released.place({f"consolidated.{n:02}.pth": unread(meta_shard(size), np.float16) for n in range(parts)}, folder)
    return folder


def pretrained(size):
    D, _, layers, heads, _ = META[size]
    held = {"image_bind_proj.weight": (D, 1_024), "image_bind_proj.bias": (D,), "prefix_query.weight": (32, D)}
    for i in (1, 2, 3):
        held |= {f"image_bind_norm_{i}.weight": (D,), f"image_bind_f1_{i}.weight": (4 * D, D),
                 f"image_bind_f3_{i}.weight": (4 * D, D), f"image_bind_f2_{i}.weight": (D, 4 * D)}
    return held | {f"llama.layers.{i}.attention.gate": (1, heads, 1, 1) for i in range(layers)}


def finetuned(size, lora=16):
    D, F, layers, _, _ = META[size]
    held = {"llama.norm.weight": (D,)}
    for i in range(layers):
        attn, ff = f"llama.layers.{i}.attention", f"llama.layers.{i}.feed_forward"
        held |= {f"{attn}.w{name}.bias": (D,) for name in "qo"}
        held |= {f"{ff}.w1.bias": (F,), f"{ff}.w3.bias": (F,), f"{ff}.w2.bias": (D,), f"{attn}_norm.weight": (D,),
                 f"llama.layers.{i}.ffn_norm.weight": (D,)}
        for name, (inputs, outputs) in {f"{attn}.lora_wq": (D, D), f"{attn}.lora_wk": (D, D),
                                        f"{attn}.lora_wv": (D, D), f"{attn}.lora_wo": (D, D),
                                        f"{ff}.lora_w1": (D, F), f"{ff}.lora_w3": (D, F),
                                        f"{ff}.lora_w2": (F, D)}.items() if lora else ():
            held |= {f"{name}_l1.weight": (lora, inputs), f"{name}_l2.weight": (outputs, lora)}
    return held


def expected_llm(size, phase):
    if size == "7b":
        return imagebind_llm.with_phase(imagebind_llm.PRESETS["imagebind-llm-7b"], phase)
    base = imagebind_llm.ImageBindLLMConfig(bind=BindConfig(1_024, 5_120, 20_480),
                                            llm=dataclasses.replace(LLAMA_13B, injection="head"))
    return imagebind_llm.with_phase(base, phase)


def elements(shapes):
    return sum(int(np.prod(shape)) for shape in shapes)


@pytest.mark.parametrize("size", META)
@pytest.mark.parametrize("phase", ["pretrain", "finetune"])
def test_imagebind_llm_of_real_sizes(released, size, phase):
    towers = {entry.keys[n]: entry.key_shape for entry in imagebind.entries(IMAGEBIND_HUGE)
              for n in range(len(entry.keys))} | {imagebind.MASK: (77, 77), "point_trunk.blocks.0.norm.weight": (384,)}
    held = pretrained(size) | (finetuned(size) if phase == "finetune" else {})
    towers, adapter = released.place({"imagebind_w3D.pth": unread(towers, np.float32),
                                      "7B.pth": {"model": unread(held, np.float32)}})
    write.command("imagebind_llm")(towers, place_meta(released, size), released.folder / "out", adapter=adapter)
    card = json.loads((released.folder / "out" / "config.json").read_text())
    expected = expected_llm(size, phase)
    assert config_from_dict(imagebind_llm.ImageBindLLMConfig, card["architecture"]) == expected and card["fresh"] == []
    replaced = {path for path in released.written if path.startswith("replaced/")}
    assert len(replaced) == (3 if phase == "finetune" else 0)
    assert not trees.compare(shapes("imagebind_llm", expected),
                             {path: leaf for path, leaf in released.written.items() if path not in replaced})


def test_parameters_of_the_phases_at_7b():
    """The reference's counts, section 8."""
    assert elements(pretrained("7b").values()) == 608_190_464 + 131_072 + 1_024
    assert elements(finetuned("7b").values()) == 41_340_928


def place_v1(released):
    gates = {f"layers.{i}.attention.gate": (1, 32, 1, 1) for i in range(32)}
    return released.place({"v1.pth": unread({"adapter_query.weight": (300, 4_096)} | gates, np.float32)})[0]


def visual():
    D, F = VISUAL_7B.dim, VISUAL_7B.hidden
    held = linear("clip_proj", 768, D) | norm("clip_proj_norm", D) | linear("visual_proj", D, 4_096)
    held |= norm("visual_proj_norm", 4_096) | {"visual_query.weight": (10, D)}
    for i in range(VISUAL_7B.depth):
        block = f"visual_blocks.{i}."
        held |= norm(f"{block}norm1", D) | norm(f"{block}norm2", D) | linear(f"{block}attn.qkv", D, 3 * D)
        held |= linear(f"{block}attn.proj", D, D) | linear(f"{block}mlp.fc1", D, F) | linear(f"{block}mlp.fc2", F, D)
    return held


@pytest.mark.parametrize("version", ["v1", "v2", "v2 with LoRA"])
def test_llama_adapter_of_real_sizes(released, version):
    if version == "v1":
        adapter, clip, expected = place_v1(released), None, adapters.PRESETS["llama-adapter-7b"]
    else:
        lora = 16 if version == "v2 with LoRA" else 0
        held = visual() | {"adapter_query.weight": (310, 4_096)} | finetuned("7b", lora)
        held |= {f"llama.layers.{i}.attention.gate": (1, 32, 1, 1) for i in range(32)}
        held |= {f"llama.layers.{i}.attention.new_gate": (1, 1, 1, 1) for i in range(32)} if lora else {}
        tower = {entry.keys[n]: entry.key_shape for entry in llama_adapter.clip_entries(CLIP_VIT_L14)
                 for n in range(len(entry.keys))}
        adapter, clip = released.place({"v2.pth": {"model": unread(held, np.float32), "config": {"w_bias": True}},
                                        "ViT-L-14.pth": unread(tower, np.float16)})
        expected = adapters.with_phase(adapters.PRESETS["llama-adapter-v2-7b"], "finetune")
        if lora:
            expected = dataclasses.replace(expected, llm=dataclasses.replace(
                adapter_source.adapted(expected.llm, lora), new_gate=True))
    write.command("llama_adapter")(place_meta(released, "7b"), released.folder / "out", adapter=adapter, clip=clip)
    card = json.loads((released.folder / "out" / "config.json").read_text())
    assert config_from_dict(adapters.LlamaAdapterConfig, card["architecture"]) == expected and card["fresh"] == []
    written = {path: leaf for path, leaf in released.written.items() if not path.startswith("replaced/")}
    assert not trees.compare(shapes("llama_adapter", expected), written)
