"""LLaMA-Adapter v1 and v2 around their towers. Their numbers: tests/parity."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from mmjax import trees
from mmjax.config import OptimConfig
from mmjax.families import llama, llama_adapter, shapes
from mmjax.families.llama_adapter import PHASES, PRESETS, TRAINED, LlamaAdapter, LlamaAdapterConfig, with_phase
from mmjax.models import clip, visual
from mmjax.models.masks import cached_mask
from mmjax.models.pixels import MEAN, STD
from mmjax.training import optim, steps
from tests import tiny

V2 = PRESETS["tiny"]
V1 = dataclasses.replace(V2, clip=None, visual=None)
FINETUNED = with_phase(V2, "finetune")
SIZE = V2.image_size
VISUAL = {path for path in shapes("llama_adapter", V2) if path.startswith("visual/")}
each_version = pytest.mark.parametrize("cfg", [V1, V2], ids=["v1", "v2"])


@functools.cache
def params(cfg):
    return tiny.params("llama_adapter", cfg)


def batch(rows=2, image_count=1):
    """Words, and normalised images."""
    random = np.random.default_rng(1)
    images = random.normal(size=(rows, image_count, 3, SIZE, SIZE)).astype(np.float32) if image_count else None
    return dataclasses.replace(tiny.batch(rows, image_count=0), images=images)


@functools.cache
def logits(cfg):
    return tiny.jit(lambda params, batch: LlamaAdapter(cfg).apply({"params": params}, batch))


@functools.cache
def encode(cfg):
    return tiny.jit(lambda params, batch: LlamaAdapter(cfg).apply({"params": params}, batch, method="encode"))


@each_version
def test_closed_gates_leave_llama_as_it_is(cfg):
    closed = trees.map_with_path(lambda path, leaf: 0 * leaf if path.endswith("attn/gate") else leaf, params(cfg))
    plain = llama.TextLlamaConfig(dataclasses.replace(cfg.llm, injection=""))
    expected = tiny.jit(llama.TextLlama(plain).apply)({"params": {"llm": closed["llm"]}}, batch())
    np.testing.assert_array_equal(logits(cfg)(closed, batch()), expected)
    assert np.abs(logits(cfg)(params(cfg), batch()) - expected).max() > 1e-3


@each_version
def test_prompts_go_to_the_last_layers_in_order(cfg):
    cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, depth=4), query_layers=3)
    weights = params(cfg)
    _, injection = encode(cfg)(weights, batch())
    assert injection.shape == (4, 2, cfg.query_len, cfg.llm.dim)
    np.testing.assert_array_equal(injection[0], 0)
    moved = injection[1:] - weights["query"][:, None]
    if cfg.visual:  # the image moves the prompts of all layers alike, and those of each row by its own image
        np.testing.assert_allclose(moved, np.broadcast_to(moved[:1], moved.shape), atol=1e-5)
        assert np.abs(moved[:, 0] - moved[:, 1]).max() > 1e-2
    else:
        np.testing.assert_array_equal(moved, 0)


@each_version
def test_gradients_reach_what_is_injected_alone(cfg):
    """Gates of the layers below exist and stay where they are; v1's batch of text alone is enough to train it."""
    trained, frozen = trees.split(params(cfg), trees.mask(params(cfg), TRAINED))
    grads = tiny.jit(jax.grad(lambda trained: steps.loss(LlamaAdapter(cfg), trees.merge(trained, frozen), batch())[0]))
    flat = {path: leaf for path, leaf in trees.flatten(grads(trained)).items() if leaf is not None}
    assert flat.keys() == {"query", "llm/layers/attn/gate"} | (VISUAL if cfg.visual else set())
    gate = np.asarray(flat["llm/layers/attn/gate"])
    np.testing.assert_array_equal(gate[:-cfg.query_layers], 0)
    assert (gate[-cfg.query_layers:] != 0).all()
    assert all(np.any(leaf) for leaf in flat.values())


def test_decoding_with_a_cache_is_the_whole_pass():
    rows = dataclasses.replace(batch(), valid=np.ones((2, 12), bool))
    module, weights = LlamaAdapter(V2), {"params": params(V2)}
    x, injection = encode(V2)(params(V2), rows)

    def run(x, cache, start, injection):
        place = slice(start, start + x.shape[1])
        hidden, cache = module.apply(weights, x, rows.positions[:, place], cached_mask(rows.valid, start), cache, start,
                                     injection, method="decode")
        return module.apply(weights, hidden, method="logits"), cache

    cache, parts = module.empty_cache(2, 12), []
    for start, end in ((0, 9), (9, 12)):
        part, cache = tiny.jit(functools.partial(run, start=start))(x[:, start:end], cache, injection=injection)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, 1), logits(V2)(params(V2), rows), atol=1e-5)


def test_text_alone_comes_with_a_image_of_zeros():
    dark = dataclasses.replace(batch(), images=np.zeros((2, 1, 3, SIZE, SIZE), np.float32))
    np.testing.assert_array_equal(logits(V2)(params(V2), batch(image_count=0)), logits(V2)(params(V2), dark))


def test_images_pass_in_the_order_blue_green_red():
    pixels = np.random.default_rng(2).integers(0, 256, (2, 1, SIZE, SIZE, 3), np.uint8)
    passed = V2.images.normalise(pixels)
    blue = pixels[:, 0, ..., 2].astype(np.float32) / 255
    np.testing.assert_allclose(passed[:, 0, 0], (blue - MEAN[0]) / STD[0], atol=1e-6)
    np.testing.assert_array_equal(V2.images.normalise(passed), passed)
    raw, ready = (encode(V2)(params(V2), dataclasses.replace(batch(), images=x))[1] for x in (pixels, passed))
    np.testing.assert_allclose(raw, ready, atol=1e-5)


def test_two_images_a_row_are_refused():
    with pytest.raises(ValueError, match="reads one image per row, got 2"):
        LlamaAdapter(V2).apply({"params": params(V2)}, batch(image_count=2))


def test_a_config_has_both_parts_of_v2_or_none():
    with pytest.raises(ValueError, match="v1 has neither; only clip is given"):
        LlamaAdapterConfig(clip=clip.TINY)
    with pytest.raises(ValueError, match="v1 has neither; only visual is given"):
        LlamaAdapterConfig(visual=visual.TINY)
    assert (V1.image_size, V2.image_size) == (None, 28)


def names(cfg, rules):
    tree = trees.unflatten(shapes("llama_adapter", cfg))
    return {path for path, is_trained in trees.flatten(trees.mask(tree, rules)).items() if is_trained}


def test_what_each_phase_trains():
    with_all = dataclasses.replace(FINETUNED, llm=dataclasses.replace(
        FINETUNED.llm, new_gate=True, lora_rank=2, lora_on=("q", "k", "v", "o", "gate", "up", "down")))
    gates = {"llm/layers/attn/gate", "llm/layers/attn/new_gate"}
    assert names(with_all, PHASES["pretrain"]) == VISUAL | {"query"} | gates
    norms = {"llm/layers/attn_norm/scale", "llm/layers/mlp_norm/scale", "llm/norm/scale"}
    biases = {f"llm/layers/{name}/b" for name in ("attn/q", "attn/o", "mlp/gate", "mlp/up", "mlp/down")}
    assert names(with_all, PHASES["finetune"]) == norms | biases  # neither LoRA nor the biases of the image side


def test_a_phase_changes_the_architecture():
    assert with_phase(V2, "pretrain") == V2 and with_phase(V1, "pretrain") == V1
    before, after = shapes("llama_adapter", V2), shapes("llama_adapter", FINETUNED)
    assert after.keys() - before.keys() == names(FINETUNED, (r"llm/.*/b",)) and before.keys() <= after.keys()
    assert with_phase(FINETUNED, "finetune") == FINETUNED
    with pytest.raises(ValueError, match='v1 has one phase, "pretrain"'):
        with_phase(V1, "finetune")


@pytest.mark.parametrize(("cfg", "phase"), [(V1, "pretrain"), (V2, "pretrain"), (FINETUNED, "finetune")],
                         ids=["v1", "v2-pretrain", "v2-finetune"])
def test_a_step_changes_what_its_phase_trains(cfg, phase):
    optimizer = optim.optimizer(OptimConfig(init_lr=1e-2, min_lr=1e-3, warmup_steps=0, weight_decay=0.0))
    trained, frozen = trees.split(params(cfg), trees.mask(params(cfg), PHASES[phase]))
    state = steps.start(tiny.copied(trained), optimizer, 0)
    step = tiny.compiled(steps.train_step(LlamaAdapter(cfg), optimizer), state, frozen, batch())
    mark = int(steps.fingerprint(frozen))
    state, metrics = step(state, frozen, batch())
    assert bool(metrics["finite"]) and int(steps.fingerprint(frozen)) == mark
    before, after = trees.flatten(trained), trees.flatten(state.params)
    changed = {path for path, leaf in after.items() if leaf is not None and np.any(leaf != before[path])}
    assert changed == names(cfg, PHASES[phase])


def test_real_sizes():
    """The released models, through eval_shape."""

    def count(preset, phase=None, rules=(".*",)):
        cfg = with_phase(PRESETS[preset], phase)
        held = shapes("llama_adapter", cfg)
        return sum(math.prod(held[path].shape) for path in names(cfg, rules))

    language = 6_738_415_616
    v1 = 30 * 10 * 4_096 + 32 * 32  # queries and gates: 1.2 million, as the paper says
    assert count("llama-adapter-7b", rules=TRAINED) == v1
    assert count("llama-adapter-7b") == language + v1
    queries = 31 * 10 * 4_096 + 32 * 32
    image_side = 303_966_208  # CLIP's ViT-L/14 with its projection
    visual_side = count("llama-adapter-v2-7b", rules=("visual/.*",))
    assert visual_side == 768 * 768 + 3 * 768 + 10 * 768 + 8 * (12 * 768**2 + 13 * 768) + 768 * 4_096 + 3 * 4_096
    assert count("llama-adapter-v2-7b", rules=TRAINED) == visual_side + queries
    assert count("llama-adapter-v2-7b") == language + image_side + visual_side + queries
    tuned = (2 * 32 + 1) * 4_096 + 32 * (3 * 4_096 + 2 * 11_008)  # norms and biases
    assert count("llama-adapter-v2-7b", "finetune", PHASES["finetune"]) == tuned


def test_an_example_has_a_image_where_the_model_reads_one():
    assert llama_adapter.example(V1).images is None
    assert llama_adapter.example(V2).images.shape == (1, 1, 3, SIZE, SIZE)
