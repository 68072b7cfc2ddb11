"""Checkpoints of a training run: the trained part, the optimizer, the step and how far the run is, saved while training
goes on.

    FOLDER/STEP/           an Orbax checkpoint: nested dicts of arrays, readable without mmjax
    FOLDER/STEP/seal.json  how far the run was, and the SHA-256 of the files: TensorStore alone does not notice when a
                           byte of an array has changed
    FOLDER/STEP.damaged/   one that was not as it was saved when a run wanted to go on from it

A checkpoint is written under another name, read back, sealed, and then given its own, so whatever ends the process
leaves only whole ones. An older one goes when a newer one is sealed. The frozen weights are not in them: they are in
the converted checkpoint that the run's card names, and the seal has their fingerprints.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mmjax import files, trees
from mmjax.checkpoints import format1, storage

SEAL = "seal.json"
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax writes them behind the seal; nothing here reads them
DAMAGED, REMOVED, UNFINISHED = ".damaged", ".removed", ".orbax-checkpoint-tmp"  # behind the step in a folder's name


class Damaged(ValueError):
    """A checkpoint is not as it was saved; the message says what differs."""


class NotSaved(OSError):
    """A checkpoint could not be written; the message says why, and which ones are there."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run has to know beside its state, to go on as if it had never stopped.

    position: where in the sequence of samples the next batch begins
    total:    of the training losses since the last step at which `save_every` was due, of `count` steps
    loss:     their mean, where it is due just now
    records:  how many each source of the data has
    frozen:   `{path: fingerprint}` of the frozen parameters
    """

    position: int = 0
    total: float = 0.0
    count: int = 0
    loss: float | None = None
    records: tuple[int, ...] = ()
    frozen: dict[str, int] = dataclasses.field(default_factory=dict)

    def after(self, loss: float, position: int) -> "Progress":
        """One step further."""
        return dataclasses.replace(
            self, position=position, total=self.total + loss, count=self.count + 1, loss=None)

    def due(self) -> "Progress":
        """The same where `save_every` is due: the losses since the last time are averaged, and counted anew."""
        return dataclasses.replace(self, total=0.0, count=0, loss=self.total / self.count)


def _plain(state: Any) -> Any:
    """The state as nested dicts of arrays: what stays readable without mmjax's classes."""
    flat = {}

    def add(path: str, leaf: Any) -> None:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        flat[path] = jax.random.key_data(leaf) if is_key else leaf

    trees.map_with_path(add, state)
    return trees.unflatten(flat)


def _restored(state: Any, flat: dict[str, Any]) -> Any:
    """`state` with its leaves taken from what `_plain` made, by path."""

    def pick(path: str, leaf: Any) -> Any:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(flat[path]) if is_key else flat[path]

    return trees.map_with_path(pick, state)


def seal(folder: Path, progress: Progress) -> None:
    """Writes down what is in a checkpoint, when everything in it is on the disk."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in LATER)
    for path in [*found, *(path for path in folder.rglob("*") if path.is_dir())]:
        files.sync(path)
    content = {"progress": dataclasses.asdict(progress),
               "files": {path.relative_to(folder).as_posix(): files.sha256(path) for path in found}}
    files.replace(folder / SEAL, json.dumps({"sha256": _sha256_of(content)} | content, indent=1) + "\n")


def verify(folder: Path) -> Progress:
    """How far the run was, if every file of the checkpoint is as it was saved. Raises `Damaged` naming those that are
    not."""
    content = _read_seal(folder)
    wrong = [f"{name} {'has changed' if (folder / name).is_file() else 'is missing'}"
             for name, expected in content["files"].items()
             if not (folder / name).is_file() or files.sha256(folder / name) != expected]
    if wrong:
        raise Damaged(f"{folder} is damaged: {', '.join(wrong)}.")
    return _progress(content)


def _read_seal(folder: Path) -> dict[str, Any]:
    path = folder / SEAL
    if not path.is_file():
        raise Damaged(f"{folder} is damaged: {SEAL} is missing.")
    try:
        content = json.loads(path.read_bytes())
        if content.pop("sha256") != _sha256_of(content):
            raise ValueError
    except (ValueError, KeyError, AttributeError) as error:  # not JSON, or no object, or other words in it
        raise Damaged(f"{folder} is damaged: {SEAL} has changed.") from error
    return content


def _progress(content: dict[str, Any]) -> Progress:
    told = content["progress"]
    frozen = {format1.rename(path): found for path, found in told["frozen"].items()}
    return Progress(**(told | {"records": tuple(told["records"]), "frozen": frozen}))


def _sha256_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def saved(folder: Path) -> list[int]:
    """The steps that are saved in a folder, in order."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def trained(folder: str | Path, step: int | None = None) -> dict[str, Any]:
    """`{path: array}`: the trained parameters of a run's newest checkpoint, or of that `step`, on the first device.

    Raises FileNotFoundError if there is none, `Damaged` if it is not as it was saved.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder of training checkpoints at {folder}.")
    place = folder / str(_chosen(folder, step))
    try:
        verify(place)
    except Damaged as error:
        raise Damaged(f"{error} Start the run again, and it goes on from the checkpoint before it; or delete that "
                      "folder to use the one before it as it is.") from error
    return {path.removeprefix("params/"): leaf for path, leaf in arrays(place).items() if path.startswith("params/")}


def arrays(place: Path) -> dict[str, jax.Array]:
    """`{path: array}`: everything in one checkpoint, on the first device, whatever the mesh it was saved from."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as reader:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first),
                              reader.metadata(storage.local(place)).item_metadata.tree)
        held = trees.flatten(reader.restore(storage.local(place), shapes))
    return {format1.rename(path): leaf for path, leaf in held.items()}


def _chosen(folder: Path, step: int | None) -> int:
    """That step, or the newest. Raises FileNotFoundError."""
    steps = saved(folder)
    if not steps or step not in (None, *steps):
        raise FileNotFoundError(f"{folder} has no checkpoint"
                                + ("." if step is None else f" of step {step}; it has {steps}."))
    return steps[-1] if step is None else step


class _Sealing(ocp.StandardCheckpointHandler):
    """Orbax's, which also reads a checkpoint back and seals it when its arrays are written, before it is given its
    name."""

    progress: Progress

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        storage.read_back(directory)
        seal(Path(directory), self.progress)


@ocp.args.register_with_handler(_Sealing, for_save=True)
class _Save(ocp.args.StandardSave):
    pass


@ocp.args.register_with_handler(_Sealing, for_restore=True)
class _Restore(ocp.args.StandardRestore):
    pass


@contextlib.contextmanager
def suppress_duplicate_errors() -> Iterator[None]:
    """Inside, what fails while a checkpoint is saved is told as `NotSaved` alone. Orbax logs it too, with a traceback
    from each of its threads, and lets TensorStore answer to an event loop that is closed by then."""
    logger = logging.getLogger("absl")

    def other(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or "orbax" not in record.pathname

    logger.addFilter(other)
    try:
        with files.ignore_closed_event_loop():
            yield
    finally:
        logger.removeFilter(other)


class Checkpoints:
    """The training checkpoints of a run that is under way: the newest `keep` of them, and the one with the lowest
    `Progress.loss` if `keep_best`.

    Opening them removes what an ended process left unfinished, so one run at a time may have a folder open.
    """

    def __init__(self, folder: str | Path, keep: int = 2, keep_best: bool = False):
        self.folder, self._keep, self._keep_best = Path(folder).absolute(), keep, keep_best
        storage.local(folder)  # refused before anything is made
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        self._handler = _Sealing()
        self._writer = ocp.AsyncCheckpointer(self._handler)
        self._saving: int | None = None

    @property
    def steps(self) -> list[int]:
        """Those that are saved, in order, the one that is just being saved left out."""
        return saved(self.folder)

    @property
    def latest(self) -> int | None:
        """The newest step that was saved, or is just being saved; None if there is none."""
        return max((*self.steps, *([] if self._saving is None else [self._saving])), default=None)

    def save(self, step: int, state: Any, progress: Progress) -> None:
        """Starts saving; the state's arrays may be reused as soon as this returns. Raises `NotSaved`, for the
        checkpoint before it too."""
        if step == self.latest:
            return
        self.wait()
        self._handler.progress, self._saving = progress, step
        with self._explained():
            self._writer.save(storage.local(self.folder) / str(step), args=_Save(_plain(state)))

    def check(self) -> None:
        """Raises `NotSaved` if the checkpoint that is being saved could not be, without waiting for it."""
        with self._explained():
            self._writer.check_for_errors()

    def wait(self) -> None:
        """Until everything is on the disk. Raises `NotSaved`."""
        if self._saving is not None:
            with self._explained():
                self._writer.wait_until_finished()
            self._saving = None
            self._remove_old()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # TensorStore, Orbax and the file system each have their own
            step, self._saving = self._saving, None
            self._writer = ocp.AsyncCheckpointer(self._handler)  # the old one would tell the same again
            self._remove_leftovers()  # makes room; what is still being written goes when the run goes on
            there = f"Those of steps {self.steps} are whole" if self.steps else "None had been saved before"
            raise NotSaved(f"The checkpoint of step {step} could not be saved in {self.folder}: "
                           f"{storage.explained(error.__cause__ or error)}\n{there}. See to it that the folder can be "
                           "written and has room; then the same command goes on.") from error

    def progress(self, step: int | None = None) -> Progress:
        """How far the run was at `step` (default the newest).

        Raises FileNotFoundError if that was never saved, `Damaged` if its seal is not whole.
        """
        return _progress(_read_seal(self.folder / str(self._whole(step))))

    def verify(self, step: int) -> None:
        """Raises `Damaged` if the checkpoint of that step is not as it was saved."""
        verify(self.folder / str(step))

    def set_aside(self, step: int) -> Path:
        """Where a damaged checkpoint is now, out of the way of the one that will take its place."""
        place = self.folder / f"{step}{DAMAGED}"
        shutil.rmtree(place, ignore_errors=True)
        return (self.folder / str(step)).rename(place)

    def restore(self, state: Any, step: int | None = None) -> Any:
        """The state saved at `step` (default the newest), on the devices where `state`'s leaves are.

        Raises FileNotFoundError if that step was never saved, ValueError naming what differs from `state`. Whether it
        is as it was saved is `verify`'s to say.
        """
        step = self._whole(step)
        place = storage.local(self.folder) / str(step)
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _plain(state))
        wanted, held = trees.flatten(wanted), trees.flatten(self._writer.metadata(place).item_metadata.tree)
        names = format1.stored_names(held)
        if differences := trees.compare(wanted, {path: held[name] for path, name in names.items()}):
            raise ValueError(f"{place} was saved by a run with other trained parameters or another optimizer:\n  "
                             + "\n  ".join(differences))
        wanted = trees.unflatten({names[path]: leaf for path, leaf in wanted.items()})
        read = trees.flatten(self._writer.restore(place, args=_Restore(wanted)))
        return _restored(state, {path: read[name] for path, name in names.items()})

    def _whole(self, step: int | None) -> int:
        self.wait()  # the newest may still be on its way to the disk
        return _chosen(self.folder, step)

    def _remove_old(self) -> None:
        """All but the newest and the best, when the newest is sure to be on the disk."""
        if jax.process_index():
            return
        files.sync(self.folder)
        steps = self.steps
        kept = set(steps[-self._keep :])
        if self._keep_best and (losses := self._losses(steps)):
            kept.add(min(losses, key=losses.__getitem__))
        for step in set(steps) - kept:
            place = self.folder / f"{step}{REMOVED}"  # half of a checkpoint must not bear its name
            shutil.rmtree((self.folder / str(step)).rename(place), ignore_errors=True)

    def _losses(self, steps: list[int]) -> dict[int, float]:
        """Of those steps at which `save_every` was due."""
        losses = {}
        for step in steps:
            with contextlib.suppress(Damaged):
                losses[step] = _progress(_read_seal(self.folder / str(step))).loss
        return {step: loss for step, loss in losses.items() if loss is not None}

    def _remove_leftovers(self) -> None:
        if jax.process_index():
            return
        for path in self.folder.iterdir():
            step, dot, kind = path.name.partition(".")
            if step.isdigit() and (dot + kind == REMOVED or (dot + kind).startswith(UNFINISHED)):
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Waits until everything is on the disk. Raises `NotSaved`."""
        try:
            self.wait()
        finally:
            self._writer.close()
