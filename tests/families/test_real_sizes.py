"""Every preset at its real size, through `jax.eval_shape`: nothing is allocated."""

import functools
import itertools
import math
import re

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from mmjax import sharding, trees
from mmjax.families import FAMILIES, shapes

PRESETS = [(family, preset) for family, module in FAMILIES.items() for preset in module.PRESETS]
REAL = [pair for pair in PRESETS if pair[1] != "tiny"]
each_preset = pytest.mark.parametrize(("family", "preset"), PRESETS, ids=map("/".join, PRESETS))

LLAMA_7B, LLAMA_13B = 6_738_415_616, 13_015_864_320  # as published


@functools.cache
def parameters(family, preset):
    return shapes(family, FAMILIES[family].PRESETS[preset])


def count(paths):
    return sum(math.prod(shape.shape) for shape in paths.values())


def llama_size(c):
    attention = 2 * c.dim * c.heads * c.head_dim + 2 * c.dim * c.kv_heads * c.head_dim
    lora = c.lora_rank * (2 * c.dim + c.heads * c.head_dim + c.kv_heads * c.head_dim)
    ends = c.vocab * c.dim * (1 if c.tied else 2) + c.dim
    return c.depth * (attention + 3 * c.dim * c.hidden + 2 * c.dim + lora) + ends


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


@each_preset
def test_parameter_count(family, preset):
    cfg = FAMILIES[family].PRESETS[preset]
    expected = {"llama": llama_size(cfg.llama)}
    if family == "minigpt4":
        expected |= {"vit": vit_size(cfg.vit), "ln_vision": 2 * cfg.vit.dim}
        if cfg.qformer:
            expected["qformer"] = qformer_size(cfg.qformer, cfg.vit.dim)
        width = cfg.qformer.dim if cfg.qformer else 4 * cfg.vit.dim
        expected["projector"] = width * cfg.llama.dim + cfg.llama.dim
    found = {}
    for path, shape in parameters(family, preset).items():
        part = path.split("/")[0]
        found[part] = found.get(part, 0) + math.prod(shape.shape)
    assert found == expected


def test_published_counts():
    for preset, published in (("llama-7b", LLAMA_7B), ("llama-13b", LLAMA_13B), ("llama2-7b-chat", LLAMA_7B)):
        assert count(parameters("llama", preset)) == published
    for preset, published in (("minigpt4-7b", LLAMA_7B), ("minigpt4-13b", LLAMA_13B)):
        language = {path: shape for path, shape in parameters("minigpt4", preset).items() if path.startswith("llama/")}
        assert count(language) == published
    assert round(vit_size(FAMILIES["minigpt4"].PRESETS["minigpt4-7b"].vit) / 1e6) == 986  # BLIP-2: ViT-g


@each_preset
def test_soft_tokens(family, preset):
    expected = {"minigpt4-7b": 32, "minigpt4-13b": 32, "minigpt4-llama2-7b": 64, "minigpt-v2-7b": 256}
    cfg = FAMILIES[family].PRESETS[preset]
    assert cfg.image_tokens == expected.get(preset, 4 if family == "minigpt4" else 0)


@each_preset
def test_each_parameter_is_described_by_one_line_of_axes(family, preset):
    for path, shape in parameters(family, preset).items():
        lines = [names for pattern, names in FAMILIES[family].AXES if re.fullmatch(pattern, path)]
        assert len(lines) == 1, f"{path}: {lines}"
        assert len(lines[0]) == len(shape.shape), f"{path} {shape.shape}: {lines[0]}"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_line_of_axes_is_idle(family):
    paths = {path for preset in FAMILIES[family].PRESETS for path in parameters(family, preset)}
    if family == "llama":  # LoRA stands in no preset of its own
        paths |= {path for path in parameters("minigpt4", "minigpt-v2-7b") if path.startswith("llama/")}
    idle = [pattern for pattern, _ in FAMILIES[family].AXES if not any(re.fullmatch(pattern, path) for path in paths)]
    assert idle == []


@each_preset
def test_trained_rules_match(family, preset):
    """The family's own trained set, and for MiniGPT-v2 the LoRA factors with it."""
    rules = FAMILIES[family].TRAINED
    if preset == "minigpt-v2-7b":
        rules = (*rules, "llama/.*/lora_[ab]")
    tree = trees.unflatten(parameters(family, preset))
    trained = {path for path, is_trained in trees.flatten(trees.mask(tree, rules)).items() if is_trained}
    lora = {f"llama/layers/attn/{name}/lora_{factor}" for name in "qv" for factor in "ab"}
    assert trained == (
        set() if family == "llama" else {"projector/w", "projector/b"} | (lora if preset == "minigpt-v2-7b" else set()))


def mesh(fsdp, tensor, data=1):
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(("family", "preset"), REAL, ids=map("/".join, REAL))
def test_meshes_that_divide_every_parameter(family, preset):
    """And no device holds much more than its part: what stays whole is small."""
    paths = parameters(family, preset)
    for fsdp, tensor in itertools.product((1, 8, 16, 64), (1, 2, 4, 8)):
        placed = sharding.shardings(paths, FAMILIES[family].AXES, mesh(fsdp, tensor))
        assert placed.keys() == paths.keys()
        held = sum(math.prod(placed[path].shard_shape(shape.shape)) for path, shape in paths.items())
        assert held <= count(paths) / (fsdp * tensor) + 0.01 * count(paths)


def test_a_mesh_too_fine_for_the_picture_tower():
    """1408 = 128 · 11, so fsdp ends at 128 where there is a picture tower; LLaMA alone goes on."""
    for preset in ("llama-7b", "llama-13b"):
        sharding.shardings(parameters("llama", preset), FAMILIES["llama"].AXES, mesh(256, 8))
    sharding.shardings(parameters("minigpt4", "minigpt4-7b"), FAMILIES["minigpt4"].AXES, mesh(128, 2))
    with pytest.raises(ValueError, match="vit/blocks/mlp/fc1/w: embed = 1408 cannot be cut into 256.*128 would work"):
        sharding.shardings(parameters("minigpt4", "minigpt4-7b"), FAMILIES["minigpt4"].AXES, mesh(256, 1))


def test_nothing_is_allocated():
    assert all(isinstance(shape, jax.ShapeDtypeStruct) for shape in parameters("llama", "llama-13b").values())
