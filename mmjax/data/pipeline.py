"""Makes batches of records on disk, in a fixed global order, with prefetching threads.

The samples of a run are one endless sequence. The record at a position depends only on the configuration, and a batch
starts at the position where the previous one ended. So a run resumes by reading from the next position, on any number
of hosts. Grain shuffles each pass over a source and prefetches.

A batch is made in two stages. Its plan assigns samples to rows and sets the length of the rows. It needs only the text
of the samples, so every process makes the same plan of the whole batch. Then each process opens the images of its own
rows.

A record that cannot be used does not end a run: another record of its source, which also depends on the position,
replaces it, and `PipelineBatch.bad` names it. A record whose image cannot be read is replaced by one that fits into the
same slots.
"""

import dataclasses
import itertools
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from mmjax import files
from mmjax.batch import Batch, Sample
from mmjax.config import DataConfig
from mmjax.data import formats
from mmjax.data.formats import Record, clean_caption
from mmjax.data.packing import Groups, Size, pack
from mmjax.data.text import Tokenized

ATTEMPTS = 20  # records tried for one position
TRIED_FIRST = 16  # records of a source with which a configuration is tried before the first batch
CROP, REPLACEMENT = 1, 2  # purpose of random numbers, part of their seed; not 0, which would not change it
BOUNDLESS = Size(sys.maxsize, sys.maxsize)


class CollatorProtocol(Protocol):
    """Makes rows of samples; `mmjax.data.collate.Collator` implements it.

    tokenize: returns a sample with the slots of its row, from its text alone; raises ValueError if that fails
    image:    opens a record's image; `random` draws its crop, None for no random crop
    blank:    the image used where none can be opened
    groups:   of packed rows
    batch:    returns the batch of rows of tokenised samples (one a row if rows are not packed), of that length

    All of them run in the reading threads.
    """

    blank: Any
    groups: Groups | None

    def tokenize(self, sample: Sample) -> Tokenized: ...

    def image(self, image: Any, random: np.random.Generator | None) -> Any: ...

    def batch(self, rows: Sequence[Sequence[Tokenized]], length: int) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that could not be used, with its position and the problem.

    attempt: 0 for the record of this position, from 1 on for its replacements
    source:  path of its source
    file:    path of its image, or of the archive with it; the source's path if that is not known
    """

    position: int
    attempt: int
    source: str
    name: str
    file: str
    problem: str


@dataclasses.dataclass(frozen=True)
class PipelineBatch:
    """This process's rows of a batch, and their origin.

    names:  of the records, row by row
    end:    position after the whole batch, where the next one begins
    bad:    records that were replaced
    images: number of images in the rows
    """

    number: int
    end: int
    names: tuple[str, ...]
    batch: Batch
    bad: tuple[BadRecord, ...] = ()
    images: int = 0


class Order:
    """Maps a position of the global sequence to the indices of a source and its record: `(source, record)`.

    Every source is shuffled anew for each pass over it, and the sources are interleaved as evenly as their ratios
    allow. The first source is in the same order as without the others. sizes: number of records of each source
    """

    def __init__(self, sizes: Sequence[int], cfg: DataConfig):
        import grain

        self._sizes, self._seed = sizes, cfg.seed
        ratios = [Fraction(str(source.ratio)) for source in cfg.sources]
        whole = math.lcm(*(ratio.denominator for ratio in ratios))
        self._shares = [int(ratio * whole) for ratio in ratios]
        seeds = [int(np.random.SeedSequence([cfg.seed, number]).generate_state(1)[0]) for number in range(len(sizes))]
        seeds[0] = cfg.seed
        self._orders = [grain.MapDataset.range(size).seed(seed).shuffle().repeat()
                        for size, seed in zip(sizes, seeds, strict=True)]

    def __call__(self, position: int, attempt: int = 0) -> tuple[int, int]:
        """attempt: above 0 for the replacement, of the same source, of a record that cannot be used"""
        source, turn = interleaved(position, self._shares)
        if attempt == 0:
            return source, int(self._orders[source][turn])
        random = np.random.default_rng([self._seed, position, REPLACEMENT, attempt])
        return source, int(random.integers(self._sizes[source]))


def interleaved(position: int, shares: Sequence[int]) -> tuple[int, int]:
    """Returns (index of the sequence with the element at a position, number of its previous elements).

    The shares are exact; Grain's `MapDataset.mix` rounds them to a hundredth of the smallest.
    """
    rest = sum(shares)
    for number, share in enumerate(shares[:-1]):  # removes the elements of this sequence
        rest -= share
        before, after = (end * rest // (rest + share) for end in (position, position + 1))
        if before == after:
            return number, position - before
        position = before
    return len(shares) - 1, position


def read(cfg: DataConfig) -> list[Sequence[Record]]:
    """Returns the records of each source. Raises ValueError for unsupported URLs, and the errors of the readers."""
    files.refuse(cfg.url_problems())
    return [formats.read(source) for source in cfg.sources]


def batches(
    sources: Sequence[Sequence[Record]],
    cfg: DataConfig,
    collator: CollatorProtocol,
    start: int = 0,
    position: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[PipelineBatch]:
    """Returns an endless iterator of batches.

    sources:         the records of each of `cfg.sources`
    start, position: number of the first batch, and its position in the sequence
    rows:            indices of the rows of every batch that this process makes and whose images it opens; None: all

    Raises ValueError if there are fewer records than rows in a batch. Before the first batch, tries the first records
    of each source with each of the configuration's prompts and blank images, and raises the error of `collator` if all
    fail. While iterating, raises ValueError if no usable record is found for a position, and the errors of
    `collator.batch`.
    """
    import grain

    paths = [source.path for source in cfg.sources]
    if empty := [path for path, records in zip(paths, sources, strict=True) if not len(records)]:
        raise ValueError(f"{', '.join(empty)}: there are no records.")
    if (count := sum(map(len, sources))) < cfg.batch_size:
        raise ValueError(f"{', '.join(paths)} has {count} records: too few for a batch of {cfg.batch_size}.")
    _try_out(sources, cfg, collator)
    local_rows = range(cfg.batch_size) if rows is None else rows
    dataset = _Batches(_Records(sources, cfg, collator), start, position, local_rows)
    options = grain.ReadOptions(num_threads=cfg.threads, prefetch_buffer_size=cfg.threads + 2)
    return iter(grain.MapDataset.source(dataset).to_iter_dataset(options))


def sample(record: Record, prompt: str, cfg: DataConfig) -> Sample:
    """Returns the sample of a record, without opening its image. prompt: for records without a prompt

    Raises ValueError if the record has a problem, or an empty answer.
    """
    if record.problem is not None:
        raise ValueError(record.problem)
    answer = clean_caption(record.answer) if cfg.clean_captions else record.answer
    if not all(text.strip() for text in ([text for _, text in record.turns] or [answer])):
        raise ValueError(f"an answer is empty: {(list(record.turns) or record.answer)!r}")
    return Sample(
        images=list(record.images),
        prompt=prompt if record.prompt is None else record.prompt,
        input=record.input,
        answer=answer,
        turns=list(record.turns))


@dataclasses.dataclass(frozen=True)
class _Position:
    """A position of the sequence: its usable record, and those that could not be used."""

    position: int
    attempt: int
    record: Record
    tokenized: Tokenized
    bad: tuple[BadRecord, ...]

    @property
    def size(self) -> Size:
        """The size of the sample in a row."""
        return Size(self.tokenized.length, len(self.tokenized.sample.images))

    def with_images(self, images: list[Any], **changes: Any) -> "_Position":
        """Returns the position with opened images."""
        sample = dataclasses.replace(self.tokenized.sample, images=images)
        return dataclasses.replace(self, tokenized=dataclasses.replace(self.tokenized, sample=sample), **changes)


class _NoneFits(Exception):
    """The records drawn for a position include usable ones, but none that fits into its slots.

    bad: those that are not usable
    """

    def __init__(self, bad: tuple[BadRecord, ...]):
        super().__init__("no record drawn for this position fits into its slots")
        self.bad = bad


class _Records:
    """The sequence of a run's samples."""

    def __init__(self, sources: Sequence[Sequence[Record]], cfg: DataConfig, collator: CollatorProtocol):
        self.sources, self.cfg, self.collator = sources, cfg, collator
        self.order = Order([len(records) for records in sources], cfg)

    @property
    def row(self) -> Size:
        """The size of an empty row; the images are those of an empty group."""
        if self.cfg.pack_length is None:
            return BOUNDLESS
        return Size(self.cfg.pack_length, self.collator.groups.images)

    def usable(self, position: int, prompt: str, room: Size, attempt: int = 0,
               bad: tuple[BadRecord, ...] = ()) -> _Position:
        """Returns the first record, starting with that attempt, whose text makes a sample that fits into `room`.

        bad: records tried before. Raises ValueError if none can be used, `_NoneFits` if none that can be used fits.
        """
        for number in range(attempt, ATTEMPTS):
            source, index = self.order(position, number)
            record = None
            try:
                record = self.sources[source][index]
                tokenized = self.collator.tokenize(sample(record, prompt, self.cfg))
                result = _Position(position, number, record, tokenized, bad)
                size = result.size
                if not size.within(self.row):
                    raise ValueError(f"{size.tokens} tokens and {size.images} images, but a packed row has room "
                                     f"for {self.row.tokens} and {self.row.images}")
            except (ValueError, OSError) as error:
                bad = (*bad, self.bad_record(position, number, record, error))
            else:
                if size.within(room):
                    return result
        if len(bad) < ATTEMPTS:
            raise _NoneFits(bad)
        path = self.cfg.sources[self.order(position)[0]].path
        wrong = [f"{each.name}: {each.problem}" for each in bad[:5]]
        raise ValueError(f"None of {ATTEMPTS} records of {path} that were tried for one position of a batch can be "
                         "used. The first of them:\n  " + "\n  ".join(wrong))

    def open_images(self, position: _Position, prompt: str, room: Size) -> tuple[_Position, bool]:
        """Returns a position with opened images, and whether it has targets. Replaces records whose images fail.

        It has none if no replacement fits: then it keeps its text, with blank images, and no token is a target.
        """
        first = position
        while True:
            random = None
            if self.cfg.random_crop:
                random = np.random.default_rng([self.cfg.seed, position.position, CROP])
            try:
                images = [self.collator.image(image, random) for image in position.tokenized.sample.images]
            except (ValueError, OSError) as error:
                failed = self.bad_record(position.position, position.attempt, position.record, error)
                bad = (*position.bad, failed)
            else:
                return position.with_images(images), True
            try:
                position = self.usable(position.position, prompt, room, position.attempt + 1, bad)
            except _NoneFits as none:
                blank = [self.collator.blank] * first.size.images
                return first.with_images(blank, bad=none.bad), False

    def bad_record(self, position: int, attempt: int, record: Record | None, error: Exception) -> BadRecord:
        source, index = self.order(position, attempt)
        path = self.cfg.sources[source].path
        name, image = (str(index), None) if record is None else (record.name, record.image)
        file = path if image is None else str(getattr(image, "file", image))
        return BadRecord(position, attempt, path, name, file, str(error))


@dataclasses.dataclass(frozen=True)
class _BatchPlan:
    """The plan of a whole batch before images are opened: prompt, rows and their length, end position."""

    prompt: str
    rows: list[list[_Position]]
    length: int
    end: int


class _Batches(Sequence[PipelineBatch]):
    """The batches from number `start` and `position` on. Threads may each read any of them once, roughly in order.

    rows: indices of this process's rows of every batch
    """

    def __init__(self, records: _Records, start: int, position: int, rows: Sequence[int]):
        self._records, self._cfg, self._start, self._rows = records, records.cfg, start, rows
        self._lock, self._planned, self._end = threading.Lock(), 0, position
        self._plans: dict[int, _BatchPlan] = {}

    def __len__(self) -> int:
        return np.iinfo(np.int32).max

    def __getitem__(self, ahead: Any) -> Any:
        """Returns batch number `start + ahead`."""
        with self._lock:  # a batch begins where the planned previous one ends
            while self._planned <= ahead:
                self._plans[self._planned] = self._plan(self._start + self._planned, self._end)
                self._end = self._plans[self._planned].end
                self._planned += 1
            plan = self._plans.pop(ahead)
        return self._batch(self._start + ahead, plan)

    def _plan(self, number: int, position: int) -> _BatchPlan:
        cfg, records = self._cfg, self._records
        # one prompt for the whole batch, as in the original (minigpt_base.py: preparing_embedding)
        choice = np.random.default_rng([cfg.seed, number]).integers(len(cfg.prompts)) if cfg.prompts else None
        prompt = "" if choice is None else cfg.prompts[choice]
        following = (records.usable(at, prompt, BOUNDLESS) for at in itertools.count(position))
        if cfg.pack_length is None:
            positions = list(itertools.islice(following, cfg.batch_size))
            longest = max(each.size.tokens for each in positions)
            length = -(-longest // cfg.length_multiple) * cfg.length_multiple
            return _BatchPlan(prompt, [[each] for each in positions], length, position + len(positions))
        positions = []
        sizes = (positions.append(each) or each.size for each in following)
        rows = pack(sizes, records.row, cfg.batch_size, records.collator.groups.rows)
        return _BatchPlan(prompt, [[positions[number] for number in row] for row in rows], cfg.pack_length,
                          position + sum(map(len, rows)))

    def _batch(self, number: int, plan: _BatchPlan) -> PipelineBatch:
        rows = [plan.rows[row] for row in self._rows]
        packed = self._cfg.pack_length is not None

        def open_images(position: _Position) -> tuple[_Position, bool]:
            room = position.size if packed else Size(plan.length, sys.maxsize)
            return self._records.open_images(position, plan.prompt, room)

        opened = [[open_images(position) for position in row] for row in rows]
        batch = self._records.collator.batch([[each.tokenized for each, _ in row] for row in opened], plan.length)
        for row, positions in enumerate(opened):
            for segment, (_, has_targets) in enumerate(positions):
                if not has_targets:
                    slots = batch.segments[row] == segment if packed else slice(None)
                    batch.loss_mask[row, slots] = False
        positions = [each for row in opened for each, _ in row]
        bad = sorted((bad for each in positions for bad in each.bad), key=lambda bad: (bad.position, bad.attempt))
        images = sum(each.size.images for each in positions)
        return PipelineBatch(number, plan.end, tuple(each.record.name for each in positions), batch, tuple(bad), images)


def _try_out(sources: Sequence[Sequence[Record]], cfg: DataConfig, collator: CollatorProtocol) -> None:
    """Raises the error of `collator` if all of a source's first records fail, because of the configuration.

    Records without a prompt are tried with each prompt of the configuration, the others once.
    """
    for records in sources:
        first = list(_sound(records, cfg))
        without_prompt = [record for record in first if record.prompt is None]
        with_prompt = [record for record in first if record.prompt is not None]
        for prompt, group in [*((prompt, without_prompt) for prompt in cfg.prompts or ("",)), ("", with_prompt)]:
            errors = []
            for record in group:
                tried = sample(record, prompt, cfg)
                blank = [collator.blank] * len(tried.images)
                try:
                    tokenized = collator.tokenize(tried)
                    opened = dataclasses.replace(tokenized, sample=dataclasses.replace(tried, images=blank))
                    collator.batch([[opened]], tokenized.length)
                except ValueError as error:
                    errors.append(error)
                else:
                    break
            else:
                if errors:
                    raise errors[0]


def _sound(records: Sequence[Record], cfg: DataConfig) -> Iterator[Record]:
    """Yields those of the first records that have no problem; images are not checked."""
    for number in range(min(len(records), TRIED_FIRST)):
        try:
            sample(record := records[number], "", cfg)
        except (ValueError, OSError):
            continue
        yield record
