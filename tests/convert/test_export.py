import json

import jax
import numpy as np
import pytest

from mmjax.checkpoints.converted import ConvertedCheckpoint
from mmjax.convert import safetensors, torch_file, write
from mmjax.convert.export import export, export_part
from mmjax.convert.tables import ConversionError
from mmjax.families import config_from_dict, imagebind_llm
from tests.convert.released import (
    ADAPTER_V1,
    ADAPTER_V2,
    CKPT,
    IMAGEBIND,
    IMAGEBIND_LLM,
    MINIGPT4,
    V2,
    assert_same,
    described,
    llama_tensors,
    params,
    tensors,
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    write.command("minigpt4")(out=folder / "minigpt4", **MINIGPT4)
    write.command("minigpt4")(out=folder / "v2", **V2)
    write.command("minigpt4")(out=folder / "fresh", **MINIGPT4 | {"projector": None})
    return folder


@pytest.mark.parametrize("checkpoint, part, source, count", [
    ("minigpt4", "vit", MINIGPT4["vit"], 43),
    ("minigpt4", "qformer", MINIGPT4["qformer"], 89),
    ("minigpt4", "projector", MINIGPT4["projector"], 2),
    ("v2", "projector", V2["projector"], 14),
])
def test_released_files_come_back_bit_equal(checkpoints, tmp_path, checkpoint, part, source, count):
    export(checkpoints / checkpoint, part, tmp_path / "new.pth")
    written, original = tensors(tmp_path / "new.pth"), tensors(source)
    assert len(written) == count
    assert_same(written, {key: original[key] for key in written})
    assert ("model" in torch_file.load(tmp_path / "new.pth")) == ("model" in torch_file.load(source))


def test_converting_an_export_gives_the_same_checkpoint(checkpoints, tmp_path):
    for part in ("vit", "qformer", "projector", "llama"):
        export(checkpoints / "minigpt4", part, tmp_path / (part if part == "llama" else f"{part}.pth"))
    arguments = {part: tmp_path / f"{part}.pth" for part in ("vit", "qformer", "projector")}
    write.command("minigpt4")(out=tmp_path / "out", llm=tmp_path / "llama", arch=MINIGPT4["arch"], **arguments)
    assert_same(params(tmp_path / "out"), params(checkpoints / "minigpt4"))
    old, new = (json.loads((folder / "config.json").read_text())
                for folder in (checkpoints / "minigpt4", tmp_path / "out"))
    assert all(old[key] == new[key] for key in ("architecture", "generation", "text"))


def with_trained(folder, part, out, trained, config=None):
    """Exports with what a run would have trained, and its architecture."""
    source = ConvertedCheckpoint.open(folder)
    export_part(source.of(config or source.config), part, out, trained)


def test_llama_folder(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("mmjax.convert.llama.SHARD_BYTES", 200_000)
    export(checkpoints / "v2", "llama", tmp_path / "llama")
    names = {path.name for path in (tmp_path / "llama").iterdir()}
    assert names == {"config.json", "generation_config.json", "pytorch_model.bin.index.json", "tokenizer.model",
                     "tokenizer_config.json", "special_tokens_map.json",
                     *(f"pytorch_model-0000{n}-of-00003.bin" for n in (1, 2, 3))}
    assert_same(llama_tensors(tmp_path / "llama"), llama_tensors())
    config, original = (json.loads((folder / "config.json").read_text())
                        for folder in (tmp_path / "llama", CKPT / "llama_hf"))
    same = original.keys() - {"initializer_range", "transformers_version", "use_cache"}
    assert {key: config[key] for key in same} == {key: original[key] for key in same}


def test_llama_folder_in_safetensors_with_lora_merged(checkpoints, tmp_path, monkeypatch, capsys):
    for shard_bytes, count in ((5 * 10**9, 1), (200_000, 3)):
        monkeypatch.setattr("mmjax.convert.llama.SHARD_BYTES", shard_bytes)
        export(checkpoints / "v2", "llm", tmp_path / f"base{count}", format="hf")
        assert "without its LoRA. To add it, export with --merge-lora" in capsys.readouterr().err
        shards = sorted((tmp_path / f"base{count}").glob("*.safetensors"))
        assert len(shards) == count and (shards[0].name == "model.safetensors") == (count == 1)
        assert (tmp_path / f"base{count}" / "tokenizer.model").is_file()
        held = {key: tensor.read() for path in shards for key, tensor in safetensors.load(path).items()}
        assert_same(held, llama_tensors())
    export(checkpoints / "v2", "llm", tmp_path / "merged", format="hf", merge_lora=True)
    key, lora = "model.layers.1.self_attn.q_proj.weight", tensors(V2["lora"])
    a, b = (lora[f"llama_model.base_model.model.{key.replace('weight', f'lora_{side}.weight')}"] for side in "AB")
    held = {key: tensor.read() for path in (tmp_path / "merged").glob("*.safetensors")
            for key, tensor in safetensors.load(path).items()}
    expected = llama_tensors()[key].astype(np.float32) + 16 / 4 * b.astype(np.float32) @ a.astype(np.float32)
    np.testing.assert_allclose(held[key], expected, rtol=2e-3, atol=1e-4)
    untouched = "model.layers.1.self_attn.o_proj.weight"
    np.testing.assert_array_equal(held[untouched], llama_tensors()[untouched])
    with pytest.raises(ConversionError, match="has no LoRA to merge"):
        export(checkpoints / "minigpt4", "llm", tmp_path / "none", merge_lora=True)


def test_trained_parameters_take_the_checkpoints_place(checkpoints, tmp_path):
    w = np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32)
    with_trained(checkpoints / "minigpt4", "projector", tmp_path / "a.pth", {"projector": {"w": jax.numpy.array(w)}})
    written = tensors(tmp_path / "a.pth")
    np.testing.assert_array_equal(written["llama_proj.weight"], w.T)
    np.testing.assert_array_equal(written["llama_proj.bias"], tensors(MINIGPT4["projector"])["llama_proj.bias"])


def test_refusals(checkpoints, tmp_path):
    with pytest.raises(ConversionError, match="projector/w is missing"):
        export(checkpoints / "fresh", "projector", tmp_path / "new.pth")
    with pytest.raises(ConversionError, match="has no part 'qformer'; it has llm, llm-meta, projector, vit"):
        export(checkpoints / "v2", "qformer", tmp_path / "new.pth")
    with pytest.raises(ConversionError, match=r"projector/b has shape \[3\], expected \[64\]"):
        with_trained(checkpoints / "minigpt4", "projector", tmp_path / "new.pth", {"projector/b": np.zeros(3)})
    with pytest.raises(FileNotFoundError, match="neither a converted checkpoint"):
        export(CKPT, "vit", tmp_path / "new.pth")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine.pth").write_text("precious")
    with pytest.raises(FileExistsError):
        export(checkpoints / "minigpt4", "projector", tmp_path / "mine.pth")


# ------------------------------------------------------------------------------ ImageBind-LLM and LLaMA-Adapter


BASE = IMAGEBIND / "llama_meta" / "consolidated.00.pth"
STRAY = ("image_bind.", "prefix_projector_norm.", "llma.layers.0.attention.wk", "rope")


@pytest.mark.parametrize("checkpoint, part, source, count", [
    ("finetune", "adapter", IMAGEBIND / "adapter.pth", 104),
    ("pretrain", "adapter", IMAGEBIND / "adapter_pretrain.pth", 19),
    ("legacy", "adapter", IMAGEBIND / "adapter_legacy.pth", 32),
    ("article", "bind", IMAGEBIND / "bind_network.pth", 14),
    ("pretrain", "bind", IMAGEBIND / "bind_network.pth", 14),
    ("finetune", "imagebind", IMAGEBIND / "imagebind.pth", 211),
    ("v1", "adapter", ADAPTER_V1["adapter"], 5),
    ("v2", "adapter", ADAPTER_V2["adapter"], 127),
    ("v2", "clip", ADAPTER_V2["clip"], 32),
    ("finetune", "llama-meta", BASE, 39),  # the norms are the base's own, not the adapter's
    ("legacy", "llama-meta", BASE, 39),
    ("token", "llama-meta", BASE, 39),
    ("v2", "llama-meta", BASE, 39),
])
def test_adapted_models_come_back_bit_equal(adapted, tmp_path, checkpoint, part, source, count):
    export(adapted / checkpoint, part, tmp_path / "new")
    file = tmp_path / "new" / "consolidated.00.pth" if part == "llama-meta" else tmp_path / "new"
    original = {key.replace("llma.", "llama."): value for key, value in tensors(source).items()
                if not key.startswith(STRAY)}
    assert len(original) == count
    assert_same(tensors(file), original)
    kinds = ({key: value for key, value in torch_file.load(path).items() if key in ("model", "config")}
             for path in (file, source))
    new, old = ({key: key == "model" or value for key, value in kind.items()} for kind in kinds)
    assert new == old  # wrapped alike, and v2's settings beside the tensors


def test_a_transformers_folder_holds_the_bases_norms_and_no_merges(adapted, tmp_path):
    export(adapted / "finetune", "llama", tmp_path / "hf")
    np.testing.assert_array_equal(llama_tensors(tmp_path / "hf")["model.norm.weight"], tensors(BASE)["norm.weight"])
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "config.json", "generation_config.json", "pytorch_model.bin.index.json", "tokenizer.model",
        "pytorch_model-00001-of-00001.bin"}


def test_token_form_there_and_back(adapted, tmp_path):
    gate = np.arange(4, dtype=np.float32)[:, None]
    with_trained(adapted / "token", "adapter", tmp_path / "token.pth", {"llm/layers/gate": gate})
    written, original = tensors(tmp_path / "token.pth"), tensors(IMAGEBIND / "adapter.pth")
    np.testing.assert_array_equal(written.pop("gate"), gate[:, 0])
    assert_same(written, {key: value for key, value in original.items()
                          if key != "prefix_query.weight" and not key.endswith(".gate")})
    write.command("imagebind_llm")(
        out=tmp_path / "out", **IMAGEBIND_LLM, adapter=tmp_path / "token.pth", injection="token")
    assert described(tmp_path / "out")["fresh"] == []
    assert_same(params(tmp_path / "out"), params(adapted / "token") | {"llm/layers/gate": gate})


def test_what_a_finetuning_run_adds(adapted, tmp_path):
    """A checkpoint without LoRA, and a run that trained LoRA, biases and norms on top of it."""
    cfg = config_from_dict(imagebind_llm.ImageBindLLMConfig, described(adapted / "pretrain")["architecture"])
    trained = {path: value for path, value in params(adapted / "finetune").items()
               if path.endswith(("/lora_a", "/lora_b", "q/b", "o/b", "gate/b", "up/b", "down/b", "norm/scale"))
               and path.startswith("llm/")}
    config = imagebind_llm.with_phase(cfg, "finetune")
    with_trained(adapted / "pretrain", "adapter", tmp_path / "new.pth", trained, config)
    written, both = tensors(tmp_path / "new.pth"), [tensors(IMAGEBIND / f"adapter{name}.pth") for name in
                                                    ("", "_pretrain")]
    assert_same(written, both[0] | both[1])
    with_trained(adapted / "pretrain", "llama-meta", tmp_path / "meta", trained, config)
    np.testing.assert_array_equal(tensors(tmp_path / "meta" / "consolidated.00.pth")["norm.weight"],
                                  tensors(BASE)["norm.weight"])


def test_parts(adapted, tmp_path):
    for checkpoint, parts in {"finetune": "llm, llm-meta, adapter, bind, imagebind",
                              "legacy": "llm, llm-meta, adapter, imagebind",  # the article has no such network
                              "v1": "llm, llm-meta, adapter", "v2": "llm, llm-meta, adapter, clip"}.items():
        with pytest.raises(ConversionError, match=f"has no part 'vit'; it has {parts}\\."):
            export(adapted / checkpoint, "vit", tmp_path / "new.pth")
    with pytest.raises(ConversionError, match="query is missing"):
        export(adapted / "article", "adapter", tmp_path / "new.pth")
    assert not list(tmp_path.iterdir())
