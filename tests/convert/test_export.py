import json

import jax
import numpy as np
import pytest

from mmjax.convert import convert, torch_file
from mmjax.convert.export import export
from mmjax.convert.tables import ConversionError
from tests.convert.released import CKPT, MINIGPT4, V2, assert_same, llama_tensors, params, tensors


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    convert.minigpt4(out=folder / "minigpt4", **MINIGPT4)
    convert.minigpt4(out=folder / "v2", **V2)
    convert.minigpt4(out=folder / "fresh", **MINIGPT4 | {"projector": None})
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
    convert.minigpt4(out=tmp_path / "out", llama=tmp_path / "llama", arch=MINIGPT4["arch"], **arguments)
    assert_same(params(tmp_path / "out"), params(checkpoints / "minigpt4"))
    old, new = (json.loads((folder / "config.json").read_text())
                for folder in (checkpoints / "minigpt4", tmp_path / "out"))
    assert all(old[key] == new[key] for key in ("architecture", "generation", "text"))


def test_llama_folder(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("mmjax.convert.export.SHARD_BYTES", 200_000)
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


def test_trained_parameters_take_the_checkpoints_place(checkpoints, tmp_path):
    w = np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32)
    export(checkpoints / "minigpt4", "projector", tmp_path / "a.pth", trained={"projector": {"w": jax.numpy.array(w)}})
    written = tensors(tmp_path / "a.pth")
    np.testing.assert_array_equal(written["llama_proj.weight"], w.T)
    np.testing.assert_array_equal(written["llama_proj.bias"], tensors(MINIGPT4["projector"])["llama_proj.bias"])


def test_refusals(checkpoints, tmp_path):
    with pytest.raises(ConversionError, match="projector/w is missing"):
        export(checkpoints / "fresh", "projector", tmp_path / "new.pth")
    with pytest.raises(ConversionError, match="has no part 'qformer'; it has llama, projector, vit"):
        export(checkpoints / "v2", "qformer", tmp_path / "new.pth")
    with pytest.raises(ConversionError, match=r"projector/b has shape \[3\], expected \[64\]"):
        export(checkpoints / "minigpt4", "projector", tmp_path / "new.pth", trained={"projector/b": np.zeros(3)})
    with pytest.raises(FileNotFoundError, match="not a folder that `mmjax convert` wrote"):
        export(CKPT, "vit", tmp_path / "new.pth")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine.pth").write_text("precious")
    with pytest.raises(FileExistsError):
        export(checkpoints / "minigpt4", "projector", tmp_path / "mine.pth")
