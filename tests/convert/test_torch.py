"""Exported files in the hands of PyTorch and transformers: `pytest -m torch`, with the extra `bench`."""

import ml_dtypes
import numpy as np
import pytest

import mmjax
from mmjax.convert import write
from mmjax.convert.export import export
from tests.convert.released import CKPT, MINIGPT4, V2, llama_folder, llama_tensors

pytestmark = pytest.mark.torch

PROMPTS = ("a dog", "", "the boat and the man, again")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    write.command("minigpt4")(out=folder / "minigpt4", **MINIGPT4)
    write.command("minigpt4")(out=folder / "v2", **V2)
    return folder


def read(path):
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def assert_bits(got, expected):
    """Equal keys in any order, and equal tensors to the last bit."""
    import torch

    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (got[key].dtype, got[key].shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(*(t.contiguous().view(torch.uint8) for t in (got[key], tensor))), key


def test_vision_tower(checkpoints, tmp_path):
    export(checkpoints / "minigpt4", "vit", tmp_path / "vit.pth")
    released = read(MINIGPT4["vit"])
    wanted = {key: t for key, t in released.items() if not key.startswith(("norm.", "head.", "blocks.3."))}
    assert len(released) - len(wanted) == 2 + 2 + 13  # the unread norm, head and last block
    assert_bits(read(tmp_path / "vit.pth"), wanted)


def test_qformer(checkpoints, tmp_path):
    export(checkpoints / "minigpt4", "qformer", tmp_path / "qformer.pth")
    released = read(MINIGPT4["qformer"])["model"]
    wanted = {key: t for key, t in released.items() if key in ("query_tokens", "ln_vision.weight", "ln_vision.bias")
              or "attention" in key or "_query." in key or "bert.embeddings.LayerNorm." in key}
    written = read(tmp_path / "qformer.pth")
    assert written.keys() == {"model"}
    assert_bits(written["model"], wanted)


@pytest.mark.parametrize("model, source", [("minigpt4", MINIGPT4["projector"]), ("v2", V2["projector"])])
def test_trained_parts_are_all_that_the_original_trains(checkpoints, tmp_path, model, source):
    """The original loads them with strict=False, where a wrong name is lost without a word: none may differ."""
    export(checkpoints / model, "projector", tmp_path / "trained.pth")
    buffers = ("position_ids", "inv_freq")
    wanted = {key: t for key, t in read(source)["model"].items() if not key.endswith(buffers)}
    assert len(wanted) == {"minigpt4": 2, "v2": 14}[model]
    written = read(tmp_path / "trained.pth")
    assert written.keys() == {"model"}
    assert_bits(written["model"], wanted)


def test_projector_goes_into_a_module(checkpoints, tmp_path):
    import torch

    export(checkpoints / "minigpt4", "projector", tmp_path / "projector.pth")
    original = torch.nn.Module()
    original.llama_proj = torch.nn.Linear(48, 64)
    result = original.load_state_dict(read(tmp_path / "projector.pth")["model"], strict=False)
    assert not result.unexpected_keys and not result.missing_keys
    assert torch.equal(original.llama_proj.weight, read(MINIGPT4["projector"])["model"]["llama_proj.weight"])


def grouped_and_tied():
    """A language model with 4 query heads on 2 key heads and the embedding for a head, in bfloat16."""
    rng = np.random.default_rng(1)
    held = llama_tensors()
    held |= {f"model.layers.{layer}.self_attn.{name}_proj.weight": 0.2 * rng.normal(size=(32, 64))
             for layer in range(3) for name in "kv"}
    del held["lm_head.weight"]
    return {key: array.astype(ml_dtypes.bfloat16) for key, array in held.items()}


def released_llama(tmp_path):
    return CKPT / "llama_hf"


def other_llama(tmp_path):
    return llama_folder(tmp_path / "released", grouped_and_tied(), num_key_value_heads=2, tie_word_embeddings=True,
                        rms_norm_eps=1e-5, rope_theta=5e4, torch_dtype="bfloat16")


@pytest.mark.parametrize("make", [released_llama, other_llama])
def test_language_model(tmp_path, make):
    import torch
    from transformers import LlamaForCausalLM

    released = make(tmp_path)
    write.command("llama")(released, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", "llama", tmp_path / "llama")
    shards = [read(path) for path in sorted((tmp_path / "llama").glob("*.bin"))]
    originals = [read(path) for path in sorted(released.glob("*.bin"))]
    wanted = {key: t for shard in originals for key, t in shard.items() if not key.endswith("inv_freq")}
    assert_bits({key: t for shard in shards for key, t in shard.items()}, wanted)

    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32).eval()
    ours = mmjax.load(tmp_path / "checkpoint", dtype="float32")
    assert theirs.dtype == torch.float32 and theirs.config.eos_token_id == ours.generation["eos_token_id"]
    batch = ours.batch([mmjax.Sample(prompt=prompt) for prompt in PROMPTS])
    logits = np.asarray(ours.module.apply({"params": ours.params}, batch))
    for row in range(len(PROMPTS)):
        ids = torch.tensor(batch.tokens[row, batch.valid[row]], dtype=torch.long)
        with torch.no_grad():
            expected = theirs(ids[None]).logits[0].numpy()
        apart = np.abs(logits[row, : len(ids)] - expected).max() / np.abs(expected).max()
        print(f"{apart:.1e} of the largest logit, {np.abs(expected).max():.2f}")
        assert apart < 1e-5
