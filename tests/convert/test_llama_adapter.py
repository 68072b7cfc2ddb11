"""The tables of CLIP and of the visual query network, there and back, and sizes from tensors."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from mmjax import trees
from mmjax.convert import llama_adapter, torch_file
from mmjax.convert.tables import Computed, Problems, backward, forward
from mmjax.models import clip, visual
from mmjax.models.clip import CLIP_VIT_L14, Clip
from mmjax.models.visual import VISUAL_7B, VisualQuery
from tests.convert.released import assert_same, assert_there_and_back, lazy, read, whole

GOLDEN = Path(__file__).parents[1] / "golden" / "imagebind_llm"
CASE = GOLDEN / "cases" / "adapter_v2"
ARCH = json.loads((GOLDEN / "config.json").read_text())["adapter_v2"]
REAL = {"queries": 10, "inputs": 768, "outputs": 4_096}
TABLES = {"clip": llama_adapter.clip_entries(clip.TINY),
          "visual": llama_adapter.visual_entries(visual.TINY, 3, 20, 32)}


def shapes_only(entries, **more):
    """Tensors of any size that are never read."""
    held = {key: entry.key_shape for entry in entries for key in entry.keys} | more
    return {key: Computed(key, shape, np.float32, None) for key, shape in held.items()}


def golden(part):
    """The tensors of the set's CLIP, or of its adapter file's image side."""
    held = torch_file.load(CASE / {"clip": "clip_visual.pth", "visual": "adapter_v2.pth"}[part])
    return {key: tensor for key, tensor in held.get("model", held).items()
            if not key.startswith(("llama.", "adapter_query."))}


def config(part, tensors, arch):
    problems = Problems()
    told = llama_adapter.read_arch(arch, problems)[part]
    find = {"clip": llama_adapter.clip_config, "visual": llama_adapter.visual_config}[part]
    return find(tensors, told, problems), problems


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("name", TABLES)
def test_there_and_back(name, dtype):
    assert_there_and_back(TABLES[name], dtype)


@pytest.mark.parametrize("part", TABLES)
def test_a_whole_file_there_and_back(part):
    held, problems = golden(part), Problems()
    cfg, told_wrong = config(part, held, ARCH)
    assert not told_wrong
    entries = (llama_adapter.clip_entries(cfg) if part == "clip" else
               llama_adapter.visual_entries(cfg, ARCH["query_len"], ARCH["clip_out"], 32))
    params = whole(forward(entries, held, (), part, problems))
    assert not problems
    assert_same(read(backward(entries, params)), read(held))


@pytest.mark.parametrize("cfg", [clip.TINY, CLIP_VIT_L14])
def test_the_table_fills_clip_exactly(cfg):
    image = jax.ShapeDtypeStruct((1, 3, cfg.image_size, cfg.image_size), np.float32)
    shapes = trees.flatten(jax.eval_shape(Clip(cfg).init, jax.random.key(0), image)["params"])
    expected = {f"clip/{path}": shape.shape for path, shape in shapes.items()}
    assert {entry.path: entry.shape for entry in llama_adapter.clip_entries(cfg)} == expected


@pytest.mark.parametrize(("cfg", "sizes"), [
    (visual.TINY, {"queries": 3, "inputs": 20, "outputs": 32}), (VISUAL_7B, REAL)])
def test_the_table_fills_the_visual_network_exactly(cfg, sizes):
    module = VisualQuery(cfg, sizes["queries"], sizes["outputs"])
    features = jax.ShapeDtypeStruct((1, 5, sizes["inputs"]), np.float32)
    shapes = trees.flatten(jax.eval_shape(module.init, jax.random.key(0), features)["params"])
    expected = {f"visual/{path}": shape.shape for path, shape in shapes.items()}
    assert {entry.path: entry.shape for entry in llama_adapter.visual_entries(cfg, **sizes)} == expected


def test_released_keys():
    """As `clip.load("ViT-L/14")[0].state_dict()` has them, the text tower left out, and v2's adapter files."""
    entries = llama_adapter.clip_entries(CLIP_VIT_L14)
    held = shapes_only(entries, **{
        "transformer.resblocks.0.ln_1.weight": (768,), "token_embedding.weight": (49_408, 768), "logit_scale": (),
        "positional_embedding": (77, 768), "text_projection": (768, 768), "ln_final.bias": (768,)})
    assert held["visual.transformer.resblocks.23.attn.in_proj_weight"].shape == (3_072, 1_024)
    assert held["visual.conv1.weight"].shape == (1_024, 3, 14, 14) and held["visual.proj"].shape == (1_024, 768)
    assert held["visual.positional_embedding"].shape == (257, 1_024)
    problems = Problems()
    forward(entries, held, llama_adapter.CLIP_IGNORED, "clip", problems)
    entries = llama_adapter.visual_entries(VISUAL_7B, **REAL)
    held = shapes_only(entries, **{"clip.visual.proj": (1_024, 768)})
    assert held["visual_blocks.7.attn.qkv.weight"].shape == (2_304, 768)
    assert held["visual_query.weight"].shape == (10, 768) and held["visual_proj.weight"].shape == (4_096, 768)
    forward(entries, held, llama_adapter.VISUAL_IGNORED, "adapter", problems)
    assert not problems


@pytest.mark.parametrize(("name", "key", "path"), [
    ("clip", "visual.transformer.resblocks.1.attn.in_proj_weight", "clip/blocks/attn/qkv/w"),
    ("visual", "visual_blocks.1.attn.qkv.weight", "visual/blocks/attn/qkv/w")])
def test_rows_are_queries_then_keys_then_values(name, key, path):
    source = lazy(TABLES[name])
    params = whole(forward(TABLES[name], source, (), "file", Problems()))
    cfg = clip.TINY if name == "clip" else visual.TINY
    D, N = cfg.dim, cfg.heads
    which, head, place, layer = 2, 1, 3, 1  # of the values, the second head's fourth element, in the second block
    row = source[key].read()[which * D + head * (D // N) + place]
    np.testing.assert_array_equal(params[path][layer, :, which, head, place], row)


def test_released_sizes_need_no_arch():
    assert config("clip", shapes_only(llama_adapter.clip_entries(CLIP_VIT_L14)), {}) == (CLIP_VIT_L14, [])
    assert config("visual", shapes_only(llama_adapter.visual_entries(VISUAL_7B, **REAL)), {}) == (VISUAL_7B, [])


@pytest.mark.parametrize(("part", "name"), [("clip", "clip_heads"), ("visual", "v_num_heads")])
def test_sizes_that_tensors_do_not_show_must_be_told(part, name):
    found, problems = config(part, golden(part), {})
    assert found is None and len(problems) == 1
    assert "do not determine heads" in problems[0] and f'{{"adapter_v2": {{"{name}": "..."}}}}' in problems[0]


@pytest.mark.parametrize(("part", "change", "message"), [
    ("clip", {"clip_width": 32}, "clip_width makes dim 32, but in the tensors it is 24"),
    ("clip", {"clip_img": 56}, "clip_img makes image_size 56, but in the tensors it is 28"),
    ("clip", {"clip_heads": 5}, "clip: 5 heads do not divide the width 24"),
    ("clip", {"clip_head": 5}, "unknown 'clip_head'; did you mean 'clip_heads'"),
    ("clip", {"clip_heads": "3"}, "clip_heads is '3', expected a whole number above 0"),
    ("visual", {"v_mlp_ratio": 2}, "v_mlp_ratio makes hidden 64, but in the tensors it is 128"),
    ("visual", {"v_mlp_ratio": 0.0}, "v_mlp_ratio is 0.0, expected a number above 0"),
])
def test_what_is_told_wrongly(part, change, message):
    _, problems = config(part, golden(part), ARCH | change)
    with pytest.raises(ValueError, match=message):
        problems.check("Cannot convert")


def test_a_broken_file_is_reported_not_crashed_on():
    key = "visual.conv1.weight"
    held = {k: t for k, t in golden("clip").items() if k != key}
    assert config("clip", held, {})[1]
    cfg, problems = config("clip", held, ARCH)  # told everything, the table's line says what is missing
    forward(llama_adapter.clip_entries(cfg), held, llama_adapter.CLIP_IGNORED, "clip.pth", problems)
    assert problems == [f"clip.pth: {key} is missing"]
    assert config("clip", {}, {})[0] is None and config("visual", {}, {})[0] is None
