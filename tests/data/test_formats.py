"""The layouts on disk. Caption cleaning against the original's: tests/parity."""

import json
from pathlib import Path

import pytest

from mmjax.data.formats import Record, cc_sbu_align, clean_caption

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
