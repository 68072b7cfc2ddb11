"""The index of tars that is kept on disk: read again instead of the headers, and believed only where it fits."""

import concurrent.futures
import os
import types

import numpy as np
import pytest
from etils import epath

from mmjax.data.formats import tar_index, webdataset
from tests.data import layouts

MADE_OF = (10_000, 7)
INDEX = tar_index.TarIndex(np.array([b"a", b"b"]), np.array([[512, 90, 2048, 5, 0], [0] * 5]), {1: "has no caption"})


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv(tar_index.VARIABLE, str(tmp_path / "cache"))
    tar_index._say.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def headers(monkeypatch):
    """The tars whose headers were read."""
    read, seen = tar_index.cached, []

    def watched(file, place, index):
        return read(file, place, lambda path: [seen.append(os.path.basename(path)), index(path)][1])

    monkeypatch.setattr(tar_index, "cached", watched)
    return seen


def tars(tmp_path, count=3):
    for number in range(count):
        layouts.tar(tmp_path / "data" / f"{number:05d}.tar", layouts.members()[:3 + 3 * number])
    return str(tmp_path / "data")


def test_headers_are_read_once(tmp_path, place, headers):
    path = tars(tmp_path)
    first = list(webdataset(path))
    assert sorted(headers) == ["00000.tar", "00001.tar", "00002.tar"]
    assert [file.suffix for file in place.iterdir()] == [".index"] * 3
    headers.clear()
    assert list(webdataset(path)) == first and not headers
    assert list(webdataset(f"{path}/{{00000..00002}}.tar")) == first and not headers


def test_problems_are_kept_too(tmp_path, place, headers):
    path = layouts.tar(tmp_path / "a.tar", [("a.jpg", b"p"), ("b.txt", b"words"), ("é" * 9 + ".jpg", b"p"),
                                            ("é" * 9 + ".txt", b"words")])
    whole = path.read_bytes().rstrip(b"\0")
    layouts.put(path, whole + b"\0" * (-len(whole) % 512) + b"x" * 512)  # damaged behind the last member
    first = list(webdataset(str(path)))
    assert [record.problem is None for record in first] == [False, False, True, False]
    headers.clear()
    assert list(webdataset(str(path))) == first and not headers


@pytest.mark.parametrize("change", ["other content", "other time", "shorter"])
def test_a_tar_that_has_changed_is_read_again(change, tmp_path, place, headers):
    path = tars(tmp_path)
    webdataset(path)
    headers.clear()
    file = tmp_path / "data" / "00001.tar"
    if change == "other content":
        os.utime(layouts.tar(file, [("x.jpg", b"p"), ("x.txt", b"words")]), ns=(1, 1))
    elif change == "other time":
        os.utime(file, ns=(1, 1))
    else:
        os.truncate(file, 4096)
    records = list(webdataset(path))
    assert headers == ["00001.tar"]
    assert ("00001.tar:x" in [record.name for record in records]) == (change == "other content")
    headers.clear()
    assert list(webdataset(path)) == records and not headers


def damaged(content, kind):
    if kind == "cut":
        return content[:len(content) // 2]
    if kind == "empty":
        return b""
    place = int(kind)
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1:]


@pytest.mark.parametrize("kind", ["cut", "empty", "0", "31", "32", "200", "-30", "-1"])
def test_a_damaged_index_is_said_and_made_anew(kind, tmp_path, place, headers, capsys):
    path = tars(tmp_path, count=1)
    first = list(webdataset(path))
    (file,) = place.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damaged(whole, str(int(kind) % len(whole)) if kind.lstrip("-").isdigit() else kind))
    headers.clear()
    assert list(webdataset(path)) == first
    assert headers == ["00000.tar"]
    said = " ".join(capsys.readouterr().err.split())
    assert "is damaged (its checksum is wrong)" in said and "are read again" in said
    headers.clear()
    assert list(webdataset(path)) == first and not headers


def test_an_index_is_the_same_there_and_back():
    found = tar_index._parse(tar_index._content(INDEX, MADE_OF), MADE_OF)
    np.testing.assert_array_equal(found.keys, INDEX.keys)
    np.testing.assert_array_equal(found.places, INDEX.places)
    assert found.problems == INDEX.problems
    assert tar_index._parse(tar_index._content(INDEX, (10_000, 8)), MADE_OF) is None


@pytest.mark.parametrize(("changes", "message"), [
    ({"places": np.array([[512, 9_489, 2048, 5, 0], [0] * 5])}, "points outside of the tar"),
    ({"places": np.array([[512, 90, 2048, 5, 2], [0] * 5])}, "points outside of the tar"),
    ({"places": np.array([[-1, 90, 2048, 5, 0], [0] * 5])}, "points outside of the tar"),
    ({"places": np.array([[512, 90, 2**62, 2**62, 0], [0] * 5])}, "points outside of the tar"),
    ({"places": np.array([[512, -1, 2048, 5, 0], [0] * 5])}, "points outside of the tar"),
    ({"places": INDEX.places[:1]}, "it holds"), ({"places": INDEX.places.astype(np.float64)}, "it holds"),
    ({"keys": np.array(["a", "b"])}, "it holds"), ({"problems": {2: "no such sample"}}, "points outside of the tar"),
    ({"keys": np.array([None, None])}, "it cannot be read")])
def test_an_index_that_does_not_fit_its_tar(changes, message):
    """With a checksum that is right."""
    with pytest.raises(ValueError, match=message):
        tar_index._parse(tar_index._content(INDEX._replace(**changes), MADE_OF), MADE_OF)


def test_many_at_once(tmp_path, place):
    path = tars(tmp_path)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: list(webdataset(path)), range(16)))
    assert all(records == found[0] for records in found)
    assert [file.suffix for file in place.iterdir()] == [".index"] * 3  # nothing half written stays


def test_nothing_is_kept_of_what_is_no_tar(tmp_path, place):
    layouts.put(tmp_path / "a.tar", b"x" * 4096)
    with pytest.raises(ValueError, match="a.tar is not a tar"):
        webdataset(str(tmp_path / "a.tar"))
    assert not list(place.iterdir())


def test_a_tar_that_changes_while_it_is_read_is_not_kept(tmp_path, place):
    path = layouts.webdataset(tmp_path)
    place.mkdir()
    tar_index.cached(str(path), place, lambda file: [os.utime(file, ns=(1, 1)), INDEX][1])
    assert not list(place.iterdir())


def test_remote_tars(place, monkeypatch):
    """What a bucket says of a file is its stamp; where it tells no time, headers are read every time."""
    place.mkdir()
    for time, reads in ((7, 1), (None, 2)):
        stat = types.SimpleNamespace(length=10_000, mtime=time)
        monkeypatch.setattr(epath, "Path", lambda path, stat=stat: types.SimpleNamespace(stat=lambda: stat))
        calls = []
        for _ in range(2):
            tar_index.cached(f"gs://bucket/{time}.tar", place, lambda file, calls=calls: [calls.append(file), INDEX][1])
        assert len(calls) == reads


def test_folders_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    path = layouts.webdataset(tmp_path)
    layouts.put(tmp_path / "file", "")
    monkeypatch.setenv(tar_index.VARIABLE, str(tmp_path / "file"))
    with pytest.raises(ValueError, match=f"{tar_index.VARIABLE} = .*file: this folder cannot be written .*'off'"):
        webdataset(str(path))
    monkeypatch.delenv(tar_index.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tar_index.folder() is None and len(webdataset(str(path))) == layouts.COUNT
    tar_index._say.cache_clear()
    for _ in range(2):
        tar_index.cached(str(path), tmp_path / "gone", lambda _: INDEX)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("will be read again by the next run") == 1 and "(No such file or directory)" in said


def test_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv(tar_index.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tar_index.folder() == tmp_path / "mmjax" / "tars" and tar_index.folder().is_dir()
