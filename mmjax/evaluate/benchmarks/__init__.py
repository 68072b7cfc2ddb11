"""Published benchmarks as they lie on disk, what is asked, and how answers are scored; `BENCHMARKS` has them by name.

A benchmark is read into `Item`s; whoever holds the model answers them, in words or by ranking the choices, and
`Benchmark.score` says what the answers are worth.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

from mmjax.evaluate.benchmarks import captioning, choosing, own, pointing, questions, scores
from mmjax.evaluate.benchmarks.items import Item
from mmjax.evaluate.benchmarks.scores import Scores
from mmjax.evaluate.metrics.bootstrap import Figure

__all__ = ["BENCHMARKS", "Benchmark", "Figure", "Item", "Scores"]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A layout on disk, how its items are asked, and its scores.

    read:           (path, root=None, prompt=None) to items; collects what cannot be used into one error. root is the
                    folder that images lie below, prompt takes the place of the benchmark's own
    kind:           "words" where answers are generated, "choice" where choices are ranked by their loss
    max_new_tokens: enough for an answer in words; also where a choice is to be read from words
    prompt:         the default, with {} for what an item asks
    score:          (items, answers) to scores. answers are words, or for "choice" the places of the chosen ones; there
                    words are taken too. Raises ValueError if there is not one answer for each item
    """

    name: str
    read: Callable[..., list[Item]]
    kind: Literal["words", "choice"]
    max_new_tokens: int
    prompt: str
    score: Callable[[Sequence[Item], Sequence[Any]], Scores]


_SHORT = 20  # MiniGPT-v2's evaluation


def _captions_by(name: str) -> Benchmark:
    """Captions scored by METEOR or SPICE too, which need the extra `captions` and Java."""
    return Benchmark(f"captions_{name.lower()}", functools.partial(captioning.captions_too, name), "words", 40,
                     captioning.PROMPT, functools.partial(scores.described_too, name))


BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (
    Benchmark("captions", captioning.captions, "words", 40, captioning.PROMPT, scores.described),
    _captions_by("METEOR"),
    _captions_by("SPICE"),
    Benchmark("vqa", questions.vqa, "words", _SHORT, questions.SHORT, scores.vqa_accuracy),
    Benchmark("gqa", questions.gqa, "words", _SHORT, questions.SHORT, scores.gqa_accuracy),
    Benchmark("vizwiz", questions.vizwiz, "words", _SHORT, questions.VIZWIZ, scores.vizwiz_accuracy),
    Benchmark("vsr", questions.vsr, "words", _SHORT, questions.VSR, scores.gqa_accuracy),
    Benchmark("scienceqa", choosing.scienceqa, "choice", _SHORT, choosing.SCIENCE, scores.chosen_right),
    Benchmark("iconqa", choosing.iconqa, "choice", _SHORT, questions.SHORT, scores.chosen_right),
    Benchmark("pope", choosing.pope, "choice", _SHORT, questions.SHORT, scores.said_yes),
    Benchmark("refer", pointing.refer, "words", _SHORT, pointing.PROMPT, scores.pointed),
    Benchmark("jsonl", own.jsonl, "words", 64, own.PROMPT, scores.own_accuracy),
    Benchmark("jsonl_choices", own.jsonl_choices, "choice", _SHORT, own.PROMPT, scores.chosen_right),
)}
