"""Checks of the model at work: what it makes of sentences and of images."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import parity, sharding, trees
from mmjax.batch import Batch, Sample
from mmjax.checkpoints import converted
from mmjax.checkpoints import training as training_checkpoints
from mmjax.checkpoints.restore import ModelSpec
from mmjax.config import MeshConfig
from mmjax.doctor.finding import Finding, Verdict, some
from mmjax.doctor.inspection import Inspection
from mmjax.inference.loaded import Loaded
from mmjax.training import steps

TEXTS = (
    "The sun rises in the east and sets in the west.",
    "She opened the window because the room was too warm.",
    "It had rained all night, and the streets were still wet in the morning.",
    "Most birds build their nests in spring and leave them in autumn.",
    "If you want to bake bread, you need flour, water, salt and a little time.",
    "A dog is running along the beach, and two children are watching it.",
)
AT_ONCE = 2**27  # numbers of frozen parameters that are read together
SEEN = 0.6  # share of ln V that a model which knows the text stays below
UNIFORM = 0.97  # share of ln V above which the entropy of predictions says that nothing is known
ENGLISH = 1.7  # tokens a word up to which a vocabulary was made for texts like these
ORDER = 1.0  # nats a token that a model which knows the language loses when words are shuffled
STILL = 1e-5  # of the largest logit: what a image moves less than this does not reach the answer
FAINT, LOUD = 1 / 30, 1000.0  # lengths of soft tokens over those of words


def base_weights(patient: Inspection) -> Iterator[Finding]:
    """Are a run's frozen parameters those that it was trained with? A few are read at a time."""
    told = converted.read_run_card(patient.run)["config"]
    place = patient.run / "checkpoints"
    saved = training_checkpoints.verify(place / str(training_checkpoints.saved(place)[-1])).frozen
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    before = converted.lineage(patient.run)[:-1]
    earlier = converted.trained_params(before[-1]) if before else {}
    spec = ModelSpec(patient.source, mesh, told["weights"]["dtype"], told["weights"]["frozen_dtype"])
    known = [path for path in saved if path not in patient.source.fresh or path in earlier]

    other = []
    for paths in _together(known, patient):
        read = spec.restore(told["seed"], earlier, paths.__contains__)
        other += [path for path, leaf in trees.flatten(read).items() if int(steps.fingerprint(leaf)) != saved[path]]
    if other:
        yield Finding(
            "base weights", "wrong", f"{len(other)} of the {len(known)} frozen tensors are not those that the run was "
            f"trained with: {some(other)}. {patient.source.folder} was converted from other files since; put the "
            "former one back, or train again.", {"tensors": other})
    elif known:
        yield Finding("base weights", "ok", f"All {len(known)} frozen tensors are those that the run was trained with.")


def _together(paths: Sequence[str], patient: Inspection) -> Iterator[list[str]]:
    """Parts of a list of parameters that are as large as the largest of them, or `AT_ONCE`."""
    part, count = [], 0
    for path in paths:
        size = patient.tensors[path].whole.count
        if part and count + size > AT_ONCE:
            yield part
            part, count = [], 0
        part, count = [*part, path], count + size
    if part:
        yield part


def beginning(model: Loaded) -> Iterator[Finding]:
    """Does every row begin with the beginning's id?"""
    rows = model.batch([Sample(prompt="Hello.", answer="Hello."), Sample(answer="Hello.")])
    first = sorted({int(i) for i in rows.tokens[:, 0]})
    if first == [model.tokenizer.bos]:
        yield Finding("beginning", "ok", f"Rows begin with BOS ({first[0]}).", {"first": first})
    else:
        yield Finding("beginning", "wrong", f"Rows begin with {first} and not with BOS ({model.tokenizer.bos}). That "
                      "is a bug in mmjax; please report it with config.json and the tokenizer's files.",
                      {"first": first})


def plain_text(model: Loaded, texts: Sequence[str], before: Sequence[Finding]) -> Iterator[Finding]:
    """What the language model makes of sentences, and of the same words shuffled.

    before: what was found so far, to name the parameters to look at
    """
    words, random = model.tokenizer, np.random.default_rng(0)
    ids = [words.encode(text) for text in texts]
    batch = text_rows([*ids, *(random.permutation(row).tolist() for row in ids)], words.bos)
    found = _run(model, batch, language_only=True)
    if bad := not_finite(model, found):
        yield bad
        return
    yield Finding("outputs", "ok", f"All {len(found)} stages of reading text are finite.", {"sizes": _sizes(found)})
    logits, target = found["logits"], batch.loss_mask[:, 1:]
    losses, half = np.asarray(steps.token_losses(logits, batch)), len(ids)
    loss, shuffled = (float(losses[part].sum() / target[part].sum()) for part in (slice(half), slice(half, None)))
    log_share = np.asarray(jax.nn.log_softmax(logits[:half, :-1][target[:half]]), np.float64)
    figures = {"loss": loss, "shuffled": shuffled, "uniform": math.log(model.config.llm.vocab),
               "entropy": float(-(np.exp(log_share) * log_share).sum(-1).mean()),
               "tokens a word": sum(map(len, ids)) / sum(len(text.split()) for text in texts)}
    yield Finding("plain text", *judged(figures, suspects(before)), figures)


def judged(figures: Mapping[str, float], look_at: Sequence[str]) -> tuple[Verdict, str]:
    """What losses say. English judges a model only if its vocabulary was made for English."""
    loss, shuffled, uniform, entropy, tokens = (
        figures[name] for name in ("loss", "shuffled", "uniform", "entropy", "tokens a word"))
    told = (f"the sentences cost {loss:.2f} nats a token, shuffled {shuffled:.2f}; knowing nothing costs "
            f"{uniform:.2f} (ln of the vocabulary)")
    if look_at:
        look = f"Look at {some(look_at)} first."
    else:
        look = ("The usual causes: a Vicuna delta added to another LLaMA than it was made from, an embedding or head "
                "of another release, heads permuted for another format.")
    if entropy > UNIFORM * uniform:
        return "wrong", (f"As good as uniform: {told}, and all words are about equally likely everywhere. The "
                         f"embedding or the head is absent, zero or vanishingly small. {look}")
    if loss < SEEN * uniform:
        return "ok", f"It knows the language: {told}."
    if shuffled - loss > ORDER and loss < uniform:
        return "warning", f"It knows some order of words, but little: {told}. A part of it may be wrong. {look}"
    if tokens > ENGLISH and not look_at:
        return "warning", (f"It does not know English: {told}. But its vocabulary was not made for English "
                           f"({tokens:.1f} tokens a word), and its word vectors look trained: it may know something "
                           "else well. Give sentences of what it was trained on with --text.")
    return "wrong", f"As good as uniform, or worse: {told}. {look}"


def suspects(findings: Sequence[Finding]) -> list[str]:
    """Parameters of the language model that were found wrong."""
    named = [finding.figures.get("tensor", (finding.figures.get("tensors") or [""])[0])
             for finding in findings if finding.verdict == "wrong"]
    delta = ["llm/layers/attn_norm/scale"] * any((f.name, f.verdict) == ("delta", "wrong") for f in findings)
    return list(dict.fromkeys([*delta, *(name for name in named if name.startswith("llm/"))]))


def text_rows(ids: Sequence[Sequence[int]], bos: int) -> Batch:
    """Rows of text alone, every token but the first a target."""
    length = 1 + max(map(len, ids))
    tokens, valid = np.zeros((len(ids), length), np.int32), np.zeros((len(ids), length), bool)
    for row, words in enumerate(ids):
        tokens[row, : 1 + len(words)], valid[row, : 1 + len(words)] = [bos, *words], True
    places = np.tile(np.arange(length, dtype=np.int32), (len(ids), 1))
    return Batch(tokens=tokens, soft_index=np.full_like(tokens, -1), valid=valid, loss_mask=valid & (places > 0),
                 positions=places, padded_length=np.full(len(ids), length, np.int32))


def _run(model: Loaded, batch: Batch, language_only: bool = False) -> dict[str, np.ndarray]:
    """The stages of a batch, or those of the language model, in order."""
    known = parity.known(model.family, model.config)
    names = [name for name, stage in known.items() if not language_only or stage.kind != "encoder"]
    with sharding.use_mesh(model.mesh):
        found = parity.compute(model.module, model.family, frozenset(names), False, model.params, batch)
    return {name: np.asarray(found[name].astype(jnp.float32)) for name in names if name in found}


def _sizes(found: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(np.sqrt(np.square(x, dtype=np.float64).mean())) for name, x in found.items()}


def not_finite(model: Loaded, found: Mapping[str, np.ndarray]) -> Finding | None:
    """The first stage that is not finite."""
    name = next((name for name, x in found.items() if not np.isfinite(x).all()), None)
    if name is None:
        return None
    reads = parity.known(model.family, model.config)[name].reads
    return Finding("outputs", "wrong", f"NaN or infinity appears at {name} first, which reads {reads}. If no stored "
                   "number is NaN, the activations overflow: try --dtype float32.", {"stage": name})


def images(model: Loaded, patient: Inspection) -> Iterator[Finding]:
    """Two images, or two inputs of every sense: is all finite, do they differ, and do they reach the answer?"""
    if (batch := seeing(model)) is None:
        return
    found = _run(model, batch)
    if bad := not_finite(model, found):
        yield bad
        return
    yield Finding("outputs", "ok", f"All {len(found)} stages of seeing are finite.", {"sizes": _sizes(found)})
    size, apart = float(np.abs(found["logits"]).max()), np.abs(found["logits"][0] - found["logits"][1])
    moved = float(apart[batch.valid[0]].max())
    figures = {"moved": moved, "logits": size}
    told = f"Another image moves the logits by up to {moved:.2g} of {size:.2g}"
    if moved <= STILL * size:
        yield Finding("images", "wrong", "Another image leads to the same answer: nothing of it reaches the "
                      "language model. Look at gates, projector and image tower.", figures)
        return
    soft = batch.soft_index >= 0
    if not soft.any():
        yield Finding("images", "ok", f"{told}.", figures)
        return
    embedded = next(name for name, stage in parity.known(model.family, model.config).items() if stage.kind == "embedding")
    lengths = np.linalg.norm(found[embedded], axis=-1)
    of_words, of_soft = float(lengths[~soft & batch.valid].mean()), float(lengths[soft].mean())
    factor = of_soft / max(of_words, 1e-30)
    figures |= {"soft tokens": of_soft, "words": of_words}
    told += f"; soft tokens are {factor:.2g} times as long as words"
    if FAINT < factor < LOUD:
        yield Finding("images", "ok", f"{told}.", figures)
    else:
        yield Finding("images", "warning", f"{told}, which the language model has never seen. The projector belongs "
                      f"to another language model, or is untrained ({patient.comes_from('projector/w')}).", figures)


def seeing(model: Loaded) -> Batch | None:
    """Two rows that differ in what they see alone; None for a language model without senses."""
    random, cfg = np.random.default_rng(0), model.config
    if cfg.senses:
        rows = model.batch([Sample(prompt="What is it?")] * 2)
        inputs = {sense: _sense(tower, random) for sense, tower in cfg.media.towers.items()}
        weights = {sense: np.ones(2, np.float32) for sense in inputs}
        return dataclasses.replace(rows, images=None, image_valid=None, media=inputs, weights=weights)
    if cfg.image_size is None:
        return None
    side = cfg.image_size
    slope = np.linspace(0, 255, side).astype(np.uint8)
    drawn = (random.integers(0, 256, (side, side, 3), np.uint8), np.stack([np.tile(slope, (side, 1))] * 3, -1))
    prompt = model.family.prompt.with_images("What is it?", 1)
    return model.batch([Sample(images=[image], prompt=prompt) for image in drawn])


def _sense(tower: Any, random: np.random.Generator) -> np.ndarray:
    """Two inputs for one of ImageBind's towers."""
    if tower.causal:
        return random.integers(1, tower.vocab, (2, *tower.input_shape)).astype(np.int32)
    return random.normal(size=(2, *tower.input_shape)).astype(np.float32)
