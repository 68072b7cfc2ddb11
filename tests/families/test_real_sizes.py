"""Every preset at its real size, through `jax.eval_shape`: nothing is allocated."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from mmjax import sharding, trees
from mmjax.families import FAMILIES, shapes
from mmjax.models import llama

PRESETS = [(family, preset) for family, declared in FAMILIES.items() for preset in declared.presets]
REAL = [pair for pair in PRESETS if pair[1] != "tiny"]
each_preset = pytest.mark.parametrize(("family", "preset"), PRESETS, ids=map("/".join, PRESETS))

LLAMA_7B, LLAMA_13B = 6_738_415_616, 13_015_864_320  # as published
IMAGEBIND_HUGE = 1_200_781_057 + 4  # as published, and four factors that are buffers there


@functools.cache
def parameters(family, preset):
    return shapes(family, FAMILIES[family].presets[preset])


def axes(family, preset):
    return FAMILIES[family].all_axes(FAMILIES[family].presets[preset])


def count(paths):
    return sum(math.prod(shape.shape) for shape in paths.values())


def llama_size(c):
    attention = 2 * c.dim * c.heads * c.head_dim + 2 * c.dim * c.kv_heads * c.head_dim
    lora = c.lora_rank * (2 * c.dim + c.heads * c.head_dim + c.kv_heads * c.head_dim)
    gates = {"": 0, "head": c.heads * c.depth, "layer": c.depth, "shared": 1}[c.injection]
    ends = c.vocab * c.dim * (1 if c.tied else 2) + c.dim
    return c.depth * (attention + 3 * c.dim * c.hidden + 2 * c.dim + lora) + ends + gates


def vit_size(c):
    patches = 3 * c.patch**2 * c.dim + c.dim
    positions = (1 + c.table**2) * c.dim + c.dim  # and the class token
    attention = 4 * c.dim**2 + 3 * c.dim  # biases on q, v and the output
    feed_forward = 2 * c.dim * c.hidden + c.hidden + c.dim
    return patches + positions + c.depth * (attention + feed_forward + 4 * c.dim)


def qformer_size(c, width):
    attention = 4 * (c.dim**2 + c.dim) + 2 * c.dim
    cross = 2 * (c.dim**2 + c.dim) + 2 * (width * c.dim + c.dim) + 2 * c.dim
    feed_forward = 2 * c.dim * c.hidden + c.hidden + c.dim + 2 * c.dim
    crossing = math.ceil(c.depth / c.cross_every)
    return c.queries * c.dim + 2 * c.dim + c.depth * (attention + feed_forward) + crossing * cross


def bind_size(c):
    return c.inputs * c.dim + c.dim + c.depth * (3 * c.dim * c.hidden + c.dim)


def vit_blocks_size(c):
    attention = 4 * (c.dim**2 + c.dim)
    feed_forward = 2 * c.dim * c.hidden + c.hidden + c.dim
    return c.depth * (attention + feed_forward + 4 * c.dim)


def clip_size(c):
    ends = 3 * c.patch**2 * c.dim + c.dim + (1 + c.grid**2) * c.dim + 4 * c.dim + c.dim * c.out
    return vit_blocks_size(c) + ends


def visual_size(c, cfg):
    into = cfg.clip.out * c.dim + 3 * c.dim + cfg.query_len * c.dim
    return vit_blocks_size(c) + into + c.dim * cfg.llm.dim + 3 * cfg.llm.dim


def minigpt4_sizes(cfg):
    width = cfg.qformer.dim if cfg.qformer else 4 * cfg.vit.dim
    sizes = {"vit": vit_size(cfg.vit), "ln_vision": 2 * cfg.vit.dim,
             "projector": width * cfg.llm.dim + cfg.llm.dim}
    return sizes | ({"qformer": qformer_size(cfg.qformer, cfg.vit.dim)} if cfg.qformer else {})


def imagebind_llm_sizes(cfg):
    # the towers' own test counts them; here they are held to the file as it was published
    towers = shapes("imagebind_llm", cfg)
    towers = count({path: shape for path, shape in towers.items() if path.startswith("imagebind/")})
    assert cfg.imagebind.vision.depth < 32 or towers == IMAGEBIND_HUGE
    query = {"query": cfg.query_layers * cfg.llm.dim} if cfg.llm.injection == "head" else {}
    return {"imagebind": towers, "bind": bind_size(cfg.bind)} | query


def llama_adapter_sizes(cfg):
    sizes = {"query": cfg.query_layers * cfg.query_len * cfg.llm.dim}
    return sizes | ({"clip": clip_size(cfg.clip), "visual": visual_size(cfg.visual, cfg)} if cfg.clip else {})


SIZES = {"minigpt4": minigpt4_sizes, "imagebind_llm": imagebind_llm_sizes, "llama_adapter": llama_adapter_sizes,
         "llama": lambda cfg: {}}


@each_preset
def test_parameter_count(family, preset):
    cfg = FAMILIES[family].presets[preset]
    expected = {"llm": llama_size(cfg.llm)} | SIZES[family](cfg)
    found = {}
    for path, shape in parameters(family, preset).items():
        part = path.split("/")[0]
        found[part] = found.get(part, 0) + math.prod(shape.shape)
    assert found == expected


def test_published_counts():
    for preset, published in (("llama-7b", LLAMA_7B), ("llama-13b", LLAMA_13B), ("llama2-7b-chat", LLAMA_7B)):
        assert count(parameters("llama", preset)) == published
    for preset, published in (("minigpt4-7b", LLAMA_7B), ("minigpt4-13b", LLAMA_13B)):
        language = {path: shape for path, shape in parameters("minigpt4", preset).items() if path.startswith("llm/")}
        assert count(language) == published
    assert round(vit_size(FAMILIES["minigpt4"].presets["minigpt4-7b"].vit) / 1e6) == 986  # BLIP-2: ViT-g


@each_preset
def test_soft_tokens(family, preset):
    expected = {"minigpt4-7b": 32, "minigpt4-13b": 32, "minigpt4-llama2-7b": 64, "minigpt-v2-7b": 256}
    cfg = FAMILIES[family].presets[preset]
    assert cfg.image_tokens == expected.get(preset, 4 if family == "minigpt4" else 0)


@each_preset
def test_each_parameter_is_described_by_one_line_of_axes(family, preset):
    for path, shape in parameters(family, preset).items():
        lines = [names for pattern, names in axes(family, preset) if re.fullmatch(pattern, path)]
        assert len(lines) == 1, f"{path}: {lines}"
        assert len(lines[0]) == len(shape.shape), f"{path} {shape.shape}: {lines[0]}"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_line_of_axes_is_idle(family):
    paths = {path for preset in FAMILIES[family].presets for path in parameters(family, preset)}
    # what can be added to a LLaMA stands in no preset of its own
    added = [dataclasses.replace(llama.TINY, injection=form, new_gate=True, lora_rank=2, lora_on=matrices,
                                 bias_on=matrices)
             for form in ("head", "layer", "shared") for matrices in [("q", "k", "v", "o", "gate", "up", "down")]]
    paths |= {path for cfg in added for path in shapes("llama", FAMILIES["llama"].Config(cfg))}
    if family == "imagebind_llm":  # nor does the bind network's older form
        tiny = FAMILIES[family].presets["tiny"]
        legacy = dataclasses.replace(tiny, bind=dataclasses.replace(tiny.bind, legacy=True))
        paths |= shapes(family, legacy).keys()
    idle = [pattern for pattern, _ in axes(family, "tiny") if not any(re.fullmatch(pattern, path) for path in paths)]
    assert idle == []


@each_preset
def test_trained_rules_match(family, preset):
    """The family's own trained set, and for MiniGPT-v2 the LoRA factors with it."""
    rules = FAMILIES[family].trained
    if preset == "minigpt-v2-7b":
        rules = (*rules, "llm/.*/lora_[ab]")
    paths = parameters(family, preset)
    trained = trees.flatten(trees.mask(trees.unflatten(paths), rules))
    lora = {f"llm/layers/attn/{name}/lora_{factor}" for name in "qv" for factor in "ab"}
    gates = {"llm/layers/attn/gate", "llm/layers/gate"}
    expected = {
        "llama": set(),
        "minigpt4": {"projector/w", "projector/b"} | (lora if preset == "minigpt-v2-7b" else set()),
        "imagebind_llm": {path for path in paths if path.startswith("bind/") or path in {"query", *gates}},
        "llama_adapter": {path for path in paths if path.startswith("visual/") or path in {"query", *gates}},
    }
    assert {path for path, is_trained in trained.items() if is_trained} == expected[family]


def test_phases_of_the_release():
    """The numbers of trained parameters at 7B, as counted in the original."""
    family = FAMILIES["imagebind_llm"]
    for phase, published in (("pretrain", 608_190_464 + 131_072 + 1_024), ("finetune", 41_340_928)):
        paths = shapes("imagebind_llm", family.with_phase(family.Config(), phase))
        trained = {path: shape for path, shape in paths.items() if trees.matches(path, family.phases[phase])}
        assert count(trained) == published


def mesh(fsdp, tensor, data=1):
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(("family", "preset"), REAL, ids=map("/".join, REAL))
def test_meshes_that_divide_every_parameter(family, preset):
    """And no device holds much more than its part: what stays whole is small."""
    paths = parameters(family, preset)
    for fsdp, tensor in itertools.product((1, 8, 16, 64), (1, 2, 4, 8)):
        placed = sharding.shardings(paths, axes(family, preset), mesh(fsdp, tensor))
        assert placed.keys() == paths.keys()
        held = sum(math.prod(placed[path].shard_shape(shape.shape)) for path, shape in paths.items())
        assert held <= count(paths) / (fsdp * tensor) + 0.01 * count(paths)


def test_a_mesh_that_does_not_divide_the_image_tower():
    """1408 = 128 · 11: fsdp 256 shards the feed-forward matrices along their other dimension and no other parameter."""
    every = parameters("minigpt4", "minigpt4-7b")
    rules = axes("minigpt4", "minigpt4-7b")
    assert sharding.exceptions(every, rules, mesh(128, 2)) is None
    placed = sharding.shardings(every, rules, mesh(256, 1))
    assert placed["vit/blocks/mlp/fc1/w"].spec == PartitionSpec(None, None, ("tensor", "fsdp"))
    held = sum(math.prod(placed[path].shard_shape(shape.shape)) for path, shape in every.items())
    assert count(every) / 256 < held < 0.06 * count(every)
    assert "fsdp = 256 does not divide embed = 1,408" in sharding.exceptions(every, rules, mesh(256, 1))
    assert sharding.exceptions(parameters("llama", "llama-13b"), axes("llama", "llama-13b"), mesh(256, 8)) is None


def test_nothing_is_allocated():
    assert all(isinstance(shape, jax.ShapeDtypeStruct) for shape in parameters("llama", "llama-13b").values())
