"""What a benchmark asks, one item at a time, and the checks that its readers share.

An answer that is missing from a score changes it, so unlike a training set a benchmark has no broken rows: all of them
are named in one error. Of the images only that they are there is looked at; they are opened when they are needed.
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
from mmjax.data.formats.rows import image_path, shown, without_image
from mmjax.data.text import MARKED, PLACEHOLDER

SHOWN = 20  # broken entries that an error names


@dataclasses.dataclass(frozen=True)
class Item:
    """One question and what is right.

    id:         its name in stored predictions, unlike any other of the benchmark
    sample:     what the model is asked, in a conversation of its own; the images are paths
    references: the answers of people
    choices:    the answers to choose from
    right:      which of the choices is right
    box:        (x1, y1, x2, y2), the right place in pixels
    size:       (width, height) of the image that `box` is in
    group:      what is scored for itself too: the type of the answer, a split, POPE's setting; empty for none
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
        """What items share that are about the same image; the item's own id where it has none."""
        return str(self.sample.images[0]) if self.sample.images else self.id


def items(file: Path, root: str, rows: Iterable[Any] | Mapping[int, Any], make: Callable[[int, Any], Item]
          ) -> list[Item]:
    """The items that `make(number, row)` makes of a file's rows, which count from 0, or of numbered rows.

    Raises ValueError if there are none, naming the rows for which `make` raises ValueError, and those whose id an
    earlier one has.
    """
    made, problems = [], []
    for number, row in rows.items() if isinstance(rows, Mapping) else enumerate(rows):
        try:
            made.append(make(number, row))
        except ValueError as error:
            problems.append(f"{file.name}:{number}: {error}")
    problems += [f"{times} entries have the id {shown(name)}"
                 for name, times in Counter(item.id for item in made).items() if times > 1]
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(
            f"{len(problems)} entries of {file} cannot be used:\n  " + "\n  ".join(problems[:SHOWN]) + more
            + f"\nImages are expected below {root}; if they lie elsewhere, name that folder as `root`. A score "
            "leaves nothing out: mend these entries, or take them from the file.")
    if not made:
        raise ValueError(f"{file} has nothing to score.")
    return made


def json_lines(file: Path) -> dict[int, bytes]:
    """The lines of a file that are not blank by their numbers, the first being 1; not yet read as JSON."""
    return {number: line for number, line in enumerate(file.read_bytes().split(b"\n"), 1) if line.strip()}


@functools.lru_cache(maxsize=4096)
def there(root: str, name: str) -> str:
    """The path of a image below a root; raises ValueError if it is not there, or leads out of the root."""
    path = image_path(root, name)
    if not os.path.isfile(path):
        raise ValueError(f"there is no image {shown(path)}")
    return path


def asked(template: str, question: str, image: str | None) -> Sample:
    """A question in its template, in a fresh conversation.

    The image stands in front, as in MiniGPT-v2's evaluation (`<Img><ImageHere></Img> QUESTION`), or where the
    template or the question shows it. Without a image the template's mark is left out. Raises ValueError if the
    question shows a image that is not there, or both show it.
    """
    if image is None:
        return Sample(prompt=MARKED.sub("", template).replace("{}", without_image(question)))
    words = template.replace("{}", question)
    if words.count(PLACEHOLDER) > 1:
        raise ValueError(f"{shown(words)} has {words.count(PLACEHOLDER)} {PLACEHOLDER}, but there is one image")
    return Sample(images=[image], prompt=words if PLACEHOLDER in words else f"{IMAGE} {words}")


def check_template(template: str, about: str) -> str:
    """A template of the user. Raises ValueError if it has no place for what is asked, or for several images."""
    if "{}" not in template:
        raise ValueError(f"the prompt {shown(template)} has no {{}}, where the {about} goes")
    return check_images(template)


def check_images(template: str) -> str:
    """A template of the user. Raises ValueError if it shows more than one image."""
    if template.count(PLACEHOLDER) > 1:
        raise ValueError(f"the prompt {shown(template)} has {template.count(PLACEHOLDER)} {PLACEHOLDER}, but there is "
                         "one image")
    return template
