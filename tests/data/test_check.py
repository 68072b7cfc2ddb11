import json
import shutil

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mmjax import cli
from mmjax.config import DataConfig, Source, TextConfig
from mmjax.data.check import CORRUPT, MISSING, UNFIT, RowSettings, check
from mmjax.tokenizer import Tokenizer
from tests import small

TEXT = TextConfig(prompt_template="###Human: {} ###Assistant: ", end_sym="###", max_txt_len=6)
CAPTIONS = ["one two three", "four five", "", "seven", "eight", "nine ten eleven", "twelve", "thirteen"]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(small.checkpoint() / "tokenizer")


@pytest.fixture
def folder(tmp_path):
    """Eight rows of jsonl: one without words, one image that is cut off, one that is no image, one not there."""
    rows = [{"image": f"{number}.png", "caption": caption} for number, caption in enumerate(CAPTIONS)]
    for row in rows:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / row["image"])
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:300])
    (tmp_path / "4.png").write_text("not an image")
    (tmp_path / "6.png").unlink()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def data(folder, **changes):
    return DataConfig(format="jsonl", path=str(folder / "rows.jsonl"), **changes)


def test_everything_wrong_is_counted_and_named(folder):
    (found,), too_bad = check(data(folder), folder / "out", console=QUIET)
    assert too_bad and found.bad_share == 0.5
    assert (found.records, found.looked_at) == (8, 8)
    kinds = {problem.name: problem.kind for problem in found.problems}
    assert kinds == {"rows.jsonl:2": UNFIT, "rows.jsonl:3": CORRUPT, "rows.jsonl:4": CORRUPT, "rows.jsonl:6": MISSING}
    assert found.lengths == (3, 2, 3, 1) and found.unit == "words"
    assert found.truncated is None and found.unlearnt is None
    card = json.loads((folder / "out" / "data_check.json").read_text())
    assert card["bad_share"] == 0.5 and [p["name"] for p in card["sources"][0]["problems"]] == [*kinds]
    assert card["sources"][0]["histogram"] == {"width": 1, "counts": [0, 1, 1, 2]}
    with Image.open(folder / "out" / "data_check.png") as image:
        assert image.width > 400


def test_rows_are_cut_as_the_run_cuts_them(folder, tokenizer):
    rows = RowSettings(tokenizer, TEXT, image_tokens=4)
    cfg = data(folder, prompts=("<Img><ImageHere></Img> What?", "<Img><ImageHere></Img>"))
    (found,), _ = check(cfg, folder, rows, console=QUIET)
    wanted = [len(tokenizer.encode(CAPTIONS[number] + "###")) for number in (0, 1, 5, 7)]
    assert found.lengths == tuple(wanted) and found.unit == "tokens"
    assert found.truncated == sum(length > 6 for length in wanted) in (1, 2, 3)
    assert found.unlearnt == 0
    (nothing,), _ = check(cfg, folder, RowSettings(tokenizer, TextConfig(max_txt_len=0), 4), console=QUIET)
    assert nothing.unlearnt == 4 and nothing.lengths == tuple(wanted)
    (words,), _ = check(cfg, folder, RowSettings(tokenizer), console=QUIET)
    assert words.lengths == tuple(len(tokenizer.encode(CAPTIONS[number])) for number in (0, 1, 5, 7))


def test_rows_that_a_run_cannot_make_are_unfit(folder, tokenizer):
    (found,), _ = check(
        data(folder, prompts=("No place for it",)), folder, RowSettings(tokenizer, TEXT, 4), console=QUIET
    )
    assert found.count(UNFIT) == 8 and "0 <ImageHere> for 1 images" in found.problems[0].problem


def test_whatever_stands_in_the_data_can_be_shown(folder, capsys):
    rows = {"image": "\x1b[31m[red].png", "caption": "Words"}, {"image": "0.png", "caption": "Words"}
    (folder / "[red]rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = DataConfig(format="jsonl", path=str(folder / "[red]rows.jsonl"))
    (found,), _ = check(cfg, folder, console=Console())
    said = capsys.readouterr().out
    assert len(found.problems) == 1 and "\x1b" not in said and "[31m[red].png" in said.replace("\n", "")
    assert json.loads((folder / "data_check.json").read_text())["sources"][0]["problems"]


def test_a_part_is_looked_at(folder):
    (found,), _ = check(data(folder), folder, at_most=5, console=QUIET)
    assert (found.records, found.looked_at) == (8, 5) and len(found.lengths) + len(found.problems) == 5
    assert check(data(folder), folder, at_most=5, console=QUIET)[0] == [found]


def test_the_share_of_a_mixture_is_that_of_the_run(folder):
    good = folder / "good"
    shutil.copytree(small.images(), good)
    names = json.loads((good / "filter_cap.json").read_text())
    names["annotations"].append(names["annotations"][0])
    (good / "filter_cap.json").write_text(json.dumps(names))
    mixture = Source("jsonl", str(folder / "rows.jsonl"), 14), Source("cc_sbu_align", str(good), 115)
    for limit, wanted in ((0.05, True), (0.06, False)):  # half of 14 of 129
        found, too_bad = check(DataConfig(mixture=mixture, max_bad_share=limit), folder, console=QUIET)
        assert too_bad == wanted
    assert found[1].duplicates == {"0": 2} and not found[1].problems and not found[0].duplicates


def call(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["mmjax", "data", *map(str, args)])
    cli.main()


def test_the_command_ends_as_the_share_says(folder, monkeypatch, capsys):
    where = ("check", "--format", "jsonl", "--path", folder / "rows.jsonl", "--out", folder)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *where)
    assert stopped.value.code == 1
    assert "corrupt image rows.jsonl:4" in " ".join(capsys.readouterr().out.split())
    call(monkeypatch, *where, "--max-bad-share", "0.5", "--tokenizer", small.checkpoint() / "tokenizer")
    assert json.loads((folder / "data_check.json").read_text())["sources"][0]["unit"] == "tokens"


def test_images_below_another_folder(folder, monkeypatch, capsys):
    (folder / "words").mkdir()
    where = ("check", "--format", "jsonl", "--path", shutil.move(folder / "rows.jsonl", folder / "words"), "--out",
             folder, "--max-bad-share", "0.5")
    call(monkeypatch, *where, "--root", folder)
    (source,) = json.loads((folder / "data_check.json").read_text())["sources"]
    assert (source["records"], len(source["problems"]), source["source"]["root"]) == (8, 4, str(folder))
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *where)
    assert stopped.value.code == 2
    assert f"Images are expected below {folder}/words. If they are elsewhere" in capsys.readouterr().err


def test_the_command_reads_a_configuration(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.py").write_text(
        "from mmjax.config import *\n\ndef config():\n"
        f"    return {{'one': RunConfig(weights=WeightsConfig(checkpoint={str(small.checkpoint())!r}),\n"
        f"        data=DataConfig(path={str(small.images())!r}, prompts=({small.PROMPT!r},))),\n"
        "        'two': RunConfig(weights=WeightsConfig(checkpoint='nowhere'),\n"
        f"        data=DataConfig(path={str(small.images())!r}))}}\n")
    call(monkeypatch, "check", "--config", tmp_path / "config.py", "--out", tmp_path)
    cards = {name: json.loads((tmp_path / name / "data_check.json").read_text())["sources"][0]
             for name in ("one", "two")}
    assert (cards["one"]["unit"], cards["one"]["truncated"]) == ("tokens", 0)
    assert (cards["two"]["unit"], cards["two"]["truncated"]) == ("words", None)
    assert "There is no checkpoint nowhere yet" in capsys.readouterr().out


@pytest.mark.parametrize(("args", "code", "message"), [
    (("check",), 2, "Name a config file, or a format and a path"),
    (("check", "--format", "xyz", "--path", "p"), 2, "There is no format xyz; there are cc_sbu_align"),
    (("check", "--format", "jsonl", "--path", "nowhere"), 2, "nowhere"),
    ((), 2, "usage: mmjax data"), (("--help",), 0, "usage: mmjax data")])
def test_mistakes(monkeypatch, capsys, args, code, message):
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *args)
    assert stopped.value.code == code
    said = capsys.readouterr()
    assert message in said.out + said.err and "Traceback" not in said.err
