"""The layouts on disk. Caption cleaning against the original's: tests/parity."""

import dataclasses
import json
from pathlib import Path

import pytest

from mmjax.data.formats import (
    CAPTION_PROMPT,
    Record,
    cc_sbu_align,
    clean_caption,
    imagebind_llm_finetune,
    imagebind_llm_pretrain,
)

CASE = Path(__file__).parents[1] / "golden" / "minigpt4" / "cases" / "n_preprocess.json"


def folder(path, content, images=()):
    (path / "image").mkdir()
    for name in images:
        (path / "image" / f"{name}.jpg").touch()
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    (path / "filter_cap.json").write_text(text, encoding="utf-8")
    return str(path)


def test_records(tmp_path):
    annotations = [{"image_id": "7", "caption": "A dög."}, {"image_id": 12, "caption": "Two\ncats. "}]
    found = cc_sbu_align(folder(tmp_path, {"annotations": annotations}, ("7", "12")))
    assert list(found) == [
        Record("7", str(tmp_path / "image" / "7.jpg"), "A dög."),
        Record("12", str(tmp_path / "image" / "12.jpg"), "Two\ncats. "),
    ]


def test_folders_of_another_layout(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match="not in the CC-SBU-align layout: there is no filter_cap.json"):
            cc_sbu_align(str(path))


@pytest.mark.parametrize(("content", "message"), [
    ("{not json", "is damaged, it is not JSON"),
    ([], r'must hold \{"annotations": .*, not a list'),
    ({}, r'must hold \{"annotations"'),
    ({"annotations": 3}, r'must hold \{"annotations"'),
    ({"annotations": []}, "has no rows"),
    ({"annotations": ["7"]}, r"(?s)None of 1 rows .*json:0: expected an object with 'image_id', got '7'"),
    ({"annotations": [{"caption": "A dog."}]}, "(?s)None of 1 rows .*'image_id' must be str or int, got None"),
    ({"annotations": [{"image_id": "7"}]}, "(?s)None of 1 rows .*'caption' must be str, got None"),
])
def test_files_of_another_shape(content, message, tmp_path):
    with pytest.raises(ValueError, match=f"filter_cap.json.*{message}" if "(?s)" not in message else message):
        cc_sbu_align(folder(tmp_path, content, ("7",)))


def test_captions_that_are_no_text(tmp_path):
    annotations = [{"image_id": "7", "caption": None}, {"image_id": "8", "caption": "A dog."},
                   {"image_id": "9", "caption": ["A", "cat"]}]
    found = cc_sbu_align(folder(tmp_path, {"annotations": annotations}, ("7", "8", "9")))
    assert [record.problem for record in found] == ["'caption' must be str, got None", None,
                                                    "'caption' must be str, got ['A', 'cat']"]


def test_bytes_that_are_no_text(tmp_path):
    path = folder(tmp_path, "{}")
    (tmp_path / "filter_cap.json").write_bytes(b'{"annotations": "\xff"}')
    with pytest.raises(ValueError, match="filter_cap.json is damaged, it is not JSON: .*utf-8"):
        cc_sbu_align(path)


def test_absent_images_are_found_when_they_are_read(tmp_path):
    """One in 16 that are looked at is enough to believe that the folder is the right one."""
    annotations = [{"image_id": str(number), "caption": "A dog."} for number in range(160)]
    path = folder(tmp_path, {"annotations": annotations}, ("70", "71"))
    assert [record.problem for record in cc_sbu_align(path)] == [None] * 160
    (tmp_path / "image" / "70.jpg").unlink()
    with pytest.raises(ValueError, match="None of 16 rows of .*filter_cap.json that were checked") as error:
        cc_sbu_align(path)
    assert f"0: there is no image '{tmp_path}/image/0.jpg'" in str(error.value)
    assert str(error.value).count("there is no image") == 5
    assert f"Images are expected below {tmp_path}. If they are elsewhere, name that folder as `root`" in str(
        error.value)


def test_clean_captions_as_recorded():
    pairs = json.loads(CASE.read_text(encoding="utf-8"))["captions"]
    assert [clean_caption(pair["inp"]) for pair in pairs] == [pair["out"] for pair in pairs]


@pytest.mark.parametrize(("caption", "cleaned"), [
    ("", ""), ("  .  ", ""), ("A.B", "a b"), ("Don't; 'stop', ok?", "don't 'stop', ok?"),
    (" ".join(map(str, range(60))), " ".join(map(str, range(50)))), ("a  b   c\n", "a b c")])
def test_clean_caption(caption, cleaned):
    assert clean_caption(caption) == cleaned


# ---- ImageBind-LLM's ----


def write(path, name, content):
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    (path / name).write_text(text, encoding="utf-8", newline="")
    return path / name


def meta(path, kind, *files):
    return str(write(path, f"{kind}.yaml", "META:\n" + "".join(f"  - '{file}'\n" for file in files)))


def captions(path, text):
    for name in ("a.png", "b.png"):
        (path / name).touch()
    write(path, "some.csv", text)
    return [record.answer for record in imagebind_llm_pretrain(meta(path, "pretrain", "some.csv"))]


def test_pretrain_records(tmp_path):
    (tmp_path / "more").mkdir()
    far = tmp_path / "far.png"
    for image in (tmp_path / "a.png", far):
        image.touch()
    write(tmp_path, "some.csv", "url\tcaption\na.png\tA dög.\n")
    write(tmp_path / "more", "more.csv", f"extra\tcaption\turl\n1\tA cat.\t{far}\n")
    path = meta(tmp_path, "pretrain", "some.csv", "more/more.csv")
    expected = [Record("some.csv:0", str(tmp_path / "a.png"), "A dög.", CAPTION_PROMPT),
                Record("more.csv:0", str(far), "A cat.", CAPTION_PROMPT)]
    assert list(imagebind_llm_pretrain(path)) == list(imagebind_llm_pretrain(str(tmp_path))) == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("a.png\tOne.\r\n\r\nb.png\tTwo.\r\n", ["One.", "Two."]),  # blank lines are none
    ("a.png\tOne.", ["One."]),
    ("a.png\t\nb.png", ["nan", "nan"]),
    ("a.png\tNA\nb.png\tN/A.\n", ["nan", "N/A."]),
    ('a.png\t"NULL"\nb.png\t null\n', ["nan", " null"]),
    ('a.png\t"with ""quotes""\tand\na line"\nb.png\tan "inner" one\n',
     ['with "quotes"\tand\na line', 'an "inner" one']),
    ("a.png\t007\n", ["007"]),
])
def test_captions_as_pandas_reads_them(text, expected, tmp_path):
    assert captions(tmp_path, "url\tcaption\n" + text) == expected


def test_captions_behind_a_byte_order_mark(tmp_path):
    assert captions(tmp_path, "\ufeffurl\tcaption\na.png\tOne.\n") == ["One."]


@pytest.mark.parametrize(("text", "message"), [
    ("url,caption\na.png,One.\n", r"first line is \"\['url,caption'\]\", but must name url and caption"),
    ("", r"first line is '\[\]'"),
    ('url\tcaption\na.png\t"One.\nb.png\tTwo.\n', "a quote is opened and never closed"),
    ("url\rcaption\na.png\tOne.\n", "first line is .*new-line character"),
    ("url\tcaption\nnone.png\tOne.\n", "(?s)None of 1 rows .*some.csv:0: there is no image .*none.png"),
    ("url\tcaption\n/etc/x.png\tOne.\n", "(?s)None of 1 rows .*'/etc/x.png' is not below .*name that folder as"),
    ("url\tcaption\n", "has no rows"),
])
def test_captions_that_cannot_be_used(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        captions(tmp_path, text)


@pytest.mark.parametrize(("line", "problem"), [
    (b"a.png\tOne.\tmore", "3 fields, but the first line of the file has 2"),
    (b"a.png\tOne\rhalf.", "not tab-separated text: new-line character"),
    (b"a.png\t" + b"x" * 200_000, "not tab-separated text: field larger than field limit"),
    (b"a.png\t \t", "3 fields"), (b"a.png\t ", "'caption' is empty"),
    (b"a.png\t\xff", "'caption' is not text"),
    (b"\tOne.", "the image '' is not below"), (b"../a.png\tOne.", "is not below"),
])
def test_lines_that_cannot_be_used(line, problem, tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "some.csv").write_bytes(b"url\tcaption\na.png\tOne.\n" + line + b"\na.png\tTwo.\n")
    first, broken, last = imagebind_llm_pretrain(meta(tmp_path, "pretrain", "some.csv"))
    assert (first.answer, last.answer) == ("One.", "Two.")
    assert problem in broken.problem
    assert (broken.name, broken.image) == ("some.csv:1", None)


LLAVA = {"id": "1", "image": "a.png", "conversations": [
    {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}, {"value": "And?"}]}
ALPACA_ROW = {"instruction": "Sort.", "input": "b, a", "output": "a, b"}


def test_finetune_records(tmp_path):
    (tmp_path / "a.png").touch()
    for name, rows in (("one.json", [LLAVA]), ("two.json", [ALPACA_ROW])):
        write(tmp_path, name, rows)
    path = meta(tmp_path, "finetune", "one.json", "two.json")
    seen = Record("one.json:0", str(tmp_path / "a.png"), "A dog.", "<image>\nWhat?")
    told = Record("two.json:0", None, "a, b", "Sort.", "b, a")
    assert list(imagebind_llm_finetune(path)) == list(imagebind_llm_finetune(str(tmp_path))) == [seen, told]
    as_released = dataclasses.replace(told, prompt="('Sort.',)")
    assert list(imagebind_llm_finetune(path, tuple_prompts=True)) == [seen, as_released]


@pytest.mark.parametrize(("row", "problem"), [
    ("text", "expected an object with 'instruction', got 'text'"), (3, "expected an object"),
    ({}, "'instruction' must be str, got None"), ({**LLAVA, "image": None}, "shows an image that is not there"),
    ({**LLAVA, "conversations": [{"value": "What?"}]}, "an answer to every question, but has 1 messages"),
    ({**LLAVA, "conversations": [{"value": 1}, {"value": "b"}]}, "'value' must be str, got 1"),
    ({**LLAVA, "conversations": [{"value": "a"}, {"value": " "}]}, "'value' is empty"),
    ({**LLAVA, "conversations": {}}, "'conversations' must be list"), ({**LLAVA, "image": "../a.png"}, "is not below"),
    ({**ALPACA_ROW, "input": 3}, "'input' must be str, got 3"),
    ({**LLAVA, "image": ["a.png", "a.png"]}, "2 images, but a row of this format has one"),
    ({**LLAVA, "conversations": LLAVA["conversations"][1::-1]}, "the conversation begins with 'gpt'"),
    ({**ALPACA_ROW, "instruction": "\ud800"}, "'instruction' is not text")])
def test_rows_of_another_shape(row, problem, tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "one.json").write_text(json.dumps([LLAVA, row, ALPACA_ROW]))
    first, broken, last = imagebind_llm_finetune(meta(tmp_path, "finetune", "one.json"))
    assert (first.answer, last.answer) == ("A dog.", "a, b")
    assert problem in broken.problem
    assert (broken.name, broken.image) == ("one.json:1", None)


def test_every_damaged_file_is_named(tmp_path):
    for name, content in (("one.json", "[{"), ("two.json", "{}"), ("three.json", [ALPACA_ROW])):
        write(tmp_path, name, content)
    with pytest.raises(ValueError, match="(?s)one.json is damaged, it is not JSON.*two.json must hold a list of rows, "
                                         "not a dict"):
        imagebind_llm_finetune(meta(tmp_path, "finetune", "one.json", "two.json", "three.json"))


@pytest.mark.parametrize("content", [
    "META: [", "- a", "META:\n  - 3", "other: [a]", "META:", "META: a.csv", "META: []"])
def test_lists_of_files_of_another_shape(content, tmp_path):
    path = write(tmp_path, "pretrain.yaml", content)
    with pytest.raises(ValueError, match="pretrain.yaml.*META"):
        imagebind_llm_pretrain(str(path))


def test_lists_that_are_absent_or_name_absent_files(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="Expected a YAML file with the list META, or a folder with fine"):
            imagebind_llm_finetune(str(path))
    with pytest.raises(ValueError, match="(?s)one.csv is not there.*two.csv is not there"):
        imagebind_llm_pretrain(meta(tmp_path, "pretrain", "one.csv", "two.csv"))


def test_images_below_another_root(tmp_path):
    """Of every reader that takes one; the layouts below the root are the same."""
    (tmp_path / "words").mkdir()
    (tmp_path / "far" / "image").mkdir(parents=True)
    (tmp_path / "far" / "image" / "7.jpg").touch()
    root = str(tmp_path / "far")
    write(tmp_path / "words", "filter_cap.json", {"annotations": [{"image_id": "7", "caption": "A dog."}]})
    write(tmp_path / "words", "some.csv", "url\tcaption\nimage/7.jpg\tA dog.\n" + f"{root}/image/7.jpg\tA dog.\n")
    write(tmp_path / "words", "some.json", [LLAVA | {"image": "image/7.jpg"}])
    meta(tmp_path / "words", "pretrain", "some.csv")
    meta(tmp_path / "words", "finetune", "some.json")
    for read in (cc_sbu_align, imagebind_llm_pretrain, imagebind_llm_finetune):
        for record in read(str(tmp_path / "words"), root):
            assert (record.image, record.answer) == (f"{root}/image/7.jpg", "A dog.")
        with pytest.raises(ValueError, match=f"Images are expected below {tmp_path}/words"):
            read(str(tmp_path / "words"))
