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


def folder(path, content, pictures=()):
    (path / "image").mkdir()
    for name in pictures:
        (path / "image" / f"{name}.jpg").touch()
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    (path / "filter_cap.json").write_text(text, encoding="utf-8")
    return str(path)


def test_records(tmp_path):
    annotations = [{"image_id": "7", "caption": "A dög."}, {"image_id": 12, "caption": "Two\ncats. "}]
    found = cc_sbu_align(folder(tmp_path, {"annotations": annotations}, ("7", "12")))
    assert found == [
        Record("7", str(tmp_path / "image" / "7.jpg"), "A dög."),
        Record("12", str(tmp_path / "image" / "12.jpg"), "Two\ncats. "),
    ]


def test_folders_of_another_layout(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match="not in the CC-SBU-align layout: there is no filter_cap.json"):
            cc_sbu_align(str(path))


@pytest.mark.parametrize("content", [
    "{not json",
    [],
    {},
    {"annotations": 3},
    {"annotations": ["7"]},
    {"annotations": [{"caption": "A dog."}]},
    {"annotations": [{"image_id": "7"}]},
])
def test_files_of_another_shape(tmp_path, content):
    with pytest.raises(ValueError, match=r'filter_cap.json must be JSON like \{"annotations"'):
        cc_sbu_align(folder(tmp_path, content, ("7",)))


def test_captions_that_are_no_text(tmp_path):
    annotations = [{"image_id": "7", "caption": None}, {"image_id": "8", "caption": "A dog."},
                   {"image_id": "9", "caption": ["A", "cat"]}]
    with pytest.raises(ValueError, match="filter_cap.json: 2 captions are not text, such as that of image_id 7, 9"):
        cc_sbu_align(folder(tmp_path, {"annotations": annotations}, ("7", "8", "9")))


def test_bytes_that_are_no_text(tmp_path):
    path = folder(tmp_path, "{}")
    (tmp_path / "filter_cap.json").write_bytes(b'{"annotations": "\xff"}')
    with pytest.raises(ValueError, match="filter_cap.json must be JSON like"):
        cc_sbu_align(path)


def test_no_records(tmp_path):
    with pytest.raises(ValueError, match="names 0 pictures"):
        cc_sbu_align(folder(tmp_path, {"annotations": []}))


def test_absent_pictures_are_counted_and_some_named(tmp_path):
    annotations = [{"image_id": str(number), "caption": "A dog."} for number in range(9)]
    with pytest.raises(ValueError, match="names 9 pictures, of which 8 are not there") as error:
        cc_sbu_align(folder(tmp_path, {"annotations": annotations}, ("3",)))
    assert str(tmp_path / "image" / "0.jpg") in str(error.value)
    assert "3.jpg" not in str(error.value)


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
    for picture in (tmp_path / "a.png", far):
        picture.touch()
    write(tmp_path, "some.csv", "url\tcaption\na.png\tA dög.\n")
    write(tmp_path / "more", "more.csv", f"extra\tcaption\turl\n1\tA cat.\t{far}\n")
    path = meta(tmp_path, "pretrain", "some.csv", "more/more.csv")
    expected = [Record("some.csv:0", str(tmp_path / "a.png"), "A dög.", CAPTION_PROMPT),
                Record("more.csv:0", str(far), "A cat.", CAPTION_PROMPT)]
    assert imagebind_llm_pretrain(path) == imagebind_llm_pretrain(str(tmp_path)) == expected


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
    ("url,caption\na.png,One.\n", r"first line is \['url,caption'\], but must name url and caption"),
    ("", r"first line is \[\]"),
    ('url\tcaption\na.png\t"One.\nb.png\tTwo.\n', "a quote is opened and never closed"),
    ("url\tcaption\na.png\tOne.\tmore\nb.png\tTwo.\n", "1 rows have more than the 2 fields .* number 0"),
    ("url\tcaption\na.png\tOne\rhalf.\n", r"cannot be read as tab-separated text: .* \(behind line 2\)"),
    ("url\tcaption\nnone.png\tOne.\na.png\tTwo.\n", r"names 2 pictures, of which 1 are not there, such as .*none"),
    ("url\tcaption\n", "names 0 pictures"),
])
def test_captions_that_cannot_be_used(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        captions(tmp_path, text)


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
    assert imagebind_llm_finetune(path) == imagebind_llm_finetune(str(tmp_path)) == [seen, told]
    as_released = dataclasses.replace(told, prompt="('Sort.',)")
    assert imagebind_llm_finetune(path, tuple_prompts=True) == [seen, as_released]


@pytest.mark.parametrize("row", [
    "text", 3, {}, {**LLAVA, "image": None}, {**LLAVA, "conversations": [{"value": "What?"}]},
    {**LLAVA, "conversations": [{"value": 1}, {"value": "b"}]}, {**LLAVA, "conversations": {}},
    {"instruction": "Sort.", "output": "a"}, {**ALPACA_ROW, "input": None}])
def test_rows_of_another_shape(row, tmp_path):
    (tmp_path / "a.png").touch()
    write(tmp_path, "one.json", [LLAVA, row, ALPACA_ROW])
    with pytest.raises(ValueError, match="one.json: 1 rows are neither .* such as number 1 "):
        imagebind_llm_finetune(meta(tmp_path, "finetune", "one.json"))


def test_every_damaged_file_is_named(tmp_path):
    for name, content in (("one.json", "[{"), ("two.json", "{}"), ("three.json", [{}])):
        write(tmp_path, name, content)
    with pytest.raises(ValueError, match="(?s)one.json is damaged, it is not JSON.*two.json must hold a list of rows, "
                                         "not a dict.*three.json: 1 rows are neither"):
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
