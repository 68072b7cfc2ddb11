"""Referring expressions and boxes: RefCOCO, RefCOCO+ and RefCOCOg with MiniGPT-v2's instructions.

The original draws a sentence and an instruction anew in every pass. Here every sentence is a record, and record n has
instruction n modulo the number of instructions.
"""

import functools
import io
import pickle
import pickletools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmjax.data.boxes import box_text
from mmjax.data.formats.account import Account
from mmjax.data.formats.coco import by_id
from mmjax.data.formats.record import Record, clean_caption
from mmjax.data.formats.rows import (
    Root,
    RowRecords,
    about_image,
    caption_text,
    coco_name,
    field,
    image_path,
    image_root,
    read_json,
    shown,
    the_file,
)

SPLIT = "train2014"
REFER = (  # coco_dataset.py: ReferCOCODataset
    "[refer] {}",
    "[refer] give me the location of {}",
    "[refer] where is {} ?",
    "[refer] from this image, tell me the location of {}",
    "[refer] the location of {} is",
    "[refer] could you tell me the location for {} ?",
    "[refer] where can I locate the {} ?",
)
IDENTIFY = (  # coco_dataset.py: InvReferCOCODataset
    "[identify] {}",
    "[identify] what object is in this location {}",
    "[identify] identify the object present at this location {}",
    "[identify] what is it in {}",
    "[identify] describe this object in {}",
    "[identify] this {} is",
    "[identify] the object in {} is",
)


def refcoco(path: str, root: str | None = None, follow_links: bool = False) -> Sequence[Record]:
    """Reads `refs(SPLITTER).p` and `instances.json` of the same folder: sentences are prompts, boxes are answers.

    path: the file of references, or a folder with exactly one
    root: the folder with `train2014`; None for the parent of the files' folder
    follow_links: whether links may lead out of the root

    The references of the split `train` are read. A JSON list of {"img_id", "sents", "bbox", "height", "width"} (the
    files MiniGPT-v2 is evaluated with) is read too, completely. Raises FileNotFoundError or ValueError if the files
    cannot be used, also for a pickle with anything but plain values, which is never executed.
    """
    return _references(path, root, follow_links, inverse=False)


def invrefcoco(path: str, root: str | None = None, follow_links: bool = False) -> Sequence[Record]:
    """Reads the data of `refcoco` with boxes in the prompts and sentences as answers."""
    return _references(path, root, follow_links, inverse=True)


def instances(file: Path) -> tuple[dict[int, Any], dict[int, Any]]:
    """Returns (images, boxes) by id from the `instances.json` of a file of references.

    Raises FileNotFoundError or ValueError if it cannot be used.
    """
    boxes_file = file.with_name("instances.json")
    if not boxes_file.is_file():
        raise FileNotFoundError(f"{file} has references; their boxes are expected in {boxes_file}, which does not "
                                "exist.")
    instances = read_json(boxes_file, dict, expected='{"images": [...], "annotations": [...]}')
    parts = [instances.get(key) for key in ("images", "annotations")]
    if not all(isinstance(part, list) for part in parts):
        raise ValueError(f'{boxes_file} must hold {{"images": [...], "annotations": [...]}}.')
    images, boxes = map(by_id, parts)
    return images, boxes


def read_references(file: Path, train: bool, account: Account | None = None
                    ) -> tuple[list[tuple[Any, Any]], dict[int, Any], dict[int, Any]]:
    """Returns ((reference, sentence) of each sentence, images by id, boxes by id) of a `refs(SPLITTER).p`.

    train: whether to return the references of the split `train`, or all others. An invalid reference is returned once
           with the sentence None: `reference_ids` raises for it
    account: gets the sentences of other splits

    Raises the errors of `instances` and `plain_pickle`.
    """
    images, boxes = instances(file)
    rows: list[tuple[Any, Any]] = []
    for ref in plain_pickle(file):
        if not (isinstance(ref, dict) and isinstance(ref.get("sentences"), list) and ref["sentences"]):
            rows.append((ref, None))
        elif (ref.get("split") == "train") == train:
            rows += [(ref, sentence) for sentence in ref["sentences"]]
        elif account is not None:
            account.leave(f"sentences of the split {shown(ref.get('split'))}", count=len(ref["sentences"]))
    if account is not None:
        account.used = len(rows)
        account.found = len(rows) + sum(items.count for items in account.left.values())
    return rows, images, boxes


def reference_ids(ref: Any, images: dict[int, Any], boxes: dict[int, Any]) -> tuple[int, int]:
    """Returns the ids of a reference's image and box. Raises ValueError if it, or the file of boxes, lacks one."""
    field(ref, "sentences", list)
    key, box = field(ref, "image_id", int), field(ref, "ann_id", int)
    if key not in images or box not in boxes:
        raise ValueError(f"instances.json has no image {key}, or no box {box}")
    return key, box


def _references(path: str, root: str | None, follow_links: bool, inverse: bool) -> Sequence[Record]:
    file = the_file(path, "refs(*).p", "RefCOCO's refs(SPLITTER).p")
    if file.suffix == ".json":
        rows = read_json(file, list, expected='a list of {"img_id", "sents", "bbox", "height", "width"}')
        return RowRecords(file, image_root(file, root, follow_links), rows, functools.partial(_evaluation, inverse))
    root = Root.of(str(file.absolute().parent.parent) if root is None else root, follow_links)
    account = Account("sentences")
    rows, images, boxes = read_references(file, True, account)
    return RowRecords(file, root, rows, functools.partial(_reference, images, boxes, inverse), account,
                      [file.with_name("instances.json")])


def _reference(images: dict[int, Any], boxes: dict[int, Any], inverse: bool, root: str, name: str, number: int,
               row: tuple[Any, Any]) -> Record:
    ref, sentence = row
    key, box = reference_ids(ref, images, boxes)
    size, bbox = images[key], field(boxes[box], "bbox", list)
    box = box_text(bbox, field(size, "width", int, float), field(size, "height", int, float))
    return _record(name, number, image_path(root, coco_name(SPLIT, key)), caption_text(sentence, "raw"), box, inverse)


def _evaluation(inverse: bool, root: str, name: str, number: int, row: Any) -> Record:
    # eval_ref.py: the id of the image, then that of the box
    image = image_path(root, f"{SPLIT}/{field(row, 'img_id', str)[:len('COCO_train2014_000000000000')]}.jpg")
    box = box_text(field(row, "bbox", list), field(row, "width", int, float), field(row, "height", int, float))
    return _record(name, number, image, caption_text(row, "sents"), box, inverse)


def _record(name: str, number: int, image: str, sentence: str, box: str, inverse: bool) -> Record:
    """Returns a record with the sentence after the caption cleaning, as in the original."""
    sentence = clean_caption(sentence)
    if not sentence:
        raise ValueError("nothing but punctuation in the sentence")
    pool, question, answer = (IDENTIFY, box, sentence) if inverse else (REFER, sentence, box)
    return Record(name, image, answer, about_image(pool[number % len(pool)].replace("{}", question)))


DEEPEST = 16  # maximum nesting of lists and dictionaries; RefCOCO's is four
UNFOLDED = 4  # maximum values for each byte of a pickle; RefCOCO's have one for five bytes
_NOT_PLAIN = frozenset((  # opcodes that run programs, and those of sets
    "GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD", "PERSID", "BINPERSID", "EXT1",
    "EXT2", "EXT4", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "EMPTY_SET", "ADDITEMS", "FROZENSET"))
_KEYS = (str, bytes, int, float, bool, type(None))


class _Plain(pickle._Unpickler):
    """Python's unpickler in Python without the opcodes of `_NOT_PLAIN`, with plain keys of dictionaries only.

    The one in C hashes any key, and a deeply nested tuple overflows its stack.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="utf-8")

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def put_item(self) -> None:
        _check_keys(self.stack[-2:-1])
        self.load_setitem()

    def put_items(self) -> None:
        _check_keys(self.stack[::2])
        self.load_setitems()

    def make_dict(self) -> None:
        _check_keys(self.stack[::2])
        self.load_dict()

    dispatch |= {pickle.SETITEM[0]: put_item, pickle.SETITEMS[0]: put_items, pickle.DICT[0]: make_dict}


def _refuse(name: str) -> Callable[[Any], None]:
    def refuse(_: Any) -> None:
        raise pickle.UnpicklingError(f"it holds {name}")

    return refuse


_Plain.dispatch |= {ord(opcode.code): _refuse(opcode.name) for opcode in pickletools.opcodes
                    if opcode.name in _NOT_PLAIN}


def _check_keys(keys: Sequence[Any]) -> None:
    if wrong := [key for key in keys if not isinstance(key, _KEYS)]:
        raise pickle.UnpicklingError(f"a {type(wrong[0]).__name__} is a key of one of its dictionaries")


def _check_nesting(value: Any, size: int) -> None:
    """Raises ValueError for values that are nested too deeply to print or compare, that contain themselves, or whose
    shared parts expand to far more values than the `size` bytes of the file."""
    level, values = {id(value): (value, 1)}, 1
    for _ in range(DEEPEST):
        parts: dict[int, tuple[Any, int]] = {}  # a shared part is visited once, with the number of its references
        for each, count in level.values():
            items = each.values() if isinstance(each, dict) else each if isinstance(each, (list, tuple)) else ()
            values += count * len(items)
            for part in items:
                if isinstance(part, (list, tuple, dict)):
                    parts[id(part)] = part, count + parts.get(id(part), (part, 0))[1]
        if not parts:
            break
        level = parts
    else:
        raise ValueError(f"its lists and dictionaries are nested more than {DEEPEST} deep")
    if values > UNFOLDED * size:
        raise ValueError(f"its {size} bytes unfold to more than {UNFOLDED} values each")


def plain_pickle(file: Path) -> list[Any]:
    """Returns the list in a pickle of plain values. Raises ValueError for any other pickle; none is executed.

    Pickles can run programs and allocate any amount of memory; RefCOCO's are lists of dictionaries of text and numbers.
    """
    content = file.read_bytes()
    try:
        unpickler = _Plain(content)
        value = unpickler.load()
        if max(unpickler.memo, default=0) > len(content):
            raise ValueError("it numbers its parts beyond its length")
        _check_nesting(value, len(content))
    except Exception as error:  # the unpickler raises any kind of error
        reason = str(error) or type(error).__name__
        raise ValueError(f"{file} is not a pickle of plain values that can be read: {reason}") from error
    if not isinstance(value, list):
        raise ValueError(f"{file} must hold a list of references, not a {type(value).__name__}.")
    return value
