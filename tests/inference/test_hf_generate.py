"""Generated ids against transformers' own `generate`, over random models, prompts and settings.

Both are given the prompts as vectors, as a vision-language model gives them. `pytest -m torch`, with the extra `bench`.
"""

import itertools
import shutil

import jax
import numpy as np
import pytest

import mmjax
from mmjax.batch import Batch
from mmjax.convert import write
from mmjax.inference import generate as g
from tests.small import GOLDEN

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with")]

MODELS, ROWS, T, R = 4, 3, 10, 12
BEAMS = ((2, 1.0, False), (3, 1.0, True), (3, 0.0, False), (4, 1.8, False), (4, -0.7, True))
SEARCHES = [{}, *({"num_beams": count, "length_penalty": penalty, "early_stopping": early}
                  for count, penalty, early in BEAMS)]
SWITCHES = list(itertools.product((False, True), (False, True)))  # repetition penalty, minimum length
CASES_EACH = 3
PAD = 599  # transformers' beam search takes 0 for none


@pytest.fixture(scope="module", params=range(MODELS))
def pair(request, tmp_path_factory):
    """A random LLaMA in transformers, and the same converted."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(request.param)
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=(4, 2)[request.param % 2], max_position_embeddings=64, pad_token_id=0)).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            # A wide head makes some ids much likelier than others, so that rounding decides nothing.
            weight.normal_(1.0, 0.1) if "norm" in name else weight.normal_(0.0, 0.8 if "head" in name else 0.3)
    theirs.save_pretrained(folder / "hf")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / "ckpt" / "llama_hf" / name, folder / "hf")
    write.command("llama")(llm=folder / "hf", out=folder / "converted")
    return theirs, mmjax.load(folder / "converted"), request.param


def batch_of(prompts):
    """Prompts behind their padding, as transformers wants them."""
    tokens, valid = np.zeros((len(prompts), T), np.int32), np.zeros((len(prompts), T), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, T - len(prompt):], valid[row, T - len(prompt):] = prompt, True
    zeros = np.zeros_like(tokens)
    return Batch(tokens, zeros - 1, valid, valid, zeros + np.arange(T, dtype=np.int32), valid.sum(1))


def some_end(ours, random):
    """An id that the model writes now and then, to be its eos."""
    prompts = [random.integers(3, 600, T).tolist() for _ in range(20 * ROWS)]
    made = g.generate(ours.module, ours.params, batch_of(prompts), g.GenerateConfig(R, eos=-1))
    ids, counts = np.unique(np.asarray(made.sequences)[:, 1:], return_counts=True)
    return int(ids[np.argsort(counts)[-3]])


def theirs_of(model, batch, new, eos, **settings):
    import torch

    with torch.inference_mode():
        return model.generate(
            inputs_embeds=model.get_input_embeddings()(torch.tensor(batch.tokens, dtype=torch.long)),
            attention_mask=torch.tensor(batch.valid).long(), max_new_tokens=new, do_sample=False, eos_token_id=eos,
            pad_token_id=PAD, **settings).numpy()


def test_ids_are_those_of_transformers(pair):
    """Greedy search and beams, with every penalty; ragged prompts; ends by eos and by length."""
    theirs, ours, number = pair
    random, ends, cases = np.random.default_rng(number), set(), 0
    eos = some_end(ours, random)
    for search, (repeats, least) in itertools.product(SEARCHES, SWITCHES):
        for _ in range(CASES_EACH):
            # With vectors and padding, transformers 5.23 forgives as many of the first new ids as there is padding.
            shortest = T if repeats else 1
            prompts = [random.integers(3, 600, random.integers(shortest, T + 1)).tolist() for _ in range(ROWS)]
            batch, new = batch_of(prompts), int(random.integers(1, R + 1))
            penalty = float(random.uniform(0.7, 1.8)) if repeats else 1.0
            minimum = int(random.integers(1, new + 1)) if least else 0
            config = g.GenerateConfig(new, repetition_penalty=penalty, min_length=minimum, dummy=False, eos=eos,
                                      pad=PAD, **search)
            writing = g.Generation(ours.module, ours.params, batch, config, room=R)
            writing.advance()
            made = writing.result()
            expected = theirs_of(theirs, batch, new, eos, repetition_penalty=penalty, **search,
                                 **({"min_new_tokens": minimum} if least else {}))
            got = np.asarray(made.sequences)[:, 1:1 + expected.shape[1]]
            np.testing.assert_array_equal(got, expected, err_msg=f"{config} {prompts}")
            ends |= {"eos" if ids[length - 1] == eos else "length"
                     for ids, length in zip(np.asarray(made.sequences), np.asarray(made.lengths), strict=True)}
            cases += 1
    assert cases * MODELS >= 200
    assert ends == {"eos", "length"}


def test_what_sampling_draws_from_is_that_of_transformers(pair):
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    _, ours, number = pair
    random = np.random.default_rng(number)
    for _ in range(20):
        temperature, k, p = float(random.uniform(0.2, 2)), int(random.integers(1, 60)), float(random.uniform(0.1, 0.99))
        config = g.GenerateConfig(1, do_sample=True, temperature=temperature, top_k=k, top_p=p, dummy=False)
        prompts = [random.integers(3, 600, random.integers(1, T + 1)).tolist() for _ in range(ROWS)]
        plain = g.generate(ours.module, ours.params, batch_of(prompts), g.GenerateConfig(1), return_scores=True)
        made = g.generate(ours.module, ours.params, batch_of(prompts), config, jax.random.key(0), return_scores=True)
        warp = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopKLogitsWarper(k), TopPLogitsWarper(p)])
        expected = warp(torch.zeros(ROWS, 1), torch.tensor(np.asarray(plain.step_scores[0]))).numpy()
        np.testing.assert_allclose(made.step_scores[0], expected, rtol=2e-6)
