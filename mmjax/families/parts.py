"""Exports and parity stages of the language model, which the families share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax.convert import llama, meta
from mmjax.convert.tables import ConversionError
from mmjax.families.base import LOSS, Export, ExportContext, Stage


def _write_hf(out: Path, tensors: Mapping[str, Any], context: ExportContext) -> None:
    llama.write_folder(context.config.llm, context.generation, context.tokenizer, out, tensors, context.safetensors)


def _write_meta(out: Path, tensors: Mapping[str, Any], context: ExportContext) -> None:
    if context.safetensors:
        raise ConversionError("Meta's format has no safetensors. Export the part llm with --format hf, or llm-meta "
                              "without it.")
    meta.write_folder(context.config.llm, context.tokenizer, out, tensors)


LLM_EXPORTS = {
    "llm": Export(lambda cfg, replaced: llama.entries(cfg.llm), _write_hf, base=True),
    "llm-meta": Export(lambda cfg, replaced: meta.entries(cfg.llm), _write_meta, base=True,
                       exists=lambda cfg: not cfg.llm.tied and cfg.llm.heads * cfg.llm.head_dim == cfg.llm.dim
                       and not any(llama.base_biases(cfg.llm))),
}

LLM_STAGES = (
    Stage("llama_embed", "", "llm/embedding, and the slots of soft tokens", "model.embed_tokens, tok_embeddings",
          "embedding"),
    Stage("llama_layer_{i}", "llm/layers", "llm/layers/… [{i}], its LoRA, and its injection",
          "model.layers.{i} (transformers), layers.{i} (Meta)", "decoder"),
    Stage("llama_norm", "llm/norm", "llm/norm", "model.norm", "decoder"),
    Stage("logits", "", "llm/head (llm/embedding if tied)", "lm_head, output", "decoder"),
    LOSS,
)
