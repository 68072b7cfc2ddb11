"""Checks that run the model on sentences and on images."""

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
AT_ONCE = 2**27  # elements of frozen parameters that are read together
SEEN = 0.6  # share of ln V; a model that knows the text has a lower loss
UNIFORM = 0.97  # share of ln V; predictions with a higher entropy are as good as uniform
ENGLISH = 1.7  # largest number of tokens a word of a vocabulary for English
ORDER = 1.0  # nats a token by which shuffling raises the loss of a model that knows the language
STILL = 1e-5  # share of the largest logit; an image that changes the logits less does not reach the answer
FAINT, LOUD = 1 / 30, 1000.0  # norms of soft tokens over those of embedded tokens


def base_weights(inspection: Inspection) -> Iterator[Finding]:
    """Checks whether the frozen parameters of a run are those that it was trained with, a few at a time."""
    config = converted.read_run_card(inspection.run)["config"]
    folder = inspection.run / "checkpoints"
    saved = training_checkpoints.verify(folder / str(training_checkpoints.saved(folder)[-1])).frozen
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    before = converted.lineage(inspection.run)[:-1]
    earlier = converted.trained_params(before[-1]) if before else {}
    spec = ModelSpec(inspection.source, mesh, config["weights"]["dtype"], config["weights"]["frozen_dtype"])
    known = [path for path in saved if path not in inspection.source.fresh or path in earlier]

    changed = []
    for paths in _together(known, inspection):
        params = trees.flatten(spec.restore(config["seed"], earlier, paths.__contains__))
        changed += [path for path, leaf in params.items() if int(steps.fingerprint(leaf)) != saved[path]]
    if changed:
        yield Finding(
            "base weights", "wrong", f"{len(changed)} of the {len(known)} frozen tensors are not those that the run "
            f"was trained with: {some(changed)}. {inspection.source.folder} was converted from other files since; "
            "restore the former one, or train again.", {"tensors": changed})
    elif known:
        yield Finding("base weights", "ok", f"All {len(known)} frozen tensors are those that the run was trained with.")


def _together(paths: Sequence[str], inspection: Inspection) -> Iterator[list[str]]:
    """Yields groups of parameters of at most `AT_ONCE` elements; a larger parameter is a separate group."""
    part, count = [], 0
    for path in paths:
        size = inspection.tensors[path].whole.count
        if part and count + size > AT_ONCE:
            yield part
            part, count = [], 0
        part, count = [*part, path], count + size
    if part:
        yield part


def beginning(model: Loaded) -> Iterator[Finding]:
    """Checks that every row begins with BOS."""
    rows = model.batch([Sample(prompt="Hello.", answer="Hello."), Sample(answer="Hello.")])
    first = sorted({int(i) for i in rows.tokens[:, 0]})
    if first == [model.tokenizer.bos]:
        yield Finding("beginning", "ok", f"Rows begin with BOS ({first[0]}).", {"first": first})
    else:
        yield Finding("beginning", "wrong", f"Rows begin with {first} and not with BOS ({model.tokenizer.bos}). That "
                      "is a bug in mmjax; please report it with config.json and the tokenizer's files.",
                      {"first": first})


def plain_text(model: Loaded, texts: Sequence[str], before: Sequence[Finding]) -> Iterator[Finding]:
    """Checks the loss of sentences, and of the same tokens shuffled.

    before: the findings so far, which name the parameters to look at
    """
    tokenizer, random = model.tokenizer, np.random.default_rng(0)
    tokens = [tokenizer.encode(text) for text in texts]
    batch = text_rows([*tokens, *(random.permutation(row).tolist() for row in tokens)], tokenizer.bos)
    stages = _run(model, batch, language_only=True)
    if bad := not_finite(model, stages):
        yield bad
        return
    yield Finding("outputs", "ok", f"All {len(stages)} stages of reading text are finite.", {"sizes": _sizes(stages)})
    logits, target = stages["logits"], batch.loss_mask[:, 1:]
    losses, half = np.asarray(steps.token_losses(logits, batch)), len(tokens)
    loss, shuffled = (float(losses[part].sum() / target[part].sum()) for part in (slice(half), slice(half, None)))
    log_share = np.asarray(jax.nn.log_softmax(logits[:half, :-1][target[:half]]), np.float64)
    figures = {"loss": loss, "shuffled": shuffled, "uniform": math.log(model.config.llm.vocab),
               "entropy": float(-(np.exp(log_share) * log_share).sum(-1).mean()),
               "tokens a word": sum(map(len, tokens)) / sum(len(text.split()) for text in texts)}
    yield Finding("plain text", *judged(figures, suspects(before)), figures)


def judged(figures: Mapping[str, float], look_at: Sequence[str]) -> tuple[Verdict, str]:
    """Returns (verdict, message) of the losses. English tests only models with a vocabulary for English."""
    loss, shuffled, uniform, entropy, tokens = (
        figures[name] for name in ("loss", "shuffled", "uniform", "entropy", "tokens a word"))
    losses = (f"the loss of the sentences is {loss:.2f} nats a token, shuffled {shuffled:.2f}; a uniform prediction "
              f"has {uniform:.2f} (ln of the vocabulary)")
    if look_at:
        look = f"Look at {some(look_at)} first."
    else:
        look = ("The usual causes: a Vicuna delta added to another LLaMA than its base, an embedding or head "
                "of another release, heads permuted for another format.")
    if entropy > UNIFORM * uniform:
        return "wrong", (f"As good as uniform: {losses}, and the predictions are about uniform everywhere. The "
                         f"embedding or the head is absent, zero or vanishingly small. {look}")
    if loss < SEEN * uniform:
        return "ok", f"It knows the language: {losses}."
    if shuffled - loss > ORDER and loss < uniform:
        return "warning", f"It knows some word order, but little: {losses}. A part of it may be wrong. {look}"
    if tokens > ENGLISH and not look_at:
        return "warning", (f"It does not know English: {losses}. But its vocabulary is not for English "
                           f"({tokens:.1f} tokens a word), and its word vectors look trained: it may know "
                           "other texts well. Give sentences like those it was trained on with --text.")
    return "wrong", f"As good as uniform, or worse: {losses}. {look}"


def suspects(findings: Sequence[Finding]) -> list[str]:
    """Returns the parameters of the language model that have wrong findings."""
    wrong = sorted((finding for finding in findings if finding.verdict == "wrong"), key=lambda f: f.name != "delta")
    named = [finding.figures.get("tensor", (finding.figures.get("tensors") or [""])[0]) for finding in wrong]
    return list(dict.fromkeys(name for name in named if name.startswith("llm/")))


def text_rows(texts: Sequence[Sequence[int]], bos: int) -> Batch:
    """Returns a batch of tokenised texts without images; every token but the first is a target."""
    length = 1 + max(map(len, texts))
    tokens, valid = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        tokens[row, : 1 + len(text)], valid[row, : 1 + len(text)] = [bos, *text], True
    positions = np.tile(np.arange(length, dtype=np.int32), (len(texts), 1))
    return Batch(tokens=tokens, soft_index=np.full_like(tokens, -1), valid=valid, loss_mask=valid & (positions > 0),
                 positions=positions, padded_length=np.full(len(texts), length, np.int32))


def _run(model: Loaded, batch: Batch, language_only: bool = False) -> dict[str, np.ndarray]:
    """Returns the stages of a batch, or only those of the language model, in order."""
    known = parity.known(model.family, model.config)
    names = [name for name, stage in known.items() if not language_only or stage.kind != "encoder"]
    with sharding.use_mesh(model.mesh):
        stages = parity.compute(model.module, model.family, frozenset(names), False, model.params, batch)
    return {name: np.asarray(stages[name].astype(jnp.float32)) for name in names if name in stages}


def _sizes(stages: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns the RMS of each stage."""
    return {name: float(np.sqrt(np.square(x, dtype=np.float64).mean())) for name, x in stages.items()}


def not_finite(model: Loaded, stages: Mapping[str, np.ndarray]) -> Finding | None:
    """Returns the finding about the first stage that is not finite; None if all are."""
    name = next((name for name, x in stages.items() if not np.isfinite(x).all()), None)
    if name is None:
        return None
    reads = parity.known(model.family, model.config)[name].reads
    return Finding("outputs", "wrong", f"NaN or infinity appears at {name} first, which reads {reads}. If no stored "
                   "number is NaN, the activations overflow: try --dtype float32.", {"stage": name})


def images(model: Loaded, inspection: Inspection) -> Iterator[Finding]:
    """Checks with two images, or two inputs of every sense, that all is finite and that they change the answer."""
    if (batch := seeing(model)) is None:
        return
    stages = _run(model, batch)
    if bad := not_finite(model, stages):
        yield bad
        return
    yield Finding("outputs", "ok", f"All {len(stages)} stages of seeing are finite.", {"sizes": _sizes(stages)})
    logits = stages["logits"]
    size, moved = float(np.abs(logits).max()), float(np.abs(logits[0] - logits[1])[batch.valid[0]].max())
    figures = {"moved": moved, "logits": size}
    message = f"Another image moves the logits by up to {moved:.2g} of {size:.2g}"
    if moved <= STILL * size:
        yield Finding("images", "wrong", "Another image gives the same answer: nothing of it reaches the "
                      "language model. Check the gates, the projector and the image tower.", figures)
        return
    soft = batch.soft_index >= 0
    if not soft.any():
        yield Finding("images", "ok", f"{message}.", figures)
        return
    known = parity.known(model.family, model.config)
    embedded = next(name for name, stage in known.items() if stage.kind == "embedding")
    norms = np.linalg.norm(stages[embedded], axis=-1)
    of_text, of_soft = float(norms[~soft & batch.valid].mean()), float(norms[soft].mean())
    factor = of_soft / max(of_text, 1e-30)
    figures |= {"soft tokens": of_soft, "words": of_text}
    message += f"; soft tokens are {factor:.2g} times as long as embedded tokens"
    if FAINT < factor < LOUD:
        yield Finding("images", "ok", f"{message}.", figures)
    else:
        yield Finding("images", "warning", f"{message}, which the language model has never seen. The projector belongs "
                      f"to another language model, or is untrained ({inspection.comes_from(_between(inspection))}).",
                      figures)


def _between(inspection: Inspection) -> str:
    """Returns a parameter between the encoder and the language model, or "" if there is none."""
    family = inspection.source.family
    return next((path for path in inspection.read if not path.startswith("llm/") and not family.in_encoder(path)), "")


def seeing(model: Loaded) -> Batch | None:
    """Returns two rows that differ only in their images or senses; None for a language model without them."""
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
    examples = (random.integers(0, 256, (side, side, 3), np.uint8), np.stack([np.tile(slope, (side, 1))] * 3, -1))
    prompt = model.family.prompt.with_images("What is it?", 1)
    return model.batch([Sample(images=[image], prompt=prompt) for image in examples])


def _sense(tower: Any, random: np.random.Generator) -> np.ndarray:
    """Returns two inputs for one of ImageBind's towers."""
    if tower.causal:
        return random.integers(1, tower.vocab, (2, *tower.input_shape)).astype(np.int32)
    return random.normal(size=(2, *tower.input_shape)).astype(np.float32)
