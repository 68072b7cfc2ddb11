"""The training data of ImageBind-LLM: tab-separated captions, and instructions in JSON."""

import csv
import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmjax import files
from mmjax.data.formats.account import Account
from mmjax.data.formats.record import Record
from mmjax.data.formats.rows import (
    Root,
    RowRecords,
    caption_text,
    dialogue,
    field,
    image_names,
    image_path,
    read_json,
    shown,
    text,
    without_image,
)

CAPTION_PROMPT = "Generate caption of this image"  # imagebind_LLM/data/dataset.py: PretrainDataset
# Strings that pandas reads as missing values by default. The original converts them to the text "nan".
NO_VALUE = frozenset((
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null"))


class ListedRecords(RowRecords):
    """The rows of several files that a YAML file lists: (name of the file, index in it, row)."""

    def name(self, number: int) -> str:
        file, index, *_ = self.rows[number]
        return f"{file}:{index}"

    def record(self, number: int) -> Record:
        _, index, row = self.rows[number]
        return self.read(self.root, self.name(number), index, row)


def imagebind_llm_pretrain(path: str, root: str | None = None, follow_links: bool = False) -> Sequence[Record]:
    """Reads a YAML file whose `META` lists tab-separated files of captions, with the header `url`, `caption`.

    path: the YAML file, or a folder with `pretrain.yaml`
    root: the folder that `url` is below, also if it is absolute; None for the YAML file's (the original takes any)

    follow_links: whether links may lead out of the root

    Relative names of files are resolved from the YAML file's folder (in the original from the working directory).
    Fields are read as by the original's pandas: quotes are interpreted, and a missing value becomes the text "nan".
    Differences: a carriage return at the end of a line is not part of the caption, "007" is unchanged in a file with
    only numbers, and a first row with more fields than the header cannot be used (pandas shifts its columns).

    Raises FileNotFoundError or ValueError naming the files that cannot be used.
    """
    meta, listed = _meta(path, "pretrain.yaml")
    problems: list[str] = []
    account = Account("lines")
    rows = [row for file in listed for row in _lines(file, problems, account)]
    _check(meta, problems)
    root = Root.of(str(meta.parent) if root is None else root, follow_links)
    return ListedRecords(meta, root, rows, _caption, account, listed)


def imagebind_llm_finetune(path: str, root: str | None = None, tuple_prompts: bool = False,
                           follow_links: bool = False) -> Sequence[Record]:
    """Reads a YAML file whose `META` lists JSON files: conversations about images (LLaVA), instructions (Alpaca).

    path:          the YAML file, or a folder with `finetune.yaml`
    root:          the folder that `image` is below, also if it is absolute; None for the YAML file's
    tuple_prompts: write the instructions of rows without an image as in the training of the released model: a stray
                   comma in the original makes each a Python tuple, with prompts such as `('Name a dog.',)`. Off by
                   default, since users do not write such prompts.
    follow_links:  whether links may lead out of the root

    Only the first question and answer of a conversation are used, and `<image>` marks are kept. A row without `input`,
    or with null, has none. Relative names of files are resolved from the YAML file's folder. Raises FileNotFoundError
    or ValueError naming files that cannot be used.
    """
    meta, listed = _meta(path, "finetune.yaml")
    problems: list[str] = []
    rows: list[Any] = []
    account = Account("rows")
    for file in listed:
        try:
            content = read_json(file, list, expected="a list of rows")
        except ValueError as error:
            problems.append(str(error))
        else:
            rows += [(file.name, number, row) for number, row in enumerate(content)]
    _check(meta, problems)
    account.found = account.used = len(rows)
    if cut := [f"{name}:{number}" for name, number, row in rows if len(_messages(row)) > 2]:
        account.notice("conversations of which only the first question and answer are used", *cut)
    root = Root.of(str(meta.parent) if root is None else root, follow_links)
    return ListedRecords(meta, root, rows, functools.partial(_instruction, tuple_prompts), account, listed)


def _messages(row: Any) -> Sequence[Any]:
    """Returns the messages of a row; () if it has none."""
    messages = row.get("conversations") if isinstance(row, dict) else None
    return messages if isinstance(messages, list) else ()


def _meta(path: str, default: str) -> tuple[Path, list[Path]]:
    """Returns the YAML file and the files that it lists."""
    import yaml

    meta = Path(path) / default if Path(path).is_dir() else Path(path)
    if not meta.is_file():
        raise FileNotFoundError(f"There is no {meta}. Expected a YAML file with the list META, or a folder with "
                                f"{default}.")
    try:
        names = yaml.safe_load(meta.read_text(encoding="utf-8"))["META"]
        listed = [meta.parent / name for name in names]
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{meta} must be YAML with a list META of file names: {error!r}") from error
    if not isinstance(names, list) or not listed:
        raise ValueError(f"{meta}: META is {shown(names)}, but must be a list of file names.")
    _check(meta, [f"{file} is not there" for file in listed if not file.is_file()])
    return meta, listed


def _lines(file: Path, problems: list[str], account: Account) -> Iterable[tuple[str, int, Any]]:
    """Yields (file name, index, (fields of the first line, fields or an error)) for each row of a tab-separated file.

    Problems of the file as a whole are appended to `problems`, its lines are counted in `account`.
    """
    with open(file, "rb") as start:
        if message := files.not_text(start.read(64)):
            problems.append(f"{file} {message} {file.name}")
            return
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
        name = f"{file.name}:{number}"
        swallowed = 0 if isinstance(row, csv.Error) else sum(field.count("\n") for field in row)
        account.found += 1 + swallowed
        if not row:
            account.leave("blank lines", name)
            continue
        account.used += 1
        if swallowed:  # pandas, which the original reads with, does the same
            account.leave("lines that a row swallows because a quote is opened in it",
                          f"{name} swallows {swallowed}: {shown(' '.join(row))}", count=swallowed)
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
    names = image_names(row) if isinstance(row, dict) else []
    if names or isinstance(row, dict) and "conversations" in row:
        if len(names) > 1:
            raise ValueError(f"{len(names)} images, but a row of this format has one")
        ((question, answer),) = dialogue(field(row, "conversations", list)[:2], empty_question=True)
        if not names:
            return Record(name, None, answer, without_image(question))
        return Record(name, image_path(root, names[0]), answer, question)
    prompt, answer = text(row, "instruction"), caption_text(row, "output")
    input = "" if row.get("input") is None else text(row, "input")
    return Record(name, None, answer, str((prompt,)) if tuple_prompts else prompt, input)


def _check(path: Path, problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(f"The data of {path} cannot be used:\n  " + "\n  ".join(problems))
