"""Compares a model with its PyTorch original stage by stage, for the same inputs.

The reference is an npz file with the inputs and the outputs of the original's modules; docs/parity.md has the format
and a recipe that writes such a file. The names of inputs are in `INPUTS`, those of stages in the family's `stages`.

B rows   T tokens   F images a row   N = B·F   D model   V vocabulary
"""

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich.console import Console
from rich.table import Table

from mmjax import sharding, trees
from mmjax.batch import Batch
from mmjax.data.arrays import read_npz
from mmjax.families import shapes
from mmjax.families.base import NUMBER, Family, Stage
from mmjax.inference.loaded import Loaded
from mmjax.models.masks import causal_mask
from mmjax.training import steps

INPUTS = {
    "images": "normalised images, the original's input: [B,3,H,W], or several a row [B,F,3,H,W]",
    "tokens": "int[B,T]: token ids, BOS included; -1 for a soft token of an image",
    "valid": "bool or int[B,T]: the original's attention_mask; by default all",
    "targets": "int[B,T]: the original's labels, -100 where there is no target; for `loss`",
    "positions": "int[B,T]: positions of the tokens; by default 0, 1, 2, ... in every row",
    "media_{sense}": "inputs of ImageBind: media_image, media_video, media_audio, media_depth, ...",
    "weight_{sense}": "float[B]: weight of that sense in the mix; by default 1",
}
NO_TARGET = -100
# Of the relative and of the typical difference. In float32 models differ by some 1e-6 (docs/parity.md); the others have
# 11 and 8 bits, and rounding errors of several operations add up.
TOLERANCES = {"float32": 3e-5, "float16": 1e-2, "bfloat16": 0.15}


@dataclasses.dataclass(frozen=True)
class Compared:
    """The comparison of a stage.

    absolute: largest absolute difference
    relative: `absolute` over the original's largest magnitude
    typical:  median difference over the original's median magnitude; not dominated by a few huge values
    verdict:  "agrees", "parts" (differs), or "shape" if the shapes differ
    words:    message: what is wrong
    """

    stage: Stage
    shape: tuple[int, ...]
    absolute: float
    relative: float
    typical: float
    tolerance: float
    verdict: Literal["agrees", "parts", "shape"]
    words: str = ""


def parity(model: Loaded, reference: str | Path, tolerance: float | None = None) -> list[Compared]:
    """Compares every stage that a file has, in order.

    reference: the npz file
    tolerance: largest relative and typical difference of stages that agree; None: by the coarser dtype of both

    Raises ValueError naming arrays of the file that are no stage, or inputs that its stages need and it does not have.
    """
    arrays = read(reference)
    wanted = [name for name in arrays if not is_input(name)]
    if not wanted:
        raise ValueError(f"{reference} has no stage to compare, only {', '.join(arrays) or 'nothing'}.")
    batch, given = inputs(model, arrays)
    possible = known(model.family, model.config)
    embedding = next((stage.name for stage in possible.values() if stage.kind == "embedding"), None)
    if unknown := [name for name in wanted if name not in possible]:
        raise ValueError(f"{reference} has {', '.join(unknown)}, which this model does not have. The model has the "
                         f"stages {', '.join(summary(possible))} and the inputs {', '.join(INPUTS)}.")
    with sharding.use_mesh(model.mesh):
        found = compute(model.module, model.family, frozenset(wanted), "targets" in arrays, model.params, batch, given)
        if missing := [name for name in wanted if name not in found]:
            raise ValueError(f"{reference} has no inputs for {', '.join(summary(missing))}: images need `images`, "
                             "senses `media_image` and the like, the language model's stages `tokens` or "
                             f"`{embedding}`, and the loss `targets`.")
    kind = jnp.dtype(model.module.dtype).name
    ordered = [name for name in possible if name in wanted and not (given is not None and name == embedding)]
    if not ordered:
        raise ValueError(
            f"{reference} has `{embedding}` without `tokens`: then it is an input, and there is no other stage to "
            "compare."
        )
    return [compare(possible[name], found[name], arrays[name], np.asarray(batch.valid),
                    tolerance or max(TOLERANCES[kind], TOLERANCES.get(arrays[name].dtype.name, 0.0)))
            for name in ordered]


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an npz file, executing nothing. Raises FileNotFoundError or ValueError naming the file."""
    try:
        return read_npz(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"There is no reference file {path}. docs/parity.md has a recipe to write one.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not an npz file of plain arrays: {error}") from error


def is_input(name: str) -> bool:
    return any(re.fullmatch(known.replace("{sense}", r"\w+"), name) for known in INPUTS)


def inputs(model: Loaded, arrays: Mapping[str, np.ndarray]) -> tuple[Batch, np.ndarray | None]:
    """Returns (batch, the input of the first layer [B,T,D] if the file has that in place of tokens).

    Raises ValueError for inputs that do not fit each other or the model.
    """
    targets, given = arrays.get("targets"), None
    tokens = arrays.get("tokens")
    embedding = next((stage.name for stage in model.family.stages if stage.kind == "embedding"), None)
    if tokens is None and embedding in arrays:
        given = arrays[embedding].astype(np.float32)
        tokens = np.zeros(given.shape[:2], np.int32) if targets is None else np.maximum(targets, 0)
    if tokens is None:  # no stage of the language model is compared
        rows = next((len(x) for name, x in arrays.items() if name == "images" or name.startswith("media_")), 1)
        tokens = np.zeros((rows, 1), np.int32)
    tokens = tokens.astype(np.int32)
    rows, length = tokens.shape
    for name in ("valid", "targets", "positions"):
        if name in arrays and arrays[name].shape != tokens.shape:
            raise ValueError(f"`{name}` has the shape {arrays[name].shape}, but there are {rows} rows of {length} "
                             "tokens.")
    if (vocab := model.config.llm.vocab) <= tokens.max(initial=0) or tokens.min(initial=0) < -1:
        raise ValueError(f"`tokens` has ids from {tokens.min()} to {tokens.max()}; expected 0 to {vocab - 1}, and -1 "
                         "for soft tokens.")
    soft = tokens == -1
    marked = np.zeros(tokens.shape, bool) if targets is None else targets != NO_TARGET
    if targets is not None and np.any(marked & (targets != np.where(soft, NO_TARGET, tokens))):
        raise ValueError("`targets` differ from `tokens` where they are not -100. They must be the tokens at the same "
                         "positions, as transformers' labels, not shifted by one.")
    if soft.any() and "images" not in arrays:
        raise ValueError("`tokens` has slots of soft tokens (-1), but there are no `images`.")
    images = arrays.get("images")
    if images is not None:
        images = images[:, None] if images.ndim == 4 else images
        images = images.astype(np.float32)
        if len(images) != rows:
            raise ValueError(f"`images` has {len(images)} rows, the text {rows}. The shape of several images a row is "
                             "[B,F,3,H,W].")
        room = images.shape[1] * model.config.image_tokens
        if (most := soft.sum(1).max(initial=0)) > room:
            raise ValueError(f"`tokens` has {most} slots of soft tokens in a row; its images give {room}.")
    media = {name.removeprefix("media_"): _narrow(x) for name, x in arrays.items() if name.startswith("media_")}
    mixed = [*media]
    if "image" in media:  # of a model that mixes senses
        images = media.pop("image")[:, None]
    return Batch(
        tokens=np.where(soft, 0, tokens),
        soft_index=np.where(soft, np.cumsum(soft, axis=1) - 1, -1).astype(np.int32),
        valid=arrays["valid"].astype(bool) if "valid" in arrays else np.ones(tokens.shape, bool),
        loss_mask=marked,
        positions=arrays.get("positions", np.tile(np.arange(length), (rows, 1))).astype(np.int32),
        padded_length=np.full(rows, length, np.int32),
        images=images,
        media=media or None,
        weights={name: arrays.get(f"weight_{name}", np.ones(rows)).astype(np.float32) for name in mixed} or None,
    ), given


def _narrow(x: np.ndarray) -> np.ndarray:
    """Returns an array in the dtype that JAX uses by default."""
    return x.astype(np.float32 if np.issubdtype(x.dtype, np.floating) else np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def compute(module: nn.Module, family: Family, wanted: frozenset[str], has_targets: bool, params: Any, batch: Batch,
            given: Any = None) -> dict[str, jax.Array]:
    """Returns the `wanted` stages that can be computed from these inputs; nothing else is computed."""
    found = stages(module, family, params, batch, given, has_targets)
    return {name: x for name, x in found.items() if name in wanted}


def stages(module: nn.Module, family: Family, params: Any, batch: Batch, given: Any = None,
           has_targets: bool = False) -> dict[str, jax.Array]:
    """Returns `{name: array}` of every stage that can be computed from these inputs.

    given: the input of the first layer, in place of the embedded tokens
    """

    patterns = [stage.path.replace(NUMBER, r"\d+") for stage in family.stages if stage.path]
    embedding = next((stage.name for stage in family.stages if stage.kind == "embedding"), "embedding")

    def is_stage(part: nn.Module, method: str) -> bool:
        return method == "__call__" and any(re.fullmatch(pattern, "/".join(part.path)) for pattern in patterns)

    def run(model: Any) -> dict[str, jax.Array]:
        found = {}
        if model.cfg.senses and (batch.images is not None or batch.media is not None):
            found["mixed"] = model.feature(batch)
        x, injection = model.encode(batch)
        x = x if given is None else jnp.asarray(given, x.dtype)
        hidden, _ = model.decode(x, batch.positions, causal_mask(batch.valid, batch.segments), injection=injection)
        return found | {embedding: x, "logits": model.logits(hidden)}

    named, variables = module.apply(
        {"params": params}, method=run, capture_intermediates=is_stage, mutable=["intermediates"])
    calls = {path.removesuffix("/__call__"): value[0]
             for path, value in trees.flatten(variables.get("intermediates", {})).items()}
    if has_targets:
        losses = steps.token_losses(named["logits"], batch)
        named["loss"] = losses.sum() / jnp.maximum(batch.loss_mask[:, 1:].sum(), 1)
    return named | _named(family, calls)


def _named(family: Family, calls: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns the modules' outputs by stage: scanned layers one by one, in the original's shapes."""
    found = {}
    for path, value in calls.items():
        value = value[0] if isinstance(value, tuple) else value
        for stage in family.stages:
            if stage.path == path and NUMBER in stage.name:
                found |= {stage.of(i).name: layer for i, layer in enumerate(value)}
            elif stage.path == path:
                found[stage.name] = _as_original(stage, value)
            elif NUMBER in stage.path and (match := re.fullmatch(stage.path.replace(NUMBER, r"(\d+)"), path)):
                found[stage.of(match[1]).name] = value
    return found


def _as_original(stage: Stage, value: jax.Array) -> jax.Array:
    """Returns an output with the leading axes of `Stage.flatten` merged, as in the original."""
    if stage.flatten is None:
        return value
    start, stop = stage.flatten
    return value.reshape(*value.shape[:start], -1, *value.shape[stop:])


@functools.cache
def known(family: Family, config: Any) -> dict[str, Stage]:
    """Returns `{name: stage}` of all stages of such a model, in order."""
    outputs = jax.eval_shape(functools.partial(stages, family.Model(config), family, has_targets=True),
                          trees.unflatten(shapes(family, config)), family.example(config))
    found = {}
    for stage in family.stages:
        pattern = re.compile(re.escape(stage.name).replace(re.escape(NUMBER), r"(\d+)"))
        matches = [match for match in map(pattern.fullmatch, outputs) if match]
        numbers = sorted(int(match[1]) if NUMBER in stage.name else 0 for match in matches)
        found |= {stage.of(number).name: stage.of(number) for number in numbers}
    return found


def summary(names: Collection[str]) -> list[str]:
    """Returns the names, with the layers of a model as one: `llama_layer_0…31`."""
    groups: dict[str, list[int]] = {}
    for name in names:
        stem, _, number = name.rpartition("_")
        numbers = groups.setdefault(f"{stem}_" if number.isdigit() else name, [])
        if number.isdigit():
            numbers.append(int(number))
    return [name + (f"{min(numbers)}…{max(numbers)}" if len(numbers) > 1 else "".join(map(str, numbers)))
            for name, numbers in groups.items()]


def compare(stage: Stage, got: Any, expected: np.ndarray, valid: np.ndarray, tolerance: float) -> Compared:
    """Compares the outputs of a stage. Their shapes may differ in axes of length 1; stages of the language model are
    compared where `valid` bool[B,T] is True."""
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    nan = float("nan")
    if [n for n in got.shape if n != 1] != [n for n in expected.shape if n != 1]:
        return Compared(stage, got.shape, nan, nan, nan, tolerance, "shape",
                        f"the original's has the shape {expected.shape}, ours {got.shape}")
    shape, expected = got.shape, expected.reshape(got.shape)
    if stage.kind == "decoder":
        got, expected = got[valid], expected[valid]
    if wrong := [name for name, x in (("the original's", expected), ("ours", got)) if not np.isfinite(x).all()]:
        return Compared(stage, shape, nan, nan, nan, tolerance, "parts",
                        f"{' and '.join(wrong)} has numbers that are not finite")
    difference, size = np.abs(got.astype(np.float64) - expected), np.abs(expected)
    absolute = float(difference.max(initial=0))
    relative, typical = _ratio(absolute, size.max(initial=0)), _ratio(np.median(difference), np.median(size))
    agrees = max(relative, typical) <= tolerance
    return Compared(stage, shape, absolute, relative, typical, tolerance, "agrees" if agrees else "parts")


def _ratio(difference: float, scale: float) -> float:
    """Returns difference / scale; infinity for a difference if the scale is 0."""
    return float(difference / scale) if scale else float("inf") if difference else 0.0


def verdict(rows: list[Compared]) -> str:
    """Returns a message about the first stage that differs."""
    first = next((i for i, row in enumerate(rows) if row.verdict != "agrees"), None)
    if first is None:
        return f"All {len(rows)} stages agree."
    row = rows[first]
    how = row.words or f"the difference is {max(row.relative, row.typical):.1e}, the tolerance {row.tolerance:.0e}"
    before = f"{rows[first - 1].stage.name} before it agrees" if first else "no stage before it was compared"
    return (f"The first stage that differs is {row.stage.name}: {how}; {before}. It reads {row.stage.reads}, in the "
            f"original {row.stage.original}. Correct it first: the later stages depend on it.")


def show(rows: list[Compared], console: Console) -> None:
    table = Table("stage", "shape", title="ours against the original's")
    for name in ("largest difference", "of the largest", "typical", "allowed", ""):
        table.add_column(name, justify="right")
    for row in rows:
        figures = (f"{x:.1e}" for x in (row.absolute, row.relative, row.typical, row.tolerance))
        style = None if row.verdict == "agrees" else "red"
        table.add_row(row.stage.name, "×".join(map(str, row.shape)), *figures, row.verdict, style=style)
    console.print(table)
    console.print(verdict(rows), highlight=False, style="green" if all_agree(rows) else "red")


def all_agree(rows: list[Compared]) -> bool:
    return all(row.verdict == "agrees" for row in rows)
