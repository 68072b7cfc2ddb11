"""What ImageBind-LLM learns from: lists of tab-separated captions, and of instructions in JSON."""

import csv
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmjax.data.formats.record import Record
from mmjax.data.formats.rows import parse_json, shown, with_pictures

CAPTION_PROMPT = "Generate caption of this image"  # imagebind_LLM/data/dataset.py: PretrainDataset
# What pandas reads as no value by default. The original makes text of it: "nan".
NO_VALUE = frozenset((
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null"))


def imagebind_llm_pretrain(path: str) -> list[Record]:
    """A YAML file whose `META` lists tab-separated files with the header `url`, `caption`: pictures with captions.

    path: the YAML file, or a folder with `pretrain.yaml`

    Relative names, of files and of pictures, are looked up beside the YAML file (the original looks in the working
    directory). Fields are read as the original's pandas does: quotes are interpreted, and a caption that pandas holds
    for no value becomes the word "nan". Unlike there, a carriage return at the end of a line is no part of the caption,
    "007" stays as it is in a file of nothing but numbers, and a first row with more fields than the header is an error
    (pandas shifts its columns).

    Raises FileNotFoundError or ValueError naming the files and lines that are not as expected.
    """
    meta, files = _meta(path, "pretrain.yaml")
    problems: list[str] = []
    records = [record for file in files for record in _captions(file, meta.parent, problems)]
    _check(meta, problems)
    return with_pictures(meta, records, str(meta.parent))


def imagebind_llm_finetune(path: str, tuple_prompts: bool = False) -> list[Record]:
    """A YAML file whose `META` lists JSON files: pictures with conversations (LLaVA), instructions without (Alpaca).

    path:          the YAML file, or a folder with `finetune.yaml`
    tuple_prompts: write the instructions of rows without a picture as the released model was trained on them: a stray
                   comma of the original makes each a Python tuple, so that its prompts show `('Name a dog.',)`. Off,
                   as nobody asks like that.

    Of a conversation the first question and answer are taken, `<image>` marks stay in the text. Relative names are
    looked up beside the YAML file. Raises FileNotFoundError or ValueError naming the files and rows that are not as
    expected.
    """
    meta, files = _meta(path, "finetune.yaml")
    problems: list[str] = []
    records = []
    for file in files:
        try:
            rows = parse_json(file.read_bytes())
        except ValueError as error:  # not JSON, or not UTF-8
            problems.append(f"{file} is damaged, it is not JSON: {error}")
            continue
        if not isinstance(rows, list):
            problems.append(f"{file} must hold a list of rows, not a {type(rows).__name__}")
            continue
        read = [_instruction(f"{file.name}:{number}", row, meta.parent, tuple_prompts)
                for number, row in enumerate(rows)]
        if wrong := [number for number, record in enumerate(read) if record is None]:
            problems.append(
                f"{file}: {len(wrong)} rows are neither {{'image', 'conversations': [{{'value'}}, {{'value'}}]}} nor "
                f"{{'instruction', 'input', 'output'}} with text in them, such as number "
                f"{', '.join(map(str, wrong[:5]))} (from 0)")
        records += filter(None, read)
    _check(meta, problems)
    return with_pictures(meta, records, str(meta.parent))


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


def _captions(file: Path, base: Path, problems: list[str]) -> Iterable[Record]:
    """The lines of one tab-separated file; what is wrong with it goes into `problems`."""
    end = "\0"  # one more line; where a quote was left open it does not come out alone
    with open(file, newline="\n", encoding="utf-8-sig") as lines:
        reader = csv.reader(itertools.chain(lines, [end]), delimiter="\t")
        try:
            rows = list(reader)
        except (csv.Error, ValueError) as error:  # not UTF-8 is a ValueError
            problems.append(f"{file} cannot be read as tab-separated text: {error} (behind line {reader.line_num})")
            return
    if rows.pop() != [end]:
        problems.append(f"{file}: a quote is opened and never closed")
        return
    head, *rows = rows or [[]]
    if not {"url", "caption"} <= set(head):
        problems.append(f"{file}: the first line is {head}, but must name url and caption, with a tab between")
        return
    if long := [number for number, row in enumerate(rows) if len(row) > len(head)]:
        problems.append(f"{file}: {len(long)} rows have more than the {len(head)} fields of the first line, such as "
                        f"number {', '.join(map(str, long[:5]))} (from 0)")
        return
    for number, row in enumerate(rows):
        if row:  # not a blank line
            fields = dict(zip(head, row, strict=False))
            caption = fields.get("caption", "")
            yield Record(f"{file.name}:{number}", str(base / fields.get("url", "")),
                         "nan" if caption in NO_VALUE else caption, CAPTION_PROMPT)


def _instruction(name: str, row: Any, base: Path, tuple_prompts: bool) -> Record | None:
    """A row of a JSON file; None if it is not as expected."""
    try:
        if "image" in row:
            question, answer = (turn["value"] for turn in row["conversations"][:2])
            texts, image = (question, answer, ""), str(base / row["image"])
        else:
            texts, image = (row["instruction"], row["output"], row["input"]), None
    except (KeyError, TypeError, ValueError):
        return None
    if not all(isinstance(text, str) for text in texts):
        return None
    prompt, answer, given = texts
    return Record(name, image, answer, str((prompt,)) if tuple_prompts and image is None else prompt, given)


def _check(path: Path, problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(f"The data of {path} cannot be used:\n  " + "\n  ".join(problems))
