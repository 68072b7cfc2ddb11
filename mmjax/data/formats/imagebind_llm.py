"""What ImageBind-LLM learns from: lists of tab-separated captions, and of instructions in JSON."""

import csv
import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmjax.data.formats.record import Record
from mmjax.data.formats.rows import RowRecords, caption_text, field, image_path, read_json, shown, text

CAPTION_PROMPT = "Generate caption of this image"  # imagebind_LLM/data/dataset.py: PretrainDataset
# What pandas reads as no value by default. The original makes text of it: "nan".
NO_VALUE = frozenset((
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null"))


class Listed(RowRecords):
    """The rows of several files that a YAML file lists: (name of the file, number in it, row)."""

    def name(self, number: int) -> str:
        file, place, _ = self.rows[number]
        return f"{file}:{place}"

    def record(self, number: int) -> Record:
        _, place, row = self.rows[number]
        return self.read(self.root, self.name(number), place, row)


def imagebind_llm_pretrain(path: str, root: str | None = None) -> Sequence[Record]:
    """A YAML file whose `META` lists tab-separated files with the header `url`, `caption`: images with captions.

    path: the YAML file, or a folder with `pretrain.yaml`
    root: the folder that `url` is below, also where it is absolute; None for the YAML file's (the original takes any)

    Relative names of files are looked up beside the YAML file (the original looks in the working directory). Fields are
    read as the original's pandas does: quotes are interpreted, and a caption that pandas holds for no value becomes the
    word "nan". Unlike there, a carriage return at the end of a line is no part of the caption, "007" stays as it is in
    a file of nothing but numbers, and a first row with more fields than the header cannot be used (pandas shifts its
    columns).

    Raises FileNotFoundError or ValueError naming the files that cannot be used.
    """
    meta, files = _meta(path, "pretrain.yaml")
    problems: list[str] = []
    rows = [row for file in files for row in _lines(file, problems)]
    _check(meta, problems)
    return Listed(meta, str(meta.parent) if root is None else root, rows, _caption)


def imagebind_llm_finetune(path: str, root: str | None = None, tuple_prompts: bool = False) -> Sequence[Record]:
    """A YAML file whose `META` lists JSON files: images with conversations (LLaVA), instructions without (Alpaca).

    path:          the YAML file, or a folder with `finetune.yaml`
    root:          the folder that `image` is below, also where it is absolute; None for the YAML file's
    tuple_prompts: write the instructions of rows without an image as the released model was trained on them: a stray
                   comma of the original makes each a Python tuple, so that its prompts show `('Name a dog.',)`. Off,
                   as nobody asks like that.

    Of a conversation the first question and answer are taken, `<image>` marks stay in the text. Relative names of files
    are looked up beside the YAML file. Raises FileNotFoundError or ValueError naming the files that cannot be used.
    """
    meta, files = _meta(path, "finetune.yaml")
    problems: list[str] = []
    rows = []
    for file in files:
        try:
            found = read_json(file, list, expected="a list of rows")
        except ValueError as error:
            problems.append(str(error))
        else:
            rows += [(file.name, number, row) for number, row in enumerate(found)]
    _check(meta, problems)
    return Listed(meta, str(meta.parent) if root is None else root, rows,
                  functools.partial(_instruction, tuple_prompts))


def _meta(path: str, usual: str) -> tuple[Path, list[Path]]:
    """The YAML file and the files that it lists."""
    import yaml

    meta = Path(path) / usual if Path(path).is_dir() else Path(path)
    if not meta.is_file():
        raise FileNotFoundError(f"There is no {meta}. Expected a YAML file with the list META, or a folder with "
                                f"{usual}.")
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
    """The rows of one tab-separated file: (fields of the first line, fields), the latter an error if it has none.

    What is wrong with the file as a whole goes into `problems`.
    """
    end = "\0"  # one more line; where a quote was left open it does not come out alone
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
        said = field(row, "conversations", list)
        if len(said) < 2:
            raise ValueError(f"a conversation needs a question and an answer, but has {len(said)} messages")
        question, answer = text(said[0], "value"), caption_text(said[1], "value")
        return Record(name, image_path(root, field(row, "image", str)), answer, question)
    prompt, answer, given = text(row, "instruction"), caption_text(row, "output"), text(row, "input")
    return Record(name, None, answer, str((prompt,)) if tuple_prompts else prompt, given)


def _check(path: Path, problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(f"The data of {path} cannot be used:\n  " + "\n  ".join(problems))
