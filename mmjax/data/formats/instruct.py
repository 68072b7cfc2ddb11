"""Instructions and conversations in JSON: LLaVA-Instruct, MiniGPT-4's files, and JSON lines."""

from collections.abc import Sequence
from typing import Any

from mmjax.data.formats.record import Record
from mmjax.data.formats.rows import (
    MARK,
    RowRecords,
    about_image,
    caption_text,
    field,
    image_path,
    image_root,
    parse_json,
    read_json,
    the_file,
    without_image,
)

ROLES = ("human", "gpt")


def llava_instruct(path: str, root: str | None = None) -> Sequence[Record]:
    """Reads a list of {"id", "image", "conversations": [{"from", "value"}, ...]}; `from` is human and gpt in turn.

    path: the file, or a folder with exactly one *.json
    root: the folder that `image` is below; None for the file's

    As in MiniGPT-4, `<image>` marks and newlines are removed from the first question and the image is put before it.
    Every question about an image ends with a space. One pair becomes prompt and answer, several a conversation. A row
    without `image` is text alone, except in MiniGPT-4's files, which mark the image and name it only by `id`
    (COCO_train2014_ID.jpg). Raises FileNotFoundError or ValueError if the file cannot be used.
    """
    file = the_file(path, "*.json", "a JSON file of conversations")
    rows = read_json(file, list, expected='a list of {"image", "conversations"}')
    return RowRecords(file, image_root(file, root), rows, _conversation)


def jsonl(path: str, root: str | None = None) -> Sequence[Record]:
    """Reads one JSON object a line: {"image", "caption"}, or {"image", "prompt", "answer"} with optional `image`.

    path: the file, or a folder with exactly one *.jsonl
    root: the folder that `image` is below; None for the file's

    The image is put where the prompt has `<ImageHere>`; without it, or with LLaVA's `<image>`, before the prompt.
    Blank lines are skipped. Raises FileNotFoundError or ValueError if the file cannot be used.
    """
    file = the_file(path, "*.jsonl", "a file with one JSON object a line")
    lines = [line for line in file.read_bytes().split(b"\n") if line.strip()]
    return RowRecords(file, image_root(file, root), lines, _line)


def _conversation(root: str, name: str, number: int, row: Any) -> Record:
    messages = field(row, "conversations", list)
    if len(messages) < 2 or len(messages) % 2:
        raise ValueError(f"a conversation needs an answer to every question, but has {len(messages)} messages")
    if wrong := [index for index, message in enumerate(messages) if isinstance(message, dict)
                 and message.get("from", ROLES[index % 2]) != ROLES[index % 2]]:
        raise ValueError(f"'from' must be human and gpt in turn, but is not in message {wrong[0]} (from 0)")
    questions, answers = ([caption_text(message, "value") for message in messages[first::2]] for first in range(2))
    for question in questions[1:]:
        without_image(question)

    first = questions[0]
    if "image" in row:
        image = image_path(root, field(row, "image", str))
    elif MARK in first:
        image = image_path(root, f"COCO_train2014_{field(row, 'id', str, int)}.jpg")
    else:
        image = None
    if image is None:
        questions = [without_image(first), *questions[1:]]
    else:  # llava_dataset.py: LlavaConversationDataset
        first = about_image(first.replace(MARK, "").replace("\n", "").strip())
        questions = [first, *(f"{question} " for question in questions[1:])]
    turns = tuple(zip(questions, answers, strict=True))
    return Record(name, image, answers[0], questions[0], turns=turns if len(turns) > 1 else ())


def _line(root: str, name: str, number: int, line: bytes) -> Record:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"the line is not JSON: {error}") from error
    if isinstance(row, dict) and "caption" in row:
        return Record(name, image_path(root, field(row, "image", str)), caption_text(row, "caption"))
    prompt, answer = caption_text(row, "prompt"), caption_text(row, "answer")
    if "image" in row:
        return Record(name, image_path(root, field(row, "image", str)), answer, about_image(prompt))
    return Record(name, None, answer, without_image(prompt))
