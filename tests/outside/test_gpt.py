"""A language model that is no LLaMA goes through every command: nothing outside `llm/`'s protocol is asked of it."""

import contextlib
import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax import parity
from mmjax.config import DataConfig, OptimConfig, RunConfig, WeightsConfig
from mmjax.convert import torch_file
from mmjax.cost import plan
from mmjax.families import register
from mmjax.inference import chat
from mmjax.inference.generate import GenerateConfig, generate
from mmjax.models.int8 import Int8
from mmjax.models.masks import causal_mask
from mmjax.training import run, steps
from tests import small
from tests.outside import gpt, patchwork
from tests.outside.commands import call, check_data_and_features, check_killed_run, encoder_file, forget

forget(patchwork.FAMILY, gpt.FAMILY)  # importing them has registered them, and the other tests know nothing of them
QUESTION = "<ImageHere> What is it?"
CFG = gpt.GptConfig()
TOKENIZER = small.GOLDEN / "ckpt" / "llama_hf"  # of 600 tokens


@pytest.fixture(scope="module", autouse=True)
def registered():
    yield register(gpt.FAMILY)
    forget(gpt.FAMILY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gpt")


@pytest.fixture(scope="module")
def released(folder):
    """A folder of GPT-2 as transformers saves it."""
    out, random = folder / "gpt2", np.random.default_rng(1)
    out.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copyfile(TOKENIZER / name, out / name)
    (out / "config.json").write_text(json.dumps(
        {"vocab_size": CFG.vocab, "n_layer": CFG.depth, "n_embd": CFG.dim, "n_head": CFG.n_head,
         "n_positions": CFG.max_positions}))
    tensors = {key: random.normal(key.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")), 0.3, each.key_shape)
               .astype(np.float32) for each in gpt.entries(CFG) for key in each.keys}
    torch_file.save(out / "pytorch_model.bin", tensors)
    return out, tensors


@pytest.fixture(scope="module")
def checkpoint(folder, released):
    call("convert", "patchwork-gpt", "--patches", encoder_file(folder / "patches.pth"), "--llm", released[0], "--out",
         folder / "checkpoint")
    return folder / "checkpoint"


def config(checkpoint, out, trained=None, frozen_dtype=None, text=patchwork.TEXT, **data) -> RunConfig:
    return RunConfig(
        out=str(out), weights=WeightsConfig(str(checkpoint), dtype="float32", frozen_dtype=frozen_dtype),
        data=DataConfig(path=str(small.images()), prompts=(QUESTION,), batch_size=2, **{
            "pack_length": 96, "pack_images": 2, **data}), text=text, trained=trained, log_every=1, save_every=2,
        optim=OptimConfig(init_lr=1e-2, warmup_steps=1, epochs=1, steps_per_epoch=4))


@pytest.fixture(scope="module")
def trained(checkpoint, folder):
    """The folder of a finished run with packed rows."""
    run.train(config(checkpoint, folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def model(trained):
    return mmjax.load(trained, dtype="float32")


def sample(**fields):
    return mmjax.Sample(images=[small.images() / "image" / "0.jpg"], prompt=QUESTION, **fields)


def norm(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale + bias


def reference(t, tokens):
    """GPT-2's logits of one text, in numpy, from the released tensors: float64[T,V]."""
    t, T = {key: value.astype(np.float64) for key, value in t.items()}, len(tokens)
    x = t["wte.weight"][tokens] + t["wpe.weight"][:T]
    for layer in range(CFG.depth):
        def w(name, h=f"h.{layer}."):
            return t[h + name]
        qkv = norm(x, w("ln_1.weight"), w("ln_1.bias")) @ w("attn.c_attn.weight") + w("attn.c_attn.bias")
        q, k, v = (part.reshape(T, CFG.n_head, -1) for part in np.split(qkv, 3, axis=-1))
        scores = np.einsum("tnh,snh->nts", q, k) / math.sqrt(q.shape[-1])
        scores = np.exp(np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf))
        out = np.einsum("nts,snh->tnh", scores / scores.sum(-1, keepdims=True), v).reshape(T, -1)
        x = x + out @ w("attn.c_proj.weight") + w("attn.c_proj.bias")
        h = norm(x, w("ln_2.weight"), w("ln_2.bias")) @ w("mlp.c_fc.weight") + w("mlp.c_fc.bias")
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + h @ w("mlp.c_proj.weight") + w("mlp.c_proj.bias")
    return norm(x, t["ln_f.weight"], t["ln_f.bias"]) @ t["wte.weight"].T


def test_it_computes_what_gpt_2_does(model, released):
    batch = model.batch([mmjax.Sample(prompt="What is it?", answer="A dog."), mmjax.Sample(prompt="Why?", answer="No")])
    logits = model.module.apply({"params": model.params}, batch)
    for row in range(2):
        valid = batch.valid[row]
        expected = reference(released[1], batch.tokens[row][valid])
        np.testing.assert_allclose(logits[row][valid], expected, atol=1e-5 * np.abs(expected).max())


def test_parts_are_written_as_they_were_read(checkpoint, released, folder):
    call("export", "--checkpoint", checkpoint, "--part", "llm", "--out", folder / "llm.pth")
    again = torch_file.load(folder / "llm.pth")
    assert again.keys() == released[1].keys()
    for key, tensor in released[1].items():
        np.testing.assert_array_equal(again[key].read(), tensor)


def test_a_killed_run_ends_as_the_one_that_was_left_alone(checkpoint, trained, folder):
    check_killed_run(config, checkpoint, trained, folder)


def test_data_are_checked_and_features_train_as_the_encoder_does(checkpoint, trained, folder):
    check_data_and_features(config, checkpoint, trained, folder)


def test_its_own_parameters_are_trained(checkpoint, folder):
    run.train(config(checkpoint, folder / "whole", trained=("fc[12]/.*", "llm/.*"), pack_length=None))
    before = mmjax.load(checkpoint, dtype="float32", init_fresh=0).params["llm"]
    after = mmjax.load(folder / "whole", dtype="float32").params["llm"]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.abs(old - new).max() > 0


def test_frozen_weights_of_int8(checkpoint, trained, folder):
    run.train(config(checkpoint, folder / "int8", frozen_dtype="int8"))
    plain, stored = (json.loads((path / "metrics.jsonl").read_text().splitlines()[0])["loss"]
                     for path in (trained, folder / "int8"))
    assert plain != stored and abs(plain - stored) < 0.02 * plain
    model = mmjax.load(trained, dtype="float32", frozen_dtype="int8")
    held = jax.tree.leaves(model.params["llm"], is_leaf=lambda leaf: isinstance(leaf, Int8))
    assert sum(isinstance(leaf, Int8) for leaf in held) == len(CFG.matrices) + 1  # `mlp_(in|out)` are two
    assert isinstance(model.generate([sample()], max_new_tokens=4)[0], str)


def full_pass(model, batch, tokens):
    """Log-probabilities of the tokens that follow one prompt, without a cache: float32[T,V] before each token."""
    valid = batch.valid[0]
    x, _ = model.module.apply({"params": model.params}, batch, method="encode")
    new = model.module.apply({"params": model.params}, jnp.asarray([tokens]), method="embed")
    x = jnp.concatenate([x[:, valid], new], axis=1)
    mask = causal_mask(jnp.ones(x.shape[:2], bool))
    hidden, _ = model.module.apply({"params": model.params}, x, jnp.arange(x.shape[1])[None], mask, method="decode")
    logits = model.module.apply({"params": model.params}, hidden, method="logits")[0]
    return jax.nn.log_softmax(logits[valid.sum() - 1 : -1])


@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_with_a_cache_equals_the_full_pass(model, beams):
    batch = model.batch([sample(), mmjax.Sample(prompt="Why is the sky blue?")])
    settings = GenerateConfig(max_new_tokens=8, num_beams=beams, eos=-1, pad=0)
    found = generate(model.module, model.params, batch, settings)
    row = dataclasses.replace(batch, **{
        name: getattr(batch, name)[:1] for name in ("tokens", "soft_index", "valid", "loss_mask", "positions",
                                                    "padded_length", "images")})
    tokens = [int(token) for token in found.sequences[0, 1:]]
    shares = full_pass(model, row, tokens)
    if beams == 1:
        assert tokens == shares.argmax(-1).tolist()
    else:
        total = float(shares[jnp.arange(8), jnp.array(tokens)].sum())
        np.testing.assert_allclose(float(found.scores[0]) * int(found.lengths[0]), total, rtol=1e-4)


def test_it_generates_streams_chats_and_is_evaluated(trained, model, folder, capsys):
    image = small.images() / "image" / "0.jpg"
    call("generate", "--checkpoint", trained, "--image", image, "--prompt", "What is it?", "--max-new-tokens", 4)
    printed = capsys.readouterr().out.strip()
    assert printed and printed == model.generate([sample()], max_new_tokens=4)[0]
    for settings in ({}, {"temperature": 0.7}, {"num_beams": 2}):
        text = model.generate([sample()], max_new_tokens=4, **settings)[0]
        assert text and "".join(model.stream(sample(), max_new_tokens=4, **settings)) == text
    talk = chat.Conversation(chat.template_of(model))
    chat.add_input(model, talk, "image", chat.read_input(model, "image", image))
    talk.ask("What is it?")
    assert isinstance("".join(chat.reply(model, talk, chat.ChatSettings(max_new_tokens=4))), str)
    lines = folder / "questions.jsonl"
    item = {"image": str(image), "prompt": "What?", "choices": ["red", "blue"], "answer": 0}
    lines.write_text(json.dumps(item) + "\n")
    call("evaluate", "--benchmark", "jsonl_choices", "--data", lines, "--root", "/", "--checkpoint", trained, "--out",
         folder / "scores", "--dtype", "float32")
    assert json.loads((folder / "scores" / "scores.json").read_text())


def test_it_is_planned_with_its_operations(checkpoint, folder):
    made = plan.plan(config(checkpoint, folder / "unused", pack_length=None), "local", length=64)
    D, T = CFG.dim, 64
    layer = 2 * 12 * D * D + 2 * 2 * T * D  # a token's: the matrices, and attention to all T keys
    assert made.family == "patchwork-gpt" and made.memory.total > 0
    assert made.flops.forward["llm"] - made.flops.logits // 2 == 2 * T * CFG.depth * layer


def test_the_doctor_and_parity_know_it(trained, model, folder, capsys):
    with contextlib.suppress(SystemExit):  # what it says of random weights
        call("doctor", trained, "--json", folder / "doctor.json")
    found = json.loads((folder / "doctor.json").read_text())["findings"]
    good = ("parameters", "run", "outputs", "base weights", "finite", "layers")
    assert {f["name"]: f["verdict"] for f in found if f["name"] in good} == dict.fromkeys(good, "ok")
    assert [f["figures"]["tensor"] for f in found if f["name"] == "word vectors"] == ["llm/tokens/embedding"]
    assert not [f for f in found if f["name"] in ("delta", "gates")]  # questions to a LLaMA
    batch = model.batch([sample(answer="A dog.")])
    stages = parity.stages(model.module, model.family, model.params, batch, has_targets=True)
    tokens = np.where(batch.soft_index >= 0, -1, batch.tokens)
    inputs = {"tokens": tokens, "valid": batch.valid, "images": model.config.images.normalise(batch.images),
              "targets": np.where(batch.loss_mask, tokens, parity.NO_TARGET)}
    np.savez(folder / "reference.npz", **inputs, **{name: np.asarray(x) for name, x in stages.items()})
    call("parity", trained, "--reference", folder / "reference.npz")
    assert "All" in capsys.readouterr().out and {"h.0", "h.1"} <= stages.keys()


def test_samples_beyond_the_table_of_positions_are_refused(checkpoint, folder):
    text = dataclasses.replace(patchwork.TEXT, prompt_template="Q: " + "word " * 200 + "{} A: ", max_txt_len=400)
    with pytest.raises(ValueError, match=f"the language model has {CFG.max_positions} positions"):
        run.train(config(checkpoint, folder / "long", text=text, pack_length=None))


def test_padding_beyond_the_table_of_positions_changes_nothing(model):
    losses = [steps.loss(model.module, model.params, model.batch([sample(answer="A dog.")], length=length))[0]
              for length in (64, CFG.max_positions + 32)]
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_it_has_one_layout_of_its_layers():
    with pytest.raises(ValueError, match="GptConfig has one layout"):
        jax.eval_shape(gpt.FAMILY.Model(gpt.Config(), scan_layers=False).init, jax.random.key(0),
                       gpt.FAMILY.example(gpt.Config()))


def test_the_language_model_is_short():
    assert len(Path(gpt.__file__).read_text(encoding="utf-8").splitlines()) <= 155
