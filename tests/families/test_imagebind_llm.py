"""ImageBind-LLM around its towers. Its numbers: tests/parity."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from mmjax import trees
from mmjax.families import imagebind_llm as family
from mmjax.families import llama
from mmjax.inference import generate
from mmjax.models import imagebind
from mmjax.models.pixels import normalise
from tests import tiny

SENSES = imagebind.ImageBindConfig(imagebind.TINY.vision, None, None, imagebind.TINY.depth, None, None,
                                   imagebind.TINY.out)
HEAD = dataclasses.replace(family.PRESETS["tiny"], imagebind=SENSES)  # the last of two layers reads prompts
LAYER, SHARED = (dataclasses.replace(HEAD, llm=dataclasses.replace(HEAD.llm, injection=form))
                 for form in ("layer", "shared"))
ROWS = 4


@functools.cache
def params(cfg):
    return tiny.params("imagebind_llm", cfg)


def images(rows=ROWS, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, *SENSES.vision.input_shape)).astype(np.float32)


def depths(rows=ROWS):
    return np.random.default_rng(1).normal(size=(rows, *SENSES.depth.input_shape)).astype(np.float32)


def batch(weights=None, image=None, **media):
    """Words, with one image a row and senses, each of weight 1 or as given, [B]."""
    given = media if image is None else {"image": image} | media
    ones = {name: np.ones(len(x), np.float32) for name, x in given.items()}
    return dataclasses.replace(
        tiny.batch(rows=ROWS, image_count=0), images=None if image is None else image[:, None], media=media or None,
        weights=(ones | (weights or {})) if given else None)


@functools.cache
def compiled(module, method="__call__"):
    return tiny.jit(lambda params, batch: module.apply({"params": params}, batch, method=method))


def run(cfg, batch, method="__call__"):
    return jax.tree.map(np.asarray, compiled(family.ImageBindLLM(cfg), method)(params(cfg), batch))


@pytest.mark.parametrize("cfg", [HEAD, LAYER, SHARED], ids=["head", "layer", "shared"])
def test_a_batch_without_media_is_plain_llamas(cfg):
    words = batch()
    plain = {path: leaf for path, leaf in trees.flatten(params(cfg)).items() if path.startswith("llm/")}
    plain = trees.unflatten({path: leaf for path, leaf in plain.items() if "gate/w" in path or "gate" not in path})
    module = llama.TextLlama(llama.TextLlamaConfig(dataclasses.replace(cfg.llm, injection="")))
    expected = compiled(module)(plain, words)
    np.testing.assert_array_equal(run(cfg, words), expected)
    assert np.abs(run(cfg, batch(image=images())) - expected).max() > 0.01


def test_pixels_are_normalised_by_the_model_and_rows_without_a_image_see_zeros():
    side, valid = SENSES.vision.image_size, np.array([True, False, True, False])
    pixels = np.random.default_rng(2).integers(0, 256, (ROWS, side, side, 3), np.uint8)
    seen = dataclasses.replace(batch(image=pixels), image_valid=valid[:, None])
    expected = run(HEAD, batch(image=np.where(valid[:, None, None, None], normalise(pixels), np.float32(0))), "feature")
    np.testing.assert_allclose(run(HEAD, seen, "feature"), expected, atol=2e-6)
    np.testing.assert_array_equal(run(HEAD, seen, "feature")[1], run(HEAD, seen, "feature")[3])
    assert np.abs(expected[0] - expected[1]).max() > 0.01


def test_prompts_are_the_image_plus_a_query_in_the_last_layers_alone():
    seen = batch(image=images())
    x, injection = run(HEAD, seen, "encode")
    np.testing.assert_array_equal(x, params(HEAD)["llm"]["embedding"][seen.tokens])
    assert injection.shape == (2, ROWS, 1, HEAD.llm.dim)
    assert not injection[0].any()
    _, bound = run(LAYER, seen, "encode")
    np.testing.assert_allclose(injection[1], bound[1] + params(HEAD)["query"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(bound[0], bound[1])
    assert np.abs(bound[0, 0] - bound[0, 1]).max() > 1e-3  # each row its own


def test_a_sense_of_no_weight_is_no_sense():
    """So rows of different senses go in one batch."""
    both = {"image": images(), "depth": depths()}
    some = np.array([1, 0, 0.5, 1], np.float32)
    found = run(HEAD, batch({"depth": some}, **both), "feature")
    alone, equal = run(HEAD, batch(image=images()), "feature"), run(HEAD, batch(**both), "feature")
    np.testing.assert_array_equal(found[1], alone[1])
    np.testing.assert_allclose(found[[0, 3]], equal[[0, 3]], rtol=1e-6)
    half, whole = np.asarray(found[2]), np.asarray(equal[2])
    np.testing.assert_allclose(1.5 * half, 0.5 * alone[2] + whole, atol=1e-5)


def test_a_feature_made_before_takes_the_place_of_its_senses():
    seen = batch(image=images())
    ready = dataclasses.replace(batch(), features=np.asarray(run(HEAD, seen, "feature")))
    np.testing.assert_allclose(run(HEAD, ready), run(HEAD, seen), atol=2e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_each_row_is_told_of_its_own_image(beams):
    seen = batch(image=images())
    same = dataclasses.replace(seen, tokens=np.tile(seen.tokens[:1], (ROWS, 1)), valid=np.ones_like(seen.valid))
    config = generate.GenerateConfig(max_new_tokens=6, num_beams=beams, eos=-1)
    strong = trees.unflatten(trees.flatten(params(HEAD)) | {"llm/layers/attn/gate": np.full((2, 4), 3, np.float32)})

    def ids(batch):
        return np.asarray(generate.generate(family.ImageBindLLM(HEAD), strong, batch, config).sequences)

    together = ids(same)
    moved = jax.tree.map(lambda leaf: np.roll(leaf, 1, axis=0), same)
    np.testing.assert_array_equal(ids(moved), np.roll(together, 1, axis=0))
    assert len(set(map(tuple, together.tolist()))) > 1


def test_finetuning_adds_what_it_trains():
    tuned = family.with_phase(HEAD, "finetune")
    before, after = (trees.flatten(params(cfg)) for cfg in (HEAD, tuned))
    added = after.keys() - before.keys()
    assert before.keys() <= after.keys()
    assert added == {f"llm/layers/{part}/{leaf}" for leaf in ("lora_a", "lora_b", "b")
                     for part in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
                     if (part, leaf) not in (("attn/k", "b"), ("attn/v", "b"))}
    assert added <= {path for path in after if trees.matches(path, family.PHASES["finetune"])}
    assert {after[f"llm/layers/mlp/{name}/lora_a"].shape[-1] for name in ("gate", "down")} == {family.LORA_RANK}
    assert tuned.llm.lora_alpha == family.LORA_RANK and tuned.llm.lora_dropout == 0
    assert family.with_phase(tuned, "finetune") is tuned and family.with_phase(HEAD, "pretrain") is HEAD


@pytest.mark.parametrize("cfg", [HEAD, LAYER, SHARED], ids=["head", "layer", "shared"])
def test_each_parameter_trains_in_one_phase_at_most(cfg):
    paths = trees.flatten(params(family.with_phase(cfg, "finetune")))
    phases = {path: {phase for phase, rules in family.PHASES.items() if trees.matches(path, rules)} for path in paths}
    assert max(map(len, phases.values())) == 1
    gates = {path for path in paths if path.split("/")[-1] == "gate"}
    assert len(gates) == 1 and all(phases[path] == {"pretrain"} for path in gates)
    assert not any(phases[path] for path in paths if path.startswith("imagebind/"))


def test_start_values():
    """Gates, biases and LoRA's second matrix 0, norms 1, queries N(0, 1), LoRA's first as torch.nn.Linear's weight."""
    wide = dataclasses.replace(HEAD, llm=dataclasses.replace(HEAD.llm, depth=12), query_layers=12)
    module = family.ImageBindLLM(family.with_phase(wide, "finetune"))
    words = batch()  # reaches no tower
    for path, leaf in trees.flatten(tiny.jit(module.init)(jax.random.key(0), words)["params"]).items():
        if trees.matches(path, ["llm/.*/(gate|b|lora_b)"]):
            assert not leaf.any(), path
        elif path.endswith("scale"):
            assert (leaf == 1).all(), path
        elif path == "query":
            assert abs(leaf.mean()) < 0.2 and abs(leaf.std() - 1) < 0.2
        elif path.endswith("lora_a"):
            bound = np.prod(leaf.shape[1:-1]) ** -0.5
            assert 0.8 * bound < np.abs(leaf).max() <= bound and abs(leaf.mean()) < 0.3 * bound, path
