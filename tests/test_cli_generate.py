"""`mmjax generate`: one prompt is printed, many samples go into a file."""

import json

import numpy as np
import pytest

import mmjax
from mmjax import cli
from tests import small
from tests.data.layouts import put


@pytest.fixture
def call(monkeypatch):
    def command(*args, checkpoint=None):
        monkeypatch.setattr("sys.argv", ["mmjax", "generate", "--checkpoint", str(checkpoint or small.checkpoint()),
                                         "--max-new-tokens", "4", *map(str, args)])
        cli.main()

    return command


@pytest.fixture
def images(tmp_path):
    for number in (0, 1, 2):
        put(tmp_path / "in" / f"{number}.jpg", (small.images() / "image" / f"{number}.jpg").read_bytes())
    return tmp_path / "in"


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_many_are_answered_like_one(call, capsys, images, tmp_path):
    lines = [{"image": "0.jpg", "prompt": "What is it?"}, {"image": "1.jpg", "prompt": "What is it?", "id": "second"},
             {"images": ["2.jpg", "0.jpg"], "prompt": "Which of <ImageHere> and <ImageHere>?"}]
    put(tmp_path / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out" / "out.jsonl"
    arguments = ("--samples", tmp_path / "samples.jsonl", "--root", images, "--out", out, "--batch-size", 2)
    call(*arguments)
    found = answers(out)
    assert [line["id"] for line in found] == ["1", "second", "3"]
    capsys.readouterr()
    call("--prompt", "What is it?", "--image", images / "1.jpg")
    assert capsys.readouterr().out.strip("\n") == found[1]["answer"]

    call(*arguments)
    assert answers(out) == found
    assert "all 3 samples were answered" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(*arguments, "--num-beams", 2)
    assert "settings.num_beams: 1 -> 2" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--images", "--pictures"])  # the second is the former name
def test_a_folder_of_images(call, capsys, images, tmp_path, option):
    put(images / "deep" / "9.png", b"not an image")
    with pytest.raises(SystemExit) as stopped:
        call(option, images, "--prompt", "What is it?", "--out", tmp_path / "out.jsonl")
    assert stopped.value.code == 1
    assert "1 samples could not be answered (deep/9.png)" in " ".join(capsys.readouterr().err.split())
    found = answers(tmp_path / "out.jsonl")
    assert [line["id"] for line in found] == ["0.jpg", "1.jpg", "2.jpg", "deep/9.png"]
    assert "9.png is not an image that can be read" in found[3]["error"]
    assert all("answer" in line for line in found[:3])


@pytest.mark.parametrize(("args", "message"), [
    ((), "--prompt is missing; or name a file of --samples"),
    (("--samples", "a", "--images", "b", "--prompt", "c", "--out", "d"), "--samples and --images"),
    (("--samples", "a", "--prompt", "c", "--out", "d"), "every line of --samples has its own"),
    (("--images", "a", "--prompt", "b"), "--out is missing"),
    (("--prompt", "a", "--out", "b"), "--out is for --samples or --images"),
    (("--samples", "a", "--out", "b", "--image", "c"), "--image, --media and --weights are for one prompt"),
    (("--images", "a", "--prompt", "b", "--out", "c", "--root", "d"), "--root is for --samples"),
    (("--prompt", "a", "--batch-size", "2"), "--batch-size and --mesh are for --samples or --images"),
    (("--prompt", "a", "--mesh.tensor", "2"), "--batch-size and --mesh are for --samples or --images"),
    (("--samples", "nowhere", "--out", "b"), "There are no samples at nowhere"),
    (("--prompt", "a", "--recall", "nowhere.npy"), "There are no vectors at nowhere.npy"),
    (("--prompt", "a", "--top-p", "0"), "top_p = 0.0"),
])
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(call, capsys, args, message):
    with pytest.raises(SystemExit) as stopped:
        call(*args, checkpoint="not there")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_recall_is_for_models_that_mix_senses(call, capsys, tmp_path):
    np.save(tmp_path / "vectors.npy", np.eye(16, dtype=np.float32))
    with pytest.raises(SystemExit):
        call("--prompt", "a", "--recall", tmp_path / "vectors.npy")
    assert "recall is for models that mix senses" in capsys.readouterr().err


def test_recall_reaches_the_model(call, monkeypatch, capsys, tmp_path):
    given = []
    monkeypatch.setattr(mmjax.Loaded, "generate", lambda self, samples, **settings: given.append(settings) or ["a"])
    np.save(tmp_path / "vectors.npy", np.eye(16, dtype=np.float32))
    call("--prompt", "a", "--recall", tmp_path / "vectors.npy", "--top-p", 0.5, "--stop", "x", "y", "--temperature", 1)
    assert capsys.readouterr().out == "a\n"
    assert given[0]["recall"].vectors.shape == (16, 16)
    assert (given[0]["top_p"], given[0]["stop"], given[0]["temperature"]) == (0.5, ["x", "y"], 1.0)


def test_lines_that_cannot_be_used_are_named_before_anything_is_loaded(call, capsys, tmp_path):
    put(tmp_path / "in.jsonl", '{"image": "../a.jpg", "prompt": "?"}\n{"prompt": 3}\n')
    with pytest.raises(SystemExit):
        call("--samples", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", checkpoint="not there")
    error = capsys.readouterr().err
    assert "2 lines of" in error and "line 1: " in error and "line 2: " in error
    assert not (tmp_path / "out.jsonl").exists()
