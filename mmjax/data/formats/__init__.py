"""Readers of the released datasets' layouts, which return `Record`s; `FORMATS` has them by name."""

from collections.abc import Callable, Sequence

from mmjax.config import Source
from mmjax.data.formats.account import Account
from mmjax.data.formats.cc_sbu import cc_sbu_align
from mmjax.data.formats.coco import coco_captions
from mmjax.data.formats.grounding import invrefcoco, refcoco
from mmjax.data.formats.imagebind_llm import CAPTION_PROMPT, imagebind_llm_finetune, imagebind_llm_pretrain
from mmjax.data.formats.instruct import jsonl, llava_instruct
from mmjax.data.formats.parquet import parquet
from mmjax.data.formats.record import Member, Record, clean_caption
from mmjax.data.formats.tfds import tfds
from mmjax.data.formats.vqa import gqa, vqa
from mmjax.data.formats.webdataset import webdataset

__all__ = [
    "Account", "CAPTION_PROMPT", "FORMATS", "Member", "Record", "cc_sbu_align", "clean_caption", "coco_captions", "gqa",
    "imagebind_llm_finetune", "imagebind_llm_pretrain", "invrefcoco", "jsonl", "llava_instruct", "parquet", "read",
    "refcoco", "tfds", "vqa", "webdataset",
]

# (path, root, follow_links) -> records; root: the folder of the images, None for that of the data file;
# follow_links: whether links may lead out of that folder
FORMATS: dict[str, Callable[..., Sequence[Record]]] = {
    "cc_sbu_align": cc_sbu_align,
    "webdataset": webdataset,
    "llava_instruct": llava_instruct,
    "jsonl": jsonl,
    "coco_captions": coco_captions,
    "vqa": vqa,
    "gqa": gqa,
    "refcoco": refcoco,
    "invrefcoco": invrefcoco,
    "imagebind_llm_pretrain": imagebind_llm_pretrain,
    "imagebind_llm_finetune": imagebind_llm_finetune,
    "tfds": tfds,
    "parquet": parquet,
}


def read(source: Source) -> Sequence[Record]:
    """Returns the records of a source. Raises the errors of its format's reader."""
    options = {"follow_links": True} if source.follow_links else {}
    return FORMATS[source.format](source.path, source.root, **options)
