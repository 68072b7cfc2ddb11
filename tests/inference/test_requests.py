"""What a model is asked: lines and folders, and everything that is wrong with them at once."""

import json
import os

import numpy as np
import pytest

from mmjax.batch import Sample
from mmjax.families.base import PromptStyle
from mmjax.inference import requests
from tests.data.layouts import jpeg, put

SOFT = PromptStyle(image="<Img><ImageHere></Img>")


def lines(path, *rows):
    return put(path, "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def test_lines_become_samples(tmp_path):
    path = lines(tmp_path / "in.jsonl", {"image": "a.jpg", "prompt": "What?"}, "",
                 {"id": 7, "images": ["a.jpg", "sub/b.jpg"], "prompt": "<ImageHere> and <ImageHere>"},
                 {"id": "n", "prompt": "Hi", "media": {"audio": "c.wav", "text": "a dog.npy"}, "weights": {"audio": 1}})
    first, second, third = requests.read_jsonl(path)
    assert first == requests.Request("1", Sample(images=[str(tmp_path / "a.jpg")], prompt="What?"))
    assert (second.id, second.sample.images) == ("7", [str(tmp_path / "a.jpg"), str(tmp_path / "sub" / "b.jpg")])
    assert third.sample.media == {"audio": str(tmp_path / "c.wav"), "text": "a dog.npy"}
    assert third.sample.weights == {"audio": 1.0}
    assert requests.read_jsonl(path, tmp_path / "sub")[0].sample.images == [str(tmp_path / "sub" / "a.jpg")]


BROKEN = {
    "{": "not JSON",
    "[]": "expected an object",
    '{"prompt": "a", "imgae": "b"}': "unknown 'imgae'; a line has id, image",
    '{"image": "a.jpg"}': "'prompt' must be str",
    '{"prompt": "a", "image": "../b.jpg"}': "is not below",
    '{"prompt": "a", "image": "/etc/passwd"}': "is not below",
    '{"prompt": "a", "media": {"audio": "../b.wav"}}': "is not below",
    '{"prompt": "a", "image": "a", "images": ["b"]}': "both 'image' and 'images'",
    '{"prompt": "a", "images": [1]}': "'images' must be a list of names",
    '{"prompt": "<ImageHere><ImageHere>", "image": "a"}': "2 <ImageHere> in the prompt for 1 images",
    '{"prompt": "<ImageHere>"}': "1 <ImageHere> in the prompt for 0 images",
    '{"prompt": "a", "weights": {"audio": "1"}}': "'audio' must be int or float",
    '{"prompt": "a", "media": ["b"]}': "'media' must be dict",
    '{"prompt": "\\ud800"}': "'prompt' is not text",
}


def test_all_broken_lines_are_in_one_error(tmp_path):
    path = lines(tmp_path / "in.jsonl", {"prompt": "good"}, *BROKEN, {"id": 1, "prompt": "twice"})
    with pytest.raises(ValueError) as error:
        requests.read_jsonl(path)
    message = str(error.value)
    assert message.startswith(f"{len(BROKEN) + 1} lines of {path} cannot be used:")
    named = message.splitlines()[1:]
    for number, (line, expected) in enumerate(zip(named, BROKEN.values(), strict=False), 2):
        assert line.startswith(f"  line {number}: ") and expected in line
    assert "id '1' is that of an earlier line" in message
    assert f"file names are relative to {tmp_path}" in message


def test_a_link_that_leads_out_is_refused(tmp_path):
    (tmp_path / "root").mkdir()
    put(tmp_path / "secret.jpg", jpeg())
    (tmp_path / "root" / "a.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(ValueError, match="is not below"):
        requests.read_jsonl(lines(tmp_path / "root" / "in.jsonl", {"image": "a.jpg", "prompt": "?"}))


def test_many_problems_are_counted(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)50 lines of .*and 30 more"):
        requests.read_jsonl(lines(tmp_path / "in.jsonl", *["{"] * 50))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no samples at"):
        requests.read_jsonl(tmp_path / "in.jsonl")
    with pytest.raises(ValueError, match="has no lines"):
        requests.read_jsonl(lines(tmp_path / "in.jsonl", " "))
    with pytest.raises(FileNotFoundError, match="has no images"):
        requests.images(tmp_path, "What?")
    with pytest.raises(FileNotFoundError, match="no folder"):
        requests.images(tmp_path / "none", "What?")


def test_images_of_a_folder_in_order(tmp_path):
    for name in ("b.JPG", "a/c.png", "a.txt"):
        put(tmp_path / name, jpeg())
    found = requests.images(tmp_path, "What?")
    assert [ask.id for ask in found] == ["a/c.png", "b.JPG"]
    assert found[0].sample == Sample(images=[str(tmp_path / "a" / "c.png")], prompt="What?")
    with pytest.raises(ValueError, match="has 2 images"):
        requests.images(tmp_path, "<ImageHere><ImageHere>")


def test_names_that_cannot_be_written_down_are_refused(tmp_path):
    put(tmp_path / "a.jpg", jpeg())
    put(tmp_path / os.fsdecode(b"\xff.jpg"), jpeg())
    with pytest.raises(ValueError, match=r"1 images .* not UTF-8.*'.udcff.jpg'"):
        requests.images(tmp_path, "What?")


def test_images_are_placed_where_the_prompt_does_not_say(tmp_path):
    sample = Sample(images=["a", "b"], prompt="Which?")
    assert requests.with_images(sample, SOFT).prompt == "<Img><ImageHere></Img><Img><ImageHere></Img> Which?"
    assert requests.with_images(sample, PromptStyle()) == sample
    for other in (Sample(prompt="Which?"), Sample(images=["a"], prompt="This <ImageHere>?")):
        assert requests.with_images(other, SOFT) == other


def test_arrays_are_read_and_words_are_not(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(3, np.float32))
    np.testing.assert_array_equal(requests.read_sense("depth", str(tmp_path / "a.npy")), np.ones(3))
    assert requests.read_sense("text", "a.npy") == "a.npy"
    assert requests.read_sense("audio", "a.wav") == "a.wav"
    put(tmp_path / "b.npy", b"no")
    with pytest.raises(ValueError, match="b.npy cannot be read as an array"):
        requests.read_sense("depth", str(tmp_path / "b.npy"))


def test_objects_are_never_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="a.npy cannot be read as an array"):
        requests.read_sense("depth", str(tmp_path / "a.npy"))
