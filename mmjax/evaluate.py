"""Scores of a model: choices ranked by their loss, and what it says about the scenes of the embedded default.

B rows   A candidate answers
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from mmjax import steps
from mmjax.batch import Batch, Sample
from mmjax.config import ScenesConfig
from mmjax.data import scenes
from mmjax.data.conversation import PICTURE
from mmjax.loaded import Loaded
from mmjax.report import Example

NO_CHOICE = 9999.0  # the loss of a candidate that a row does not have, as in the original


def rank(
    module: nn.Module, params: Any, candidates: Sequence[Batch], counts: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(losses float32[B,A], ranks int[B,A] best first) of A answers to the same B prompts.

    candidates: for each answer the batch that scores it; its loss is each row's sum over the padded length - 1, so a
                rank depends on the other rows of the batch, as in the original (minigpt_base.py: multi_select)
    counts:     how many of the candidates each row really has; the others come last
    """

    @jax.jit
    def score(params: Any, batch: Batch) -> jax.Array:
        return steps.loss(module, params, batch, reduction="none")[0]

    losses = np.stack([np.asarray(score(params, batch)) for batch in candidates], axis=1)
    if counts is not None:
        absent = np.arange(losses.shape[1]) >= np.asarray(counts)[:, None]
        losses = np.where(absent, np.float32(NO_CHOICE), losses)
    return losses, np.argsort(losses, axis=1, kind="stable")


@dataclasses.dataclass(frozen=True)
class ScenesScore:
    """Shares that are right: by attribute, their "mean", the "whole" caption, questions about scenes of "one shape" and
    of "several"."""

    shares: dict[str, float]
    examples: list[Example]


def score_scenes(
    model: Loaded, shown: Sequence[scenes.Scene], truth: Sequence[scenes.Scene] | None = None
) -> ScenesScore:
    """Captions `shown` pictures and asks one question about each; holds the words against `truth`.

    truth: the scenes to score by; None for the ones shown. Other ones give the blind baseline: what a model gets right
           that does not look.
    """
    truth = shown if truth is None else truth
    pictures = [scenes.draw(scene) for scene in shown]
    asked = [scenes.questions(scene)[index % len(scenes.questions(scene))] for index, scene in enumerate(truth)]

    def answers(prompts: Sequence[str]) -> list[str]:
        samples = [Sample(images=[p], prompt=f"{PICTURE} {words}") for p, words in zip(pictures, prompts, strict=True)]
        return model.generate(samples, max_new_tokens=48, stop=[model.text.end_sym], batch_size=100)

    captions = answers([scenes.PROMPTS[0]] * len(shown))
    replies = answers([question.text for question in asked])
    right = [reply.strip(" .").lower() == question.answer for reply, question in zip(replies, asked, strict=True)]
    shares = scenes.total(scenes.score(*pair) for pair in zip(captions, truth, strict=True))
    examples = []
    for picture, caption, scene, reply, question, is_right in zip(
            pictures, captions, truth, replies, asked, right, strict=True):
        whole = scenes.score(caption, scene)["whole"][0] == 1
        examples.append(Example(picture, scenes.PROMPTS[0], caption, scenes.caption(scene), whole))
        examples.append(Example(picture, question.text, reply, question.answer, is_right))
    alone = np.array([len(scene.things) == 1 for scene in truth])
    shares |= {"one shape": float(np.mean(np.array(right)[alone])), "several": float(np.mean(np.array(right)[~alone]))}
    return ScenesScore(shares, examples)


COLUMNS = ("", "held-out", "blind", "new pairs", "blind", "untrained")
ROWS = {**{name: name for name in scenes.ATTRIBUTES}, "mean": "mean of the four", "whole": "whole caption",
        "one shape": "questions, one shape", "several": "questions, several"}


def scenes_table(model: Loaded, cfg: ScenesConfig, untrained: Loaded) -> tuple[list[list[Any]], list[Example]]:
    """(table, heading first; examples of the held-out scenes).

    Rows: the four attributes in captions and their mean, captions that are wholly right, answers to one question a
    scene. Columns: held-out scenes; scenes with colour-shape pairs that no picture ever showed, to the job or to the
    towers; both also "blind", with the picture of another scene; and the model before training.
    """
    held_out, new_pairs = (scenes.scenes(split, cfg.held_out, cfg.seed) for split in ("held_out", "new_pairs"))
    seen = score_scenes(model, held_out)
    scores = [seen, score_scenes(model, held_out[1:] + held_out[:1], held_out),
              score_scenes(model, new_pairs), score_scenes(model, new_pairs[1:] + new_pairs[:1], new_pairs),
              score_scenes(untrained, held_out[:100])]
    rows = [[label, *(score.shares[name] for score in scores)] for name, label in ROWS.items()]
    return [list(COLUMNS), *rows], seen.examples
