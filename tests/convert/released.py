"""Released files to convert: the golden sets', copies of them with a change, and a made-up language model."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mmjax.checkpoints import frozen as frozen_weights
from mmjax.convert import torch_file, write
from mmjax.convert.tables import Computed, ConversionError, Problems, backward, forward

GOLDEN = Path(__file__).parents[1] / "golden" / "minigpt4"
CKPT = GOLDEN / "ckpt"
ARCH = GOLDEN / "model_sizes.json"

MINIGPT4 = {"vit": CKPT / "eva_vit.pth", "qformer": CKPT / "blip2_pretrained.pth", "llm": CKPT / "llama_hf",
            "projector": CKPT / "minigpt4_proj.pth", "arch": ARCH}
NO_QFORMER = {"vit": CKPT / "eva_vit.pth", "llm": CKPT / "llama_hf", "projector": CKPT / "minigpt4_llama2_proj.pth",
              "arch": ARCH}
V2 = {"vit": CKPT / "eva_vit.pth", "llm": CKPT / "llama_hf", "projector": CKPT / "minigpt_v2.pth",
      "lora": CKPT / "minigpt_v2.pth", "arch": ARCH}

IMAGEBIND = Path(__file__).parents[1] / "golden" / "imagebind_llm"
IMAGEBIND_LLM = {"imagebind": IMAGEBIND / "imagebind.pth", "llm": IMAGEBIND / "llama_meta",
                 "arch": IMAGEBIND / "config.json"}
_BASE, _V2 = {"llm": IMAGEBIND / "llama_meta", "arch": IMAGEBIND / "config.json"}, IMAGEBIND / "cases" / "adapter_v2"
ADAPTER_V1 = _BASE | {"adapter": IMAGEBIND / "adapter_v1.pth"}
ADAPTER_V2 = _BASE | {"adapter": _V2 / "adapter_v2.pth", "clip": _V2 / "clip_visual.pth"}


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a .pth, read, without the wrapper that some have."""
    loaded = torch_file.load(path)
    return {key: tensor.read() for key, tensor in loaded.get("model", loaded).items()}


def edited(source: Path, target: Path, **changes) -> Path:
    """A copy of a .pth whose tensors (dots as __) are replaced, added, or (None) removed."""
    held = tensors(source)
    for name, value in changes.items():
        key = name.replace("__", ".")
        held.pop(key, None)
        if value is not None:
            held[key] = value
    wrapped = "model" in torch_file.load(source)
    torch_file.save(target, {"model": held} if wrapped else held)
    return target


def llama_tensors(folder: Path = CKPT / "llama_hf") -> dict[str, np.ndarray]:
    """All tensors of a folder of .bin files, buffers left out."""
    held = {}
    for shard in sorted(folder.glob("*.bin")):
        held |= tensors(shard)
    return {key: value for key, value in held.items() if not key.endswith("inv_freq")}


def llama_folder(folder: Path, held: dict[str, np.ndarray], **config) -> Path:
    """A folder with the golden set's config.json (fields changed, or removed by None) and tokenizer, and one .bin."""
    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copyfile(CKPT / "llama_hf" / name, folder / name)
    values = json.loads((CKPT / "llama_hf" / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    torch_file.save(folder / "pytorch_model.bin", held)
    return folder


def params(checkpoint: Path) -> dict[str, np.ndarray]:
    """Every parameter of a converted checkpoint, in its stored dtype."""
    return {path: array.read().result() for path, array in frozen_weights.arrays(checkpoint / "weights").items()}


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Equal keys, dtypes and bits."""
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype, key
        np.testing.assert_array_equal(got[key], value, err_msg=key)


def refused(tmp_path: Path, function=None, **arguments) -> str:
    """The message of the refusal; nothing may be left beside what was there."""
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ConversionError) as error:
        (function or write.command("minigpt4"))(out=tmp_path / "out", **arguments)
    assert set(tmp_path.rglob("*")) == before
    return str(error.value)


def described(out: Path) -> dict:
    """The card of a converted checkpoint."""
    return json.loads((out / "config.json").read_text())


def meta_folder(folder: Path, source: Path = IMAGEBIND / "llama_meta", **params) -> Path:
    """A copy of a folder of Meta's with its tokenizer in it, and fields of params.json changed, or removed by None."""
    shutil.copytree(source, folder)
    shutil.copyfile(IMAGEBIND / "tokenizer.model", folder / "tokenizer.model")
    values = json.loads((folder / "params.json").read_text()) | params
    (folder / "params.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


def lazy(entries, dtype=np.float32):
    """Random tensors under a table's source keys, as a file gives them."""
    rng = np.random.default_rng(0)
    return {key: Computed(key, entry.key_shape, dtype,
                          functools.partial(np.asarray, rng.normal(size=entry.key_shape).astype(dtype)))
            for entry in entries for key in entry.keys}


def whole(parameters):
    return {path: np.concatenate(list(parameter.slices())).reshape(parameter.shape)
            for path, parameter in parameters.items()}


def read(tensors):
    return {key: tensor.read() for key, tensor in tensors.items()}


def assert_there_and_back(entries, dtype):
    """A table makes parameters of the shapes that it says, and read backwards the same tensors, bit for bit."""
    source, problems = lazy(entries, dtype), Problems()
    params = {path: np.concatenate(list(parameter.slices()))
              for path, parameter in forward(entries, source, (), "file", problems).items()}
    assert not problems
    assert {path: array.shape for path, array in params.items()} == {entry.path: entry.shape for entry in entries}
    assert_same(read(backward(entries, params)), read(source))
