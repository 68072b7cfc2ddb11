"""ImageBind-LLM's reference set: where it is, its cases, and its towers and bind networks as mmjax loads them.

The folder is `$MMJAX_GOLDEN` (it holds `imagebind_llm/`, or is itself such a set), or `tests/golden`. Every size comes
from the set's `config.json`, a case's JSON or an array's shape. Where the folder holds MiniGPT-4's set alone, the tests
that ask here are skipped.
"""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import trees
from mmjax.convert import imagebind as tables
from mmjax.convert import torch_file
from mmjax.convert.lazy import LazyTensor
from mmjax.convert.tables import Entry, Problems, forward
from mmjax.models.bind import BindConfig
from mmjax.models.imagebind import ImageBindConfig
from tests.parity.golden import Case

# Section "noise level" of the set's description: several times the distance of the original's float32 from float64.
FEATURE, LOG_MEL = 2e-5, 5e-3


def folder() -> Path:
    """The set: the folder with `cases/` and `imagebind.pth`."""
    given = Path(os.environ.get("MMJAX_GOLDEN") or Path(__file__).parents[1] / "golden")
    for candidate in (given / "imagebind_llm", given):
        if (candidate / "cases").is_dir() and (candidate / "imagebind.pth").is_file():
            return candidate
    if (given / "minigpt4").is_dir() or (given / "model_sizes.json").is_file():
        pytest.skip(f"{given} holds MiniGPT-4's reference set alone", allow_module_level=True)
    raise FileNotFoundError(
        f"{given} holds no ImageBind-LLM reference set: expected {given / 'imagebind_llm' / 'imagebind.pth'} and "
        "cases/ beside it. Set MMJAX_GOLDEN to a folder that does, or unset it to use tests/golden.")


@functools.cache
def config() -> dict[str, Any]:
    return json.loads((folder() / "config.json").read_text(encoding="utf-8"))


@functools.cache
def load(name: str) -> Case:
    """The case of that name."""
    path = folder() / "cases" / name
    with np.load(path / "golden.npz", allow_pickle=False) as npz:
        return Case(name, json.loads((path / "case.json").read_text(encoding="utf-8")), dict(npz))


def names() -> list[str]:
    """All cases that hold arrays."""
    return sorted(path.parent.name for path in (folder() / "cases").glob("*/golden.npz"))


def each(where: Callable[[Case], bool]):
    """A test for every case of which `where` holds, as the argument `case`; skipped under a set without any."""
    found = [case for case in map(load, names()) if where(case)]
    return pytest.mark.parametrize("case", found, ids=[case.name for case in found])


def tensors(file: str) -> dict[str, LazyTensor]:
    """The tensors of one of the set's .pth files."""
    held = torch_file.load(folder() / file)
    return held.get("model", held)


def filled(entries: list[Entry], tensors: dict[str, LazyTensor], ignored, source: str) -> dict[str, Any]:
    """The nested parameters, float32, that a table makes of a file; everything in it must be used or ignored."""
    problems = Problems()
    parameters = forward(entries, tensors, ignored, source, problems)
    problems.check(f"Cannot convert {source}")
    return trees.unflatten({path: jnp.asarray(np.concatenate(list(parameter.slices())).reshape(parameter.shape),
                                              jnp.float32) for path, parameter in parameters.items()})


@functools.cache
def imagebind_config() -> ImageBindConfig:
    problems = Problems()
    cfg = tables.config(tensors("imagebind.pth"), config()["imagebind"], problems)
    problems.check("Cannot convert imagebind.pth")
    return cfg


@functools.cache
def imagebind_params() -> dict[str, Any]:
    entries = tables.entries(imagebind_config())
    return filled(entries, tensors("imagebind.pth"), tables.IGNORED, "imagebind.pth")["imagebind"]


def bind_tensors(file: str) -> dict[str, LazyTensor]:
    """A file without what belongs to the language model."""
    return {key: tensor for key, tensor in tensors(file).items()
            if not key.startswith(("llama.", "llma.", "prefix_query."))}


@functools.cache
def bind(file: str) -> tuple[BindConfig, dict[str, Any]]:
    """The bind network of a file: its config and parameters."""
    held, problems = bind_tensors(file), Problems()
    cfg = tables.bind_config(held, problems)
    problems.check(f"Cannot convert {file}")
    entries = tables.bind_entries(cfg, article=tables.is_article(held))
    return cfg, filled(entries, held, tables.BIND_IGNORED, file)["bind"]
