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

Language model (0.54 million parameters, 1.1 MB) reads words only, of all pairs. With the true words in the picture's
place it has right, of 300 held-out scenes:

    captions 1.000   questions, one thing 1.000
    questions, several things: count 1.000   size 0.986   shape 0.926   color 0.984   place 0.752   mean 0.937

The model shipped before had three layers, one text to a row, and nothing but the answer to learn from: it had the
captions right, but mostly guessed which of several things is meant (size 0.784, shape 0.763, color 0.588, place 0.551).
Now a scene is read once for eight questions, and throw-away heads tell the layers what they have to find (`hints`).
With a head only where an answer begins, "Where is the star?" stayed at chance (0.53 after 600 steps, the others at 0.96
or more): its answer names the place only in its third word. So all words of an answer but the end sign have the head.

The shipped language model was made in two parts: 400 steps with that head only where an answer begins, then 250 as the
script has it now, at a rate that fell from 2e-3 to zero. The script does 800 steps from nothing.

Time: pictures 15 minutes on 2 CPU cores that six programs shared (8 in quiet moments), texts 0.65 s of CPU time a step,
measured beside more than 20 other programs: 9 minutes of CPU time.
"""

import argparse
import io
import itertools
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

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
from mmjax.families.model import example_batch
from mmjax.models.eva_vit import EvaVit, VitConfig
from mmjax.models.layers import LayerNorm
from mmjax.models.llama import Llama, LlamaConfig
from mmjax.models.pixels import normalise
from mmjax.models.qformer import QFormer, QFormerConfig
from mmjax.tokenizer import Tokenizer

VIT = VitConfig(image_size=world.SIDE, patch=8, dim=96, depth=3, heads=4, hidden=384, table=6)
QFORMER = QFormerConfig(queries=12, dim=96, depth=4, heads=4, hidden=192, cross_every=2)
VOCAB = 512
LLAMA = LlamaConfig(vocab=VOCAB, depth=4, dim=96, heads=4, kv_heads=4, head_dim=24, hidden=256)

SLOTS = ("shape", "size", "color", "place")  # query 4i + j is to hold slot j of the i-th thing
WORDS = ("none", *(word for slot in SLOTS for word in world.ATTRIBUTES[slot]))
MOST = 3  # things in a scene
entropy = optax.softmax_cross_entropy_with_integer_labels


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
CAPTION = 44  # tokens of the longest instruction and caption, behind the picture
KINDS = (*SLOTS, "count")  # of questions
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


def named(question: world.Question) -> str:
    """The shape or the place by which a question names a thing; "none" for the count."""
    words = re.findall(r"[a-z]+(?:-[a-z]+)?", question.text)
    return next((word for word in words if word in (*world.SHAPES, *world.PLACES)), "none")


class Reader:
    """Texts as arrays. What stands before the prompt is the same in all of them, with words in the picture's place;
    what follows is an ending, int[T,2]: tokens, and 1 for those of the answer.

    before:    int[P], the tokens of the beginning; the picture's words belong to the slots `soft`, and all that has to
               do with the picture to those from `picture` on
    questions: int[Z,16,2], the endings of all questions with all answers
    facts:     int[Z,3]: the slot before the answer, the word that names the thing (of WORDS), the kind (of KINDS)
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids = np.array([tokenizer.encode(word)[0] for word in WORDS])
        row = self.row("What?", "none")
        self.soft = np.flatnonzero(row[:, 1] >= 0)
        self.before = row[: self.soft[-1] + 3, 0]  # </Img> is two tokens, and so is <Img>
        self.picture = self.soft[0] - 2
        things = [world.Thing(*values) for values in itertools.product(*world.ATTRIBUTES.values())]
        shown = [(thing,) for thing in things] + [(things[0],) * count for count in range(2, MOST + 1)]
        asked = dict.fromkeys(question for each in shown for question in world.questions(world.Scene(each, (0,))))
        self.numbers = {question: number for number, question in enumerate(asked)}
        self.questions = np.stack([self.ending(question.text, question.answer, 16) for question in asked])
        self.facts = np.array([(ending[:, 1].argmax() - 1, WORDS.index(named(question)), KINDS.index(question.kind))
                               for question, ending in zip(asked, self.questions, strict=True)])

    def row(self, prompt: str, answer: str) -> np.ndarray:
        sample = Sample(["words"], prompt="<Img><ImageHere></Img> " + prompt, answer=answer)
        return text.row_slots([sample], self.tokenizer, TEXT, QFORMER.queries)[0][0]

    def ending(self, prompt: str, answer: str, length: int) -> np.ndarray:
        row = self.row(prompt, answer)[len(self.before):, [0, 3]]
        return np.pad(row, ((0, length - len(row)), (0, 0)))

    def asked(self, scene: world.Scene) -> np.ndarray:
        """int[n,2]: the numbers of a scene's questions, and of the thing that each is about; -1 for the count."""
        return np.array([(self.numbers[question], next(
            (i for i, thing in enumerate(scene.things) if named(question) in (thing.shape, thing.place)), -1))
            for question in world.questions(scene)])

    def things(self, scenes: Sequence[world.Scene]) -> np.ndarray:
        """int[N,3,4]: the attribute words of the things."""
        words = np.array([[WORDS.index(word) for word in slots(scene)] for scene in scenes])
        return words.reshape(-1, MOST, len(SLOTS))


class Lesson(NamedTuple):
    """B scenes with Q questions each, and captions of the first C."""

    words: np.ndarray  # int[B,12] in the picture's place
    things: np.ndarray  # int[B,3,4], the same in the order of SLOTS
    blind: np.ndarray  # bool[B]: the text is without the picture's place
    questions: np.ndarray  # int[B,Q]
    meant: np.ndarray  # int[B,Q], the number of the thing; -1 for none
    captions: np.ndarray  # int[C,T,2]


def lessons(reader: Reader, rng: np.random.Generator, texts: int, batch: int, asked: int) -> Callable[[], Lesson]:
    """A quarter of the scenes have the words of a thing in another order; a tenth are read without a picture's place.
    Of the scenes with one thing, where nothing has to be looked up, a third is kept."""
    # The language model may read of every colour on every shape: only pictures hold pairs back.
    read = world.scenes("train", texts, seed=3, new_pairs=())
    read = [scene for number, scene in enumerate(read) if len(scene.things) > 1 or number % 3 == 0]
    things, questions = reader.things(read), [reader.asked(scene) for scene in read]
    prompts = world.PROMPTS + MORE_PROMPTS
    captions = np.stack([reader.ending(prompts[rng.integers(len(prompts))], world.caption(scene), CAPTION)
                         for scene in read])

    def lesson() -> Lesson:
        chosen = rng.integers(len(read), size=batch)
        orders = np.stack([rng.permutation(4) if rng.random() < 0.25 else np.arange(4) for _ in chosen])
        words = np.take_along_axis(things[chosen], orders[:, None], 2).reshape(batch, -1)
        picked = np.stack([questions[i][rng.permutation(max(asked, len(questions[i])))[:asked] % len(questions[i])]
                           for i in chosen])
        return Lesson(words, things[chosen], rng.random(batch) < 0.1, picked[..., 0], picked[..., 1],
                      captions[chosen[: 2 * batch // 3]])

    return lesson


LLM = Llama(LLAMA)


def decode(llm, tokens, first, mask, cache, start, added=0.0):
    """Tokens [B,T] at the positions from `first` [B] on -> (hidden [B,T,D], cache, outputs of the layers [L,B,T,D])."""
    x = LLM.apply({"params": llm}, tokens, method="embed") + added
    positions = first[:, None] + jnp.arange(tokens.shape[1])
    (hidden, cache), state = LLM.apply(
        {"params": llm}, x, positions, mask, cache, start, mutable="intermediates",
        capture_intermediates=lambda module, _: module.name == "layers")
    return hidden, cache, jax.tree.leaves(state["intermediates"]["layers"])[0]


def begin(reader: Reader, llm, words, blind, noise):
    """Reads the beginning of a text, with room for a caption -> (cache, outputs of the layers)."""
    P, rows = len(reader.before), len(words)
    tokens = jnp.broadcast_to(reader.before, (rows, P)).at[:, reader.soft].set(jnp.asarray(reader.ids)[words])
    seen = ~blind[:, None] | (jnp.arange(P) < reader.picture)
    mask = jnp.tril(jnp.ones((P, P), bool)) & seen[:, None] | jnp.eye(P, dtype=bool)
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, CAPTION)))
    added = jnp.zeros((rows, P, LLAMA.dim)).at[:, reader.soft].set(noise)
    _, cache, layers = decode(llm, tokens, jnp.zeros(rows, int), mask, LLM.empty_cache(rows, P + CAPTION), 0, added)
    return cache, layers


def finish(reader: Reader, llm, cache, blind, endings):
    """Reads endings [B·N,T,2], N of each beginning -> (logits, outputs of the layers).

    All see the same beginning and none sees another: the beginning is read once for all of them.
    """
    P, (rows, T) = len(reader.before), endings.shape[:2]
    cache, blind = jax.tree.map(lambda x: jnp.repeat(x, rows // len(blind), 0), (
        jax.tree.map(lambda x: jnp.swapaxes(x[:, :, : P + T], 0, 1), cache), blind))
    seen = ~blind[:, None] | (jnp.arange(P) < reader.picture)
    mask = jnp.concatenate([jnp.broadcast_to(seen[:, None], (rows, T, P)),
                            jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (rows, T, T))], 2)
    hidden, _, layers = decode(llm, endings[..., 0], jnp.where(blind, reader.picture, P), mask,
                               jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), cache), P)
    return LLM.apply({"params": llm}, hidden, method="logits"), layers


def spelled(logits, endings):
    """-> (loss per token of the answers, bool[B]: the whole answer is right)"""
    targets, counted = endings[:, 1:, 0], endings[:, 1:, 1]
    right = ((logits[:, :-1].argmax(-1) == targets) | (counted == 0)).all(1)
    return (entropy(logits[:, :-1], targets) * counted).sum() / counted.sum(), right


def hints(reader: Reader, params, lesson: Lesson, begun, ended):
    """The loss of the heads. begun, ended: the outputs of the layers for beginnings and questions"""
    numbers, meant = lesson.questions.reshape(-1), lesson.meant.reshape(-1)
    things = jnp.einsum("BTD,DAW->BTAW", begun[1][:, reader.soft[3::4]], params["thing"])
    things = (entropy(things, lesson.things).mean((1, 2)) * ~lesson.blind).mean()
    before, word, kind = jnp.asarray(reader.facts)[numbers].T
    asking = jnp.take_along_axis(ended, before[None, :, None, None], 2)[:, :, 0]
    asked = (entropy(asking[1] @ params["named"], word) + entropy(asking[1] @ params["kind"], kind)).mean()
    # Every token of an answer but the end sign has to know the thing that is meant.
    told = jnp.asarray(reader.questions)[numbers, :, 1]
    due = told[:, 1:-1] * told[:, 2:] * ((meant >= 0) & ~jnp.repeat(lesson.blind, lesson.questions.shape[1]))[:, None]
    truth = jnp.repeat(lesson.things, lesson.questions.shape[1], 0)[jnp.arange(len(meant)), jnp.maximum(meant, 0)]
    logits = jnp.einsum("BTD,DAW->BTAW", ended[2][:, :-2], params["meant"])
    read = entropy(logits, jnp.broadcast_to(truth[:, None], logits.shape[:-1])).mean(-1)
    return things + 0.5 * asked + (read * due).sum() / due.sum()


def train_language(tokenizer: Tokenizer, steps: int, texts: int, batch: int, asked: int, rate: float) -> dict:
    """Texts in which twelve attribute words stand where a picture would: it never sees a picture.

    Noise on the words' vectors, more and more of it, teaches it to look for a word's meaning near the right place, not
    for one exact vector. To look something up it has to bring together the words of a thing, find what a question names
    and which thing that is. Throw-away heads ask for each of these in the layer where it is due; their weight falls to
    zero. Without them the answer alone would have to teach all three, since none helps without the others.
    """
    reader, rng = Reader(tokenizer), np.random.default_rng(3)
    keys = jax.random.split(jax.random.key(3), 5)
    sizes = {"thing": (len(SLOTS), len(WORDS)), "named": (len(WORDS),), "kind": (len(KINDS),),
             "meant": (len(SLOTS), len(WORDS))}
    params = llama.TextLlama(llama.TextLlamaConfig(LLAMA)).init(keys[0], example_batch())["params"]
    params |= {name: 0.02 * jax.random.normal(key, (LLAMA.dim, *size))
               for key, (name, size) in zip(keys[1:], sizes.items(), strict=True)}
    questions = jnp.asarray(reader.questions)

    def loss(params, lesson, key, level, hint):
        llm, rows = params["llm"], len(lesson.words)
        strength, noise = jax.random.split(key)
        size = level * jax.lax.stop_gradient(llm["embedding"].std()) * jax.random.uniform(strength, (rows, 1, 1))
        noise = size * jax.random.normal(noise, (*lesson.words.shape, LLAMA.dim))
        cache, begun = begin(reader, llm, lesson.words, lesson.blind, noise)
        endings = questions[lesson.questions.reshape(-1)]
        logits, ended = finish(reader, llm, cache, lesson.blind, endings)
        answers, right = spelled(logits, endings)
        told = len(lesson.captions)
        cache = jax.tree.map(lambda x: x[:, :told], cache)
        logits, _ = finish(reader, llm, cache, lesson.blind[:told], lesson.captions)
        captions, _ = spelled(logits, lesson.captions)
        return answers + captions + hint * hints(reader, params, lesson, begun, ended), right.mean()

    lesson = lessons(reader, rng, texts, batch, asked)

    def feed(step):
        done = np.float32(step / steps)
        return lesson(), jax.random.key(step), np.minimum(1, done / np.float32(0.4)), (1 - done) / 2

    params = train("language", loss, params, feed, steps, rate, b2=0.98)
    measure_language(reader, params["llm"])
    return {"llm": params["llm"]}


def measure_language(reader: Reader, llm) -> None:
    """Prints the share of captions and answers that are right with the true words in the picture's place."""
    held = world.scenes("held_out", 300, seed=4, new_pairs=())
    words = reader.things(held).reshape(len(held), -1)
    asked = [reader.asked(scene)[:, 0] for scene in held]
    scene = np.repeat(np.arange(len(held)), [len(numbers) for numbers in asked])
    numbers = np.concatenate(asked)

    @jax.jit
    def right(words, endings):
        sighted = jnp.zeros(len(words), bool)
        cache, _ = begin(reader, llm, words, sighted, jnp.zeros((*words.shape, LLAMA.dim)))
        # Every token right given the true ones before it is the same as the whole answer right in greedy decoding.
        return spelled(finish(reader, llm, cache, sighted, endings)[0], endings)[1]

    def share(scene, endings):
        """Pads the last batch, so that one program does for all."""
        parts = [np.resize(np.arange(first, min(first + 100, len(scene))), 100) for first in range(0, len(scene), 100)]
        said = [np.asarray(right(words[scene[part]], endings[part])) for part in parts]
        return np.concatenate(said)[: len(scene)]

    captions = np.stack([reader.ending(world.PROMPTS[0], world.caption(each), CAPTION) for each in held])
    print(f"language, held_out: captions right {share(np.arange(len(held)), captions).mean():.4f}", flush=True)
    answered, kinds = share(scene, reader.questions[numbers]), reader.facts[numbers, 2]
    several = np.array([len(each.things) > 1 for each in held])[scene]
    for name, chosen in (("one thing", ~several), ("several things", several)):
        shares = {kind: round(float(answered[chosen & (kinds == i)].mean()), 4) for i, kind in enumerate(KINDS)
                  if (chosen & (kinds == i)).any()}
        print(f"language, held_out, {name}: {shares}, mean {answered[chosen].mean():.4f} of {chosen.sum()}", flush=True)


def train(name, loss, params, feed, steps, rate, b2=0.999):
    """AdamW, clipped, linear warm-up and cosine; `feed(step)` gives the arguments of `loss` behind the parameters."""
    schedule = optax.warmup_cosine_decay_schedule(0, rate, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=b2, weight_decay=0.01))
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


def half(params) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf, np.float16) for path, leaf in trees.flatten(params).items()}


def save_vision(out: Path, params) -> None:
    """float16, under the released key names; `params` has the names of the minigpt4 family."""
    torch_file.save(out / "eva_vit.pth", backward(minigpt4_files.vit_entries(VIT), half(params)))
    torch_file.save(out / "blip2_pretrained.pth",
                    {"model": backward(minigpt4_files.qformer_entries(QFORMER, VIT.dim), half(params))})
    write_json(out / "arch.json", {
        "vit": {"image_size": VIT.image_size, "patch_size": VIT.patch, "dim": VIT.dim, "depth": VIT.depth,
                "num_heads": VIT.heads, "mlp_hidden": VIT.hidden, "layer_norm_eps": VIT.eps, "ln_vision_eps": 1e-5},
        "qformer": {"hidden": QFORMER.dim, "num_layers": QFORMER.depth, "num_heads": QFORMER.heads,
                    "intermediate": QFORMER.hidden, "num_query_tokens": QFORMER.queries,
                    "cross_attention_freq": QFORMER.cross_every, "encoder_width": VIT.dim,
                    "layer_norm_eps": QFORMER.eps},
        "llama": "see llama/config.json"})


def save_language(out: Path, params) -> None:
    """float16, in Hugging Face's layout; `params` has the names of the llama family."""
    torch_file.save(out / "pytorch_model.bin", backward(llama_files.entries(LLAMA), half(params)))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    write_json(out / "generation_config.json", ids)
    write_json(out / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float16",
        "vocab_size": LLAMA.vocab, "hidden_size": LLAMA.dim, "intermediate_size": LLAMA.hidden,
        "num_hidden_layers": LLAMA.depth, "num_attention_heads": LLAMA.heads, "num_key_value_heads": LLAMA.kv_heads,
        "rms_norm_eps": LLAMA.eps, "rope_theta": LLAMA.rope_theta, "max_position_embeddings": LLAMA.max_positions,
        "tie_word_embeddings": LLAMA.tied, **ids})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    out = parser.parse_args().out
    (out / "llama").mkdir(parents=True, exist_ok=True)
    write_tokenizer(out / "llama", all_texts())
    tokenizer = Tokenizer.from_folder(out / "llama")
    save_vision(out, train_vision(steps=1_600, image_count=24_000, batch=64, rate=2e-3))
    save_language(out / "llama",
                  train_language(tokenizer, steps=800, texts=6_000, batch=12, asked=8, rate=3e-3))


if __name__ == "__main__":
    main()
