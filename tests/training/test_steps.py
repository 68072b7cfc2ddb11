"""Loss and training step on tiny models. A recorded run: tests/parity."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax import trees
from mmjax.config import OptimConfig
from mmjax.families import FAMILIES, imagebind_llm, llama, llama_adapter, minigpt4, shapes
from mmjax.models import imagebind
from mmjax.models.llama import LlamaConfig
from mmjax.training import optim, steps
from tests import tiny

ADAMW = optim.optimizer(OptimConfig(init_lr=1e-2, min_lr=1e-3, warmup_steps=0))
LLAMA = llama.PRESETS["tiny"]
WORDS = tiny.batch(image_count=0)


def parts(family, cfg, rules):
    """(trained, frozen) random parameters."""
    params = tiny.params(family, cfg)
    return trees.split(params, trees.mask(params, rules))


@functools.cache
def starter(optimizer):
    return tiny.jit(lambda trained, seed: steps.start(trained, optimizer, seed))


def fresh_state(trained, optimizer=ADAMW, seed=0):
    return starter(optimizer)(tiny.copied(trained), seed)


def run(module, trained, frozen, batches, optimizer):
    """(last state, metrics of each step)"""
    state = fresh_state(trained, optimizer)
    step = tiny.compiled(steps.train_step(module, optimizer), state, frozen, batches[0])
    metrics = []
    for batch in batches:
        state, measured = step(state, frozen, batch)
        metrics.append(measured)
    return state, metrics


def bits(tree):
    return {path: np.asarray(leaf).tobytes() for path, leaf in trees.flatten(tree).items() if leaf is not None}


@functools.cache
def projector_step():
    """MiniGPT-4's own training: (step, first state's maker, frozen)."""
    trained, frozen = parts("minigpt4", tiny.MINIGPT4, minigpt4.TRAINED)
    fresh = functools.partial(fresh_state, trained, ADAMW)
    step = tiny.compiled(steps.train_step(minigpt4.MiniGPT4(tiny.MINIGPT4), ADAMW), fresh(), frozen, tiny.batch())
    return step, fresh, frozen


def test_training_changes_the_trained_part_and_no_bit_of_the_rest():
    step, fresh, frozen = projector_step()
    state, before, mark = fresh(), bits(frozen), int(steps.fingerprint(frozen))
    first, losses = bits(state.params), []
    for _ in range(5):
        state, metrics = step(state, frozen, tiny.batch())
        losses.append(float(metrics["loss"]))
        assert bool(metrics["finite"])
    assert bits(frozen) == before
    assert int(steps.fingerprint(frozen)) == mark
    after = bits(state.params)
    assert first.keys() == after.keys() == {"projector/w", "projector/b"}
    assert all(after[path] != first[path] for path in after)
    assert losses == sorted(losses, reverse=True)
    assert int(state.step) == 5
    assert int(metrics["tokens"]) == tiny.batch().loss_mask[:, 1:].sum()


def test_optimizer_state_exists_for_the_trained_part_alone():
    _, fresh, _ = projector_step()
    held = sum(leaf.size for leaf in jax.tree.leaves(fresh().opt_state))
    trained = sum(leaf.size for leaf in jax.tree.leaves(fresh().params))
    assert held == 2 * trained + 2  # two moments, two counters


@pytest.mark.extended
def test_compiled_step_has_no_room_for_gradients_of_the_frozen_part():
    """A model whose weights outweigh its activations: gradients of all of them would need their own size again."""
    deep = LlamaConfig(vocab=256, depth=16, dim=128, heads=4, kv_heads=4, head_dim=32, hidden=256)
    cfg = dataclasses.replace(tiny.MINIGPT4, qformer=None, llm=deep)
    params = trees.unflatten(shapes("minigpt4", cfg))

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    def memory(rules):
        trained, frozen = trees.split(params, trees.mask(params, rules))
        state = jax.eval_shape(lambda trained: steps.start(trained, ADAMW, 0), trained)
        step = steps.train_step(minigpt4.MiniGPT4(cfg), ADAMW)
        used = tiny.compiled(step, state, frozen, tiny.batch(rows=1, length=8)).memory_analysis()
        return used, size((state.params, state.opt_state))

    used, state = memory(minigpt4.TRAINED)
    assert used.temp_size_in_bytes < size(params["llm"]) / 4
    assert used.output_size_in_bytes < state + 1_000  # the state and a few numbers come out, in the memory
    assert used.alias_size_in_bytes >= state  # that went in
    full, _ = memory((r"projector/.*", r"llm/.*"))
    assert full.temp_size_in_bytes > size(params["llm"])  # the same measure does see gradients where they are


def test_state_is_donated():
    step, fresh, frozen = projector_step()
    state = fresh()
    step(state, frozen, tiny.batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


def test_a_loss_that_is_not_finite_changes_nothing_and_is_reported():
    step, fresh, frozen = projector_step()
    state, _ = step(fresh(), frozen, tiny.batch())
    before = bits({"params": state.params, "adam": trees.unflatten(leaves(state.opt_state))})
    broken = trees.flatten(frozen)
    broken["llm/norm/scale"] = broken["llm/norm/scale"] * jnp.nan
    state, metrics = step(state, trees.unflatten(broken), tiny.batch())
    assert not bool(metrics["finite"]) and not bool(metrics["applied"])
    assert not np.isfinite(metrics["loss"])
    assert bits({"params": state.params, "adam": trees.unflatten(leaves(state.opt_state))}) == before
    assert int(state.step) == 2
    state, metrics = step(state, frozen, tiny.batch())
    assert bool(metrics["finite"]) and bool(metrics["applied"])


def without_targets(batch):
    return dataclasses.replace(batch, loss_mask=np.zeros_like(batch.loss_mask))


def test_a_step_without_targets_changes_nothing_and_is_reported():
    """Adam's moments and the weight decay would move the parameters without a gradient."""
    step, fresh, frozen = projector_step()
    state, _ = step(fresh(), frozen, tiny.batch())
    before = bits({"params": state.params, "adam": trees.unflatten(leaves(state.opt_state))})
    state, metrics = step(state, frozen, without_targets(tiny.batch()))
    assert bool(metrics["finite"]) and not bool(metrics["applied"]) and int(metrics["tokens"]) == 0
    assert bits({"params": state.params, "adam": trees.unflatten(leaves(state.opt_state))}) == before
    assert int(state.step) == 2


def leaves(tree):
    return {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(tree))}


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_batch_without_targets_has_no_loss_and_no_gradients(reduction):
    module, params = llama.TextLlama(LLAMA), tiny.params("llama", LLAMA)

    @tiny.jit
    def run(params, batch):
        def total(params):
            value, aux = steps.loss(module, params, batch, reduction)
            return value.sum(), (value, aux["tokens"])

        (_, told), gradients = jax.value_and_grad(total, has_aux=True)(params)
        return told, gradients

    (value, tokens), gradients = run(params, without_targets(WORDS))
    assert not value.any() and not tokens
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(run(params, WORDS)[1]))


SIGHT = dataclasses.replace(  # one tower is enough
    imagebind_llm.PRESETS["tiny"], imagebind=imagebind.ImageBindConfig(
        imagebind.TINY.vision, None, None, None, None, None, imagebind.TINY.out))
TOKEN = dataclasses.replace(SIGHT, llm=dataclasses.replace(SIGHT.llm, injection="layer"))


@pytest.mark.parametrize(("cfg", "phase", "own"), [
    (SIGHT, "pretrain", r"bind/.*|query|llm/layers/attn/gate"),
    (TOKEN, "pretrain", r"bind/.*|llm/layers/gate"),
    (SIGHT, "finetune", r"llm/.*(norm/scale|/b|/lora_[ab])"),
], ids=["pretrain", "pretrain, token form", "finetune"])
def test_a_phase_moves_its_own_parameters_and_no_bit_of_the_others(cfg, phase, own):
    cfg = imagebind_llm.with_phase(cfg, phase)
    trained, frozen = parts("imagebind_llm", cfg, imagebind_llm.PHASES[phase])
    sgd = optax.sgd(1e-2)  # moves nothing without a gradient
    side = cfg.image_size
    images = np.random.default_rng(0).normal(size=(4, 1, 3, side, side)).astype(np.float32)
    batch = dataclasses.replace(WORDS, images=images, weights={"image": np.ones(4, np.float32)})
    first, before, mark = bits(trained), bits(frozen), int(steps.fingerprint(frozen))
    state, metrics = run(imagebind_llm.ImageBindLLM(cfg), trained, frozen, [batch] * 2, sgd)
    assert all(bool(each["finite"]) for each in metrics)
    assert bits(frozen) == before and int(steps.fingerprint(frozen)) == mark
    after = bits(state.params)
    assert [path for path in first if after[path] == first[path]] == []
    assert {path for path in before | first if re.fullmatch(own, path)} == first.keys()


def test_frozen_towers_are_in_evaluation_mode():
    """The Q-Former's dropout is 0.1, and no randomness reaches it."""
    step, fresh, frozen = projector_step()
    assert tiny.MINIGPT4.qformer.dropout > 0
    first, second = (step(fresh(seed), frozen, tiny.batch())[1]["loss"] for seed in (0, 1))
    assert first == second


def test_unfrozen_towers_train_with_dropout_and_drop_path():
    cfg = dataclasses.replace(tiny.MINIGPT4, vit=dataclasses.replace(tiny.MINIGPT4.vit, drop_path=0.5),
                              qformer=dataclasses.replace(tiny.MINIGPT4.qformer, depth=1))
    sgd = optax.sgd(1e-2)
    trained, frozen = parts("minigpt4", cfg, ("projector/.*", "qformer/.*", "vit/.*"))
    assert {path.split("/")[0] for path in bits(frozen)} == {"ln_vision", "llm"}
    fresh = functools.partial(fresh_state, trained, sgd)
    step = tiny.compiled(steps.train_step(minigpt4.MiniGPT4(cfg), sgd), fresh(0), frozen, tiny.batch())
    state, metrics = step(fresh(0), frozen, tiny.batch())
    before, after = bits(trained), bits(state.params)
    assert {path for path in before if after[path] == before[path]} <= {path for path in before if "/k/b" in path}
    losses = [float(metrics["loss"])]
    losses += [float(step(fresh(seed), frozen, tiny.batch())[1]["loss"]) for seed in (0, 1)]
    later = dataclasses.replace(fresh(0), step=jnp.int32(1))
    losses.append(float(step(later, frozen, tiny.batch())[1]["loss"]))
    assert losses[0] == losses[1]  # a function of the seed
    assert len(set(losses[1:])) == 3  # and of the step


def test_mean_and_none_reduction():
    module = llama.TextLlama(LLAMA)
    losses = {reduction: tiny.jit(lambda p, b, r=reduction: steps.loss(module, p, b, r))
              for reduction in ("mean", "none")}
    params, batch = tiny.params("llama", LLAMA), dataclasses.replace(WORDS, padded_length=np.array([12, 20, 12, 7]))
    mean, aux = losses["mean"](params, batch)
    rows, _ = losses["none"](params, batch)
    logits = np.asarray(aux["logits"], np.float64)
    assert aux["logits"].dtype == jnp.float32
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total, targets = np.zeros(4), 0
    for row, at in zip(*np.nonzero(batch.loss_mask), strict=True):  # each target is told from the place before it
        total[row] -= log_p[row, at - 1, batch.tokens[row, at]]
        targets += 1
    np.testing.assert_allclose(mean, total.sum() / targets, rtol=1e-5)
    np.testing.assert_allclose(rows, total / (batch.padded_length - 1), rtol=1e-5)
    assert int(aux["tokens"]) == targets
    assert not np.asarray(aux["token_losses"])[~batch.loss_mask[:, 1:]].any()


def test_accumulated_steps_equal_one_with_the_summed_gradient():
    """A step that is refused is none of the window's."""
    module, rules = llama.TextLlama(LLAMA), ("llm/norm/.*", "llm/layers/mlp/.*")
    cfg = OptimConfig(init_lr=1e-2, min_lr=1e-2, warmup_steps=0, eps=1e-2, accumulate=2)
    batches = [WORDS, tiny.batch(image_count=0, seed=1)]
    first, frozen = parts("llama", LLAMA, rules)
    state, metrics = run(module, first, frozen, [WORDS, without_targets(WORDS), batches[1]], optim.optimizer(cfg))
    assert [bool(each["applied"]) for each in metrics] == [True, False, True]

    @tiny.jit
    def gradients(trained, frozen, batch):
        return jax.grad(lambda t: steps.loss(module, trees.merge(t, frozen), batch)[0])(trained)

    summed = jax.tree.map(jnp.add, *(gradients(first, frozen, batch) for batch in batches))
    alone = optim.optimizer(dataclasses.replace(cfg, accumulate=1))
    updates, _ = tiny.jit(alone.update)(summed, alone.init(first), first)
    expected = jax.tree.map(jnp.add, first, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, expected)


def test_bfloat16_model_trains_in_float32():
    """Updates far below bfloat16's resolution arrive."""
    rules, sgd = ("llm/layers/mlp/down/w",), optax.sgd(1e-4)
    first, frozen = parts("llama", LLAMA, rules)
    frozen = jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf, jnp.bfloat16)), frozen)
    state, metrics = run(llama.TextLlama(LLAMA, jnp.bfloat16), first, frozen, [WORDS], sgd)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    before, after = (np.asarray(tree["llm"]["layers"]["mlp"]["down"]["w"]) for tree in (first, state.params))
    assert 0 < np.abs(after - before).max() < 2**-9 * np.abs(before).max()
    assert (after != before).mean() > 0.9
    wide = tiny.jit(lambda p: steps.loss(llama.TextLlama(LLAMA), p, WORDS)[0])(tiny.params("llama", LLAMA))
    np.testing.assert_allclose(metrics[0]["loss"], wide, rtol=0.02)
    assert metrics[0]["loss"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [np.uint8, jnp.bfloat16, np.float32])
def test_fingerprint_sees_every_bit(dtype):
    itemsize = jnp.dtype(dtype).itemsize
    word = {1: np.uint8, 2: np.uint16, 4: np.uint32}[itemsize]
    leaf = np.random.default_rng(0).integers(0, 2**(8 * itemsize), (3, 5)).astype(word)
    flips = np.zeros((15 * 8 * itemsize, 15), word)
    for number in range(len(flips)):
        flips[number, number % 15] = 1 << (number // 15)
    changed = leaf ^ flips.reshape(-1, 3, 5)

    def mark(bits):
        return steps.fingerprint({"a": jax.lax.bitcast_convert_type(bits, dtype), "b": jnp.ones(3), "c": None})

    assert (tiny.jit(jax.vmap(mark))(changed) != tiny.jit(mark)(leaf)).all()


def test_fingerprint_sees_leaves_that_change_places():
    a, b = jnp.arange(4.0), jnp.ones(4)
    assert steps.fingerprint({"x": a, "y": b}) != steps.fingerprint({"x": b, "y": a})
    assert steps.fingerprint({"x": a}) != steps.fingerprint({"x": a[::-1]})


def unrounded(family, cfg, rules, batch):
    """{path: share of the gradient that is not a bfloat16 number} of a bfloat16 model's trained parameters."""
    trained, frozen = parts(family, cfg, rules)
    module = FAMILIES[family].Model(cfg, jnp.bfloat16)
    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), frozen)

    def loss(trained):
        return steps.mean_loss(module, trees.merge(trained, frozen), batch)

    gradients = tiny.jit(jax.grad(loss))(trained)
    return {path: float((leaf != leaf.astype(jnp.bfloat16).astype(jnp.float32)).mean())
            for path, leaf in trees.flatten(gradients).items() if leaf is not None}


ADAPTER = llama_adapter.PRESETS["tiny"]
BIND = imagebind_llm.with_phase(imagebind_llm.PRESETS["tiny"], "finetune")


@pytest.mark.parametrize(("family", "cfg", "rules", "features"), [
    ("minigpt4", tiny.MINIGPT4, ("projector/.*", "qformer/query_tokens", "llm/norm/scale", "llm/layers/attn/q/w"),
     None),
    ("imagebind_llm", BIND, sum(imagebind_llm.PHASES.values(), ()), (4, BIND.imagebind.out)),
    ("llama_adapter", ADAPTER, llama_adapter.TRAINED, (4, 17, ADAPTER.clip.out)),
], ids=["minigpt4", "imagebind_llm", "llama_adapter"])
def test_gradients_are_summed_in_float32_in_a_bfloat16_run(family, cfg, rules, features):
    """So that they cross devices in float32: a gradient that was bfloat16 anywhere after its sum has its numbers."""
    batch = tiny.batch(image_count=int(features is None))
    if features:
        drawn = np.random.default_rng(0).normal(size=features).astype(np.float32)
        batch = dataclasses.replace(batch, features=drawn)
    shares = unrounded(family, cfg, rules, batch)
    shares.pop("llm/layers/attn/gate", None)  # half of the layers read no prompts
    assert shares and not {path: share for path, share in shares.items() if share < 0.5}
