"""Questions with short answers: VQAv2, OK-VQA and GQA, asked as MiniGPT-v2 does.

The originals draw an instruction and one of the ten answers anew in every pass. Here record n has instruction n modulo
the number of instructions, and the most frequent answer (VQAv2's `multiple_choice_answer`).
"""

import collections
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmjax.data.formats.account import Account
from mmjax.data.formats.record import Record, clean_caption
from mmjax.data.formats.rows import (
    RowRecords,
    about_image,
    caption_text,
    coco_name,
    field,
    image_path,
    image_root,
    read_json,
    the_file,
)

INSTRUCTIONS = (  # coco_vqa_datasets.py, gqa_datasets.py: instruction_pool
    "[vqa] {}",
    "[vqa] Based on the image, respond to this question with a short answer: {}",
)


def vqa(path: str, root: str | None = None, follow_links: bool = False) -> Sequence[Record]:
    """Reads `..._questions.json` and `..._annotations.json` (VQAv2, OK-VQA), with images in `train2014`.

    path: the file of questions, or a folder with exactly one
    root: the folder with the folder of COCO's images; None for the file's, or its parent if that is `annotations`
    follow_links: whether links may lead out of the root

    The file of answers has the name of that of the questions, without OpenEnded_. One file with a list of {"image",
    "question", "answer": [...]} (LAVIS's vqa_train.json and okvqa_train.json) is read too, its `image` a path below
    `root`. Raises FileNotFoundError or ValueError if the files cannot be used.
    """
    file = the_file(path, "*_questions.json", "VQA's questions")
    content = read_json(file, dict, list, expected='{"questions": [...]}, or a list of {"image", "question", "answer"}')
    root = image_root(file, root, follow_links)
    if isinstance(content, list):
        return RowRecords(file, root, content, functools.partial(_listed, ""))
    questions, split, answers = with_answers(file, content)
    account = Account("questions", len(questions), len(questions))
    asked = {str(row.get("question_id")) for row in questions if isinstance(row, dict)}
    if unasked := [key for key in answers if key not in asked]:
        account.notice("answers without a question", *unasked)
    return RowRecords(file, root, questions, functools.partial(_question, split, answers), account,
                      [answers_file(file)])


def gqa(path: str, root: str | None = None, follow_links: bool = False) -> Sequence[Record]:
    """Reads `train_balanced_questions.json`, {ID: {"imageId", "question", "answer"}}, and `images/IMAGEID.jpg`.

    path: the file, or a folder with exactly one *questions*.json
    root: the folder with the folder `images`; None for the file's
    follow_links: whether links may lead out of the root

    A list of {"image", "question", "answer"} (LAVIS) is read too. Raises FileNotFoundError or ValueError if the file
    cannot be used.
    """
    file = the_file(path, "*questions*.json", "GQA's questions")
    content = read_json(file, dict, list, expected='{ID: {"imageId", "question", "answer"}}')
    root = image_root(file, root, follow_links)
    if isinstance(content, list):
        return RowRecords(file, root, content, functools.partial(_listed, "images/"))
    return RowRecords(file, root, list(content.values()), _gqa)


def with_answers(file: Path, content: dict[str, Any]) -> tuple[list[Any], str, dict[str, Any]]:
    """Returns (questions, the folder of their images, annotations by the text of the question's id) of a file of
    questions' content. Ids may be numbers in one file and text in the other.

    Raises FileNotFoundError if there is no file of annotations beside it, ValueError if one of them holds something
    else.
    """
    questions, split = content.get("questions"), content.get("data_subtype")
    if not isinstance(questions, list) or not isinstance(split, str):
        raise ValueError(f'{file} must hold {{"data_subtype": "train2014", "questions": [...]}}.')
    beside = answers_file(file)
    if beside == file or not beside.is_file():
        raise FileNotFoundError(f"{file} has questions; their answers are expected in {beside.name} beside it, which "
                                "is not there.")
    given = read_json(beside, dict, expected='{"annotations": [...]}').get("annotations")
    if not isinstance(given, list):
        raise ValueError(f'{beside} must hold {{"annotations": [{{"question_id", "answers"}}, ...]}}.')
    return questions, split, {str(row["question_id"]): row for row in given
                              if isinstance(row, dict) and isinstance(row.get("question_id"), (int, str))}


def answers_file(file: Path) -> Path:
    """Returns the file of answers beside a file of questions."""
    return file.with_name(file.name.replace("OpenEnded_", "").replace("_questions", "_annotations"))


def _question(split: str, answers: dict[str, Any], root: str, name: str, number: int, row: Any) -> Record:
    key = str(field(row, "question_id", int, str))
    if key not in answers:
        raise ValueError(f"there is no answer to question {key}")
    given = [field(answer, "answer", str) for answer in field(answers[key], "answers", list)]
    image = image_path(root, coco_name(split, field(row, "image_id", int)))
    return _record(name, number, image, row, given)


def _listed(folder: str, root: str, name: str, number: int, row: Any) -> Record:
    image = image_path(root, folder + field(row, "image", str))
    given = field(row, "answer", str, list)
    return _record(name, number, image, row, given if isinstance(given, list) else [given])


def _gqa(root: str, name: str, number: int, row: Any) -> Record:
    image = image_path(root, f"images/{field(row, 'imageId', str, int)}.jpg")
    return _record(name, number, image, row, [field(row, "answer", str)])


def _record(name: str, number: int, image: str, row: Any, answers: Sequence[Any]) -> Record:
    """Returns a record with question and answer after the caption cleaning, as in the original; skips empty answers."""
    question = clean_caption(caption_text(row, "question"))
    counts = collections.Counter(filter(None, (
        clean_caption(caption_text({"answer": answer}, "answer")) for answer in answers if answer != "")))
    if not question or not counts:
        raise ValueError("nothing but punctuation in the question, or no answer")
    instruction = INSTRUCTIONS[number % len(INSTRUCTIONS)]
    ((answer, _),) = counts.most_common(1)  # the first of equally frequent ones
    return Record(name, image, answer, about_image(instruction.replace("{}", question)))
