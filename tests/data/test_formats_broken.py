"""Broken and hostile data in every layout: an error that says so, or every record accounted for, and nothing read
outside of the data's folder.

A record counts as accounted for if it has a problem, or its image cannot be read (ValueError), or it is good.
"""

import contextlib
import dataclasses
import io
import os
import signal
import struct
import sys
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from mmjax.data.formats import FORMATS, Record
from mmjax.data.images import rgb
from tests.cases import every
from tests.data import layouts

SECONDS = 20  # far more than any case takes
OPENED: list[str] | None = None  # paths, while a case runs


def watch(event, arguments):
    if OPENED is not None and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        OPENED.append(os.fsdecode(arguments[0]))


sys.addaudithook(watch)


@contextlib.contextmanager
def guarded(tmp_path):
    """Fails what hangs, and what opens a file outside of tmp_path/data, links followed."""
    global OPENED

    def late(number, frame):
        raise AssertionError(f"still running after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    OPENED = []
    try:
        yield
    finally:
        opened, OPENED = OPENED, None
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert opened  # the watch is on
    real = [os.path.realpath(path) for path in opened]
    assert [path for path in real if path.startswith(f"{tmp_path}/") or path.startswith("/etc/")
            if not path.startswith(f"{tmp_path}/data/")] == []


def states(name, path, tmp_path):
    """What became of every record; or the error that says that the data cannot be used."""
    with guarded(tmp_path):
        try:
            records = FORMATS[name](str(path))
        except (ValueError, FileNotFoundError) as error:
            assert str(tmp_path) in str(error)  # it names the file
            return error
        found = [state(record) for record in records]
    assert len(found) == len(records) > 0
    return found


def state(record):
    assert isinstance(record, Record)
    assert record.name
    if record.problem is not None:
        assert record.problem
        assert (record.image, record.answer, record.turns) == (None, "", ())
        return "problem"
    if record.image is not None:
        try:
            assert rgb(record.image).mode == "RGB"
        except ValueError as error:
            assert str(record.image) in str(error)
            return "unreadable"
    assert all(text.encode().strip() for text in (record.answer, *sum(record.turns, ())))
    return "good"


def data_folder(tmp_path):
    """An empty folder for the data, a neighbour that is nobody's business, and ways to get there."""
    (tmp_path / "data").mkdir()
    for name in ("1.jpg", "secret.jpg", "n1.jpg", "COCO_train2014_000000000001.jpg"):
        layouts.put(tmp_path / "outside" / name, layouts.jpeg(9))
    return tmp_path / "data"


# ---- one row of three is broken ----

TEXTS = (None, 3, True, "", " \n", [], {}, ["words"], "\ud800")
IMAGES = (3, True, {}, [3], [["1.jpg"]], "", ".", "none.jpg", "../outside/secret.jpg", "a/../../outside/secret.jpg",
            "ABSOLUTE", "/etc/passwd", "link.jpg", "folder/secret.jpg", "loop.jpg", "pipe.jpg", "a\0.jpg", "\udcff.jpg",
            "x" * 5000, "\ud800.jpg", "/dev/zero", "~/1.jpg")
NUMBERS = (None, "1", 1.5, True, [], {}, -1, 10**400)
ROWS = (None, 3, "text", [], {}, True, [[1, 2]])
CONVERSATIONS = (None, 3, "text", {}, [], ["text", "text"], [{"value": "What?"}], [{"value": "What?"}, {}],
                 [None, None], [{"value": 1}, {"value": 2}])
FIELDS = (
    *(("llava_instruct", "image", value) for value in IMAGES),
    *(("llava_instruct", "conversations", value) for value in CONVERSATIONS),
    *(("jsonl", "image", value) for value in IMAGES),
    *(("jsonl", key, value) for key in ("prompt", "answer", "caption") for value in TEXTS),
    *(("coco_captions", "caption", value) for value in TEXTS),
    *(("coco_captions", "image_id", value) for value in NUMBERS),
    *(("cc_sbu_align", "caption", value) for value in TEXTS),
    *(("cc_sbu_align", "image_id", value.removesuffix(".jpg") if isinstance(value, str) else value)
      for value in (*IMAGES, None, 1.5, {}, -1, 10**400)),
    *(("imagebind_llm_pretrain", "url", value) for value in IMAGES
      if value not in ("\udcff.jpg", "\ud800.jpg")),  # which cannot be written into a file of text
    *(("imagebind_llm_finetune", "image", value) for value in IMAGES),
    *(("imagebind_llm_finetune", "conversations", value) for value in CONVERSATIONS),
    *(("vqa", "question", value) for value in (*TEXTS, "!")),
    *(("vqa", key, value) for key in ("image_id", "question_id") for value in NUMBERS),
    *(("gqa", key, value) for key in ("question", "answer") for value in (*TEXTS, "...")),
    *(("gqa", "imageId", value) for value in (None, [], "../outside/secret", "../../outside/n1", "/etc/passwd\0", 7)),
    *(("refcoco", key, value) for key in ("image_id", "ann_id") for value in NUMBERS),
    *((name, "sentences", value) for name in ("refcoco", "invrefcoco")
      for value in (None, [], {}, "text", [None], [{"raw": 3}], [{"raw": ""}], [{"raw": "!"}])),
)


def ways_out(data, tmp_path):
    data.mkdir(exist_ok=True)
    os.symlink(tmp_path / "outside" / "secret.jpg", data / "link.jpg")
    os.symlink(tmp_path / "outside", data / "folder")
    os.symlink(data / "loop.jpg", data / "loop.jpg")
    os.mkfifo(data / "pipe.jpg")


@every(("name", "key", "value"), FIELDS)
def test_a_broken_field(name, key, value, tmp_path):
    data = data_folder(tmp_path)
    ways_out(data / "image" if name == "cc_sbu_align" else data, tmp_path)
    secret = str(tmp_path / "outside" / ("secret" if name == "cc_sbu_align" else "secret.jpg"))

    def change(rows):
        rows[1][key] = secret if value == "ABSOLUTE" else value

    first, broken, last = states(name, getattr(layouts, name)(data, change), tmp_path)
    assert (first, last) == ("good", "good")
    assert broken != "good"


LISTED = ("llava_instruct", "jsonl", "coco_captions", "vqa", "gqa", "refcoco")


@every("number", range(len(ROWS)))
@every("name", LISTED)
def test_a_row_of_another_kind(name, number, tmp_path):
    data = data_folder(tmp_path)
    def change(rows):
        rows[1] = ROWS[number]

    found = states(name, getattr(layouts, name)(data, change), tmp_path)
    assert found == ["good", "problem", "good"]


@every("name", ["../../outside/1.jpg", "/etc/passwd", "../train2017/../../outside/1.jpg", None, 3, ""])
def test_names_of_coco_images(name, tmp_path):
    data = data_folder(tmp_path)
    path = layouts.coco_captions(data)
    text = path.read_text().replace('"000000000001.jpg"', layouts.json.dumps(name))
    assert states("coco_captions", layouts.put(path, text), tmp_path)[1] in ("problem", "unreadable")


@every("split", ["../outside", "/etc", "..", "train2014/../../outside", "none", ""])
def test_folders_of_vqa_images(split, tmp_path):
    data = data_folder(tmp_path)
    path = layouts.vqa(data)
    layouts.put(path, path.read_text().replace('"data_subtype": "train2014"', f'"data_subtype": "{split}"'))
    assert "can be used" in str(states("vqa", path, tmp_path))


@every("answers", [None, 3, [], [None], [{"answer": None}], [{"answer": ""}], {"answer": "yes"}])
def test_answers(answers, tmp_path):
    data = data_folder(tmp_path)
    path = layouts.vqa(data)
    layouts.put_json(data / "v2_mscoco_train2014_annotations.json", {"annotations": [
        {"question_id": 100, "answers": [{"answer": "yes"}]}, {"question_id": 101, "answers": answers}, 7]})
    assert states("vqa", path, tmp_path) == ["good", "problem", "problem"]


# ---- whole files ----

FILES = {
    "cc_sbu_align": "filter_cap.json", "imagebind_llm_pretrain": "some.csv", "imagebind_llm_finetune": "some.json",
    "webdataset": "00000.tar", "llava_instruct": "llava_instruct_150k.json", "jsonl": "some.jsonl",
    "coco_captions": "annotations/captions_train2017.json", "vqa": "v2_OpenEnded_mscoco_train2014_questions.json",
    "gqa": "train_balanced_questions.json", "refcoco": "refcoco/refs(unc).p", "invrefcoco": "refcoco/instances.json",
    "tfds": "prepared/dataset_info.json", "parquet": "train-00000-of-00001.parquet"}
CONTENTS = {
    "empty": b"", "zeros": b"\0" * 3000, "brackets": b"[" * 200_000, "not UTF-8": b"\xff\xfe[]", "null": b"null",
    "number": b"1" * 9000, "text": b'"text"', "array": b"[]", "object": b"{}", "parts": b'{"annotations": {}}',
    "a image": layouts.jpeg()}


def test_every_format_is_here():
    assert FILES.keys() == FORMATS.keys()


@every("kind", CONTENTS)
@every("name", FILES)
def test_files_of_something_else(name, kind, tmp_path):
    data = data_folder(tmp_path)
    path = getattr(layouts, name)(data)
    layouts.put(data / FILES[name], CONTENTS[kind])
    found = states(name, path, tmp_path)
    assert isinstance(found, (ValueError, FileNotFoundError)) or "good" not in found


@every("content", [
    "META: [", "META: ['../outside']", "a: &a [x, x]\nb: &b [*a, *a]\nMETA: *b", "META: &a [*a]", "META: {a: b}",
    "a: &a {x: [y, y]}\nb: &b {x: [*a, *a]}\nMETA: {META: *b}", "META: [some.csv, none.csv]",
    "!!python/object/apply:os.system ['echo']", "META: [[" * 300, "META: ['a\\0']"])
def test_lists_of_files(content, tmp_path):
    data = data_folder(tmp_path)
    layouts.imagebind_llm_pretrain(data)
    layouts.put(data / "pretrain.yaml", content)
    assert isinstance(states("imagebind_llm_pretrain", data, tmp_path), ValueError)


@every("seed", range(12))
@every("name", FILES)
def test_damaged_bytes(name, seed, tmp_path):
    """Cut at random, or bytes turned over at random."""
    data = data_folder(tmp_path)
    path = getattr(layouts, name)(data)
    random = np.random.default_rng([seed, sorted(FILES).index(name)])
    content = bytearray((data / FILES[name]).read_bytes())
    if seed % 3:
        for place in random.integers(0, len(content), 2 ** (seed // 2)):
            content[place] = random.integers(256)
    else:
        del content[random.integers(len(content)):]
    layouts.put(data / FILES[name], bytes(content))
    found = states(name, path, tmp_path)
    assert isinstance(found, Exception) or set(found) <= {"good", "problem", "unreadable"}


# ---- images ----

def png(width, height, content=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content))
            + chunk(b"IEND", b""))


def animated():
    file = io.BytesIO()
    Image.new("P", (4, 4)).save(file, "GIF")
    return file.getvalue()[:-8]


BROKEN_IMAGES = {
    "empty": b"", "text": b"A image of a dog.", "html": b"<html>404</html>", "cut": layouts.jpeg()[:300],
    "marker": b"\xff\xd8\xff", "zeros": b"\0" * 500, "bomb": png(60_000, 60_000), "large": png(10_000, 9_000),
    "flat": png(0, 9), "no pixels": png(9, 9), "gif": animated(),
    "program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "drawing": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
    "tiff": b"II*\0\xff\xff\xff\x7f", "bitmap": b"BM" + b"\xff" * 60, "numbers": b"P6 99999999 99999999 255\n"}


@every("kind", BROKEN_IMAGES)
@every("name", ["llava_instruct", "webdataset", "cc_sbu_align"])
def test_broken_images(name, kind, tmp_path):
    data = data_folder(tmp_path)
    def change(rows):
        if name == "webdataset":
            rows[3] = (rows[3][0], BROKEN_IMAGES[kind])

    path = getattr(layouts, name)(data, change)
    if name != "webdataset":
        layouts.put(data / ("image" if name == "cc_sbu_align" else "") / "1.jpg", BROKEN_IMAGES[kind])
    assert states(name, path, tmp_path) == ["good", "unreadable", "good"]


@every("seed", range(30))
def test_damaged_images(seed, tmp_path):
    """Damage that a decoder does not see is no error; whatever it raises is a ValueError that names the file."""
    data = data_folder(tmp_path)
    random = np.random.default_rng(seed)
    kind = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")[seed % 6]
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(file, kind)
    content = bytearray(file.getvalue())
    for place in random.integers(0, len(content), 8):
        content[place] = random.integers(256)
    layouts.jsonl(data)
    layouts.put(data / "1.jpg", bytes(content))
    first, damaged, last = states("jsonl", data, tmp_path)
    assert (first, last) == ("good", "good")
    assert damaged in ("good", "unreadable")


# ---- tars ----

@every(("members", "expected"), [
    ([("../outside/secret.jpg", layouts.jpeg()), ("../outside/secret.txt", b"words")], ["problem"]),
    ([("/etc/passwd.jpg", layouts.jpeg()), ("/etc/passwd.txt", b"words")], ["problem"]),
    ([("a.jpg", tarfile.SYMTYPE, "../outside/secret.jpg"), ("a.txt", b"words")], ["problem"]),
    ([("a.jpg", tarfile.LNKTYPE, "/etc/passwd"), ("a.txt", b"words")], ["problem"]),
    ([("a.jpg", layouts.jpeg()), ("a.txt", tarfile.SYMTYPE, "/etc/passwd")], ["problem"]),
    ([("folder", tarfile.SYMTYPE, "../outside"), ("folder/secret.jpg", b""), ("folder/secret.txt", b"words")],
     ["unreadable"]),
    ([("a.jpg", tarfile.CHRTYPE, ""), ("a.txt", b"words")], ["problem"]),
    ([("a.jpg", layouts.jpeg()), ("a.jpg", layouts.jpeg()), ("a.txt", b"words")], ["problem"]),
    ([("a.jpg", layouts.jpeg()), ("a.json", b"[" * 100_000)], ["problem"]),
    ([("x" * 3000 + ".jpg", layouts.jpeg()), ("x" * 3000 + ".txt", b"words")], ["good"]),
    ([("a.jpg", layouts.jpeg())], ["problem"]), ([("a.txt", b"words")], ["problem"]),
])
def test_tars(members, expected, tmp_path):
    data = data_folder(tmp_path)
    def change(rows):
        for member in members:
            if len(member) == 3:
                link = tarfile.TarInfo(member[0])
                link.type, link.linkname = member[1:]
                rows.append(link)
            else:
                rows.append(member)

    assert states("webdataset", layouts.webdataset(data, change), tmp_path) == ["good"] * 3 + expected


def test_the_watch_sees_what_is_read_outside(tmp_path):
    data = data_folder(tmp_path)
    path = layouts.jsonl(data)
    with pytest.raises(AssertionError), guarded(tmp_path):
        rgb(str(tmp_path / "outside" / "secret.jpg"))
    record = FORMATS["jsonl"](str(path))[0]
    os.symlink(tmp_path / "outside" / "secret.jpg", data / "link.jpg")
    with pytest.raises(AssertionError), guarded(tmp_path):
        state(dataclasses.replace(record, image=str(data / "link.jpg")))
