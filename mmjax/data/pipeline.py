"""From records on disk to batches: a fixed global order, read ahead by threads.

The samples of a run are one endless sequence. Which record stands at a position of it is a function of the
configuration alone, and batch n holds the positions from n·batch_size on, whichever process reads which of them. So a
run goes on where it stopped by asking for the next n, on as many hosts as there are then. Grain gives the shuffle of
each pass over a source, and the reading ahead.

A record that cannot be used never ends a run by itself: another one of its source takes its place, which one depends on
the position too, and `Step.bad` names it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from mmjax.batch import Batch, Sample
from mmjax.config import DataConfig
from mmjax.data.formats import FORMATS, Record, clean_caption

ATTEMPTS = 20  # records tried for one position
TRIED_FIRST = 16  # records of a source with which a configuration is tried before the first batch
# What random numbers are drawn for, beside the seed and the position; 0 would be the same as nothing.
CROP, REPLACEMENT = 1, 2


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that could not be used: where its turn came, and what is wrong with it.

    attempt: 0 for the record of this position, from 1 on for those that were to take its place
    source:  the path of its source
    file:    its picture's, or the archive that holds it; the source's path where that is not known
    """

    position: int
    attempt: int
    source: str
    name: str
    file: str
    problem: str


@dataclasses.dataclass(frozen=True)
class Step:
    """A batch and where it came from; of several processes, this one's rows.

    bad: what was replaced while it was made
    """

    number: int
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


@dataclasses.dataclass(frozen=True)
class _Row:
    position: int
    attempt: int
    record: Record
    sample: Sample


def read(cfg: DataConfig) -> list[Sequence[Record]]:
    """The records of each source; raises what its reader does."""
    return [FORMATS[source.format](source.path) for source in cfg.sources]


def batches(
    sources: Sequence[Sequence[Record]],
    cfg: DataConfig,
    collate: Callable[[list[Sample]], Batch],
    picture: Callable[[Any, np.random.Generator | None], Any],
    start: int = 0,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Step]:
    """Endless batches from number `start` on.

    sources: the records of each of `cfg.sources`
    collate: makes a `Batch` of `Sample`s
    picture: opens a record's picture for a sample, cropped by what draws its crop (None where none is drawn); like
             `collate` it runs in the reading threads
    process: which of so many processes this is. Each makes its own rows of every batch and opens no other's records

    Raises ValueError if there are fewer records than rows in a batch, if the processes cannot share a batch, and
    whatever `collate` raises for every one of a source's first records, with one of the configuration's prompts: that
    is tried before the first batch, with blank pictures. While iterating: whatever `collate` raises for rows that it
    takes one by one, and ValueError when nothing usable is found for a position.
    """
    import grain

    paths = [source.path for source in cfg.sources]
    if empty := [path for path, records in zip(paths, sources, strict=True) if not len(records)]:
        raise ValueError(f"{', '.join(empty)}: there are no records.")
    if (count := sum(map(len, sources))) < cfg.batch_size:
        raise ValueError(f"{', '.join(paths)} has {count} records: too few for a batch of {cfg.batch_size}.")
    if cfg.batch_size % processes:
        raise ValueError(f"data.batch_size = {cfg.batch_size} cannot be shared by {processes} processes.")
    _try_out(sources, cfg, collate)
    order, own = Order([len(records) for records in sources], cfg), cfg.batch_size // processes

    def usable(position: int, prompt: str, first: int, bad: list[BadRecord]) -> _Row:
        """The first record from attempt `first` on that becomes a sample; those before it are put into `bad`."""
        for attempt in range(first, ATTEMPTS):
            source, number = order(position, attempt)
            record = None
            try:
                record = sources[source][number]
                made = sample(record, prompt, cfg)
                random = np.random.default_rng([cfg.seed, position, CROP]) if cfg.random_crop else None
                made = dataclasses.replace(made, images=[picture(image, random) for image in made.images])
            except (ValueError, OSError) as error:
                name, image = (str(number), None) if record is None else (record.name, record.image)
                bad.append(_bad(position, attempt, paths[source], name, image, error))
            else:
                return _Row(position, attempt, record, made)
        wrong = [f"{each.name}: {each.problem}" for each in bad if each.position == position]
        raise ValueError(f"None of {ATTEMPTS} records of {paths[source]} that were tried for one place of a batch can "
                         "be used. The first of them:\n  " + "\n  ".join(wrong[:5]))

    def refused(row: _Row) -> Exception | None:
        try:
            collate([row.sample])
        except (ValueError, OSError) as error:
            return error
        return None

    def step(number: int) -> Step:
        # one prompt for the whole batch, as in the original (minigpt_base.py: preparing_embedding)
        choice = np.random.default_rng([cfg.seed, number]).integers(len(cfg.prompts)) if cfg.prompts else None
        prompt = "" if choice is None else cfg.prompts[choice]
        begin, bad = number * cfg.batch_size + process * own, []
        rows = [usable(position, prompt, 0, bad) for position in range(begin, begin + own)]
        while True:
            try:
                batch = collate([row.sample for row in rows])
                break
            except (ValueError, OSError):
                errors = [refused(row) for row in rows]
                if not any(errors):
                    raise
            for place, (row, error) in enumerate(zip(rows, errors, strict=True)):
                if error is not None:
                    source, _ = order(row.position)
                    bad.append(_bad(row.position, row.attempt, paths[source], row.record.name, row.record.image, error))
                    rows[place] = usable(row.position, prompt, row.attempt + 1, bad)
        bad.sort(key=lambda each: (each.position, each.attempt))
        return Step(number, tuple(row.record.name for row in rows), batch, tuple(bad))

    numbers = grain.MapDataset.range(start, np.iinfo(np.int32).max).map(step)
    ahead = grain.ReadOptions(num_threads=cfg.threads, prefetch_buffer_size=cfg.threads + 2)
    return iter(numbers.to_iter_dataset(ahead))


def sample(record: Record, prompt: str, cfg: DataConfig) -> Sample:
    """What a record becomes, its picture unopened; `prompt` is for those without one of their own.

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


def _try_out(sources: Sequence[Sequence[Record]], cfg: DataConfig, collate: Callable[[list[Sample]], Batch]) -> None:
    """Raises what `collate` raises for all of a source's first records: that is the configuration's fault.

    Records without a prompt of their own are tried with each of the configuration's, the others once.
    """
    blank = np.zeros((32, 32, 3), np.uint8)
    for records in sources:
        first = list(_whole(records, cfg))
        asked = [record for record in first if record.prompt is None]
        asking = [record for record in first if record.prompt is not None]
        for prompt, group in [*((prompt, asked) for prompt in cfg.prompts or ("",)), ("", asking)]:
            errors = []
            for record in group:
                made = sample(record, prompt, cfg)
                try:
                    collate([dataclasses.replace(made, images=[blank] * len(made.images))])
                except ValueError as error:
                    errors.append(error)
                else:
                    break
            else:
                if errors:
                    raise errors[0]


def _whole(records: Sequence[Record], cfg: DataConfig) -> Iterator[Record]:
    """The first records, without those that have something wrong with them (their pictures are not looked at)."""
    for number in range(min(len(records), TRIED_FIRST)):
        try:
            sample(record := records[number], "", cfg)
        except (ValueError, OSError):
            continue
        yield record


def _bad(position: int, attempt: int, source: str, name: str, image: Any, error: Exception) -> BadRecord:
    file = source if image is None else str(getattr(image, "file", image))
    return BadRecord(position, attempt, source, name, file, str(error))
