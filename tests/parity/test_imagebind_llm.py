"""ImageBind-LLM's language model: both forms of injection, both phases, losses, gradients and generated ids, against
the original code. Towers and bind network: test_imagebind. Training runs: test_imagebind_llm_training."""

import dataclasses
import functools
import re
import types

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mmjax import trees
from mmjax.families import imagebind_llm as family
from mmjax.inference import generate
from mmjax.models import bind
from mmjax.models.layers import Project
from mmjax.models.llama import rope
from mmjax.training import optim, steps
from tests import tiny
from tests.parity import imagebind_golden as golden
from tests.parity.close import assert_close
from tests.parity.imagebind_golden import FEATURE, GRADIENT, LOGIT, LOSS
from tests.parity.test_imagebind import cache, strided

OURS = re.compile("lm_|grads_|legacy_|paper_|generate_")  # not LLaMA-Adapter's cases, which hold similar arrays
ARTICLE = re.compile("paper_.*")  # cases of the article's form
START = "lm_init_state"  # the case of a model before its first step, made from a trained one


@functools.cache
def _model(name: str):
    case = golden.load(name)
    if ARTICLE.fullmatch(name):
        gates = case.arrays.get("gate", np.zeros(golden.config()["llama"]["n_layers"], np.float32))
        return golden.token_form(golden.adapter(case), gates)
    m = golden.model(golden.adapter(case))
    if name == START:
        plain = trees.flatten(golden.model(golden.PRETRAINED).params)  # leaves LLaMA's norms as they were
        norms = {path: lambda _, leaf=leaf: leaf for path, leaf in plain.items()
                 if re.fullmatch("llm/.*norm/scale", path)}
        return golden.changed(m, norms | {"llm/.*/(gate|lora_b|b)": np.zeros_like})
    return m


def model(case):
    """The files that a case names, converted, with the changes that it makes to them."""
    return _model(case.name)


def rows(case, **changes):
    """The case's tokens, labels and image."""
    arrays = case.arrays | changes
    image = arrays.get("image_lm", arrays.get("image"))
    return golden.batch(arrays["tokens"], arrays.get("labels"), **({} if image is None else {"image": image}))


# ---- the forward pass ----


def with_inputs(call, args, kwargs, context):
    """Keeps what goes into every linear map beside what comes out."""
    if isinstance(context.module, Project) and context.method_name == "__call__":
        context.module.sow("intermediates", "input", args[-1])
    return call(*args, **kwargs)


@functools.cache
def forward(module):
    """(params, batch) -> (logits, {module's path: what it returned}), compiled once for a module."""

    def run(params, batch):
        with nn.intercept_methods(with_inputs):
            logits, variables = module.apply(
                {"params": params}, batch, capture_intermediates=True, mutable=["intermediates"])
        calls = trees.flatten(variables["intermediates"])
        inner = {path.removesuffix("/__call__"): value[0] for path, value in calls.items()}
        return logits, inner | {"embedded": module.apply({"params": params}, batch.tokens, method="embed")}

    return tiny.jit(run)


def passed(case):
    m = model(case)
    return forward(m.module)(m.params, rows(case))


@functools.cache
def stages(name: str) -> dict[str, np.ndarray]:
    """Every stage that a case may have recorded, computed by mmjax, under the original's names."""
    case = golden.load(name)
    logits, inner = passed(case)
    done = types.SimpleNamespace(apply=lambda *_, **__: logits)  # a model that need not be run again
    layers, _ = inner["llm/layers"]
    heads = inner["llm/layers/attn/o/input"]
    return {
        "visual_feats": inner.get("bind"), "T_I": inner.get("bind"),
        "hidden_0": inner["embedded"], **{f"hidden_{i}": x for i, x in enumerate(layers, 1)},
        "last_layer_heads_concat": heads[-1].reshape(layers[-1].shape),
        "final_norm": inner["llm/norm"], "logits": logits, "last_logits": logits[:, -1],
        "loss": tiny.jit(functools.partial(steps.loss, done, None))(rows(case))[0],
    }


STAGE = re.compile("visual_feats|T_I|hidden_[0-9]+|last_layer_heads_concat|final_norm|logits|last_logits|loss")
BOUNDS = {"visual_feats": FEATURE, "T_I": FEATURE, "loss": LOSS}
RECORDED = [(name, stage) for name in golden.names() if OURS.match(name) and "logits" in golden.load(name).arrays
            for stage in golden.load(name).arrays if STAGE.fullmatch(stage)
            # the legacy case has them of other images: test_imagebind
            if not (stage == "visual_feats" and "image_lm" in golden.load(name).arrays)]


@pytest.mark.parametrize(("name", "stage"), RECORDED)
def test_stage(name, stage):
    expected, got = golden.load(name).arrays[stage], stages(name)[stage]
    if stage == "logits":
        got = strided(got, expected.shape)
    assert_close(stage, got, expected, absolute=BOUNDS.get(stage, LOGIT))


@golden.each(lambda case: "q_before_rope" in case.arrays)
def test_inside_of_the_first_layer(case):
    """Where we hold the halves of a head, Meta's elements are neighbours."""
    m, expected = model(case), dict(case.arrays)
    _, inner = passed(case)

    def of(path):
        x = inner[f"llm/layers/{path}"]
        return (x[0] if isinstance(x, tuple) else x)[0]

    for name in ("q_before_rope", "k_before_rope", "q_after_rope", "k_after_rope"):
        expected[name] = einops.rearrange(expected[name], "B T N (I two) -> B T N (two I)", two=2)
    theta, positions = m.config.llm.rope_theta, rows(case).positions
    flat = "B T N H -> B T (N H)"
    found = {
        "attention_norm": of("attn_norm"), "q_before_rope": of("attn/q"), "k_before_rope": of("attn/k"),
        "q_after_rope": rope(of("attn/q"), positions, theta), "k_after_rope": rope(of("attn/k"), positions, theta),
        "v": einops.rearrange(of("attn/v"), flat), "heads_concat": einops.rearrange(of("attn/o/input"), flat),
        "attention_out": of("attn"), "ffn_norm": of("mlp_norm"), "ffn_hidden": of("mlp/down/input"),
        "ffn_out": of("mlp"),
    }
    assert case.holds(*found) == list(found)
    for name, got in found.items():
        assert_close(name, got, expected[name], absolute=LOGIT)

    length, half, _ = expected["freqs_cis"].shape
    ones = np.tile(np.repeat([1.0, 0.0], half).astype(np.float32), (1, length, 1, 1))  # the number 1 in every pair
    turned = rope(ones, np.arange(length)[None], theta)[0, :, 0]
    assert_close("freqs_cis", einops.rearrange(turned, "T (two I) -> T I two", two=2), expected["freqs_cis"],
                 absolute=1e-6)


@golden.each(lambda case: case.spec.get("max_abs_diff_to_plain") == 0)
def test_closed_gates_leave_plain_llama_bit_for_bit(case):
    plain = golden.model(golden.PRETRAINED)
    expected, _ = forward(plain.module)(plain.params, dataclasses.replace(rows(case), images=None, weights=None))
    logits, _ = passed(case)
    np.testing.assert_array_equal(logits, expected)


# ---- losses and gradients ----


@functools.cache
def slopes(module, rules):
    """(params, batch) -> ((loss, aux), gradients of what the rules train), compiled once for a module."""

    def run(params, batch):
        trained, frozen = trees.split(params, trees.mask(params, rules))
        return jax.value_and_grad(
            lambda trained: steps.loss(module, trees.merge(trained, frozen), batch), has_aux=True)(trained)

    return tiny.jit(run)


def learned(case, **changes):
    """(loss, {path: gradient} of what the phase of the case's adapter trains)"""
    m = model(case)
    phase = "finetune" if m.config.llm.lora_rank else "pretrain"
    (loss, _), gradients = slopes(m.module, family.PHASES[phase])(m.params, rows(case, **changes))
    return loss, {path: leaf for path, leaf in trees.flatten(gradients).items() if leaf is not None}


@golden.each(lambda case: OURS.match(case.name) and any(name.startswith("grad:") for name in case.arrays))
def test_gradients(case):
    """Of every trained parameter, and of no other, in the original's names."""
    loss, gradients = learned(case)
    assert_close("loss", loss, case.arrays["loss"], absolute=LOSS)
    named = golden.released(model(case), gradients)
    recorded = {name.removeprefix("grad:"): x for name, x in case.arrays.items() if name.startswith("grad:")}
    for name, expected in recorded.items():
        stage = "grad:" + re.sub(r"\d+", "N", name)
        assert_close(stage, named[name], expected, relative=GRADIENT)
    if "trainable" in case.spec:
        assert set(named) == set(case.spec["trainable"]) | set(case.spec["trainable_but_unused"])
    if "grad_norm" in case.arrays:
        norm = np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in gradients.values()))
        assert_close("grad_norm", norm, case.arrays["grad_norm"], relative=GRADIENT)
    if case.spec.get("max_abs_bind_grad") == 0:
        assert not any(np.any(leaf) for path, leaf in gradients.items() if path.startswith("bind/"))


@golden.each(lambda case: "loss_all_ignored" in case.arrays or "all_ignored_batch_max_abs_grad" in case.spec)
def test_nothing_to_learn(case):
    loss, gradients = learned(case, labels=np.zeros_like(case.arrays["labels"]))
    assert loss == case.arrays.get("loss_all_ignored", 0)
    assert max(np.abs(leaf).max() for leaf in gradients.values()) == case.spec.get("all_ignored_batch_max_abs_grad", 0)


@golden.each(lambda case: OURS.match(case.name) and "no_weight_decay" in case.spec)
def test_what_decays(case):
    m = model(case)
    flags = trees.flatten(optim.decay_mask(m.params, m.config.llm))
    for entry in golden.entries(m, flags):
        for key in entry.keys:
            if key in case.spec["trainable"]:
                assert flags[entry.path] == (key in case.spec["weight_decay"]) != (key in case.spec["no_weight_decay"])


# ---- generation ----


def prompts(case):
    m = model(case)
    return [[m.generation["bos_token_id"], *m.tokenizer.encode(text)] for text in case.spec["prompts"]]


def media(case, m):
    """The senses of a case; of one with the cache their mix, by the weights its description gives, drawn towards it."""
    held = {name: case.arrays[name] for name in case.holds(*m.config.senses, "image", "video")}
    if "knn" not in case.name:
        return held
    told = re.findall(r"(\w+) \(([\d.]+)\)", case.spec["description"])
    weights = {name: np.full(1, float(weight), np.float32) for name, weight in told if name in held}
    batch = dataclasses.replace(golden.batch(np.zeros((1, 1)), **held), weights=weights)
    mixed = tiny.jit(functools.partial(m.module.apply, method="feature"))({"params": m.params}, batch)
    return {"features": bind.recall(mixed, cache())}


def generates(case):
    return OURS.match(case.name) and "prompts" in case.spec


def new_tokens(case):
    """What the original's buffer has room for."""
    room = np.atleast_2d(case.arrays["tokens"]).shape[1] - max(map(len, prompts(case)))
    return min(case.spec.get("max_gen_len", room), room)


def alike(case):
    """The cases that can be given one shape, so that they share what is compiled."""
    others = filter(generates, map(golden.load, golden.names()))
    return [other for other in others
            if (golden.adapter(other), len(prompts(other))) == (golden.adapter(case), len(prompts(case)))]


@functools.cache
def generated(name: str):
    """(ids written behind each prompt, their scores [steps,B,V])"""
    case = golden.load(name)
    m, texts = model(case), prompts(case)
    length = max(len(text) for other in alike(case) for text in prompts(other))
    tokens = np.array([text + [0] * (length - len(text)) for text in texts])
    valid = np.arange(length) < np.array([[len(text)] for text in texts])
    batch = dataclasses.replace(golden.batch(tokens, **media(case, m)), valid=valid)
    config = generate.GenerateConfig(
        max_new_tokens=max(map(new_tokens, alike(case))), bos=m.generation["bos_token_id"], pad=-1,
        eos=-1 if ARTICLE.fullmatch(name) else m.generation["eos_token_id"])  # nothing ends the article's
    made = generate.generate(m.module, m.params, batch, config, return_scores=True)
    written = [row[1:length].tolist() for row, length in zip(np.asarray(made.sequences), made.lengths, strict=True)]
    return [ids[:new_tokens(case)] for ids in written], made.step_scores


@golden.each(generates, golden.towers_tier)
def test_generated_ids(case):
    m, end = model(case), model(case).generation["eos_token_id"]
    written, _ = generated(case.name)
    for text, ids, row in zip(prompts(case), written, np.atleast_2d(case.arrays["tokens"]).tolist(), strict=True):
        assert row[:len(text)] == text
        expected = row[len(text):][:new_tokens(case)]
        if end in expected and not ARTICLE.fullmatch(case.name):
            expected = expected[:expected.index(end) + 1]
        assert ids == expected
    if "decoded" in case.spec:
        assert [m.tokenizer.decode(ids) for ids in written] == case.spec["decoded"]


@golden.each(lambda case: generates(case) and "step_logits" in case.arrays, golden.towers_tier)
def test_step_logits(case):
    """Of the steps in which a row writes: the original begins at the shortest prompt, and goes on behind the end."""
    lengths, (written, scores) = [len(text) for text in prompts(case)], generated(case.name)
    for row, (length, ids) in enumerate(zip(lengths, written, strict=True)):
        expected = case.arrays["step_logits"][row][length - min(lengths):][:len(ids)]
        assert len(expected)
        assert_close("step_logits", scores[:len(expected), row], expected, absolute=LOGIT)


@golden.each(lambda case: any("sorted_renormalized" in name for name in case.arrays))
def test_top_p(case):
    """The ids that may be drawn, and their probabilities, best first."""

    @tiny.jit
    def drawn(scores, p):
        return -jnp.sort(-jax.nn.softmax(generate.top_p_inclusive(scores, p)), axis=-1)

    for name, expected in case.arrays.items():
        if match := re.fullmatch(r"(?:small_)?sorted_renormalized(?:_t(\d)(\d*))?_p(\d+)", name):
            whole, tenths, percent = match.groups()
            if whole:  # t01 is a temperature of 0.1
                scores = case.arrays["logits"] / np.float32(f"{whole}.{tenths}")
                assert_close("probs", jax.nn.softmax(scores), case.arrays[f"probs_t{whole}{tenths}"], absolute=1e-6)
            else:
                with np.errstate(divide="ignore"):
                    scores = np.log(case.arrays["small_probs"])
            got = drawn(scores, int(percent) / 100)
            np.testing.assert_array_equal(got > 0, expected > 0)
            assert_close("top_p", got, expected, absolute=1e-6)
