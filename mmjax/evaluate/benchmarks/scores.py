"""Scores of the answers to a benchmark's items: of all items, of each item, and of each group.

Shares are between 0 and 1, CIDEr-D between 0 and 10. Intervals are by a bootstrap over the images
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
    """The scores of a benchmark.

    figures: of all items; the first is the benchmark's main score
    each:    of each item, 0 to 1 (CIDEr-D: to 10), to find the worst and the best
    groups:  of the items of each group, if there are groups
    """

    figures: dict[str, Figure]
    each: list[float]
    groups: dict[str, Figure]


def caption_scores(items: Sequence[Item], answers: Sequence[str]) -> Scores:
    """Returns CIDEr-D, BLEU-1 to 4 and ROUGE-L of captions. Groups have the mean CIDEr-D, weighted as for all items."""
    _check(items, answers)
    given = captions.tokenised(_clean(answers))
    references = [captions.tokenised(item.references) for item in items]
    each = captions.cider_d(given, references)
    rouge = [captions.rouge_l(*pair) for pair in zip(given, references, strict=True)]
    counts = np.stack([captions.bleu_columns(*pair) for pair in zip(given, references, strict=True)])
    images = [item.image for item in items]
    cider = bootstrap.means({"CIDEr-D": each}, images)
    figures = cider | bootstrap.figures(counts, captions.bleu, images) | bootstrap.means({"ROUGE-L": rouge}, images)
    return Scores(figures, each.tolist(), _group_means(items, each))


def caption_scores_with(name: str, items: Sequence[Item], answers: Sequence[str]) -> Scores:
    """Returns `caption_scores` with METEOR or SPICE, by their Java programs.

    METEOR's score is not the mean over captions; its interval is that of the mean, shifted to the score.
    """
    scores = caption_scores(items, answers)
    score, each = java.java_scores(name, captions.tokenised(_clean(answers)),
                                   [captions.tokenised(item.references) for item in items])
    mean = bootstrap.means({name: each}, [item.image for item in items])[name]
    shifted = Figure(score, mean.low + score - mean.value, mean.high + score - mean.value)
    return dataclasses.replace(scores, figures=scores.figures | {name: shifted})


def vqa_accuracy(items: Sequence[Item], answers: Sequence[str]) -> Scores:
    """Returns the VQA accuracy (VQAv2, OK-VQA)."""
    return _mean_scores(items, answers, {"VQA accuracy": vqa.accuracy})


def gqa_accuracy(items: Sequence[Item], answers: Sequence[str]) -> Scores:
    """Returns the share of exact matches ignoring case, as MiniGPT-v2 scores GQA and VSR, and after normalisation."""
    return _mean_scores(items, answers, {"exact match": vqa.exact, "normalised match": vqa.exact_normalised})


def vizwiz_accuracy(items: Sequence[Item], answers: Sequence[str]) -> Scores:
    """Returns the VQA accuracy, VizWiz's metric, and MiniGPT-v2's min(matches / 3, 1)."""
    return _mean_scores(items, answers, {"VQA accuracy": vqa.accuracy, "min(matches / 3, 1)": vqa.capped_matches})


def match_any(items: Sequence[Item], answers: Sequence[str]) -> Scores:
    """Returns the share of matches with any reference, exact and normalised; with four references or more of every item
    also the VQA accuracy."""
    measures = {"exact match": vqa.exact, "normalised match": vqa.exact_normalised}
    if all(len(item.references) > 3 for item in items):  # with fewer it is always below 1
        measures["VQA accuracy"] = vqa.accuracy
    return _mean_scores(items, answers, measures)


def choice_accuracy(items: Sequence[Item], answers: Sequence[int | str]) -> Scores:
    """Returns the share of right choices. answers: indices of the choices; or text, wrong if it names no choice"""
    _check(items, answers)
    each = np.array([_index(item, answer) == item.right for item, answer in zip(items, answers, strict=True)], float)
    unread = [_index(item, answer) is None for item, answer in zip(items, answers, strict=True)]
    values = {"accuracy": each} | ({"unreadable": unread} if any(isinstance(answer, str) for answer in answers) else {})
    return Scores(bootstrap.means(values, [item.image for item in items]), each.tolist(), _group_means(items, each))


def pope_scores(items: Sequence[Item], answers: Sequence[int | str]) -> Scores:
    """Returns POPE's scores. answers: indices of the choices (yes, no); or text, read as POPE's script does

    Groups are named "SETTING, FIGURE".
    """
    _check(items, answers)
    yes = [choice.is_yes(answer) if isinstance(answer, str) else item.choices[answer] == "yes"
           for item, answer in zip(items, _clean(answers), strict=True)]
    right = [item.choices[item.right] == "yes" for item in items]
    counts = choice.yes_no_columns(yes, right)
    images = [item.image for item in items]
    figures = bootstrap.figures(counts, choice.yes_no_figures, images)
    groups = {}
    for group, indices in _groups(items).items():
        found = bootstrap.figures(counts[indices], choice.yes_no_figures, [images[index] for index in indices])
        groups |= {f"{group}, {name}": figure for name, figure in found.items()}
    return Scores(figures, [float(a == b) for a, b in zip(yes, right, strict=True)], groups)


def box_scores(items: Sequence[Item], answers: Sequence[str]) -> Scores:
    """Returns the share of expressions whose box has an IoU above 0.5 with the right one, over all expressions.

    Also the same with boxes one pixel larger, as in MiniGPT-v2; the mean IoU; and the share of answers without a box,
    which count as wrong. `each` is the IoU.
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
    return {group: bootstrap.means({"": each[indices]}, [items[index].image for index in indices])[""]
            for group, indices in _groups(items).items()}


def _groups(items: Sequence[Item]) -> dict[str, list[int]]:
    """Returns the indices of the items of each group, in the order in which the groups appear."""
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        if item.group:
            groups.setdefault(item.group, []).append(index)
    return groups


def _index(item: Item, answer: int | str) -> int | None:
    return choice.read_choice(answer, item.choices) if isinstance(answer, str) else int(answer)


def _clean(answers: Sequence[int | str]) -> list:
    """Removes the text of the unknown token and outer spaces, as the original's scripts do."""
    return [answer.replace("<unk>", "").strip() if isinstance(answer, str) else answer for answer in answers]


def _check(items: Sequence[Item], answers: Sequence[int | str]) -> None:
    if len(items) != len(answers) or not len(items):
        raise ValueError(f"there are {len(items)} items and {len(answers)} answers; a score needs one answer for each")
