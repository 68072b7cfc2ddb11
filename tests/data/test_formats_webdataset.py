"""Images and captions in tars: what is found in them, and what a tar can do to a reader."""

import io
import pathlib
import tarfile

import pytest
from etils import epath

from mmjax.data.formats import Member, Record, webdataset
from mmjax.data.formats.webdataset import shards
from mmjax.data.images import rgb
from tests.data import layouts


def found(path):
    return {record.name.partition(":")[2]: record for record in webdataset(str(path))}


def info(name, kind=tarfile.REGTYPE, size=0, **fields):
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    for key, value in fields.items():
        setattr(member, key, value)
    return member


def test_samples(tmp_path):
    path = layouts.webdataset(tmp_path)
    records = webdataset(str(path))
    with tarfile.open(path) as archive:
        images = [member for member in archive if member.name.endswith(".jpg")]
    assert list(records) == [
        Record(f"00000.tar:{number:09d}", Member(str(path), image.offset_data, image.size),
               layouts.CAPTIONS[number]) for number, image in enumerate(images)]
    assert [record.image.read() for record in records] == [layouts.jpeg(number) for number in range(layouts.COUNT)]
    assert rgb(records[0].image).size == (layouts.WIDTH, layouts.HEIGHT)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_way_to_write_names(form, tmp_path):
    keys = ["a", "folder.x/b", "d" * 90 + "/" + "k" * 90]
    if form != tarfile.USTAR_FORMAT:
        keys += ["ü" * 80, "q" * 190]
    content = [(f"{key}{end}", text) for key in keys for end, text in ((".JPG", b"p" * 700), (".txt", key.encode()))]
    path = layouts.tar(tmp_path / "a.tar", [info("folder.x", tarfile.DIRTYPE), *content], form)
    records = found(path)
    assert list(records) == keys
    for key in keys:
        assert (records[key].answer, records[key].image.read()) == (key, b"p" * 700)


@pytest.mark.parametrize(("caption", "kind", "answer"), [
    (b'{"caption": "A dog.", "text": "no"}', "json", "A dog."), (b'{"text": "A dog.", "url": 3}', "json", "A dog."),
    ("Ein Höhlenbär".encode(), "txt", "Ein Höhlenbär")])
def test_captions(caption, kind, answer, tmp_path):
    path = layouts.tar(tmp_path / "a.tar", [("k.png", b"p"), (f"k.{kind}", caption), ("k.cls", b"3"), ("none", b"")])
    assert [record.answer for record in webdataset(str(path))] == [answer]


@pytest.mark.parametrize(("caption", "kind", "problem"), [
    (b"", "txt", "'caption' is empty"), (b" \n", "txt", "'caption' is empty"), (b"\xff", "txt", "can't decode"),
    (b"{", "json", "Expecting"), (b"[]", "json", "expected an object"), (b"{}", "json", "'text' must be str"),
    (b'{"caption": null, "text": "words"}', "json", "'caption' must be str, got None"),
    (b"[" * 100_000, "json", "nested too deeply"), (b'{"caption": "\\ud800"}', "json", "is not text")])
def test_captions_that_cannot_be_used(caption, kind, problem, tmp_path):
    content = [("a.jpg", b"p"), (f"a.{kind}", caption), ("b.jpg", b"p"), ("b.txt", b"A dog.")]
    first, second = webdataset(str(layouts.tar(tmp_path / "a.tar", content)))
    assert problem in first.problem
    assert (first.name, first.image, second.problem, second.answer) == ("a.tar:a", None, None, "A dog.")


@pytest.mark.parametrize(("members", "key", "problem"), [
    ([("a.jpg", b"p")], "a", "has no caption"), ([("a.txt", b"words")], "a", "has no image"),
    ([("a.jpg", b"p"), ("a.png", b"p"), ("a.txt", b"words")], "a", "has two members 'png'"),
    ([("a.jpg", b"p"), ("a.txt", b"words"), ("a.txt", b"more")], "a", "has two members 'txt'"),
    ([("../a.jpg", b"p"), ("../a.txt", b"words")], "../a", "leads out of the tar"),
    ([("/etc/a.jpg", b"p"), ("/etc/a.txt", b"words")], "/etc/a", "leads out of the tar"),
    ([("b/../../a.jpg", b"p")], "b/../../a", "leads out of the tar"),
    ([info("a.jpg", tarfile.SYMTYPE, linkname="/etc/passwd"), ("a.txt", b"words")], "a", "is a link"),
    ([info("a.jpg", tarfile.LNKTYPE, linkname="b.jpg"), ("a.txt", b"words")], "a", "is a link"),
    ([info("a.txt", tarfile.CHRTYPE), ("a.jpg", b"p")], "a", "is a link or a sparse or special file"),
    ([info("a.jpg", tarfile.FIFOTYPE), ("a.txt", b"words")], "a", "is a link or a sparse or special file"),
    ([("a.jpg", b"p"), ("a.txt", b"x" * (2**20 + 1))], "a", "more than the 1048576 that are read"),
    ([info("a.jpg", pax_headers={"GNU.sparse.realsize": "9" * 15}), ("a.txt", b"words")], "a", "sparse"),
])
def test_members_that_cannot_be_used(members, key, problem, tmp_path):
    path = layouts.tar(tmp_path / "a.tar", [*members, ("good.jpg", b"p"), ("good.txt", b"A dog.")])
    records = found(path)
    assert problem in records[key].problem
    assert records[key].image is None
    assert (records["good"].problem, len(records)) == (None, 2)


@pytest.mark.parametrize("keep", range(0, 9 * 1024, 700))
def test_tars_that_end_early(keep, tmp_path):
    """What is whole is used, what is cut off is named, and whatever is lost is named once."""
    path = layouts.tar(tmp_path / "a.tar", layouts.members())
    whole = list(webdataset(str(path)))
    layouts.put(path, path.read_bytes()[:keep])
    if keep < 512:
        with pytest.raises(ValueError, match="a.tar is not a tar"):
            webdataset(str(path))
        return
    records = webdataset(str(path))
    good = [record for record in records if record.problem is None]
    assert good == whole[:len(good)]
    if len(good) < len(whole):
        assert len(records) > len(good)
    for record in good:
        rgb(record.image)


@pytest.mark.parametrize("damage", [b"\xff", b"9", b"x"])
@pytest.mark.parametrize("place", [0, 124, 135, 148, 156, 257, 400])
def test_damaged_headers(damage, place, tmp_path):
    """Any byte of a header is in its checksum: what lies behind is lost, which is said."""
    path = layouts.tar(tmp_path / "a.tar", layouts.members())
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        header = archive.getmembers()[3].offset
    content[header + place:header + place + 1] = damage
    layouts.put(path, bytes(content))
    records = found(path)
    assert list(records) == ["000000000", "(the rest.)"]
    assert records["000000000"].problem is None
    assert f"there is no header at byte {header}" in records["(the rest.)"].problem


def with_checksum(header):
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("size", [b"\x80" + b"\xff" * 11, b"\xff" * 12, b"7" * 11 + b"\0", b"-1\0\0\0\0\0\0\0\0\0\0"])
@pytest.mark.parametrize("kind", b"0Lx5S")
def test_sizes_that_lie(size, kind, tmp_path):
    """Huge and negative sizes end the walk at once: nothing is read, nothing is set aside in memory."""
    path = layouts.tar(tmp_path / "a.tar", layouts.members())
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        start = archive.getmembers()[3].offset
    header = bytearray(content[start:start + 512])
    header[124:136], header[156] = size, kind
    layouts.put(path, content[:start] + with_checksum(header) + content[start + 512:])
    records = found(path)
    assert records["000000000"].problem is None
    assert not [key for key, record in records.items() if record.problem is None and key != "000000000"
                and not record.image.read()]


@pytest.mark.parametrize("extra", [b"9 size=-1\n", b"30 size=99999999999999999999\n", b"99 path=a\n", b"path=a\n",
                                   b"11 size=x1\n", b"0 path=x\n", b"7 path=x\n"])
def test_extra_headers_that_lie(extra, tmp_path):
    path = layouts.tar(tmp_path / "a.tar", [("a.jpg", b"p"), ("a.txt", b"words"), info("x", tarfile.XHDTYPE)])
    content = path.read_bytes()
    start = content.index(b"x\0\0\0")
    header = bytearray(content[start:start + 512])
    header[124:136] = b"%011o\0" % len(extra)
    last = layouts.tar(tmp_path / "b.tar", [("b.jpg", b"p"), ("b.txt", b"words")]).read_bytes()
    layouts.put(path, content[:start] + with_checksum(header) + extra.ljust(512, b"\0") + last)
    records = found(path)
    assert records["a"].problem is None
    assert any(record.problem for record in records.values())


@pytest.mark.parametrize("content", [b"", b"<html>404 Not Found</html>", b"x" * 4096, b"\x1f\x8b" + b"\0" * 2000])
def test_files_that_are_no_tars(content, tmp_path):
    for number in range(2):
        layouts.put(tmp_path / f"{number}.tar", content)
    layouts.tar(tmp_path / "2.tar", layouts.members())
    with pytest.raises(ValueError, match="(?s)2 of the 3 tars of .*0.tar is not a tar, or a comp.*1.tar is not a tar"):
        webdataset(str(tmp_path))


def test_tars_without_samples(tmp_path):
    layouts.tar(tmp_path / "a.tar", [])
    layouts.tar(tmp_path / "b.tar", [("stats.parquet", b"x")])
    with pytest.raises(ValueError, match="The 2 tars of .* hold no images with captions"):
        webdataset(str(tmp_path))
    layouts.tar(tmp_path / "c.tar", layouts.members())
    assert [record.name for record in webdataset(str(tmp_path))] == [f"c.tar:{number:09d}" for number in range(3)]


def test_many_tars(tmp_path):
    for number in range(12):
        layouts.tar(tmp_path / f"{number:05d}.tar", layouts.members()[:3 * (number % 3)])
    expected = [f"{number:05d}.tar:{key:09d}" for number in range(12) for key in range(number % 3)]
    records = webdataset(str(tmp_path / "{00000..00011}.tar"))
    assert [record.name for record in records] == expected == [record.name for record in webdataset(str(tmp_path))]
    assert [record.image.file for record in records][0] == str(tmp_path / "00001.tar")
    with pytest.raises(FileNotFoundError, match="2 of 14 tars do not exist, such as .*00012.tar, .*00013.tar"):
        webdataset(str(tmp_path / "{00000..00013}.tar"))


@pytest.mark.parametrize(("path", "expected"), [
    ("a.tar", ["a.tar"]), ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]), ("{3..3}", ["3"]),
    ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]), ("gs://b/{0..1}.tar",
                                                                         ["gs://b/0.tar", "gs://b/1.tar"])])
def test_braces(path, expected):
    assert shards(path) == expected


@pytest.mark.parametrize("name", ["exp [1]", "a*", "{a,b}"])
def test_a_folder_of_tars_may_have_any_name(tmp_path, name):
    (tmp_path / name).mkdir()
    for file in ("1.tar", "0.tar", ".2.tar", "3.txt"):
        (tmp_path / name / file).touch()
    assert shards(str(tmp_path / name)) == [str(tmp_path / name / file) for file in ("0.tar", "1.tar")]


@pytest.mark.parametrize(("path", "message"), [
    ("{2..1}.tar", "no tars"), ("{0..999999999999}.tar", "more than a million"),
    ("{0..9999}{0..9999}.tar", "more than a million")])
def test_braces_that_stand_for_nothing(path, message):
    with pytest.raises(ValueError, match=message):
        shards(path)


def test_remote_tars(tmp_path, monkeypatch):
    """`etils.epath` opens whatever it knows; here a bucket that is a folder."""
    layouts.webdataset(tmp_path / "bucket")

    class Path:
        def __init__(self, path):
            self.path = pathlib.Path(str(path).replace("gs://", f"{tmp_path}/"))

        def __getattr__(self, name):
            return getattr(self.path, name)

    monkeypatch.setattr(epath, "Path", Path)
    records = webdataset("gs://bucket/{00000..00000}.tar")
    assert records[1].image.file == "gs://bucket/00000.tar"
    assert records[1].image.read() == layouts.jpeg(1)


def test_archives_that_change(tmp_path):
    """What was there when the headers were read may be gone later: that is said, too."""
    path = layouts.webdataset(tmp_path)
    records = webdataset(str(path))
    record = records[2]
    layouts.put(path, path.read_bytes()[:1500])
    assert "the archive ends after" in records[2].problem
    with pytest.raises(ValueError, match="00000.tar, .* is not an image that can be read: .*the archive ends after"):
        rgb(record.image)
    path.unlink()
    assert "No such file" in records[0].problem
    assert rgb(io.BytesIO(layouts.jpeg())).size == (layouts.WIDTH, layouts.HEIGHT)
