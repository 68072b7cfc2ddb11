"""Scenes: small procedural images with captions and questions, for the embedded default.

An image shows one to three shapes on a 3x3 grid; each has a size, a colour, a shape and a place. Everything is drawn
from a seed, so nothing is downloaded and every run draws the same images. `depth` draws the depth map of a scene.
Scenes are written in the layouts of MiniGPT-4's second stage (`write`: CC-SBU-align) and of ImageBind-LLM's two phases
(`write_pretrain`, `write_finetune`).

Splits:
  train      training data
  held_out   captions that are not in `train` (chosen by a hash of the caption), with colour-shape pairs of `train`
  new_pairs  at least one colour-shape pair that is not in `train`
"""

import csv
import dataclasses
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Towers that scripts/pretrain_{scenes,senses}.py trained on scenes, in the released PyTorch formats.
ASSETS = Path(__file__).parents[1] / "assets" / "scenes"

SIDE = 48  # pixels of an image
CELL = SIDE // 3

SIZES = {"small": 4.6, "large": 7.4}  # radius in pixels
COLORS = {
    "red": (0.85, 0.10, 0.12), "orange": (0.98, 0.55, 0.05), "yellow": (0.97, 0.91, 0.15), "green": (0.10, 0.62, 0.20),
    "blue": (0.12, 0.25, 0.88), "purple": (0.55, 0.12, 0.70), "white": (0.97, 0.97, 0.97), "black": (0.04, 0.04, 0.04),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLACES = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
ATTRIBUTES = {"size": tuple(SIZES), "color": tuple(COLORS), "shape": SHAPES, "place": PLACES}
COUNTS = ("zero", "one", "two", "three")

NEW_PAIRS = (("red", "star"), ("yellow", "circle"), ("green", "triangle"), ("blue", "cross"), ("white", "square"))
SPLITS = ("train", "held_out", "new_pairs")

# The four instructions of MiniGPT-4's second stage.
PROMPTS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)


@dataclasses.dataclass(frozen=True)
class Thing:
    """One shape; `parse` leaves None where a phrase does not name an attribute."""

    size: str | None
    color: str | None
    shape: str | None
    place: str | None


@dataclasses.dataclass(frozen=True)
class Scene:
    """The shapes of an image, in raster order of the grid, and the random key of everything that the caption does not
    name (background, shades, small shifts and rotations, noise)."""

    things: tuple[Thing, ...]
    key: tuple[int, ...]


class Question(NamedTuple):
    """A question. `kind` is the attribute in question, or "count"."""

    text: str
    answer: str
    kind: str


def scenes(split: str, count: int, seed: int = 0, new_pairs: Sequence[tuple[str, str]] = NEW_PAIRS,
           most: int = 3) -> list[Scene]:
    """Returns the first `count` scenes of a split; scene i does not depend on `count`.

    new_pairs: (colour, shape) pairs that are reserved for the split of that name
    most:      maximum number of shapes in a scene, 1 to 3

    Raises ValueError for an unknown split or pair, or another `most`.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r} of scenes; choose one of {', '.join(SPLITS)}.")
    unknown = [pair for pair in new_pairs if pair[0] not in COLORS or pair[1] not in SHAPES]
    if unknown:
        raise ValueError(f"No such (colour, shape) pairs: {unknown}. Colours: {', '.join(COLORS)}. "
                         f"Shapes: {', '.join(SHAPES)}.")
    if not 1 <= most < len(COUNTS):
        raise ValueError(f"A scene has 1 to {len(COUNTS) - 1} things, got most={most!r}.")
    return [_scene(split, seed, index, set(new_pairs), most) for index in range(count)]


def _scene(split: str, seed: int, index: int, new_pairs: set[tuple[str, str]], most: int) -> Scene:
    key = (seed, SPLITS.index(split), index)
    rng = np.random.default_rng(key)
    while True:
        places = sorted(rng.choice(len(PLACES), rng.integers(1, most + 1), replace=False))
        things = [Thing(*(str(rng.choice(ATTRIBUTES[name])) for name in ("size", "color", "shape")), PLACES[place])
                  for place in places]
        if split == "new_pairs" and new_pairs:
            changed = rng.integers(len(things))
            color, shape = rng.permutation(sorted(new_pairs))[0]
            things[changed] = dataclasses.replace(things[changed], color=str(color), shape=str(shape))
        scene = Scene(tuple(things), key)
        has_new = any((thing.color, thing.shape) in new_pairs for thing in things)
        kept_back = zlib.crc32(caption(scene).encode()) % 8 == 0
        if split == ("new_pairs" if has_new else "held_out" if kept_back else "train"):
            return scene


def caption(scene: Scene) -> str:
    """ "A large red circle at the top-left and a small blue star in the center." """
    phrases = [f"a {thing.size} {thing.color} {thing.shape} {where(thing.place)}" for thing in scene.things]
    text = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return text[0].upper() + text[1:] + "."


def where(place: str) -> str:
    return f"in the {place}" if place == "center" else f"at the {place}"


def questions(scene: Scene) -> list[Question]:
    """Returns all questions with exactly one answer. A single shape is not counted."""
    result = []
    shapes = [thing.shape for thing in scene.things]
    for thing in scene.things:
        spot = where(thing.place)
        result.append(Question(f"What shape is {spot}?", thing.shape, "shape"))
        result.append(Question(f"What color is the shape {spot}?", thing.color, "color"))
        if shapes.count(thing.shape) == 1:
            result.append(Question(f"What color is the {thing.shape}?", thing.color, "color"))
            result.append(Question(f"What size is the {thing.shape}?", thing.size, "size"))
            result.append(Question(f"Where is the {thing.shape}?", spot, "place"))
    if len(shapes) > 1:
        result.append(Question("How many shapes are there?", COUNTS[len(shapes)], "count"))
    return result


def instructions(scene: Scene) -> list[tuple[str, str]]:
    """Returns (prompt, answer) pairs: the caption with every prompt, and every question."""
    return [*((prompt, caption(scene)) for prompt in PROMPTS), *(question[:2] for question in questions(scene))]


def parse(text: str) -> list[Thing]:
    """Returns the shapes that a caption names, in order; phrases without an attribute are left out."""
    things = []
    for phrase in re.split(r",|\band\b", text.lower()):
        words = re.findall(r"[a-z]+(?:-[a-z]+)?", phrase)
        found = {name: next((word for word in words if word in values), None) for name, values in ATTRIBUTES.items()}
        if any(found.values()):
            things.append(Thing(**found))
    return things


def score(text: str, scene: Scene) -> dict[str, tuple[int, int]]:
    """Returns (correct, total) for each attribute and for "whole", the complete caption.

    The n-th shape of the text is compared with the n-th shape of the scene; missing and extra shapes count as wrong.
    """
    parsed = parse(text)
    pairs = list(zip_longest(parsed, scene.things))
    points = {name: (sum(getattr(a, name, None) == getattr(b, name, "") for a, b in pairs), len(pairs))
              for name in ATTRIBUTES}
    return {**points, "whole": (int(tuple(parsed) == scene.things), 1)}


def total(scores: Iterable[dict[str, tuple[int, int]]]) -> dict[str, float]:
    """Returns the correct share over `score`s by attribute, for "whole", and as "mean" of the four attributes."""
    scores = list(scores)
    shares = {name: sum(s[name][0] for s in scores) / sum(s[name][1] for s in scores) for name in scores[0]}
    return {**shares, "mean": float(np.mean([shares[name] for name in ATTRIBUTES]))}


def write(folder: str | Path, scenes: Sequence[Scene]) -> None:
    """Draws scenes into `folder/image/ID.jpg` and writes `folder/filter_cap.json`; the id is the index in the list."""
    _write_images(folder, scenes)
    annotations = [{"image_id": str(number), "caption": caption(scene)} for number, scene in enumerate(scenes)]
    (Path(folder) / "filter_cap.json").write_text(json.dumps({"annotations": annotations}, indent=1))


def write_pretrain(folder: str | Path, scenes: Sequence[Scene]) -> None:
    """Writes the layout of ImageBind-LLM's pretraining: `folder/pretrain.yaml` names `pretrain.csv`, with tab-separated
    paths and captions. Paths are absolute, since the original resolves others from the working directory."""
    images = _write_images(folder, scenes)
    with open(Path(folder) / "pretrain.csv", "w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, delimiter="\t", lineterminator="\n")
        lines.writerow(["url", "caption"])
        lines.writerows([image, caption(scene)] for image, scene in zip(images, scenes, strict=True))
    _write_meta(folder, "pretrain", "pretrain.csv")


def write_finetune(folder: str | Path, scenes: Sequence[Scene]) -> None:
    """Writes the layout of ImageBind-LLM's fine-tuning: `folder/finetune.yaml` names `finetune.json`, in LLaVA's format
    with a row for each of `instructions`. Paths are absolute."""
    triples = [(image, *pair) for image, scene in zip(_write_images(folder, scenes), scenes, strict=True)
               for pair in instructions(scene)]
    rows = [{"id": str(number), "image": image,
             "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]}
            for number, (image, prompt, answer) in enumerate(triples)]
    (Path(folder) / "finetune.json").write_text(json.dumps(rows, indent=1))
    _write_meta(folder, "finetune", "finetune.json")


# By `DataConfig.format`: the file that is written last, and the function that writes the layout.
LAYOUTS = {"cc_sbu_align": ("filter_cap.json", write), "imagebind_llm_pretrain": ("pretrain.yaml", write_pretrain),
           "imagebind_llm_finetune": ("finetune.yaml", write_finetune)}


def _write_images(folder: str | Path, scenes: Sequence[Scene]) -> list[str]:
    """Draws the images and returns their absolute paths."""
    from PIL import Image

    images = (Path(folder) / "image").resolve()
    images.mkdir(parents=True, exist_ok=True)
    paths = [str(images / f"{number}.jpg") for number in range(len(scenes))]
    for path, scene in zip(paths, scenes, strict=True):
        # Full colour resolution: chroma subsampling would blur the colour of a 9-pixel shape.
        Image.fromarray(draw(scene)).save(path, quality=95, subsampling=0)
    return paths


def _write_meta(folder: str | Path, phase: str, file: str) -> None:
    # A JSON string is a YAML string too.
    path = json.dumps(str((Path(folder) / file).resolve()), ensure_ascii=False)
    (Path(folder) / f"{phase}.yaml").write_text(f"META:\n  - {path}\n", encoding="utf-8")


# Drawing. Pixels are points of a plane; a shape is its signed distance in pixels, negative inside. For anti-aliasing it
# covers a share of 1/2 - distance of a pixel, clipped to 0..1.

_Y, _X = np.mgrid[:SIDE, :SIDE].astype(np.float32) + 0.5


def draw(scene: Scene) -> np.ndarray:
    """Returns the image of a scene, uint8[48,48,3]."""
    rng = np.random.default_rng((*scene.key, 1))
    image = _background(rng)
    for thing, (cover, shade) in zip(scene.things, _layers(scene, rng), strict=True):
        image += cover[..., None] * (np.array(COLORS[thing.color], np.float32) * shade[..., None] - image)
    image += 0.03 * rng.standard_normal(image.shape, np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def depth(scene: Scene) -> np.ndarray:
    """Returns the depth map of the image of `draw`, float32[1,48,48] of about 0 to 1; larger is nearer.

    It shows a slanted, slightly uneven wall, and every shape as a flat plate in front of it at a random distance.
    Colours and the pattern of the background are not visible.
    """
    rng = np.random.default_rng((*scene.key, 1))
    _background(rng)  # consumes the random numbers that are drawn before those of the shapes
    layers = list(_layers(scene, rng))
    rng = np.random.default_rng((*scene.key, 2))
    slope = rng.uniform(-0.1, 0.1, 2)
    wall = rng.uniform(0.2, 0.3) + (slope[0] * (_X - SIDE / 2) + slope[1] * (_Y - SIDE / 2)) / SIDE
    for cover, _ in layers:
        wall = wall + cover * rng.uniform(0.25, 0.5)
    wall = wall + 0.02 * rng.standard_normal(wall.shape)
    return wall.astype(np.float32)[None]


MEDIA = {"depth": depth}  # functions that draw a scene for other senses, by name


def as_image(channel: np.ndarray) -> np.ndarray:
    """Returns float32[1,48,48] of about 0 to 1 as a grey image, uint8[48,48,3]."""
    return np.repeat((np.clip(channel[0], 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)


def _layers(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the share of each pixel that a shape covers, and the factor of its colour there: float32[48,48] both."""
    for thing in scene.things:
        row, column = divmod(PLACES.index(thing.place), 3)
        x, y = (_X - CELL * (column + 0.5) - rng.uniform(-1, 1), _Y - CELL * (row + 0.5) - rng.uniform(-1, 1))
        turn = rng.uniform(-0.3, 0.3)
        x, y = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        radius = SIZES[thing.size] * rng.uniform(0.94, 1.06)
        cover = np.clip(0.5 - _DISTANCE[thing.shape](x, y, radius), 0, 1)
        yield cover, 1 + rng.uniform(-0.06, 0.06) - 0.05 * y / radius  # lit from above


def _background(rng: np.random.Generator) -> np.ndarray:
    """Returns a greyish gradient, wave or checkerboard; float32[48,48,3]."""
    ends = rng.uniform(0.3, 0.7, 2)[:, None] + rng.uniform(-0.05, 0.05, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    along = (np.cos(angle) * (_X - SIDE / 2) + np.sin(angle) * (_Y - SIDE / 2)) / SIDE  # about -0.7..0.7
    kind = rng.integers(3)
    if kind == 0:
        mix = 0.5 + along / 1.5
    elif kind == 1:
        mix = 0.5 + 0.5 * np.sin(2 * np.pi * (rng.uniform(1, 4) * along + rng.uniform()))
    else:
        width, shift = rng.integers(4, 13), rng.integers(12)
        mix = ((_X + shift) // width + (_Y + shift) // width) % 2
        ends[1] = ends[0] + 0.4 * (ends[1] - ends[0])  # hard edges distract more than slopes
    return (ends[0] + mix[..., None] * (ends[1] - ends[0])).astype(np.float32)


def _circle(x, y, r):
    return np.hypot(x, y) - r


def _square(x, y, r):
    return np.maximum(abs(x), abs(y)) - 0.86 * r


def _triangle(x, y, r):
    return np.maximum(y - 0.75 * r, 0.866 * abs(x) - 0.5 * (y + 1.15 * r))


def _star(x, y, r):
    """A star of five points: the plane is folded onto half a point, which has one straight edge."""
    fifth = 2 * np.pi / 5
    angle = abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)  # 0 at a tip, 36 degrees at a notch
    u, v = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    tip, notch = 1.15 * r, 0.5 * r * np.array([np.cos(fifth / 2), np.sin(fifth / 2)])
    edge = notch - (tip, 0)
    return ((u - tip) * edge[1] - v * edge[0]) / np.hypot(*edge)


def _cross(x, y, r):
    long, short = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    return np.maximum(long - r, short - 0.36 * r)


_DISTANCE = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "cross": _cross}
