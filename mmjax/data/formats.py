"""The released datasets' layouts on disk, each read into `Record`s."""

import dataclasses
import json
import re
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Record:
    """One picture and its caption, still on disk."""

    name: str
    image: str
    caption: str


def cc_sbu_align(folder: str) -> list[Record]:
    """`filter_cap.json` ({"annotations": [{"image_id", "caption"}, ...]}) beside `image/IMAGE_ID.jpg` (stage 2).

    Raises FileNotFoundError or ValueError naming the file and the entries that are not as expected.
    """
    path = Path(folder) / "filter_cap.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not in the CC-SBU-align layout: there is no {path.name} in it.")
    try:
        annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        records = [
            Record(str(a["image_id"]), str(Path(folder) / "image" / f"{a['image_id']}.jpg"), a["caption"])
            for a in annotations
        ]
    except (ValueError, KeyError, TypeError) as error:  # not JSON, or not UTF-8, is a ValueError
        expected = '{"annotations": [{"image_id": "2", "caption": "..."}, ...]}'
        raise ValueError(f"{path} must be JSON like {expected}: {error!r}") from error
    if wordless := [record.name for record in records if not isinstance(record.caption, str)]:
        raise ValueError(f"{path}: {len(wordless)} captions are not text, such as that of image_id "
                         f"{', '.join(wordless[:5])}.")
    absent = [record.image for record in records if not Path(record.image).is_file()]
    if absent or not records:
        raise ValueError(
            f"{path} names {len(records)} pictures, of which {len(absent)} are not there"
            + (f", such as {', '.join(absent[:5])}." if absent else "."))
    return records


def clean_caption(caption: str, most_words: int = 50) -> str:
    """Stage-1 cleaning: lower case, punctuation to spaces, at most 50 words (blip_processors.py: pre_caption)."""
    caption = re.sub(r"[.!\"()*#:;~]", " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    words = caption.split(" ")
    return " ".join(words[:most_words])
