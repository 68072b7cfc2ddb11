import dataclasses

import ml_dtypes
import numpy as np
import pytest

from mmjax.convert import llama, minigpt4, peft, tables
from mmjax.convert.tables import Computed, ConversionError, Problems, backward, expand, forward, sizes_from_shapes
from mmjax.families import FAMILIES, shapes
from mmjax.models import eva_vit, qformer
from mmjax.models.llama import LlamaConfig
from tests.convert.released import assert_same

GROUPED = LlamaConfig(vocab=11, depth=3, dim=12, heads=4, kv_heads=2, head_dim=5, hidden=7, lora_rank=2)
TABLES = {
    "vit": minigpt4.vit_entries(eva_vit.TINY),
    "qformer": minigpt4.qformer_entries(dataclasses.replace(qformer.TINY, depth=5), vit_dim=10),
    "projector": minigpt4.projector_entries(6, 4),
    "llm": llama.entries(GROUPED),
    "llama tied": llama.entries(dataclasses.replace(GROUPED, tied=True)),
    "lora": peft.entries(GROUPED),
}


def lazy(arrays):
    return {key: Computed(key, array.shape, array.dtype, lambda array=array: array) for key, array in arrays.items()}


def random(entries, dtype=np.float16):
    rng = np.random.default_rng(0)
    return {key: rng.normal(size=entry.key_shape).astype(dtype) for entry in entries for key in entry.keys}


def whole(parameters):
    return {path: np.concatenate(list(parameter.slices())) for path, parameter in parameters.items()}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("name", TABLES)
def test_there_and_back(name, dtype):
    entries, problems = TABLES[name], Problems()
    source = random(entries, dtype)
    parameters = forward(entries, lazy(source), (), "file", problems)
    assert not problems
    params = whole(parameters)
    assert {path: array.shape for path, array in params.items()} == {entry.path: entry.shape for entry in entries}
    back = backward(entries, params)
    assert_same({key: tensor.read() for key, tensor in back.items()}, source)


@pytest.mark.parametrize("preset", FAMILIES["minigpt4"].presets)
def test_tables_fill_the_model_exactly(preset):
    cfg = FAMILIES["minigpt4"].presets[preset]
    entries = [*minigpt4.vit_entries(cfg.vit), *minigpt4.projector_entries(cfg.soft_width, cfg.llm.dim),
               *llama.entries(cfg.llm), *peft.entries(cfg.llm)]
    filled = {"ln_vision/scale": (cfg.vit.dim,), "ln_vision/bias": (cfg.vit.dim,)}
    if cfg.qformer:
        entries += minigpt4.qformer_entries(cfg.qformer, cfg.vit.dim)
    filled |= {entry.path: entry.shape for entry in entries}
    assert filled == {path: shape.shape for path, shape in shapes("minigpt4", cfg).items()}


def test_what_a_layout_means():
    entries = TABLES["vit"]
    source = random(entries)
    params = whole(forward(entries, lazy(source), (), "file", Problems()))
    D, N = eva_vit.TINY.dim, eva_vit.TINY.heads
    H = D // N
    which, head, place, layer = 2, 1, 3, 1  # of the values, the second head's fourth element, in the second block
    row = source["blocks.1.attn.qkv.weight"][which * D + head * H + place]
    np.testing.assert_array_equal(params["vit/blocks/attn/qkv/w"][layer, :, which, head, place], row)
    np.testing.assert_array_equal(params["vit/patch/w"][2, 3, 1], source["patch_embed.proj.weight"][:, 2, 3, 1])


def test_layers_are_sliced_one_by_one_when_large(monkeypatch):
    entries = TABLES["llm"]
    parameters = forward(entries, lazy(random(entries)), (), "file", Problems())
    path = "llm/layers/attn/q/w"
    gathered = list(parameters[path].slices())
    monkeypatch.setattr(tables, "STACK_BYTES", 1)
    single = list(parameters[path].slices())
    assert [len(piece) for piece in gathered] == [3] and [len(piece) for piece in single] == [1, 1, 1]
    np.testing.assert_array_equal(np.concatenate(single), gathered[0])


def test_what_shapes_tell():
    tensors = lazy({"a.w": np.zeros((3, 4)), "b.w": np.zeros((7, 9)), "c.w": np.zeros(5), "x.block.0.w": np.zeros(1),
                    "block.2.w": np.zeros(1), "block.10.w": np.zeros(1)})
    where = {"a.w": ("dim", ""), "b.w": ("dim", "hidden"), "c.w": ("other", ""), "absent": ("patch",)}
    assert sizes_from_shapes(tensors, where) == {"dim": 3, "hidden": 9}  # of two, the first
    assert sizes_from_shapes(tensors, where, r"block\.(\d+)\.") == {"dim": 3, "hidden": 9, "depth": 11}
    assert sizes_from_shapes(tensors, {}, r"layer\.(\d+)\.") == {}


def test_numbers_stack_or_stay_apart():
    table = (("a.{L}.w", "a/w", "A B -> B A"), ("b.{i}.w", "b_{i}/w", "A -> A"))
    stacked, *apart = expand(table, {"A": 2, "B": 3}, {"L": range(4), "i": (0, 5)})
    assert (stacked.keys, stacked.shape) == (("a.0.w", "a.1.w", "a.2.w", "a.3.w"), (4, 3, 2))
    assert [(entry.keys, entry.path) for entry in apart] == [(("b.0.w",), "b_0/w"), (("b.5.w",), "b_5/w")]


def test_everything_wrong_is_listed(capsys):
    entries, problems = TABLES["llm"], Problems()
    source = random(entries)
    del source["model.layers.1.mlp.up_proj.weight"]
    source["model.norm.weight"] = source["model.norm.weight"][:5]
    source["model.layers.2.self_attn.q_proj.weight"] = source["model.layers.2.self_attn.q_proj.weight"].T
    source["model.layers.0.self_attn.k_proj.weight"] = source["model.layers.0.self_attn.k_proj.weight"].astype("f4")
    source["lm_head.weight"] = source["lm_head.weight"].astype(np.int8)
    source["model.layers.3.mlp.up_proj.weight"] = np.zeros(3, np.float16)
    source["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    forward(entries, lazy(source), llama.IGNORED, "shard.bin", problems)
    assert sorted(problems) == [
        "shard.bin: lm_head.weight is int8; weights are float16, bfloat16, float32. Quantised weights are not read; "
        "take the same model in float16 or bfloat16.",
        "shard.bin: model.layers.1.mlp.up_proj.weight is missing",
        "shard.bin: model.layers.2.self_attn.q_proj.weight has shape [12, 20], expected [20, 12] ((N H) D -> D N H "
        "with N=4, H=5, D=12)",
        "shard.bin: model.layers.3.mlp.up_proj.weight [3] is neither used nor known as a key to ignore",
        "shard.bin: model.norm.weight has shape [5], expected [12] (D -> D with D=12)",
    ]
    assert capsys.readouterr().err == ("shard.bin: the layers of model.layers.0.self_attn.k_proj.weight have different "
                                       "dtypes (float16, float32); stored as float32.\n")
    with pytest.raises(ConversionError, match="Cannot convert: 5 problems.\n  shard.bin"):
        problems.check("Cannot convert")


def test_export_names_what_is_missing():
    params = {"projector/w": np.zeros((4, 4), np.float32)}
    with pytest.raises(ConversionError, match=r"(?s)projector/b is missing.*projector/w has shape \[4, 4\], expected"):
        backward(TABLES["projector"], params)


@pytest.mark.parametrize("key, left_out", [
    ("blocks.2.norm1.weight", True), ("blocks.20.norm1.weight", True), ("blocks.1.norm1.extra", False),
    ("norm.weight", True), ("head.bias", True), ("fc_norm.weight", False)])
def test_vit_keys_left_out(key, left_out):
    assert (tables.reason(key, minigpt4.vit_ignored(eva_vit.TINY)) is not None) == left_out
