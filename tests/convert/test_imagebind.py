"""ImageBind's tables and the bind network's, there and back, and sizes from tensors."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from mmjax import trees
from mmjax.convert import imagebind, torch_file
from mmjax.convert.tables import Computed, Problems, backward, forward
from mmjax.models import bind as bind_model
from mmjax.models import imagebind as model
from mmjax.models.bind import Bind
from mmjax.models.imagebind import IMAGEBIND_HUGE, SENSES, TINY, ImageBind, example
from tests.convert.released import assert_same, assert_there_and_back, lazy, read, whole

GOLDEN = Path(__file__).parents[1] / "golden" / "imagebind_llm"
ARCH = json.loads((GOLDEN / "config.json").read_text())["imagebind"]
LEGACY = dataclasses.replace(bind_model.TINY, legacy=True)
TABLES = {
    "imagebind": imagebind.entries(TINY),
    "bind": imagebind.bind_entries(bind_model.TINY),
    "bind article": imagebind.bind_entries(bind_model.TINY, article=True),
    "bind legacy": imagebind.bind_entries(LEGACY),
}


def shapes_only(entries):
    """Tensors of any size that are never read."""
    return {key: Computed(key, entry.key_shape, np.float32, None) for entry in entries for key in entry.keys}


def config(tensors, arch, cls=imagebind.config):
    problems = Problems()
    found = cls(tensors, arch, problems)
    return found, problems


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("name", TABLES)
def test_there_and_back(name, dtype):
    assert_there_and_back(TABLES[name], dtype)


def filled(entries, file, ignored):
    """The parameters of one of the golden set's files, and the tensors they were made of."""
    held = torch_file.load(GOLDEN / file)
    held = {key: tensor for key, tensor in held.get("model", held).items()
            if not key.startswith(("llama.", "llma.", "prefix_query."))}
    problems = Problems()
    params = whole(forward(entries, held, ignored, file, problems))
    assert not problems
    return params, held


def test_a_whole_file_there_and_back():
    held = torch_file.load(GOLDEN / "imagebind.pth")
    cfg, problems = config(held, ARCH)
    assert not problems
    entries = imagebind.entries(cfg)
    params, held = filled(entries, "imagebind.pth", imagebind.IGNORED)
    assert_same(read(backward(entries, params) | imagebind.buffers(cfg)), read(held))


@pytest.mark.parametrize("file", ["bind_network.pth", "adapter.pth", "adapter_pretrain.pth", "adapter_legacy.pth"])
def test_a_bind_network_there_and_back(file):
    held = torch_file.load(GOLDEN / file)
    problems = Problems()
    tensors = held.get("model", held)
    cfg = imagebind.bind_config(tensors, problems)
    assert not problems and cfg.legacy == (file == "adapter_legacy.pth")
    entries = imagebind.bind_entries(cfg, imagebind.is_article(tensors))
    params, held = filled(entries, file, imagebind.BIND_IGNORED)
    back = read(backward(entries, params))
    assert_same(back, {key: tensor.read() for key, tensor in held.items() if key in back})


def test_both_names_of_the_bind_network_mean_the_same():
    article, _ = filled(imagebind.bind_entries(_golden_bind(), article=True), "bind_network.pth", ())
    release, _ = filled(imagebind.bind_entries(_golden_bind()), "adapter_pretrain.pth", imagebind.BIND_IGNORED)
    assert_same(article, release)
    third = {entry.path: entry.keys for entry in TABLES["bind article"]}["bind/block_3/down/w"]
    assert third == ("feed_forward_3.w3.weight",)


def _golden_bind():
    return imagebind.bind_config(torch_file.load(GOLDEN / "bind_network.pth"), Problems())


@pytest.mark.parametrize("cfg", [TINY, IMAGEBIND_HUGE, dataclasses.replace(TINY, text=None, thermal=None)])
def test_tables_fill_the_towers_exactly(cfg):
    inputs = jax.eval_shape(lambda: example(cfg))
    shapes = trees.flatten(jax.eval_shape(ImageBind(cfg).init, jax.random.key(0), inputs)["params"])
    assert {entry.path: entry.shape for entry in imagebind.entries(cfg)} == {
        f"imagebind/{path}": shape.shape for path, shape in shapes.items()}


@pytest.mark.parametrize("cfg", [bind_model.TINY, LEGACY, bind_model.BIND_7B])
def test_tables_fill_the_bind_network_exactly(cfg):
    x = jax.ShapeDtypeStruct((1, 1, cfg.inputs), np.float32)
    shapes = trees.flatten(jax.eval_shape(Bind(cfg).init, jax.random.key(0), x)["params"])
    expected = {f"bind/{path}": shape.shape for path, shape in shapes.items()}
    assert {entry.path: entry.shape for entry in imagebind.bind_entries(cfg)} == expected


def test_released_keys():
    held = shapes_only(imagebind.entries(IMAGEBIND_HUGE)) | imagebind.buffers(IMAGEBIND_HUGE)
    assert len(held) == 1_311
    assert held["modality_trunks.audio.blocks.11.attn.bias_k"].shape == (1, 1, 768)
    assert held["modality_heads.imu.3.weight"].shape == (1_024, 512)
    assert held["modality_postprocessors.text.1.log_logit_scale"].shape == ()
    assert held["modality_preprocessors.vision.rgbt_stem.proj.1.weight"].shape == (1_280, 3, 2, 14, 14)


def test_what_a_layout_means():
    source = lazy(TABLES["imagebind"])
    params = whole(forward(TABLES["imagebind"], source, (), "file", Problems()))
    D, N = TINY.audio.dim, TINY.audio.heads
    H = D // N
    which, head, place, layer = 2, 1, 3, 1  # of the values, the second head's fourth element, in the second block
    row = source["modality_trunks.audio.blocks.1.attn.in_proj_weight"].read()[which * D + head * H + place]
    np.testing.assert_array_equal(params["imagebind/audio/blocks/attn/qkv/w"][layer, :, which, head, place], row)
    window = source["modality_preprocessors.imu.imu_stem.proj.weight"].read()
    np.testing.assert_array_equal(params["imagebind/imu/stem/window/w"][4, 5], window[:, 4 * 8 + 5])


def test_released_sizes_need_no_arch():
    assert config(shapes_only(imagebind.entries(IMAGEBIND_HUGE)), {}) == (IMAGEBIND_HUGE, [])


def test_sizes_that_leave_something_over():
    """Images, maps and recordings that patches and windows do not fill."""
    arch = ARCH | {"image_size": 60, "depth_thermal_size": 53, "depth_kernel_size": 14, "audio_kernel_size": 12,
                   "audio_stride": 7, "imu_len": 83, "text_context": 33, "vision_num_heads": 6}
    towers = config(golden_tensors(), ARCH)[0].towers
    changed = {"vision": {"image_size": 60, "heads": 6}, "text": {"context": 33}, "audio": {"patch": 12, "stride": 7},
               "depth": {"height": 53, "width": 53, "patch": 14, "stride": 14}, "imu": {"steps": 83},
               "thermal": {"height": 53, "width": 53}}
    cfg = dataclasses.replace(config(golden_tensors(), ARCH)[0], **{
        sense: dataclasses.replace(towers[sense], **changed[sense]) for sense in SENSES})
    assert config(shapes_only(imagebind.entries(cfg)), arch) == (cfg, [])
    out = jax.eval_shape(lambda x: ImageBind(cfg).init_with_output(jax.random.key(0), x)[0], example(cfg, 3))
    assert {sense: leaf.shape for sense, leaf in out.items()} == {sense: (3, cfg.out) for sense in SENSES}


def test_point_clouds_are_left_out():
    entries, problems = TABLES["imagebind"], Problems()
    extra = {key: Computed(key, (3,), np.float32, None) for key in (
        "point_trunk.blocks.0.x", "modality_heads.point.0.weight", "modality_postprocessors.point.1.log_logit_scale")}
    forward(entries, lazy(entries) | extra, imagebind.IGNORED, "imagebind_w3D.pth", problems)
    assert not problems


def test_towers_that_a_file_does_not_have():
    some = dataclasses.replace(IMAGEBIND_HUGE, **{sense: None for sense in SENSES if sense not in ("vision", "depth")})
    assert config(shapes_only(imagebind.entries(some)), {}) == (some, [])


def golden_tensors(*left_out):
    return {key: t for key, t in torch_file.load(GOLDEN / "imagebind.pth").items() if key not in left_out}


def test_sizes_that_tensors_do_not_show_must_be_told():
    found, problems = config(golden_tensors(), {})
    assert found is None and len(problems) == len(SENSES)
    assert any("audio tower" in p and "not determine heads, height, width, stride" in p
               and '"audio_stride": "..."' in p for p in problems)


@pytest.mark.parametrize(("change", "message"), [
    ({"vision_embed_dim": 40}, "vision dim is 40, but in the tensors it is 36"),
    ({"kernel_size": [2, 7, 7]}, "vision patch is 7, but in the tensors it is 14"),
    ({"kernel_size": 14}, r"kernel_size is 14, expected \[frames, patch, patch\]"),
    ({"imu_embed": 32}, "unknown 'imu_embed'; did you mean 'imu_embed_dim'"),
    ({"depth_num_heads": 5}, "5 heads do not divide the depth tower's width 24"),
    ({"audio_num_heads": "4"}, "audio_num_heads is '4', expected a whole number"),
    ({"imu_drop_path": 1}, "imu_drop_path is 1, expected a probability"),
    ({"audio_target_len": 80}, r"audio tower's position table has 11 rows, but inputs of shape \[1, 32, 80\]"),
    ({"out_embed_dim": 25}, r"must have one width, got \[24, 25\]"),
    ({"out_embed_dim": [24]}, r"out_embed_dim is \[24\], expected a whole number"),
])
def test_what_is_told_wrongly(change, message):
    _, problems = config(golden_tensors(), ARCH | change)
    with pytest.raises(ValueError, match=message):
        problems.check("Cannot convert")


def test_a_broken_file_is_reported_not_crashed_on():
    key = "modality_preprocessors.audio.rgbt_stem.proj.weight"
    cfg, problems = config(golden_tensors(key), {k: v for k, v in ARCH.items() if not k.startswith("audio")})
    assert cfg is None and "audio tower" in problems[0]
    cfg, problems = config(golden_tensors(key), ARCH)  # told everything, the table's line says what is missing
    forward(imagebind.entries(cfg), golden_tensors(key), imagebind.IGNORED, "imagebind.pth", problems)
    assert problems == [f"imagebind.pth: {key} is missing"]
    assert config({}, ARCH)[1] and imagebind.bind_config({}, empty := Problems()) is None and len(empty) == 2


def test_models_and_tables_name_the_same_senses():
    assert imagebind.CLASSES.keys() == imagebind.STEMS.keys() == set(model.SENSES)
