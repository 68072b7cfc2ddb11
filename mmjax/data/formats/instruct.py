"""Instructions and conversations in JSON: LLaVA-Instruct, MiniGPT-4's files, and JSON lines."""

from collections.abc import Sequence
from typing import Any

from mmjax import files
from mmjax.data.formats.account import Account
from mmjax.data.formats.record import Record
from mmjax.data.formats.rows import (
    MARK,
    RowRecords,
    about_image,
    caption_text,
    dialogue,
    field,
    image_names,
    image_path,
    image_root,
    lines_of,
    read_json,
    shown,
    the_file,
    without_image,
)


class LineRecords(RowRecords):
    """The lines of a file of JSON lines, (number, line), named by their numbers in the file, from 0."""

    def name(self, number: int) -> str:
        return f"{self.path.name}:{self.rows[number][0]}"

    def record(self, number: int) -> Record:
        return self.read(self.root, self.name(number), number, self.rows[number][1])


def llava_instruct(path: str, root: str | None = None, follow_links: bool = False) -> Sequence[Record]:
    """Reads a list of {"id", "image", "conversations": [{"from", "value"}, ...]}; `from` is human and gpt in turn.

    path: the file, or a folder with exactly one *.json
    root: the folder that `image` is below; None for the file's
    follow_links: whether links may lead out of the root

    As in MiniGPT-4, `<image>` marks and newlines are removed from the first question and the image is put before it.
    Every question about an image ends with a space. One pair becomes prompt and answer, several a conversation. A row
    without `image`, or with null, is text alone, except in MiniGPT-4's files, which mark the image and name it only by
    `id` (COCO_train2014_ID.jpg). A list of images precedes the first question. Raises FileNotFoundError or ValueError
    if the file cannot be used.
    """
    file = the_file(path, "*.json", "a JSON file of conversations")
    rows = read_json(file, list, expected='a list of {"image", "conversations"}')
    return RowRecords(file, image_root(file, root, follow_links), rows, _conversation)


def jsonl(path: str, root: str | None = None, follow_links: bool = False) -> Sequence[Record]:
    """Reads one JSON object a line: {"image", "caption"}; {"image", "prompt", "answer"}; or a conversation, {"image",
    "turns": [[QUESTION, ANSWER], ...]} or {"image", "conversations": [{"from", "value"}, ...]}.

    path: the file, or a folder with exactly one *.jsonl
    root: the folder that `image` is below; None for the file's
    follow_links: whether links may lead out of the root

    `image` is a name, a list of names, or null for none; `images` is a list of names, such as the frames of a video.
    Only captions need an image. The images are put where the prompt has `<ImageHere>`, one for each; without it, or
    with LLaVA's `<image>`, before the prompt. Blank lines are skipped. Raises FileNotFoundError or ValueError if the
    file cannot be used.
    """
    file = the_file(path, "*.jsonl", "a file with one JSON object a line")
    lines, blank = lines_of(file)
    account = Account("lines", len(lines) + blank, len(lines))
    if blank:
        account.leave("blank lines", count=blank)
    return LineRecords(file, image_root(file, root, follow_links), lines, _line, account)


def _conversation(root: str, name: str, number: int, row: Any) -> Record:
    pairs = dialogue(field(row, "conversations", list))
    images = image_names(row)
    if "image" not in row and "images" not in row and MARK in pairs[0][0]:
        images = [f"COCO_train2014_{field(row, 'id', str, int)}.jpg"]
    if images:  # llava_dataset.py: LlavaConversationDataset
        (first, answer), *later = pairs
        pairs = [(first.replace(MARK, "").replace("\n", "").strip(), answer), *later]
    return conversation(name, [image_path(root, each) for each in images], pairs)


def conversation(name: str, images: Sequence[Any], pairs: Sequence[tuple[str, str]]) -> Record:
    """Returns the record of (question, answer) pairs about images, which precede the first question unless it marks
    them. Raises ValueError if the questions mark images that are not there."""
    for question, _ in pairs[1:]:
        without_image(question)
    (first, answer), *later = pairs
    if images:
        pairs = [(about_image(first, len(images)), answer), *((f"{question} ", said) for question, said in later)]
    else:
        pairs = [(without_image(first), answer), *later]
    (prompt, answer), *later = pairs
    image, *others = images or [None]
    return Record(name, image, answer, prompt, turns=tuple(pairs) if later else (), others=tuple(others))


def _line(root: str, name: str, number: int, line: bytes) -> Record:
    try:
        row = files.parse_json(line)
    except ValueError as error:
        raise ValueError(f"the line is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {shown(row)}")
    return described(name, [image_path(root, each) for each in image_names(row)], row)


def described(name: str, images: Sequence[Any], row: dict[str, Any]) -> Record:
    """Returns the record of a row with images and with one of: `caption`; `prompt` and `answer`; `turns`,
    `conversations` or `messages`. Raises ValueError for any other row."""
    if "caption" in row:
        if not images:
            raise ValueError("a caption without an image: 'image' must be the name of one, got "
                             f"{shown(row.get('image'))}")
        if len(images) > 1:
            raise ValueError(f"a caption of {len(images)} images; give a 'prompt' and an 'answer' in place of it")
        return Record(name, images[0], caption_text(row, "caption"))
    if "turns" in row:
        return conversation(name, images, turns(field(row, "turns", list)))
    for key in ("conversations", "messages"):
        if key in row:
            return conversation(name, images, dialogue(field(row, key, list)))
    return conversation(name, images, [(caption_text(row, "prompt"), caption_text(row, "answer"))])


def turns(values: Sequence[Any]) -> list[tuple[str, str]]:
    """Returns the pairs of `turns`: [QUESTION, ANSWER], {"question", "answer"} or {"user", "assistant"}.

    Raises ValueError for other ones.
    """
    if not values:
        raise ValueError("'turns' is empty")
    pairs = []
    for value in values:
        if isinstance(value, (list, tuple)) and len(value) == 2:
            value = {"question": value[0], "answer": value[1]}
        if isinstance(value, dict) and "user" in value:
            value = {"question": value["user"], "answer": value.get("assistant")}
        if not isinstance(value, dict):
            raise ValueError(f"'turns' must have pairs [QUESTION, ANSWER], but has {shown(value)}")
        pairs.append((caption_text(value, "question"), caption_text(value, "answer")))
    return pairs
