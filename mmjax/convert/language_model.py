"""Reads a language model from a folder in either format: as transformers saves it, or as Meta ships it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from mmjax.config import TextConfig
from mmjax.convert import llama, meta
from mmjax.convert.lazy import LazyTensor
from mmjax.convert.llama import Release
from mmjax.convert.tables import Parameter, Problems, SourceCheckpoint, forward
from mmjax.tokenizer import Tokenizer


def inspect(llm: Path, *, delta: Path | None = None) -> SourceCheckpoint:
    """Converts a language model alone: for text, and as a base for others.

    Args:
        llm: folder as transformers saves it (config.json, weights in .safetensors or .bin, tokenizer) or as Meta
            ships it (params.json, consolidated.NN.pth; tokenizer.model in the folder or in its parent)
        delta: folder of a Vicuna delta to add to the weights
    """
    problems = Problems()
    release, parameters = read(llm, delta, problems)
    problems.check(f"Cannot convert {llm}")
    tokenizer = Tokenizer.from_folder(release.tokenizer)
    text = TextConfig(end_sym=tokenizer.decode([tokenizer.eos], skip_special=False))
    return SourceCheckpoint({"llm": release.cfg}, parameters, text, release.generation, {"llm": release.files},
                            release.tokenizer, left_out=problems.left_out)


def read(
    folder: Path, delta: Path | None, problems: Problems, replacing: Mapping[str, LazyTensor] | None = None
) -> tuple[Release | None, dict[str, Parameter]]:
    """Returns (release, parameters) of a folder in either format.

    replacing: tensors, with transformers' names, that are taken instead of the folder's
    """
    if not folder.is_dir():
        problems.append(f"{folder} is {'a file' if folder.exists() else 'not there'}; --llm expects a folder as "
                        "transformers saves it (config.json, weights, tokenizer), or as Meta ships it.")
        return None, {}
    if meta.recognised(folder):
        release = meta.open_release(folder, problems)
        if delta:
            problems.append(f"--delta is a difference to a folder as transformers saves it, but {folder} is in Meta's "
                            "format. Convert it with `llama`, run `mmjax export --checkpoint OUT --part llm "
                            "--out FOLDER`, and give that folder.")
        if replacing:
            problems.append(f"A trained file also holds the language model, with transformers' names, but {folder} is "
                            "in Meta's format. Give the folder as transformers saves it.")
    else:
        release = llama.open_release(folder, delta, problems)
    if release is None or not release.tensors:
        return release, {}
    if replacing:
        release = dataclasses.replace(release, tensors={**release.tensors, **replacing})
    return release, forward(release.entries, release.tensors, release.ignored, folder.name, problems)
