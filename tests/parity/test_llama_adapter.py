"""LLaMA-Adapter v1 and v2 against the original classes: towers, logits, losses, gradients under the files' names."""

import dataclasses
import functools
import re
import tempfile
from pathlib import Path

import jax
import numpy as np

from mmjax import trees
from mmjax.convert import adapter, write
from mmjax.convert.tables import Entry, backward
from mmjax.families.llama_adapter import PHASES, TRAINED, LlamaAdapter
from mmjax.inference.loaded import Loaded, load
from mmjax.training import steps
from tests import tiny
from tests.parity import imagebind_golden as golden
from tests.parity.close import assert_close
from tests.parity.imagebind_golden import FEATURE, GRADIENT, LOGIT, LOSS
from tests.parity.test_imagebind import strided

each_v1 = golden.each(lambda case: "adapter_layer" in case.spec)
each_v2 = golden.each(lambda case: "clip_img" in case.spec)


@functools.cache
def converted(files: tuple[str, ...], raw_gates: bool = False) -> Loaded:
    """LLaMA, an adapter file and, of v2, CLIP, converted by mmjax and loaded in float32."""
    llama, own, *clip = (golden.folder() / file for file in files)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "converted"
        write.command("llama_adapter")(llama, out, adapter=own, clip=clip[0] if clip else None, raw_gates=raw_gates,
                                       arch=golden.folder() / "config.json")
        return load(out, dtype="float32")


def model(case, **options) -> Loaded:
    return converted(tuple(case.spec["checkpoints"]), **options)


def pretraining(m: Loaded) -> Loaded:
    """The same weights in the architecture of that phase: without biases in the language model."""
    config = dataclasses.replace(m.config, llm=dataclasses.replace(m.config.llm, bias_on=()))
    kept = {path: leaf for path, leaf in trees.flatten(m.params).items() if not re.fullmatch("llm/.*/b", path)}
    return dataclasses.replace(m, config=config, module=LlamaAdapter(config), params=trees.unflatten(kept))


def entries(m: Loaded, paths) -> list[Entry]:
    """The lines of the adapter file that name those of its parameters that are in `paths`."""
    return [entry for entry in adapter.llama_adapter_entries(m.config, paths) if entry.path in paths]


def trained_keys(m: Loaded, phase: str) -> set[str]:
    """What a phase trains, under the file's names."""
    trained = trees.flatten(trees.mask(m.params, PHASES[phase]))
    return {key for entry in entries(m, [path for path in trained if trained[path]]) for key in entry.keys}


def batch(case):
    rows = golden.batch(case.arrays["tokens"], case.arrays["labels"])
    return dataclasses.replace(rows, images=case.arrays["image"][:, None]) if "image" in case.arrays else rows


@functools.cache
def forward(module: LlamaAdapter):
    """(params, batch) -> (loss, logits, every layer's output [L,B,T,D]), compiled."""

    def run(params, batch):
        loss, aux = steps.loss(module, params, batch)
        _, variables = module.apply({"params": params}, batch, capture_intermediates=True, mutable=["intermediates"])
        return loss, aux["logits"], variables["intermediates"]["llm"]["layers"]["__call__"][0][0]

    return tiny.jit(run)


def gradients(case, m: Loaded) -> dict[str, np.ndarray]:
    """Under the file's names, of all that is trained before any fine-tuning; those that the case holds are compared."""
    trained, frozen = trees.split(m.params, trees.mask(m.params, TRAINED))
    rows = batch(case)
    grads = tiny.jit(jax.grad(lambda trained: steps.loss(m.module, trees.merge(trained, frozen), rows)[0]))(trained)
    flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(grads).items() if leaf is not None}
    found = {key: tensor.read() for key, tensor in backward(entries(m, flat), flat).items()}
    recorded = [name for name in case.arrays if name.startswith("grad:")]
    assert recorded
    for name in recorded:
        assert_close(name, found[name.removeprefix("grad:")], case.arrays[name], relative=GRADIENT)
    return found


@each_v1
def test_v1(case):
    m = model(case)
    loss, logits, hidden = forward(m.module)(m.params, batch(case))
    assert_close("loss", loss, case.arrays["loss"], absolute=LOSS)
    expected = case.arrays["logits"]
    assert_close("logits", strided(logits, expected.shape), expected, absolute=LOGIT)
    for layer, values in enumerate(hidden, 1):
        for name in case.holds(f"hidden_{layer}"):
            assert_close(name, values, case.arrays[name], absolute=FEATURE)


@each_v1
def test_v1_gradients(case):
    found = gradients(case, model(case))
    assert {key for key, value in found.items() if np.any(value)} == set(case.spec["trainable"])


@each_v1
def test_v1_inference(case):
    """The release's inference class leaves out the tanh."""
    rows, places = map(int, re.search(r"tokens\[:(\d+),:(\d+)\]", case.spec["inference_note"]).groups())
    prompt = golden.batch(case.arrays["tokens"][:rows, :places])
    for name, raw in (("inference_last_logits_gate_raw", True), ("inference_last_logits_gate_tanh", False)):
        m = model(case, raw_gates=raw)
        logits = tiny.jit(m.module.apply)({"params": m.params}, prompt)
        assert_close(name, logits[:, -1], case.arrays[name], absolute=LOGIT)


@each_v2
def test_v2_images(case):
    m = model(case)

    def run(module, batch):
        return module.clip(batch.images[:, 0]), module.visual_query(batch)

    features, query = tiny.jit(functools.partial(m.module.apply, method=run))({"params": m.params}, batch(case))
    assert_close("clip_features", features, case.arrays["clip_features"], absolute=FEATURE)
    assert_close("visual_query", query, case.arrays["visual_query"], absolute=FEATURE)


@each_v2
def test_v2_finetune(case):
    m = model(case)
    loss, logits, _ = forward(m.module)(m.params, batch(case))
    assert_close("loss", loss, case.arrays["loss"], absolute=LOSS)
    expected = case.arrays["logits"]
    assert_close("logits", strided(logits, expected.shape), expected, absolute=LOGIT)
    assert trained_keys(m, "finetune") == set(case.spec["trainable_finetune"])


@each_v2
def test_v2_pretrain(case):
    m = pretraining(model(case))
    loss, logits, _ = forward(m.module)(m.params, batch(case))
    assert_close("pretrain_loss", loss, case.arrays["pretrain_loss"], absolute=LOSS)
    assert_close("pretrain_logits_last", logits[:, -1], case.arrays["pretrain_logits_last"], absolute=LOGIT)
    assert trained_keys(m, "pretrain") == set(case.spec["trainable_pretrain"])


@each_v2
def test_v2_gradients(case):
    found = gradients(case, pretraining(model(case)))
    still = {key for key, value in found.items() if not np.any(value)}
    assert still == set(case.spec["trainable_without_gradient"])
