import collections
import dataclasses
import itertools

import numpy as np
import pytest

from mmjax.batch import Sample
from mmjax.config import DataConfig
from mmjax.data.formats import Record
from mmjax.data.pipeline import batches

RECORDS = [Record(f"r{number}", f"image/{number}.jpg", f"Caption, {number}!") for number in range(10)]
PROMPTS = tuple(f"<Img><ImageHere></Img> Question {number}" for number in range(4))
CFG = DataConfig(path="somewhere", batch_size=4, seed=3, prompts=PROMPTS)


def collate(samples, random):
    """The samples stand for their batch."""
    return samples


def take(count, cfg=CFG, start=0, records=RECORDS, collate=collate):
    return list(itertools.islice(batches(records, cfg, collate, start), count))


def test_a_batch_is_a_function_of_its_number():
    everything = take(12)
    assert [step.number for step in everything] == list(range(12))
    assert take(12) == everything
    for start in (1, 5, 11):
        assert take(12 - start, start=start) == everything[start:]
    assert take(12, dataclasses.replace(CFG, threads=1)) == everything
    assert take(12, dataclasses.replace(CFG, seed=4)) != everything


def test_every_record_comes_once_in_each_pass_and_in_another_order():
    names = [name for step in take(15) for name in step.names]  # six passes over ten records
    passes = [tuple(names[first : first + 10]) for first in range(0, 60, 10)]
    assert all(sorted(each) == sorted(record.name for record in RECORDS) for each in passes)
    assert len(set(passes)) == 6
    assert passes[0] != tuple(record.name for record in RECORDS)


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


def test_what_cannot_make_batches():
    with pytest.raises(ValueError, match="somewhere has 10 records: too few for a batch of 11"):
        take(1, dataclasses.replace(CFG, batch_size=11))


def refuse(prompt):
    def collate(samples, random):
        if any(sample.prompt == prompt for sample in samples):
            raise ValueError(f"{prompt!r} cannot be used")
        return samples

    return collate


def test_every_prompt_is_tried_before_the_first_batch():
    for prompt in PROMPTS:
        with pytest.raises(ValueError, match=f"{prompt!r} cannot be used"):
            batches(RECORDS, CFG, refuse(prompt))
    own = [dataclasses.replace(record, prompt="Its own") for record in RECORDS]
    assert take(1, records=own, collate=refuse(PROMPTS[0]))  # none of the records is asked that


def test_records_with_prompts_of_their_own():
    given = [*RECORDS[:5], *(Record(record.name, None, "An answer.", "", "An input.") for record in RECORDS[5:])]
    by_name = {record.name: record for record in given}
    for step in take(5, records=given):
        for name, sample in zip(step.names, step.batch, strict=True):
            if by_name[name].image is None:
                assert sample == Sample(prompt="", input="An input.", answer="An answer.")
            else:
                assert sample.prompt in PROMPTS and sample.images == [by_name[name].image] and not sample.input


def test_crops_are_drawn_anew_for_each_batch_and_the_same_after_a_stop():
    def draw(samples, random):
        return None if random is None else random.integers(1 << 30, size=len(samples)).tolist()

    cfg = dataclasses.replace(CFG, random_crop=True)
    drawn = [step.batch for step in take(6, cfg, collate=draw)]
    assert len(np.unique(drawn)) == 24
    assert [step.batch for step in take(2, cfg, start=4, collate=draw)] == drawn[4:]
    assert [step.batch for step in take(2, collate=draw)] == [None, None]


def test_an_error_in_a_reading_thread_arrives_at_its_batch():
    def unreadable(samples, random):
        if any(sample.images == ["image/7.jpg"] for sample in samples):
            raise ValueError("image/7.jpg is not a picture")
        return samples

    first = next(step.number for step in take(3) if "r7" in step.names)
    stream = batches(RECORDS, CFG, unreadable)
    assert [next(stream).number for _ in range(first)] == list(range(first))
    with pytest.raises(ValueError, match="image/7.jpg is not a picture"):
        next(stream)
