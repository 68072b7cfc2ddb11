"""Evaluation of a model on the scenes of the embedded default."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from mmjax import trees
from mmjax.batch import Sample
from mmjax.checkpoints import converted
from mmjax.config import ScenesConfig
from mmjax.data import scenes
from mmjax.data.neighbours import Recall
from mmjax.evaluate import report
from mmjax.evaluate.report import Example
from mmjax.inference.loaded import Loaded
from mmjax.inference.predictions import Decoding
from mmjax.training.run import Job

GREEDY = Decoding()
AT_ONCE = 100  # default batch size
LONGEST = 48  # default of max_new_tokens


@dataclasses.dataclass(frozen=True)
class ScenesScore:
    """Shares that are right: by attribute, their "mean", the "whole" caption, questions about scenes with "one shape"
    and with "several"."""

    shares: dict[str, float]
    examples: list[Example]


def scene_sample(model: Loaded, scene: scenes.Scene, sense: str, prompt: str) -> Sample:
    """Returns a sample with a scene as the input of one sense, and a prompt."""
    if sense != "image":
        return Sample(media={sense: scenes.MEDIA[sense](scene)}, prompt=prompt)
    return Sample(images=[scenes.draw(scene)], prompt=model.family.prompt.with_images(prompt, 1))


def score_scenes(
    model: Loaded, shown: Sequence[scenes.Scene], truth: Sequence[scenes.Scene] | None = None, sense: str = "image",
    recall: Recall | None = None, decoding: Decoding = GREEDY, batch_size: int = AT_ONCE,
) -> ScenesScore:
    """Generates a caption of each of the `shown` scenes and an answer to one question; scores both against `truth`.

    truth:      the scenes to score with; None for the ones shown. Other scenes give the baseline of a model that does
                not use its input.
    sense:      the input: "image", or one of `scenes.MEDIA`
    recall:     the visual cache, or None
    decoding:   settings of generation
    batch_size: scenes in a batch
    """
    truth = shown if truth is None else truth
    questions = [scenes.questions(scene)[index % len(scenes.questions(scene))] for index, scene in enumerate(truth)]

    def answers(prompts: Sequence[str]) -> list[str]:
        samples = [scene_sample(model, scene, sense, prompt) for scene, prompt in zip(shown, prompts, strict=True)]
        return model.generate(samples, **decoding.at_most(LONGEST).settings(model),
                              batch_size=min(batch_size, len(samples)), recall=recall)

    captions = answers([scenes.PROMPTS[0]] * len(shown))
    replies = answers([question.text for question in questions])
    right = [reply.strip(" .").lower() == question.answer for reply, question in zip(replies, questions, strict=True)]
    shares = scenes.total(scenes.score(*pair) for pair in zip(captions, truth, strict=True))
    examples = []
    for source, caption, scene, reply, question, is_right in zip(
            shown, captions, truth, replies, questions, right, strict=True):
        image = scenes.draw(source) if sense == "image" else scenes.as_image(scenes.MEDIA[sense](source))
        whole = scenes.score(caption, scene)["whole"][0] == 1
        examples.append(Example(image, scenes.PROMPTS[0], caption, scenes.caption(scene), whole))
        examples.append(Example(image, question.text, reply, question.answer, is_right))
    single = np.array([len(scene.things) == 1 for scene in truth])
    for name, subset in (("one shape", single), ("several", ~single)):
        if subset.any():
            shares[name] = float(np.mean(np.array(right)[subset]))
    return ScenesScore(shares, examples)


def image_cache(model: Loaded, shown: Sequence[scenes.Scene], batch_size: int = AT_ONCE) -> Recall:
    """Returns the features of these scenes' images, as ImageBind-LLM's visual cache for other senses."""
    feature = jax.jit(lambda params, batch: model.module.apply({"params": params}, batch, method="feature"))
    samples = [scene_sample(model, scene, "image", "") for scene in shown]
    return Recall(np.concatenate([feature(model.params, model.batch(samples[first : first + batch_size]))
                                  for first in range(0, len(samples), batch_size)]))


CACHED = 1000  # images of the visual cache
ROWS = {**{name: name for name in scenes.ATTRIBUTES}, "mean": "mean of the four", "whole": "whole caption",
        "one shape": "questions, one shape", "several": "questions, several"}


def scenes_table(model: Loaded, cfg: ScenesConfig, untrained: Loaded, decoding: Decoding = GREEDY,
                 batch_size: int = AT_ONCE) -> tuple[list[list[Any]], list[Example]]:
    """Returns (table with its heading first, examples of the held-out scenes).

    Rows: the four attributes in captions and their mean, captions that are entirely right, answers to one question a
    scene. Columns: held-out scenes; scenes with colour-shape pairs that were in no training image of the run or of the
    towers; held-out scenes through each other sense of the model, which was not trained, without and with
    the visual cache; all also "blind", with the input of another scene; and the model before training.
    """
    train, held_out, new_pairs = (scenes.scenes(split, count, cfg.seed, most=cfg.most) for split, count in (
        ("train", CACHED), ("held_out", cfg.held_out), ("new_pairs", cfg.held_out)))
    tests = [("held-out", held_out, "image", None), ("new pairs", new_pairs, "image", None)]
    if senses := [sense for sense in scenes.MEDIA if sense in model.config.senses]:
        cache = image_cache(model, train, batch_size)
        tests += [test for sense in senses for test in (
            (sense, held_out, sense, None), (f"{sense}, cache", held_out, sense, cache))]
    score = functools.partial(score_scenes, decoding=decoding, batch_size=batch_size)
    columns, examples = {}, []
    for name, truth, sense, recall in tests:
        columns[name] = score(model, truth, truth, sense, recall)
        if recall is None:
            columns[f"{name}, blind"] = score(model, truth[1:] + truth[:1], truth, sense)
        if name != "new pairs":
            examples += columns[name].examples[:24]
    columns["untrained"] = score(untrained, held_out[:100])
    rows = [[label, *(column.shares[name] for column in columns.values())] for name, label in ROWS.items()
            if name in columns["held-out"].shares]
    return [["", *columns], *rows], examples


def report_scenes(model: Loaded, untrained: Loaded, cfg: ScenesConfig, folder: Path, runs: Sequence[Path],
                  facts: dict[str, str], decoding: Decoding = GREEDY, batch_size: int = AT_ONCE) -> list[list[Any]]:
    """Prints `scenes_table` and writes it into `folder`: scores.json, and a page with curves, images and answers.

    runs:       the run folders whose metrics make the curves, in order
    facts:      short figures for the top of the page; the options that `decoding` changes are added
    batch_size: scenes in a batch
    """
    console = Console(markup=False)
    console.print("Scoring held-out scenes, with the right and with the wrong image")
    rows, examples = scenes_table(model, cfg, untrained, decoding, batch_size)
    mean = next(row for row in rows if row[0] == ROWS["mean"])
    facts |= {"attributes right on held-out scenes": f"{mean[1]:.3f}", "with the wrong image": f"{mean[2]:.3f}"}
    facts |= {name: str(getattr(decoding, name)) for name in decoding.changed}
    page = report.write(folder / "report", f"mmjax: {model.family} on scenes", [run / "metrics.jsonl" for run in runs],
                        examples, rows, facts)
    (folder / "scores.json").write_text(json.dumps(rows, indent=2) + "\n")
    table = Table(title="share that is right")
    for name in rows[0]:
        table.add_column(name, no_wrap=len(rows[0]) < 8)
    for row in rows[1:]:
        table.add_row(row[0], *(f"{value:.3f}" for value in row[1:]))
    console.print(table)
    console.print(f"Report with images: {page}")
    return rows


def score_job(job: Job, params: dict[str, Any]) -> list[list[Any]]:
    """Scores the model of a run, and the same model before training; see `report_scenes`.

    params: the parameters that the run loaded; the others are read here
    """
    config, source = job.config, job.source
    if job.stored:
        params |= job.params(source.family.in_encoder)
    untrained = dataclasses.replace(job, earlier=None).params(lambda path: True)
    model = Loaded.of(source, job.module.clone(remat=False), params, job.mesh)
    sizes = {path: leaf.size for path, leaf in trees.flatten(params).items()}
    trained = sum(size for path, size in sizes.items() if trees.matches(path, job.rules))
    facts = {"trained parameters": f"{trained:,} of {sum(sizes.values()):,}", "steps": f"{config.optim.steps:,}"}
    return report_scenes(model, dataclasses.replace(model, params=untrained), config.data.scenes, job.out,
                         converted.lineage(job.out), facts)
