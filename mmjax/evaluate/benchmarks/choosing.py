"""Multiple-choice questions: ScienceQA, IconQA, and POPE's yes or no."""

import functools
from pathlib import Path
from typing import Any

from mmjax import files
from mmjax.data.formats.rows import caption_text, field, image_root, read_json, shown, text, the_file
from mmjax.evaluate.benchmarks.items import Item, check_template, find_image, items, json_lines, to_sample
from mmjax.evaluate.benchmarks.questions import SHORT

SCIENCE = "[vqa] Question: {} Answer:"  # eval_sciencevqa.py: instruction_pool
SCIENCE_SPLIT = "test"
WITH_IMAGE, WITHOUT = "with an image", "without"
YES_NO = ("yes", "no")
SETTINGS = ("random", "popular", "adversarial")


def scienceqa(path: str, root: str | None = None, prompt: str | None = None) -> list[Item]:
    """Reads ScienceQA's `problems.json`, the problems of the split `test`, images in `SPLIT/ID/image.png`.

    path: the file, or its folder. The split and its order come from `pid_splits.json` in the same folder, or from
          the `split` of the problems
    root: the folder of the splits' folders; None for `images` in the file's folder, or that folder if there is none

    The context of a problem (`hint`) follows its question. Groups are the problems with an image and those without.
    Raises FileNotFoundError, or ValueError naming what cannot be used.
    """
    file = the_file(path, "problems.json", "ScienceQA's problems.json")
    problems = read_json(file, dict, expected='{ID: {"question", "choices", "answer", "hint", "image", "split"}}')
    if root is None:
        folder = file.absolute().parent
        root = str(folder / "images" if (folder / "images").is_dir() else folder)
    prompt = check_template(SCIENCE if prompt is None else prompt, "question")
    rows = [(name, problems.get(name)) for name in _split(file, problems)]
    return items(file, root, rows, functools.partial(_problem, root, prompt))


def iconqa(path: str, root: str | None = None, prompt: str | None = None) -> list[Item]:
    """Reads IconQA as in MiniGPT-v2's evaluation: a list of {"image_id", "question", "choices", "answer"}.

    path: the file, or the folder that has exactly one *.json
    root: the folder with `IMAGE_ID/image.png`; None for the file's folder, or its parent if that is `annotations`

    `answer` is the index of the right choice, or its text. Raises FileNotFoundError, or ValueError naming what cannot
    be used.
    """
    file = the_file(path, "*.json", "IconQA's list of questions")
    rows = read_json(file, list, expected='a list of {"image_id", "question", "choices", "answer"}')
    root, prompt = image_root(file, root), check_template(SHORT if prompt is None else prompt, "question")
    return items(file, root, rows, functools.partial(_icons, root, prompt))


def pope(path: str, root: str | None = None, prompt: str | None = None) -> list[Item]:
    """Reads POPE's lines {"question_id", "image", "text", "label": "yes" or "no"}, images in `val2014` or `root`.

    path: a file, or the folder of `..._random.json`, `..._popular.json` and `..._adversarial.json`, of which all that
          exist are read; groups are those settings, by the files' names
    root: the folder of the images, or with the folder `val2014`; None for the file's

    Raises FileNotFoundError, or ValueError naming what cannot be used.
    """
    source, prompt = Path(path), check_template(SHORT if prompt is None else prompt, "question")
    files = [source]
    if source.is_dir():
        files = [file for setting in SETTINGS for file in sorted(source.glob(f"*_{setting}.json*"))]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"There is no {source}, or no file ..._random.json, ..._popular.json or "
                                "..._adversarial.json in it: POPE's lines of questions.")
    result: list[Item] = []
    for file in files:
        folder = image_root(file, root)
        inside = "val2014/" if (Path(folder) / "val2014").is_dir() else ""
        setting = next((name for name in SETTINGS if file.stem.endswith(name)), "")
        result += items(file, folder, json_lines(file), functools.partial(_pope, folder, inside, setting, prompt))
    return result


def right_choice(row: Any, choices: tuple[str, ...]) -> int:
    """Returns the index that `answer` is, or whose text it is; raises ValueError if it is none of the choices."""
    answer = field(row, "answer", int, str)
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, int) and 0 <= answer < len(choices):
        return answer
    raise ValueError(f"'answer' is {shown(answer)}, which is none of the {len(choices)} choices")


def read_choices(row: Any) -> tuple[str, ...]:
    """Returns two or more choices; raises ValueError for fewer, and for values that are not text."""
    choices = tuple(caption_text({"choices": each}, "choices") for each in field(row, "choices", list))
    if len(choices) < 2:
        raise ValueError(f"'choices' must be two or more, got {shown(choices)}")
    return choices


def _split(file: Path, problems: dict[str, Any]) -> list[str]:
    beside = file.with_name("pid_splits.json")
    if not beside.is_file():
        return [name for name, row in problems.items()
                if not isinstance(row, dict) or row.get("split") == SCIENCE_SPLIT]
    names = read_json(beside, dict, expected=f'{{"{SCIENCE_SPLIT}": [ID, ...]}}').get(SCIENCE_SPLIT)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{beside} must hold {{"{SCIENCE_SPLIT}": [ID, ...]}}.')
    return names


def _problem(root: str, prompt: str, number: int, entry: tuple[str, Any]) -> Item:
    name, row = entry
    choices, hint = read_choices(row), text(row, "hint").strip() if "hint" in row else ""
    question = f"{caption_text(row, 'question')} Context: {hint}" if hint else caption_text(row, "question")
    image = None
    if row.get("image") is not None:
        image = find_image(root, f"{SCIENCE_SPLIT}/{name}/{field(row, 'image', str)}")
    return Item(name, to_sample(prompt, question, image), choices=choices, right=right_choice(row, choices),
                group=WITHOUT if image is None else WITH_IMAGE)


def _icons(root: str, prompt: str, number: int, row: Any) -> Item:
    image = find_image(root, f"{field(row, 'image_id', str, int)}/image.png")
    choices = read_choices(row)
    return Item(str(number), to_sample(prompt, caption_text(row, "question"), image), choices=choices,
                right=right_choice(row, choices))


def _pope(root: str, folder: str, setting: str, prompt: str, number: int, line: bytes) -> Item:
    row = files.parse_json(line)
    image, label = find_image(root, folder + field(row, "image", str)), field(row, "label", str)
    if label not in YES_NO:
        raise ValueError(f"'label' must be yes or no, got {shown(label)}")
    name = f"{setting or 'pope'}:{field(row, 'question_id', int, str)}"
    return Item(name, to_sample(prompt, caption_text(row, "text"), image), choices=YES_NO, right=YES_NO.index(label),
                group=setting)
