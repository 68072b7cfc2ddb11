"""From a checkpoint folder back to the released file formats, bit-equal to what was converted."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmjax import files, trees, weights
from mmjax.convert import adapter as adapter_files
from mmjax.convert import imagebind as imagebind_files
from mmjax.convert import llama as llama_files
from mmjax.convert import llama_adapter as llama_adapter_files
from mmjax.convert import meta as meta_files
from mmjax.convert import minigpt4 as minigpt4_files
from mmjax.convert import torch_file
from mmjax.convert.lazy import LazyTensor
from mmjax.convert.tables import ConversionError, Entry, backward
from mmjax.families import FAMILIES, config_from_dict
from mmjax.families.imagebind_llm import Config as ImageBindLlm
from mmjax.families.llama_adapter import Config as LlamaAdapter
from mmjax.families.minigpt4 import Config as MiniGPT4
from mmjax.models.llama import LlamaConfig

SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Part:
    """Something that has a released format of its own: its tables' entries, and what writes its tensors to a place."""

    entries: Callable[[], list[Entry]]
    write: Callable[[Path, Mapping[str, LazyTensor]], None]


def export(
    checkpoint: Path, part: str, out: Path, *, trained: Mapping[str, Any] | None = None, config: Any = None
) -> None:
    """Writes a part of a converted checkpoint in its released format.

    Args:
        checkpoint: folder that `mmjax convert` wrote
        part: one of these, as far as the model has it:
            llama (a folder as transformers saves it), llama-meta (one as Meta ships it): the language model without
            what an adapter adds to it or replaces in it;
            projector (and LoRA, in one .pth that the original code loads), vit (eva_vit.pth),
            qformer (blip2_pretrained.pth, ln_vision included);
            adapter (of ImageBind-LLM or LLaMA-Adapter, with LoRA, biases and norms if it has them),
            bind (the bind network alone, in the article's names), imagebind (imagebind_huge.pth),
            clip (the picture tower's state dict)
        out: file, or folder for llama and llama-meta, to write; must not exist
        trained: parameters, nested or by path, that take the place of the checkpoint's, such as those of a training run
        config: the architecture that these belong to, if it is not the checkpoint's (a run that added LoRA)

    Raises ConversionError if the checkpoint has no such part or a parameter of it is missing or has another shape.
    """
    files.require_local({"checkpoint": checkpoint, "out": out})
    checkpoint, out = Path(checkpoint), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists. Choose another name.")
    if not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"{checkpoint} has no config.json: it is not a folder that `mmjax convert` wrote.")
    described = json.loads((checkpoint / "config.json").read_text())
    cfg = config or config_from_dict(FAMILIES[described["family"]].Config, described["architecture"])
    stored, trained = weights.arrays(checkpoint / "weights"), trees.flatten(trained or {})
    arrays, replaced = stored | trained, _replaced(cfg, stored, trained)
    parts = _parts(cfg, replaced, described["generation"], checkpoint / "tokenizer")
    if part not in parts:
        raise ConversionError(f"{checkpoint} has no part {part!r}; it has {', '.join(parts)}.")
    if part in ("llama", "llama-meta"):
        arrays |= replaced
    tensors = backward(parts[part].entries(), arrays)
    out.parent.mkdir(parents=True, exist_ok=True)
    parts[part].write(out, tensors)


def _replaced(cfg: Any, stored: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """{path: the base's own} of the norms that the model's adapter brings."""
    if not cfg.llama.injection:
        return {}
    norms = (path for _, path, _ in adapter_files.NORMS)
    return {path: stored.get(adapter_files.REPLACED + path, stored[path]) for path in norms
            if adapter_files.REPLACED + path in stored or path in trained}


def _parts(cfg: Any, norms: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Path) -> dict[str, Part]:
    """What can be exported of a model. norms: those that belong to its adapter."""
    parts = {"llama": Part(lambda: llama_files.entries(cfg.llama),
                           functools.partial(_write_folder, cfg.llama, generation, tokenizer))}
    if not cfg.llama.tied and cfg.llama.heads * cfg.llama.head_dim == cfg.llama.dim:
        parts["llama-meta"] = Part(lambda: meta_files.entries(cfg.llama),
                                   functools.partial(_write_meta_folder, cfg.llama, tokenizer))
    match cfg:
        case MiniGPT4():
            parts["projector"] = Part(lambda: [*minigpt4_files.projector_entries(cfg.soft_width, cfg.llama.dim),
                                               *llama_files.lora_entries(cfg.llama)], _write_model)
            parts["vit"] = Part(lambda: minigpt4_files.vit_entries(cfg.vit), torch_file.save)
            if cfg.qformer:
                parts["qformer"] = Part(lambda: minigpt4_files.qformer_entries(cfg.qformer, cfg.vit.dim), _write_model)
        case ImageBindLlm():
            parts["adapter"] = Part(lambda: adapter_files.imagebind_llm_entries(cfg, norms), _write_model)
            if not cfg.bind.legacy:
                parts["bind"] = Part(lambda: imagebind_files.bind_entries(cfg.bind, article=True), torch_file.save)
            parts["imagebind"] = Part(
                lambda: imagebind_files.entries(cfg.imagebind),
                lambda out, tensors: torch_file.save(out, {**tensors, **imagebind_files.buffers(cfg.imagebind)}))
        case LlamaAdapter():
            parts["adapter"] = Part(lambda: adapter_files.llama_adapter_entries(cfg, norms),
                                    functools.partial(_write_v2, cfg.llama) if cfg.visual else torch_file.save)
            if cfg.clip:
                parts["clip"] = Part(lambda: llama_adapter_files.clip_entries(cfg.clip), torch_file.save)
    return parts


def _write_model(out: Path, tensors: Mapping[str, LazyTensor]) -> None:
    torch_file.save(out, {"model": tensors})


def _write_v2(cfg: LlamaConfig, out: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """With what llama_adapter_v2_multimodal7b asks before it reads the tensors."""
    lora = {"w_lora": True, "lora_rank": cfg.lora_rank} if cfg.lora_rank else {"w_lora": False}
    torch_file.save(out, {"model": tensors, "config": {"w_bias": bool(cfg.bias_on), **lora}})


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A folder that appears under its name when it is complete."""
    partial = out.with_name(f".{out.name[:40]}.partial-{os.getpid()}")  # a long name becomes no longer
    try:
        partial.mkdir()
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_meta_folder(cfg: LlamaConfig, tokenizer: Path, out: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """params.json, all tensors in consolidated.00.pth, and tokenizer.model."""
    if not (tokenizer / "tokenizer.model").is_file():
        raise ConversionError(f"{tokenizer} has no tokenizer.model, without which Meta's format is not complete. "
                              "Export the part `llama` instead.")
    with _folder(out) as folder:
        torch_file.save(folder / "consolidated.00.pth", tensors)
        (folder / "params.json").write_text(json.dumps(meta_files.params(cfg)) + "\n")
        shutil.copyfile(tokenizer / "tokenizer.model", folder / "tokenizer.model")


def _write_folder(
    cfg: LlamaConfig, generation: Mapping[str, Any], tokenizer: Path, out: Path, tensors: Mapping[str, LazyTensor]
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
    with _folder(out) as folder:
        for name, shard in zip(names, shards, strict=True):
            torch_file.save(folder / name, shard)
        files = {"pytorch_model.bin.index.json": index, "config.json": config, "generation_config.json": generation}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        for file in llama_files.TOKENIZER_FILES:
            if (tokenizer / file).is_file():
                shutil.copyfile(tokenizer / file, folder / file)
