"""From records on disk to batches: a fixed global order, read ahead by threads.

The samples of a run are one endless sequence. Which record stands at a position of it is a function of the
configuration alone, and a batch holds the positions from where the one before it ended. So a run goes on where it
stopped by asking for the next batch from the next position, on as many hosts as there are then. Grain gives the shuffle
of each pass over a source, and the reading ahead.

A batch is made in two stages. Its plan says which samples stand in which row and how long the rows are. That takes the
samples' words alone, so every process makes the same plan of the whole batch. Then each process opens the images of
its own rows.

A record that cannot be used never ends a run by itself: another one of its source takes its place, which one depends on
the position too, and `Step.bad` names it. One whose image fails is replaced by one that fits where it stood.
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
from mmjax.data.formats import FORMATS, Record, clean_caption
from mmjax.data.packing import Size, pack
from mmjax.data.text import Tokenized

ATTEMPTS = 20  # records tried for one position
TRIED_FIRST = 16  # records of a source with which a configuration is tried before the first batch
# What random numbers are drawn for, beside the seed and the position; 0 would be the same as nothing.
CROP, REPLACEMENT = 1, 2
BOUNDLESS = Size(sys.maxsize, sys.maxsize)


class CollatorProtocol(Protocol):
    """How samples become rows; `mmjax.data.collate.Collator` for a model.

    tokenize: a sample with the slots of its row, by its text alone; raises ValueError if it can become none
    image:    opens a record's image for a sample, cropped by what draws its crop (None where none is drawn)
    blank:    what stands for an image where none can be opened
    batch:    rows of tokenised samples, each one sample where rows are not packed, as rows of that length

    All of them run in the reading threads.
    """

    blank: Any

    def tokenize(self, sample: Sample) -> Tokenized: ...

    def image(self, image: Any, random: np.random.Generator | None) -> Any: ...

    def batch(self, rows: Sequence[Sequence[Tokenized]], length: int) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that could not be used: where its turn came, and what is wrong with it.

    attempt: 0 for the record of this position, from 1 on for those that were to take its place
    source:  the path of its source
    file:    its image's, or the archive that holds it; the source's path where that is not known
    """

    position: int
    attempt: int
    source: str
    name: str
    file: str
    problem: str


@dataclasses.dataclass(frozen=True)
class PipelineBatch:
    """A batch and where it came from; of several processes, this one's rows.

    names: of the records, row by row
    end:   the position behind the batch, of all processes: where the next one begins
    bad:   what was replaced while it was made
    """

    number: int
    end: int
    names: tuple[str, ...]
    batch: Batch
    bad: tuple[BadRecord, ...] = ()


class Order:
    """Which record stands at a position of the global sequence: `order(position) -> (source, record)`, two numbers.

    Every source is shuffled anew for each pass over it, and the sources are interleaved as evenly as their ratios
    allow. sizes: how many records each source has. The first source has the order that it has alone.
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
        """attempt: above 0 for what takes the place of a record that cannot be used; it is of the same source."""
        source, turn = interleaved(position, self._shares)
        if attempt == 0:
            return source, int(self._orders[source][turn])
        random = np.random.default_rng([self._seed, position, REPLACEMENT, attempt])
        return source, int(random.integers(self._sizes[source]))


def interleaved(position: int, shares: Sequence[int]) -> tuple[int, int]:
    """(which of several sequences gives the element at a position, how many it has given before), in exact shares.

    Grain's `MapDataset.mix` does the same after rounding the shares to a hundredth of the smallest.
    """
    rest = sum(shares)
    for number, share in enumerate(shares[:-1]):  # this one's elements are taken out, the others' remain
        rest -= share
        before, after = (place * rest // (rest + share) for place in (position, position + 1))
        if before == after:
            return number, position - before
        position = before
    return len(shares) - 1, position


def read(cfg: DataConfig) -> list[Sequence[Record]]:
    """The records of each source; raises what its reader does, and ValueError for paths that cannot be URLs."""
    files.refuse(cfg.url_problems())
    return [FORMATS[source.format](source.path, source.root) for source in cfg.sources]


def batches(
    sources: Sequence[Sequence[Record]],
    cfg: DataConfig,
    collator: CollatorProtocol,
    start: int = 0,
    position: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[PipelineBatch]:
    """Endless batches.

    sources:         the records of each of `cfg.sources`
    start, position: number of the first batch, and where in the sequence it begins
    rows:            which of every batch this process makes; it opens no other's images. None: all

    Raises ValueError if there are fewer records than rows in a batch, and whatever `collator` raises for every one of a
    source's first records, with one of the configuration's prompts: that is tried before the first batch, with blank
    images. While iterating: ValueError when nothing usable is found for a position, and whatever `collator.batch`
    raises.
    """
    import grain

    paths = [source.path for source in cfg.sources]
    if empty := [path for path, records in zip(paths, sources, strict=True) if not len(records)]:
        raise ValueError(f"{', '.join(empty)}: there are no records.")
    if (count := sum(map(len, sources))) < cfg.batch_size:
        raise ValueError(f"{', '.join(paths)} has {count} records: too few for a batch of {cfg.batch_size}.")
    _try_out(sources, cfg, collator)
    own = range(cfg.batch_size) if rows is None else rows
    steps = _Batches(_Records(sources, cfg, collator), start, position, own)
    ahead = grain.ReadOptions(num_threads=cfg.threads, prefetch_buffer_size=cfg.threads + 2)
    return iter(grain.MapDataset.source(steps).to_iter_dataset(ahead))


def sample(record: Record, prompt: str, cfg: DataConfig) -> Sample:
    """What a record becomes, its image unopened; `prompt` is for those without one of their own.

    Raises ValueError if there is something wrong with the record, or an answer of it is empty.
    """
    if record.problem is not None:
        raise ValueError(record.problem)
    answer = clean_caption(record.answer) if cfg.clean_captions else record.answer
    if not all(words.strip() for words in ([words for _, words in record.turns] or [answer])):
        raise ValueError(f"an answer is empty: {(list(record.turns) or record.answer)!r}")
    return Sample(
        images=[] if record.image is None else [record.image],
        prompt=prompt if record.prompt is None else record.prompt,
        input=record.input,
        answer=answer,
        turns=list(record.turns))


@dataclasses.dataclass(frozen=True)
class _Position:
    """A position of the sequence in a batch: the record that stands there, and those that could not."""

    position: int
    attempt: int
    record: Record
    tokenized: Tokenized
    bad: tuple[BadRecord, ...]

    @property
    def size(self) -> Size:
        """What it takes of a row."""
        return Size(self.tokenized.length, len(self.tokenized.sample.images))

    def with_images(self, images: list[Any], **changes: Any) -> "_Position":
        """The same with its images opened."""
        sample = dataclasses.replace(self.tokenized.sample, images=images)
        return dataclasses.replace(self, tokenized=dataclasses.replace(self.tokenized, sample=sample), **changes)


class _NoneFits(Exception):
    """Among the records drawn for a position were usable ones, but none that fits into its place.

    bad: those that are not usable
    """

    def __init__(self, bad: tuple[BadRecord, ...]):
        super().__init__("no record drawn for this position fits into its place")
        self.bad = bad


class _Records:
    """The sequence of a run's samples."""

    def __init__(self, sources: Sequence[Sequence[Record]], cfg: DataConfig, collator: CollatorProtocol):
        self.sources, self.cfg, self.collator = sources, cfg, collator
        self.order = Order([len(records) for records in sources], cfg)

    @property
    def row(self) -> Size:
        """What an empty row has room for."""
        if self.cfg.pack_length is None:
            return BOUNDLESS
        return Size(self.cfg.pack_length, self.cfg.pack_images)

    def usable(self, position: int, prompt: str, room: Size, attempt: int = 0,
               bad: tuple[BadRecord, ...] = ()) -> _Position:
        """The first record from that attempt on whose words can become a sample that takes no more than `room`.

        bad: what was tried here before. Raises ValueError if none can be used, `_NoneFits` if none of those fits.
        """
        for number in range(attempt, ATTEMPTS):
            source, index = self.order(position, number)
            record = None
            try:
                record = self.sources[source][index]
                place = _Position(position, number, record, self.collator.tokenize(sample(record, prompt, self.cfg)), bad)
                size = place.size
                if not size.within(self.row):
                    raise ValueError(f"{size.tokens} tokens and {size.images} images, but a packed row has room "
                                     f"for {self.row.tokens} and {self.row.images}")
            except (ValueError, OSError) as error:
                bad = (*bad, self.named(position, number, record, error))
            else:
                if size.within(room):
                    return place
        if len(bad) < ATTEMPTS:
            raise _NoneFits(bad)
        path = self.cfg.sources[self.order(position)[0]].path
        wrong = [f"{each.name}: {each.problem}" for each in bad[:5]]
        raise ValueError(f"None of {ATTEMPTS} records of {path} that were tried for one place of a batch can be used. "
                         "The first of them:\n  " + "\n  ".join(wrong))

    def opened(self, place: _Position, prompt: str, room: Size) -> tuple[_Position, bool]:
        """A place with its images open, its record replaced where they cannot be opened; and whether it is learnt.

        It is not where none of the records drawn to replace it fits: then its own words stand there, blank images
        beside them, and no word is a target.
        """
        first = place
        while True:
            random = None
            if self.cfg.random_crop:
                random = np.random.default_rng([self.cfg.seed, place.position, CROP])
            try:
                images = [self.collator.image(image, random) for image in place.tokenized.sample.images]
            except (ValueError, OSError) as error:
                bad = (*place.bad, self.named(place.position, place.attempt, place.record, error))
            else:
                return place.with_images(images), True
            try:
                place = self.usable(place.position, prompt, room, place.attempt + 1, bad)
            except _NoneFits as none:
                blank = [self.collator.blank] * first.size.images
                return first.with_images(blank, bad=none.bad), False

    def named(self, position: int, attempt: int, record: Record | None, error: Exception) -> BadRecord:
        source, index = self.order(position, attempt)
        path = self.cfg.sources[source].path
        name, image = (str(index), None) if record is None else (record.name, record.image)
        file = path if image is None else str(getattr(image, "file", image))
        return BadRecord(position, attempt, path, name, file, str(error))


@dataclasses.dataclass(frozen=True)
class _BatchPlan:
    """A whole batch before its images are opened: the places of each row, the rows' length, where it ends."""

    prompt: str
    rows: list[list[_Position]]
    length: int
    end: int


class _Batches(Sequence[PipelineBatch]):
    """The batches from number `start` and `position` on, each to be asked for once and about in order, by any thread.

    rows: this process's, of every batch
    """

    def __init__(self, records: _Records, start: int, position: int, rows: Sequence[int]):
        self._records, self._cfg, self._start, self._rows = records, records.cfg, start, rows
        self._lock, self._planned, self._end = threading.Lock(), 0, position
        self._plans: dict[int, _BatchPlan] = {}

    def __len__(self) -> int:
        return np.iinfo(np.int32).max

    def __getitem__(self, ahead: Any) -> Any:
        """Step number `start + ahead`."""
        with self._lock:  # where a batch begins is known once the one before it is planned
            while self._planned <= ahead:
                self._plans[self._planned] = self._plan(self._start + self._planned, self._end)
                self._end = self._plans[self._planned].end
                self._planned += 1
            plan = self._plans.pop(ahead)
        return self._step(self._start + ahead, plan)

    def _plan(self, number: int, position: int) -> _BatchPlan:
        cfg, records = self._cfg, self._records
        # one prompt for the whole batch, as in the original (minigpt_base.py: preparing_embedding)
        choice = np.random.default_rng([cfg.seed, number]).integers(len(cfg.prompts)) if cfg.prompts else None
        prompt = "" if choice is None else cfg.prompts[choice]
        following = (records.usable(at, prompt, BOUNDLESS) for at in itertools.count(position))
        if cfg.pack_length is None:
            places = list(itertools.islice(following, cfg.batch_size))
            longest = max(place.size.tokens for place in places)
            length = -(-longest // cfg.length_multiple) * cfg.length_multiple
            return _BatchPlan(prompt, [[place] for place in places], length, position + len(places))
        places = []
        sizes = (places.append(place) or place.size for place in following)
        rows = pack(sizes, records.row, cfg.batch_size)
        return _BatchPlan(prompt, [[places[number] for number in row] for row in rows], cfg.pack_length,
                     position + sum(map(len, rows)))

    def _step(self, number: int, plan: _BatchPlan) -> PipelineBatch:
        rows = [plan.rows[row] for row in self._rows]
        packed = self._cfg.pack_length is not None

        def opened(place: _Position) -> tuple[_Position, bool]:
            return self._records.opened(place, plan.prompt, place.size if packed else Size(plan.length, sys.maxsize))

        made = [[opened(place) for place in row] for row in rows]
        batch = self._records.collator.batch([[place.tokenized for place, _ in row] for row in made], plan.length)
        for row, places in enumerate(made):
            for segment, (_, learnt) in enumerate(places):
                if not learnt:
                    here = batch.segments[row] == segment if packed else slice(None)
                    batch.loss_mask[row, here] = False
        places = [place for row in made for place, _ in row]
        bad = sorted((each for place in places for each in place.bad), key=lambda each: (each.position, each.attempt))
        return PipelineBatch(number, plan.end, tuple(place.record.name for place in places), batch, tuple(bad))


def _try_out(sources: Sequence[Sequence[Record]], cfg: DataConfig, collator: CollatorProtocol) -> None:
    """Raises what `collator` raises for all of a source's first records: that is the configuration's fault.

    Records without a prompt of their own are tried with each of the configuration's, the others once.
    """
    for records in sources:
        first = list(_whole(records, cfg))
        asked = [record for record in first if record.prompt is None]
        asking = [record for record in first if record.prompt is not None]
        for prompt, group in [*((prompt, asked) for prompt in cfg.prompts or ("",)), ("", asking)]:
            errors = []
            for record in group:
                made = sample(record, prompt, cfg)
                blank = [collator.blank] * len(made.images)
                try:
                    tokenized = collator.tokenize(made)
                    opened = dataclasses.replace(tokenized, sample=dataclasses.replace(made, images=blank))
                    collator.batch([[opened]], tokenized.length)
                except ValueError as error:
                    errors.append(error)
                else:
                    break
            else:
                if errors:
                    raise errors[0]


def _whole(records: Sequence[Record], cfg: DataConfig) -> Iterator[Record]:
    """The first records, without those that have something wrong with them (their images are not looked at)."""
    for number in range(min(len(records), TRIED_FIRST)):
        try:
            sample(record := records[number], "", cfg)
        except (ValueError, OSError):
            continue
        yield record
