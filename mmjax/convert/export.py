"""Exports parts of a checkpoint to the released file formats, bit-equal to the files that were converted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax import files, trees
from mmjax.checkpoints import frozen as frozen_weights
from mmjax.checkpoints.converted import RUN_CARD, ConvertedCheckpoint, read_run, trained_params
from mmjax.convert.adapter import REPLACED
from mmjax.convert.tables import ConversionError, backward
from mmjax.families.base import Export, ExportContext, Family

ALIASES = {"llama": "llm", "llama-meta": "llm-meta"}  # names of parts before checkpoints of format 2


def export(checkpoint: Path, part: str, out: Path) -> None:
    """Writes a part of a converted checkpoint or of a training run in its released PyTorch format.

    Args:
        checkpoint: converted checkpoint, or run folder (its newest trained parameters are written)
        part: llm or llm-meta (the language model as transformers saves it, or as Meta ships it, without an adapter's
            parameters); of MiniGPT-4 projector (with LoRA if there is one), vit, qformer;
            of ImageBind-LLM adapter, bind, imagebind; of LLaMA-Adapter adapter, clip
        out: file to write; a folder for llm and llm-meta. It must not exist

    Raises ConversionError if the model has no such part, or one of its parameters is missing or has another shape,
    FileExistsError if `out` exists, and FileNotFoundError or ValueError for a folder that cannot be read.
    """
    files.require_local({"checkpoint": checkpoint, "out": out})
    folder = Path(checkpoint)
    if (folder / RUN_CARD).is_file():
        export_part(read_run(folder), part, Path(out), trained_params(folder))
    else:
        export_part(ConvertedCheckpoint.open(folder), part, Path(out))


def export_part(source: ConvertedCheckpoint, part: str, out: Path, trained: Mapping[str, Any] | None = None) -> None:
    """Writes a part of an opened checkpoint; raises as `export` does.

    source:  the checkpoint, with the architecture of `trained`
    trained: parameters, nested or by path, that replace the checkpoint's, such as those of a training run
    """
    part = ALIASES.get(part, part)
    if out.exists():
        raise FileExistsError(f"{out} exists. Choose another name.")
    family, cfg = source.family, source.config
    parts = {name: each for name, each in family.exports.items() if each.exists(cfg)}
    if part not in parts:
        raise ConversionError(f"{source.folder} has no part {part!r}; it has {', '.join(parts)}.")
    stored, trained = frozen_weights.arrays(source.folder / "weights"), trees.flatten(trained or {})
    _write(parts[part], family, source, stored, trained, out)


def _write(part: Export, family: Family, source: ConvertedCheckpoint, stored: Mapping[str, Any],
           trained: Mapping[str, Any], out: Path) -> None:
    replaced = {path: stored.get(REPLACED + path, stored[path]) for path in family.replaces
                if source.config.injects and (REPLACED + path in stored or path in trained)}
    arrays = {**stored, **trained, **(replaced if part.base else {})}
    tensors = backward(part.entries(source.config, replaced), arrays)
    out.parent.mkdir(parents=True, exist_ok=True)
    part.write(out, tensors, ExportContext(source.config, source.generation, source.folder / "tokenizer"))
