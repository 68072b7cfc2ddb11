"""Reports the contents and the problems of a run's data before the run: `mmjax data check`."""

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
from mmjax.data.formats import Account, Record
from mmjax.data.formats.account import printable
from mmjax.data.formats.rows import shown
from mmjax.data.pipeline import read, sample
from mmjax.tokenizer import Tokenizer

SYMBOLS = ("</s>", "<s>", "###", "[INST]", "[/INST]", "<|im_end|>", "<|endoftext|>", "<|eot_id|>")
ODD_SYMBOL = "captions with a special symbol or an end string, which ends the answer or becomes a special token"
ODD_MODE = "images of 16 bits or floats, whose values above 255 become white as in the originals"
MISSING, CORRUPT, UNFIT = "missing image", "corrupt image", "unfit record"  # kinds of problems
CHUNK = 512  # records submitted to the threads at once
SHOWN = 10  # problems printed; all of them are in the JSON file
INK, MUTED, FILL, LIMIT = "#1c2128", "#667080", "#2563c9", "#c0362c"


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """The tokenisation settings of a run. Without `text`, only the tokens of captions are counted.

    image_tokens: slots that an image takes in a row
    """

    tokenizer: Tokenizer
    text: TextConfig | None = None
    image_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Problem:
    """A record that a run would replace."""

    name: str
    file: str
    kind: str
    problem: str


@dataclasses.dataclass(frozen=True)
class SourceSummary:
    """The contents of one source.

    looked_at:  number of records that were read; the following is about these
    images:     number of records with an image
    duplicates: names of several records, and how many have each
    lengths:    of the captions of records without a problem, untruncated, in `unit`
    truncated:  number of rows that are truncated; None if not counted
    unlearnt:   number of rows without a token to learn; None if not counted
    account:    of all items of the source, with the records that cannot be used or were not looked at
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
    account: Account

    @property
    def bad_share(self) -> float:
        return len(self.problems) / self.looked_at if self.looked_at else 0.0

    def count(self, kind: str) -> int:
        return sum(problem.kind == kind for problem in self.problems)


@dataclasses.dataclass(frozen=True)
class _CheckedRecord:
    """The result for one record. odd: (what looks odd about it, details)"""

    name: str
    image: bool
    problem: Problem | None
    odd: tuple[tuple[str, str], ...] = ()
    length: int = 0
    truncated: bool = False
    unlearnt: bool = False


def check(cfg: DataConfig, out: str | Path, rows: RowSettings | None = None, at_most: int | None = None,
          console: Console | None = None, list_all: bool = False) -> tuple[list[SourceSummary], bool]:
    """Checks the sources' records; writes `data_check.json` and `data_check.png` into `out`, and prints a table and the
    account of each source.

    rows:     None: the lengths of captions are in words
    at_most:  number of records of each source to check, drawn with a fixed seed; None for all
    list_all: print every item that is left out or odd, not only their numbers

    Returns the summaries, and whether a run would replace more of its samples than `max_bad_share` allows. Raises the
    errors of a source's reader.
    """
    files.require_local({"out": out})
    console = console or Console(markup=False)
    found = [_summary(source, records, cfg, rows, at_most, console)
             for source, records in zip(cfg.sources, read(cfg), strict=True)]
    weight = sum(each.source.ratio for each in found)
    share = sum(each.source.ratio * each.bad_share for each in found) / weight
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    limit = None if rows is None or rows.text is None or rows.text.joint else rows.text.max_txt_len
    card = {"bad_share": share, "max_bad_share": cfg.max_bad_share, "sources": [_card(each) for each in found]}
    (folder / "data_check.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    _draw(folder / "data_check.png", found, limit)
    _print(console, found, share, cfg.max_bad_share, folder, list_all)
    return found, share > cfg.max_bad_share


def _summary(source: Source, records: Sequence[Record], cfg: DataConfig, rows: RowSettings | None, at_most: int | None,
             console: Console) -> SourceSummary:
    numbers = range(len(records))
    if at_most is not None and at_most < len(records):
        numbers = np.sort(np.random.default_rng(0).choice(len(records), at_most, replace=False)).tolist()
    prompt = max(cfg.prompts, key=len, default="")  # the one with which most is truncated
    looks = list(_check_records(source, records, numbers, prompt, cfg, rows, console))
    names = collections.Counter(look.name for look in looks)
    sound = [look for look in looks if look.problem is None]
    cut = rows is not None and rows.text is not None
    return SourceSummary(
        source, len(records), len(looks), sum(look.image for look in looks),
        tuple(look.problem for look in looks if look.problem is not None),
        {name: count for name, count in names.items() if count > 1}, tuple(look.length for look in sound),
        "words" if rows is None else "tokens", sum(look.truncated for look in sound) if cut else None,
        sum(look.unlearnt for look in sound) if cut else None, _account(Account.of(records).copy(), records, looks))


def _account(account: Account, records: Sequence[Record], looks: Sequence[_CheckedRecord]) -> Account:
    """Returns a reader's account with the results of the records that were looked at."""
    if skipped := len(records) - len(looks):
        account.used -= skipped
        account.leave("records not looked at", count=skipped)
    for look in looks:
        if look.problem is not None:
            account.reject(look.problem.kind + "s", f"{look.name}: {look.problem.problem}")
        for what, details in look.odd:
            account.notice(what, f"{look.name}: {details}")
    return account


def _check_records(source: Source, records: Sequence[Record], numbers: Sequence[int], prompt: str, cfg: DataConfig,
                   rows: RowSettings | None, console: Console) -> Iterator[_CheckedRecord]:
    def check_record(number: int) -> _CheckedRecord:
        try:
            record = records[number]
        except (ValueError, OSError) as error:
            return _CheckedRecord(str(number), False, Problem(str(number), source.path, UNFIT, str(error)))
        checked = _CheckedRecord(record.name, record.image is not None, None)
        try:
            tried = sample(record, prompt, cfg)
            counts = _counts(tried, rows)
        except (ValueError, OSError) as error:
            return dataclasses.replace(checked, problem=_problem(source, record, UNFIT, error))
        odd = list(_odd_text(tried, rows, counts))
        for image in tried.images:
            try:
                _, mode = images.decoded(image)
            except (ValueError, OSError) as error:
                kind = MISSING if isinstance(image, str) and not os.path.isfile(image) else CORRUPT
                return dataclasses.replace(checked, problem=_problem(source, record, kind, error))
            if mode.startswith(images.CLIPPED):
                odd.append((ODD_MODE, f"mode {mode} of {image}"))
        return dataclasses.replace(checked, odd=tuple(odd), **counts)

    ordered = iter(track(numbers, escape(source.path), console=console, disable=not console.is_terminal))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(itertools.islice(ordered, CHUNK)):  # a whole source would not fit into memory
            yield from pool.map(check_record, chunk)


def _odd_text(sample: Sample, rows: RowSettings | None, counts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (what looks odd, details) of the text of a sample."""
    symbols = set(SYMBOLS)
    if rows is not None:
        symbols |= {rows.tokenizer.bos_text, rows.tokenizer.eos_text}
        symbols |= {rows.text.end_sym} if rows.text is not None else set()
    answers = [answer for _, answer in sample.turns] or [sample.answer]
    if held := sorted(symbol for symbol in symbols if symbol and any(symbol in answer for answer in answers)):
        yield ODD_SYMBOL, f"{', '.join(held)} in {shown(' '.join(answers))}"
    if counts.get("truncated"):
        yield "rows cut at the right end", "the text is longer than text.max_txt_len allows"
    if counts.get("unlearnt"):
        yield "rows without a token to learn", "all of their answer is cut off"


def _counts(sample: Sample, rows: RowSettings | None) -> dict[str, Any]:
    answers = [answer for _, answer in sample.turns] or [sample.answer]
    if rows is None:
        return {"length": sum(len(answer.split()) for answer in answers)}
    if rows.text is None:
        return {"length": sum(len(rows.tokenizer.encode(answer)) for answer in answers)}
    untruncated = dataclasses.replace(rows.text, max_txt_len=1 << 30, max_context_len=1 << 30)
    whole, cut = (text.rows([sample], rows.tokenizer, each, rows.image_tokens) for each in (untruncated, rows.text))
    return {"length": int(whole.loss_mask.sum()), "truncated": whole.tokens.shape[1] > cut.tokens.shape[1],
            "unlearnt": not cut.loss_mask[:, 1:].any()}


def _problem(source: Source, record: Record, kind: str, error: Exception) -> Problem:
    file = source.path if record.image is None else str(getattr(record.image, "file", record.image))
    return Problem(record.name, file, kind, str(error))


def _card(found: SourceSummary) -> dict[str, Any]:
    edges, counts = _histogram(found)
    card = dataclasses.asdict(found) | {"bad_share": found.bad_share, "lengths": _spread(found.lengths)}
    return card | {"histogram": {"width": int(edges[1]), "counts": counts.tolist()}}


def _spread(lengths: Sequence[int]) -> dict[str, float]:
    if not lengths:
        return {}
    middle, most = np.percentile(lengths, [50, 95])
    return {"mean": round(float(np.mean(lengths)), 2), "median": float(middle), "p95": float(most),
            "longest": max(lengths)}


def _histogram(found: SourceSummary) -> tuple[np.ndarray, np.ndarray]:
    """Returns (edges, counts) of about sixty bars at most, with integer widths; the last edge is above the longest."""
    longest = max(found.lengths, default=0)
    width = 1 + longest // 60
    edges = np.arange(0, longest + 1 + width, width)
    return edges, np.histogram(found.lengths, edges)[0]


def _draw(path: Path, found: Sequence[SourceSummary], limit: int | None) -> None:
    """Draws a histogram for each source; `limit` is the maximum length of a caption before truncation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6 * len(found)), dpi=110, layout="constrained")
    for axes, each in zip(figure.subplots(len(found), squeeze=False)[:, 0], found, strict=True):
        edges, counts = _histogram(each)
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=FILL)
        if limit is not None:
            axes.axvline(limit + 1, color=LIMIT, linewidth=1)  # after the bar of the longest untruncated captions
            axes.annotate(f" kept: {limit}", (limit + 1, 1), xycoords=("data", "axes fraction"), va="top", color=LIMIT,
                          fontsize=8)
        axes.set_title(f"{each.source.path}: {len(each.lengths):,} captions", color=INK, fontsize=9, loc="left",
                       parse_math=False)
        axes.set_xlabel(f"{each.unit} in a caption", color=MUTED, fontsize=9)
        axes.tick_params(colors=MUTED, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _print(console: Console, found: Sequence[SourceSummary], share: float, limit: float, folder: Path,
           list_all: bool) -> None:
    def of(count: int | None, whole: int) -> str:
        if count is None:
            return "not counted"
        return f"{count:,}  ({count / whole:.2%})" if count and whole else f"{count:,}"

    def say(line: str) -> None:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    table = Table(show_header=len(found) > 1)
    table.add_column("")
    for each in found:
        table.add_column(each.source.path, justify="right", overflow="fold")
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
        say(f"{problem.kind} {problem.name}: {problem.problem}")
    if len(problems) > SHOWN:
        console.print(f"and {len(problems) - SHOWN:,} more")
    for each in found:
        say(each.account.line(each.source.path))
        for line in each.account.listing() if list_all else ():
            say(line)
    console.print(f"{share:.2%} of a run's samples would be replaced; data.max_bad_share allows {limit:.2%}. Written: "
                  f"{folder / 'data_check.json'}, {folder / 'data_check.png'}", highlight=False)
