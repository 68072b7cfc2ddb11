"""Exports parts of a checkpoint to the released file formats, bit-equal to the files that were converted."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmjax import files, trees
from mmjax.checkpoints import frozen as frozen_weights
from mmjax.checkpoints.converted import RUN_CARD, ConvertedCheckpoint, read_run, trained_params
from mmjax.convert.adapter import REPLACED
from mmjax.convert.notes import note
from mmjax.convert.tables import ConversionError, backward
from mmjax.families.base import Export, ExportContext

ALIASES = {"llama": "llm", "llama-meta": "llm-meta"}  # names of parts before checkpoints of format 2


def export(
    checkpoint: Path, part: str, out: Path, *, format: Literal["torch", "hf"] = "torch", merge_lora: bool = False
) -> None:
    """Writes a part of a converted checkpoint or of a training run in its released PyTorch format.

    Args:
        checkpoint: converted checkpoint, or run folder (its newest trained parameters are written)
        part: llm or llm-meta (the language model as transformers saves it, or as Meta ships it, without an adapter's
            parameters); of MiniGPT-4 projector (with LoRA if there is one), vit, qformer;
            of ImageBind-LLM adapter, bind, imagebind; of LLaMA-Adapter adapter, clip
        out: file to write; a folder for llm and llm-meta. It must not exist
        format: torch writes .bin or .pth files, as released; hf writes safetensors, and so does a file named
            *.safetensors. With either, a language model gets its config.json and its tokenizer
        merge_lora: write the language model with its LoRA added to the matrices

    Raises ConversionError if the model has no such part, or one of its parameters is missing or has another shape,
    FileExistsError if `out` exists, and FileNotFoundError or ValueError for a folder that cannot be read.
    """
    files.require_local({"checkpoint": checkpoint, "out": out})
    folder = Path(checkpoint)
    is_run = (folder / RUN_CARD).is_file()
    source = read_run(folder) if is_run else ConvertedCheckpoint.open(folder)
    export_part(source, part, Path(out), trained_params(folder) if is_run else None, format, merge_lora)


def export_part(source: ConvertedCheckpoint, part: str, out: Path, trained: Mapping[str, Any] | None = None,
                format: str = "torch", merge_lora: bool = False) -> None:
    """Writes a part of an opened checkpoint; raises as `export` does.

    source:  the checkpoint, with the architecture of `trained`
    trained: parameters, nested or by path, that replace the checkpoint's, such as those of a training run
    """
    part = ALIASES.get(part, part)
    if out.exists():
        raise FileExistsError(f"{out} exists. Choose another name.")
    cfg = source.config
    parts = {name: each for name, each in source.family.exports.items() if each.exists(cfg)}
    if part not in parts:
        raise ConversionError(f"{source.folder} has no part {part!r}; it has {', '.join(parts)}.")
    if merge_lora:
        _check_merge(source, part, parts[part])
    elif parts[part].base and lora_rank(cfg):
        note(f"{out}: this is the base model, without its LoRA."
             + " To add it, export with --merge-lora." * (not cfg.injects))
    stored, trained = frozen_weights.arrays(source.folder / "weights"), trees.flatten(trained or {})
    _write(parts[part], source, stored, trained, out, format, merge_lora)


def lora_rank(cfg: Any) -> int:
    """Returns the rank of the LoRA of a model's language model; 0 if there is none."""
    return getattr(cfg.llm, "lora_rank", 0)


def _check_merge(source: ConvertedCheckpoint, part: str, export: Export) -> None:
    """Raises ConversionError if a part cannot be written with its LoRA merged."""
    if not export.base:
        raise ConversionError(f"--merge-lora is for the language model (llm); LoRA adds to no matrix of {part}.")
    if not lora_rank(source.config):
        raise ConversionError(f"{source.folder} has no LoRA to merge. Export without --merge-lora.")
    if source.config.injects:
        raise ConversionError(f"{source.folder}: the adapter's gates, norms and biases have no place in a plain "
                              "language model, so its LoRA alone would give another one. Export the part adapter.")


def merged(arrays: Mapping[str, Any], llm: Any) -> dict[str, Any]:
    """Returns the parameters with LoRA added: W + (alpha / R) · A B, in float32, rounded once to the dtype of W.

    Raises ConversionError if there is no LoRA among them.
    """
    weights = {path.removesuffix("lora_a") + "w": path.removesuffix("a") for path in arrays if path.endswith("/lora_a")}
    if not weights:
        raise ConversionError("The LoRA was never trained: there is nothing to merge. Export without --merge-lora.")
    return {**arrays, **{path: Merged(arrays[path], arrays[f"{lora}a"], arrays[f"{lora}b"],
                                      llm.lora_alpha / llm.lora_rank) for path, lora in weights.items()}}


@dataclasses.dataclass(frozen=True)
class Merged:
    """A stacked matrix with its LoRA, added layer by layer when it is read."""

    matrix: Any  # [L,*inputs,*outputs]
    a: Any  # [L,*inputs,R]
    b: Any  # [L,R,*outputs]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.matrix.shape)

    @property
    def dtype(self) -> Any:
        return self.matrix.dtype

    def __getitem__(self, layer: int) -> np.ndarray:
        matrix, a, b = (np.asarray(each.read().result() if hasattr(each, "read") else each)
                        for each in (self.matrix[layer], self.a[layer], self.b[layer]))
        added = np.tensordot(a.astype(np.float32), b.astype(np.float32), axes=1)
        return (matrix.astype(np.float32) + self.scale * added).astype(matrix.dtype)


def _write(part: Export, source: ConvertedCheckpoint, stored: Mapping[str, Any], trained: Mapping[str, Any], out: Path,
           format: str, merge_lora: bool) -> None:
    replaced = {path: stored.get(REPLACED + path, stored[path]) for path in source.family.replaces
                if source.config.injects and (REPLACED + path in stored or path in trained)}
    arrays = {**stored, **trained, **(replaced if part.base else {})}
    if merge_lora:
        arrays = merged(arrays, source.config.llm)
    tensors = backward(part.entries(source.config, replaced), arrays)
    out.parent.mkdir(parents=True, exist_ok=True)
    safe = format == "hf" or out.suffix == ".safetensors"
    part.write(out, tensors, ExportContext(source.config, source.generation, source.folder / "tokenizer", safe))
