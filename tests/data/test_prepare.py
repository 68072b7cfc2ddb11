"""Data sets of TensorFlow Datasets: made of every format, stopped at any moment, damaged, and those of others."""

import dataclasses
import importlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image

from mmjax import cli
from mmjax.config import DataConfig
from mmjax.data import images, manifest, pipeline, prepare
from mmjax.data.formats import FORMATS, Record
from mmjax.data.formats.tfds import FIELDS, example, features, tfds
from tests.data import layouts

ROOT = Path(__file__).parents[2]
OTHERS = [name for name in FORMATS if name != "tfds"]
ASKED = Record("ä/1", "image", "A\0 dog.", "", "an input", (("What?", "A\0 dog."), ("", "No more.")))


def content(image):
    return None if image is None else image.read() if hasattr(image, "read") else Path(image).read_bytes()


def whole(records):
    """The records with their images' bytes."""
    return [dataclasses.replace(record, image=content(record.image), others=tuple(map(content, record.others)))
            for record in records]


def jsonl(folder, count=7, **wrong):
    """So many captions with a image each; `wrong` may change rows by their number (`_3=...`)."""
    rows = [wrong.get(f"_{number}", {"image": f"{number}.jpg", "caption": f"Caption {number}."})
            for number in range(count)]
    for number in range(count):
        layouts.put(folder / f"{number}.jpg", layouts.jpeg(number))
    return str(layouts.put(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*array_record*"))}


def call(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["mmjax", "data", *map(str, args)])
    cli.main()


# ---- there and back ----


@pytest.mark.parametrize("name", OTHERS)
def test_every_format_comes_back_as_it_was(name, tmp_path):
    source = str(getattr(layouts, name)(tmp_path / "data"))
    made = prepare.prepare(name, source, tmp_path / "out", shard_size=2)
    records, found = FORMATS[name](source), tfds(str(tmp_path / "out"))
    assert whole(found) == whole(records) and len(found) == len(records) == made.records == layouts.COUNT
    again = pickle.loads(pickle.dumps(found))
    assert whole(again) == whole(records) and list(again) == list(found)
    assert len(pickle.dumps(found)) < 500


def test_whatever_a_record_holds_comes_back(tmp_path, monkeypatch):
    jpeg = layouts.put(tmp_path / "a.jpg", layouts.jpeg())
    records = [dataclasses.replace(ASKED, image=str(jpeg)),
               dataclasses.replace(ASKED, image=None, prompt=None, turns=()),
               Record("2", str(jpeg), "", prompt="What?"), Record("", None, "words\n"),
               Record("several", str(jpeg), "words", others=(str(jpeg), str(jpeg)))]
    monkeypatch.setitem(FORMATS, "made", lambda path, root: records)
    prepare.prepare("made", "nowhere", tmp_path / "out")
    found = tfds(str(tmp_path / "out"))
    assert whole(found) == whole(records)
    assert [record.prompt for record in found] == ["", None, "What?", None, None]
    assert {field.name for field in dataclasses.fields(Record)} == {*FIELDS, "problem", "others"}


def test_examples_are_those_of_tensorflow_datasets():
    from tensorflow_datasets.proto import tf_example_pb2

    for record, image in ((ASKED, b"bytes"), (dataclasses.replace(ASKED, turns=(), prompt=None), None)):
        theirs = features().serialize_example({
            "name": record.name, "image": [image] if image else [], "answer": record.answer,
            "prompt": [] if record.prompt is None else [record.prompt], "input": record.input,
            "turns": [{"question": question, "answer": answer} for question, answer in record.turns]})
        ours = example(record, [image] if image else [])
        assert tf_example_pb2.Example.FromString(ours) == tf_example_pb2.Example.FromString(theirs)


def test_tensorflow_datasets_reads_it(tmp_path):
    source = layouts.llava_instruct(tmp_path / "data")
    folder = tmp_path / "sets" / "talks" / "1.0.0"
    prepare.prepare("llava_instruct", str(source), folder, name="talks", shard_size=2)
    builder = tensorflow_datasets.builder_from_directory(folder)
    assert builder.info.full_name == "talks/1.0.0" and builder.info.splits["train"].num_examples == layouts.COUNT
    first, *_ = found = builder.as_data_source("train")
    assert len(found) == layouts.COUNT and first["image"][0].shape == (layouts.HEIGHT, layouts.WIDTH, 3)
    assert first["answer"] == layouts.CAPTIONS[0].encode() and list(first["turns"]["question"])[1] == b"And? "
    by_name = tensorflow_datasets.data_source("talks", split="train[2:]", data_dir=tmp_path / "sets")
    assert len(by_name) == 1 and by_name[0]["answer"] == layouts.CAPTIONS[2].encode()
    assert [record.answer for record in tfds(f"{folder}?split=train[2:]")] == [layouts.CAPTIONS[2]]


def test_a_run_reads_it(tmp_path):
    """Images go through `images.load`; a worker process is sent little and opens the data set itself."""
    source = jsonl(tmp_path)
    prepare.prepare("jsonl", source, tmp_path / "out", shard_size=3)
    (records,) = pipeline.read(DataConfig(format="tfds", path=str(tmp_path / "out")))
    for record, other in zip(records, FORMATS["jsonl"](source), strict=True):
        sent = pickle.dumps(record.image)
        assert len(sent) < 500 and pickle.loads(sent) == record.image
        for image in (record.image, pickle.loads(sent)):
            np.testing.assert_array_equal(images.load(image, 4), images.load(other.image, 4))


def test_tensorflow_is_not_imported(tmp_path):
    source, out = jsonl(tmp_path / "data"), tmp_path / "out"
    code = ("import sys\nfrom mmjax import cli\n"
            f"sys.argv = ['mmjax', 'data', 'prepare', 'jsonl', {source!r}, '--out', {str(out)!r}]\ncli.main()\n"
            "from mmjax.data.formats import FORMATS\n"
            f"images = [record.image.read() for record in FORMATS['tfds']({str(out)!r})]\n"
            "heavy = {'tensorflow', 'torch', 'jax.numpy'} & sys.modules.keys()\n"
            "print(len(images), sorted(heavy - {'jax.numpy'}))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "7 []" and "7 records in 1 shards" in done.stdout


# ---- stopped and called again ----


class Stopping(list):
    """Records of which one stops the reading; what was asked for before is counted."""

    def __init__(self, records, at):
        super().__init__(records)
        self.at, self.asked = at, []

    def __getitem__(self, number):
        self.asked.append(number)
        if number == self.at:
            raise KeyboardInterrupt
        return super().__getitem__(number)


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "data", 11, _6={"image": "none.jpg", "caption": "Words."}, _9={})
    prepare.prepare("jsonl", source, tmp_path / "once", shard_size=2)
    stops, read = Stopping(FORMATS["jsonl"](source), 7), FORMATS["jsonl"]
    monkeypatch.setitem(FORMATS, "jsonl", lambda path, root: stops)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare("jsonl", source, tmp_path / "out", shard_size=2)
    written = shards(tmp_path / "out")
    assert len(written) == 3 and not list((tmp_path / "out").glob("*.partial"))
    with pytest.raises(ValueError, match="has 3 of 6 shards: .* The same command resumes: mmjax data prepare jsonl"):
        tfds(str(tmp_path / "out"))
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in written}

    rest = Stopping(stops, None)
    monkeypatch.setitem(FORMATS, "jsonl", lambda path, root: rest)
    made = prepare.prepare("jsonl", source, tmp_path / "out", shard_size=2)
    assert set(range(6, 11)) <= set(rest.asked) and set(rest.asked) - set(range(6, 11)) <= {0, 1, 2, 3, 4, 5}
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in written} == times
    assert shards(tmp_path / "out") == shards(tmp_path / "once") and (made.records, made.left_out) == (9, 2)
    assert ((tmp_path / "out" / prepare.ERRORS).read_text() == (tmp_path / "once" / prepare.ERRORS).read_text())

    monkeypatch.setitem(FORMATS, "jsonl", read)
    assert prepare.prepare("jsonl", source, tmp_path / "out", shard_size=2) == made  # nothing is left to do
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in written} == times


KILLED = """
import json, os, signal, sys
from mmjax.data import manifest, prepare
from mmjax.data.formats import FORMATS
from mmjax.data.formats.tfds import tfds

source, out = sys.argv[1:]
read = FORMATS["jsonl"]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Deadly(list):
    def __getitem__(self, number):
        return die() if number == 4 else super().__getitem__(number)

def reading():
    FORMATS["jsonl"] = lambda path, root: Deadly(read(path, root))

def renamed():
    def replace(source, target, replace=os.replace):
        replace(source, target)
        if "-00002-of-" in str(target):
            die()
    os.replace = replace

def half_a_line():
    def append(path, lines, append=manifest.append):
        if path.name == manifest.FILE and '"number": 3' in (line := "".join(lines)):
            append(path, [line[:40]])
            die()
        append(path, [line] if path.name == manifest.FILE else lines)
    manifest.append = append

def describing():
    from tensorflow_datasets import core
    core.DatasetInfo.write_to_directory = lambda *args: die()

for arrange in (reading, renamed, half_a_line, describing):
    if not (child := os.fork()):
        arrange()
        prepare.prepare("jsonl", source, out, shard_size=2)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        message = str(tfds(out))
    except ValueError as error:
        message = str(error)
    print(json.dumps([code, sorted(manifest.read(out).shards), message]))
"""


def test_killed_again_and_again(tmp_path):
    """Within a shard, between a shard and its line, in the middle of a line, and before the last files."""
    source = jsonl(tmp_path / "data", 9, _5={})
    prepare.prepare("jsonl", source, tmp_path / "once", shard_size=2)
    killed = subprocess.run([sys.executable, "-c", KILLED, source, tmp_path / "out"], capture_output=True, text=True,
                            cwd=ROOT, check=True)
    codes, done, messages = zip(*map(json.loads, killed.stdout.splitlines()), strict=True)
    assert codes == (-signal.SIGKILL,) * 4 and done == ([0, 1], [0, 1], [0, 1, 2], [0, 1, 2, 3, 4])
    assert all("was not prepared completely. The same command resumes" in message for message in messages)
    made = prepare.prepare("jsonl", source, tmp_path / "out", shard_size=2)
    assert shards(tmp_path / "out") == shards(tmp_path / "once")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "once").iterdir())
    assert (tmp_path / "out" / prepare.ERRORS).read_text() == (tmp_path / "once" / prepare.ERRORS).read_text()
    assert whole(tfds(str(tmp_path / "out"))) == whole(record for record in FORMATS["jsonl"](source) if record.answer)
    assert prepare.verify(tmp_path / "out") == made


@pytest.mark.parametrize(("change", "message"), [
    ({"shard_size": 3}, "shard_size = 2, now 3"), ({"name": "other"}, "name = 'jsonl', now 'other'"),
    ({"decode": True}, "decode = False, now True"), ({"source": "more"}, "source = .*now .*more/rows.jsonl"),
    ({"root": "data"}, "root = None, now .*data"),
    ({"source": "longer"}, r"source = .*longer.*\n  records = 7, now 8")])
def test_other_arguments_are_refused(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = {name: jsonl(Path(name), count) for name, count in (("data", 7), ("more", 7), ("longer", 8))}
    arguments = {"format": "jsonl", "source": sources["data"], "out": "out", "shard_size": 2}
    prepare.prepare(**arguments)
    before = shards("out")
    if "source" in change:
        change = {"source": sources[change["source"]]}
    with pytest.raises(ValueError, match=f"begun with other arguments:\n  {message}"):
        prepare.prepare(**arguments | change)
    assert shards("out") == before
    prepare.prepare(**arguments | {"source": str(Path(sources["data"]).absolute())})  # the same in other words


def test_another_source_of_the_same_name_is_refused(tmp_path, monkeypatch):
    records = [Record(str(number), None, "words") for number in range(5)]
    monkeypatch.setitem(FORMATS, "made", lambda path, root: records)
    prepare.prepare("made", "here", tmp_path / "out", shard_size=2)
    (tmp_path / "out" / "made-train.array_record-00002-of-00003").unlink()
    records[3] = Record("new", None, "words")
    with pytest.raises(ValueError, match="here has changed since .*its record 3 was '3' and is 'new'"):
        prepare.prepare("made", "here", tmp_path / "out", shard_size=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "xyz"}, "there is no format xyz; there are cc_sbu_align"),
        ({"name": "My-Set"}, "name = 'My-Set', but must have letters"),
        ({"shard_size": 0}, "shard_size = 0, but must be 1"),
        ({"source": "nowhere"}, "There is no nowhere"),
        ({"out": "full"}, "full has other files in it, such as mine.partial, mine.txt"),
    ],
)
def test_mistakes(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for mine in ("mine.txt", "mine.partial"):
        layouts.put(Path("full", mine), "mine")
    good = {"format": "jsonl", "source": jsonl(Path("data")), "out": "out"}
    with pytest.raises((ValueError, OSError), match=message):
        prepare.prepare(**good | arguments)
    assert sorted(os.listdir("full")) == ["mine.partial", "mine.txt"] and not Path("out").exists()


def test_two_at_once_are_refused(tmp_path, monkeypatch):
    """The second one is called while the first reads its records."""
    def read(path, root):
        monkeypatch.setitem(FORMATS, "made", lambda path, root: records)
        return Asking(records)

    class Asking(list):
        def __getitem__(self, number):
            with pytest.raises(OSError, match="Another process is preparing data in"):
                prepare.prepare("made", "here", tmp_path / "out")
            return super().__getitem__(number)

    records = [Record("0", None, "words")]
    monkeypatch.setitem(FORMATS, "made", read)
    assert prepare.prepare("made", "here", tmp_path / "out").records == 1


# ---- what cannot be used, or not be written ----


def test_what_cannot_be_used_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    data, wrong = tmp_path / "data", {f"_{number}": {"image": name, "caption": "Words."} for number, name in enumerate(
        ("none.jpg", "text.jpg", "half.png", "folder.jpg", "pipe.jpg", "large.png"))}
    source = jsonl(data, 9, **wrong, _6={"image": "6.jpg", "caption": " "}, _7={"prompt": "Hi", "answer": "Hello."})
    layouts.put(data / "text.jpg", "not an image")
    Image.new("L", (40, 40)).save(data / "half.png")
    layouts.put(data / "half.png", (data / "half.png").read_bytes()[:-20])
    (data / "folder.jpg").mkdir()
    os.mkfifo(data / "pipe.jpg")
    Image.new("1", (90, 90)).save(data / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8_000)
    call(monkeypatch, "prepare", "jsonl", source, "--out", tmp_path / "out", "--shard-size", 4)
    told = capsys.readouterr().out
    assert "3 records in 3 shards" in told and "6 of 9 records (66.67%) cannot be used and are left out" in told
    problems = [json.loads(line) for line in (tmp_path / "out" / prepare.ERRORS).read_text().splitlines()]
    assert [(problem["shard"], problem["record"], problem["name"]) for problem in problems] == [
        (number // 4, number, f"rows.jsonl:{number}") for number in (0, 1, 3, 4, 5, 6)]
    assert [Path(problem["file"]).name for problem in problems[:5]] == [
        "none.jpg", "text.jpg", "folder.jpg", "pipe.jpg", "large.png"]
    for problem, words in zip(problems, ("No image at", "text.jpg is not an image", "No image at", "No image at",
                                         "8100 pixels", "'caption' is empty"), strict=True):
        assert words in problem["problem"]
    assert [record.name for record in tfds(str(tmp_path / "out"))] == ["rows.jsonl:2", "rows.jsonl:7", "rows.jsonl:8"]

    made = prepare.prepare("jsonl", source, tmp_path / "decoded", decode=True)
    assert (made.records, made.left_out) == (2, 7)
    assert "half.png is not an image that can be read: image file is truncated" in (
        tmp_path / "decoded" / prepare.ERRORS).read_text()


def test_text_that_is_none_and_images_that_are_too_large(tmp_path, monkeypatch):
    large = tmp_path / "large.jpg"
    with open(large, "wb") as file:
        file.truncate(prepare.MOST_BYTES + 1)
    records = [Record("a\udcff", None, "words"), Record("1", None, "\ud800"), Record("2", str(large), "words"),
               Record("3", None, "words", problem="a problem"), Record("4", None, "words")]
    monkeypatch.setitem(FORMATS, "made", lambda path, root: records)
    made = prepare.prepare("made", "here", tmp_path / "out")
    assert (made.records, made.left_out) == (1, 4)
    lines = (tmp_path / "out" / prepare.ERRORS).read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["a\udcff", "1", "2", "3"]
    assert "surrogates not allowed" in lines[0] and "268435457 bytes, more than" in lines[2] and "a problem" in lines[3]


def test_nothing_that_can_be_used(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "made", lambda path, root: [Record("0", None, "", problem="no words")])
    with pytest.raises(ValueError, match="None of the 1 records of here can be used: see .*prepare_errors.jsonl"):
        prepare.prepare("made", "here", tmp_path / "out")


def test_a_full_disk(tmp_path, monkeypatch):
    """What is done stays, the rest is made when there is room."""
    records = [Record(str(number), None, "x" * size) for number, size in enumerate((10, 3 << 20, 10))]
    monkeypatch.setitem(FORMATS, "made", lambda path, root: records)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="-00001-of-00003 cannot be written: .*Complete shards are kept: once"):
            prepare.prepare("made", "here", tmp_path / "out", shard_size=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [*shards(tmp_path / "out")] == ["made-train.array_record-00000-of-00003"]
    assert not list((tmp_path / "out").glob("*.partial"))
    prepare.prepare("made", "here", tmp_path / "out", shard_size=1)
    assert whole(tfds(str(tmp_path / "out"))) == records


# ---- damaged afterwards ----


@pytest.fixture
def prepared(tmp_path):
    source = jsonl(tmp_path / "data")
    prepare.prepare("jsonl", source, tmp_path / "out", shard_size=3)
    return tmp_path / "out", source


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)


def test_a_damaged_shard_is_named(prepared, monkeypatch, capsys):
    folder, source = prepared
    before = shards(folder)
    call(monkeypatch, "verify", folder)
    assert f"All 3 shards of {folder} are as they were written: 7 records." in capsys.readouterr().out
    damaged = folder / "jsonl-train.array_record-00001-of-00003"
    inside = damaged.read_bytes().index(layouts.jpeg(4)) + 100
    flip(damaged, inside)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "verify", folder)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and f"{damaged.name} has the SHA-256" in said
    assert "1 of the 3 shards" in said and f"mmjax data prepare jsonl {source} --out {folder}" in said
    found = tfds(str(folder))  # of the right size
    assert [record.problem is None for record in found] == [True] * 4 + [False] + [True] * 2
    assert f"{damaged.name} is damaged" in found[4].problem and "mmjax data verify" in found[4].problem

    for spoil, message in ((lambda: damaged.write_bytes(damaged.read_bytes()[:-5]), r"has \d+ bytes, but was written"),
                           (damaged.unlink, "is missing")):
        spoil()
        with pytest.raises(ValueError, match=f"(?s)1 of the 3 shards .* are damaged:\n  {damaged.name} {message}"):
            tfds(str(folder))
    prepare.prepare("jsonl", source, folder, shard_size=3)
    assert shards(folder) == before
    assert len(manifest.read(folder).shards) == 3


@pytest.mark.parametrize("line", ["{", "[]", '{"number": 1}', json.dumps(dataclasses.asdict(manifest.Shard(
    1, "FILE", 1, 0, 1, "", "", ""))).replace("FILE", "../secret")])
def test_a_damaged_manifest_is_named(line, prepared):
    folder, source = prepared
    path = folder / manifest.FILE
    path.write_text(path.read_text() + line + "\n")
    for use in (tfds, prepare.verify, lambda folder: prepare.prepare("jsonl", source, folder, shard_size=3)):
        with pytest.raises(ValueError, match="prepare.jsonl is damaged"):
            use(str(folder))


def test_without_its_manifest_it_is_like_any_other(prepared):
    folder, source = prepared
    (folder / manifest.FILE).unlink()
    assert whole(tfds(str(folder))) == whole(FORMATS["jsonl"](source))
    with pytest.raises(ValueError, match="was not made by mmjax data prepare"):
        prepare.verify(folder)
    for path in folder.glob("*-00002-of-*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 shards are not there, such as .*-00002-of-00003. Copy"):
        tfds(str(folder))


def test_whatever_is_damaged_nothing_wrong_is_read(tmp_path):
    """Bits that are turned, shards that are cut off, files that are something else: an error, a problem, or no harm."""
    source = str(layouts.jsonl(tmp_path / "data"))
    folder, random = tmp_path / "out", np.random.default_rng(0)
    prepare.prepare("jsonl", source, folder)
    (folder / manifest.FILE).unlink()  # which would tell at once
    records, problems, refused = whole(FORMATS["jsonl"](source)), 0, 0
    for path in (next(folder.glob("*array_record*")), folder / "dataset_info.json", folder / "features.json"):
        good = path.read_bytes()
        bits = [place for place, byte in enumerate(good) if byte]
        flipped = [good[:place] + bytes([good[place] ^ 1 << int(random.integers(8))]) + good[place + 1:]
                   for place in random.choice(bits, 40)]
        for content in (*flipped, *(good[:place] for place in random.choice(bits, 10)), b"", bytes(9000), good[::-1]):
            path.write_bytes(content)
            try:
                found = list(tfds(str(folder)))
            except (ValueError, FileNotFoundError) as error:
                assert str(folder) in str(error)
                refused += 1
                continue
            if path.suffix == ".json":  # has no checksum: a turned bit may name another feature
                continue
            for record, wanted in zip(found, records, strict=True):
                problems += record.problem is not None
                assert record.problem or whole([record]) == [wanted]
        path.write_bytes(good)
    assert problems > 60 and refused > 40 and whole(tfds(str(folder))) == records


def test_shards_outside_of_the_folder_are_not_read(prepared, tmp_path):
    folder, _ = prepared
    name = "jsonl-train.array_record-00000-of-00003"
    shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match="1 shards are not below .*-00000-of-00003"):
        tfds(str(folder))


def test_more_shards_than_files_may_be_open(prepared, monkeypatch):
    limits = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: limits.append(limit))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (100, 300))
    tfds(str(prepared[0]))
    assert limits == []  # three more do not matter
    monkeypatch.setattr(importlib.import_module("mmjax.data.formats.tfds"), "SPARE", 2)
    tfds(str(prepared[0]))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (100, resource.RLIM_INFINITY))
    tfds(str(prepared[0]))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (100, 102))
    tfds(str(prepared[0]))
    assert limits == [(103, 300), (103, resource.RLIM_INFINITY), (102, 102)]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (4, 4))
    with pytest.raises(ValueError, match="has 3 shards, but a process may have 4 files open here"):
        tfds(str(prepared[0]))


# ---- data sets of others ----


def make(folder, name, features, examples, splits=("train",)):
    """A data set as anyone makes it. Its examples are (key, values); TensorFlow Datasets shuffles them."""
    def info(self):
        return tensorflow_datasets.core.DatasetInfo(
            builder=self, features=tensorflow_datasets.features.FeaturesDict(features))

    builder = type(name, (tensorflow_datasets.core.GeneratorBasedBuilder,), {
        "VERSION": tensorflow_datasets.core.Version("1.2.0"), "_info": info, "__module__": __name__,
        "_split_generators": lambda self, manager: {split: self._generate_examples() for split in splits},
        "_generate_examples": lambda self: iter(examples)}, skip_registration=True)
    made = builder(data_dir=folder, file_format="array_record")
    made.download_and_prepare()
    return str(made.data_dir)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Features named like those of COCO's captions; example n has one to three captions."""
    kinds = tensorflow_datasets.features
    return make(tmp_path_factory.mktemp("sets"), "CocoLike", {
        "image": kinds.Image(), "image/filename": kinds.Text(), "image/id": np.int64, "mask": kinds.LabeledImage(
            labels=2, shape=(None, None, 1)),
        "captions": kinds.Sequence({"id": np.int64, "text": np.str_})}, [
            (number, {"image": io.BytesIO(layouts.jpeg(number)), "image/filename": f"{number}.jpg", "image/id": number,
                      "mask": io.BytesIO(b"is never decoded"), "captions": [
                          {"id": 0, "text": f"{number}: {place}"} for place in range(1 + number % 3)]})
            for number in range(5)], ("train", "validation"))


def test_image_and_text_are_found(coco):
    records = tfds(coco)
    assert len(records) == 5 and [record.name for record in records] == [f"coco_like:{number}" for number in range(5)]
    for record in records:
        number, place = record.answer.split(": ")
        assert place == "0" and record.image.read() == layouts.jpeg(int(number))
        assert (record.prompt, record.input, record.turns, record.problem) == (None, "", (), None)
    assert len({record.answer for record in records}) == 5
    assert list(pickle.loads(pickle.dumps(records))) == list(records)
    several = tfds(f"{coco}?texts=3&split=validation")
    assert len(several) == 15 and several[1].name == "coco_like:0.1"
    for first in range(0, 15, 3):
        numbers, places = zip(*(record.answer.split(": ") for record in several[first:first + 3]), strict=True)
        many = 1 + int(numbers[0]) % 3
        assert len(set(numbers)) == 1 and [int(place) for place in places] == [place % many for place in range(3)]
    names = tfds(f"{coco}?text=image/filename&split=train[:2]")
    assert len(names) == 2 and all(record.answer.endswith(".jpg") for record in names)


def test_by_name(coco, monkeypatch):
    from tensorflow_datasets.core import constants

    monkeypatch.setattr(constants, "DATA_DIR", str(Path(coco).parents[1]))
    for name in ("coco_like", "tfds:coco_like", "coco_like:1.2.0", "tfds:coco_like:1.*.*?texts=1"):
        assert [record.answer for record in tfds(name)] == [record.answer for record in tfds(coco)]
    for name in ("coco_like:2.0.0", "coco_captions", "kaggle:coco_like", "no name"):
        with pytest.raises(FileNotFoundError, match=f"{name} is neither a folder nor a data set .*Nothing is downl"):
            tfds(name)


@pytest.mark.parametrize(("setting", "message"), [
    ("text=none", "text=none is none of them: it has the text features captions/text, image/filename"),
    ("image=mask", "image=mask is none of them: it has the image features image\n"),
    ("texts=0", "texts=0, but must be a positive integer"), ("texts", "'texts' is none of the options"),
    ("txt=1", r"'txt=1' is none of .* Did you mean text=...\?"),
    ("split=none", "there is no split 'none'; there are train, validation"),
    ("split=train[:0]", "there are no records in the split")])
def test_settings_that_cannot_be(setting, message, coco):
    with pytest.raises(ValueError, match=message):
        tfds(f"{coco}?{setting}")


def test_choices_that_are_not_clear(tmp_path):
    kinds = tensorflow_datasets.features
    examples = [(0, {"left": io.BytesIO(layouts.jpeg()), "right": io.BytesIO(layouts.jpeg()), "caption": "A dog.",
                     "title": " ", "number": 3})]
    path = make(tmp_path, "Both", {"left": kinds.Image(), "right": kinds.Image(), "caption": kinds.Text(),
                                   "title": kinds.Text(), "number": np.int64}, examples, ("one", "two"))
    with pytest.raises(ValueError, match=r"has 2 splits: one, two. Name one of them: .*\?split=NAME"):
        tfds(path)
    with pytest.raises(ValueError) as error:
        tfds(f"{path}?split=one")
    assert "the image is ambiguous: it has the image features left, right" in str(error.value)
    assert "the text is ambiguous: it has the text features caption, title" in str(error.value)
    (record,) = tfds(f"{path}?split=one&image=right&text=caption")
    assert (record.answer, record.image.read()) == ("A dog.", layouts.jpeg())
    assert "'title' is empty" in tfds(f"{path}?split=one&image=left&text=title")[0].problem
    path = make(tmp_path, "Neither", {"number": np.int64}, [(0, {"number": 1})])
    with pytest.raises(ValueError, match=r"(?s)image features \(none\).*text features \(none\)"):
        tfds(path)


def test_what_is_not_array_record_is_refused(coco, tmp_path):
    folder = tmp_path / "1.2.0"
    shutil.copytree(coco, folder)
    info = (folder / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="is stored as tfrecord, .* in the format array_record: tfds build"):
        tfds(str(folder))
    (folder / "dataset_info.json").write_text(info[:100])
    with pytest.raises(ValueError, match="is not a data set, or damaged: its dataset_info.json"):
        tfds(str(folder))
    (folder / "dataset_info.json").unlink()
    with pytest.raises(FileNotFoundError, match="there is no dataset_info.json in it. Name the folder that has it"):
        tfds(str(folder))
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        tfds(str(tmp_path / "nowhere"))
