"""Layouts of JSON files beside images: what each row becomes."""

import json
import pickle

import pytest

from benchmarks import hostile
from mmjax.data.formats import FORMATS, Record, coco_captions, gqa, invrefcoco, jsonl, llava_instruct, refcoco, vqa
from mmjax.data.formats.grounding import IDENTIFY, REFER, box_text
from tests.data import layouts

IMAGE = "<Img><ImageHere></Img>"


@pytest.mark.parametrize("name", FORMATS)
def test_every_layout_is_read(name, tmp_path):
    records = FORMATS[name](str(getattr(layouts, name)(tmp_path)))
    assert len(records) == len(list(records)) == layouts.COUNT
    assert all(record.problem is None and record.answer for record in records)
    assert len({record.name for record in records}) == layouts.COUNT
    assert list(pickle.loads(pickle.dumps(records))) == list(records)  # reading may be done by other processes
    assert records[-1] == records[layouts.COUNT - 1] == records[1:][-1]
    with pytest.raises(IndexError):
        records[layouts.COUNT]


def test_conversations(tmp_path):
    """The first question's image goes in front, and the questions end with a space (llava_dataset.py)."""
    record = llava_instruct(str(layouts.llava_instruct(tmp_path)))[1]
    turns = ((f"{IMAGE} What is it? ", layouts.CAPTIONS[1]), ("And? ", "No more."))
    assert record == Record("llava_instruct_150k.json:1", str(tmp_path / "1.jpg"), layouts.CAPTIONS[1], turns[0][0],
                            turns=turns)


def conversation(tmp_path, *words, **row):
    said = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(words)]
    good = {"conversations": [{"value": "Name a dog."}, {"value": "Rex"}]}
    record, _ = llava_instruct(str(layouts.put_json(tmp_path / "some.json", [{"conversations": said, **row}, good])))
    return record


def test_conversations_of_one_pair_are_a_prompt_and_an_answer(tmp_path):
    record = conversation(tmp_path, "Name\nit.\n<image>", "A dog.", image="a.jpg")
    assert (record.prompt, record.answer, record.turns) == (f"{IMAGE} Nameit. ", "A dog.", ())


def test_conversations_without_a_image(tmp_path):
    record = conversation(tmp_path, "Sort\nthis.", "a, b", "And?", "c", id="7")
    assert record == Record("some.json:0", None, "a, b", "Sort\nthis.",
                            turns=(("Sort\nthis.", "a, b"), ("And?", "c")))


def test_minigpt4_names_images_by_their_id(tmp_path):
    record = conversation(tmp_path, "<image> What?", "A dog.", id="000000000009")
    assert record.image == str(tmp_path / "COCO_train2014_000000000009.jpg")


@pytest.mark.parametrize(("words", "problem"), [
    (("What?",), "an answer to every question"),
    (("What?", "A", "And?"), "an answer to every question"),
    ((), "an answer to every question"),
    (("What?", " "), "'value' is empty"),
    (("What?", None), "'value' must be str, got None"),
    (("What?", "A", "<image> And?", "B"), "shows an image that is not there"),
    (("What?", "A", "<ImageHere> And?", "B"), "shows an image that is not there"),
    (("<ImageHere> and <ImageHere>", "A"), "has 2 <ImageHere>"),
])
def test_conversations_that_cannot_be_used(words, problem, tmp_path):
    assert problem in conversation(tmp_path, *words, image="a.jpg").problem


def test_speakers_take_turns(tmp_path):
    rows = [{"conversations": [{"from": who, "value": "words"} for who in roles]}
            for roles in (("human", "human"), ("human", "gpt"))]
    path = layouts.put_json(tmp_path / "some.json", rows)
    assert "in turn, but is not in message 1" in llava_instruct(str(path))[0].problem


def test_lines(tmp_path):
    rows = [{"image": "a.jpg", "caption": "A dog."}, {"image": "b/c.jpg", "prompt": "What?", "answer": "A cat."},
            {"image": "a.jpg", "prompt": "See <Img><ImageHere></Img>!\nWhat?", "answer": "It."},
            {"prompt": "Name a dog.", "answer": "Rex"}, {"image": "a.jpg", "prompt": "Look:\n<image>", "answer": "x"}]
    path = layouts.put(tmp_path / "some.jsonl", "\n".join(map(json.dumps, rows)) + "\n \r\n")
    name = "some.jsonl:{}".format
    assert list(jsonl(str(tmp_path))) == list(jsonl(str(path))) == [
        Record(name(0), str(tmp_path / "a.jpg"), "A dog."),
        Record(name(1), str(tmp_path / "b/c.jpg"), "A cat.", f"{IMAGE} What? "),
        Record(name(2), str(tmp_path / "a.jpg"), "It.", "See <Img><ImageHere></Img>!\nWhat?"),
        Record(name(3), None, "Rex", "Name a dog."),
        Record(name(4), str(tmp_path / "a.jpg"), "x", f"{IMAGE} Look: ")]


def test_images_below_another_root(tmp_path):
    for name in ("near/b.jpg", "far/a.jpg"):
        layouts.put(tmp_path / name, "")
    path = layouts.put_json(tmp_path / "some.jsonl", {"image": "a.jpg", "caption": "A dog."})
    assert jsonl(str(path), root=str(tmp_path / "far"))[0].image == str(tmp_path / "far" / "a.jpg")
    inside = layouts.put_json(tmp_path / "more.jsonl", {"image": str(tmp_path / "far/a.jpg"), "caption": "A dog."})
    assert jsonl(str(inside))[0].image == str(tmp_path / "far/a.jpg")  # absolute, but below the root
    with pytest.raises(ValueError, match=f"(?s)None of 1 rows .* is not below .*expected below {tmp_path}/near. If"):
        jsonl(str(inside), root=str(tmp_path / "near"))


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"parquet"}))  # which may hold images, or name them
def test_every_reader_takes_a_root_or_refuses_it(name, tmp_path):
    path = str(getattr(layouts, name)(tmp_path / "data"))
    (tmp_path / "empty").mkdir()
    message = f"(?s)None of 3 rows .*expected below {tmp_path}/empty"
    if name in ("webdataset", "tfds"):
        message = "leave out the root"
    with pytest.raises(ValueError, match=message):
        FORMATS[name](path, str(tmp_path / "empty"))


def test_coco_captions(tmp_path):
    path = layouts.coco_captions(tmp_path)
    expected = Record("captions_train2017.json:2", str(tmp_path / "train2017" / "000000000002.jpg"),
                      layouts.CAPTIONS[2])
    assert coco_captions(str(path))[2] == coco_captions(str(path.parent))[2] == expected


def test_coco_captions_of_karpathys_split(tmp_path):
    rows = [{"image": "val2014/COCO_val2014_000000000009.jpg", "caption": "A dog.", "image_id": "coco_9"}]
    layouts.put(tmp_path / rows[0]["image"], "")
    path = layouts.put_json(tmp_path / "coco_karpathy_train.json", rows)
    assert coco_captions(str(path))[0] == Record("coco_karpathy_train.json:0", str(tmp_path / rows[0]["image"]),
                                                 "A dog.")


def test_questions(tmp_path):
    """Texts are cleaned, the answer is the most frequent one, and the instructions take turns."""
    records = vqa(str(layouts.vqa(tmp_path)))
    assert records[:2] == vqa(str(tmp_path))[:2] == [
        Record("v2_OpenEnded_mscoco_train2014_questions.json:0",
               str(tmp_path / "train2014/COCO_train2014_000000000000.jpg"), "yes", f"{IMAGE} [vqa] what is 0? "),
        Record("v2_OpenEnded_mscoco_train2014_questions.json:1",
               str(tmp_path / "train2014/COCO_train2014_000000000001.jpg"), "yes",
               f"{IMAGE} [vqa] Based on the image, respond to this question with a short answer: what is 1? ")]


def test_questions_in_one_list(tmp_path):
    rows = [{"image": "val2014/a.jpg", "question": "What?", "answer": ["b", "a", "a", ""]},
            {"image": "val2014/a.jpg", "question": "What {}?", "answer": "b"},
            {"image": "val2014/a.jpg", "question": "What?", "answer": []},
            {"image": "val2014/a.jpg", "question": "...", "answer": ["a"]}]
    layouts.put(tmp_path / "val2014/a.jpg", "")
    records = vqa(str(layouts.put_json(tmp_path / "vqa_train.json", rows)))
    assert [record.answer for record in records] == ["a", "b", "", ""]
    assert records[1].prompt.endswith("with a short answer: what {}? ")
    assert [record.problem is None for record in records] == [True, True, False, False]
    assert records[0].image == str(tmp_path / "val2014/a.jpg")


def test_gqa(tmp_path):
    path = layouts.gqa(tmp_path)
    expected = Record("train_balanced_questions.json:2", str(tmp_path / "images/n2.jpg"), "yes",
                      f"{IMAGE} [vqa] is it 2? ")
    assert gqa(str(path))[2] == expected
    rows = [{"image": "n2.jpg", "question": "Is it 2?", "answer": "Yes."}]
    listed = gqa(str(layouts.put_json(tmp_path / "more_questions.json", rows)))[0]
    assert (listed.image, listed.answer) == (expected.image, "yes")


def test_references(tmp_path):
    """int(left / width · 100) and so on, as coco_dataset.py: ReferCOCODataset has it; of the split train alone."""

    def change(rows):
        rows[0]["split"] = "val"
        rows[1]["sentences"] *= 2

    path = str(layouts.refcoco(tmp_path, change))
    image, box = str(tmp_path / "train2014/COCO_train2014_000000000001.jpg"), "{<12><40><50><90>}"
    there = refcoco(path)
    assert there[:2] == [
        Record("refs(unc).p:0", image, box, f"{IMAGE} [refer] the dog, 1 "),
        Record("refs(unc).p:1", image, box, f"{IMAGE} [refer] give me the location of the dog, 1 ")]
    what = invrefcoco(path)
    assert what[1] == Record("refs(unc).p:1", image, "the dog, 1",
                             f"{IMAGE} [identify] what object is in this location {box} ")
    assert len(there) == len(what) == 3
    assert len(REFER) == len(IDENTIFY) == 7


def test_references_of_the_evaluation_files(tmp_path):
    row = {"img_id": "COCO_train2014_000000000009_4", "sents": "left dog", "bbox": [0, 0, 8, 6], "width": 8,
           "height": 6}
    layouts.coco_2014(tmp_path)
    layouts.put(tmp_path / "train2014/COCO_train2014_000000000009.jpg", "")
    record = refcoco(str(layouts.put_json(tmp_path / "refcoco_testA.json", [row])))[0]
    assert record == Record("refcoco_testA.json:0", str(tmp_path / "train2014/COCO_train2014_000000000009.jpg"),
                            "{<0><0><100><100>}", f"{IMAGE} [refer] left dog ")


@pytest.mark.parametrize(("box", "width", "height"), [
    ([0, 0, 9, 6], 8, 6), ([-1, 0, 2, 2], 8, 6), ([0, 0, 0, 6], 8, 6), ([0, 0, -1, 6], 8, 6), ([0, 0, 1, 6], 0, 6),
    ([0, 0, 1], 8, 6), ([0, 0, 1, "x"], 8, 6), ([0, 0, float("nan"), 1], 8, 6), ([0, 0, float("inf"), 1], 8, 6),
    ([0, 0, 10**400, 1], 8, 6), (None, 8, 6), ([0, 0, 1, 1], -8, -6), ([1e308, 0, 1, 1], 1e-308, 6)])
def test_boxes_that_are_none(box, width, height):
    with pytest.raises(ValueError, match="box"):
        box_text(box, width, height)


class Program:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("content", [
    pickle.dumps([Program()]), pickle.dumps([Program()], protocol=0), b"(lp0\nr\xff\xff\xff\x7f.", pickle.dumps({}),
    pickle.dumps(bytearray(9), protocol=5), pickle.dumps([1, 2])[:-1], b"", b"\x80\x04Nr\xff\xff\xff\x7f.",
    hostile.nested(100_000, b"\x85", key=True), hostile.nested(1_000, b"\x85"), pickle.dumps([{(1, 2): 3}]),
    pickle.dumps([{1, 2}]), pickle.dumps([frozenset([1])]), b"\x80\x04" + b"]" * 1_000 + b"a" * 999 + b".",
    b"\x80\x04](()Nde.", b"\x80\x04]q\0h\0a.", hostile.doubling(14),
    b"\x80\x04]\x8d" + b"\xff" * 7 + b"\x7fa."],
    ids=["program", "text", "memory", "dict", "array", "cut", "empty", "number", "deep key", "deep tuples", "tuple key",
         "set", "frozenset", "deep lists", "key of a text dict", "itself", "doubling", "length"])
def test_pickles_are_read_but_not_executed(content, tmp_path, capsys):
    path = layouts.refcoco(tmp_path)
    (path / "refs(unc).p").write_bytes(content)
    with pytest.raises(ValueError, match=r"refs\(unc\).p (is not a pickle of plain values|must hold a list)"):
        refcoco(str(path))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("reader", "message"), [
    (llava_instruct, "a JSON file of conversations"), (coco_captions, "captions_SPLIT.json"),
    (vqa, "VQA's questions"), (gqa, "GQA's questions"), (refcoco, "refs"), (jsonl, "one JSON object a line")])
def test_files_that_are_not_there(reader, message, tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=message):
            reader(str(path))


def test_folders_with_several_files(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        layouts.put_json(tmp_path / name, {})
    with pytest.raises(ValueError, match=r"has 2 files \*.jsonl: a.jsonl, b.jsonl. Name one"):
        jsonl(str(tmp_path))


def test_answers_and_boxes_lie_beside(tmp_path):
    (layouts.vqa(tmp_path).parent / "v2_mscoco_train2014_annotations.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected in v2_mscoco_train2014_annotations.json beside it"):
        vqa(str(tmp_path))
    path = layouts.refcoco(tmp_path)
    (path / "instances.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected in .*instances.json, which does not exist"):
        refcoco(str(path))
