"""Resuming a run: which changes are allowed since it stopped, and the newest undamaged checkpoint."""

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from mmjax import files, trees
from mmjax.checkpoints import converted
from mmjax.checkpoints.training import Checkpoints, DamagedError, Progress
from mmjax.config import RunConfig
from mmjax.training import distributed, steps

SHOWN = 20  # differences that an error names
# Settings that must not change, because the saved state depends on them. Others may: rates, length, batch size and
# packing, devices, which checkpoints are kept; and the paths of files, whose content `check_unchanged` compares.
FIXED = (
    "phase", "trained", "seed", "image_size",
    "weights/(dtype|frozen_dtype)",
    "data/(format|mixture|seed|prompts|clean_captions|random_crop)", r"data/mixture/\d+/(format|ratio)",
    "data/scenes/(count|seed|most)",
    "text/.*",
    "optim/(accumulate|average|beta1|beta2|eps)",
)


def differences(config: RunConfig, out: Path) -> str:
    """Returns a sentence listing how a configuration differs from the run's; "" if it does not differ.

    Raises ValueError naming every difference that prevents resuming, FileNotFoundError or ValueError if `run.json` is
    missing or damaged.
    """
    path = out / converted.RUN_CARD
    if not path.is_file():
        raise FileNotFoundError(f"{out / 'checkpoints'} has checkpoints, but there is no {path}, which describes "
                                "their run. Restore it, or choose another `out`.")
    card = converted.read_run_card(out)
    converted.require(path, card, config=dict)
    changed = list(_changes(card["config"], json.loads(json.dumps(dataclasses.asdict(config)))))
    lines = {name: f"{name.replace('/', '.')} {before!r} -> {now!r}" for name, before, now in changed}
    if refused := [lines[name] for name, before, now in changed
                   if trees.matches(name, FIXED) or name == "weights/start_from" and None in (before, now)]:
        raise ValueError(
            f"The run in {out} cannot resume with these changes:\n  " + "\n  ".join(refused)
            + "\nUse the settings it began with; or begin another run: choose another `out`, and weights.start_from = "
            f"{str(out)!r} to start from its result.")
    return f"Changed since it began: {', '.join(lines.values())}." if lines else ""


def inputs(config: RunConfig, records: Sequence[Any], stored: Any | None) -> dict[str, Any]:
    """Returns what identifies the files that a run reads, for its card: `files`, `{name: fingerprint}`, and the
    `architecture` of the source checkpoint.

    records: of each source
    stored:  the `mmjax.data.features.Features` that are read in place of images; None to read images

    Files are named by the number of their source, so the data may be moved. Files of images are not read.
    """
    source = converted.ConvertedCheckpoint.open(config.weights.checkpoint)
    found: dict[str, str] = {}
    for number, each in enumerate(records):
        prints = each.fingerprints() if hasattr(each, "fingerprints") else {}
        for file, fingerprint in prints.items():
            name = f"data.{number}/{os.path.basename(file)}"
            found[name if name not in found else f"data.{number}/{len(found)}/{os.path.basename(file)}"] = fingerprint
    for path in sorted((source.folder / "tokenizer").glob("*")):
        if path.is_file():
            found[f"tokenizer/{path.name}"] = f"SHA-256 {files.sha256(path)}"
    if stored is not None:
        card = {name: value for name, value in dataclasses.asdict(stored.card).items() if name != "folders"}
        found["features"] = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()
    return json.loads(json.dumps({"files": found, "architecture": dataclasses.asdict(source.config)}))


def changed_inputs(now: Mapping[str, Any], out: Path, allowed: bool) -> list[str]:
    """Returns a line for each difference between the `inputs` in the run's card and those of now.

    allowed: whether the run may resume with them

    Raises ValueError naming the differences if they are not allowed. Features that only one of them has are ignored:
    they give the same results as the images.
    """
    before = converted.read_run_card(out).get("inputs")
    if not isinstance(before, Mapping) or not isinstance(before.get("files"), Mapping):
        return ["Its data and tokenizer cannot be compared: the run began with an mmjax that did not record them."]
    old, new = before["files"], now["files"]
    lines = [f"{name}: {old.get(name, 'not read')} -> {new.get(name, 'not read')}"
             for name in sorted(old.keys() | new.keys())
             if old.get(name) != new.get(name) and not (name == "features" and None in (old.get(name), new.get(name)))]
    lines += [f"architecture.{name.replace('/', '.')}: {was!r} -> {value!r}"
              for name, was, value in _changes(before.get("architecture"), now["architecture"])]
    if lines and not allowed:
        shown = lines[:SHOWN] + ([f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])
        raise ValueError(
            f"The run in {out} cannot resume: files that it reads have changed since:\n  " + "\n  ".join(shown)
            + "\nRestore them; or set allow_changed_inputs = True to resume with them, which the run's card will say; "
            f"or begin another run: choose another `out`, and weights.start_from = {str(out)!r}.")
    return [f"Resuming with changed files, as allow_changed_inputs permits: {', '.join(lines)}."] if lines else []


def history(out: Path, step: int, changed: Sequence[str]) -> list[Any]:
    """Returns, for the run's card, the steps at which a run resumed with what had changed, with this one."""
    card = converted.read_run_card(out) if (out / converted.RUN_CARD).is_file() else {}
    before = card.get("resumed")
    return (before if isinstance(before, list) else []) + ([{"step": step, "changed": [*filter(None, changed)]}]
                                                           if step else [])


def run_id(out: Path) -> str:
    """Returns the id in a run's card; a new one for a run without an id."""
    card = converted.read_run_card(out) if (out / converted.RUN_CARD).is_file() else {}
    return card["id"] if isinstance(card.get("id"), str) else uuid.uuid4().hex


def _changes(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (path, before, now) wherever two configurations differ. A field that only one of them has belongs to
    another version of mmjax and is ignored."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = ({str(index): value for index, value in enumerate(values)} for values in (before, now))
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted(before.keys() & now.keys()):
            yield from _changes(before[key], now[key], f"{name}/{key}" if name else key)
    elif before != now:
        yield name, before, now


def fingerprints(frozen: Any) -> dict[str, int]:
    """Returns `{path: steps.fingerprint}` of the frozen parameters."""
    flat = {path: leaf for path, leaf in trees.flatten(frozen).items() if leaf is not None}
    return {path: int(value) for path, value in jax.device_get(_fingerprints(flat)).items()}


@jax.jit
def _fingerprints(flat: dict[str, Any]) -> dict[str, jax.Array]:
    return {path: steps.fingerprint(leaf) for path, leaf in flat.items()}


def check_unchanged(saved: Progress, now: Progress, out: Path) -> None:
    """Raises ValueError if the frozen parameters or the data are not those of the saved run. Parameters that only one
    of them has loaded are not compared: with stored features the encoder is not loaded."""
    common = sorted(saved.frozen.keys() & now.frozen.keys())
    if changed := [path for path in common if saved.frozen[path] != now.frozen[path]]:
        raise ValueError(
            f"{len(changed)} of the {len(common)} frozen parameters are not those that the run in {out} was trained "
            f"with: {', '.join(changed[:5])}{', …' if len(changed) > 5 else ''}. Name its checkpoint "
            "(weights.checkpoint, weights.start_from), or another `out`.")
    if saved.records != now.records:
        raise ValueError(
            f"The run in {out} was trained on sources of {', '.join(map(str, saved.records))} records; now they have "
            f"{', '.join(map(str, now.records))}, so its position in them is no longer valid. Restore the data; or "
            f"begin another run: choose another `out`, and weights.start_from = {str(out)!r}.")


def newest(checkpoints: Checkpoints, console: Console) -> int | None:
    """Returns the newest step whose checkpoint is undamaged; None if nothing was saved.

    Damaged newer checkpoints are renamed, with a message. Raises `DamagedError` if all are damaged; then none is
    renamed.
    """
    whole, problems = 0, {}
    if distributed.is_primary():
        for step in reversed(checkpoints.steps):
            try:
                checkpoints.verify(step)
            except DamagedError as error:
                problems[step] = str(error)
            else:
                whole = step
                break
        for step, problem in problems.items() if whole else ():
            console.print(f"{problem} It is kept as {checkpoints.set_aside(step)}.", highlight=False, style="yellow")
    whole, damaged = distributed.all_sum(whole, len(problems))
    if damaged and not whole:
        raise DamagedError("None of the checkpoints can be resumed from:\n  " + "\n  ".join(problems.values())
                           + f"\nRestore one of them; or delete {checkpoints.folder} to start over.")
    return whole or None


def restore(state: steps.TrainState, now: Progress, checkpoints: Checkpoints, mesh: Any, out: Path,
            console: Console) -> tuple[steps.TrainState, Progress]:
    """Returns the state and progress of the newest undamaged checkpoint; without one, the given ones, of a new run.

    Raises ValueError if the frozen parameters, the data, or the trained parameters are not those of the run.
    """
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def on_mesh(leaf: jax.Array) -> jax.Array:
        return leaf if isinstance(leaf.sharding, jax.sharding.NamedSharding) else jax.device_put(leaf, replicated)

    state = jax.tree.map(on_mesh, state)
    if (step := newest(checkpoints, console)) is None:
        return state, now
    saved = checkpoints.progress(step)
    check_unchanged(saved, now, out)
    return checkpoints.restore(state, step), dataclasses.replace(saved, frozen=saved.frozen | now.frozen)
