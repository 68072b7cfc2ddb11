"""Benchmarks as they lie on disk: what each entry becomes, what is refused, and what answers are worth."""

import json
import pickle
import shutil

import numpy as np
import pytest

from mmjax.batch import Sample
from mmjax.evaluate.benchmarks import BENCHMARKS, Item
from mmjax.evaluate.metrics import java
from tests.data.layouts import jpeg, put, put_json

IMAGE = "<Img><ImageHere></Img>"


def images(root, *names):
    for name in names:
        put(root / name, jpeg())


def lines(path, rows):
    return put(path, "".join(json.dumps(row) + "\n" for row in rows))


def captions(root):
    images(root, "val2014/1.jpg", "val2014/2.jpg")
    return put_json(root / "annotations" / "captions_val2014.json", {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [{"image_id": 2, "caption": "Two cats."}, {"image_id": 1, "caption": "A dog."},
                        {"image_id": 2, "caption": "Cats."}]})


def coco(*numbers, split="val2014"):
    return [f"{split}/COCO_{split}_{number:012d}.jpg" for number in numbers]


def vqa(root, answers=("yes", "yes", "", "no"), **annotation):
    images(root, *coco(1, 2))
    rows = [{"question_id": 10 + number, "image_id": number, "question": f"Is it {number}?"} for number in (1, 2)]
    put_json(root / "v2_mscoco_val2014_annotations.json", {"annotations": [
        {"question_id": row["question_id"], "answer_type": "yes/no", "answers": [
            {"answer": answer, "answer_id": place} for place, answer in enumerate(answers)]} | annotation
        for row in rows]})
    return put_json(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"data_subtype": "val2014", "questions": rows})


def gqa(root):
    images(root, "images/n1.jpg", "images/n2.jpg")
    return put_json(root / "testdev_balanced_questions.json", {
        "07": {"imageId": "n1", "question": "Is it red?", "answer": "yes", "types": {"structural": "verify"}},
        "08": {"imageId": "n2", "question": "Who is it?", "answer": "woman", "types": {"structural": "query"}}})


def vizwiz(root):
    images(root, "a.jpg", "b.jpg")
    return put_json(root / "val.json", [
        {"image": f"{name}.jpg", "question": "What is this?", "answer_type": "other",
         "answers": [{"answer": "a can", "answer_confidence": "yes"}] * 4 + [{"answer": "unanswerable"}] * 6}
        for name in "ab"])


def vsr(root):
    images(root, "1.jpg", "2.jpg")
    return lines(root / "test.jsonl", [
        {"image": f"{number}.jpg", "caption": "The cat is on the dog.", "label": number - 1, "relation": "on"}
        for number in (1, 2)])


def problem(**changes):
    return {"question": "Which one?", "choices": ["a cat", "a dog", "none"], "answer": 1, "hint": "", "image": None,
            "split": "test"} | changes


def scienceqa(root, **changes):
    images(root, "images/test/2/image.png")
    put_json(root / "pid_splits.json", {"train": ["3"], "test": ["4", "2"]})
    return put_json(root / "problems.json", {
        "2": problem(image="image.png", hint="Look.", **changes), "3": problem(split="train"), "4": problem(answer=0)})


def iconqa(root):
    images(root, "7/image.png", "8/image.png")
    return put_json(root / "iconqa.json", [
        {"image_id": "7", "question": "How many?", "choices": ["1", "2"], "answer": 1},
        {"image_id": "8", "question": "How many?", "choices": ["1", "2"], "answer": "1"}])


def pope(root):
    images(root, *coco(1, 2))
    for setting in ("random", "adversarial"):
        lines(root / f"coco_pope_{setting}.json", [
            {"question_id": 1, "image": "COCO_val2014_000000000001.jpg", "text": "Is there a dog?", "label": "yes"},
            {"question_id": 2, "image": "COCO_val2014_000000000002.jpg", "text": "Is there a cat?", "label": "no"}])
    return root


def refer(root, **changes):
    images(root, *coco(1, 2, split="train2014"))
    row = {"img_id": "COCO_train2014_000000000001_3", "sents": "the Dog, left", "bbox": [10, 20, 30, 40.5],
           "height": 100, "width": 200}
    return put_json(root / "refcoco_testA.json", [row | changes, row | {"sents": "other dog", "bbox": [0, 0, 5, 5]}])


def jsonl(root, *more):
    images(root, "1.jpg")
    return lines(root / "mine.jsonl", [
        {"id": "first", "image": "1.jpg", "prompt": "What is it?", "references": ["a dog", "dog"], "group": "animals"},
        {"prompt": "What is 1 + 1?", "answer": "2"}, *more])


def jsonl_choices(root):
    images(root, "1.jpg")
    return lines(root / "mine.jsonl", [
        {"image": "1.jpg", "prompt": "<Img><ImageHere></Img> Which?", "choices": ["cat", "dog"], "answer": "dog"},
        {"prompt": "Which?", "choices": ["cat", "dog"], "answer": 0}])


JAVA = {"captions_meteor": "METEOR", "captions_spice": "SPICE"}
PYTHON = [name for name in BENCHMARKS if name not in JAVA]
LAYOUTS = {layout.__name__: layout for layout in (
    captions, vqa, gqa, vizwiz, vsr, scienceqa, iconqa, pope, refer, jsonl, jsonl_choices)}


def read(name, root, **settings):
    return BENCHMARKS[name].read(str(LAYOUTS[name](root)), **settings)


def shown(root, name, words):
    return Sample(images=[str(root / name)], prompt=f"{IMAGE} {words}")


@pytest.mark.parametrize("name", PYTHON)
def test_every_benchmark_is_read_and_scored(name, tmp_path):
    benchmark, items = BENCHMARKS[name], read(name, tmp_path)
    assert benchmark.name == name and len(items) >= 2 and len({item.id for item in items}) == len(items)
    for item in items:
        assert item.sample.answer is None and not item.sample.turns
        assert item.sample.prompt.count("<ImageHere>") == len(item.sample.images)
        if benchmark.kind == "choice":
            assert 0 <= item.right < len(item.choices)
        else:
            assert item.references or (item.box and item.size)
    right = [item.right for item in items] if benchmark.kind == "choice" else [
        item.references[0] if item.references else "" for item in items]
    scores = benchmark.score(items, right)
    assert len(scores.each) == len(items)
    assert all(figure.low <= figure.value <= figure.high for figure in scores.figures.values())
    assert bool(scores.groups) == any(item.group for item in items)
    with pytest.raises(ValueError, match="a score needs one answer for each"):
        benchmark.score(items, right[1:])


def test_captions_of_one_image_are_one_item(tmp_path):
    assert read("captions", tmp_path) == [
        Item("1", shown(tmp_path, "val2014/1.jpg", "[caption] Briefly describe this image."), ("A dog.",)),
        Item("2", shown(tmp_path, "val2014/2.jpg", "[caption] Briefly describe this image."), ("Two cats.", "Cats."))]


@pytest.mark.parametrize("name", JAVA)
def test_captions_by_java(name, monkeypatch, tmp_path):
    """What is missing shows before a model is asked anything; the score stands beside the others."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="no `java` on the PATH"):
        BENCHMARKS[name].read(str(captions(tmp_path)))
    items = BENCHMARKS["captions"].read(str(captions(tmp_path)))
    monkeypatch.setattr(java, "java_scores", lambda name, said, right: (0.3, np.array([0.1, 0.7])))
    found = BENCHMARKS[name].score(items, ["A dog.", "A cat."])
    figure = found.figures[JAVA[name]]
    assert (figure.low, figure.value, figure.high) == pytest.approx((0.0, 0.3, 0.6))  # 0.1 to 0.7, whose mean is 0.4
    plain = BENCHMARKS["captions"].score(items, ["A dog.", "A cat."])
    assert found.each == plain.each and found.figures.items() > plain.figures.items()


def test_karpathys_split(tmp_path):
    images(tmp_path, "val2014/1.jpg")
    rows = [{"filepath": "val2014", "filename": f"{number}.jpg", "cocoid": number, "split": split,
             "sentences": [{"raw": "A dog."}, {"raw": "Dog"}]} for number, split in ((1, "test"), (2, "train"))]
    path = put_json(tmp_path / "dataset_coco.json", {"images": rows, "dataset": "coco"})
    (item,) = BENCHMARKS["captions"].read(str(path), prompt="Describe it.")
    assert item == Item("1", shown(tmp_path, "val2014/1.jpg", "Describe it."), ("A dog.", "Dog"))
    listed = put_json(tmp_path / "coco_karpathy_test.json", [{"image": "val2014/1.jpg", "caption": ["A dog.", "Dog"]}])
    assert BENCHMARKS["captions"].read(str(listed), prompt="Describe it.")[0].references == ("A dog.", "Dog")


def test_domains_of_nocaps_are_groups(tmp_path):
    images(tmp_path, "0.jpg")
    path = put_json(tmp_path / "nocaps_val_4500_captions.json", {
        "images": [{"id": 0, "file_name": "0.jpg", "domain": "near-domain"}],
        "annotations": [{"image_id": 0, "caption": "A dog."}]})
    assert BENCHMARKS["captions"].read(str(path))[0].group == "near-domain"


def test_questions_of_vqa(tmp_path):
    first, _ = read("vqa", tmp_path)
    words = "[vqa] Based on the image, respond to this question with a short answer: Is it 1?"
    assert first == Item("11", shown(tmp_path, coco(1)[0], words), ("yes", "yes", "", "no"), group="yes/no")


def test_lavis_list_of_questions(tmp_path):
    images(tmp_path, "val2014/1.jpg")
    path = put_json(tmp_path / "vqa_val.json", [
        {"question_id": 5, "image": "val2014/1.jpg", "question": "Why?", "answer": ["a", "b"], "dataset": "vqa"}])
    (item,) = BENCHMARKS["vqa"].read(str(path))
    assert (item.id, item.references) == ("5", ("a", "b"))


def test_questions_of_gqa_and_vizwiz(tmp_path):
    first, second = read("gqa", tmp_path)
    assert (first.id, first.references, first.group, second.group) == ("07", ("yes",), "verify", "query")
    assert first.sample.images == [str(tmp_path / "images" / "n1.jpg")]
    item = read("vizwiz", tmp_path)[0]
    assert item.sample.prompt.startswith(f"{IMAGE} [vqa] The question is 'What is this?' Based on")
    assert "'unanswerable'" in item.sample.prompt and item.references == ("a can",) * 4 + ("unanswerable",) * 6


def test_problems_of_scienceqa(tmp_path):
    without, with_image = read("scienceqa", tmp_path)
    assert (without.id, without.group, without.right) == ("4", "without", 0)
    assert without.sample == Sample(prompt="[vqa] Question: Which one? Answer:")
    assert with_image == Item(
        "2", shown(tmp_path, "images/test/2/image.png", "[vqa] Question: Which one? Context: Look. Answer:"),
        choices=("a cat", "a dog", "none"), right=1, group="with an image")
    (tmp_path / "pid_splits.json").unlink()
    assert [item.id for item in BENCHMARKS["scienceqa"].read(str(tmp_path))] == ["2", "4"]


def test_settings_of_pope_are_groups(tmp_path):
    items = read("pope", tmp_path)
    assert [item.id for item in items] == ["random:1", "random:2", "adversarial:1", "adversarial:2"]
    assert [item.right for item in items] == [0, 1, 0, 1] and items[0].choices == ("yes", "no")
    in_words = BENCHMARKS["pope"].score(items, ["Yes, there is.", "Yes.", "No", "no, there is not"])
    assert in_words == BENCHMARKS["pope"].score(items, [0, 0, 1, 1])
    figures = {name: figure.value for name, figure in in_words.figures.items()}
    assert figures == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "F1": 0.5, "yes share": 0.5}
    assert in_words.groups["random, recall"].value == 1 and in_words.groups["adversarial, yes share"].value == 0
    assert in_words.each == [1, 0, 0, 1]


def test_expressions_are_items_of_their_own(tmp_path):
    """Several about one image, whose right boxes differ: none is lost."""
    first, second = items = read("refer", tmp_path)
    assert first.box == (10, 20, 40, 60.5) and second.box == (0, 0, 5, 5) and first.size == (200, 100)
    words = "[refer] give me the location of the Dog, left"
    assert first.sample == shown(tmp_path, coco(1, split="train2014")[0], words)
    assert first.image == second.image
    scores = BENCHMARKS["refer"].score(items, ["{<5><20><20><60>}", "it is {<0><0><2><5>}"])
    figures = {name: figure.value for name, figure in scores.figures.items()}
    assert figures["IoU > 0.5"] == figures["IoU > 0.5, a pixel more"] == figures["unreadable"] == 0.5
    assert scores.each == pytest.approx([40 / 40.5, 0])


def test_references_of_refcoco(tmp_path):
    images(tmp_path, *coco(1, split="train2014"))
    refs = [{"ref_id": 3, "ann_id": 50, "image_id": 1, "split": split, "sentences": [
        {"sent_id": 8, "raw": "The Dog!"}, {"sent_id": 9, "raw": "left"}]} for split in ("testB", "train")]
    put_json(tmp_path / "refcoco" / "instances.json", {
        "images": [{"id": 1, "width": 8, "height": 6}], "annotations": [{"id": 50, "bbox": [1, 2, 3, 4]}]})
    put(tmp_path / "refcoco" / "refs(unc).p", pickle.dumps(refs, protocol=0))
    first, second = BENCHMARKS["refer"].read(str(tmp_path / "refcoco"))
    assert (first.id, second.id, first.group, first.box) == ("3:8", "3:9", "testB", (1, 2, 4, 6))
    assert first.sample.prompt.endswith("give me the location of the dog")


def test_own_questions(tmp_path):
    first, second = items = read("jsonl", tmp_path)
    assert first == Item("first", shown(tmp_path, "1.jpg", "What is it?"), ("a dog", "dog"), group="animals")
    assert second == Item("2", Sample(prompt="What is 1 + 1?"), ("2",))
    scores = BENCHMARKS["jsonl"].score(items, ["Dog", "Two."])
    assert {name: figure.value for name, figure in scores.figures.items()} == {
        "exact match": 0.5, "normalised match": 1}
    assert scores.each == [1, 0] and scores.groups["animals"].value == 1
    chosen = read("jsonl_choices", tmp_path)
    assert [item.right for item in chosen] == [1, 0] and chosen[0].sample.prompt == f"{IMAGE} Which?"
    scores = BENCHMARKS["jsonl_choices"].score(chosen, ["Dog.", "neither"])
    assert scores.figures["accuracy"].value == scores.figures["unreadable"].value == 0.5


@pytest.mark.parametrize(("name", "prompt", "expected"), [
    ("vqa", "Q: {} A:", f"{IMAGE} Q: Is it 1? A:"),
    ("vqa", "{} <Img><ImageHere></Img> Tell.", f"Is it 1? {IMAGE} Tell."),
    ("captions", "Say.", f"{IMAGE} Say."),
    ("pope", "{} Yes or no?", f"{IMAGE} Is there a dog? Yes or no?"),
])
def test_other_prompts(name, prompt, expected, tmp_path):
    assert read(name, tmp_path, prompt=prompt)[0].sample.prompt == expected


@pytest.mark.parametrize("name", sorted(set(PYTHON) - {"captions"}))
def test_a_prompt_without_a_place_for_the_question_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="has no {}, where"):
        read(name, tmp_path, prompt="Answer.")


def test_a_prompt_of_two_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is one image"):
        read("captions", tmp_path, prompt=f"{IMAGE} {IMAGE}")


def test_text_alone_leaves_the_image_of_the_prompt_out(tmp_path):
    without, with_image = read("scienceqa", tmp_path, prompt=f"See {IMAGE} {{}}")
    assert without.sample.prompt == "See Which one?" and with_image.sample.prompt.startswith(f"See {IMAGE} Which")


@pytest.mark.parametrize("name", PYTHON)
def test_missing_images_are_all_named(name, tmp_path):
    path = LAYOUTS[name](tmp_path)
    gone = [file for ending in ("jpg", "png") for file in tmp_path.rglob(f"*.{ending}")]
    for file in gone:
        file.unlink()
    with pytest.raises(ValueError, match="cannot be used") as caught:
        BENCHMARKS[name].read(str(path))
    assert "Images are expected below" in str(caught.value)
    needed = [file for file in gone if name != "refer" or file.stem.endswith("1")]
    assert all(file.name in str(caught.value) for file in needed)


@pytest.mark.parametrize("name", ["captions", "gqa", "vizwiz", "vsr", "pope", "jsonl"])
def test_images_stay_below_the_root(name, tmp_path):
    """Also where a file of that name is there."""
    images(tmp_path, "outside.jpg")
    path = LAYOUTS[name](tmp_path / "data")
    for file in [path] if path.is_file() else path.glob("*random.json"):
        content = file.read_text()
        for inside in ("1.jpg", '"n1', "a.jpg", "COCO_val2014_000000000001.jpg"):
            above = "../../../outside" + (".jpg" if inside.endswith("jpg") else "")
            content = content.replace(f'"{inside}' if not inside.startswith('"') else inside, f'"{above}')
        file.write_text(content)
    with pytest.raises(ValueError, match="is not below"):
        BENCHMARKS[name].read(str(path))


BROKEN = {
    "captions": [({"annotations": [{"image_id": 9, "caption": "x"}], "images": []}, "no image with the id 9"),
                 ({"annotations": [], "images": [{"id": 3, "file_name": "a.jpg"}]}, "image 3 has no caption"),
                 ({"annotations": 1, "images": []}, "must hold"), ({"images": []}, "nothing to score"),
                 ([], "nothing to score")],
    "gqa": [({"1": {"imageId": "n1", "question": "", "answer": "x"}}, "'question' is empty"),
            ({"1": {"imageId": "n1", "question": "q"}}, "'answer' must be str"), ({"1": []}, "expected an object")],
    "vizwiz": [([{"image": "a.jpg", "question": "q", "answers": []}], "there is no answer"), ({}, "must hold a list"),
               ([{"image": "a.jpg", "question": "q", "answers": [{"answer": 1}]}], "'answer' must be str")],
    "iconqa": [([{"image_id": "7", "question": "q", "choices": ["1"], "answer": 0}], "two or more"),
               ([{"image_id": "7", "question": "q", "choices": ["1", "2"], "answer": 2}], "none of the 2 choices"),
               ([{"image_id": "7", "question": "q", "choices": ["1", ""], "answer": 0}], "is empty")],
}


@pytest.mark.parametrize(("name", "content", "message"), [
    (name, content, message) for name, rows in BROKEN.items() for content, message in rows])
def test_broken_files(name, content, message, tmp_path):
    path = LAYOUTS[name](tmp_path)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        BENCHMARKS[name].read(str(path))


@pytest.mark.parametrize(("line", "message"), [
    ("{", "the line is not JSON"), ('{"prompt": "x"}', "'answer' must be str"),
    ('{"prompt": "", "answer": "y"}', "'prompt' is empty"), ('{"prompt": "x", "references": []}', "is empty"),
    ('{"prompt": "x", "references": "y"}', "must be list"),
    ('{"prompt": "x", "choices": ["a", "b"], "answer": 0}', "as jsonl_choices"), ("[1]", "expected an object"),
    ('{"prompt": "<ImageHere> x", "answer": "y"}', "image that is not there"),
    ('{"id": "first", "prompt": "x", "answer": "y"}', "2 entries have the id 'first'"),
    ('{"id": null, "prompt": "x", "answer": "y"}', "'id' must be"),
])
def test_broken_lines_are_named(line, message, tmp_path):
    path = jsonl(tmp_path)
    path.write_text(path.read_text() + "\n" + line + "\n\n")
    with pytest.raises(ValueError, match=message) as caught:
        BENCHMARKS["jsonl"].read(str(path))
    assert "1 entries of" in str(caught.value) and ("mine.jsonl:4" in str(caught.value) or "have the id" in message)


@pytest.mark.parametrize(("changes", "message"), [
    ({"bbox": [1, 2, 3]}, "four numbers"), ({"bbox": [1, 2, 0, 4]}, "is not in its image"),
    ({"bbox": [300, 2, 3, 4]}, "is not in its image"), ({"bbox": [1, float("nan"), 3, 4]}, "is not in its image"),
    ({"width": "x"}, "'width' must be int"), ({"sents": " "}, "'sents' is empty"),
])
def test_broken_expressions(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        BENCHMARKS["refer"].read(str(refer(tmp_path, **changes)))


def test_a_pickle_is_not_executed(tmp_path):
    put_json(tmp_path / "instances.json", {"images": [], "annotations": []})
    put(tmp_path / "refs(unc).p", pickle.dumps([print]))
    with pytest.raises(ValueError, match="not a pickle of plain values"):
        BENCHMARKS["refer"].read(str(tmp_path))


def test_a_question_without_answers(tmp_path):
    path = vqa(tmp_path)
    put_json(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": []})
    with pytest.raises(ValueError, match=r"(?s)2 entries of .* no answer to question 11"):
        BENCHMARKS["vqa"].read(str(path))


def test_files_that_are_not_there(tmp_path):
    for name in PYTHON:
        for path in (tmp_path / "none", tmp_path):
            with pytest.raises(FileNotFoundError):
                BENCHMARKS[name].read(str(path))


def test_many_broken_entries_are_counted(tmp_path):
    path = put_json(tmp_path / "val.json", [{}] * 50)
    with pytest.raises(ValueError, match=r"(?s)50 entries of .*and 30 more"):
        BENCHMARKS["vizwiz"].read(str(path))
