"""ImageBind-LLM's reference set: where it is, its cases, and its towers, bind networks and models as mmjax loads them.

The folder is `$MMJAX_GOLDEN` (it holds `imagebind_llm/`, or is itself such a set), or `tests/golden`. Every size comes
from the set's `config.json`, a case's JSON or an array's shape. Where the folder holds MiniGPT-4's set alone, the tests
that ask here are skipped.
"""

import dataclasses
import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import trees
from mmjax.batch import Batch
from mmjax.convert import adapter as adapter_tables
from mmjax.convert import imagebind as tables
from mmjax.convert import torch_file, write
from mmjax.convert.lazy import LazyTensor
from mmjax.convert.tables import Entry, Problems, backward, forward
from mmjax.inference.loaded import Loaded
from mmjax.inference.loaded import load as load_checkpoint
from mmjax.models.bind import BindConfig
from mmjax.models.imagebind import ImageBindConfig
from tests.parity.golden import Case

# Section "noise level" of the set's description: several times the distance of the original's float32 from float64.
# Absolute, but for gradients: relative to the largest magnitude of the array.
FEATURE, LOG_MEL, LOGIT, LOSS, GRADIENT, WEIGHT = 2e-5, 5e-3, 5e-5, 1e-5, 2e-5, 2e-5
PRETRAINED = "adapter_pretrain.pth"


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


def each(where: Callable[[Case], bool], tier: Callable[[Case], Any] = lambda case: ()):
    """A test for every case of which `where` holds, as the argument `case`; skipped under a set without any.

    tier: the marks of a case, `towers_tier` where the case's inputs go through their towers
    """
    found = [case for case in map(load, names()) if where(case)]
    return pytest.mark.parametrize("case", [pytest.param(case, marks=tier(case), id=case.name) for case in found])


def towers_tier(case: Case) -> Any:
    """The marks of a case: in the default tier ImageBind has eyes alone."""
    senses = {name.lower() for name in (*case.arrays, *case.spec.get("inputs", ()))} | set(case.name.split("_"))
    return pytest.mark.extended if senses & {"audio", "depth", "thermal", "imu", "text", "joint"} else ()


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


# ---- whole models ----


@functools.cache
def model(adapter: str) -> Loaded:
    """The towers, LLaMA and an adapter file of the set, converted by mmjax and loaded in float32.

    The article's bind network alone gets the article's injection, a closed gate a layer.
    """
    article = tables.is_article(tensors(adapter))
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "converted"
        write.command("imagebind_llm")(
            folder() / "imagebind.pth", folder() / "llama_meta", out, adapter=folder() / adapter,
            arch=folder() / "config.json", injection="token" if article else "released")
        return load_checkpoint(out, dtype="float32", init_fresh=0 if article else None)


def token_form(adapter: str, gates: np.ndarray) -> Loaded:
    """A file's model with the article's injection and these gates; a single one is shared by all layers."""
    m = model(adapter)
    shared = len(gates) < m.config.llm.depth
    kept = {path: leaf for path, leaf in trees.flatten(m.params).items()
            if not re.fullmatch("query|llm/layers/(attn/)?gate", path)}
    opened = {"llm/gate": jnp.asarray(gates)} if shared else {"llm/layers/gate": jnp.asarray(gates[:, None])}
    llama = dataclasses.replace(m.config.llm, injection="shared" if shared else "layer")
    cfg = dataclasses.replace(m.config, llm=llama)
    return dataclasses.replace(m, params=trees.unflatten(kept | opened), config=cfg, module=m.module.clone(cfg=cfg))


def adapter(case: Case) -> str:
    """The file that a case names. Plain LLaMA is in all of them that leave its norms alone; generation was run with the
    fine-tuned one where it names none."""
    if case.spec.get("checkpoint") == "llama_meta":
        return PRETRAINED
    words = [case.spec.get(name) or "" for name in ("checkpoints", "checkpoint", "start", "description")]
    found = re.search(r"(adapter\w*|bind_network)\.pth", " ".join(map(str, words)))
    return found[0] if found else "adapter.pth"


def changed(m: Loaded, rules: Mapping[str, Callable[[Any], Any]]) -> Loaded:
    """A model with some parameters replaced: `{pattern of a path: function of the old parameter}`."""
    flat = trees.flatten(m.params)
    for pattern, function in rules.items():
        flat |= {path: function(leaf) for path, leaf in flat.items() if re.fullmatch(pattern, path)}
    return dataclasses.replace(m, params=trees.unflatten(flat))


def entries(m: Loaded, arrays: Mapping[str, Any]) -> list[Entry]:
    """The lines of an adapter file, or of the article's, for the parameters that are in `arrays`."""
    cfg = m.config
    own = adapter_tables.entries(cfg.llm, adapter_tables.IMAGEBIND_LLM, cfg.query_layers, 1, arrays)
    wanted = [*tables.bind_entries(cfg.bind, article=cfg.llm.injection != "head"), *own]
    return [entry for entry in wanted if entry.path in arrays]


def released(m: Loaded, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """`{original name: array}` of parameters, or of what is shaped like them, given by path."""
    return {key: tensor.read() for key, tensor in backward(entries(m, arrays), arrays).items()}


def batch(tokens: np.ndarray, labels: np.ndarray | None = None, image: np.ndarray | None = None,
          features: np.ndarray | None = None, **media: np.ndarray) -> Batch:
    """Rows as a case holds them: padding is not masked, and label 0 is no target. One image serves all rows.

    features: the mix of all senses, in place of `image` and `media`
    """
    rows, length = tokens.shape
    tokens = tokens.astype(np.int32)
    labels = np.zeros_like(tokens) if labels is None else labels
    assert np.array_equal(labels, np.where(labels == 0, 0, tokens))
    given = media if image is None else {"image": image} | media
    given = {name: np.broadcast_to(x, (rows, *x.shape[1:])) for name, x in given.items()}
    weights = {name: np.ones(rows, np.float32) for name in given}
    image = given.pop("image", None)
    return Batch(
        tokens=tokens,
        soft_index=np.full_like(tokens, -1),
        valid=np.ones(tokens.shape, bool),
        loss_mask=labels != 0,
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        padded_length=np.full(rows, length, np.int32),
        images=None if image is None else image[:, None],
        features=features,
        media=given or None,
        weights=weights or None,
    )
