"""The training data of ImageBind-LLM: tab-separated captions, and instructions in JSON."""

import csv
import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmjax.data.formats.record import Record
from mmjax.data.formats.rows import RowRecords, caption_text, field, image_path, read_json, shown, text

CAPTION_PROMPT = "Generate caption of this image"  # imagebind_LLM/data/dataset.py: PretrainDataset
# Strings that pandas reads as missing values by default. The original converts them to the text "nan".
NO_VALUE = frozenset((
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null"))


class ListedRecords(RowRecords):
    """The rows of several files that a YAML file lists: (name of the file, index in it, row)."""

    def name(self, number: int) -> str:
        file, index, _ = self.rows[number]
        return f"{file}:{index}"

    def record(self, number: int) -> Record:
        _, index, row = self.rows[number]
        return self.read(self.root, self.name(number), index, row)


def imagebind_llm_pretrain(path: str, root: str | None = None) -> Sequence[Record]:
    """Reads a YAML file whose `META` lists tab-separated files of captions, with the header `url`, `caption`.

    path: the YAML file, or a folder with `pretrain.yaml`
    root: the folder that `url` is below, also if it is absolute; None for the YAML file's (the original takes any)

    Relative names of files are resolved from the YAML file's folder (in the original from the working directory).
    Fields are read as by the original's pandas: quotes are interpreted, and a missing value becomes the text "nan".
    Differences: a carriage return at the end of a line is not part of the caption, "007" is unchanged in a file with
    only numbers, and a first row with more fields than the header cannot be used (pandas shifts its columns).

    Raises FileNotFoundError or ValueError naming the files that cannot be used.
    """
    meta, files = _meta(path, "pretrain.yaml")
    problems: list[str] = []
    rows = [row for file in files for row in _lines(file, problems)]
    _check(meta, problems)
    return ListedRecords(meta, str(meta.parent) if root is None else root, rows, _caption)


def imagebind_llm_finetune(path: str, root: str | None = None, tuple_prompts: bool = False) -> Sequence[Record]:
    """Reads a YAML file whose `META` lists JSON files: conversations about images (LLaVA), instructions (Alpaca).

    path:          the YAML file, or a folder with `finetune.yaml`
    root:          the folder that `image` is below, also if it is absolute; None for the YAML file's
    tuple_prompts: write the instructions of rows without an image as in the training of the released model: a stray
                   comma in the original makes each a Python tuple, with prompts such as `('Name a dog.',)`. Off by
                   default, since users do not write such prompts.

    Only the first question and answer of a conversation are used, and `<image>` marks are kept. Relative names of files
    are resolved from the YAML file's folder. Raises FileNotFoundError or ValueError naming files that cannot be used.
    """
    meta, files = _meta(path, "finetune.yaml")
    problems: list[str] = []
    rows = []
    for file in files:
        try:
            content = read_json(file, list, expected="a list of rows")
        except ValueError as error:
            problems.append(str(error))
        else:
            rows += [(file.name, number, row) for number, row in enumerate(content)]
    _check(meta, problems)
    return ListedRecords(meta, str(meta.parent) if root is None else root, rows,
                         functools.partial(_instruction, tuple_prompts))


def _meta(path: str, default: str) -> tuple[Path, list[Path]]:
    """Returns the YAML file and the files that it lists."""
    import yaml

    meta = Path(path) / default if Path(path).is_dir() else Path(path)
    if not meta.is_file():
        raise FileNotFoundError(f"There is no {meta}. Expected a YAML file with the list META, or a folder with "
                                f"{default}.")
    try:
        names = yaml.safe_load(meta.read_text(encoding="utf-8"))["META"]
        files = [meta.parent / name for name in names]
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{meta} must be YAML with a list META of file names: {error!r}") from error
    if not isinstance(names, list) or not files:
        raise ValueError(f"{meta}: META is {shown(names)}, but must be a list of file names.")
    _check(meta, [f"{file} is not there" for file in files if not file.is_file()])
    return meta, files


def _lines(file: Path, problems: list[str]) -> Iterable[tuple[str, int, Any]]:
    """Yields (file name, index, (fields of the first line, fields or an error)) for each row of a tab-separated file.

    Problems of the file as a whole are appended to `problems`.
    """
    end = "\0"  # an additional line, which is not separate after an unclosed quote
    rows: list[Any] = []
    with open(file, newline="\n", encoding="utf-8-sig", errors="surrogateescape") as lines:
        reader = csv.reader(itertools.chain(lines, [end]), delimiter="\t")
        while True:
            try:
                rows.append(next(reader))
            except csv.Error as error:
                rows.append(error)
            except StopIteration:
                break
    if rows.pop() != [end]:
        problems.append(f"{file}: a quote is opened and never closed")
        return
    head, *rows = rows or [[]]
    if isinstance(head, csv.Error) or not {"url", "caption"} <= set(head):
        problems.append(f"{file}: the first line is {shown(str(head))}, but must name url and caption, with a tab "
                        "between")
        return
    for number, row in enumerate(rows):
        if row:  # not a blank line
            yield file.name, number, (head, row)


def _caption(root: str, name: str, number: int, row: Any) -> Record:
    head, fields = row
    if isinstance(fields, csv.Error):
        raise ValueError(f"the line is not tab-separated text: {fields}")
    if len(fields) > len(head):
        raise ValueError(f"{len(fields)} fields, but the first line of the file has {len(head)}")
    named = {"url": "", "caption": ""} | dict(zip(head, fields, strict=False))
    if named["caption"] in NO_VALUE:
        named["caption"] = "nan"
    return Record(name, image_path(root, named["url"]), caption_text(named, "caption"), CAPTION_PROMPT)


def _instruction(tuple_prompts: bool, root: str, name: str, number: int, row: Any) -> Record:
    if isinstance(row, dict) and "image" in row:
        messages = field(row, "conversations", list)
        if len(messages) < 2:
            raise ValueError(f"a conversation needs a question and an answer, but has {len(messages)} messages")
        question, answer = text(messages[0], "value"), caption_text(messages[1], "value")
        return Record(name, image_path(root, field(row, "image", str)), answer, question)
    prompt, answer, input = text(row, "instruction"), caption_text(row, "output"), text(row, "input")
    return Record(name, None, answer, str((prompt,)) if tuple_prompts else prompt, input)


def _check(path: Path, problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(f"The data of {path} cannot be used:\n  " + "\n  ".join(problems))
