"""Every recorded stage of every forward case, the loss and its gradients, against the original PyTorch code."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from mmjax import trees
from mmjax.convert import minigpt4 as minigpt4_tables
from mmjax.convert import peft
from mmjax.convert.tables import backward
from mmjax.training import steps
from tests.parity import golden
from tests.parity.close import EMBEDDING, GRADIENT, LOGIT, LOSS, assert_close
from tests.parity.model import model


def batch_of(case, m, samples=None):
    """The case's rows at the original's row length, so that whole arrays can be compared, padding included."""
    settings = dataclasses.asdict(golden.text_config(case))
    samples = golden.samples(case) if samples is None else samples
    shortest = m.batch(samples, **settings)
    return m.batch(samples, length=int(shortest.padded_length[0]), **settings)


@functools.cache
def stages(name: str) -> dict[str, np.ndarray]:
    """What the original's hooks recorded, computed by mmjax, under the original's names."""
    case = golden.load(name)
    m = model(case)
    batch = batch_of(case, m)
    logits, inner = capture(m, batch)
    found = {"inputs_embeds": inner["encode"][0], "logits": logits, "llama_layers": inner["llm/layers"][0],
             "llama_final_norm": inner["llm/norm"]}
    images = golden.images(case)
    if images is None:
        return found
    if images.ndim == 5:  # all images of the case, those too that an image train leaves out
        alone = dataclasses.replace(batch, images=images.reshape(1, -1, *images.shape[-3:]))
        _, inner = capture(m, alone, method="soft_tokens")
    patches = inner["vit/patch"]
    found |= {
        "vit_patch_embed": patches.reshape(len(patches), -1, patches.shape[-1]),
        "vit_blocks": inner["vit/blocks"][0],
        "vit_out": inner["vit"],
        "ln_vision_out": inner["ln_vision"],
        "proj_out": inner["projector"].reshape(-1, *inner["projector"].shape[-2:]),
    }
    if m.config.qformer:
        layers = [inner[f"qformer/layer_{i}"] for i in range(m.config.qformer.depth)]
        found |= {"qformer_embeddings": inner["qformer/norm"], "qformer_layers": np.stack(layers),
                  "qformer_out": inner["qformer"]}
    return found


def capture(m, batch, method="__call__"):
    """(result, {path of a module, or `encode`: what it returned}) of a method of the model."""
    result, variables = _captured(m.module, method)(m.params, batch)
    calls = trees.flatten(variables.get("intermediates", {}))
    return result, {path.removesuffix("/__call__"): value[0] for path, value in calls.items()}


@functools.cache
def _captured(module, method):
    """Compiled once for a module and for batches of one shape."""

    def told(_, called):
        return called in ("__call__", "encode")

    return jax.jit(lambda params, batch: module.apply(
        {"params": params}, batch, method=method, capture_intermediates=told, mutable=["intermediates"]))


STAGES = {  # in the order in which the data passes through them: the first that fails is the part to look at
    "vit_patch_embed": EMBEDDING, "vit_blocks": EMBEDDING, "vit_out": EMBEDDING, "ln_vision_out": EMBEDDING,
    "qformer_embeddings": EMBEDDING, "qformer_layers": EMBEDDING, "qformer_out": EMBEDDING, "proj_out": EMBEDDING,
    "inputs_embeds": EMBEDDING, "llama_layers": LOGIT, "llama_final_norm": LOGIT, "logits": LOGIT,
}


RECORDED = [(case.name, stage) for case in golden.cases("forward") for stage in case.holds(*STAGES)]


@pytest.mark.parametrize(("name", "stage"), RECORDED)
def test_stage(name, stage):
    assert_close(stage, stages(name)[stage], golden.load(name).arrays[stage], absolute=STAGES[stage])


@golden.each("forward", where=lambda case: "cond_embeds" in case.arrays)
def test_wrapped_prompt(case):
    """`cond_embeds`: the prompts before the answers are put behind them, filled up with the pad token's vector."""
    m = model(case)
    samples = [dataclasses.replace(sample, answer="") for sample in golden.samples(case)]
    settings = dataclasses.asdict(golden.text_config(case)) | {"end_sym": ""}
    (vectors, _), _ = capture(m, m.batch(samples, **settings), method="encode")
    assert_close("cond_embeds", vectors[:, 1:], case.arrays["cond_embeds"], absolute=EMBEDDING)


def loss(m, batch, reduction):
    return _loss(m.module, reduction)(m.params, batch)


@functools.cache
def _loss(module, reduction):
    return jax.jit(lambda params, batch: steps.loss(module, params, batch, reduction))


@golden.each("forward")
def test_loss(case):
    m = model(case)
    value, aux = loss(m, batch_of(case, m), case.spec["reduction"])
    for name in case.holds("token_losses"):
        assert_close(name, aux["token_losses"], case.arrays[name], absolute=LOGIT)
    for name in case.holds("loss"):
        assert_close(name, value, case.arrays[name], relative=LOSS)


ROUND = 96  # tokens; few lengths, so that what several cases need is compiled once


@golden.each("forward")
def test_loss_does_not_depend_on_padding(case):
    m = model(case)
    batch = batch_of(case, m)
    settings = dataclasses.asdict(golden.text_config(case))
    longer = m.batch(golden.samples(case), length=(batch.tokens.shape[1] // ROUND + 1) * ROUND, **settings)
    expected, _ = loss(m, batch, case.spec["reduction"])
    got, _ = loss(m, longer, case.spec["reduction"])
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@functools.cache
def slopes(module):
    """(params, batch) -> gradients of the projector and of LoRA, which are all that is recorded."""

    def run(params, batch):
        rules = (r"projector/.*", *[r"llm/.*/lora_[ab]"] * bool(module.cfg.llm.lora_rank))
        moved, rest = trees.split(params, trees.mask(params, rules))
        return jax.grad(lambda moved: steps.loss(module, trees.merge(moved, rest), batch)[0])(moved)

    return jax.jit(run)


@golden.each("forward", where=lambda case: any(name.startswith("grad.") for name in case.arrays))
def test_gradients(case):
    m = model(case)
    gradients = slopes(m.module)(m.params, batch_of(case, m))
    entries = [*minigpt4_tables.projector_entries(m.config.soft_width, m.config.llm.dim),
               *peft.entries(m.config.llm)]
    named = backward(entries, trees.flatten(gradients))
    for name in sorted(case.arrays):
        if name.startswith("grad."):
            assert_close(name, named[name.removeprefix("grad.")].read(), case.arrays[name], relative=GRADIENT)
