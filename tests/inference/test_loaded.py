"""A loaded checkpoint: batches, loss, words."""

import dataclasses
import functools
import os
import shutil

import numpy as np
import pytest

import mmjax
from mmjax import compilation
from mmjax.convert import write
from mmjax.data import scenes
from mmjax.data.neighbours import Recall
from mmjax.inference import loaded
from mmjax.inference.loaded import stop_tokens
from mmjax.models.layers import unit
from tests import small, tiny
from tests.convert.released import ADAPTER_V2


@pytest.fixture(scope="module")
def model():
    return mmjax.load(small.checkpoint(), dtype="float32")


@pytest.fixture(scope="module")
def samples():
    prompts = (small.PROMPT, "<Img><ImageHere></Img> Where?", small.PROMPT)
    return [mmjax.Sample(images=[scenes.draw(scene)], prompt=prompt, answer="A dog.")
            for scene, prompt in zip(scenes.scenes("train", 3), prompts, strict=True)]


def test_loss_of_a_batch(model, samples):
    batch = model.batch(samples, max_txt_len=160, end_sym="###")
    loss, aux = mmjax.loss(model.module, model.params, batch)
    assert aux["logits"].shape == (*batch.tokens.shape, model.config.llm.vocab)
    assert int(aux["tokens"]) == batch.loss_mask.sum() > 0
    assert np.isfinite(loss)


def test_words_do_not_depend_on_the_batch(model, samples):
    together = model.generate(samples, max_new_tokens=6)
    assert together == [words for sample in samples for words in model.generate([sample], max_new_tokens=6)]
    assert together == model.generate(samples, max_new_tokens=6, batch_size=2)
    assert len(set(together)) > 1


def test_words_end_before_the_stop_string(model, samples):
    whole = model.generate(samples, max_new_tokens=12)
    stop = whole[0][2:4]
    cut = model.generate(samples, max_new_tokens=12, stop=[stop])
    assert cut[0] == whole[0][: whole[0].index(stop)].strip()


def test_a_stop_string_is_found_in_the_words(model, samples, monkeypatch):
    """It may begin inside one id and end inside another, which no sequence of ids tells; the row ends all the same,
    soon after it."""
    [whole] = model.generate(samples[1:2], max_new_tokens=60)
    stop, made = "al", []

    class Watched(loaded.Generation):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(loaded, "stop_tokens", lambda tokenizer, words: [])
    monkeypatch.setattr(loaded, "Generation", Watched)
    assert stop in whole
    assert model.generate(samples[1:2], max_new_tokens=60, stop=[stop]) == [whole[: whole.index(stop)].strip()]
    assert made[0].step < 60


def test_pieces_join_to_the_words(model, samples):
    seen = samples[1]
    [whole] = model.generate([seen], 60)
    pieces = list(model.stream(seen, 60))
    assert "".join(pieces) == whole
    assert len(pieces) > 20 and all(pieces)
    assert "".join(model.stream(seen, 60, stop=["al"])) == whole[: whole.index("al")].strip()
    assert "".join(model.stream(seen, 60, temperature=1.0, seed=3)) == model.generate(
        [seen], 60, temperature=1.0, seed=3)[0]
    assert list(model.stream(seen, 60, num_beams=2)) == model.generate([seen], 60, num_beams=2)


def test_a_mistake_is_told_before_the_first_piece(model, samples):
    with pytest.raises(ValueError, match="top_p = 2"):
        model.stream(samples[0], top_p=2.0)
    with pytest.raises(ValueError, match=r"stop = '###': a list of strings, such as \['###'\]"):
        model.generate(samples, stop="###")


def test_what_was_said_stays(model):
    """Of any ids, broken characters and all: what counts as settled is never taken back."""
    tokenizer, random = model.tokenizer, np.random.default_rng(0)
    every = range(tokenizer.vocab_size)
    parts = [i for i in every if loaded.BROKEN in tokenizer.decode([i])]
    for _ in range(300):
        ids = [int(random.choice(pool)) for pool in random.choice([0, 1], 12) for pool in [(every, parts)[pool]]]
        text = tokenizer.decode(ids)
        stop = [text[place : place + 2] for place in random.integers(0, len(text), 2)]
        stop = [words for words in stop if loaded.BROKEN not in words]
        end = loaded.cut(text, stop).strip()
        for count in range(len(ids)):
            begun = tokenizer.decode(ids[:count])
            if loaded.cut(begun, stop) != begun:
                break
            settled = loaded.stable_prefix(begun, stop)
            assert end.startswith(settled)


def test_characters_of_several_bytes_come_whole(model):
    ids = model.tokenizer.encode("naïve 猫 ✓")
    said = [loaded.stable_prefix(model.tokenizer.decode(ids[:count]), []) for count in range(len(ids) + 1)]
    assert said[-1] == "naïve 猫 ✓"
    assert not any("\ufffd" in text for text in said)


def test_prompts_of_about_one_length_share_what_is_compiled(model, samples):
    image = samples[0].images

    def asked(count):
        return [mmjax.Sample(images=image, prompt="<Img><ImageHere></Img>" + " a" * count)]

    model.generate(asked(1), 5, temperature=0.7, top_p=0.9)
    with compilation.count_compilations() as compiled:
        model.generate(asked(3), 9, temperature=0.9, top_p=0.8)
        model.generate(asked(6), 32, temperature=0.5, top_p=0.3, seed=4)
        list(model.stream(asked(5)[0], 20, temperature=0.4, top_p=0.2))
    assert not [name for name in compiled.names if "prefill" in name or "decode" in name]
    with compilation.count_compilations() as compiled:
        model.generate(asked(40), 5, temperature=0.7, top_p=0.9)
    assert len([name for name in compiled.names if "prefill" in name or "decode" in name]) == 2


@pytest.mark.parametrize(("length", "common"), [(1, 32), (32, 32), (33, 48), (48, 48), (49, 64), (65, 96), (100, 128),
                                                (128, 128), (129, 192), (1000, 1024), (1025, 1536)])
def test_common_lengths(length, common):
    assert loaded.common_length(length) == common


@pytest.mark.parametrize("frozen_dtype", [None, "int8"])
def test_layers_taken_apart_write_what_stacked_ones_write(model, samples, frozen_dtype):
    apart = model if frozen_dtype is None else mmjax.load(small.checkpoint(), dtype="float32", frozen_dtype="int8")
    stacked = dataclasses.replace(apart)
    stacked.__dict__["_decoder"] = (apart.module, apart.params)
    assert not apart._decoder[0].scan_layers and apart._decoder[0].transposed_weights
    for settings in ({}, {"num_beams": 3}):
        assert apart.generate(samples, 12, **settings) == stacked.generate(samples, 12, **settings)


def test_draws_depend_on_the_number_of_the_sample(model, samples):
    together = model.generate(samples, 8, temperature=1.0, seed=5)
    assert model.generate(samples[1:], 8, temperature=1.0, seed=5, first=1) == together[1:]
    assert model.generate(samples, 8, temperature=1.0, seed=5, batch_size=2) == together


def test_no_samples_make_no_words(model):
    assert model.generate([]) == []


@pytest.mark.parametrize(("settings", "words"), [
    ({"batch_size": 0}, "batch_size = 0: at least 1"), ({"batch_size": -1}, "batch_size = -1: at least 1"),
    ({"stop": "###"}, "a list of strings"), ({"stop": [3]}, "a list of strings"),
    ({"max_new_tokens": 2_048}, "row 0: .* tokens\n.*row 1: .* tokens\n.*decrease max_new_tokens"),
])
def test_what_cannot_be_generated_is_refused(model, samples, settings, words):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        model.generate(samples[:2], **settings)


def test_a_prompt_is_tokenised_once(model, samples, monkeypatch):
    seen, encode = [], model.tokenizer.encode
    monkeypatch.setattr(
        model.tokenizer, "encode", lambda text, special=True: seen.append(text) or encode(text, special)
    )
    asked = [dataclasses.replace(samples[0], prompt=f"<Img><ImageHere></Img> Is it {n}?") for n in range(3)]
    model.generate(asked, 5)
    assert [sum(f" {n}?" in text for text in seen) for n in range(3)] == [1, 1, 1]


def test_prompts_that_hold_no_text_are_named(model, samples):
    with pytest.raises(ValueError, match=r"rows \[1\] have characters that are not text"):
        model.generate([samples[0], mmjax.Sample(prompt="caf\udce9?")])


def test_sampling_follows_the_seed(model, samples):
    first, again, other = (model.generate(samples, 8, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_stop_tokens_cover_both_ways_of_writing(model):
    tokenizer = model.tokenizer
    ways = stop_tokens(tokenizer, "###")
    for text in ("###", "end###", "end ###"):
        ids = tuple(tokenizer.encode(text))
        assert any(ids[-len(way):] == way for way in ways)


def test_unknown_text_setting_is_refused(model, samples):
    with pytest.raises(ValueError, match="No such text settings: end_symbol"):
        model.batch(samples, end_symbol="###")


def test_damaged_weights_are_named(tmp_path):
    shutil.copytree(small.checkpoint(), tmp_path / "c")
    files = [path for path in (tmp_path / "c" / "weights").rglob("*") if path.is_file()]
    os.truncate(max(files, key=lambda path: path.stat().st_size), 1000)
    with pytest.raises(ValueError, match="weights is damaged; convert or copy it again"):
        mmjax.load(tmp_path / "c")


def test_empty_stop_string_stops_nothing(model, samples):
    assert model.generate(samples, max_new_tokens=4, stop=[""]) == model.generate(samples, max_new_tokens=4)


def test_bfloat16_is_close(model, samples):
    half = mmjax.load(small.checkpoint(), dtype="bfloat16")
    batch = model.batch(samples)
    exact, _ = mmjax.loss(model.module, model.params, batch)
    rough, aux = mmjax.loss(half.module, half.params, batch)
    assert aux["logits"].dtype == np.float32
    np.testing.assert_allclose(rough, exact, rtol=0.02)


def test_language_model_alone(samples, tmp_path):
    write.command("llama")(small.GOLDEN / "ckpt" / "llama_hf", tmp_path / "llama")
    model = mmjax.load(tmp_path / "llama", dtype="float32")
    words = model.generate([mmjax.Sample(prompt="A dog"), mmjax.Sample(prompt="Two children look at")], 6)
    assert len(words) == 2 and all(words)
    with pytest.raises(ValueError, match=r"Rows \[0, 1, 2\] have images"):
        model.batch(samples)


# ---- a model that mixes senses ----


@pytest.fixture(scope="module")
def mixing(tmp_path_factory):
    """The reference set's ImageBind-LLM."""
    golden, out = small.GOLDEN.parent / "imagebind_llm", tmp_path_factory.mktemp("imagebind_llm") / "checkpoint"
    write.command("imagebind_llm")(golden / "imagebind.pth", golden / "llama_meta", out, adapter=golden / "adapter.pth",
                                   arch=golden / "config.json", words=golden / "bpe_tiny.txt.gz")
    return mmjax.load(out, dtype="float32")


def sensing(model, names):
    """A sample of these senses, as the towers take them."""
    random, towers = np.random.default_rng(len(names)), model.config.imagebind.towers
    return mmjax.Sample(prompt="What is it?", answer="A dog.", media={
        name: random.normal(size=towers[name].input_shape).astype(np.float32) for name in names})


def test_batch_of_a_model_that_mixes_senses(mixing):
    image = scenes.draw(scenes.scenes("train", 1)[0])
    samples = [mmjax.Sample(images=[image], prompt="What is it?", answer="A dog."),
               mmjax.Sample(prompt="Which is it?", input="A cat", answer="A cat."),
               mmjax.Sample(media={"text": "a dog"}, weights={"text": 0.5}, prompt="What is it?", answer="A dog.")]
    batch = mixing.batch(samples)
    assert batch.media.keys() == {"text"} and batch.weights.keys() == {"image", "text"}
    assert batch.images.dtype == np.uint8 and batch.image_valid.tolist() == [[True], [False], [False]]
    assert batch.weights["image"].tolist() == [1, 1, 0] and batch.weights["text"].tolist() == [0, 0, 0.5]
    ids = [mixing.tokenizer.bos, *mixing.tokenizer.encode(
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nWhich is it?\n\n### Input:\nA cat\n\n"
        "### Response:A cat.", special=False), mixing.tokenizer.eos]
    np.testing.assert_array_equal(batch.tokens[1, batch.valid[1]], ids)
    assert batch.loss_mask[1].sum() < 12 and batch.loss_mask[1, len(ids) - 1]


def test_the_mix_of_a_row_does_not_depend_on_the_others(mixing):
    rows = [sensing(mixing, names) for names in (("depth",), ("imu", "thermal"), ())]
    mix = tiny.jit(functools.partial(mixing.module.apply, method="feature"))
    together = mix({"params": mixing.params}, mixing.batch(rows))
    for row, sample in enumerate(rows):
        alone = mix({"params": mixing.params}, mixing.batch([sample]))
        np.testing.assert_allclose(together[row], alone[0], atol=2e-6)


def test_what_was_recalled_takes_the_place_of_the_senses(mixing):
    vectors = unit(np.random.default_rng(0).normal(size=(20, mixing.config.imagebind.out)))
    batch = mixing.batch([sensing(mixing, ("depth",))])
    mixed = mixing._recalled(batch, Recall(np.asarray(vectors), count=1, weight=1.0))
    assert mixed.images is None and mixed.image_valid is None and mixed.media is None and mixed.weights is None
    similarity = mixed.features[0] @ vectors.T
    np.testing.assert_allclose(similarity.max(), 1, atol=1e-6)  # with that weight it is one of them


def test_recall_that_does_not_fit_the_model(mixing, model, samples):
    with pytest.raises(ValueError, match="the family minigpt4 does not"):
        model.generate(samples[:1], recall=Recall(np.ones((10, 4), np.float32)))
    width = mixing.config.imagebind.out
    with pytest.raises(ValueError, match=f"recall are 4 wide, this model's features {width}"):
        mixing.generate([sensing(mixing, ("depth",))], recall=Recall(np.ones((10, 4), np.float32)))


def test_what_only_a_model_that_mixes_senses_takes(model, samples):
    for more in ({"media": {"depth": 1}}, {"weights": {"image": 1.0}}):
        with pytest.raises(ValueError, match=r"Rows \[1\] have media or weights"):
            model.batch([samples[0], dataclasses.replace(samples[1], **more)])


# ---- a model whose images take no places among the words ----


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """The reference set's LLaMA-Adapter v2."""
    out = tmp_path_factory.mktemp("llama_adapter") / "v2"
    write.command("llama_adapter")(out=out, **ADAPTER_V2)
    return mmjax.load(out, dtype="float32")


def test_text_alone_is_the_same_among_images(seeing, samples):
    words, seen = mmjax.Sample(prompt="What is it?", answer="A dog."), dataclasses.replace(samples[0], prompt="What?")
    alone, mixed = seeing.batch([words]), seeing.batch([words, seen])
    assert alone.images is None and mixed.images.dtype == np.float32
    np.testing.assert_array_equal(mixed.images[0], 0)
    query = tiny.jit(functools.partial(seeing.module.apply, method="visual_query"))
    both = query({"params": seeing.params}, mixed)
    np.testing.assert_allclose(both[0], query({"params": seeing.params}, alone)[0], atol=1e-5)
    assert np.abs(both[0] - both[1]).max() > 1e-2
