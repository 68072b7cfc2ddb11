"""Make the shipped weights of the embedded default (mmjax/assets/scenes), in the released PyTorch formats.

    python scripts/pretrain_scenes.py --out mmjax/assets/scenes

Two parts that never meet: a picture tower (ViT, ln_vision, Q-Former) that learns to name what it sees through
throw-away heads, and a language model that reads words only.
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
from mmjax.families import llama, minigpt4
from mmjax.families.base import causal_mask
from mmjax.models.eva_vit import EvaVit, VitConfig
from mmjax.models.layers import LayerNorm
from mmjax.models.llama import LlamaConfig
from mmjax.models.qformer import QFormer, QFormerConfig
from mmjax.tokenizer import Tokenizer

VIT = VitConfig(image_size=world.SIDE, patch=8, dim=96, depth=3, heads=4, hidden=384, table=6)
QFORMER = QFormerConfig(queries=12, dim=96, depth=4, heads=4, hidden=192, cross_every=2)
VOCAB = 512
LLAMA = LlamaConfig(vocab=VOCAB, depth=3, dim=96, heads=4, kv_heads=4, head_dim=24, hidden=256, max_positions=2_048,
                    rope_theta=100.0)  # texts are short: slow rotations would be wasted, fast ones tell neighbours apart

SLOTS = ("shape", "size", "color", "place")  # query 4i + j is to hold slot j of the i-th thing
WORDS = ("none", *(word for slot in SLOTS for word in world.ATTRIBUTES[slot]))
MOST = 3  # things in a scene


def slots(scene: world.Scene) -> list[str]:
    """The attribute words of a scene, thing by thing; "none" where there is no further thing."""
    words = [getattr(thing, slot) for thing in scene.things for slot in SLOTS]
    return words + ["none"] * (MOST * len(SLOTS) - len(words))


# The picture tower


def see(params, pictures):
    """uint8[B,48,48,3] -> (tokens [B,37,96], queries [B,12,96])."""
    tower = {"params": params["vit"]}
    tokens = EvaVit(VIT).apply(tower, minigpt4.normalise(pictures[:, None])[:, 0])
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


def train_vision(steps: int, pictures: int, batch: int, rate: float):
    shown = world.scenes("train", pictures, seed=1)
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
    orders = np.concatenate([rng.permutation(pictures) for _ in range(steps * batch // pictures + 1)])

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


def caption_of(scene: world.Scene, rng: np.random.Generator) -> Sample:
    prompts = world.PROMPTS + MORE_PROMPTS
    return about_picture(prompts[rng.integers(len(prompts))], world.caption(scene))


def question_of(scene: world.Scene, rng: np.random.Generator) -> Sample:
    asked = world.questions(scene)
    question = asked[rng.integers(len(asked))]
    return about_picture(question.text, question.answer)


def about_picture(prompt: str, answer: str) -> Sample:
    return Sample(["words"], prompt="<Img><ImageHere></Img> " + prompt, answer=answer)


def train_language(tokenizer: Tokenizer, steps: int, texts: int, batch: int, rate: float):
    """Texts in which twelve attribute words stand where a picture would: it never sees a picture.

    Noise on these words' vectors makes it look for a word's meaning near the right place, not for one exact vector.
    Three batches of four are questions: what belongs to the same thing takes long to learn, captions do not.
    """
    model = llama.Model(llama.Config(LLAMA))
    rng = np.random.default_rng(3)
    ids = {word: tokenizer.encode(word)[0] for word in WORDS}

    def as_rows(scenes, samples):
        rows = text.rows(samples, tokenizer, TEXT, QFORMER.queries, multiple=8)
        words = np.array([[ids[word] for word in slots(scene)] for scene in scenes])
        soft = rows.soft_index >= 0
        tokens = np.where(soft, np.take_along_axis(words, np.maximum(rows.soft_index, 0), 1), rows.tokens)
        return tokens.astype(np.int32), soft, rows.valid, rows.loss_mask

    # The language model may read of every colour on every shape: only pictures hold pairs back.
    read = world.scenes("train", texts, seed=3, new_pairs=())
    captions, questions = (as_rows(read, [make(scene, rng) for scene in read]) for make in (caption_of, question_of))
    params = model.init(jax.random.key(3), llama.example(model.cfg))["params"]

    def logits(params, tokens, soft, valid, noise):
        x = model.apply({"params": params}, tokens, method="embed")
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = x + jnp.where(soft[..., None], noise, 0)
        hidden, _ = model.apply({"params": params}, x, positions, causal_mask(valid), method="decode")
        return model.apply({"params": params}, hidden, method="logits")

    def loss(params, tokens, soft, valid, loss_mask, key):
        strength, noise = jax.random.split(key)
        size = 0.7 * jax.lax.stop_gradient(params["llama"]["embedding"].std())
        noise = size * jax.random.uniform(strength, (len(tokens), 1, 1)) * jax.random.normal(
            noise, (*tokens.shape, LLAMA.dim))
        scores = logits(params, tokens, soft, valid, noise)[:, :-1]
        targets, counted = tokens[:, 1:], loss_mask[:, 1:]
        entropy = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
        right = (scores.argmax(-1) == targets) * counted
        return (entropy * counted).sum() / counted.sum(), right.sum() / counted.sum()

    def feed(step):
        chosen = rng.integers(texts, size=batch)
        return *(column[chosen] for column in (questions if step % 4 else captions)), jax.random.key(step)

    params = train("language", loss, params, feed, steps, rate)

    held = world.scenes("held_out", 300, seed=4, new_pairs=())
    tasks = [(scene, "caption", about_picture(world.PROMPTS[0], world.caption(scene)))
             for scene in held]
    tasks += [(scene, question.kind, about_picture(question.text, question.answer))
              for scene in held for question in world.questions(scene)]
    tokens, soft, valid, loss_mask = as_rows([task[0] for task in tasks], [task[2] for task in tasks])
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
        if step % 100 == 1 or step == steps - 1:
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
    vision = train_vision(steps=1_600, pictures=24_000, batch=64, rate=2e-3)
    language = train_language(tokenizer, steps=1_000, texts=40_000, batch=96, rate=3e-3)
    save(out, {**vision, **language})


if __name__ == "__main__":
    main()
