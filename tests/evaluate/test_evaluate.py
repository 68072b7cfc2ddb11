"""Benchmarks from their files to figures and a page, and choices ranked by their loss."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import mmjax
from mmjax import cli, evaluate, trees
from mmjax.config import ScenesConfig
from mmjax.data import scenes
from mmjax.evaluate import benchmark, report
from mmjax.evaluate.benchmark import Test as Asked  # pytest would collect a Test
from mmjax.evaluate.rank import Choices, chosen
from mmjax.inference import predictions
from tests import small, tiny
from tests.data.layouts import put, put_json
from tests.parity.original import multi_select

QUIET = Console(quiet=True)
COLORS = ("red", "green", "blue", "none of these")


@pytest.fixture(scope="module")
def model():
    return mmjax.load(small.checkpoint(), dtype="float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of tiny benchmarks in their released layouts, all about the same five images."""
    root = tmp_path_factory.mktemp("benchmarks")
    (root / "val2014").mkdir()
    (root / "train2014").mkdir()
    drawn = scenes.scenes("train", 5)
    for number, scene in enumerate(drawn):
        for split in ("val2014", "train2014"):
            Image.fromarray(scenes.draw(scene)).save(root / split / f"COCO_{split}_{number:012d}.jpg")
    put_json(root / "annotations" / "captions_val2014.json", {
        "images": [{"id": number, "file_name": f"COCO_val2014_{number:012d}.jpg"} for number in range(5)],
        "annotations": [{"image_id": number, "caption": scenes.caption(scene)} for number, scene in enumerate(drawn)]})
    put_json(root / "vqa_questions.json", {"data_subtype": "val2014", "questions": [
        {"question_id": 10 + number, "image_id": number, "question": "What colour is it? " * (1 + number % 2)}
        for number in range(5)]})
    put_json(root / "vqa_annotations.json", {"annotations": [
        {"question_id": 10 + number, "answer_type": "other", "answers": [
            {"answer": "red", "answer_id": n} for n in range(10)]} for number in range(5)]})
    put(root / "coco_pope_random.json", "".join(json.dumps(
        {"question_id": number, "image": f"COCO_val2014_{number:012d}.jpg", "text": "Is there a star?",
         "label": ("yes", "no")[number % 2]}) + "\n" for number in range(5)))
    put_json(root / "refcoco_val.json", [
        {"img_id": f"COCO_train2014_{number:012d}_7", "sents": "the star", "bbox": [8, 8, 20, 20], "height": 48,
         "width": 48} for number in range(2)])
    put(root / "own.jsonl", "".join(json.dumps(
        {"id": f"q{number}", "image": f"val2014/COCO_val2014_{number:012d}.jpg", "prompt": "What colour?",
         "choices": COLORS[:4 - number % 2], "answer": "red"}) + "\n" for number in range(5)))
    return root


PLACES = {"captions": "annotations/captions_val2014.json", "vqa": "vqa_questions.json",
          "pope": "coco_pope_random.json", "refer": "refcoco_val.json", "jsonl_choices": "own.jsonl"}


def asked_of(data, name, **changes):
    return Asked(name, str(data / PLACES[name]), **changes)


def run(test, model, out, items=None, batch_size=2, **decoding):
    items = test.items() if items is None else items
    answers = benchmark.answerer(test, model, predictions.Decoding(**decoding), batch_size)
    benchmark.evaluate(test, items, answers, small.checkpoint(), out, QUIET)
    return benchmark.scored(test, items, out)


def lines(out):
    return {line["id"]: line for line in map(json.loads, (out / "predictions.jsonl").read_text().splitlines())}


@pytest.mark.parametrize("name", ["captions", "pope", "refer", pytest.param("jsonl_choices", marks=pytest.mark.slow)])
def test_a_benchmark_end_to_end(tmp_path, monkeypatch, capsys, data, name):
    command = ["mmjax", "evaluate", "--checkpoint", str(small.checkpoint()), "--benchmark", name, "--data",
               str(data / PLACES[name]), "--out", str(tmp_path), "--batch-size", "2"]
    ranked = name in ("pope", "jsonl_choices")
    monkeypatch.setattr("sys.argv", command + ([] if ranked else ["--max-new-tokens", "4"]))
    cli.main()
    scores = json.loads((tmp_path / "scores.json").read_text())
    shown = capsys.readouterr().out
    for figure, found in scores["figures"].items():
        assert found["low"] <= found["value"] <= found["high"]
        assert f"{found['value']:.4f}" in shown and figure in shown
    assert (scores["items"], scores["errors"]) == (2 if name == "refer" else 5, 0)
    assert scores["settings"]["benchmark"] == name
    assert scores["rank_by"] == ("sum" if ranked else None)
    assert scores["scored_with"].keys() >= {"mmjax", "jax", "python"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure") == scores["items"]
    assert "Worst answers" in page and "Best answers" in page

    kept = (tmp_path / "predictions.jsonl").read_bytes()
    (tmp_path / "scores.json").unlink()
    monkeypatch.setattr("sys.argv", ["mmjax", "evaluate", "--score-only", "--benchmark", name, "--data",
                                     str(data / PLACES[name]), "--out", str(tmp_path)])
    cli.main()
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert (tmp_path / "predictions.jsonl").read_bytes() == kept


@pytest.mark.parametrize("name", ["vqa", "jsonl_choices"])
def test_nothing_is_carried_over_from_item_to_item(tmp_path, model, data, name):
    """The answers are the same in any order, alone or beside others."""
    test = asked_of(data, name)
    given = {} if test.ranked else {"max_new_tokens": 4}
    items = test.items()
    first, turned, alone = (run(test, model, tmp_path / str(n), some, **given)
                            for n, some in enumerate((items, items[::-1], items[3:4])))
    for other in (turned, alone):
        for item, line, taken in zip(other.items, other.answers, other.values, strict=True):
            place = [each.id for each in first.items].index(item.id)
            assert taken == first.values[place]
            if test.ranked:
                np.testing.assert_allclose(line["losses"], first.answers[place]["losses"], rtol=1e-5)


def test_an_item_that_cannot_be_answered_counts_as_wrong(tmp_path, model, data):
    test = asked_of(data, "jsonl_choices")
    items = test.items()
    broken = tmp_path / "broken.jpg"
    broken.write_text("not an image")
    items[2] = dataclasses.replace(items[2], sample=dataclasses.replace(items[2].sample, images=[str(broken)]))
    result = run(test, model, tmp_path, items)
    assert [line["id"] for line in result.errors] == ["q2"]
    assert result.values[2] != items[2].right
    assert result.scores.each[2] == 0
    page = benchmark.write(result, tmp_path).read_text()
    assert "broken.jpg is not an image that can be read" in page
    assert page.count("<figure") == 4


def test_scoring_refuses_other_items_and_missing_answers(tmp_path, model, data):
    test = asked_of(data, "vqa")
    run(test, model, tmp_path, max_new_tokens=4)
    with pytest.raises(ValueError, match="answers to vqa, not to pope"):
        benchmark.stored_test(tmp_path, asked_of(data, "pope"))
    with pytest.raises(ValueError, match="answers to 5 items, but not to the 3"):
        benchmark.scored(test, dataclasses.replace(test, limit=3).items(), tmp_path)
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="4 of 5 answers. Without score_only"):
        benchmark.scored(test, test.items(), tmp_path)
    with pytest.raises(FileNotFoundError, match="no answers to score"):
        benchmark.stored_test(tmp_path / "nowhere", test)


def test_what_was_asked_is_remembered_for_scoring(tmp_path, model, data):
    test = asked_of(data, "vqa", prompt="Q: {} A:", limit=2)
    run(test, model, tmp_path, max_new_tokens=4)
    assert benchmark.stored_test(tmp_path, asked_of(data, "vqa")) == test
    with pytest.raises(ValueError, match="limit = 3, but the answers are with 2"):
        benchmark.stored_test(tmp_path, asked_of(data, "vqa", limit=3))


def test_scoring_refuses_what_is_for_answering(tmp_path, monkeypatch, capsys, model, data):
    run(asked_of(data, "vqa"), model, tmp_path, max_new_tokens=4)
    monkeypatch.setattr("sys.argv", [
        "mmjax", "evaluate", "--score-only", "--benchmark", "vqa", "--data", str(data / PLACES["vqa"]), "--out",
        str(tmp_path), "--num-beams", "2", "--checkpoint", "nowhere", "--batch-size", "4", "--mesh.tensor", "2",
        "--rank-by", "mean"])
    with pytest.raises(SystemExit):
        cli.main()
    error = capsys.readouterr().err
    assert "--rank-by: vqa has no choices" in error
    assert "--checkpoint, --num-beams, --batch-size, --mesh: --score-only scores answers that are there" in error
    assert not (tmp_path / "scores.json").exists()


def test_items_are_spread_evenly(data):
    assert [item.id for item in asked_of(data, "vqa", limit=2).items()] == ["10", "12"]
    assert len(asked_of(data, "vqa", limit=99).items()) == 5


def test_settings_of_words_are_refused_where_choices_are_ranked(model, data):
    with pytest.raises(ValueError, match="num_beams, min_length: the choices of pope are ranked"):
        benchmark.answerer(asked_of(data, "pope"), model, predictions.Decoding(num_beams=2, min_length=2), 2)
    words = benchmark.answerer(asked_of(data, "pope", in_words=True), model, predictions.Decoding(num_beams=2), 2)
    assert words.decoding.max_new_tokens == 20


def test_settings_of_ranking_are_refused_where_answers_are_in_words(model, data):
    with pytest.raises(ValueError, match="rank_by, in_words: vqa has no choices"):
        benchmark.answerer(asked_of(data, "vqa", in_words=True, rank_by="mean"), model, predictions.Decoding(), 2)
    with pytest.raises(ValueError, match=r"^rank_by: the answers are generated"):
        benchmark.answerer(asked_of(data, "pope", in_words=True, rank_by="mean"), model, predictions.Decoding(), 2)


@pytest.mark.parametrize(("args", "message"), [
    (("--benchmark", "vqa"), "--checkpoint is missing: the converted checkpoint or run to score\n  --data is missing"),
    (("--benchmark", "vqa", "--checkpoint", "nowhere"), "--data is missing"),
    (("--benchmark", "vqb", "--checkpoint", "nowhere", "--data", "x"), "no benchmark 'vqb'; there are captions, "),
    (("--benchmark", "vqa", "--checkpoint", "nowhere", "--data", "nowhere"), "nowhere"),
    (("--benchmark", "scenes", "--checkpoint", "nowhere"), "is for runs"),
    (("--benchmark", "scenes", "--limit", "5", "--rank-by", "mean", "--in-words", "--score-only"),
     "--limit, --rank-by, --in-words, --score-only: the "),
    (("--benchmark", "pope", "--checkpoint", "nowhere", "--num-beams", "2", "--recall", "a.npy"),
     "--num-beams, --recall: the choices of pope are ranked"),
    (("--benchmark", "refer", "--checkpoint", "nowhere", "--rank-by", "mean", "--in-words"),
     "--rank-by, --in-words: refer has no choices"),
    (("--benchmark", "vqa", "--data", "x", "--score-only"), "no answers to score"),
])
def test_mistakes_are_one_message(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.setattr("sys.argv", ["mmjax", "evaluate", *args, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- ranking ----


def test_rules_of_choosing():
    """Losses of three answers, by hand: the first is short, the second long and likely word by word."""
    line = {"losses": [3.0, 4.0, 8.0], "tokens": [1, 4, 2], "padded": [11, 21, 81]}
    assert chosen(line) == chosen(line, "sum") == 0
    assert chosen(line, "mean") == 1  # 3, 1, 4 a token
    assert chosen(line, "original") == 2  # 0.3, 0.2, 0.1
    assert chosen({"losses": [2.0, 2.0], "tokens": [1, 1], "padded": [5, 5]}) == 0


def test_choices_are_scored_as_the_loss_scores_them(model):
    """Every choice's loss is that of `mmjax.loss` on the answer alone, whatever the other rows are."""
    images = [scenes.draw(scene) for scene in scenes.scenes("train", 3)]
    asks = [predictions.Request(str(n), mmjax.Sample(images=[image], prompt="What? " * (n + 1)), COLORS[:2 + n])
            for n, image in enumerate(images)]
    answerer = Choices(model, batch_size=4)
    found = answerer.answer([answerer.open(ask).request for ask in asks], 0)
    loss_of = tiny.jit(lambda params, batch: mmjax.loss(model.module, params, batch)[0])
    for ask, line in zip(asks, found, strict=True):
        assert len(line["losses"]) == len(ask.choices)
        for choice, loss, count in zip(ask.choices, line["losses"], line["tokens"], strict=True):
            sample = dataclasses.replace(predictions.read(ask, model).sample, answer=choice)
            batch = model.batch([sample], length=96)
            np.testing.assert_allclose(loss, float(loss_of(model.params, batch)) * count, rtol=1e-4)
            assert count == int(batch.loss_mask.sum())
        assert line["answer"] == ask.choices[int(np.argmin(line["losses"]))]


def test_a_broken_model_chooses_nothing(model, monkeypatch):
    monkeypatch.setattr(sys.modules[Choices.__module__], "losses", lambda *_: np.array([np.nan, 1.0]))
    samples = [mmjax.Sample(images=[np.zeros((9, 9, 3), np.uint8)], prompt=small.PROMPT)] * 2
    broken, whole = Choices(model, batch_size=2).answer(
        [predictions.Request("", sample, ("red", "green")) for sample in samples], 0)
    assert "mmjax doctor" in broken["error"] and "answer" not in broken
    assert whole["answer"] in ("red", "green")


def test_original_rule_is_multi_select(model):
    """The padded length is that of the batch's longest row for each choice, as `multi_select` has it."""
    samples = [mmjax.Sample(images=[scenes.draw(scene)], prompt=f"{small.PROMPT} {'Why? ' * n}")
               for n, scene in enumerate(scenes.scenes("train", 2))]
    answers = ("red", "a very large green star")
    candidates = [model.batch([dataclasses.replace(sample, answer=answer) for sample in samples], length=128)
                  for answer in answers]
    losses, ranks = multi_select(model.module, model.params, candidates)
    answerer = Choices(model, batch_size=2)
    found = answerer.answer([predictions.Request("", sample, answers) for sample in samples], 0)
    for row, line in enumerate(found):
        np.testing.assert_allclose(np.divide(line["losses"], np.array(line["padded"]) - 1), losses[row], rtol=1e-4)
        assert chosen(line, "original") == ranks[row][0]


def test_samples_without_choices_are_an_error_of_theirs(model):
    with pytest.raises(ValueError, match="there are no choices"):
        Choices(model).open(predictions.Request("a", mmjax.Sample(prompt="What?")))


# ---- the page ----


def test_boxes_are_drawn_where_they_are():
    image = np.full((60, 80, 3), 255, np.uint8)
    drawn = report.boxed(image, (160, 120), {"truth": (20, 20, 150, 110), "said": (140, 10, 60, 100)})
    green, blue = (tuple(int(color[i:i + 2], 16) for i in (1, 3, 5)) for color in (report.LIGHT["good"],
                                                                                   report.LIGHT["line"]))
    assert tuple(drawn[55, 60]) == green  # the lower edge, at half the size
    assert tuple(drawn[30, 70]) == blue  # ends in the wrong order are turned
    assert tuple(drawn[30, 50]) == (255, 255, 255)
    assert (image == 255).all()


def test_what_was_said_and_what_is_true_is_on_the_page(tmp_path, model, data):
    result = run(asked_of(data, "refer"), model, tmp_path, max_new_tokens=4)
    line = "{<10><10><60><60>}"
    result = dataclasses.replace(result, values=[line, "no box"], scores=dataclasses.replace(
        result.scores, each=[0.7, 0.0]))
    good, bad = benchmark.example(result, 0), benchmark.example(result, 1)
    assert (good.right, bad.right) == (True, False)
    assert good.truth == "{<16><16><58><58>}"
    assert good.question == "[refer] give me the location of the star"
    assert not np.array_equal(good.image, bad.image)
    page = benchmark.write(result, tmp_path).read_text()
    assert page.index("no box") < page.index("Best answers") < page.index("{&lt;10&gt;&lt;10&gt;")


def test_ends_name_no_item_twice():
    each = [0.0, 1.0, 1.0, 0.0, 0.5]
    worst, best = benchmark._ends(each, range(5))
    assert sorted(worst + best) == [0, 1, 2, 3, 4]
    assert max(each[place] for place in worst) <= min(each[place] for place in best)
    assert benchmark._ends([1.0], [0]) == ([0], [])


def test_scenes_are_answered_as_told(model, monkeypatch):
    asked = []

    def generate(self, samples, **settings):
        asked.append(settings)
        return [""] * len(samples)

    monkeypatch.setattr(type(model), "generate", generate)
    told = predictions.Decoding(max_new_tokens=5, num_beams=2, stop=("!",))
    evaluate.score_scenes(model, scenes.scenes("held_out", 3))
    evaluate.score_scenes(model, scenes.scenes("held_out", 3), decoding=told, batch_size=2)
    as_usual, as_told = asked[0], asked[2]
    assert (as_usual["max_new_tokens"], as_usual["num_beams"], as_usual["stop"], as_usual["batch_size"]) == (
        48, 1, [model.text.end_sym], 3)
    assert (as_told["max_new_tokens"], as_told["num_beams"], as_told["stop"], as_told["batch_size"]) == (5, 2, ["!"], 2)


@pytest.mark.slow
def test_scenes_are_scored_for_a_run_on_them(tmp_path, monkeypatch, capsys):
    """With the model that the run has made, and with the one it began with."""
    data = dataclasses.replace(small.run_config(tmp_path).data, path=str(tmp_path / "scenes"),
                               scenes=ScenesConfig(count=8, held_out=3))
    config = small.run_config(tmp_path / "run", steps=2, data=data, score=False)
    mmjax.train(config)
    given = []
    monkeypatch.setattr(evaluate.scenes, "report_scenes", lambda *args: given.append(args))
    monkeypatch.setattr("sys.argv", ["mmjax", "evaluate", "--benchmark", "scenes", "--checkpoint",
                                     str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--batch-size", "7",
                                     "--num-beams", "2", "--frozen-dtype", "int8"])
    cli.main()
    model, untrained, world, out, runs, _, decoding, batch_size = given[0]
    assert (world, out, runs) == (data.scenes, tmp_path / "out", [tmp_path / "run"])
    assert (decoding, batch_size) == (predictions.Decoding(num_beams=2), 7)
    before, after = (trees.flatten(each.params) for each in (untrained, model))
    assert {path for path in after if not all(map(np.array_equal, *map(jax.tree.leaves, (before[path], after[path]))))
            } == {"projector/w", "projector/b"}
    assert before["llm/layers/mlp/up/w"].dtype == np.int8

    monkeypatch.setattr("sys.argv", sys.argv[:5] + [str(small.checkpoint()), *sys.argv[6:]])
    with pytest.raises(SystemExit):
        cli.main()
    assert "is for runs" in capsys.readouterr().err
