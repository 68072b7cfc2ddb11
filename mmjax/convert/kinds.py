"""Recognises the kinds of weight files by the names of their tensors, to say what a file in a wrong slot is."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from mmjax.convert.tables import Problems


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a file holds.

    what:    in a sentence, "this file is ..."
    options: of the conversions that take it
    pattern: the beginning of some of its names
    """

    what: str
    options: tuple[str, ...]
    pattern: str


KINDS = (
    Kind("ImageBind", ("imagebind",), r"modality_(trunks|preprocessors|heads|postprocessors)\."),
    Kind("an adapter of ImageBind-LLM", ("adapter",), r"(llama\.|llma\.)?(image_bind_\w|prefix_query\.)"),
    Kind("an adapter of LLaMA-Adapter", ("adapter",), r"(llama\.|llma\.)?(adapter_query\.|visual_query\.|clip_proj\.)"),
    Kind("a bind network", ("adapter",), r"(linear_0|feed_forward_1\.w1)\.weight"),
    Kind("CLIP", ("clip",), r"visual\.(transformer\.resblocks|conv1|class_embedding)"),
    Kind("CLIP as transformers saves it; OpenAI's state dict is expected", (), r"(vision_model|text_model)\.encoder\."),
    Kind("a BLIP-2 file with a Q-Former", ("qformer",), r"Qformer\."),
    Kind("a trained projector of MiniGPT-4", ("projector",), r"llama_proj\."),
    Kind("LoRA", ("lora",), r".*\.lora_[AB]\."),
    Kind("a vision tower of BLIP-2 or MiniGPT-4", ("vit",), r"visual_encoder\."),
    Kind("EVA's vision tower", ("vit",), r"blocks\.\d+\.attn\.(q_bias|qkv\.weight)"),
    Kind("a language model as Meta ships it", ("llm",), r"tok_embeddings\.|layers\.\d+\.attention\.w[qkvo]\.weight"),
    Kind("a language model as transformers saves it", ("llm",),
         r"model\.(embed_tokens|layers\.\d+\.self_attn)\."),
)


def kinds_of(names: Iterable[str]) -> list[Kind]:
    """Returns the kinds of which a file holds tensors."""
    names = list(names)
    return [kind for kind in KINDS if any(re.match(kind.pattern, name) for name in names)]


def expect(path: Path, option: str, tensors: Mapping[str, Any], options: Collection[str], problems: Problems) -> bool:
    """Returns whether a file may be what an option expects; adds a problem if it is surely something else.

    options: those of the conversion, which the message names
    """
    found = kinds_of(tensors)
    if not found or any(option in kind.options for kind in found):
        return True
    right = [name for kind in found for name in kind.options if name in options]
    problems.append(f"{path} is {found[0].what}; it was given as --{option}."
                    + (f" Give it as --{right[0]}" + (", with its folder." if right[0] == "llm" else ".") if right
                       else " This conversion does not read it."))
    return False
