"""Small data sets of three records in every layout, as they lie on disk.

Each writer fills an empty folder and returns what its reader is given. `change` may edit the rows before they are
written.
"""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

COUNT = 3
WIDTH, HEIGHT = 8, 6
CAPTIONS = ("A dog.", "Two cats, asleep!", "Gras & sky, über all")


def jpeg(number: int = 0) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def put_json(path: Path, content) -> Path:
    return put(path, json.dumps(content))


def nothing(rows):
    """Leaves them as they are."""


def cc_sbu_align(root, change=nothing):
    rows = [{"image_id": str(number), "caption": CAPTIONS[number]} for number in range(COUNT)]
    for number in range(COUNT):
        put(root / "image" / f"{number}.jpg", jpeg(number))
    change(rows)
    put_json(root / "filter_cap.json", {"annotations": rows})
    return root


def imagebind_llm_pretrain(root, change=nothing):
    rows = [{"url": f"{number}.jpg", "caption": CAPTIONS[number]} for number in range(COUNT)]
    for number in range(COUNT):
        put(root / f"{number}.jpg", jpeg(number))
    change(rows)
    put(root / "some.csv", "url\tcaption\n" + "".join(f"{row['url']}\t{row['caption']}\n" for row in rows))
    put(root / "pretrain.yaml", "META:\n  - some.csv\n")
    return root


def imagebind_llm_finetune(root, change=nothing):
    rows = [{"image": f"{number}.jpg", "conversations": [{"value": "What?"}, {"value": CAPTIONS[number]}]}
            for number in range(COUNT)]
    for number in range(COUNT):
        put(root / f"{number}.jpg", jpeg(number))
    change(rows)
    put_json(root / "some.json", rows)
    put(root / "finetune.yaml", "META:\n  - some.json\n")
    return root


def members():
    return [(f"{number:09d}.{kind}", content) for number in range(COUNT) for kind, content in (
        ("jpg", jpeg(number)), ("json", json.dumps({"caption": CAPTIONS[number]}).encode()),
        ("txt", CAPTIONS[number].encode()))]


def tar(path, content, form=tarfile.PAX_FORMAT):
    """content: (name, bytes) or ready `TarInfo`s"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for item in content:
            if isinstance(item, tarfile.TarInfo):
                archive.addfile(item)
            else:
                info = tarfile.TarInfo(item[0])
                info.size = len(item[1])
                archive.addfile(info, io.BytesIO(item[1]))
    return path


def webdataset(root, change=nothing):
    rows = members()
    change(rows)
    return tar(root / "00000.tar", rows)


def llava_instruct(root, change=nothing):
    rows = [{"id": str(number), "image": f"{number}.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": CAPTIONS[number]},
        {"from": "human", "value": "And?"}, {"from": "gpt", "value": "No more."}]} for number in range(COUNT)]
    for number in range(COUNT):
        put(root / f"{number}.jpg", jpeg(number))
    change(rows)
    return put_json(root / "llava_instruct_150k.json", rows)


def jsonl(root, change=nothing):
    rows = [{"image": f"{number}.jpg", "prompt": "What is it?", "answer": CAPTIONS[number]} for number in range(COUNT)]
    for number in range(COUNT):
        put(root / f"{number}.jpg", jpeg(number))
    change(rows)
    return put(root / "some.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def coco_captions(root, change=nothing):
    images = [{"id": 10 + number, "file_name": f"{number:012d}.jpg"} for number in range(COUNT)]
    rows = [{"id": number, "image_id": 10 + number, "caption": CAPTIONS[number]} for number in range(COUNT)]
    for image in images:
        put(root / "train2017" / image["file_name"], jpeg())
    change(rows)
    return put_json(root / "annotations" / "captions_train2017.json",
                    {"info": {}, "images": images, "annotations": rows})


def coco_2014(root):
    for number in range(COUNT):
        put(root / "train2014" / f"COCO_train2014_{number:012d}.jpg", jpeg(number))


def vqa(root, change=nothing):
    rows = [{"image_id": number, "question": f"What is {number}?", "question_id": 100 + number}
            for number in range(COUNT)]
    answers = [{"question_id": 100 + number, "image_id": number, "multiple_choice_answer": "yes", "answers": [
        {"answer": answer, "answer_confidence": "yes", "answer_id": place}
        for place, answer in enumerate(("no", "yes", "Yes."))]} for number in range(COUNT)]
    coco_2014(root)
    change(rows)
    put_json(root / "v2_mscoco_train2014_annotations.json", {"annotations": answers})
    return put_json(root / "v2_OpenEnded_mscoco_train2014_questions.json",
                    {"data_type": "mscoco", "data_subtype": "train2014", "questions": rows})


def gqa(root, change=nothing):
    rows = [{"imageId": f"n{number}", "question": f"Is it {number}?", "answer": "yes", "fullAnswer": "Yes, it is."}
            for number in range(COUNT)]
    for number in range(COUNT):
        put(root / "images" / f"n{number}.jpg", jpeg(number))
    change(rows)
    return put_json(root / "train_balanced_questions.json", {str(number): row for number, row in enumerate(rows)})


def refcoco(root, change=nothing):
    rows = [{"ref_id": number, "ann_id": 50 + number, "image_id": number, "split": "train", "category_id": 1,
             "sentences": [{"sent_id": number, "raw": f"the Dog, {number}!", "tokens": ["dog"]}]}
            for number in range(COUNT)]
    boxes = [{"id": 50 + number, "image_id": number, "bbox": [1, 2.4, 3, 3]} for number in range(COUNT)]
    images = [{"id": number, "width": WIDTH, "height": HEIGHT} for number in range(COUNT)]
    coco_2014(root)
    change(rows)
    put_json(root / "refcoco" / "instances.json", {"images": images, "annotations": boxes, "categories": []})
    return put(root / "refcoco" / "refs(unc).p", pickle.dumps(rows, protocol=0)).parent


invrefcoco = refcoco


def parquet(root, change=nothing):
    """Images in the file, as Hugging Face writes them."""
    import pyarrow
    from pyarrow import parquet as arrow

    rows = [{"image": {"bytes": jpeg(number), "path": f"{number}.jpg"}, "caption": CAPTIONS[number]}
            for number in range(COUNT)]
    change(rows)
    root.mkdir(parents=True, exist_ok=True)
    arrow.write_table(pyarrow.Table.from_pylist(rows), root / "train-00000-of-00001.parquet")
    return root


def tfds(root, change=nothing):
    """What `mmjax data prepare` makes of the rows of `jsonl`."""
    from mmjax.data.prepare import prepare

    prepare("jsonl", str(jsonl(root / "source", change)), root / "prepared", shard_size=2)
    return root / "prepared"
