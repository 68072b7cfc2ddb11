"""Instructions and conversations in JSON: LLaVA-Instruct's and MiniGPT-4's own, and plain lines."""

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
    """A list of {"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}.

    path: the file, or the folder that has exactly one *.json
    root: the folder that `image` is below; None for the file's

    Read as MiniGPT-4 does: of the first question `<image>` marks and newlines go and the image stands in front, every
    question about an image ends with a space; of one pair prompt and answer are made, of several a conversation. A row
    without `image` is text alone, but for MiniGPT-4's own files, which mark the image and name it by `id` alone
    (COCO_train2014_ID.jpg). Raises FileNotFoundError or ValueError if the file cannot be used.
    """
    file = the_file(path, "*.json", "a JSON file of conversations")
    rows = read_json(file, list, expected='a list of {"image", "conversations"}')
    return RowRecords(file, image_root(file, root), rows, _conversation)


def jsonl(path: str, root: str | None = None) -> Sequence[Record]:
    """One JSON object a line: {"image", "caption"}, or {"image", "prompt", "answer"}, there also without `image`.

    path: the file, or the folder that has exactly one *.jsonl
    root: the folder that `image` is below; None for the file's

    A prompt about an image says by one `<ImageHere>` where it stands; without one, or with LLaVA's `<image>`, it
    stands in front. Blank lines are none. Raises FileNotFoundError or ValueError if the file cannot be used.
    """
    file = the_file(path, "*.jsonl", "a file with one JSON object a line")
    lines = [line for line in file.read_bytes().split(b"\n") if line.strip()]
    return RowRecords(file, image_root(file, root), lines, _line)


def _conversation(root: str, name: str, number: int, row: Any) -> Record:
    said = field(row, "conversations", list)
    if len(said) < 2 or len(said) % 2:
        raise ValueError(f"a conversation needs an answer to every question, but has {len(said)} messages")
    if wrong := [place for place, message in enumerate(said) if isinstance(message, dict)
                 and message.get("from", ROLES[place % 2]) != ROLES[place % 2]]:
        raise ValueError(f"'from' must be human and gpt in turn, but is not in message {wrong[0]} (from 0)")
    questions, answers = ([caption_text(message, "value") for message in said[first::2]] for first in range(2))
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
