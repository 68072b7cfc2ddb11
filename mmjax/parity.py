"""Where a model parts from its PyTorch original: the same inputs through both, compared stage by stage.

The reference is an npz file with the inputs and with what the original's modules gave for them; docs/parity.md has the
format, and a recipe that writes such a file. Inputs and stages have names: `INPUTS`, and the family's `stages`.

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
    "images": "images as the original takes them, normalised: [B,3,H,W], or several a row [B,F,3,H,W]",
    "tokens": "int[B,T]: ids, the beginning's included; -1 where a soft token of an image stands",
    "valid": "bool or int[B,T]: what attention sees (the original's attention_mask); without it, everything",
    "targets": "int[B,T]: the ids to be predicted, -100 where there is none (the original's labels); for `loss`",
    "positions": "int[B,T]: rotary positions; without it, 0, 1, 2, ... in every row",
    "media_{sense}": "what ImageBind takes: media_image, media_video, media_audio, media_depth, ...",
    "weight_{sense}": "float[B]: of that sense in the mix; without it, 1",
}
NO_TARGET = -100
# Relative to the largest magnitude, and typical to typical. In float32 models differ by some 1e-6 (docs/parity.md); the
# others have 11 and 8 bits, and lose a few of them on the way.
TOLERANCES = {"float32": 3e-5, "float16": 1e-2, "bfloat16": 0.15}


@dataclasses.dataclass(frozen=True)
class Compared:
    """A stage of both.

    absolute: largest difference
    relative: the same over the original's largest magnitude
    typical:  median difference over the original's median magnitude: sees what hides below a few huge values
    verdict:  "agrees", "parts", or "shape" where there is nothing to subtract
    words:    of what is wrong
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
    """Compares every stage that a file holds, in order.

    reference: the npz file
    tolerance: largest relative and typical difference of what agrees; None for what suits the coarser dtype of both

    Raises ValueError naming what is in the file and belongs to no stage, or what a stage would need and is not there.
    """
    held = read(reference)
    wanted = [name for name in held if not is_input(name)]
    if not wanted:
        raise ValueError(f"{reference} holds no stage to compare, only {', '.join(held) or 'nothing'}.")
    batch, given = inputs(model, held)
    possible = known(model.family, model.config)
    embedding = next((stage.name for stage in possible.values() if stage.kind == "embedding"), None)
    if unknown := [name for name in wanted if name not in possible]:
        raise ValueError(f"{reference} holds {', '.join(unknown)}, which this model does not have. It has the stages "
                         f"{', '.join(summary(possible))}, and takes the inputs {', '.join(INPUTS)}.")
    with sharding.use_mesh(model.mesh):
        found = compute(model.module, model.family, frozenset(wanted), "targets" in held, model.params, batch, given)
        if missing := [name for name in wanted if name not in found]:
            raise ValueError(f"{reference} has no inputs for {', '.join(summary(missing))}: images need `images`, "
                             "senses `media_image` and the like, the language model's stages `tokens` or "
                             f"`{embedding}`, and the loss `targets`.")
    kind = jnp.dtype(model.module.dtype).name
    ordered = [name for name in possible if name in wanted and not (given is not None and name == embedding)]
    if not ordered:
        raise ValueError(
            f"{reference} holds `{embedding}` without `tokens`: then it is an input, and there is no other "
            "stage to compare."
        )
    return [compare(possible[name], found[name], held[name], np.asarray(batch.valid),
                    tolerance or max(TOLERANCES[kind], TOLERANCES.get(held[name].dtype.name, 0.0)))
            for name in ordered]


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file, nothing of which is executed. Raises FileNotFoundError or ValueError naming it."""
    try:
        return read_npz(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"There is no reference file {path}. docs/parity.md has a recipe to write one.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not an npz file of plain arrays: {error}") from error


def is_input(name: str) -> bool:
    return any(re.fullmatch(known.replace("{sense}", r"\w+"), name) for known in INPUTS)


def inputs(model: Loaded, held: Mapping[str, np.ndarray]) -> tuple[Batch, np.ndarray | None]:
    """(batch, vectors [B,T,D] that enter the first layer where the file gives those in place of tokens).

    Raises ValueError for inputs that do not fit each other or the model.
    """
    targets, given = held.get("targets"), None
    tokens = held.get("tokens")
    embedding = next((stage.name for stage in model.family.stages if stage.kind == "embedding"), None)
    if tokens is None and embedding in held:
        given = held[embedding].astype(np.float32)
        tokens = np.zeros(given.shape[:2], np.int32) if targets is None else np.maximum(targets, 0)
    if tokens is None:  # of no stage of the language model
        rows = next((len(x) for name, x in held.items() if name == "images" or name.startswith("media_")), 1)
        tokens = np.zeros((rows, 1), np.int32)
    tokens = tokens.astype(np.int32)
    rows, length = tokens.shape
    for name in ("valid", "targets", "positions"):
        if name in held and held[name].shape != tokens.shape:
            raise ValueError(f"`{name}` has the shape {held[name].shape}, but there are {rows} rows of {length} "
                             "tokens.")
    if (vocab := model.config.llm.vocab) <= tokens.max(initial=0) or tokens.min(initial=0) < -1:
        raise ValueError(f"`tokens` holds ids from {tokens.min()} to {tokens.max()}; this model has 0 to {vocab - 1}, "
                         "and -1 for soft tokens.")
    soft = tokens == -1
    marked = np.zeros(tokens.shape, bool) if targets is None else targets != NO_TARGET
    if targets is not None and np.any(marked & (targets != np.where(soft, NO_TARGET, tokens))):
        raise ValueError("`targets` differ from `tokens` where they are not -100: they are the tokens themselves, "
                         "at their own places (as transformers' labels), not moved by one.")
    if soft.any() and "images" not in held:
        raise ValueError("`tokens` marks places of soft tokens (-1), but there are no `images`.")
    images = held.get("images")
    if images is not None:
        images = images[:, None] if images.ndim == 4 else images
        images = images.astype(np.float32)
        if len(images) != rows:
            raise ValueError(f"`images` has {len(images)} rows, the text {rows}. Several images a row are given as "
                             "[B,F,3,H,W].")
        room = images.shape[1] * model.config.image_tokens
        if (most := soft.sum(1).max(initial=0)) > room:
            raise ValueError(f"`tokens` marks {most} places of soft tokens in a row, its images become {room}.")
    media = {name.removeprefix("media_"): _narrow(x) for name, x in held.items() if name.startswith("media_")}
    mixed = [*media]
    if "image" in media:  # of a model that mixes senses
        images = media.pop("image")[:, None]
    return Batch(
        tokens=np.where(soft, 0, tokens),
        soft_index=np.where(soft, np.cumsum(soft, axis=1) - 1, -1).astype(np.int32),
        valid=held["valid"].astype(bool) if "valid" in held else np.ones(tokens.shape, bool),
        loss_mask=marked,
        positions=held.get("positions", np.tile(np.arange(length), (rows, 1))).astype(np.int32),
        padded_length=np.full(rows, length, np.int32),
        images=images,
        media=media or None,
        weights={name: held.get(f"weight_{name}", np.ones(rows)).astype(np.float32) for name in mixed} or None,
    ), given


def _narrow(x: np.ndarray) -> np.ndarray:
    """An array as JAX holds it."""
    return x.astype(np.float32 if np.issubdtype(x.dtype, np.floating) else np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def compute(module: nn.Module, family: Family, wanted: frozenset[str], has_targets: bool, params: Any, batch: Batch,
            given: Any = None) -> dict[str, jax.Array]:
    """Those of the `wanted` stages that these inputs reach; nothing else is computed."""
    found = stages(module, family, params, batch, given, has_targets)
    return {name: x for name, x in found.items() if name in wanted}


def stages(module: nn.Module, family: Family, params: Any, batch: Batch, given: Any = None,
           has_targets: bool = False) -> dict[str, jax.Array]:
    """`{name: array}`: every stage that these inputs reach.

    given: vectors that enter the first layer, in place of those of the tokens
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
    """What modules gave, by stage: scanned layers one by one, in the original's shapes."""
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
    """With those leading axes of ours as one that are one in the original."""
    if stage.flatten is None:
        return value
    start, stop = stage.flatten
    return value.reshape(*value.shape[:start], -1, *value.shape[stop:])


@functools.cache
def known(family: Family, config: Any) -> dict[str, Stage]:
    """`{name: stage}`: all that such a model has, in order."""
    made = jax.eval_shape(functools.partial(stages, family.Model(config), family, has_targets=True),
                          trees.unflatten(shapes(family, config)), family.example(config))
    found = {}
    for stage in family.stages:
        pattern = re.compile(re.escape(stage.name).replace(re.escape(NUMBER), r"(\d+)"))
        matches = [match for match in map(pattern.fullmatch, made) if match]
        numbers = sorted(int(match[1]) if NUMBER in stage.name else 0 for match in matches)
        found |= {stage.of(number).name: stage.of(number) for number in numbers}
    return found


def summary(names: Collection[str]) -> list[str]:
    """Names with the layers of a tower as one: `llama_layer_0…31`."""
    groups: dict[str, list[int]] = {}
    for name in names:
        stem, _, number = name.rpartition("_")
        numbers = groups.setdefault(f"{stem}_" if number.isdigit() else name, [])
        if number.isdigit():
            numbers.append(int(number))
    return [name + (f"{min(numbers)}…{max(numbers)}" if len(numbers) > 1 else "".join(map(str, numbers)))
            for name, numbers in groups.items()]


def compare(stage: Stage, got: Any, expected: np.ndarray, valid: np.ndarray, tolerance: float) -> Compared:
    """got, expected: arrays of one shape, but for axes of length 1. Of the language model's stages only the places that
    are `valid` bool[B,T] are compared."""
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    nan = float("nan")
    if [n for n in got.shape if n != 1] != [n for n in expected.shape if n != 1]:
        return Compared(stage, got.shape, nan, nan, nan, tolerance, "shape",
                        f"the original's has the shape {expected.shape}, ours {got.shape}")
    shape, expected = got.shape, expected.reshape(got.shape)
    if stage.kind == "decoder":
        got, expected = got[valid], expected[valid]
    if wrong := [whose for whose, x in (("the original's", expected), ("ours", got)) if not np.isfinite(x).all()]:
        return Compared(stage, shape, nan, nan, nan, tolerance, "parts",
                        f"{' and '.join(wrong)} holds numbers that are not finite")
    apart, size = np.abs(got.astype(np.float64) - expected), np.abs(expected)
    absolute = float(apart.max(initial=0))
    relative, typical = _share(absolute, size.max(initial=0)), _share(np.median(apart), np.median(size))
    agrees = max(relative, typical) <= tolerance
    return Compared(stage, shape, absolute, relative, typical, tolerance, "agrees" if agrees else "parts")


def _share(difference: float, scale: float) -> float:
    """Of nothing, everything is too much."""
    return float(difference / scale) if scale else float("inf") if difference else 0.0


def verdict(rows: list[Compared]) -> str:
    """Where the two first part, in words."""
    place = next((i for i, row in enumerate(rows) if row.verdict != "agrees"), None)
    if place is None:
        return f"All {len(rows)} stages agree."
    row = rows[place]
    how = row.words or (f"{max(row.relative, row.typical):.1e} where {row.tolerance:.0e} is allowed")
    before = (f"{rows[place - 1].stage.name}, which comes before it in the file, agrees" if place
              else "nothing before it was compared")
    return (f"They first part at {row.stage.name}: {how}; {before}. It reads {row.stage.reads}; in the original that "
            f"is {row.stage.original}. Whatever comes after it can only be judged when this is right.")


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
