"""Answers many samples and writes each answer when it is ready, so that a stopped command can resume.

    OUT            a JSON object a line, in the order of the samples: {"id", "answer", ...}, or {"id", "error"} for a
                   sample that cannot be used, such as one whose image cannot be read
    OUT.card.json  the samples, the model and the settings; a command with others does not resume OUT

Every sample is an independent prompt. While a window of samples is answered, threads open the next one and sort it by
length, so that a batch has little padding; a line is written after all lines before it. Batches have a fixed number of
rows, padded with copies, and rows have one of a few lengths, each of which is compiled once. One process answers all
samples, on all devices of the model's mesh.
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
from mmjax.inference.loaded import Loaded
from mmjax.inference.requests import INLINE, Request, digest, read_sense, with_images

FORMAT = 1
CARD = ".card.json"  # suffix of the answers' file
COMPARED = ("model", "samples", "settings")  # fields of a card that must be equal to resume a file
THREADS = 2  # for opening images
MAX_LISTED = 5  # samples with errors that a summary lists


@dataclasses.dataclass(frozen=True)
class OpenedRequest:
    """A request whose files are read, or a description of its problem.

    request: with images as uint8[S,S,3] and arrays in place of files
    length:  slots of its row
    problem: why it cannot be answered
    """

    request: Request
    length: int = 0
    problem: str | None = None


class Answerer(Protocol):
    """An interface that answers samples: `TextAnswerer`, and `mmjax.evaluate.rank.Choices`.

    model:    the model that answers
    rows:     samples of a batch; `answer` pads smaller batches
    window:   number of batches whose samples are sorted by length together; 1 keeps the order
    settings: everything else that the answers depend on, as JSON
    """

    model: Loaded
    rows: int
    window: int
    settings: dict[str, Any]

    def open(self, request: Request) -> OpenedRequest:
        """Opens a request; called in several threads. Raises ValueError or OSError describing its problem."""

    def answer(self, requests: Sequence[Request], first: int) -> list[dict[str, Any]]:
        """Returns the fields of each line besides its id, for 1 to `rows` opened requests. With a window of 1, `first`
        is the number of the first request."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The decoding options of `Loaded.generate`. Raises ValueError naming every value out of range."""

    max_new_tokens: int | None = None  # longest answer in tokens (default: 64, or the benchmark's)
    temperature: float = 0.0  # 0 takes the best token, above 0 samples
    num_beams: int = 1  # above 1: beam search
    top_k: int = 50  # sample from the k best tokens; 0: from all
    top_p: float = 1.0  # sample from the fewest tokens whose probabilities reach p
    repetition_penalty: float = 1.0  # above 1 penalizes tokens that were generated already
    length_penalty: float = 1.0  # in beam search: above 0 favours long answers, below 0 short ones
    min_length: int = 1  # tokens (the dummy included) before an answer may end
    stop: tuple[str, ...] | None = None  # strings that end the answer (default: the model's end symbol)
    seed: int = 0  # of sampling

    def __post_init__(self):
        generation.GenerateConfig(
            max_new_tokens=64 if self.max_new_tokens is None else self.max_new_tokens, num_beams=self.num_beams,
            do_sample=self.temperature > 0, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            repetition_penalty=self.repetition_penalty, length_penalty=self.length_penalty, min_length=self.min_length)

    @property
    def changed(self) -> list[str]:
        """The names of the options that differ from the defaults."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]

    def at_most(self, tokens: int) -> "Decoding":
        """Returns options with this `max_new_tokens` if none is set."""
        return self if self.max_new_tokens is not None else dataclasses.replace(self, max_new_tokens=tokens)

    def settings(self, model: Loaded) -> dict[str, Any]:
        """Returns the arguments of `Loaded.generate`."""
        stop = [model.text.end_sym] if self.stop is None else list(self.stop)
        return vars(self.at_most(64)) | {"stop": stop}


@dataclasses.dataclass(frozen=True)
class TextAnswerer:
    """Answers with generated text; see `Answerer`.

    batch_size: rounded up to a multiple of the mesh's batch shards
    recall:     as in `Loaded.generate`
    text:       fields of `TextConfig` that replace the model's
    """

    model: Loaded
    decoding: Decoding = Decoding()
    batch_size: int = 16
    recall: Recall | None = None
    text: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def window(self) -> int:
        return 1 if self.decoding.temperature > 0 else 4  # sampling depends on a sample's number

    @property
    def rows(self) -> int:
        return rows(self.model, self.batch_size)

    @property
    def settings(self) -> dict[str, Any]:
        settings = self.decoding.settings(self.model) | dataclasses.asdict(
            dataclasses.replace(self.model.text, **self.text))
        if self.recall is not None:
            settings["recall"] = [hashlib.sha256(self.recall.vectors.tobytes()).hexdigest(), self.recall.count,
                                  self.recall.sharpness, self.recall.weight]
        return settings

    def open(self, request: Request) -> OpenedRequest:
        given, request = request, read(request, self.model)
        max_new_tokens = self.decoding.settings(self.model)["max_new_tokens"]
        [length] = self.model.prompt_lengths([request.sample], max_new_tokens, **self.text)
        try:
            self.model.batch([request.sample], **self.text)  # raises for any other problem of the sample
        except ValueError as error:
            raise ValueError(f"{error}{_files_of(given)}") from error
        return OpenedRequest(request, length)

    def answer(self, requests: Sequence[Request], first: int) -> list[dict[str, Any]]:
        samples = [request.sample for request in requests]
        texts = self.model.generate(samples, **self.decoding.settings(self.model), first=first, batch_size=self.rows,
                                    recall=self.recall, **self.text)
        return [{"answer": text} for text in texts]


def _files_of(request: Request) -> str:
    """Returns the end of an error that names the files of the other senses of a request; "" without any."""
    files = [f"{name} {value}" for name, value in request.sample.media.items() if name not in INLINE]
    return f"\nThe files are {', '.join(files)}." if files else ""


def rows(model: Loaded, batch_size: int) -> int:
    """Returns `batch_size` rounded up to a multiple of the mesh's batch shards. Raises ValueError for less than 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: at least 1")
    num_shards = sharding.num_shards(model.mesh, "batch")
    return math.ceil(batch_size / num_shards) * num_shards


def read(request: Request, model: Loaded) -> Request:
    """Returns the request with images and arrays read, and with its images marked in the prompt. Raises ValueError
    naming a file that cannot be read."""
    sample, spec = with_images(request.sample, model.family.prompt), model.config.images
    if spec is not None:
        opened = [images.read(image, spec) for image in sample.images]
        sample = dataclasses.replace(sample, images=opened)
    media = {name: read_sense(name, value) for name, value in sample.media.items()}
    return dataclasses.replace(request, sample=dataclasses.replace(sample, media=media))


# ---- the card ----


def identity(path: str | Path) -> dict[str, Any]:
    """Returns what identifies a checkpoint or run, independent of its path: the SHA-256 of its config (which has those
    of the released files), and of the seals of the newest checkpoints of the run and of those it started from.

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
    """Returns the newest step of a run, and the SHA-256 of its seal, which has the hashes of the checkpoint's files."""
    steps = training_checkpoints.saved(run / "checkpoints")
    if not steps:
        raise FileNotFoundError(f"{run / 'checkpoints'} has no checkpoint.")
    return [steps[-1], files.sha256(run / "checkpoints" / str(steps[-1]) / training_checkpoints.SEAL)]


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def card(requests: Sequence[Request], answerer: Answerer, model: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Returns the content of OUT.card.json. `model` is its `identity`; `more` are further settings of the answers."""
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(answerer.model.params)})
    settings = {"dtypes": dtypes, **answerer.settings, **more}
    return {"format": FORMAT, "model": dict(model), "settings": settings,
            "samples": {"count": len(requests), "sha256": digest(requests)},
            "versions": {name: importlib.metadata.version(name) for name in ("mmjax", "jax")}}


def card_path(out: Path) -> Path:
    return out.with_name(out.name + CARD)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a line for each difference between two cards. Versions are not compared."""
    lines = []
    for part in COMPARED:
        old, new = json.loads(json.dumps([before.get(part, {}), now[part]]))
        lines += [f"{part}.{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in sorted({*old, *new})
                  if old.get(name) != new.get(name)]
    return lines


# ---- the file ----


@contextlib.contextmanager
def _open_locked(out: Path, card: Mapping[str, Any]) -> Iterator[Any]:
    """Opens the file of answers exclusively, for reading and appending, and writes its card if it has none.

    Raises BlockingIOError if another process writes to it, ValueError if it has another card.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a+b", buffering=0) as file, files.exclusive_lock(out, "answering"):
        path = card_path(out)
        if path.is_file():
            if lines := differences(converted.read_card(path), card):
                raise ValueError(f"{out} has answers to other samples, or of another model or settings:\n  "
                                 + "\n  ".join(lines) + "\nUse those of the file; or name another file, or delete it "
                                 "and its card to start over.")
        elif out.stat().st_size:
            raise ValueError(f"{out} exists, but not {path.name}, which describes it. Restore that file, or name "
                             "another output file.")
        else:
            files.replace(path, json.dumps(card, indent=2, default=str) + "\n")
        yield file


def read_answers(content: bytes, ids: Sequence[str], out: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns (the complete lines, their size in bytes). An incomplete last line, of a stopped command, is ignored.

    Raises ValueError naming a line before the last that is not JSON, or whose id is not that of its sample.
    """
    complete = content[:content.rfind(b"\n") + 1]
    parsed: list[dict[str, Any]] = []
    size, lines = 0, complete.split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        try:
            answer = files.parse_json(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{out}, line {number} is not JSON: {error}. Delete it and all lines after it; their "
                             "samples are then answered again.") from error
        expected = ids[number - 1] if number <= len(ids) else None
        if not isinstance(answer, dict) or answer.get("id") != expected or expected is None:
            raise ValueError(f"{out}, line {number} is not the answer to sample {expected!r}. Delete it and all lines "
                             "after it; their samples are then answered again.")
        parsed.append(answer)
        size += len(line) + 1
    return parsed, size


class _AnswerWriter:
    """Writes answers to the file, in the order of the samples."""

    def __init__(self, file: Any, done: Sequence[Mapping[str, Any]], out: Path):
        self._file, self._out, self._waiting = file, out, {}
        self.written = len(done)
        self.errors = [str(line["id"]) for line in done if "error" in line]

    def add(self, lines: Mapping[int, dict[str, Any]]) -> None:
        """Adds lines by the number of their sample; those that are written already are ignored."""
        self._waiting |= {number: line for number, line in lines.items() if number >= self.written}

    def flush(self) -> int:
        """Writes the lines that are next in order to disk; returns their number. Raises OSError naming the file."""
        before, ready = self.written, []
        while (line := self._waiting.pop(self.written, None)) is not None:
            ready.append(json.dumps(line, ensure_ascii=False) + "\n")
            self.errors += [str(line["id"])] if "error" in line else []
            self.written += 1
        remaining = "".join(ready).encode()
        try:
            while remaining:  # on a nearly full disk, `write` may write only a part
                remaining = remaining[self._file.write(remaining) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._out)) from error
        return self.written - before


# ---- answering ----


@dataclasses.dataclass(frozen=True)
class PredictResult:
    """The result of `predict`.

    count, errors: number of lines of the file, and the ids of those with an error
    now, seconds:  number of lines that this call wrote, and its duration
    compiled:      programs that this call compiled
    """

    out: Path
    count: int
    errors: tuple[str, ...]
    now: int
    seconds: float
    compiled: compilation.Compiled


def predict(out: str | Path, requests: Sequence[Request], answerer: Answerer, card: Mapping[str, Any],
            console: Console | None = None) -> PredictResult:
    """Answers every request that has no line in OUT yet. `card` is the result of the function `card`.

    Raises ValueError if OUT is of other samples, another model or other settings, naming the differences, and in a
    program of several processes; BlockingIOError if another process writes to OUT; OSError if it cannot be written, in
    which case the lines written so far stay.
    """
    if jax.process_count() > 1:
        raise ValueError(f"Samples are answered by one process, this is one of {jax.process_count()}: start it on one "
                         "host, where it uses all devices of that host.")
    files.require_local({"out": out})
    out = Path(out)
    console, begin = console or Console(stderr=True, markup=False), time.monotonic()
    with _open_locked(out, card) as file, compilation.count_compilations() as compiled:
        file.seek(0)
        done, size = read_answers(file.read(), [request.id for request in requests], out)
        file.truncate(size)
        writer = _AnswerWriter(file, done, out)
        with Progress(*_columns(), console=console) as bar:
            task = bar.add_task("answering", total=len(requests), completed=len(done))
            for start, window in _windows(requests, len(done), answerer):
                writer.add({start + index: {"id": opened.request.id, "error": opened.problem}
                            for index, opened in enumerate(window) if opened.problem is not None})
                bar.advance(task, writer.flush())
                for indices in _batches(window, answerer):
                    if start + max(indices) < len(done):
                        continue  # answered before the command was stopped
                    writer.add(_answer(start, window, indices, answerer))
                    bar.advance(task, writer.flush())
    seconds = time.monotonic() - begin
    return PredictResult(out, writer.written, tuple(writer.errors), writer.written - len(done), seconds, compiled)


def summary(done: PredictResult) -> Iterator[str]:
    """Yields lines that describe the result of `predict`."""
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
        more = ", …" if len(done.errors) > MAX_LISTED else ""
        ids = ", ".join(done.errors[:MAX_LISTED]) + more
        yield f'{len(done.errors):,} samples could not be answered ({ids}): see "error" in their lines'


def _windows(requests: Sequence[Request], first: int, answerer: Answerer) -> Iterator[tuple[int, list[OpenedRequest]]]:
    """Yields (number of its first sample, opened samples) of each window from that of sample `first` on; the next
    window is prefetched.

    Windows begin at the same samples whatever `first` is, so that a resumed command makes the same batches.
    """
    size, pending = answerer.rows * answerer.window, collections.deque()

    def open_request(request: Request) -> OpenedRequest:
        try:
            return answerer.open(request)
        except (ValueError, OSError) as error:
            return OpenedRequest(request, problem=str(error))

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        try:
            for start in range(first // size * size, len(requests), size):
                window = [pool.submit(open_request, request) for request in requests[start:start + size]]
                pending.append((start, window))
                if len(pending) == 2:
                    yield _result(*pending.popleft())
            while pending:
                yield _result(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _result(start: int, window: Sequence[concurrent.futures.Future[OpenedRequest]]) -> tuple[int, list[OpenedRequest]]:
    return start, [future.result() for future in window]


def _batches(window: Sequence[OpenedRequest], answerer: Answerer) -> Iterator[list[int]]:
    """Yields each batch as indices into the window. With a window above 1, invalid samples are left out and the others
    are sorted by the number of images, the senses and the length."""

    def order(index: int) -> tuple[Any, ...]:
        sample = window[index].request.sample
        return len(sample.images), sorted(sample.media), window[index].length

    indices = list(range(len(window)))
    if answerer.window > 1:
        indices = sorted((index for index in indices if window[index].problem is None), key=order)
    for first in range(0, len(indices), answerer.rows):
        batch = indices[first:first + answerer.rows]
        if any(window[index].problem is None for index in batch):
            yield batch


def _answer(start: int, window: Sequence[OpenedRequest], indices: Sequence[int],
            answerer: Answerer) -> dict[int, dict[str, Any]]:
    """Returns the lines of a batch by the numbers of their samples. A valid sample replaces each invalid one, so that
    the rows of the others do not change."""
    valid = [index for index in indices if window[index].problem is None]
    requests = [window[index if index in valid else valid[0]].request for index in indices]
    answers = dict(zip(indices, answerer.answer(requests, start + min(indices)), strict=True))
    return {start + index: {"id": window[index].request.id, **answers[index]} for index in valid}


class _Rate(ProgressColumn):
    """The progress bar's answers a second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


def _columns() -> tuple[ProgressColumn, ...]:
    return (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeElapsedColumn(),
            TimeRemainingColumn())
