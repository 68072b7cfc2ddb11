"""What answers to a benchmark's items are worth: its figures, how good each answer is, and the groups' own figures.

Shares are between 0 and 1, CIDEr-D between 0 and 10. Every interval draws the images
(`mmjax.evaluate.metrics.bootstrap`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mmjax.evaluate.benchmarks.items import Item
from mmjax.evaluate.metrics import bootstrap, captions, choice, grounding, java, vqa
from mmjax.evaluate.metrics.bootstrap import Figure

Columns = tuple[np.ndarray, Callable[[np.ndarray], Mapping[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Scores:
    """figures: the benchmark's, the one that it is known by first
    each:    how good the answer to every item is, 0 to 1 (CIDEr-D: to 10), for finding the worst and the best
    groups:  the same for the items of each group, where there are groups
    """

    figures: dict[str, Figure]
    each: list[float]
    groups: dict[str, Figure]


def described(items: Sequence[Item], answers: Sequence[str]) -> Scores:
    """CIDEr-D, BLEU-1 to 4 and ROUGE-L of captions; groups by CIDEr-D, whose weights are those of all items."""
    _check(items, answers)
    said = captions.tokenised(_clean(answers))
    references = [captions.tokenised(item.references) for item in items]
    each = captions.cider_d(said, references)
    rouge = [captions.rouge_l(*pair) for pair in zip(said, references, strict=True)]
    counts = np.stack([captions.bleu_columns(*pair) for pair in zip(said, references, strict=True)])
    images = [item.image for item in items]
    cider = bootstrap.means({"CIDEr-D": each}, images)
    figures = cider | bootstrap.figures(counts, captions.bleu, images) | bootstrap.means({"ROUGE-L": rouge}, images)
    return Scores(figures, each.tolist(), _group_means(items, each))


def described_too(name: str, items: Sequence[Item], answers: Sequence[str]) -> Scores:
    """`described` with METEOR or SPICE, by their Java programs.

    The interval is that of the mean over captions, moved to the score, which for METEOR is no such mean.
    """
    scores = described(items, answers)
    score, each = java.java_scores(name, captions.tokenised(_clean(answers)),
                                   [captions.tokenised(item.references) for item in items])
    mean = bootstrap.means({name: each}, [item.image for item in items])[name]
    moved = Figure(score, mean.low + score - mean.value, mean.high + score - mean.value)
    return dataclasses.replace(scores, figures=scores.figures | {name: moved})


def vqa_accuracy(items: Sequence[Item], answers: Sequence[str]) -> Scores:
    """The VQA accuracy (VQAv2, OK-VQA)."""
    return _mean_scores(items, answers, {"VQA accuracy": vqa.accuracy})


def gqa_accuracy(items: Sequence[Item], answers: Sequence[str]) -> Scores:
    """Exact match after lower case, as MiniGPT-v2 scores GQA and VSR; and after the VQA normalisation."""
    return _mean_scores(items, answers, {"exact match": vqa.exact, "normalised match": vqa.exact_normalised})


def vizwiz_accuracy(items: Sequence[Item], answers: Sequence[str]) -> Scores:
    """The VQA accuracy, which is VizWiz's own; and MiniGPT-v2's min(matches / 3, 1)."""
    return _mean_scores(items, answers, {"VQA accuracy": vqa.accuracy, "min(matches / 3, 1)": vqa.capped_matches})


def own_accuracy(items: Sequence[Item], answers: Sequence[str]) -> Scores:
    """Match with any reference, exact and normalised; the VQA accuracy too where every item has four or more."""
    measures = {"exact match": vqa.exact, "normalised match": vqa.exact_normalised}
    if all(len(item.references) > 3 for item in items):  # fewer can never give 1
        measures["VQA accuracy"] = vqa.accuracy
    return _mean_scores(items, answers, measures)


def chosen_right(items: Sequence[Item], answers: Sequence[int | str]) -> Scores:
    """How many choices are right. answers: places of the choices; or words, wrong if they are none of the choices."""
    _check(items, answers)
    each = np.array([_place(item, answer) == item.right for item, answer in zip(items, answers, strict=True)], float)
    unread = [_place(item, answer) is None for item, answer in zip(items, answers, strict=True)]
    values = {"accuracy": each} | ({"unreadable": unread} if any(isinstance(answer, str) for answer in answers) else {})
    return Scores(bootstrap.means(values, [item.image for item in items]), each.tolist(), _group_means(items, each))


def said_yes(items: Sequence[Item], answers: Sequence[int | str]) -> Scores:
    """POPE's figures. answers: places of the choices (yes, no); or words, read as POPE's own script does.

    Groups are named "SETTING, FIGURE".
    """
    _check(items, answers)
    said = [choice.says_yes(answer) if isinstance(answer, str) else item.choices[answer] == "yes"
            for item, answer in zip(items, _clean(answers), strict=True)]
    right = [item.choices[item.right] == "yes" for item in items]
    counts = choice.yes_no_columns(said, right)
    images = [item.image for item in items]
    figures = bootstrap.figures(counts, choice.yes_no_figures, images)
    groups = {}
    for group, places in _groups(items).items():
        own = bootstrap.figures(counts[places], choice.yes_no_figures, [images[place] for place in places])
        groups |= {f"{group}, {name}": figure for name, figure in own.items()}
    return Scores(figures, [float(a == b) for a, b in zip(said, right, strict=True)], groups)


def pointed(items: Sequence[Item], answers: Sequence[str]) -> Scores:
    """The share of expressions whose box covers the right one by more than half (IoU > 0.5), over all expressions.

    The same with MiniGPT-v2's pixel more on every side, the mean IoU, and the share of answers that hold no box (and
    count as wrong). `each` is the IoU.
    """
    _check(items, answers)
    boxes = [grounding.answered_box(answer, item.size) for item, answer in zip(items, answers, strict=True)]
    plain, wider = (np.array([0.0 if box is None else grounding.iou(box, item.box, pixel)
                              for item, box in zip(items, boxes, strict=True)]) for pixel in (0.0, 1.0))
    values = {"IoU > 0.5": plain > 0.5, "IoU > 0.5, a pixel more": wider > 0.5, "mean IoU": plain,
              "unreadable": [box is None for box in boxes]}
    figures = bootstrap.means(values, [item.image for item in items])
    return Scores(figures, plain.tolist(), _group_means(items, plain > 0.5))


def _mean_scores(items: Sequence[Item], answers: Sequence[str],
                 measures: Mapping[str, Callable[[str, Sequence[str]], float]]) -> Scores:
    _check(items, answers)
    pairs = [(answer, item.references) for item, answer in zip(items, _clean(answers), strict=True)]
    values = {name: np.array([measure(*pair) for pair in pairs]) for name, measure in measures.items()}
    first = next(iter(values.values()))
    return Scores(bootstrap.means(values, [item.image for item in items]), first.tolist(), _group_means(items, first))


def _group_means(items: Sequence[Item], each: np.ndarray) -> dict[str, Figure]:
    return {group: bootstrap.means({"": each[places]}, [items[place].image for place in places])[""]
            for group, places in _groups(items).items()}


def _groups(items: Sequence[Item]) -> dict[str, list[int]]:
    """The places of the items of each group, in the groups' order of appearance; those without one in none."""
    groups: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        if item.group:
            groups.setdefault(item.group, []).append(place)
    return groups


def _place(item: Item, answer: int | str) -> int | None:
    return choice.read_choice(answer, item.choices) if isinstance(answer, str) else int(answer)


def _clean(answers: Sequence[int | str]) -> list:
    """Words as the original's scripts take them: without the unknown piece, without outer spaces."""
    return [answer.replace("<unk>", "").strip() if isinstance(answer, str) else answer for answer in answers]


def _check(items: Sequence[Item], answers: Sequence[int | str]) -> None:
    if len(items) != len(answers) or not len(items):
        raise ValueError(f"there are {len(items)} items and {len(answers)} answers; a score needs one answer for each")
