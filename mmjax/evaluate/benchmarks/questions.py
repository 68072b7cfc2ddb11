"""Questions with short answers: VQAv2, OK-VQA, GQA, VizWiz and VSR, with MiniGPT-v2's prompts."""

import functools
from typing import Any

from mmjax import files
from mmjax.data.formats.rows import caption_text, coco_name, field, image_root, read_json, the_file
from mmjax.data.formats.vqa import with_answers
from mmjax.evaluate.benchmarks.items import Item, check_template, find_image, items, json_lines, to_sample

# vqa_datasets.py: OKVQAEvalData and GQAEvalData, VizWizEvalData, VSREvalData
SHORT = "[vqa] Based on the image, respond to this question with a short answer: {}"
VIZWIZ = ("[vqa] The question is '{}' Based on the image, answer the question with a single word or phrase. and reply "
          "'unanswerable' when the provided information is insufficient")
VSR = "[vqa] Based on the image, is this statement true or false? {}"


def vqa(path: str, root: str | None = None, prompt: str | None = None) -> list[Item]:
    """Reads VQAv2 and OK-VQA: `..._questions.json` and `..._annotations.json` in one folder, images in `val2014`.

    path: the file of questions, or the folder that has exactly one; or a list of {"image", "question", "answer": [...]}
          (LAVIS's vqa_val.json)
    root: the folder with the folder of COCO's images; None for the file's, or its parent if that is `annotations`

    All ten answers are kept; groups are the types of the answers. Raises FileNotFoundError, or ValueError naming what
    cannot be used.
    """
    file = the_file(path, "*_questions.json", "VQA's questions")
    content = read_json(file, dict, list, expected='{"questions": [...]}, or a list of {"image", "question", "answer"}')
    root, prompt = image_root(file, root), check_template(SHORT if prompt is None else prompt, "question")
    if isinstance(content, list):
        return items(file, root, content, functools.partial(_listed, root, "", prompt))
    questions, split, answers = with_answers(file, content)
    return items(file, root, questions, functools.partial(_question, root, split, answers, prompt))


def gqa(path: str, root: str | None = None, prompt: str | None = None) -> list[Item]:
    """Reads `testdev_balanced_questions.json`, {ID: {"imageId", "question", "answer"}}, beside `images/IMAGEID.jpg`.

    path: the file, or the folder that has exactly one *questions*.json; or a list of {"image", "question", "answer"}
          (as in MiniGPT-v2's evaluation), whose images are in `images` too
    root: the folder with the folder `images`; None for the file's

    Groups are the structures of the questions (verify, query, choose, logical, compare), where the file has them.
    Raises FileNotFoundError, or ValueError naming what cannot be used.
    """
    file = the_file(path, "*questions*.json", "GQA's questions")
    content = read_json(file, dict, list, expected='{ID: {"imageId", "question", "answer"}}')
    root, prompt = image_root(file, root), check_template(SHORT if prompt is None else prompt, "question")
    if isinstance(content, list):
        return items(file, root, content, functools.partial(_listed, root, "images/", prompt))
    return items(file, root, content.items(), functools.partial(_gqa, root, prompt))


def vizwiz(path: str, root: str | None = None, prompt: str | None = None) -> list[Item]:
    """Reads `val.json`, a list of {"image", "question", "answers": [{"answer"}, ...]}, images in `root`.

    path: the file
    root: the folder of the images; None for the file's folder, or its parent if that is `annotations`

    Groups are the types of the answers. Raises FileNotFoundError, or ValueError naming what cannot be used.
    """
    file = the_file(path, "val.json", "VizWiz's val.json")
    rows = read_json(file, list, expected='a list of {"image", "question", "answers"}')
    root, prompt = image_root(file, root), check_template(VIZWIZ if prompt is None else prompt, "question")
    return items(file, root, rows, functools.partial(_vizwiz, root, prompt))


def vsr(path: str, root: str | None = None, prompt: str | None = None) -> list[Item]:
    """Reads VSR's statements, true or false: JSON lines {"image", "caption", "label": 1 or 0}, images in `root`.

    path: the file, or the folder that has exactly one *.jsonl
    root: the folder of the images; None for the file's folder, or its parent if that is `annotations`

    Groups are the relations. Raises FileNotFoundError, or ValueError naming what cannot be used.
    """
    file = the_file(path, "*.jsonl", "VSR's lines of JSON")
    root, prompt = image_root(file, root), check_template(VSR if prompt is None else prompt, "statement")
    return items(file, root, json_lines(file), functools.partial(_vsr, root, prompt))


def _question(root: str, split: str, answers: dict[Any, Any], prompt: str, number: int, row: Any) -> Item:
    key = str(field(row, "question_id", int, str))
    if key not in answers:
        raise ValueError(f"there is no answer to question {key}")
    image = find_image(root, coco_name(split, field(row, "image_id", int)))
    kind = answers[key].get("answer_type", "")
    return Item(key, to_sample(prompt, caption_text(row, "question"), image), _answers(answers[key]),
                group=kind if isinstance(kind, str) else "")


def _listed(root: str, folder: str, prompt: str, number: int, row: Any) -> Item:
    given = field(row, "answer", str, list)
    given = [given] if isinstance(given, str) else given
    references = tuple(caption_text({"answer": each}, "answer") for each in given)
    if not references:
        raise ValueError("there is no answer")
    name = str(field(row, "question_id", int, str)) if "question_id" in row else str(number)
    image = find_image(root, folder + field(row, "image", str))
    return Item(name, to_sample(prompt, caption_text(row, "question"), image), references)


def _gqa(root: str, prompt: str, number: int, entry: tuple[str, Any]) -> Item:
    name, row = entry
    image = find_image(root, f"images/{field(row, 'imageId', str, int)}.jpg")
    types = row.get("types")
    group = types.get("structural", "") if isinstance(types, dict) else ""
    return Item(name, to_sample(prompt, caption_text(row, "question"), image), (caption_text(row, "answer"),),
                group=group if isinstance(group, str) else "")


def _vizwiz(root: str, prompt: str, number: int, row: Any) -> Item:
    name = field(row, "image", str)
    kind = row.get("answer_type", "")
    return Item(name, to_sample(prompt, caption_text(row, "question"), find_image(root, name)), _answers(row),
                group=kind if isinstance(kind, str) else "")


def _vsr(root: str, prompt: str, number: int, line: bytes) -> Item:
    row = files.parse_json(line)
    image = find_image(root, field(row, "image", str))
    label = field(row, "label", int)
    if label not in (0, 1):
        raise ValueError(f"'label' must be 0 or 1, got {label}")
    relation = row.get("relation", "")
    return Item(str(number), to_sample(prompt, caption_text(row, "caption"), image), ("true" if label else "false",),
                group=relation if isinstance(relation, str) else "")


def _answers(row: Any) -> tuple[str, ...]:
    """Returns the answers of people, which may be empty text."""
    given = tuple(field(each, "answer", str) for each in field(row, "answers", list))
    if not given:
        raise ValueError("there is no answer")
    return given
