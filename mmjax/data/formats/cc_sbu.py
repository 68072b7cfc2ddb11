"""CC-SBU-align, the pictures and captions of MiniGPT-4's second stage."""

import json
from pathlib import Path

from mmjax.data.formats.record import Record
from mmjax.data.formats.rows import with_pictures


def cc_sbu_align(folder: str) -> list[Record]:
    """`filter_cap.json` ({"annotations": [{"image_id", "caption"}, ...]}) beside `image/IMAGE_ID.jpg` (stage 2).

    An empty caption is that record's problem. Raises FileNotFoundError or ValueError naming the file and the entries
    that are not as expected.
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
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # not JSON, or not UTF-8, is a ValueError
        expected = '{"annotations": [{"image_id": "2", "caption": "..."}, ...]}'
        raise ValueError(f"{path} must be JSON like {expected}: {error!r}") from error
    if wordless := [record.name for record in records if not isinstance(record.answer, str)]:
        raise ValueError(f"{path}: {len(wordless)} captions are not text, such as that of image_id "
                         f"{', '.join(wordless[:5])}.")
    return [record if record.answer.strip() else Record(record.name, None, "", problem="the caption is empty")
            for record in with_pictures(path, records, folder)]
