"""Every item of a data set is accounted for: found = used + left out, by reason."""

import io
import json
import re

import numpy as np
from PIL import Image
from rich.console import Console

from mmjax.config import DataConfig, Source
from mmjax.data.check import check
from mmjax.data.formats import Account, webdataset
from tests.data import layouts

RECORDS = 1_000


def test_an_account_in_a_line_and_in_full():
    account = Account("rows", 10, 8)
    account.leave("blank lines", count=1)
    account.leave("links", "a", "b")
    account.reject("missing images", "c: No image")
    account.notice("16-bit images", "d")
    assert account.unaccounted == -1 and "unaccounted" in account.line("x")
    account.found += 1
    assert account.line("x") == ("x: 11 rows found = 7 used + 4 left out (1 blank lines, 2 links, 1 missing images); "
                                 "odd: 1 16-bit images")
    assert list(account.listing()) == ["left out, blank lines: 1 more", "left out, links: a", "left out, links: b",
                                       "left out, missing images: c: No image", "odd, 16-bit images: d"]
    copied = account.copy()
    copied.leave("links", "e")
    assert (account.left["links"].count, copied.left["links"].names) == (2, ["a", "b", "e"])


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


SOUND = [{"image": "ok.jpg", "prompt": "What is it?", "answer": "A dog."}] * 10
TALK = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]
PLANTED = {  # row or line: what names it
    '{"image": "gone.jpg", "caption": "words"}': "No image at .*gone.jpg",
    '{"image": "big.jpg", "caption": "words"}': "there is 'big.JPG'",
    '{"image": "cut.jpg", "caption": "words"}': "cut.jpg is not an image that can be read",
    '{"image": "avif.jpg", "caption": "words"}': "it holds an AVIF image",
    '{"image": "empty.jpg", "caption": "words"}': r"it holds nothing \(0 bytes\)",
    '{"image": "link.jpg", "caption": "words"}': "link.jpg' is a link that leads to .*outside.jpg",
    '{"image": "../outside.jpg", "caption": "words"}': "'../outside.jpg' is not below",
    '{"image": "ok.jpg", "caption": " "}': "'caption' is empty",
    '{"image": null, "caption": "words"}': "a caption without an image",
    '{"image": "deep.png", "caption": "words"}': "odd, images of 16 bits or floats.*deep.png",
    '{"image": "ok.jpg", "caption": "the end </s> more"}': "odd, captions with a special symbol.*</s>",
    '{"image": "ok.jpg", "prompt": "What?"}': "'answer' must be str",
    '{"image": "ok.jpg", "prompt": "<ImageHere> <ImageHere>", "answer": "A"}': "has 2 <ImageHere>, but there is one",
    '{"prompt": "<image> What?", "answer": "A"}': "shows an image that is not there",
    '{"image": ["ok.jpg", 3], "prompt": "What?", "answer": "A"}': "'image' must be a name or a list of names",
    json.dumps({"image": "ok.jpg", "conversations": TALK[::-1]}): "the conversation begins with 'gpt'",
    json.dumps({"image": "ok.jpg", "conversations": TALK[:1]}): "an answer to every question",
    '{"image": "ok.jpg", "turns": []}': "'turns' is empty",
    '{"image": "ok.jpg"': "the line is not JSON",
    "  ": "left out, blank lines: 1 more",
}


def test_twenty_kinds_of_trouble_among_a_thousand_records(tmp_path):
    """Each is named, nothing else is left out, and the total comes out."""
    data = tmp_path / "data"
    layouts.put(data / "ok.jpg", layouts.jpeg())
    layouts.put(data / "big.JPG", layouts.jpeg())
    layouts.put(data / "cut.jpg", layouts.jpeg()[:200])
    layouts.put(data / "avif.jpg", b"\0\0\0\x1cftypavif" + bytes(40))
    layouts.put(data / "empty.jpg", b"")
    layouts.put(data / "deep.png", png(Image.fromarray(np.full((6, 8), 40_000, np.uint16))))
    layouts.put(tmp_path / "outside.jpg", layouts.jpeg())
    (data / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    rows = [json.dumps(SOUND[0])] * (RECORDS - len(PLANTED))
    for number, row in enumerate(PLANTED):
        rows.insert(40 * number + 7, row)
    layouts.put(data / "rows.jsonl", "\n".join(rows) + "\n")
    said = Console(record=True, file=io.StringIO(), width=10_000)
    cfg = DataConfig(mixture=(Source("jsonl", str(data / "rows.jsonl")),), max_bad_share=0.5)
    (found,), _ = check(cfg, tmp_path / "out", console=said, list_all=True)
    account, lines = found.account, said.export_text()
    left = {reason: items.count for reason, items in account.left.items()}
    assert (account.found, account.used, account.unaccounted) == (RECORDS, RECORDS - 18, 0)
    assert left == {"missing images": 2, "corrupt images": 3, "unfit records": 12, "blank lines": 1}
    assert [number for number, named in enumerate(PLANTED.values()) if not re.search(named, lines)] == []
    assert f"{RECORDS:,} lines found = {RECORDS - 18:,} used + 18 left out" in lines


def test_members_of_a_tar_are_all_counted(tmp_path):
    """Two dots, a suffix that is not read, hidden ones, a caption in two forms, names that are not UTF-8, and an
    archive behind the end of the first."""
    jpeg, latin = layouts.jpeg(), b"caf\xe9".decode("utf-8", "surrogateescape")
    members = [("a.jpg", jpeg), ("a.txt", b"\xef\xbb\xbfA dog."), ("a.json", b"{}"), ("b.1.jpg", jpeg),
               ("b.1.txt", b"words"), ("c.cls", b"3"), ("._a.jpg", b"Mac OS X"), ("README", b"x"),
               (f"{latin}.jpg", jpeg), (f"{latin}.txt", b"one"), (f"{latin[:-1]}\udcea.jpg", jpeg),
               (f"{latin[:-1]}\udcea.txt", b"two")]
    whole = layouts.tar(tmp_path / "0.tar", members).read_bytes()
    layouts.put(tmp_path / "0.tar", whole + layouts.tar(tmp_path / "1.tar", members[:2]).read_bytes())
    (tmp_path / "1.tar").unlink()
    layouts.put(tmp_path / "stats.json", "{}")
    for _ in range(2):  # the second time from the cached index
        records = webdataset(str(tmp_path))
        assert [record.answer for record in records] == ["A dog.", "one", "two", "A dog."]
        account = records.account
        assert (account.found, account.used, account.unaccounted) == (11, 4, 0)
        assert {reason: items.names for reason, items in account.left.items()} == {
            "members with two dots in their names (the suffix begins at the first)": ["0.tar:b.1.jpg", "0.tar:b.1.txt"],
            "members with the suffix '.cls'": ["0.tar:c.cls"], "members .json beside a .txt": ["0.tar:a"],
            "members without a suffix, or hidden ones": ["0.tar:._a.jpg", "0.tar:README"],
            "files that are no .tar": ["stats.json"]}
        assert {what: items.count for what, items in account.odd.items()} == {
            "members whose names are not UTF-8": 4, "archives behind the end of the first": 1}


def test_what_follows_a_tar_and_is_no_tar_is_said(tmp_path):
    path = layouts.webdataset(tmp_path)
    layouts.put(path, path.read_bytes() + b"x" * 700)
    *sound, last = webdataset(str(path))
    assert len(sound) == layouts.COUNT and "it goes on behind its end, but not with a tar: 700 bytes" in last.problem
