"""Images to describe: COCO's captions, Karpathy's split of them, NoCaps."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmjax.data.formats.coco import by_id
from mmjax.data.formats.rows import caption_text, field, image_root, read_json, the_file
from mmjax.evaluate.benchmarks.items import Item, check_images, find_image, items, to_sample
from mmjax.evaluate.metrics import java

PROMPT = "[caption] Briefly describe this image."  # coco_caption.py: instruction_pool
KARPATHY_SPLIT = "test"


def captions(path: str, root: str | None = None, prompt: str | None = None) -> list[Item]:
    """Reads every image with all its captions.

    path: `annotations/captions_SPLIT.json`, with the images in the folder SPLIT next to `annotations` (COCO); another
          file of that layout in the folder of its images (NoCaps, whose domains become groups); Karpathy's
          `dataset_coco.json`, of which only the 5000 images of the split `test` are read; or a list of
          {"image", "caption": [...]} (coco_karpathy_test.json)
    root: the folder of the images; None for the file's, or for its parent if that is `annotations`

    Raises FileNotFoundError, or ValueError naming what cannot be used.
    """
    file = the_file(path, "captions_*.json", "COCO's captions_SPLIT.json")
    expected = '{"images": [...], "annotations": [...]}, {"images": [...]}, or a list of {"image", "caption"}'
    content = read_json(file, dict, list, expected=expected)
    root, prompt = image_root(file, root), check_images(PROMPT if prompt is None else prompt)
    if isinstance(content, list):
        return items(file, root, content, functools.partial(_listed, root, prompt))
    images, annotations = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list | None):
        raise ValueError(f"{file} must hold {expected}.")
    if annotations is None:
        chosen = [row for row in images if not isinstance(row, dict) or row.get("split") == KARPATHY_SPLIT]
        return items(file, root, chosen, functools.partial(_karpathy, root, prompt))
    folder = file.stem.removeprefix("captions_") if file.stem.startswith("captions_") else ""
    rows = _by_image(by_id(images), annotations)
    return items(file, root, rows, functools.partial(_released, root, prompt, folder))


def captions_with(name: str, path: str, root: str | None = None, prompt: str | None = None) -> list[Item]:
    """Reads `captions` that are scored with METEOR or SPICE too. Raises ValueError if Java or the extra is missing."""
    java.scorer(name)
    return captions(path, root, prompt)


def _by_image(images: dict[int, Any], annotations: Sequence[Any]) -> list[tuple[Any, list[Any]]]:
    """Returns (image, its annotations); annotations of unknown images are separate rows, which become errors."""
    grouped: dict[Any, list[Any]] = {key: [] for key in images}
    lost = []
    for row in annotations:
        key = row.get("image_id") if isinstance(row, dict) else None
        if isinstance(key, int) and key in grouped:
            grouped[key].append(row)
        else:
            lost.append((None, [row]))
    return [(images[key], rows) for key, rows in grouped.items()] + lost


def _released(root: str, prompt: str, folder: str, number: int, row: tuple[Any, list[Any]]) -> Item:
    image, annotations = row
    if image is None:
        raise ValueError(f"there is no image with the id {field(annotations[0], 'image_id', int)}")
    if not annotations:
        raise ValueError(f"the image {field(image, 'id', int)} has no caption")
    path = find_image(root, str(Path(folder, field(image, "file_name", str))))
    captions = tuple(caption_text(each, "caption") for each in annotations)
    return Item(str(image["id"]), to_sample(prompt, "", path), captions,
                group=field(image, "domain", str) if "domain" in image else "")


def _karpathy(root: str, prompt: str, number: int, row: Any) -> Item:
    path = find_image(root, str(Path(field(row, "filepath", str), field(row, "filename", str))))
    captions = tuple(caption_text(each, "raw") for each in field(row, "sentences", list))
    return _item(str(field(row, "cocoid", int)), prompt, path, captions)


def _listed(root: str, prompt: str, number: int, row: Any) -> Item:
    name, given = field(row, "image", str), field(row, "caption", str, list)
    given = [given] if isinstance(given, str) else given
    captions = tuple(caption_text({"caption": each}, "caption") for each in given)
    return _item(name, prompt, find_image(root, name), captions)


def _item(name: str, prompt: str, path: str, captions: tuple[str, ...]) -> Item:
    if not captions:
        raise ValueError(f"the image {name} has no caption")
    return Item(name, to_sample(prompt, "", path), captions)
