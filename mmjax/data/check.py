"""What a run's data hold and what is wrong with them, before the run: `mmjax data check`."""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from mmjax import files
from mmjax.batch import Sample
from mmjax.config import DataConfig, Source, TextConfig
from mmjax.data import images, text
from mmjax.data.formats import Record
from mmjax.data.pipeline import read, sample
from mmjax.tokenizer import Tokenizer

MISSING, CORRUPT, UNFIT = "missing image", "corrupt image", "unfit record"  # kinds of problems
CHUNK = 512  # records handed to the threads at once
SHOWN = 10  # problems on the screen; all of them are in the JSON file
INK, MUTED, FILL, LIMIT = "#1c2128", "#667080", "#2563c9", "#c0362c"


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """How a run makes rows. Without `text`, only the captions are counted.

    image_tokens: places that an image takes among the words
    """

    tokenizer: Tokenizer
    text: TextConfig | None = None
    image_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Problem:
    """A record that a run would have to replace."""

    name: str
    file: str
    kind: str
    problem: str


@dataclasses.dataclass(frozen=True)
class Found:
    """What one source holds.

    looked_at:  how many of its records were read, whole; all the following is about them
    images:   how many have an image
    duplicates: names that more than one record has, and how many have them
    lengths:    of the captions of those without a problem, uncut, in `unit`
    truncated:  rows that lose some of their right end; None where that was not counted
    unlearnt:   rows without a single token to learn; likewise
    """

    source: Source
    records: int
    looked_at: int
    images: int
    problems: tuple[Problem, ...]
    duplicates: dict[str, int]
    lengths: tuple[int, ...]
    unit: str
    truncated: int | None
    unlearnt: int | None

    @property
    def bad_share(self) -> float:
        return len(self.problems) / self.looked_at if self.looked_at else 0.0

    def count(self, kind: str) -> int:
        return sum(problem.kind == kind for problem in self.problems)


@dataclasses.dataclass(frozen=True)
class _CheckedRecord:
    """At one record."""

    name: str
    image: bool
    problem: Problem | None
    length: int = 0
    truncated: bool = False
    unlearnt: bool = False


def check(cfg: DataConfig, out: str | Path, rows: RowSettings | None = None, at_most: int | None = None,
          console: Console | None = None) -> tuple[list[Found], bool]:
    """Looks at the sources' records; writes `data_check.json` and `data_check.png` into `out`, prints a table.

    rows:    None: captions are counted in words
    at_most: records of each source to look at, drawn at random but the same every time; None for all

    Returns what it found, and whether a run would have to replace more of its samples than `max_bad_share` allows.
    Raises what a source's reader raises.
    """
    files.require_local({"out": out})
    console = console or Console()
    found = [_source(source, records, cfg, rows, at_most, console)
             for source, records in zip(cfg.sources, read(cfg), strict=True)]
    weight = sum(each.source.ratio for each in found)
    share = sum(each.source.ratio * each.bad_share for each in found) / weight
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    limit = None if rows is None or rows.text is None or rows.text.joint else rows.text.max_txt_len
    card = {"bad_share": share, "max_bad_share": cfg.max_bad_share, "sources": [_card(each) for each in found]}
    (folder / "data_check.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    _draw(folder / "data_check.png", found, limit)
    _print(console, found, share, cfg.max_bad_share, folder)
    return found, share > cfg.max_bad_share


def _source(source: Source, records: Sequence[Record], cfg: DataConfig, rows: RowSettings | None, at_most: int | None,
            console: Console) -> Found:
    numbers = range(len(records))
    if at_most is not None and at_most < len(records):
        numbers = np.sort(np.random.default_rng(0).choice(len(records), at_most, replace=False)).tolist()
    prompt = max(cfg.prompts, key=len, default="")  # with it, most is cut away
    looks = list(_looks(source, records, numbers, prompt, cfg, rows, console))
    names = collections.Counter(look.name for look in looks)
    sound = [look for look in looks if look.problem is None]
    cut = rows is not None and rows.text is not None
    return Found(
        source, len(records), len(looks), sum(look.image for look in looks),
        tuple(look.problem for look in looks if look.problem is not None),
        {name: count for name, count in names.items() if count > 1}, tuple(look.length for look in sound),
        "words" if rows is None else "tokens", sum(look.truncated for look in sound) if cut else None,
        sum(look.unlearnt for look in sound) if cut else None)


def _looks(source: Source, records: Sequence[Record], numbers: Sequence[int], prompt: str, cfg: DataConfig,
           rows: RowSettings | None, console: Console) -> Iterator[_CheckedRecord]:
    def look(number: int) -> _CheckedRecord:
        try:
            record = records[number]
        except (ValueError, OSError) as error:
            return _CheckedRecord(str(number), False, Problem(str(number), source.path, UNFIT, str(error)))
        seen = _CheckedRecord(record.name, record.image is not None, None)
        try:
            made = sample(record, prompt, cfg)
            counts = _counts(made, rows)
        except (ValueError, OSError) as error:
            return dataclasses.replace(seen, problem=_problem(source, record, UNFIT, error))
        try:
            for image in made.images:
                images.rgb(image)
        except (ValueError, OSError) as error:
            absent = isinstance(record.image, str) and not os.path.isfile(record.image)
            return dataclasses.replace(seen, problem=_problem(source, record, MISSING if absent else CORRUPT, error))
        return dataclasses.replace(seen, **counts)

    ordered = iter(track(numbers, escape(source.path), console=console, disable=not console.is_terminal))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(itertools.islice(ordered, CHUNK)):  # a whole source at once would fill the memory
            yield from pool.map(look, chunk)


def _counts(made: Sample, rows: RowSettings | None) -> dict[str, Any]:
    answers = [answer for _, answer in made.turns] or [made.answer]
    if rows is None:
        return {"length": sum(len(answer.split()) for answer in answers)}
    if rows.text is None:
        return {"length": sum(len(rows.tokenizer.encode(answer)) for answer in answers)}
    endless = dataclasses.replace(rows.text, max_txt_len=1 << 30, max_context_len=1 << 30)
    whole, cut = (text.rows([made], rows.tokenizer, each, rows.image_tokens) for each in (endless, rows.text))
    return {"length": int(whole.loss_mask.sum()), "truncated": whole.tokens.shape[1] > cut.tokens.shape[1],
            "unlearnt": not cut.loss_mask[:, 1:].any()}


def _problem(source: Source, record: Record, kind: str, error: Exception) -> Problem:
    file = source.path if record.image is None else str(getattr(record.image, "file", record.image))
    return Problem(record.name, file, kind, str(error))


def _card(found: Found) -> dict[str, Any]:
    edges, counts = _histogram(found)
    card = dataclasses.asdict(found) | {"bad_share": found.bad_share, "lengths": _spread(found.lengths)}
    return card | {"histogram": {"width": int(edges[1]), "counts": counts.tolist()}}


def _spread(lengths: Sequence[int]) -> dict[str, float]:
    if not lengths:
        return {}
    middle, most = np.percentile(lengths, [50, 95])
    return {"mean": round(float(np.mean(lengths)), 2), "median": float(middle), "p95": float(most),
            "longest": max(lengths)}


def _histogram(found: Found) -> tuple[np.ndarray, np.ndarray]:
    """(edges, counts): at most some sixty bars, as wide as a whole number; the last edge lies above the longest."""
    longest = max(found.lengths, default=0)
    width = 1 + longest // 60
    edges = np.arange(0, longest + 1 + width, width)
    return edges, np.histogram(found.lengths, edges)[0]


def _draw(path: Path, found: Sequence[Found], limit: int | None) -> None:
    """One histogram below the other; `limit` is the longest caption that is kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6 * len(found)), dpi=110, layout="constrained")
    for axes, each in zip(figure.subplots(len(found), squeeze=False)[:, 0], found, strict=True):
        edges, counts = _histogram(each)
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=FILL)
        if limit is not None:
            axes.axvline(limit + 1, color=LIMIT, linewidth=1)  # behind the bar of those that are just kept whole
            axes.annotate(f" kept: {limit}", (limit + 1, 1), xycoords=("data", "axes fraction"), va="top", color=LIMIT,
                          fontsize=8)
        axes.set_title(f"{each.source.path}: {len(each.lengths):,} captions", color=INK, fontsize=9, loc="left",
                       parse_math=False)
        axes.set_xlabel(f"{each.unit} in a caption", color=MUTED, fontsize=9)
        axes.tick_params(colors=MUTED, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _print(console: Console, found: Sequence[Found], share: float, limit: float, folder: Path) -> None:
    def of(count: int | None, whole: int) -> str:
        if count is None:
            return "not counted"
        return f"{count:,}  ({count / whole:.2%})" if count and whole else f"{count:,}"

    table = Table(show_header=len(found) > 1)
    table.add_column("")
    for each in found:
        table.add_column(escape(each.source.path), justify="right", overflow="fold")
    lines = {
        "records": lambda each: f"{each.records:,}",
        "looked at": lambda each: of(each.looked_at, each.records),
        "with an image": lambda each: of(each.images, each.looked_at),
        "missing images": lambda each: of(each.count(MISSING), each.looked_at),
        "corrupt images": lambda each: of(each.count(CORRUPT), each.looked_at),
        "unfit records": lambda each: of(each.count(UNFIT), each.looked_at),
        "names used more than once": lambda each: of(len(each.duplicates), each.looked_at),
        "caption lengths": lambda each: ", ".join(
            f"{name} {value:g}" for name, value in _spread(each.lengths).items()) + f" {each.unit}",
        "cut at the right end": lambda each: of(each.truncated, len(each.lengths)),
        "without a token to learn": lambda each: of(each.unlearnt, len(each.lengths)),
    }
    for title, cell in lines.items():
        table.add_row(title, *map(cell, found))
    console.print(table)
    problems = [problem for each in found for problem in each.problems]
    for problem in problems[:SHOWN]:
        words = f"{problem.kind} {problem.name}: {problem.problem}"  # it may quote the data, which say anything
        console.print("".join(character if character.isprintable() else " " for character in words), markup=False,
                      highlight=False)
    if len(problems) > SHOWN:
        console.print(f"and {len(problems) - SHOWN:,} more")
    console.print(f"{share:.2%} of a run's samples would be replaced; data.max_bad_share allows {limit:.2%}. Written: "
                  f"{folder / 'data_check.json'}, {folder / 'data_check.png'}", highlight=False)
