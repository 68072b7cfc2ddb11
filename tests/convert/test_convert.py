import dataclasses
import hashlib
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from mmjax.checkpoints import frozen as frozen_weights
from mmjax.checkpoints import storage
from mmjax.config import TextConfig
from mmjax.convert import minigpt4, torch_file, write
from mmjax.convert.lazy import WeightFileError
from mmjax.convert.tables import Computed, Problems
from tests.convert.released import (
    ARCH,
    CKPT,
    MINIGPT4,
    NO_QFORMER,
    V2,
    assert_same,
    described,
    edited,
    llama_folder,
    llama_tensors,
    params,
    refused,
    tensors,
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The golden set's three models."""
    folder = tmp_path_factory.mktemp("converted")
    for name, arguments in {"minigpt4": MINIGPT4, "no_qformer": NO_QFORMER, "v2": V2}.items():
        write.command("minigpt4")(out=folder / name, **arguments)
    return folder


# ----------------------------------------------------------------------------------------------- what comes out


def test_folder(converted):
    out = converted / "minigpt4"
    assert {path.name for path in out.iterdir()} == {"weights", "config.json", "tokenizer"}
    assert {path.name for path in converted.iterdir()} == {"minigpt4", "no_qformer", "v2"}
    for file in (out / "tokenizer").iterdir():
        assert file.read_bytes() == (CKPT / "llama_hf" / file.name).read_bytes()
    config = described(out)
    assert config["family"] == "minigpt4" and config["fresh"] == [] and config["constant"] == {}
    assert config["architecture"]["vit"]["heads"] == 4 and config["architecture"]["vit"]["image_size"] == 56
    assert config["architecture"]["qformer"]["cross_every"] == 2
    assert config["generation"] == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert config["text"]["prompt_template"] == ""
    vit = (CKPT / "eva_vit.pth").read_bytes()
    assert config["sources"]["vit"] == {
        "file": "eva_vit.pth", "bytes": len(vit), "sha256": hashlib.sha256(vit).hexdigest()}
    assert [file["file"] for file in config["sources"]["llm"]] == [
        "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]


def test_values_and_dtypes(converted):
    held, vit, blip2 = params(converted / "minigpt4"), tensors(MINIGPT4["vit"]), tensors(MINIGPT4["qformer"])
    assert held["vit/pos"].shape == (17, 64) and held["vit/pos"].dtype == vit["pos_embed"].dtype
    np.testing.assert_array_equal(held["vit/pos"], vit["pos_embed"][0])
    np.testing.assert_array_equal(held["vit/blocks/mlp/fc1/w"][1], vit["blocks.1.mlp.fc1.weight"].T)
    np.testing.assert_array_equal(held["ln_vision/bias"], blip2["ln_vision.bias"])
    np.testing.assert_array_equal(held["qformer/layer_2/cross/o/w"].reshape(48, 48),
                                  blip2["Qformer.bert.encoder.layer.2.crossattention.output.dense.weight"].T)
    assert held["llm/embedding"].dtype == np.float16
    np.testing.assert_array_equal(held["llm/head/w"], llama_tensors()["lm_head.weight"].T)


def test_without_qformer(converted):
    config, held = described(converted / "no_qformer"), params(converted / "no_qformer")
    assert config["architecture"]["qformer"] is None
    assert config["constant"] == {"ln_vision/scale": 1.0, "ln_vision/bias": 0.0}
    assert held["projector/w"].shape == (256, 64)
    assert (held["ln_vision/scale"] == 1).all() and (held["ln_vision/bias"] == 0).all()


def test_v2(converted):
    config, held = described(converted / "v2"), params(converted / "v2")
    assert config["architecture"]["vit"]["image_size"] == 84
    assert (config["architecture"]["llm"]["lora_rank"], config["architecture"]["llm"]["lora_alpha"]) == (4, 16.0)
    assert config["text"] == dataclasses.asdict(TextConfig(end_sym="</s>", max_txt_len=1024))
    key = "llama_model.base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight"
    np.testing.assert_array_equal(held["llm/layers/attn/v/lora_b"][2].reshape(4, 64), tensors(V2["lora"])[key].T)


def test_other_spellings_give_the_same(converted, tmp_path):
    newer = CKPT / "minigpt_v2_newer_peft_keys.pth"
    write.command("minigpt4")(out=tmp_path / "out", **V2 | {
        "llm": CKPT / "llama_hf_safetensors", "lora": str(newer), "projector": V2["projector"].parent / ".." / "ckpt"
        / "minigpt_v2_newer_peft_keys.pth"})
    assert_same(params(tmp_path / "out"), params(converted / "v2"))


def test_fresh_parts(tmp_path):
    write.command("minigpt4")(out=tmp_path / "out", **MINIGPT4 | {"projector": None, "qformer": None, "lora_rank": 4})
    fresh = described(tmp_path / "out")["fresh"]
    assert set(fresh) == {"projector/w", "projector/b", *(
        f"llm/layers/attn/{which}/lora_{side}" for which in "qv" for side in "ab")}
    assert not frozen_weights.metadata(tmp_path / "out" / "weights").keys() & set(fresh)


def test_one_safetensors_file_is_enough(tmp_path, converted):
    from safetensors.numpy import save_file

    folder = llama_folder(tmp_path / "llama", {})
    (folder / "pytorch_model.bin").unlink()
    save_file(llama_tensors(), folder / "model.safetensors")
    write.command("llama")(folder, tmp_path / "out")
    expected = {path: array for path, array in params(converted / "minigpt4").items() if path.startswith("llm/")}
    assert_same(params(tmp_path / "out"), expected)
    assert described(tmp_path / "out")["family"] == "llama"


def grouped_tied(dtype=np.float16):
    rng = np.random.default_rng(1)
    held = {key: array.astype(dtype) for key, array in llama_tensors().items()}
    for layer in range(3):
        for name in "kv":
            held[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = rng.normal(size=(32, 64)).astype(dtype)
    del held["lm_head.weight"]
    return held


def test_grouped_tied_bfloat16_and_new_rope_spelling(tmp_path):
    folder = llama_folder(
        tmp_path / "llama", grouped_tied(ml_dtypes.bfloat16), num_key_value_heads=2, tie_word_embeddings=True,
        rope_parameters={"rope_theta": 1e5, "rope_type": "default"}, rms_norm_eps=1e-5)
    write.command("llama")(folder, tmp_path / "out")
    cfg = described(tmp_path / "out")["architecture"]["llm"]
    assert (cfg["kv_heads"], cfg["tied"], cfg["rope_theta"], cfg["eps"]) == (2, True, 1e5, 1e-5)
    held = params(tmp_path / "out")
    assert "llm/head/w" not in held
    assert held["llm/layers/attn/k/w"].shape == (3, 64, 2, 16)
    assert held["llm/layers/attn/k/w"].dtype == ml_dtypes.bfloat16


def test_old_rope_spelling(tmp_path):
    folder = llama_folder(tmp_path / "llama", llama_tensors(), rope_theta=5e5, rope_scaling=None)
    write.command("llama")(folder, tmp_path / "out")
    assert described(tmp_path / "out")["architecture"]["llm"]["rope_theta"] == 5e5


def test_a_tied_head_may_be_stored_if_it_is_equal(tmp_path):
    held = llama_tensors() | {"lm_head.weight": llama_tensors()["model.embed_tokens.weight"]}
    write.command("llama")(llama_folder(tmp_path / "equal", held, tie_word_embeddings=True), tmp_path / "out")
    assert "llm/head/w" not in params(tmp_path / "out")
    other = llama_folder(tmp_path / "other", llama_tensors(), tie_word_embeddings=True)
    shutil.rmtree(tmp_path / "out")
    assert "lm_head.weight is not the same" in refused(tmp_path, write.command("llama"), llm=other)


@pytest.mark.parametrize("generation, expected", [
    ({"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}, (0, 1, 1)),
    ({"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": None}, (1, [2, 5], 2)),
    ({"bos_token_id": 1, "eos_token_id": [2, 600], "pad_token_id": 0}, (1, [2], 0)),
    ({"bos_token_id": None, "eos_token_id": [], "pad_token_id": -1}, (0, 1, 1)),
    ({"bos_token_id": "1", "eos_token_id": True}, (0, 1, 1)),
    ({}, (0, 1, 1)),
    (None, (0, 1, 1))])
def test_generation_ids(tmp_path, generation, expected):
    folder = llama_folder(tmp_path / "llama", llama_tensors(), bos_token_id=0, eos_token_id=1, pad_token_id=-1)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    write.command("llama")(folder, tmp_path / "out")
    assert tuple(described(tmp_path / "out")["generation"].values()) == expected


@pytest.mark.parametrize("v2, image_size", [(False, 224), (True, 448)])
def test_released_sizes_need_no_arch(v2, image_size):
    shapes = {"patch_embed.proj.weight": (1408, 3, 14, 14), "pos_embed": (1, 257, 1408),
              "blocks.0.mlp.fc1.weight": (6144, 1408)}
    held = {key: Computed(key, shape, np.float16, None) for key, shape in shapes.items()}
    problems, arch = Problems(), minigpt4.read_arch(None, Problems())
    cfg = minigpt4.vit_config(held, arch, v2, problems)
    assert not problems
    assert cfg == minigpt4.VitConfig(image_size=image_size)
    shapes = {"query_tokens": (1, 32, 768)} | {
        f"Qformer.bert.encoder.layer.{i}.intermediate_query.dense.weight": (3072, 768) for i in range(12)}
    held = {key: Computed(key, shape, np.float32, None) for key, shape in shapes.items()}
    assert minigpt4.qformer_config(held, arch, problems) == minigpt4.QFormerConfig() and not problems


# ----------------------------------------------------------------------------------------------------------- delta


@pytest.fixture
def delta():
    rng = np.random.default_rng(2)
    return {key: (1e-3 * rng.normal(size=array.shape)).astype(np.float16) for key, array in llama_tensors().items()}


def test_delta(tmp_path, delta):
    folder = llama_folder(tmp_path / "delta", delta)
    write.command("llama")(CKPT / "llama_hf_safetensors", tmp_path / "out", delta=folder)
    merged = {key: array + delta[key] for key, array in llama_tensors().items()}
    write.command("llama")(llama_folder(tmp_path / "merged", merged), tmp_path / "expected")
    assert_same(params(tmp_path / "out"), params(tmp_path / "expected"))
    assert len(described(tmp_path / "out")["sources"]["llm"]) == 3


def test_delta_may_add_words(tmp_path, delta):
    base, grown = llama_tensors(), ("model.embed_tokens.weight", "lm_head.weight")
    for key in grown:
        delta[key] = np.concatenate([delta[key], np.full((1, 64), 0.25, np.float16)])
    folder = llama_folder(tmp_path / "delta", delta, vocab_size=601)
    (folder / "added_tokens.json").write_text('{"[PAD]": 600}')
    write.command("llama")(CKPT / "llama_hf", tmp_path / "out", delta=folder)
    held = params(tmp_path / "out")
    assert described(tmp_path / "out")["architecture"]["llm"]["vocab"] == 601
    assert (tmp_path / "out" / "tokenizer" / "added_tokens.json").exists()
    np.testing.assert_array_equal(held["llm/embedding"][:600], base[grown[0]] + delta[grown[0]][:600])
    np.testing.assert_array_equal(held["llm/embedding"][600], delta[grown[0]][600])
    np.testing.assert_array_equal(held["llm/head/w"][:, 600], delta[grown[1]][600])


def test_delta_must_fit(tmp_path, delta):
    del delta["model.norm.weight"]
    delta["model.extra"] = np.zeros(3, np.float16)
    delta["model.layers.1.mlp.up_proj.weight"] = np.zeros((7, 64), np.float16)
    folder = llama_folder(tmp_path / "delta", delta)
    message = refused(tmp_path, write.command("llama"), llm=CKPT / "llama_hf", delta=folder)
    assert "model.norm.weight is in llama_hf but not in the delta" in message
    assert "model.extra is in the delta delta but not in llama_hf" in message
    assert "model.layers.1.mlp.up_proj.weight has shape [172, 64] in llama_hf but [7, 64] in the delta" in message


def test_delta_alone_is_no_model_and_a_model_is_no_delta(tmp_path, delta):
    folder = llama_folder(tmp_path / "weights", delta)
    assert "holds a delta, not a model" in refused(tmp_path, write.command("llama"), llm=folder)
    message = refused(tmp_path, write.command("llama"), llm=CKPT / "llama_hf", delta=CKPT / "llama_hf")
    assert "given as --delta, but it holds a whole model" in message


# -------------------------------------------------------------------------------------------------------- refusals


def test_all_offenders_of_all_files_at_once(tmp_path):
    vit = edited(MINIGPT4["vit"], tmp_path / "vit.pth", pos_embed=None, blocks__1__attn__q_bias=None,
                 blocks__0__norm1__weight=np.ones(5, np.float16), rope=np.ones(3, np.float16))
    qformer = edited(MINIGPT4["qformer"], tmp_path / "qformer.pth", ln_vision__bias=np.ones(3, np.float32),
                     query_tokens=None, Qformer__new=np.ones(2, np.float32))
    held = llama_tensors() | {"lm_head.weight": np.ones((600, 64), np.int8)}
    folder = llama_folder(tmp_path / "llama", held)
    projector = edited(MINIGPT4["projector"], tmp_path / "projector.pth", llama_proj__bias=None)
    message = refused(tmp_path, **MINIGPT4 | {"vit": vit, "qformer": qformer, "llm": folder, "projector": projector})
    for line in ("vit.pth: pos_embed is missing", "vit.pth: blocks.1.attn.q_bias is missing",
                 "vit.pth: blocks.0.norm1.weight has shape [5], expected [64]",
                 "vit.pth: rope [3] is neither used nor known", "qformer.pth: query_tokens is missing",
                 "qformer.pth: ln_vision.bias has shape [3], expected [64]", "qformer.pth: Qformer.new [2] is neither",
                 "llama: lm_head.weight is int8", "projector.pth: llama_proj.bias is missing"):
        assert line in message
    assert "9 problems" in message


def test_truncated_and_absent_files(tmp_path):
    vit = tmp_path / "vit.pth"
    vit.write_bytes(MINIGPT4["vit"].read_bytes()[:-1000])
    message = refused(tmp_path, **MINIGPT4 | {"vit": vit, "qformer": tmp_path / "nothing.pth"})
    assert "vit.pth" in message and "nothing.pth: there is no such file" in message
    assert "2 problems" in message


def test_shards_and_index_must_agree(tmp_path):
    folder = tmp_path / "llama"
    shutil.copytree(CKPT / "llama_hf", folder)
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    first, second = sorted(set(index["weight_map"].values()))
    index["weight_map"]["lm_head.weight"] = first
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    message = refused(tmp_path, write.command("llama"), llm=folder)
    assert f"{first}: lm_head.weight is missing, though pytorch_model.bin.index.json lists it" in message
    assert f"{second}: lm_head.weight is in this file, but not according to pytorch_model.bin.index.json" in message
    (folder / second).unlink()
    assert f"{second} is missing, though" in refused(tmp_path, write.command("llama"), llm=folder)
    index["weight_map"]["lm_head.weight"] = "../elsewhere.bin"
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "names files of its own folder" in refused(tmp_path, write.command("llama"), llm=folder)


@pytest.mark.parametrize("changes, said", [
    ({"attention_bias": True}, "self_attn.q_proj.bias is missing"),
    ({"mlp_bias": True}, "mlp.gate_proj.bias is missing"),
    ({"mlp_bias": "yes"}, "mlp_bias is 'yes', expected true or false"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', expected a number above 0 and at most 1"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"rope_theta": -1}, "rope_theta is -1"),
    ({"num_hidden_layers": 10**12}, "no valid num_hidden_layers"),
    ({"max_position_embeddings": "x"}, "max_position_embeddings is 'x', expected a whole number"),
    ({"head_dim": 15}, "heads of size 15 cannot be rotated"),
    ({"rope_scaling": [1]}, "rope_scaling is [1]; expected an object"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"model_type": "mistral"}, "model_type is 'mistral'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling is 'linear'"),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3"}}, "rope scaling is 'llama3'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    ({"num_key_value_heads": 3}, "3 key and value heads do not divide 4 heads"),
    ({"hidden_size": None, "vocab_size": "600"}, "has no valid vocab_size, hidden_size"),
    ({"vocab_size": 601}, "has 600 rows, config.json says vocab_size 601"),
    ({"num_hidden_layers": 4}, "model.layers.3.mlp.down_proj.weight is missing"),
])
def test_configs_that_ask_for_something_else(tmp_path, changes, said):
    folder = llama_folder(tmp_path / "llama", llama_tensors(), **changes)
    assert said in refused(tmp_path, write.command("llama"), llm=folder)


@pytest.mark.parametrize("rows, added, fits", [
    (601, None, True), (601, "[PAD]", True), (600, "[PAD]", False), (599, None, False), (640, None, True),
    (632, "[PAD]", True)])
def test_vocabulary(tmp_path, rows, added, fits):
    held = llama_tensors()
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        held[key] = np.concatenate([held[key], held[key]])[:rows]
    folder = llama_folder(tmp_path / "llama", held, vocab_size=rows)
    if added:
        (folder / "added_tokens.json").write_text(json.dumps({added: 600}))
    if fits:
        write.command("llama")(folder, tmp_path / "out")
    else:
        assert f"has {rows} rows, the tokenizer" in refused(tmp_path, write.command("llama"), llm=folder)


def test_trained_parts_are_never_lost(tmp_path):
    assert "give the same file as --lora" in refused(tmp_path, **V2 | {"lora": None})
    assert "give the same file as --lora" in refused(tmp_path, **V2 | {"lora": None, "lora_rank": 4})
    assert "give the same file as --projector" in refused(tmp_path, **V2 | {"projector": None})
    message = refused(tmp_path, **V2 | {"lora": NO_QFORMER["projector"]})
    assert "is a trained projector of MiniGPT-4; it was given as --lora. Give it as --projector." in message
    assert "--lora-rank is 8, but the LoRA file holds rank 4" in refused(tmp_path, **V2, lora_rank=8)
    assert "llama_proj.weight has shape [64, 48], expected [64, 256]" in refused(
        tmp_path, **NO_QFORMER | {"projector": MINIGPT4["projector"]})


def test_each_trained_part_from_its_own_file(tmp_path, converted):
    write.command("minigpt4")(out=tmp_path / "out", **V2 | {"projector": NO_QFORMER["projector"]})
    held, v2 = params(tmp_path / "out"), params(converted / "v2")
    for path in ("llm/layers/attn/q/lora_a", "llm/layers/attn/v/lora_b"):
        np.testing.assert_array_equal(held[path], v2[path])
    np.testing.assert_array_equal(held["projector/w"], params(converted / "no_qformer")["projector/w"])


def test_other_images_must_divide_into_tokens(tmp_path):
    arch = json.loads(ARCH.read_text())
    arch["vit"]["image_size"] = 42
    (tmp_path / "arch.json").write_text(json.dumps(arch))
    message = refused(tmp_path, **NO_QFORMER | {"arch": tmp_path / "arch.json"})
    assert "images of 42 pixels have 9 patches" in message


def test_a_full_disk_is_noticed_before(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "0.0 GB free, the checkpoint needs 0.0 GB" in refused(tmp_path, **MINIGPT4)


def test_unknown_members_of_a_file(tmp_path):
    torch_file.save(tmp_path / "p.pth", {"model": tensors(MINIGPT4["projector"]), "epoch": 1, "ema": {}})
    assert "p.pth holds 'ema' besides 'model'" in refused(tmp_path, **MINIGPT4 | {"projector": tmp_path / "p.pth"})
    torch_file.save(tmp_path / "p.pth", {"model": tensors(MINIGPT4["projector"]) | {"step": 3}})
    assert "'step' (int)" in refused(tmp_path, **MINIGPT4 | {"projector": tmp_path / "p.pth"})


@pytest.mark.parametrize("edit, said", [
    (lambda a: a["vit"].pop("num_heads"), 'do not determine num_heads. If it is the right file, set them: --arch FILE'),
    (lambda a: a["qformer"].pop("cross_attention_freq"), "do not determine cross_attention_freq"),
    (lambda a: a["vit"].update(dim=65), "vit.dim is 65, but in the tensors it is 64"),
    (lambda a: a["vit"].update(heads=4), "unknown 'heads'; did you mean 'num_heads'?"),
    (lambda a: a["vit"].update(num_heads="4"), "vit.num_heads is '4', expected a number"),
    (lambda a: a["vit"].update(num_heads=5), "5 heads do not divide the width 64"),
    (lambda a: a["vit"].update(image_size=57), "57 pixels do not divide into patches of 14"),
    (lambda a: a["vit"].update(ln_vision_eps=1e-6), "vit.ln_vision_eps is 1e-06; only 1e-05"),
    (lambda a: a["qformer"].update(encoder_width=65), "qformer.encoder_width is 65, vit.dim is 64"),
    (lambda a: a.update(vision={}), "unknown 'vision'"),
])
def test_arch(tmp_path, edit, said):
    arch = json.loads(ARCH.read_text())
    edit(arch)
    (tmp_path / "arch.json").write_text(json.dumps(arch))
    assert said in refused(tmp_path, **MINIGPT4 | {"arch": tmp_path / "arch.json"})


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    vit = tmp_path / "vit.pth"
    shutil.copyfile(MINIGPT4["vit"], vit)
    save = frozen_weights.save

    def truncate_then_save(*arguments):
        vit.write_bytes(b"")
        save(*arguments)

    monkeypatch.setattr(frozen_weights, "save", truncate_then_save)
    with pytest.raises(WeightFileError, match="vit.pth"):
        write.command("minigpt4")(out=tmp_path / "out", **MINIGPT4 | {"vit": vit})
    assert {path.name for path in tmp_path.iterdir()} == {"vit.pth"}


def test_a_checkpoint_that_cannot_be_read_replaces_nothing(tmp_path, monkeypatch):
    write.command("llama")(CKPT / "llama_hf", tmp_path / "out")
    before = (tmp_path / "out" / "config.json").stat()
    monkeypatch.setattr(storage.LocalPath, "glob", lambda *_: iter(()))  # as etils' below a folder `[1]`
    with pytest.raises(storage.WriteError, match="cannot be read back"):
        write.command("llama")(CKPT / "llama_hf", tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").stat() == before


def test_a_link_goes_on_leading_to_the_checkpoint(tmp_path):
    for name in ("there", "yet_to_be"):
        (tmp_path / f"to_{name}").symlink_to(name)
    (tmp_path / "there").mkdir()
    for name in ("there", "yet_to_be"):
        write.command("llama")(CKPT / "llama_hf", tmp_path / f"to_{name}")
        assert (tmp_path / f"to_{name}").is_symlink() and (tmp_path / name / "config.json").is_file()
    assert len(list(tmp_path.iterdir())) == 4


def test_out_is_replaced_only_on_request(tmp_path):
    (tmp_path / "out").mkdir()
    write.command("llama")(CKPT / "llama_hf", tmp_path / "out")  # an empty folder is as good as none
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="--overwrite"):
        write.command("llama")(CKPT / "llama_hf", tmp_path / "out")
    assert (tmp_path / "out" / "mine").exists()
    write.command("llama")(CKPT / "llama_hf", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
