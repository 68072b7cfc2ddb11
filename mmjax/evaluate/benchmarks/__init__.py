"""Published benchmarks: their layouts on disk, prompts and scores; `BENCHMARKS` has them by name.

A benchmark is read into `Item`s. The caller answers them, with text or by ranking the choices, and `Benchmark.score`
returns the scores of the answers.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

from mmjax.evaluate.benchmarks import captioning, choosing, jsonl, pointing, questions, scores
from mmjax.evaluate.benchmarks.items import Item
from mmjax.evaluate.benchmarks.scores import Scores
from mmjax.evaluate.metrics.bootstrap import Figure

__all__ = ["BENCHMARKS", "Benchmark", "Figure", "Item", "Scores"]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A layout on disk, the prompt of its items, and its scores.

    read:           (path, root=None, prompt=None) to items; one error lists all that cannot be used. root is the folder
                    of the images, prompt replaces the benchmark's
    kind:           "words" if answers are generated, "choice" if choices are ranked by their loss
    max_new_tokens: enough for a generated answer, also if a choice is read from it
    prompt:         the default, with {} for the question
    score:          (items, answers) to scores. answers are text, or for "choice" the indices of the choices, or text
                    too. Raises ValueError if there is not one answer for each item
    """

    name: str
    read: Callable[..., list[Item]]
    kind: Literal["words", "choice"]
    max_new_tokens: int
    prompt: str
    score: Callable[[Sequence[Item], Sequence[Any]], Scores]


_SHORT = 20  # MiniGPT-v2's evaluation


def _captions_by(name: str) -> Benchmark:
    """Returns captions scored with METEOR or SPICE too, which need the extra `captions` and Java."""
    return Benchmark(f"captions_{name.lower()}", functools.partial(captioning.captions_with, name), "words", 40,
                     captioning.PROMPT, functools.partial(scores.caption_scores_with, name))


BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (
    Benchmark("captions", captioning.captions, "words", 40, captioning.PROMPT, scores.caption_scores),
    _captions_by("METEOR"),
    _captions_by("SPICE"),
    Benchmark("vqa", questions.vqa, "words", _SHORT, questions.SHORT, scores.vqa_accuracy),
    Benchmark("gqa", questions.gqa, "words", _SHORT, questions.SHORT, scores.gqa_accuracy),
    Benchmark("vizwiz", questions.vizwiz, "words", _SHORT, questions.VIZWIZ, scores.vizwiz_accuracy),
    Benchmark("vsr", questions.vsr, "words", _SHORT, questions.VSR, scores.gqa_accuracy),
    Benchmark("scienceqa", choosing.scienceqa, "choice", _SHORT, choosing.SCIENCE, scores.choice_accuracy),
    Benchmark("iconqa", choosing.iconqa, "choice", _SHORT, questions.SHORT, scores.choice_accuracy),
    Benchmark("pope", choosing.pope, "choice", _SHORT, questions.SHORT, scores.pope_scores),
    Benchmark("refer", pointing.refer, "words", _SHORT, pointing.PROMPT, scores.box_scores),
    Benchmark("jsonl", jsonl.jsonl, "words", 64, jsonl.PROMPT, scores.match_any),
    Benchmark("jsonl_choices", jsonl.jsonl_choices, "choice", _SHORT, jsonl.PROMPT, scores.choice_accuracy),
)}
