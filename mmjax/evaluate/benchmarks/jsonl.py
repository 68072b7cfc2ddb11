"""Custom questions: one JSON object a line, with generated answers or with choices."""

import functools
from typing import Any

from mmjax import files
from mmjax.data.formats.rows import caption_text, field, image_root, text, the_file
from mmjax.evaluate.benchmarks.choosing import read_choices, right_choice
from mmjax.evaluate.benchmarks.items import Item, check_template, find_image, items, json_lines, to_sample

PROMPT = "{}"


def jsonl(path: str, root: str | None = None, prompt: str | None = None) -> list[Item]:
    """Reads lines of {"id", "image", "prompt", "references": [text, ...]}, or with "answer": text for one reference.

    path: the file, or the folder that has exactly one *.jsonl
    root: the folder of `image`; None for the file's folder, or its parent if that is `annotations`

    `id` is optional (default: the line number, from 1), and so are `image` and `group` (items that are also scored
    separately). The image comes before the prompt, or at its one `<ImageHere>`. Raises
    FileNotFoundError, or ValueError naming every line that cannot be used.
    """
    return _lines(path, root, prompt, _in_words)


def jsonl_choices(path: str, root: str | None = None, prompt: str | None = None) -> list[Item]:
    """Reads lines of {"id", "image", "prompt", "choices": [text, ...], "answer": index of the right one, or its text}.

    Everything else is as in `jsonl`.
    """
    return _lines(path, root, prompt, _choosing)


def _lines(path: str, root: str | None, prompt: str | None, make: Any) -> list[Item]:
    file = the_file(path, "*.jsonl", "a file with one JSON object a line")
    root, prompt = image_root(file, root), check_template(PROMPT if prompt is None else prompt, "line's prompt")
    return items(file, root, json_lines(file), functools.partial(_line, root, prompt, make))


def _line(root: str, prompt: str, make: Any, number: int, line: bytes) -> Item:
    try:
        row = files.parse_json(line)
    except ValueError as error:
        raise ValueError(f"the line is not JSON: {error}") from error
    question = caption_text(row, "prompt")
    image = find_image(root, field(row, "image", str)) if row.get("image") is not None else None
    name = str(field(row, "id", str, int)) if "id" in row else str(number)
    group = text(row, "group") if "group" in row else ""
    return make(name, to_sample(prompt, question, image), group, row)


def _in_words(name: str, sample: Any, group: str, row: Any) -> Item:
    if "choices" in row:
        raise ValueError("it has choices: score this file as jsonl_choices")
    if "references" in row:
        references = tuple(caption_text({"references": each}, "references") for each in field(row, "references", list))
    else:
        references = (caption_text(row, "answer"),)
    if not references:
        raise ValueError("'references' is empty")
    return Item(name, sample, references, group=group)


def _choosing(name: str, sample: Any, group: str, row: Any) -> Item:
    choices = read_choices(row)
    return Item(name, sample, choices=choices, right=right_choice(row, choices), group=group)
