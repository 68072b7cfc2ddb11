"""Inputs of the kinds that people who do this work have reported, each with its right outcome."""

import gzip
import json
import os
import struct
import unicodedata

import numpy as np
import pytest
from PIL import Image

from mmjax.data import senses
from mmjax.data.boxes import box_text
from mmjax.data.formats import (
    Account,
    cc_sbu_align,
    imagebind_llm_finetune,
    imagebind_llm_pretrain,
    jsonl,
    llava_instruct,
    parquet,
    vqa,
    webdataset,
)
from mmjax.data.images import load, missing, rgb
from mmjax.inference import requests
from tests.data import layouts

IMAGE = "<Img><ImageHere></Img>"
TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]

# ---- links ----


@pytest.fixture
def linked(tmp_path):
    """A folder of images that is a link to a shared disk."""
    layouts.cc_sbu_align(tmp_path / "data")
    (tmp_path / "data" / "image").rename(tmp_path / "disk")
    (tmp_path / "data" / "image").symlink_to("../disk")
    return tmp_path / "data"


def test_a_link_out_of_the_folder_is_named_and_may_be_allowed(linked):
    with pytest.raises(ValueError, match=r"data/image' is a link that leads to .*disk/0.jpg'.*--follow-links") as error:
        cc_sbu_align(str(linked))
    assert "name that folder as `root`" not in str(error.value)  # no root helps
    records = cc_sbu_align(str(linked), follow_links=True)
    assert [record.problem for record in records] == [None] * 3 and rgb(records[0].image)
    path = layouts.put_json(linked / "a.jsonl", {"image": "image/../../disk/0.jpg", "caption": "words"})
    with pytest.raises(ValueError, match="is not below"):
        jsonl(str(path), follow_links=True)


def test_snapshots_of_hugging_face_are_links(tmp_path):
    layouts.cc_sbu_align(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "abc"
    (snapshot / "image").mkdir(parents=True)
    for name in ("filter_cap.json", *(f"image/{number}.jpg" for number in range(3))):
        os.symlink(tmp_path / "blobs" / name, snapshot / name)
    assert [record.problem for record in cc_sbu_align(str(snapshot), follow_links=True)] == [None] * 3


def test_a_folder_of_images_says_what_it_leaves_alone(tmp_path):
    for name in ("pics/a.jpg", "pics/c.jfif", "else/j.jpg"):
        layouts.put(tmp_path / name, layouts.jpeg())
    layouts.put(tmp_path / "pics" / "._a.jpg", b"Mac OS X")
    layouts.put(tmp_path / "pics" / "b.avif", b"x")
    (tmp_path / "pics" / "linked").symlink_to("../else")
    (tmp_path / "pics" / "k.jpg").symlink_to("../else/j.jpg")
    (tmp_path / "pics" / "again").symlink_to(".")
    for follow, names in ((False, ["a.jpg", "c.jfif"]), (True, ["a.jpg", "c.jfif", "k.jpg", "linked/j.jpg"])):
        account = Account("files")
        assert [ask.id for ask in requests.images(tmp_path / "pics", "What?", follow, account)] == names
        assert (account.unaccounted, account.used) == (0, len(names))
        left = {reason: sorted(items.names) for reason, items in account.left.items()}
        assert left.pop("linked folders whose files are here already") == ["again"]
        assert left.pop("files of macOS whose names begin with ._") == ["._a.jpg"]
        assert left.pop("files with the suffix '.avif'") == ["b.avif"]
        assert list(left.values()) == ([] if follow else [["k.jpg", "linked"]])


# ---- names, and files that are something else ----


def test_missing_names_have_neighbours(tmp_path):
    for name in ("2.JPG", "3.png", unicodedata.normalize("NFD", "café") + ".jpg", "Cat.jpg"):
        layouts.put(tmp_path / name, layouts.jpeg())
    for name, neighbour in (("2.jpg", "there is '2.JPG'"), ("3.jpg", "there is '3.png'"), ("1.jpg", None),
                            (unicodedata.normalize("NFC", "café") + ".jpg", "in another Unicode form"),
                            ("cat.jpg", "there is 'Cat.jpg'")):
        said = missing(str(tmp_path / name))
        assert said.startswith("there is no image") and (";" in said if neighbour is None else neighbour in said) != (
            neighbour is None)
        with pytest.raises(ValueError, match=f"No image at .*{neighbour or ''}"):
            load(tmp_path / name, 8)


@pytest.mark.parametrize(("content", "said"), [
    (gzip.compress(b"[]", mtime=0), "is compressed with gzip. Unpack it first: gunzip some.json"),
    (b"PK\3\4", "a zip archive"),
    (b"\xff\xfe{", "is UTF-16, but UTF-8 is expected"), (b"version https://git-lfs", "a Git LFS pointer"),
    (b"<!DOCTYPE html>", "is a web page"), (b"[" * 10, "is damaged, it is not JSON")])
def test_files_that_are_something_else_say_what(content, said, tmp_path):
    for read, name in ((llava_instruct, "some.json"), (jsonl, "some.jsonl")):
        path = layouts.put(tmp_path / name, content)
        with pytest.raises(ValueError, match=said.replace("some.json", name)):
            read(str(path))


def test_a_tab_separated_file_that_is_compressed(tmp_path):
    layouts.put(tmp_path / "a.csv.gz", gzip.compress(b"url\tcaption\n", mtime=0))
    layouts.put(tmp_path / "pretrain.yaml", "META:\n- a.csv.gz\n")
    with pytest.raises(ValueError, match="a.csv.gz is compressed with gzip. Unpack it first: gunzip a.csv.gz"):
        imagebind_llm_pretrain(str(tmp_path))


def test_an_empty_shard(tmp_path):
    layouts.webdataset(tmp_path)
    layouts.put(tmp_path / "1.tar", b"")
    with pytest.raises(ValueError, match=r"1.tar is not a tar, or a compressed one: it is empty \(0 bytes\)"):
        webdataset(str(tmp_path))


def test_lines_in_a_json_file_and_a_list_in_a_file_of_lines(tmp_path):
    row = {"image": "0.jpg", "conversations": TALK}
    layouts.put(tmp_path / "0.jpg", layouts.jpeg())
    lines = layouts.put(tmp_path / "a.json", (json.dumps(row) + "\n") * 2)
    assert [record.answer for record in llava_instruct(str(lines))] == ["A dog."] * 2
    listed = layouts.put(tmp_path / "b.jsonl", json.dumps([{"image": "0.jpg", "caption": "words"}] * 2, indent=1))
    assert [record.answer for record in jsonl(str(listed))] == ["words"] * 2
    layouts.put(tmp_path / "filter_cap.json", (json.dumps(row) + "\n") * 2)
    with pytest.raises(ValueError, match="has one JSON object a line, but must hold"):
        cc_sbu_align(str(tmp_path))


def test_byte_order_marks_are_no_part_of_a_caption(tmp_path):
    path = layouts.tar(tmp_path / "a.tar", [("a.jpg", layouts.jpeg()), ("a.txt", b"\xef\xbb\xbfA dog."),
                                            ("b.jpg", layouts.jpeg()), ("b.txt", "A dog.".encode("utf-16"))])
    first, second = webdataset(str(path))
    assert first.answer == "A dog." and "is UTF-16" in second.problem
    layouts.put(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"prompt": "Hi", "answer": "A"}')
    assert jsonl(str(tmp_path / "a.jsonl"))[0].answer == "A"


# ---- rows ----


def test_an_open_quote_swallows_lines_and_says_so(tmp_path):
    for number in range(4):
        layouts.put(tmp_path / f"{number}.jpg", layouts.jpeg())
    layouts.put(tmp_path / "a.tsv", 'url\tcaption\n0.jpg\t"a cat\n1.jpg\tb\n2.jpg\tsaid "c"\n\n3.jpg\td\n')
    layouts.put(tmp_path / "pretrain.yaml", "META:\n- a.tsv\n")
    records = imagebind_llm_pretrain(str(tmp_path))
    assert [record.answer for record in records] == ['a cat\n1.jpg\tb\n2.jpg\tsaid c"', "d"]  # as pandas reads it
    account = records.account
    assert (account.found, account.used, account.unaccounted) == (5, 2, 0)
    (swallowed,) = account.left["lines that a row swallows because a quote is opened in it"].names
    assert swallowed.startswith("a.tsv:0 swallows 2: ") and account.left["blank lines"].names == ["a.tsv:1"]


def test_null_and_lists_of_images_have_one_meaning(tmp_path):
    layouts.put(tmp_path / "0.jpg", layouts.jpeg())
    rows = [{"image": "0.jpg", "conversations": TALK}, {"image": None, "conversations": [{"value": "Hi"}, TALK[1]]},
            {"image": ["0.jpg"], "conversations": TALK}, {"image": [], "conversations": [{"value": "Hi"}, TALK[1]]}]
    layouts.put_json(tmp_path / "a.json", rows)
    layouts.put(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    layouts.put(tmp_path / "finetune.yaml", "META:\n- a.json\n")
    for read, path in ((llava_instruct, "a.json"), (jsonl, "a.jsonl"), (imagebind_llm_finetune, "finetune.yaml")):
        records = read(str(tmp_path / path))
        assert [(record.problem, record.image is None) for record in records] == [
            (None, False), (None, True), (None, False), (None, True)]
    layouts.put(tmp_path / "ask.jsonl", "\n".join(map(json.dumps, (
        {"image": None, "prompt": "Hi"}, {"image": ["0.jpg"], "prompt": "What?"}, {"images": None, "prompt": "Hi"}))))
    assert [len(ask.sample.images) for ask in requests.read_jsonl(tmp_path / "ask.jsonl")] == [0, 1, 0]


def test_conversations_begin_with_a_question_in_every_format(tmp_path):
    layouts.put(tmp_path / "0.jpg", layouts.jpeg())
    good, wrong = {"image": "0.jpg", "conversations": TALK}, {"image": "0.jpg", "conversations": TALK[::-1]}
    layouts.put_json(tmp_path / "a.json", [wrong, good, {"instruction": "Name a dog.", "output": "Rex"}][:3])
    layouts.put(tmp_path / "a.jsonl", "\n".join(map(json.dumps, (wrong, good))))
    layouts.put(tmp_path / "finetune.yaml", "META:\n- a.json\n")
    for read, path in ((llava_instruct, "a.json"), (jsonl, "a.jsonl"), (imagebind_llm_finetune, "finetune.yaml")):
        first, second, *_ = read(str(tmp_path / path))
        assert "the conversation begins with 'gpt'" in first.problem and second.answer == "A dog."
    assert imagebind_llm_finetune(str(tmp_path))[2].input == ""  # of Alpaca, without `input`


def test_ids_of_questions_as_numbers_and_as_text(tmp_path):
    path = layouts.vqa(tmp_path, lambda rows: [row.update(question_id=str(row["question_id"])) for row in rows])
    assert [record.answer for record in vqa(str(path))] == ["yes"] * 3


@pytest.mark.parametrize(("box", "said"), [
    ((0.1, 0.2, 0.5, 0.5), "has shares of its image of 640 x 480, but pixels are expected"),
    ((0.0, 0.0, 1.0, 1.0), "has shares of its image"),
    ((300, 200, 640, 480), r"not inside its image .*it would be as \(left, top, right, bottom\)"),
    ((600, 10, 100, 20), "not inside its image of 640 x 480$")])
def test_boxes_in_another_notation(box, said):
    with pytest.raises(ValueError, match=said):
        box_text(box, 640, 480)


def test_several_images_and_turns_in_a_line(tmp_path):
    for number in range(3):
        layouts.put(tmp_path / f"{number}.jpg", layouts.jpeg(number))
    names = [f"{number}.jpg" for number in range(3)]
    layouts.put(tmp_path / "a.jsonl", "\n".join(map(json.dumps, (
        {"images": names, "prompt": "What happens?", "answer": "A"},
        {"image": names[:2], "prompt": "<ImageHere> and <ImageHere>?", "answer": "B"},
        {"image": "0.jpg", "turns": [["What?", "A"], ["And?", "No"]]},
        {"image": "0.jpg", "turns": [{"question": "What?", "answer": "A"}]}, {"images": names, "caption": "words"},
        {"image": "0.jpg", "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A"}]})))
               )
    film, two, talk, one, caption, chat = jsonl(str(tmp_path / "a.jsonl"))
    assert film.prompt == f"{IMAGE * 3} What happens? " and film.images == tuple(str(tmp_path / name) for name in names)
    assert two.prompt == "<ImageHere> and <ImageHere>?" and len(two.images) == 2
    assert talk.turns == ((f"{IMAGE} What? ", "A"), ("And? ", "No"))
    assert one.turns == () and (one.prompt, one.answer) == (chat.prompt, chat.answer) == (f"{IMAGE} What? ", "A")
    assert "a caption of 3 images" in caption.problem


def write_parquet(path, rows):
    import pyarrow
    from pyarrow import parquet as arrow

    path.parent.mkdir(parents=True, exist_ok=True)
    arrow.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def test_parquet_as_hugging_face_has_it(tmp_path):
    layouts.put(tmp_path / "1.jpg", layouts.jpeg(1))
    held = {"bytes": layouts.jpeg(0), "path": "0.jpg"}
    rows = [{"images": [held, {"bytes": None, "path": "1.jpg"}], "texts": [{"user": "Which?", "assistant": "Both"}]},
            {"images": [held], "texts": [{"user": "What?", "assistant": "A"}, {"user": "And?", "assistant": "B"}]},
            {"images": None, "texts": [{"user": "Hi", "assistant": "Hello"}]}]
    write_parquet(tmp_path / "train-00000-of-00001.parquet", rows)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", rows)
    records = parquet(str(tmp_path))
    assert [len(record.images) for record in records] == [2, 1, 0]
    assert [[image.read() for image in record.images] for record in records] == [
        [layouts.jpeg(0), layouts.jpeg(1)], [layouts.jpeg(0)], []]
    assert records[0].prompt == f"{IMAGE * 2} Which? " and len(records[1].turns) == 2 and records[2].answer == "Hello"
    left = {reason: items.names for reason, items in records.account.left.items()}
    assert left == {"files of other splits": ["test-00000-of-00001.parquet"], "files that are no .parquet": ["1.jpg"]}
    assert records.account.unaccounted == 0


def test_columns_of_parquet(tmp_path):
    layouts.put(tmp_path / "0.jpg", layouts.jpeg())
    path = write_parquet(tmp_path / "a.parquet", [{"image": "0.jpg", "caption": ["one", "two"], "text": "other"}])
    with pytest.raises(ValueError, match="has the columns image, caption, text. Say which to read: .*text=NAME"):
        parquet(str(path))
    (record,) = parquet(f"{path}?text=caption")
    assert record.answer == "one" and rgb(record.image).size == (layouts.WIDTH, layouts.HEIGHT)
    with pytest.raises(ValueError, match="has no column none"):
        parquet(f"{path}?text=none")


# ---- numbers and sounds ----


def test_arrays_with_numbers_that_are_none(tmp_path):
    for name, value in (("depth", np.nan), ("thermal", np.inf), ("imu", -np.inf)):
        array = np.zeros((1, 4, 4), np.float32)
        array[0, 1, 1:3] = value
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(ValueError, match=f"a.npy cannot be used for {name}: 2 of 16 numbers are NaN or infinite"):
            senses.read_array(name, tmp_path / "a.npy")
    with pytest.raises(ValueError, match="1 of 32,000 numbers are NaN or infinite"):
        senses.sound((np.r_[np.zeros(31_999), np.nan].astype(np.float32)[None], 16_000))


def test_depth_of_sixteen_bits_is_read_in_millimetres(tmp_path):
    Image.fromarray(np.full((30, 40), 2_000, np.uint16)).save(tmp_path / "a.png")
    metres = senses.read_array("depth", tmp_path / "a.png")
    assert metres.dtype == np.float32 and metres.shape == (30, 40) and (metres == 2).all()
    wanted = (518.857901 * 0.075 / 2 / 75 - 0.0418) / 0.0295
    np.testing.assert_allclose(senses.depth(metres, 16), np.full((1, 16, 16), wanted), rtol=1e-5)
    holes = np.where(np.arange(40) < 20, 0, metres).astype(np.float32)
    np.testing.assert_allclose(senses.depth(holes, 30)[0, :, :10], -0.0418 / 0.0295, rtol=1e-4)
    Image.new("L", (4, 4)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="its mode is L. Expected for depth: float32.*16-bit .png of distances in mil"):
        senses.read_array("depth", tmp_path / "b.png")
    with pytest.raises(ValueError, match="2 of 4 distances are negative"):
        senses.depth(np.float32([[-1, -2], [1, 1]]))


def wav(kind, bits, samples, channels=1, extensible=False, rate=16_000):
    width = channels * bits // 8
    kind_field, bytes_a_second = 0xFFFE if extensible else kind, rate * width & 0xFFFFFFFF
    form = struct.pack("<HHIIHH", kind_field, channels, rate, bytes_a_second, width, bits)
    if extensible:
        form += struct.pack("<HHIH", 22, bits, 4, kind) + bytes.fromhex("000000001000800000aa00389b71")
    body = (b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"LIST" + struct.pack("<I", 3) + b"odd\0"
            + b"data" + struct.pack("<I", len(samples)) + samples)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_sounds_as_programs_write_them(tmp_path):
    wave = np.sin(np.arange(800) / 9).astype(np.float32)
    whole = (wave * 32767).astype("<i2")
    six = np.repeat(whole[:, None], 6, 1)
    for content, expected in ((wav(1, 16, whole.tobytes(), extensible=True), whole[None] / 32768),
                              (wav(1, 16, six.tobytes(), 6, extensible=True), six.T / 32768),
                              (wav(3, 32, wave.tobytes()), wave[None]), (wav(3, 64, wave.astype("<f8").tobytes()),
                                                                         wave[None])):
        samples, rate = senses.read_wav(layouts.put(tmp_path / "a.wav", content))
        assert rate == 16_000 and samples.dtype == np.float32
        np.testing.assert_allclose(samples, expected, atol=1e-7)


@pytest.mark.parametrize(("content", "said"), [
    (wav(1, 16, bytes(64), rate=0), "it says 0 samples a second"),
    (wav(1, 64, bytes(64)), "64 bits, not 8, 16, 24, 32"),
    (wav(1, 36, bytes(40)), "36"), (wav(1, 40, bytes(40)), "40 bits, not"), (wav(6, 8, bytes(64)), "unknown format: 6"),
    (wav(3, 32, np.float32([0, np.nan, np.inf]).tobytes()), "2 of 3 numbers are NaN or infinite"),
    (wav(1, 16, bytes(64), rate=2**31 - 1), "samples a second; whole"), (b"RIFF", "does not begin with"),
    (wav(1, 16, b"").replace(b"data", b"atad"), "it has no samples")])
def test_sounds_that_cannot_be_used(content, said, tmp_path):
    with pytest.raises(ValueError, match=f"a.wav .*{said}"):
        senses.read_wav(layouts.put(tmp_path / "a.wav", content))
