"""Items of benchmarks, and the checks that the readers share.

A missing answer changes a score, so a benchmark, unlike a training set, must not have broken rows: one error lists all
of them. Readers check that images exist; images are opened when they are needed.
"""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mmjax.batch import Sample
from mmjax.data.conversation import IMAGE
from mmjax.data.formats.rows import image_path, missing, shown, without_image
from mmjax.data.text import MARKED, PLACEHOLDER

SHOWN = 20  # broken entries that an error names


@dataclasses.dataclass(frozen=True)
class Item:
    """A question and the right answer.

    id:         its name in stored predictions, unique in the benchmark
    sample:     the input of the model, a separate conversation; the images are paths
    references: the answers of people
    choices:    the answers to choose from
    right:      index of the right choice
    box:        (x1, y1, x2, y2), the right box in pixels
    size:       (width, height) of the image that `box` is in
    group:      a group that is also scored separately: the type of the answer, a split, POPE's setting; empty for none
    """

    id: str
    sample: Sample
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    right: int | None = None
    box: tuple[float, float, float, float] | None = None
    size: tuple[int, int] | None = None
    group: str = ""

    @property
    def image(self) -> str:
        """The key that items about the same image share; the id of an item without an image."""
        return str(self.sample.images[0]) if self.sample.images else self.id


def items(file: Path, root: str, rows: Iterable[Any] | Mapping[int, Any], make: Callable[[int, Any], Item]
          ) -> list[Item]:
    """Returns the items that `make(number, row)` makes from a file's rows, which count from 0, or from numbered rows.

    Raises ValueError if there are none, and naming the rows for which `make` raises ValueError or whose id is repeated.
    """
    result, problems = [], []
    for number, row in rows.items() if isinstance(rows, Mapping) else enumerate(rows):
        try:
            result.append(make(number, row))
        except ValueError as error:
            problems.append(f"{file.name}:{number}: {error}")
    problems += [f"{times} entries have the id {shown(name)}"
                 for name, times in Counter(item.id for item in result).items() if times > 1]
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(
            f"{len(problems)} entries of {file} cannot be used:\n  " + "\n  ".join(problems[:SHOWN]) + more
            + f"\nImages are expected below {root}; if they are elsewhere, name that folder as `root`. No item "
            "may be left out of a score: correct these entries, or remove them from the file.")
    if not result:
        raise ValueError(f"{file} has nothing to score.")
    return result


def json_lines(file: Path) -> dict[int, bytes]:
    """Returns `{number: line}` of the lines of a file that are not blank, counted from 1 and not yet parsed."""
    return {number: line for number, line in enumerate(file.read_bytes().split(b"\n"), 1) if line.strip()}


@functools.lru_cache(maxsize=4096, typed=True)  # a `Root` is not an equal string
def find_image(root: str, name: str) -> str:
    """Returns the path of an image below a root; raises ValueError if it does not exist, or is outside the root."""
    path = image_path(root, name)
    if not os.path.isfile(path):
        raise ValueError(missing(path))
    return path


def to_sample(template: str, question: str, image: str | None) -> Sample:
    """Returns a sample with a question in its template.

    The image comes first, as in MiniGPT-v2's evaluation (`<Img><ImageHere></Img> QUESTION`), or where the
    template or the question marks it. Without an image the template's mark is removed. Raises ValueError if the
    question marks an image that does not exist, or both mark it.
    """
    if image is None:
        return Sample(prompt=MARKED.sub("", template).replace("{}", without_image(question)))
    text = template.replace("{}", question)
    if text.count(PLACEHOLDER) > 1:
        raise ValueError(f"{shown(text)} has {text.count(PLACEHOLDER)} {PLACEHOLDER}, but there is one image")
    return Sample(images=[image], prompt=text if PLACEHOLDER in text else f"{IMAGE} {text}")


def check_template(template: str, about: str) -> str:
    """Returns a user's template. Raises ValueError if it lacks {} for the question, or marks more than one image."""
    if "{}" not in template:
        raise ValueError(f"the prompt {shown(template)} has no {{}}, where the {about} goes")
    return check_images(template)


def check_images(template: str) -> str:
    """Returns a user's template. Raises ValueError if it marks more than one image."""
    if template.count(PLACEHOLDER) > 1:
        raise ValueError(f"the prompt {shown(template)} has {template.count(PLACEHOLDER)} {PLACEHOLDER}, but there is "
                         "one image")
    return template
