"""Going on with a run: what may have changed since it stopped, and the newest checkpoint that is whole."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from mmjax import trees
from mmjax.checkpoints import converted
from mmjax.checkpoints.training import Checkpoints, Damaged, Progress
from mmjax.config import RunConfig
from mmjax.training import distributed, steps

# What the saved state was made with and would no longer mean the same without. How the run goes on from there (rates,
# its length, rows of a batch and packing, devices, what is kept) may change, and so may the place of files, whose
# content is compared instead: see `same`.
FIXED = (
    "phase", "trained", "seed", "image_size",
    "weights/(dtype|frozen_dtype)",
    "data/(format|mixture|seed|prompts|clean_captions|random_crop)", r"data/mixture/\d+/(format|ratio)",
    "data/scenes/(count|seed|most)",
    "text/.*",
    "optim/(accumulate|average|beta1|beta2|eps)",
)


def differences(config: RunConfig, out: Path) -> str:
    """In what a configuration differs from that of the run so far, in words; "" if in nothing.

    Raises ValueError naming every difference that the run cannot go on with, FileNotFoundError or ValueError if the
    run's card is not there or damaged.
    """
    path = out / converted.RUN_CARD
    if not path.is_file():
        raise FileNotFoundError(f"{out / 'checkpoints'} has checkpoints, but there is no {path} to tell what they are "
                                "of. Put it back, or name another `out`.")
    card = converted.read_run_card(out)
    converted.require(path, card, "config")
    changed = list(_changes(card["config"], json.loads(json.dumps(dataclasses.asdict(config)))))
    lines = {name: f"{name.replace('/', '.')} {before!r} -> {now!r}" for name, before, now in changed}
    if refused := [lines[name] for name, before, now in changed
                   if trees.matches(name, FIXED) or name == "weights/start_from" and None in (before, now)]:
        raise ValueError(
            f"The run in {out} cannot go on with another\n  " + "\n  ".join(refused)
            + f"\nGive what it had; or begin another run: name another `out`, and weights.start_from = {str(out)!r} to "
            "start from what this one has learnt.")
    return f"Changed since it began: {', '.join(lines.values())}." if lines else ""


def _changes(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, before, now) wherever two configurations differ. A field that only one of them has is of another version
    of mmjax, and no difference."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = (dict(zip(map(str, range(len(each))), each, strict=True)) for each in (before, now))
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted(before.keys() & now.keys()):
            yield from _changes(before[key], now[key], f"{name}/{key}" if name else key)
    elif before != now:
        yield name, before, now


def fingerprints(frozen: Any) -> dict[str, int]:
    """`{path: steps.fingerprint}` of the frozen parameters."""
    held = {path: leaf for path, leaf in trees.flatten(frozen).items() if leaf is not None}
    return {path: int(found) for path, found in jax.device_get(_fingerprints(held)).items()}


@jax.jit
def _fingerprints(flat: dict[str, Any]) -> dict[str, jax.Array]:
    return {path: steps.fingerprint(leaf) for path, leaf in flat.items()}


def same(saved: Progress, now: Progress, out: Path) -> None:
    """Raises ValueError if the frozen parameters or the data are not those that a run had. Parameters that only one of
    them has loaded are not compared: with stored features the encoder is not."""
    common = sorted(saved.frozen.keys() & now.frozen.keys())
    if other := [path for path in common if saved.frozen[path] != now.frozen[path]]:
        raise ValueError(
            f"{len(other)} of the {len(common)} frozen parameters are not those that the run in {out} was trained "
            f"with: {', '.join(other[:5])}{', …' if len(other) > 5 else ''}. Name its checkpoint (weights.checkpoint, "
            "weights.start_from), or another `out`.")
    if saved.records != now.records:
        raise ValueError(
            f"The run in {out} was trained on sources of {', '.join(map(str, saved.records))} records; now they have "
            f"{', '.join(map(str, now.records))}, and its place in them would mean nothing. Put the data back; or "
            f"begin another run: name another `out`, and weights.start_from = {str(out)!r}.")


def newest(checkpoints: Checkpoints, console: Console) -> int | None:
    """The newest step whose checkpoint is as it was saved; None if nothing was ever saved.

    Newer ones that are not are set aside, with a word. Raises `Damaged` if none is; then all of them stay.
    """
    found, problems = 0, {}
    if distributed.is_primary():
        for step in reversed(checkpoints.steps):
            try:
                checkpoints.verify(step)
            except Damaged as error:
                problems[step] = str(error)
            else:
                found = step
                break
        for step, problem in problems.items() if found else ():
            console.print(f"{problem} It is kept as {checkpoints.set_aside(step)}.", highlight=False, style="yellow")
    found, damaged = distributed.all_sum(found, len(problems))
    if damaged and not found:
        raise Damaged("None of the checkpoints can be gone on from:\n  " + "\n  ".join(problems.values())
                      + f"\nPut one of them back; or delete {checkpoints.folder} to begin anew.")
    return found or None


def restore(state: steps.TrainState, now: Progress, checkpoints: Checkpoints, mesh: Any, out: Path,
            console: Console) -> tuple[steps.TrainState, Progress]:
    """The newest whole checkpoint's state, and how far the run was then; the given ones, of a run that begins, if there
    is none.

    Raises ValueError if the frozen parameters, the data, or what is trained are not those of the run.
    """
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def on_mesh(leaf: jax.Array) -> jax.Array:
        return leaf if isinstance(leaf.sharding, jax.sharding.NamedSharding) else jax.device_put(leaf, everywhere)

    state = jax.tree.map(on_mesh, state)
    if (step := newest(checkpoints, console)) is None:
        return state, now
    saved = checkpoints.progress(step)
    same(saved, now, out)
    return checkpoints.restore(state, step), dataclasses.replace(saved, frozen=saved.frozen | now.frozen)
