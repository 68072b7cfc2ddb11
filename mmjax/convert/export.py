"""From a checkpoint folder back to the released file formats, bit-equal to what was converted."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmjax import trees, weights
from mmjax.convert import llama as llama_files
from mmjax.convert import minigpt4 as minigpt4_files
from mmjax.convert import torch_file
from mmjax.convert.lazy import LazyTensor
from mmjax.convert.tables import ConversionError, Entry, backward
from mmjax.families import FAMILIES, config_from_dict

SHARD_BYTES = 5 * 10**9


def export(checkpoint: Path, part: str, out: Path, *, trained: Mapping[str, Any] | None = None) -> None:
    """Writes a part of a converted checkpoint in its released format.

    Args:
        checkpoint: folder that `mmjax convert` wrote
        part: projector (and LoRA, in one .pth that the original code loads), vit (eva_vit.pth),
            qformer (blip2_pretrained.pth, ln_vision included), llama (a folder as transformers saves it)
        out: file, or folder for llama, to write; must not exist
        trained: parameters, nested or by path, that take the place of the checkpoint's, such as those of a training run

    Raises ConversionError if the checkpoint has no such part or a parameter of it is missing or has another shape.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists. Choose another name.")
    if not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"{checkpoint} has no config.json: it is not a folder that `mmjax convert` wrote.")
    described = json.loads((checkpoint / "config.json").read_text())
    cfg = config_from_dict(FAMILIES[described["family"]].Config, described["architecture"])
    arrays = weights.arrays(checkpoint / "weights") | trees.flatten(trained or {})
    parts = _parts(cfg)
    if part not in parts:
        raise ConversionError(f"{checkpoint} has no part {part!r}; it has {', '.join(parts)}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    tensors = backward(parts[part](), arrays)
    if part == "llama":
        _write_folder(tensors, cfg.llama, described["generation"], checkpoint / "tokenizer", out)
    else:
        torch_file.save(out, tensors if part == "vit" else {"model": tensors})


def _parts(cfg: Any) -> dict[str, Callable[[], list[Entry]]]:
    """What can be exported of a model, as functions that give its tables' entries."""
    parts = {"llama": lambda: llama_files.entries(cfg.llama)}
    if hasattr(cfg, "vit"):
        parts["projector"] = lambda: [*minigpt4_files.projector_entries(cfg.soft_width, cfg.llama.dim),
                                      *llama_files.lora_entries(cfg.llama)]
        parts["vit"] = lambda: minigpt4_files.vit_entries(cfg.vit)
        if cfg.qformer:
            parts["qformer"] = lambda: minigpt4_files.qformer_entries(cfg.qformer, cfg.vit.dim)
    return parts


def _write_folder(
    tensors: Mapping[str, LazyTensor], cfg: Any, generation: Mapping[str, Any], tokenizer: Path, out: Path
) -> None:
    """Weights in shards with their index, config.json, generation_config.json and the tokenizer."""
    shards: list[dict[str, LazyTensor]] = [{}]
    room = SHARD_BYTES
    for key, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][key] = tensor
        room -= tensor.nbytes
    names = [f"pytorch_model-{n:05}-of-{len(shards):05}.bin" for n in range(1, len(shards) + 1)]
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
             "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard}}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        **{theirs: getattr(cfg, ours) for theirs, ours in llama_files.FIELDS.items()},
        "num_key_value_heads": cfg.kv_heads, "head_dim": cfg.head_dim, "rms_norm_eps": cfg.eps,
        "rope_theta": cfg.rope_theta, "max_position_embeddings": cfg.max_positions, "tie_word_embeddings": cfg.tied,
        "torch_dtype": str(next(iter(tensors.values())).dtype), **generation,
    }
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        for name, shard in zip(names, shards, strict=True):
            torch_file.save(partial / name, shard)
        files = {"pytorch_model.bin.index.json": index, "config.json": config, "generation_config.json": generation}
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        for file in sorted(tokenizer.iterdir()):
            shutil.copyfile(file, partial / file.name)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
