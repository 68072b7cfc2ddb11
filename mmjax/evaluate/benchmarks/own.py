"""Your own questions: one JSON object a line, answered in words or by choosing."""

import functools
from typing import Any

from mmjax.data.formats.rows import caption_text, field, image_root, parse_json, text, the_file
from mmjax.evaluate.benchmarks.choosing import read_choices, right_choice
from mmjax.evaluate.benchmarks.items import Item, asked, check_template, items, json_lines, there

PROMPT = "{}"


def jsonl(path: str, root: str | None = None, prompt: str | None = None) -> list[Item]:
    """Lines of {"id", "image", "prompt", "references": [text, ...]}, or with "answer": text for a single reference.

    path: the file, or the folder that has exactly one *.jsonl
    root: the folder that `image` is below; None for the file's, or for the one above where that is `annotations`

    `id` may be left out (the line's number, from 1 on), so may `image` (a question about nothing shown) and `group`
    (what is scored for itself too). The image stands in front of the prompt, or at its one `<ImageHere>`. Raises
    FileNotFoundError, or ValueError naming every line that cannot be used.
    """
    return _lines(path, root, prompt, _in_words)


def jsonl_choices(path: str, root: str | None = None, prompt: str | None = None) -> list[Item]:
    """Lines of {"id", "image", "prompt", "choices": [text, ...], "answer": the place of the right one, or its text}.

    The rest is as in `jsonl`.
    """
    return _lines(path, root, prompt, _choosing)


def _lines(path: str, root: str | None, prompt: str | None, make: Any) -> list[Item]:
    file = the_file(path, "*.jsonl", "a file with one JSON object a line")
    root, prompt = image_root(file, root), check_template(PROMPT if prompt is None else prompt, "line's prompt")
    return items(file, root, json_lines(file), functools.partial(_line, root, prompt, make))


def _line(root: str, prompt: str, make: Any, number: int, line: bytes) -> Item:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"the line is not JSON: {error}") from error
    question = caption_text(row, "prompt")
    image = there(root, field(row, "image", str)) if row.get("image") is not None else None
    name = str(field(row, "id", str, int)) if "id" in row else str(number)
    group = text(row, "group") if "group" in row else ""
    return make(name, asked(prompt, question, image), group, row)


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
