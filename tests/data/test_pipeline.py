import collections
import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmjax.batch import Sample
from mmjax.config import DataConfig, Source
from mmjax.data import images
from mmjax.data.formats import Record
from mmjax.data.packing import Groups
from mmjax.data.pipeline import Order, batches, interleaved
from mmjax.data.text import Slot, Tokenized

ROOT = Path(__file__).parents[2]
RECORDS = [Record(f"r{number}", f"image/{number}.jpg", f"Caption, {number}!") for number in range(10)]
PROMPTS = tuple(f"<Img><ImageHere></Img> Question {number}" for number in range(4))
CFG = DataConfig(path="somewhere", batch_size=4, seed=3, prompts=PROMPTS)
MIXED = DataConfig(mixture=(Source("", "a", 5), Source("", "b", 2), Source("", "c", 0.5)), batch_size=4, seed=3)


def source(letter, count, bad=()):
    return [Record(f"{letter}{number}", f"{letter}/{number}.jpg", f"Caption {number}",
                   problem="it is broken" if number in bad else None) for number in range(count)]


def path(image, random):
    return image


@dataclasses.dataclass(frozen=True)
class Plain:
    """The samples stand for their batch; an image is its path. A sample has as many tokens as its answer letters.

    refused: what is asked or answered so can become no row
    """

    refused: tuple[str, ...] = ()
    image: Any = path
    blank = "blank"
    groups = Groups(1, 9)

    def tokenize(self, sample):
        if {sample.prompt, sample.answer} & set(self.refused):
            raise ValueError("this cannot be used")
        return Tokenized(sample, None, np.zeros((len(sample.answer), len(Slot._fields)), np.int32))

    def batch(self, rows, length):
        assert all(sum(tokenized.length for tokenized in row) <= length for row in rows)
        samples = tuple(tuple(tokenized.sample for tokenized in row) for row in rows)
        return Row(samples, np.ones((len(rows), length), bool))


@dataclasses.dataclass(frozen=True)
class Row:
    """What `Plain` makes of rows; equal where everything in it is."""

    rows: tuple
    loss_mask: np.ndarray

    @property
    def segments(self):
        """int[B,T], of packed rows."""
        return np.stack([np.pad(np.repeat(np.arange(len(row)), [len(sample.answer) for sample in row]), (0, pad),
                                constant_values=-1)
                         for row in self.rows for pad in [self.loss_mask.shape[1] - sum(len(s.answer) for s in row)]])

    def __eq__(self, other):
        return self.rows == other.rows and np.array_equal(self.loss_mask, other.loss_mask)

    def __iter__(self):
        return itertools.chain.from_iterable(self.rows)


def take(count, cfg=CFG, start=0, sources=(RECORDS,), collator=Plain(), process=0, processes=1, position=None):
    position = start * cfg.batch_size if position is None else position
    own = cfg.batch_size // processes
    rows = range(process * own, (process + 1) * own)
    return list(itertools.islice(batches(sources, cfg, collator, start, position, rows), count))


# ---- the order ----


def test_a_batch_is_a_function_of_its_number():
    everything = take(12)
    assert [step.number for step in everything] == list(range(12))
    assert take(12) == everything
    for start in (1, 5, 11):
        assert take(12 - start, start=start) == everything[start:]
    assert take(12, dataclasses.replace(CFG, threads=1)) == everything
    assert take(12, dataclasses.replace(CFG, seed=4)) != everything


def test_the_order_of_runs_made_before_there_were_mixtures():
    numbers = [[int(name[1:]) for name in step.names] for step in take(5)]
    assert numbers == [[4, 6, 9, 7], [5, 3, 1, 8], [2, 0, 8, 1], [3, 7, 9, 0], [5, 4, 2, 6]]


def test_every_record_comes_once_in_each_pass_and_in_another_order():
    names = [name for step in take(15) for name in step.names]  # six passes over ten records
    passes = [tuple(names[first : first + 10]) for first in range(0, 60, 10)]
    assert all(sorted(each) == sorted(record.name for record in RECORDS) for each in passes)
    assert len(set(passes)) == 6
    assert passes[0] != tuple(record.name for record in RECORDS)


def test_a_mixture_keeps_its_ratios_and_its_sources_their_passes():
    sizes = (400, 110, 60)  # Grain's shuffle of very few records is slow
    order = Order(sizes, MIXED)
    placed = [order(position) for position in range(3000)]
    for number, share in enumerate((10 / 15, 4 / 15, 1 / 15)):
        taken = np.cumsum([which == number for which, _ in placed])
        assert np.abs(taken - share * np.arange(1, 3001)).max() < 2  # even all the way
        records = [record for which, record in placed if which == number]
        passes = [tuple(records[first:first + sizes[number]])
                  for first in range(0, len(records) - sizes[number], sizes[number])]
        assert all(sorted(each) == list(range(sizes[number])) for each in passes)
        assert len(set(passes)) > 1


def test_stage_1_draws_115_of_laion_to_14_of_cc_sbu():
    counts = collections.Counter(interleaved(position, (115, 14))[0] for position in range(129 * 7))
    assert counts == {0: 115 * 7, 1: 14 * 7}


def test_the_first_of_a_mixture_has_the_order_it_has_alone():
    alone = [number for _, number in map(Order((10,), CFG), range(30))]
    mixed = [number for which, number in map(Order((10, 7, 7), dataclasses.replace(MIXED, seed=CFG.seed)), range(60))
             if which == 0]
    assert mixed[:30] == alone


# ---- hosts, stops, mixtures, bad records: always the same sequence ----


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_any_number_of_hosts_and_any_stop_give_the_same_sequence(seed, packed):
    random = np.random.default_rng(seed)
    sizes = random.integers(60, 200, size=3)
    sources = [source(letter, size, random.choice(size, size // 5, replace=False))
               for letter, size in zip("abc", sizes, strict=True)]
    ratios = random.uniform(0.2, 5, size=3).round(2)
    mixture = tuple(Source("", letter, ratio) for letter, ratio in zip("abc", ratios.tolist(), strict=True))
    cfg = DataConfig(mixture=mixture, batch_size=int(4 * random.integers(1, 4)), seed=seed, prompts=PROMPTS,
                     random_crop=True, pack_length=40 if packed else None, pack_images=3)
    unfit = tuple(f"Caption {number}" for number in random.integers(0, 60, size=12))
    dead = {f"{letter}/{number}.jpg" for letter in "abc" for number in random.integers(0, 60, size=9)}

    def crop(image, random):
        if image in dead:
            raise OSError(f"{image} is no image")
        return image, random.integers(1 << 30)

    def run(process=0, processes=1, start=0):
        position = whole[start - 1].end if start else 0
        return take(10 - start, cfg, start, sources, Plain(unfit, crop), process, processes, position)

    whole = run()
    assert any(step.bad for step in whole)
    stop = int(random.integers(1, 10))
    assert run(start=stop) == whole[stop:]
    for processes in (2, 4):
        for start in (0, stop):
            parts = [run(process, processes, start) for process in range(processes)]
            for number, step in enumerate(whole[start:]):
                rows = [part[number] for part in parts]
                assert {each.end for each in rows} == {step.end}
                assert {len(each.batch.rows) for each in rows} == {cfg.batch_size // processes}
                assert sum((each.names for each in rows), ()) == step.names
                assert sum((each.batch.rows for each in rows), ()) == step.batch.rows
                masks = [each.batch.loss_mask for each in rows]
                np.testing.assert_array_equal(np.concatenate(masks), step.batch.loss_mask)
                assert in_order(each for part in rows for each in part.bad) == list(step.bad)


def in_order(bad):
    return sorted(bad, key=lambda each: (each.position, each.attempt))


def opened_by(process, processes):
    """The images that a process opens for the first pass over 48 records, in order."""
    opened = []

    def note(image, random):
        opened.append(image)
        return image

    cfg = dataclasses.replace(CFG, batch_size=8, threads=1)
    take(6, cfg, 0, [source("a", 48)], Plain(image=note), process, processes)
    return opened[:48 // processes]  # what it has read ahead is of the next pass


def test_processes_that_read_at_once_see_disjoint_rows_whose_union_is_the_pass():
    code = "import sys; from tests.data.test_pipeline import opened_by; print(*opened_by(int(sys.argv[1]), 2))"
    running = [subprocess.Popen([sys.executable, "-c", code, str(process)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
               for process in range(2)]
    first, second = (process.communicate(timeout=120)[0].split() for process in running)
    assert len(first) == len(second) == 24 and not set(first) & set(second)
    assert {*first, *second} == {f"a/{number}.jpg" for number in range(48)} == set(opened_by(0, 1))
    assert first == opened_by(0, 2)


# ---- samples ----


def test_samples_are_those_of_the_records():
    by_name = {record.name: record for record in RECORDS}
    for step in take(5):
        for name, sample in zip(step.names, step.batch, strict=True):
            assert sample.images == [by_name[name].image]
            assert sample.answer == by_name[name].answer
            assert not sample.turns


def test_one_prompt_for_each_batch():
    used = [{sample.prompt for sample in step.batch} for step in take(60)]
    assert all(len(prompts) == 1 for prompts in used)
    counts = collections.Counter(prompt for prompts in used for prompt in prompts)
    assert counts.keys() == set(PROMPTS)
    assert {sample.prompt for step in take(3, dataclasses.replace(CFG, prompts=())) for sample in step.batch} == {""}


def test_captions_are_cleaned_where_the_configuration_says_so():
    (step,) = take(1, dataclasses.replace(CFG, clean_captions=True))
    assert [sample.answer for sample in step.batch] == [f"caption, {name[1:]}" for name in step.names]


def test_a_batch_of_all_records():
    assert sorted(take(1, dataclasses.replace(CFG, batch_size=10))[0].names) == sorted(r.name for r in RECORDS)


def test_records_with_prompts_of_their_own():
    talk = (("What?", "A dog."), ("Where?", "There."))
    given = [*RECORDS[:5], *(Record(record.name, None, "An answer.", "", "An input.") for record in RECORDS[5:9]),
             Record("r9", "image/9.jpg", "", turns=talk)]
    by_name = {record.name: record for record in given}
    for step in take(5, sources=[given]):
        for name, sample in zip(step.names, step.batch, strict=True):
            if name == "r9":
                assert sample.turns == list(talk)
            elif by_name[name].image is None:
                assert sample == Sample(prompt="", input="An input.", answer="An answer.")
            else:
                assert sample.prompt in PROMPTS and sample.images == [by_name[name].image] and not sample.input


def test_crops_are_drawn_anew_for_each_position_and_the_same_after_a_stop():
    def draw(image, random):
        return None if random is None else random.integers(1 << 30)

    def drawn(*args, **options):
        taken = take(*args, collator=Plain(image=draw), **options)
        return [[sample.images[0] for sample in step.batch] for step in taken]

    cfg = dataclasses.replace(CFG, random_crop=True)
    crops = drawn(6, cfg)
    assert len(np.unique(crops)) == 24
    assert drawn(2, cfg, start=4) == crops[4:]
    assert drawn(1) == [[None] * 4]


@pytest.mark.parametrize(("fit", "random"), [
    ("stretch", None), ("center_crop", None), ("center_crop", 3), ("pad", None)])
def test_a_image_of_the_towers_size_goes_into_a_batch_unchanged(fit, random):
    """A run opens images one by one, and batches are made of what came of it."""
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    ready = images.load(image, 28, fit, random and np.random.default_rng(random))
    np.testing.assert_array_equal(images.load(ready, 28, fit), ready)


# ---- what cannot make batches ----


def test_what_cannot_make_batches():
    with pytest.raises(ValueError, match="somewhere has 10 records: too few for a batch of 11"):
        take(1, dataclasses.replace(CFG, batch_size=11))
    with pytest.raises(ValueError, match="^b: there are no records"):
        take(1, MIXED, sources=[source("a", 9), [], source("c", 9)])


def test_every_prompt_is_tried_before_the_first_batch():
    for prompt in PROMPTS:
        with pytest.raises(ValueError, match="cannot be used"):
            batches([RECORDS], CFG, Plain((prompt,)))
    own = [dataclasses.replace(record, prompt="Its own") for record in RECORDS]
    assert take(1, sources=[own], collator=Plain(PROMPTS[:1]))  # none of the records is asked that
    with pytest.raises(ValueError, match="cannot be used"):
        batches([RECORDS, own], dataclasses.replace(MIXED, mixture=MIXED.mixture[:2]), Plain(("Its own",)))


def test_a_configuration_is_tried_with_records_that_are_whole_and_without_their_images():
    given = [dataclasses.replace(RECORDS[0], answer=""), dataclasses.replace(RECORDS[1], problem="it is broken"),
             dataclasses.replace(RECORDS[2], answer="Odd"), *RECORDS[3:]]

    def unreadable(image, random):
        raise OSError(f"{image} is no image")

    batches([given], CFG, Plain(("Odd",), unreadable))
    with pytest.raises(ValueError, match="cannot be used"):
        batches([given], CFG, Plain(PROMPTS[2:3]))


def test_an_error_that_is_of_no_sample_arrives_at_its_batch():
    class Small(Plain):
        def batch(self, rows, length):
            if len(rows) > 1:
                raise ValueError("too large for the memory")
            return super().batch(rows, length)

    with pytest.raises(ValueError, match="too large for the memory"):
        take(1, collator=Small())


# ---- bad records ----


def test_bad_records_are_replaced_and_named():
    def unreadable(image, random):
        if image == "image/7.jpg":
            raise OSError("image/7.jpg is no image")
        return image

    class Lazy(list):
        def __getitem__(self, number):
            if number == 1:
                raise ValueError("the archive ends early")
            return super().__getitem__(number)

    given = Lazy(RECORDS)
    given[2] = dataclasses.replace(RECORDS[2], problem="its caption is a number")
    given[3] = dataclasses.replace(RECORDS[3], answer=" \n")
    given[4] = dataclasses.replace(RECORDS[4], answer="Odd")
    collator = Plain(("Odd",), unreadable)
    steps = take(15, sources=[given], collator=collator)
    assert {name for step in steps for name in step.names} == {"r0", "r5", "r6", "r8", "r9"}
    problems = {(bad.name, bad.file, bad.problem) for step in steps for bad in step.bad}
    assert problems == {
        ("r7", "image/7.jpg", "image/7.jpg is no image"), ("1", "somewhere", "the archive ends early"),
        ("r2", "image/2.jpg", "its caption is a number"), ("r3", "image/3.jpg", "an answer is empty: ' \\n'"),
        ("r4", "image/4.jpg", "this cannot be used")}
    first = [bad.position for step in steps for bad in step.bad if bad.attempt == 0]
    assert len(first) == len(set(first)) == 30  # each once in each of the six passes
    assert first == sorted(first) and all(bad.source == "somewhere" for step in steps for bad in step.bad)
    whole = take(15)
    for step, other in zip(steps, whole, strict=True):
        for row, (name, wanted) in enumerate(zip(step.names, other.names, strict=True)):
            replaced = any(bad.position == step.number * 4 + row for bad in step.bad)
            assert replaced or name == wanted
    assert take(5, start=10, sources=[given], collator=collator) == steps[10:]


def test_what_takes_the_place_of_a_bad_record_is_of_its_source():
    sources = [source("a", 30, bad=range(0, 30, 2)), source("b", 30), source("c", 30, bad=range(20))]
    names = [name for step in take(60, MIXED, sources=sources) for name in step.names]
    wanted = [name for step in take(60, MIXED, sources=[source(letter, 30) for letter in "abc"]) for name in step.names]
    assert [name[0] for name in names] == [name[0] for name in wanted] and names != wanted
    assert {name for name in names if name[0] == "c"} <= {f"c{number}" for number in range(20, 30)}


def test_a_source_of_nothing_but_bad_records_stops():
    with pytest.raises(ValueError, match=r"None of 20 records of somewhere.*\n  a\d+: it is broken"):
        take(1, sources=[source("a", 50, bad=range(50))])


@pytest.mark.parametrize(("share", "bad", "tried", "stops"), [
    (0.01, 10, 20, False), (0.01, 11, 20, True), (0.01, 20, 2000, False), (0.01, 21, 2000, True), (0.0, 1, 5000, True),
    (0.0, 0, 1, False)])
def test_the_share_of_bad_records(share, bad, tried, stops):
    assert DataConfig(max_bad_share=share).too_bad(bad, tried) == stops


# ---- packed rows ----

PACKED = DataConfig(path="somewhere", batch_size=2, seed=3, pack_length=40, pack_images=9)


def test_packed_rows_take_the_sequence_in_order_and_leave_nothing_out():
    records, order, begin = source("a", 50), Order([50], PACKED), 0
    for step in take(12, PACKED, sources=[records]):
        wanted = [records[order(position)[1]].name for position in range(begin, step.end)]
        assert sorted(step.names) == sorted(wanted)
        assert step.batch.loss_mask.shape == (2, 40) and all(len(row) > 2 for row in step.batch.rows)
        begin = step.end
    assert begin > 50


def test_a_sample_longer_than_a_packed_row_is_replaced():
    given = [*source("a", 9), Record("long", "a/9.jpg", "x" * 41)]
    steps = take(6, PACKED, sources=[given])
    assert "long" not in {name for step in steps for name in step.names}
    assert {bad.problem for step in steps for bad in step.bad} == {
        "41 tokens and 1 images, but a packed row has room for 40 and 9"}


def test_what_takes_the_place_of_a_image_fits_there():
    """All of a row's samples stay where they are, so that other processes need not know."""
    given = [Record(f"a{number}", f"a/{number}.jpg", "x" * (5 + number % 7)) for number in range(60)]

    def unreadable(image, random):
        if int(image[2:-4]) % 4 == 0:
            raise OSError(f"{image} is no image")
        return image

    whole, mended = (take(8, PACKED, sources=[given], collator=collator)
                     for collator in (Plain(), Plain(image=unreadable)))
    replaced = 0
    for step, other in zip(mended, whole, strict=True):
        assert step.end == other.end
        for row, wanted in zip(step.batch.rows, other.batch.rows, strict=True):
            assert len(row) == len(wanted)
            for sample, place in zip(row, wanted, strict=True):
                assert len(sample.answer) <= len(place.answer)
                replaced += sample != place
    assert replaced == len({bad.position for step in mended for bad in step.bad}) > 10


@pytest.mark.parametrize("cfg", [PACKED, dataclasses.replace(PACKED, pack_length=None, length_multiple=1)])
def test_where_nothing_fits_the_words_stay_and_are_not_learnt(cfg):
    given = [Record("short", "short.jpg", "x"), *(Record(f"a{n}", f"a/{n}.jpg", "x" * 30) for n in range(11))]

    def unreadable(image, random):
        if image == "short.jpg":
            raise OSError("short.jpg is no image")
        return image

    steps = take(12, dataclasses.replace(cfg, batch_size=1), sources=[given], collator=Plain(image=unreadable))
    unlearnt = 0
    for step in steps:
        for row, mask in zip(step.batch.rows, step.batch.loss_mask, strict=True):
            hidden = [sample for sample in row if sample.answer == "x"]
            assert all(sample.images == ["blank"] for sample in hidden)
            assert np.count_nonzero(~mask) == len(hidden)
            unlearnt += len(hidden)
    assert unlearnt == sum(bad.attempt == 0 for step in steps for bad in step.bad) > 0
