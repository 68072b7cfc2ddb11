"""The answers of a model to many samples, kept as they come, so that a stopped command goes on where it was.

    OUT            a JSON object a line, in the order of the samples: {"id", "answer", ...}, or {"id", "error"} of a
                   sample that cannot be used, such as one whose image cannot be read
    OUT.card.json  of which samples, by which model and with which settings; with others OUT is not gone on with

Every sample is a prompt of its own: nothing is carried over from one to the next. A window of samples is opened by
threads and sorted by length, so that a batch has little padding, while the window before it is answered; a line is
written when all before it are. Batches have a fixed number of rows, the tail filled up, and rows a few lengths, each of
which is compiled once. They are answered by all devices of the model's mesh, in one process.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mmjax import compilation, files, sharding
from mmjax.checkpoints import converted
from mmjax.checkpoints import training as training_checkpoints
from mmjax.data import images
from mmjax.data.neighbours import Recall
from mmjax.inference import generate as generation
from mmjax.inference import requests
from mmjax.inference.loaded import Loaded
from mmjax.inference.requests import Request

FORMAT = 1
CARD = ".card.json"  # behind the name of the answers' file
COMPARED = ("model", "samples", "settings")  # of a card, which must be the same for a file to be gone on with
THREADS = 2  # that open images ahead
NAMED = 5  # samples with errors that a summary names


@dataclasses.dataclass(frozen=True)
class Opened:
    """A sample whose files are read, or what is wrong with it.

    ask:     with images as uint8[S,S,3] and arrays in place of their files
    length:  places of its row
    problem: why it cannot be answered
    """

    ask: Request
    length: int = 0
    problem: str | None = None


class Answerer(Protocol):
    """How samples are answered: `Words` here, `mmjax.evaluate.rank.Choices`.

    model:    that answers
    rows:     samples at once; `answer` fills up what is missing
    window:   batches whose samples are sorted by length; 1 leaves every sample where it is
    settings: what the answers depend on beside model and samples, as JSON holds it
    """

    model: Loaded
    rows: int
    window: int
    settings: dict[str, Any]

    def open(self, ask: Request) -> Opened:
        """In one of several threads. Raises ValueError or OSError saying what is wrong with the sample."""

    def answer(self, asks: Sequence[Request], first: int) -> list[dict[str, Any]]:
        """What each line has beside its id, of 1 to `rows` opened samples; with a window of 1 those from number `first`
        on."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are found, for `Loaded.generate`. Raises ValueError naming every value out of range."""

    max_new_tokens: int | None = None  # longest answer (default: 64, of a benchmark its own)
    temperature: float = 0.0  # 0 takes the best word, above 0 draws
    num_beams: int = 1  # above 1 searches with beams
    top_k: int = 50  # draw from so many best words; 0: from all
    top_p: float = 1.0  # draw from the fewest words that hold this share of the probability
    repetition_penalty: float = 1.0  # above 1 avoids words that were said already
    length_penalty: float = 1.0  # of beams: above 0 favours long answers, below 0 short ones
    min_length: int = 1  # words (ids, one more than are written) before an answer may end
    stop: tuple[str, ...] | None = None  # strings that end the answer (default: the model's end symbol)
    seed: int = 0  # of the draws

    def __post_init__(self):
        generation.GenerateConfig(
            max_new_tokens=64 if self.max_new_tokens is None else self.max_new_tokens, num_beams=self.num_beams,
            do_sample=self.temperature > 0, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            repetition_penalty=self.repetition_penalty, length_penalty=self.length_penalty, min_length=self.min_length)

    @property
    def changed(self) -> list[str]:
        """The names of what differs from the defaults."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]

    def at_most(self, tokens: int) -> "Decoding":
        """With that longest answer, unless another was asked for."""
        return self if self.max_new_tokens is not None else dataclasses.replace(self, max_new_tokens=tokens)

    def settings(self, model: Loaded) -> dict[str, Any]:
        """The arguments of `Loaded.generate` that they stand for."""
        stop = [model.text.end_sym] if self.stop is None else list(self.stop)
        return vars(self.at_most(64)) | {"stop": stop}


@dataclasses.dataclass(frozen=True)
class TextAnswerer:
    """Answers in the model's own words; see `Answerer`.

    batch_size: rounded up to what the mesh can divide
    recall:     as in `Loaded.generate`
    text:       fields of `TextConfig` that differ from the model's
    """

    model: Loaded
    decoding: Decoding = Decoding()
    batch_size: int = 16
    recall: Recall | None = None
    text: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def window(self) -> int:
        return 1 if self.decoding.temperature > 0 else 4  # what a sample draws depends on its number

    @property
    def rows(self) -> int:
        return rows(self.model, self.batch_size)

    @property
    def settings(self) -> dict[str, Any]:
        given = self.decoding.settings(self.model) | dataclasses.asdict(
            dataclasses.replace(self.model.text, **self.text))
        if self.recall is not None:
            given["recall"] = [hashlib.sha256(self.recall.vectors.tobytes()).hexdigest(), self.recall.count,
                               self.recall.sharpness, self.recall.weight]
        return given

    def open(self, ask: Request) -> Opened:
        ask = read(ask, self.model)
        new = self.decoding.settings(self.model)["max_new_tokens"]
        [length] = self.model.prompt_lengths([ask.sample], new, **self.text)
        self.model.batch([ask.sample], **self.text)  # raises for what else is wrong with the sample
        return Opened(ask, length)

    def answer(self, asks: Sequence[Request], first: int) -> list[dict[str, Any]]:
        words = self.model.generate([ask.sample for ask in asks], **self.decoding.settings(self.model), first=first,
                                    batch_size=self.rows, recall=self.recall, **self.text)
        return [{"answer": each} for each in words]


def rows(model: Loaded, batch_size: int) -> int:
    """`batch_size`, rounded up to what the model's mesh can divide. Raises ValueError for less than 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: at least 1")
    ways = sharding.num_shards(model.mesh, "batch")
    return math.ceil(batch_size / ways) * ways


def read(ask: Request, model: Loaded) -> Request:
    """With its images and arrays read, and its images placed in the prompt. Raises ValueError naming the file that
    cannot be read."""
    sample, spec = requests.with_images(ask.sample, model.family.prompt), model.config.images
    if spec is not None:
        opened = [images.read(image, spec) for image in sample.images]
        sample = dataclasses.replace(sample, images=opened)
    media = {name: requests.read_sense(name, value) for name, value in sample.media.items()}
    return dataclasses.replace(ask, sample=dataclasses.replace(sample, media=media))


# ---- what they are answers of ----


def identity(path: str | Path) -> dict[str, Any]:
    """What tells a checkpoint or run from others, wherever it lies: SHA-256 of its description (which has those of the
    released files), and of the seals of the newest checkpoints of the run and of those it started from.

    Raises FileNotFoundError or ValueError as `mmjax.load` does.
    """
    folder = Path(path)
    if not (folder / converted.RUN_CARD).is_file():
        source, runs = converted.ConvertedCheckpoint.open(folder), []
    else:
        source, runs = converted.read_run(folder), converted.lineage(folder)
    return {"family": source.family.name, "config": files.sha256(source.folder / "config.json"),
            "architecture": _sha256(dataclasses.asdict(source.config)), "trained": [_seal(run) for run in runs]}


def _seal(run: Path) -> list[Any]:
    """The newest step of a run, and the SHA-256 of its seal, which has those of the files."""
    steps = training_checkpoints.saved(run / "checkpoints")
    if not steps:
        raise FileNotFoundError(f"{run / 'checkpoints'} has no checkpoint.")
    return [steps[-1], files.sha256(run / "checkpoints" / str(steps[-1]) / training_checkpoints.SEAL)]


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def card(asks: Sequence[Request], answerer: Answerer, model: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What OUT.card.json holds; `model` is its `identity`, `more` are further things of which answers depend."""
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(answerer.model.params)})
    settings = {"dtypes": dtypes, **answerer.settings, **more}
    return {"format": FORMAT, "model": dict(model), "settings": settings,
            "samples": {"count": len(asks), "sha256": requests.digest(asks)},
            "versions": {name: importlib.metadata.version(name) for name in ("mmjax", "jax")}}


def card_path(out: Path) -> Path:
    return out.with_name(out.name + CARD)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what two cards differ, in words; versions may."""
    found = []
    for part in COMPARED:
        one, other = json.loads(json.dumps([before.get(part, {}), now[part]]))
        found += [f"{part}.{name}: {one.get(name)!r} -> {other.get(name)!r}" for name in sorted({*one, *other})
                  if one.get(name) != other.get(name)]
    return found


# ---- the file ----


@contextlib.contextmanager
def _held(out: Path, made: Mapping[str, Any]) -> Iterator[Any]:
    """The file of answers, open for reading and adding, by nobody else; and its card beside it.

    Raises BlockingIOError if another process adds to it, ValueError if it is of something else.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a+b", buffering=0) as file, files.exclusive_lock(out, "answering"):
        beside = card_path(out)
        if beside.is_file():
            if differ := differences(converted.read_card(beside), made):
                raise ValueError(f"{out} has answers of something else:\n  " + "\n  ".join(differ)
                                 + "\nGive what it had; or name another file, or delete it and its card to begin anew.")
        elif out.stat().st_size:
            raise ValueError(f"{out} is there, but no {beside.name} beside it to tell what it is of. Put it back, or "
                             "name another file.")
        else:
            files.replace(beside, json.dumps(made, indent=2, default=str) + "\n")
        yield file


def read_answers(content: bytes, ids: Sequence[str], out: Path) -> tuple[list[dict[str, Any]], int]:
    """(the lines that are whole, their bytes): what was being written when the command was stopped is none.

    Raises ValueError naming a line before the last that is not JSON, or that is of another sample than stands there.
    """
    whole = content[:content.rfind(b"\n") + 1]
    parsed: list[dict[str, Any]] = []
    size, every = 0, whole.split(b"\n")[:-1]
    for number, line in enumerate(every, 1):
        try:
            found = json.loads(line)
        except ValueError as error:
            if number == len(every):
                break
            raise ValueError(f"{out}, line {number} is not JSON: {error}. Delete it and what follows, and the answers "
                             "from there on are made anew.") from error
        expected = ids[number - 1] if number <= len(ids) else None
        if not isinstance(found, dict) or found.get("id") != expected or expected is None:
            raise ValueError(f"{out}, line {number} is not of the sample {expected!r} that stands there. Delete it and "
                             "what follows, and the answers from there on are made anew.")
        parsed.append(found)
        size += len(line) + 1
    return parsed, size


class _Lines:
    """The file of answers, to which those are added that all before them have been."""

    def __init__(self, file: Any, done: Sequence[Mapping[str, Any]], out: Path):
        self._file, self._out, self._waiting = file, out, {}
        self.written = len(done)
        self.errors = [str(line["id"]) for line in done if "error" in line]

    def add(self, lines: Mapping[int, dict[str, Any]]) -> None:
        """Lines by the number of their sample; those before the last one written are there already."""
        self._waiting |= {number: line for number, line in lines.items() if number >= self.written}

    def flush(self) -> int:
        """Writes what can be, onto the disk; how many lines that were. Raises OSError naming the file."""
        before, ready = self.written, []
        while (line := self._waiting.pop(self.written, None)) is not None:
            ready.append(json.dumps(line, ensure_ascii=False) + "\n")
            self.errors += [str(line["id"])] if "error" in line else []
            self.written += 1
        left = "".join(ready).encode()
        try:
            while left:  # of a disk that is getting full, only what had room is written
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._out)) from error
        return self.written - before


# ---- answering ----


@dataclasses.dataclass(frozen=True)
class Done:
    """What a call of `predict` did.

    count, errors: lines of the file, and the ids of those that have an error
    now, seconds:  lines written by this call, and how long it took
    compiled:      programs of this call
    """

    out: Path
    count: int
    errors: tuple[str, ...]
    now: int
    seconds: float
    compiled: compilation.Compiled


def predict(out: str | Path, asks: Sequence[Request], answerer: Answerer, made: Mapping[str, Any],
            console: Console | None = None) -> Done:
    """Answers every sample that OUT has no line of yet. `made` is the `card`.

    Raises ValueError if OUT is of other samples, of another model or other settings, naming the differences, and in a
    program of several processes; BlockingIOError if another process adds to it; OSError if it cannot be written, and
    then what is written stays.
    """
    if jax.process_count() > 1:
        raise ValueError(f"Samples are answered by one process, this is one of {jax.process_count()}: start it on one "
                         "host alone, where all of that host's devices take part.")
    files.require_local({"out": out})
    out = Path(out)
    console, begun = console or Console(stderr=True, markup=False), time.monotonic()
    with _held(out, made) as file, compilation.count_compilations() as compiled:
        file.seek(0)
        done, size = read_answers(file.read(), [ask.id for ask in asks], out)
        file.truncate(size)
        lines = _Lines(file, done, out)
        with Progress(*_columns(), console=console) as bar:
            task = bar.add_task("answering", total=len(asks), completed=len(done))
            for start, window in _windows(asks, len(done), answerer):
                lines.add({start + place: {"id": each.ask.id, "error": each.problem}
                           for place, each in enumerate(window) if each.problem is not None})
                bar.advance(task, lines.flush())
                for places in _batches(window, answerer):
                    if start + max(places) < len(done):
                        continue  # of a window that had been begun
                    lines.add(_answered(start, window, places, answerer))
                    bar.advance(task, lines.flush())
    return Done(out, lines.written, tuple(lines.errors), lines.written - len(done), time.monotonic() - begun, compiled)


def summary(done: Done) -> Iterator[str]:
    """What a call of `predict` did, in words."""
    if done.now == done.count:
        yield f"{done.out}: {done.count:,} samples in {done.seconds:.1f} s, {done.now / done.seconds:.1f} a second"
    elif done.now:
        yield (f"{done.out}: {done.count:,} samples, {done.now:,} of them answered now in {done.seconds:.1f} s, "
               f"{done.now / done.seconds:.1f} a second")
    else:
        yield f"{done.out}: all {done.count:,} samples were answered"
    if done.now:
        yield f"{done.compiled.programs} programs were compiled in {done.compiled.seconds:.1f} s"
    if done.errors:
        more = ", …" if len(done.errors) > NAMED else ""
        yield (f'{len(done.errors):,} samples could not be answered ({", ".join(done.errors[:NAMED])}{more}): their '
               'lines say why under "error"')


def _windows(asks: Sequence[Request], first: int, answerer: Answerer) -> Iterator[tuple[int, list[Opened]]]:
    """(number of its first sample, opened samples) of each window that has one from `first` on; one is read ahead.

    Windows begin at the same samples wherever one starts, so that a command that goes on makes the same batches.
    """
    size, waiting = answerer.rows * answerer.window, collections.deque()

    def opened(ask: Request) -> Opened:
        try:
            return answerer.open(ask)
        except (ValueError, OSError) as error:
            return Opened(ask, problem=str(error))

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        try:
            for start in range(first // size * size, len(asks), size):
                waiting.append((start, [pool.submit(opened, ask) for ask in asks[start:start + size]]))
                if len(waiting) == 2:
                    yield _result(*waiting.popleft())
            while waiting:
                yield _result(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _result(start: int, window: Sequence[concurrent.futures.Future[Opened]]) -> tuple[int, list[Opened]]:
    return start, [each.result() for each in window]


def _batches(window: Sequence[Opened], answerer: Answerer) -> Iterator[list[int]]:
    """The places in the window of each batch. Where they are sorted, samples with as many images and the same senses,
    and then of about the same length, are together; and those that cannot be answered are left out."""

    def order(place: int) -> tuple[Any, ...]:
        sample = window[place].ask.sample
        return len(sample.images), sorted(sample.media), window[place].length

    places = list(range(len(window)))
    if answerer.window > 1:
        places = sorted((place for place in places if window[place].problem is None), key=order)
    for first in range(0, len(places), answerer.rows):
        chosen = places[first:first + answerer.rows]
        if any(window[place].problem is None for place in chosen):
            yield chosen


def _answered(start: int, window: Sequence[Opened], places: Sequence[int],
              answerer: Answerer) -> dict[int, dict[str, Any]]:
    """The lines of a batch by the numbers of their samples. One that cannot be answered keeps its row, so that the
    others are where they would be without it; another sample stands in."""
    good = [place for place in places if window[place].problem is None]
    asks = [window[place if place in good else good[0]].ask for place in places]
    answers = dict(zip(places, answerer.answer(asks, start + min(places)), strict=True))
    return {start + place: {"id": window[place].ask.id, **answers[place]} for place in good}


class _Rate(ProgressColumn):
    """Answers a second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


def _columns() -> tuple[ProgressColumn, ...]:
    return (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeElapsedColumn(),
            TimeRemainingColumn())
