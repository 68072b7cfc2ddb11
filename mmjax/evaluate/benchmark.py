"""Runs a benchmark from its files to its scores: answers are stored in a file and scored from it.

    OUT/predictions.jsonl            the answers; see `mmjax.inference.predictions`
    OUT/predictions.jsonl.card.json  the model and the settings of the answers
    OUT/scores.json                  the figures with their intervals, the model and the settings
    OUT/report.html                  the figures, and the worst and the best images

Every item is a separate conversation, so the answers do not depend on the order of the items or on other items. An
item that could not be answered counts as wrong; the errors are counted.
"""

import collections
import dataclasses
import importlib.metadata
import json
import platform
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmjax import files
from mmjax.checkpoints import converted
from mmjax.data import boxes, images
from mmjax.data.formats.rows import Root
from mmjax.data.text import without_placeholders
from mmjax.evaluate import report
from mmjax.evaluate.benchmarks import BENCHMARKS, Figure, Item, Scores
from mmjax.evaluate.metrics.grounding import answered_box
from mmjax.evaluate.rank import Choices, Rule, chosen
from mmjax.evaluate.report import Example
from mmjax.inference import predictions
from mmjax.inference.loaded import Loaded
from mmjax.inference.requests import Request, digest

PREDICTIONS, SCORES = "predictions.jsonl", "scores.json"
TOP = 24  # number of the worst and of the best items on a page
SIDE = 480  # largest side of an image on a page, in pixels
PACKAGES = ("mmjax", "jax", "flax", "numpy", "pillow")


@dataclasses.dataclass(frozen=True)
class Test:
    """A benchmark, its prompt, and how it is scored.

    name:     one of BENCHMARKS
    data:     the folder or file of that benchmark
    root:     the folder of the images, if it is not the folder of the data file
    prompt:   template with {} for the question; None for the benchmark's default
    limit:    number of items, evenly spread over all of them; None for all
    in_words: generate text and read the choice from it, instead of ranking the choices by their loss
    rank_by:  the rule by which choices are ranked; see `mmjax.evaluate.rank.chosen`
    follow_links: whether links may lead out of `root`
    """

    name: str
    data: str
    root: str | None = None
    prompt: str | None = None
    limit: int | None = None
    in_words: bool = False
    rank_by: Rule = "sum"
    follow_links: bool = False

    def __post_init__(self):
        if self.name not in BENCHMARKS:
            raise ValueError(f"There is no benchmark {self.name!r}; there are {', '.join(BENCHMARKS)}.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit = {self.limit}: at least 1")

    @property
    def ranked(self) -> bool:
        return BENCHMARKS[self.name].kind == "choice" and not self.in_words

    @property
    def settings(self) -> dict[str, Any]:
        """Returns the settings that the answers depend on, for the card; those of scoring may change."""
        return {"benchmark": self.name, "prompt": self.prompt, "limit": self.limit, "in_words": self.in_words}

    def items(self) -> list[Item]:
        """Returns the items. Raises FileNotFoundError or ValueError naming what cannot be used."""
        root = None if self.root is None else Root.of(self.root, self.follow_links)
        items = BENCHMARKS[self.name].read(self.data, root, self.prompt)
        count = len(items) if self.limit is None else min(self.limit, len(items))
        return [items[number * len(items) // count] for number in range(count)]


def requests(items: Sequence[Item]) -> list[Request]:
    return [Request(item.id, item.sample, item.choices) for item in items]


def answerer(test: Test, model: Loaded, decoding: predictions.Decoding, batch_size: int, recall: Any = None,
             text: Mapping[str, Any] | None = None) -> Choices | predictions.TextAnswerer:
    """Returns the answerer of a test: by rank, or text of the benchmark's length unless `decoding` sets another.

    Raises ValueError naming the `unused` settings.
    """
    names, why = unused(test, decoding, recall)
    if names:
        raise ValueError(f"{', '.join(names)}: {why}")
    if test.ranked:
        return Choices(model, batch_size, text or {})
    return predictions.TextAnswerer(model, decoding.at_most(BENCHMARKS[test.name].max_new_tokens), batch_size, recall,
                                    text or {})


def unused(test: Test, decoding: predictions.Decoding, recall: Any = None) -> tuple[list[str], str]:
    """Returns (names of the settings that this test cannot use, the reason and what to do)."""
    if test.ranked:
        return (decoding.changed + ["recall"] * (recall is not None),
                f"the choices of {test.name} are ranked by their loss and nothing is generated; leave that out, or "
                "generate the answers (in_words)")
    ranking = ["rank_by"] * (test.rank_by != "sum")
    if BENCHMARKS[test.name].kind == "choice":
        return ranking, "the answers are generated (in_words) and not ranked; leave that out"
    return (ranking + ["in_words"] * test.in_words,
            f"{test.name} has no choices and its answers are always generated; leave that out")


def evaluate(test: Test, items: Sequence[Item], answers: Choices | predictions.TextAnswerer, checkpoint: str | Path,
             out: str | Path, console: Console | None = None) -> predictions.PredictResult:
    """Answers the items that are not in OUT/predictions.jsonl yet. Raises the errors of `predictions.predict`."""
    card = predictions.card(requests(items), answers, predictions.identity(checkpoint), **test.settings)
    card |= {"checkpoint": str(checkpoint), "data": test.data, "root": test.root}
    return predictions.predict(Path(out) / PREDICTIONS, requests(items), answers, card, console)


def stored_test(out: str | Path, test: Test) -> Test:
    """Returns the test whose answers are stored in OUT, with the scoring rule of the given one.

    Raises FileNotFoundError if there are no answers, ValueError if their benchmark or settings are others.
    """
    settings = _card(Path(out))["settings"]
    if settings.get("benchmark") != test.name:
        raise ValueError(f"{Path(out) / PREDICTIONS} has the answers to {settings.get('benchmark')}, not to "
                         f"{test.name}.")
    stored = {name: settings[name] for name in test.settings if name != "benchmark"}
    other = [f"{name} = {getattr(test, name)!r}, but the answers are with {value!r}" for name, value in stored.items()
             if getattr(test, name) not in (None, False, value)]
    if other:
        raise ValueError(f"{Path(out) / PREDICTIONS} has answers to other questions:\n  " + "\n  ".join(other)
                         + "\nLeave that out, or answer again into another folder.")
    return dataclasses.replace(test, **stored)


def _card(out: Path) -> dict[str, Any]:
    path = predictions.card_path(out / PREDICTIONS)
    if not path.is_file():
        raise FileNotFoundError(f"There are no answers to score: no {path}.")
    card = converted.read_card(path)
    converted.require(path, card, **dict.fromkeys(predictions.COMPARED, dict))
    return card


@dataclasses.dataclass(frozen=True)
class Scored:
    """The scores of the answers in a folder.

    answers: the line of each item
    values:  the value of each that is scored: text, or the index of a choice; a wrong one for items with an error
    """

    test: Test
    items: list[Item]
    answers: list[dict[str, Any]]
    values: list[str | int]
    scores: Scores
    card: dict[str, Any]

    @property
    def errors(self) -> list[dict[str, Any]]:
        return [line for line in self.answers if "error" in line]


def scored(test: Test, items: Sequence[Item], out: str | Path) -> Scored:
    """Returns the scores of the answers in OUT/predictions.jsonl.

    Raises FileNotFoundError or ValueError if answers are missing, or belong to other items.
    """
    out, path = Path(out), Path(out) / PREDICTIONS
    card = _card(out)
    if card["samples"].get("sha256") != digest(requests(items)):
        raise ValueError(f"{path} has answers to {card['samples'].get('count')} items, but not to the {len(items)} of "
                         f"{test.data}: the data, or the prompts, have changed since.")
    lines, _ = predictions.read_answers(path.read_bytes(), [item.id for item in items], path)
    if len(lines) < len(items):
        raise ValueError(f"{path} has {len(lines)} of {len(items)} answers. Without score_only the same command "
                         "computes the others.")
    values = [_scored_value(*pair, test) for pair in zip(items, lines, strict=True)]
    return Scored(test, list(items), lines, values, BENCHMARKS[test.name].score(items, values), card)


def _scored_value(item: Item, line: Mapping[str, Any], test: Test) -> str | int:
    """Returns the value of a line that is scored."""
    if "error" not in line:
        return chosen(line, test.rank_by) if test.ranked else line["answer"]
    if not item.choices:
        return ""
    wrong = next(index for index in range(len(item.choices)) if index != item.right)
    return wrong if test.ranked else item.choices[wrong]


# ---- output ----


def show(result: Scored, console: Console) -> None:
    """Prints the figures as a table."""
    test = result.test
    table = Table(title=f"{test.name}, {len(result.items):,} items")
    for heading in ("", "score", "95 % interval"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, figure in result.scores.figures.items():
        table.add_row(name, f"{figure.value:.4f}", _interval(figure))
    if result.scores.groups:
        table.add_section()
        for name, figure in result.scores.groups.items():
            table.add_row(name, f"{figure.value:.4f}", _interval(figure))
    console.print(table)
    if result.errors:
        console.print(f"{len(result.errors):,} items could not be answered and count as wrong; their lines in "
                      f"{PREDICTIONS} say why.", highlight=False, style="yellow")


def _interval(figure: Figure) -> str:
    return f"{figure.low:.4f} to {figure.high:.4f}"


def write(result: Scored, out: str | Path) -> Path:
    """Writes scores.json and report.html into OUT; returns the path of the page."""
    out, test, card = Path(out), result.test, result.card
    empty = sum(line.get("answer") == "" for line in result.answers)
    content = {
        "benchmark": test.name,
        "figures": {name: dataclasses.asdict(figure) for name, figure in result.scores.figures.items()},
        "groups": {name: dataclasses.asdict(figure) for name, figure in result.scores.groups.items()},
        "items": len(result.items), "errors": len(result.errors), "empty_answers": empty,
        "data": test.data, "root": test.root, "rank_by": test.rank_by if test.ranked else None,
        "checkpoint": card.get("checkpoint"), "model": card["model"], "settings": card["settings"],
        "samples": card["samples"], "answered_with": card.get("versions"),
        "scored_with": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
    }
    files.replace(out / SCORES, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return _page(result, out, empty)


def _page(result: Scored, out: Path, empty: int) -> Path:
    test, card, scores = result.test, result.card, result.scores
    table = [["", "score", "95 % from", "to"], *([name, figure.value, figure.low, figure.high]
             for name, figure in [*scores.figures.items(), *scores.groups.items()])]
    how = f"choices ranked by loss ({test.rank_by})" if test.ranked else "generated"
    first, figure = next(iter(scores.figures.items()))
    facts = {first: f"{figure.value:.3f}", "items": f"{len(result.items):,}", "answers": how,
             "not answered": f"{len(result.errors):,}"}
    if not test.ranked:
        facts["empty answers"] = f"{empty:,}"
    worst, best = _ends(scores.each, [n for n, line in enumerate(result.answers) if "error" not in line])
    sections = {"Worst answers": [example(result, index) for index in worst],
                "Best answers": [example(result, index) for index in best]}
    notes = [f"{line['id']}: {line['error']}" for line in result.errors]
    name = Path(str(card.get("checkpoint", ""))).name
    return report.write_scores(out, f"{name} on {test.name}" if name else test.name, table, sections, facts,
                               {"Not answered, counted as wrong": notes} if notes else {})


def _ends(each: Sequence[float], indices: Sequence[int]) -> tuple[list[int], list[int]]:
    """Returns the items with the lowest and with the highest scores, no item twice. Ties are broken at random."""
    order = list(indices)
    random.Random(0).shuffle(order)
    order.sort(key=lambda index: each[index])
    count = min(TOP, (len(order) + 1) // 2)
    return order[:count], order[count:][-TOP:][::-1]


def example(result: Scored, index: int) -> Example:
    """Returns an item and its answer, for the page."""
    item, line, value, each = (column[index] for column in
                               (result.items, result.answers, result.values, result.scores.each))
    answer = item.choices[value] if isinstance(value, int) else value
    note = f"{item.id} · score {each:.3f}" + (f" · {item.group}" if item.group else "")
    right = {0.0: False, 1.0: True}.get(float(each))
    truth, image = _truth(item), _image(item)
    if item.box is not None:
        box = answered_box(answer, item.size)
        drawn = {"truth": item.box} | ({} if box is None else {"answer": box})
        image, right = report.boxed(image, item.size, drawn), each > 0.5
    options = []
    if isinstance(value, int):
        options = zip(item.choices, line["losses"], strict=True)
    return Example(image, without_placeholders(item.sample.prompt), answer, truth, right, note, tuple(options))


def _truth(item: Item) -> str:
    if item.right is not None:
        return item.choices[item.right]
    if item.box is not None:
        width, height = item.size  # some boxes extend beyond their image
        x1, x2 = (min(max(x, 0), width) for x in item.box[::2])
        y1, y2 = (min(max(y, 0), height) for y in item.box[1::2])
        return boxes.box_text((x1, y1, x2 - x1, y2 - y1), width, height)
    counts = collections.Counter(item.references)
    return " · ".join(text if times == 1 else f"{text} × {times}" for text, times in counts.most_common())


def _image(item: Item) -> Any:
    """Returns the item's first image, uint8[H,W,3] with sides of at most SIDE; None without one."""
    if not item.sample.images:
        return None
    return report.thumbnail(images.rgb(item.sample.images[0]), SIDE)
