"""The reference set for the parity tests: where it is, which cases it holds, what each one fed to the model.

The folder is `$MMJAX_GOLDEN` (it holds `minigpt4/`, or is itself such a set), or `tests/golden`. Nothing about one
particular set is written here: what a case is for is read from the keys of its JSON, and every size from
`model_sizes.json`, the JSON or an array's shape. A case may hold fewer arrays than the original one.

    @golden.each("forward")
    def test_loss(case):
        samples, text = golden.samples(case), golden.text_config(case)
        for name in case.holds("logits", "loss"): ...
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmjax.batch import Sample
from mmjax.config import TextConfig
from mmjax.tokenizer import Tokenizer

KINDS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "forward": lambda spec: "reduction" in spec and ("answer" in spec or "conv_a" in spec),
    "generate": lambda spec: "generate_kwargs" in spec,
    "chat": lambda spec: "turns" in spec,
    "select": lambda spec: "num_cand" in spec,
    "train": lambda spec: "batches" in spec and "run_cfg" in spec,
    "schedule": lambda spec: "schedules" in spec,
    "positions": lambda spec: "base_image" in spec,
    "pictures": lambda spec: "pictures" in spec,
    "sampling": lambda spec: {"repetition_penalty", "temperature", "top_k", "top_p"} <= spec.keys(),
    "tokenizer": lambda spec: "texts" in spec and "decode" in spec,
    "templates": lambda spec: "templates" in spec,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One case: `spec` is its JSON, `arrays` its npz (empty for a case of strings alone)."""

    name: str
    spec: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def holds(self, *names: str) -> list[str]:
        """Those of `names` that are among the arrays."""
        return [name for name in names if name in self.arrays]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The files that make the model of a case; None where it has no such part. `image_size` is the model's own."""

    vit: Path
    qformer: Path | None
    llm: Path
    projector: Path | None  # holds llama_proj
    lora: Path | None  # holds the LoRA factors, and llama_proj beside them
    image_size: int


def folder() -> Path:
    """The set: the folder with `cases/`, `ckpt/` and `model_sizes.json`."""
    given = Path(os.environ.get("MMJAX_GOLDEN") or Path(__file__).parents[1] / "golden")
    for candidate in (given / "minigpt4", given):
        if (candidate / "cases").is_dir():
            return candidate
    raise FileNotFoundError(
        f"{given} holds no reference set: expected {given / 'minigpt4' / 'cases'} or {given / 'cases'}. "
        "Set MMJAX_GOLDEN to a folder that does, or unset it to use tests/golden.")


def llama_folder() -> Path:
    return folder() / "ckpt" / "llama_hf"


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(llama_folder())


@functools.cache
def model_sizes() -> dict[str, Any]:
    return json.loads((folder() / "model_sizes.json").read_text(encoding="utf-8"))


@functools.cache
def load(name: str) -> Case:
    """The case of that name."""
    path = folder() / "cases" / name
    spec = json.loads(path.with_name(f"{name}.json").read_text(encoding="utf-8"))
    arrays: dict[str, np.ndarray] = {}
    if path.with_name(f"{name}.npz").exists():
        with np.load(path.with_name(f"{name}.npz"), allow_pickle=False) as npz:
            arrays = dict(npz)
    return Case(name, spec, arrays)


def cases(kind: str) -> list[Case]:
    """All cases of one of the `KINDS`, by name."""
    names = sorted(path.stem for path in (folder() / "cases").glob("*.json"))
    return [case for case in map(load, names) if KINDS[kind](case.spec)]


def each(*kinds: str, where: Callable[[Case], bool] = lambda case: True):
    """A test for every case of these kinds (of which `where` holds), as the argument `case`.

    Under a set without such a case the test is reported as skipped.
    """
    found = [case for kind in kinds for case in cases(kind) if where(case)]
    return pytest.mark.parametrize("case", found, ids=[case.name for case in found])


def is_v2(case: Case) -> bool:
    return case.spec.get("model") == "MiniGPTv2"


def has_qformer(case: Case) -> bool:
    return case.spec.get("has_qformer", not is_v2(case))


def image_size(case: Case) -> int:
    sizes = model_sizes()
    return sizes["minigpt_v2" if is_v2(case) else "vit"]["image_size"]


def image_tokens(case: Case) -> int:
    """Soft tokens of one image."""
    sizes = model_sizes()
    if has_qformer(case):
        return sizes["qformer"]["num_query_tokens"]
    return (image_size(case) // sizes["vit"]["patch_size"]) ** 2 // 4


def checkpoint(case: Case) -> Checkpoint:
    ckpt = folder() / "ckpt"
    projector = "minigpt4_proj.pth" if has_qformer(case) else "minigpt4_llama2_proj.pth"
    return Checkpoint(
        vit=ckpt / "eva_vit.pth",
        qformer=ckpt / "blip2_pretrained.pth" if has_qformer(case) else None,
        llm=llama_folder(),
        projector=None if is_v2(case) else ckpt / projector,
        lora=ckpt / "minigpt_v2.pth" if is_v2(case) else None,
        image_size=image_size(case))


def images(case: Case) -> np.ndarray | None:
    """The case's normalised images, float32[B,3,H,W] or float32[B,F,3,H,W]; None for text alone.

    They may be another case's (`"images_in": "NAME"`, or `"NAME (first N)"` for its first N rows).
    """
    for name in case.holds("images", "image"):
        return case.arrays[name]
    if "images_in" not in case.spec:
        return None
    name, count = re.fullmatch(r"(\S+)(?: \(first (\d+)\))?", case.spec["images_in"]).groups()
    return load(name).arrays["images"][:int(count) if count else None]


def _row_images(images: np.ndarray | None, row: int, length: int | None = None) -> list[np.ndarray]:
    """The images of one row; of an image train its first `length`."""
    if images is None:
        return []
    return [images[row]] if images.ndim == 4 else list(images[row][:length])


def samples(case: Case) -> list[Sample]:
    """What a forward or generation case fed to the model, row by row, without any template."""
    spec, shown = case.spec, images(case)
    count = len(spec.get("answer") or spec.get("conv_a") or spec["texts"])
    lengths = spec.get("length") or [None] * count
    rows = [Sample(images=_row_images(shown, row, lengths[row])) for row in range(count)]
    if "conv_q" in spec:
        symbol = spec["connect_sym"][0]  # the first sample's splits the whole batch
        turns = [list(zip(q.split(symbol), a.split(symbol), strict=True))
                 for q, a in zip(spec["conv_q"], spec["conv_a"], strict=True)]
        return [dataclasses.replace(row, turns=t) for row, t in zip(rows, turns, strict=True)]
    # one string of the prompt list is drawn for the whole batch; a reference case has a list of one
    prompts = spec.get("instruction_input") or spec.get("texts") or (spec.get("prompt_list") or [""])[:1] * count
    answers = spec.get("answer") or [None] * count
    return [dataclasses.replace(row, prompt=p, answer=a) for row, p, a in zip(rows, prompts, answers, strict=True)]


def candidates(case: Case) -> list[list[Sample]]:
    """A select case: for every candidate answer the batch that scores it."""
    shown = images(case)
    return [[Sample(images=_row_images(shown, row), prompt=text, answer=answer)
             for row, (text, answer) in enumerate(zip(case.spec["texts"], answers, strict=True))]
            for answers in case.spec["answers"]]


def train_batches(case: Case) -> list[list[Sample]]:
    """A train case: its batches, in the order in which the steps go round them."""
    return [[Sample(images=_row_images(case.arrays.get(f"images_{index}"), row), prompt=prompt, answer=answer)
             for row, (prompt, answer) in enumerate(zip(batch["instruction_input"], batch["answer"], strict=True))]
            for index, batch in enumerate(case.spec["batches"])]


def chat_turns(case: Case) -> list[Sample]:
    """A chat case: for every turn the one prompt to be continued, with the images shown so far (all at the start)."""
    shown = images(case)
    return [Sample(images=[] if shown is None else list(shown), prompt=turn["prompt"]) for turn in case.spec["turns"]]


def generation_ids(ids: dict[str, Any]) -> dict[str, Any]:
    """What `GenerateConfig` takes of a generation config as transformers reads it: of several end ids the first ends a
    row and the others stop it, and where there is no pad id finished rows are filled with the end id.
    """
    ends = ids["eos_token_id"]
    eos, *more = ends if isinstance(ends, list) else [ends]
    pad = ids.get("pad_token_id")
    return {"bos": ids["bos_token_id"], "eos": eos, "pad": eos if pad is None else pad,
            "stop": tuple((other,) for other in more)}


def text_config(case: Case) -> TextConfig:
    """The case's text settings. Only conversations and models with a chat template format inside forward."""
    spec = case.spec
    formats = "conv_q" in spec or spec.get("chat_template", False)
    given = {key: spec[key] for key in ("end_sym", "max_txt_len", "max_context_len") if key in spec}
    return TextConfig(prompt_template=spec.get("prompt_template", "") if formats else "", **given)
