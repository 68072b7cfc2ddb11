"""Make the shipped weights of the embedded default (mmjax/assets/scenes), in the released PyTorch formats.

    python scripts/pretrain_scenes.py --out mmjax/assets/scenes

Two parts that never meet, so that connecting them is left to the job (configs/tiny_minigpt4.py):

Picture tower (ViT, ln_vision, Q-Former; 24,000 pictures, 1,600 steps) learns to name what it sees through throw-away
heads. It sees only scenes of the `train` split: no picture of it has a pair of `NEW_PAIRS` or a held-out caption, so
the split `new_pairs` is new to everything that looks at pictures. Read off the queries by the heads:

    split       size    color   shape   place   mean of all
    held_out    1.000   1.000   0.994   1.000   0.999
    new_pairs   1.000   1.000   0.759   1.000   0.940    56 % of the things here are new pairs

The shapes lost on `new_pairs` are lost here: a tower that never saw a red star takes it for another shape in about
four of ten cases. No projector can repair that.

Language model (40,000 texts, 800 steps) reads words only, of all pairs. With the true words in the picture's place:

    captions 1.000   questions: count 1.000   size 0.784   shape 0.763   color 0.588   place 0.551

It answers what is asked about a lone shape, but among several it mostly guesses which one is meant. Slots in one fixed
order, equal weight for every text, three questions to one caption, and rope_theta 100 were tried and did not help.

Time: 15 + 23 minutes on 2 CPU cores that six programs shared. In quiet moments a step took 0.3 s (pictures) and 0.5 s
(texts), which would make it 8 + 7.
"""

import argparse
import io
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece

from mmjax import trees
from mmjax.batch import Sample
from mmjax.config import TextConfig
from mmjax.convert import llama as llama_files
from mmjax.convert import minigpt4 as minigpt4_files
from mmjax.convert import torch_file
from mmjax.convert.tables import backward
from mmjax.data import scenes as world
from mmjax.data import text
from mmjax.families import llama
from mmjax.families.model import causal_mask
from mmjax.models.eva_vit import EvaVit, VitConfig
from mmjax.models.layers import LayerNorm
from mmjax.models.llama import LlamaConfig
from mmjax.models.pixels import normalise
from mmjax.models.qformer import QFormer, QFormerConfig
from mmjax.tokenizer import Tokenizer

VIT = VitConfig(image_size=world.SIDE, patch=8, dim=96, depth=3, heads=4, hidden=384, table=6)
QFORMER = QFormerConfig(queries=12, dim=96, depth=4, heads=4, hidden=192, cross_every=2)
VOCAB = 512
LLAMA = LlamaConfig(vocab=VOCAB, depth=3, dim=96, heads=4, kv_heads=4, head_dim=24, hidden=256)

SLOTS = ("shape", "size", "color", "place")  # query 4i + j is to hold slot j of the i-th thing
WORDS = ("none", *(word for slot in SLOTS for word in world.ATTRIBUTES[slot]))
MOST = 3  # things in a scene


def slots(scene: world.Scene, order=SLOTS) -> list[str]:
    """The attribute words of a scene, thing by thing; "none" where there is no further thing."""
    words = [getattr(thing, slot) for thing in scene.things for slot in order]
    return words + ["none"] * (MOST * len(order) - len(words))


# The picture tower


def see(params, images):
    """uint8[B,48,48,3] -> (tokens [B,37,96], queries [B,12,96])."""
    tower = {"params": params["vit"]}
    tokens = EvaVit(VIT).apply(tower, normalise(images))
    tokens = LayerNorm(1e-5).apply({"params": params["ln_vision"]}, tokens)
    return tokens, QFormer(QFORMER).apply({"params": params["qformer"]}, tokens)


def sincos(side: int, dim: int) -> np.ndarray:
    """[1 + side², dim]: a quarter of the channels each for sine and cosine of row and column; zeros for the class."""
    frequency = 100.0 ** (-np.arange(dim // 4) / (dim // 4))
    row, column = (axis.reshape(-1, 1) * frequency for axis in np.mgrid[:side, :side])
    grid = np.concatenate([np.sin(row), np.cos(row), np.sin(column), np.cos(column)], axis=1)
    return np.concatenate([np.zeros((1, dim)), grid]).astype(np.float32)


def patch_targets(scene: world.Scene) -> np.ndarray:
    """int[36, 5]: for each patch the four attribute words and the rank of the thing in its cell; 0 for nothing."""
    grid = np.zeros((3, 3, 5), np.int32)
    for rank, thing in enumerate(scene.things):
        words = [WORDS.index(getattr(thing, slot)) for slot in SLOTS]
        grid[divmod(world.PLACES.index(thing.place), 3)] = [*words, rank + 1]
    return grid.repeat(2, 0).repeat(2, 1).reshape(36, 5)


def train_vision(steps: int, image_count: int, batch: int, rate: float) -> dict:
    """Every query names one word through a head that all share, and every patch what is in it; both heads are thrown
    away. The images hold neither the pairs nor the captions that `world.scenes` keeps from its `train` split.
    """
    shown = world.scenes("train", image_count, seed=1)
    images = np.stack([world.draw(scene) for scene in shown])
    named = np.array([[WORDS.index(word) for word in slots(scene)] for scene in shown])
    patches = np.stack([patch_targets(scene) for scene in shown])

    keys = jax.random.split(jax.random.key(1), 5)
    tokens = jnp.zeros((1, 37, VIT.dim))
    params = {
        "vit": EvaVit(VIT).init(keys[0], jnp.zeros((1, 3, world.SIDE, world.SIDE)))["params"],
        "ln_vision": LayerNorm(1e-5).init(keys[1], tokens)["params"],
        "qformer": QFormer(QFORMER).init(keys[2], tokens)["params"],
        "word_head": 0.02 * jax.random.normal(keys[3], (QFORMER.dim, len(WORDS))),
        "patch_head": 0.02 * jax.random.normal(keys[4], (VIT.dim, 5, len(WORDS))),
    }
    # Drawn at random, the positions take longer to sort out than the whole training has.
    params["vit"]["pos"] = jnp.asarray(sincos(VIT.table, VIT.dim))

    def loss(params, images, named, patches):
        tokens, queries = see(params, images)
        words = jnp.einsum("BQD,DW->BQW", queries, params["word_head"])
        local = jnp.einsum("BTD,DAW->BTAW", tokens[:, 1:], params["patch_head"])
        entropy = optax.softmax_cross_entropy_with_integer_labels
        right = (words.argmax(-1) == named).mean()
        return entropy(words, named).mean() + 0.5 * entropy(local, patches).mean(), right

    rng = np.random.default_rng(1)
    orders = np.concatenate([rng.permutation(image_count) for _ in range(steps * batch // image_count + 1)])

    def feed(step):
        chosen = orders[step * batch : (step + 1) * batch]
        return images[chosen], named[chosen], patches[chosen]

    params = train("vision", loss, params, feed, steps, rate)
    for split in world.SPLITS[1:]:
        held = world.scenes(split, 500, seed=2)
        held_named = np.array([[WORDS.index(word) for word in slots(scene)] for scene in held])
        _, queries = see(params, jnp.asarray(np.stack([world.draw(scene) for scene in held])))
        right = np.asarray(jnp.einsum("BQD,DW->BQW", queries, params["word_head"]).argmax(-1)) == held_named
        real = held_named > 0
        by_slot = {slot: round(float(right[:, i::4][real[:, i::4]].mean()), 4) for i, slot in enumerate(SLOTS)}
        print(f"vision, {split}: read off the queries {by_slot}, mean {right[real].mean():.4f}, "
              f"empty slots {right[~real].mean():.4f}", flush=True)
    return {name: params[name] for name in ("vit", "ln_vision", "qformer")}


# The language model


TEXT = TextConfig(prompt_template="###Human: {} ###Assistant: ", end_sym="###")
LENGTH = 64  # tokens of a row; the longest caption with its prompt has 63
# Instructions that only the language model meets, so that a user is not held to the four of `PROMPTS`.
MORE_PROMPTS = ("Describe the image.", "Describe this picture.", "What is in this picture?", "What do you see?")


def all_texts() -> list[str]:
    """Texts in which every word of the world occurs."""
    shown = world.scenes("train", 500, seed=1, new_pairs=())
    asked = [part for scene in shown for question in world.questions(scene) for part in question[:2]]
    return [*world.PROMPTS, *MORE_PROMPTS, *asked, *map(world.caption, shown)]


def write_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """A sentencepiece model in LLaMA's manner in which every word of `texts` is one token, and the files beside it."""
    words = sorted({word for text in texts for word in re.findall(r"[A-Za-z]+(?:-[a-z]+)?", text)})
    lines = [line for word in [*words, "none", "###Human", "###Assistant"] for line in [word] * 100]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, ". , ? :"]), model_writer=model, model_type="bpe", vocab_size=VOCAB,
        user_defined_symbols=["###", "<Img>", "</Img>"], byte_fallback=True, character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_by_unicode_script=False,
        num_threads=1, minloglevel=1)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    if broken := [word for word in words if len(pieces.encode(word)) > 1]:
        raise ValueError(f"{len(broken)} words are more than one token with a vocabulary of {VOCAB}: {broken}")
    special = {name: {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
               for name, text in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))}
    config = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
              "model_max_length": LLAMA.max_positions, "pad_token": None, "tokenizer_class": "LlamaTokenizer",
              **{name: {"__type": "AddedToken", **value} for name, value in special.items()}}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def texts_of(scene: world.Scene, rng: np.random.Generator) -> Sample:
    """A caption (half of the time) or an answer; in a tenth of the texts without the place for a picture."""
    if rng.random() < 0.5:
        prompts = world.PROMPTS + MORE_PROMPTS
        prompt, answer = prompts[rng.integers(len(prompts))], world.caption(scene)
    else:
        asked = world.questions(scene)
        prompt, answer, _ = asked[rng.integers(len(asked))]
    return Sample(prompt=prompt, answer=answer) if rng.random() < 0.1 else about_image(prompt, answer)


def about_image(prompt: str, answer: str) -> Sample:
    return Sample(["words"], prompt="<Img><ImageHere></Img> " + prompt, answer=answer)


def train_language(tokenizer: Tokenizer, steps: int, texts: int, batch: int, rate: float) -> dict:
    """Texts in which twelve attribute words stand where a picture would: it never sees a picture.

    Half of the texts have the words of a thing in another order, and all have noise on the words' vectors, so that
    what it learns is to look for a word's meaning near the right place, not for one exact vector.
    """
    model = llama.TextLlama(llama.TextLlamaConfig(LLAMA))
    rng = np.random.default_rng(3)
    ids = {word: tokenizer.encode(word)[0] for word in WORDS}

    def as_rows(scenes, samples, orders):
        rows = text.rows(samples, tokenizer, TEXT, QFORMER.queries, length=LENGTH)
        named = (slots(scene, order) for scene, order in zip(scenes, orders, strict=True))
        words = np.array([[ids[word] for word in words] for words in named])
        soft = rows.soft_index >= 0
        tokens = np.where(soft, np.take_along_axis(words, np.maximum(rows.soft_index, 0), 1), rows.tokens)
        return tokens.astype(np.int32), soft, rows.valid, rows.loss_mask

    def order():
        return SLOTS if rng.random() < 0.5 else rng.permutation(SLOTS)

    # The language model may read of every colour on every shape: only pictures hold pairs back.
    read = world.scenes("train", texts, seed=3, new_pairs=())
    columns = as_rows(read, [texts_of(scene, rng) for scene in read], [order() for _ in read])
    params = model.init(jax.random.key(3), llama.example(model.cfg))["params"]

    def logits(params, tokens, soft, valid, noise):
        x = model.apply({"params": params}, tokens, method="embed")
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = x + jnp.where(soft[..., None], noise, 0)
        hidden, _ = model.apply({"params": params}, x, positions, causal_mask(valid), method="decode")
        return model.apply({"params": params}, hidden, method="logits")

    def loss(params, tokens, soft, valid, loss_mask, key):
        strength, noise = jax.random.split(key)
        size = jax.lax.stop_gradient(params["llm"]["embedding"].std())
        noise = size * jax.random.uniform(strength, (len(tokens), 1, 1)) * jax.random.normal(
            noise, (*tokens.shape, LLAMA.dim))
        scores = logits(params, tokens, soft, valid, noise)[:, :-1]
        targets, counted = tokens[:, 1:], loss_mask[:, 1:]
        entropy = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
        right = (scores.argmax(-1) == targets) * counted
        return (entropy * counted).sum() / counted.sum(), right.sum() / counted.sum()

    shuffled = np.concatenate([rng.permutation(texts) for _ in range(steps * batch // texts + 1)])

    def feed(step):
        chosen = shuffled[step * batch : (step + 1) * batch]
        return *(column[chosen] for column in columns), jax.random.key(step)

    params = train("language", loss, params, feed, steps, rate)

    held = world.scenes("held_out", 300, seed=4, new_pairs=())
    tasks = [(scene, "caption", about_image(world.PROMPTS[0], world.caption(scene)))
             for scene in held]
    tasks += [(scene, question.kind, about_image(question.text, question.answer))
              for scene in held for question in world.questions(scene)]
    tokens, soft, valid, loss_mask = as_rows([t[0] for t in tasks], [t[2] for t in tasks], [SLOTS] * len(tasks))
    said = jax.jit(lambda *rows: logits(params, *rows, 0.0).argmax(-1))
    scores = np.concatenate([said(tokens[i : i + 100], soft[i : i + 100], valid[i : i + 100])
                             for i in range(0, len(tokens), 100)])
    # Every token right given the true ones before it is the same as the whole answer right in greedy decoding.
    right = ((scores[:, :-1] == tokens[:, 1:]) | ~loss_mask[:, 1:]).all(1)
    for kind in dict.fromkeys(task[1] for task in tasks):
        chosen = np.array([task[1] == kind for task in tasks])
        print(f"language, held_out: {kind} right {right[chosen].mean():.4f} of {chosen.sum()}", flush=True)
    return params


def train(name, loss, params, feed, steps, rate):
    """AdamW, clipped, linear warm-up and cosine; `feed(step)` gives the arguments of `loss` behind the parameters."""
    schedule = optax.warmup_cosine_decay_schedule(0, rate, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, *batch):
        (value, right), grads = jax.value_and_grad(loss, has_aux=True)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, right

    start = time.time()
    for step in range(steps):
        params, state, value, right = update(params, state, *feed(step))
        if step % 100 == 0 or step == steps - 1:
            print(f"{name}: step {step}  loss {value:.4f}  right {right:.3f}  {time.time() - start:.0f} s", flush=True)
    return params


# The released formats


def save(out: Path, params) -> None:
    """float16, under the released key names; `params` is the tree of the minigpt4 family without its projector."""
    half = {path: np.asarray(leaf, np.float16) for path, leaf in trees.flatten(params).items()}
    torch_file.save(out / "eva_vit.pth", backward(minigpt4_files.vit_entries(VIT), half))
    torch_file.save(out / "blip2_pretrained.pth",
                    {"model": backward(minigpt4_files.qformer_entries(QFORMER, VIT.dim), half)})
    torch_file.save(out / "llama" / "pytorch_model.bin", backward(llama_files.entries(LLAMA), half))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    write_json(out / "llama" / "generation_config.json", ids)
    write_json(out / "llama" / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float16",
        "vocab_size": LLAMA.vocab, "hidden_size": LLAMA.dim, "intermediate_size": LLAMA.hidden,
        "num_hidden_layers": LLAMA.depth, "num_attention_heads": LLAMA.heads, "num_key_value_heads": LLAMA.kv_heads,
        "rms_norm_eps": LLAMA.eps, "rope_theta": LLAMA.rope_theta, "max_position_embeddings": LLAMA.max_positions,
        "tie_word_embeddings": LLAMA.tied, **ids})
    write_json(out / "arch.json", {
        "vit": {"image_size": VIT.image_size, "patch_size": VIT.patch, "dim": VIT.dim, "depth": VIT.depth,
                "num_heads": VIT.heads, "mlp_hidden": VIT.hidden, "layer_norm_eps": VIT.eps, "ln_vision_eps": 1e-5},
        "qformer": {"hidden": QFORMER.dim, "num_layers": QFORMER.depth, "num_heads": QFORMER.heads,
                    "intermediate": QFORMER.hidden, "num_query_tokens": QFORMER.queries,
                    "cross_attention_freq": QFORMER.cross_every, "encoder_width": VIT.dim,
                    "layer_norm_eps": QFORMER.eps},
        "llama": "see llama/config.json"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    out = parser.parse_args().out
    (out / "llama").mkdir(parents=True, exist_ok=True)
    write_tokenizer(out / "llama", all_texts())
    tokenizer = Tokenizer.from_folder(out / "llama")
    vision = train_vision(steps=1_600, image_count=24_000, batch=64, rate=2e-3)
    language = train_language(tokenizer, steps=800, texts=40_000, batch=96, rate=3e-3)
    save(out, {**vision, **language})


if __name__ == "__main__":
    main()
