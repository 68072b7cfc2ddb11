"""Checkpoints of a training run: trained parameters, optimizer, step and progress, saved asynchronously.

    FOLDER/STEP/           an Orbax checkpoint: nested dicts of arrays, readable without mmjax
    FOLDER/STEP/seal.json  progress of the run, and the SHA-256 of the files: TensorStore alone does not detect a
                           changed byte of an array
    FOLDER/STEP.damaged/   a checkpoint that was found damaged when a run resumed

A checkpoint is written under a temporary name, read back, sealed and then renamed, so a process that ends at any time
leaves only complete checkpoints. An older one is deleted after a newer one is sealed. Frozen weights are not included:
they are in the converted checkpoint that the run's card names, and the seal has their fingerprints.
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
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax writes them after the seal; they are not read here
DAMAGED, REMOVED, UNFINISHED = ".damaged", ".removed", ".orbax-checkpoint-tmp"  # suffixes of a folder's name


class DamagedError(ValueError):
    """A checkpoint has changed since it was saved; the message says what differs."""


class SaveError(OSError):
    """A checkpoint could not be written; the message says why, and which checkpoints exist."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a run, which it needs besides its state to resume exactly.

    position: position in the sequence of samples where the next batch begins
    total:    sum of the training losses of the `count` steps since the last step at which `save_every` was due
    loss:     mean of these losses at a step at which `save_every` is due; None at other steps
    records:  number of records of each source of the data
    frozen:   `{path: fingerprint}` of the frozen parameters
    """

    position: int = 0
    total: float = 0.0
    count: int = 0
    loss: float | None = None
    records: tuple[int, ...] = ()
    frozen: dict[str, int] = dataclasses.field(default_factory=dict)

    def after(self, loss: float, position: int) -> "Progress":
        """Returns the progress after one more step."""
        return dataclasses.replace(
            self, position=position, total=self.total + loss, count=self.count + 1, loss=None)

    def due(self) -> "Progress":
        """Returns the progress at a step at which `save_every` is due, with the mean loss since the last such step."""
        return dataclasses.replace(self, total=0.0, count=0, loss=self.total / self.count)


def _plain(state: Any) -> Any:
    """Returns the state as nested dicts of arrays, which can be read without mmjax's classes."""
    flat = {}

    def add(path: str, leaf: Any) -> None:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        flat[path] = jax.random.key_data(leaf) if is_key else leaf

    trees.map_with_path(add, state)
    return trees.unflatten(flat)


def _restored(state: Any, flat: dict[str, Any]) -> Any:
    """Returns `state` with the leaves of a flattened result of `_plain`."""

    def pick(path: str, leaf: Any) -> Any:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(flat[path]) if is_key else flat[path]

    return trees.map_with_path(pick, state)


def seal(folder: Path, progress: Progress, run: str | None = None, step: int | None = None) -> None:
    """Flushes a checkpoint's files to the disk and writes its seal. run, step: the run's id and the step"""
    names = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in LATER)
    for path in [*names, *(path for path in folder.rglob("*") if path.is_dir())]:
        files.sync(path)
    content = {"run": run, "step": step, "progress": dataclasses.asdict(progress),
               "files": {path.relative_to(folder).as_posix(): files.sha256(path) for path in names}}
    files.replace(folder / SEAL, json.dumps({"sha256": _sha256_of(content)} | content, indent=1) + "\n")


def verify(folder: Path, run: str | None = None) -> Progress:
    """Returns the progress in a checkpoint. Raises `DamagedError` naming the files that changed since it was saved, or
    if it was saved at another step, or by another run than that with the id `run`. Seals of former versions of mmjax
    have neither step nor run."""
    content = _read_seal(folder)
    step, sealed = content.get("step"), content.get("run")
    if step is not None and str(step) != folder.name:
        raise DamagedError(f"{folder} is damaged: {SEAL} is that of step {step}.")
    if None not in (run, sealed) and run != sealed:
        raise DamagedError(f"{folder} is damaged: {SEAL} is that of another run, {sealed}, but "
                           f"{folder.parent.parent / 'run.json'} has {run}.")
    wrong = [f"{name} {'has changed' if (folder / name).is_file() else 'is missing'}"
             for name, expected in content["files"].items()
             if not (folder / name).is_file() or files.sha256(folder / name) != expected]
    if wrong:
        raise DamagedError(f"{folder} is damaged: {', '.join(wrong)}.")
    return _progress(content)


def _read_seal(folder: Path) -> dict[str, Any]:
    path = folder / SEAL
    if not path.is_file():
        raise DamagedError(f"{folder} is damaged: {SEAL} is missing.")
    try:
        content = files.read_json_object(path)
        if content.pop("sha256") != _sha256_of(content):
            raise ValueError
        names = content["files"]
        if not all(isinstance(name, str) and Path(name).parts and ".." not in Path(name).parts
                   and not Path(name).is_absolute() for name in names.keys()):
            raise ValueError
        _progress(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # other content
        raise DamagedError(f"{folder} is damaged: {SEAL} has changed.") from error
    return content


def _progress(content: dict[str, Any]) -> Progress:
    progress = content["progress"]
    frozen = {format1.rename(path): fingerprint for path, fingerprint in progress["frozen"].items()}
    return Progress(**(progress | {"records": tuple(progress["records"]), "frozen": frozen}))


def _sha256_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def saved(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder, in order."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def trained(folder: str | Path, step: int | None = None, run: str | None = None) -> dict[str, Any]:
    """Returns `{path: array}`: the trained parameters in a run's newest checkpoint, or that of `step`, on one device.

    run: id of the run, which the checkpoint must be of; None for any

    Raises FileNotFoundError if there is none, `DamagedError` if it has changed since it was saved.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder of training checkpoints at {folder}.")
    path = folder / str(_existing_step(folder, step))
    try:
        verify(path, run)
    except DamagedError as error:
        raise DamagedError(f"{error} Start the run again, and it resumes from the previous checkpoint; or delete that "
                           "folder to use the previous one as it is.") from error
    return {name.removeprefix("params/"): leaf for name, leaf in arrays(path).items() if name.startswith("params/")}


def arrays(checkpoint: Path) -> dict[str, jax.Array]:
    """Returns `{path: array}`: everything in a checkpoint, on the first device, whatever mesh it was saved from."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as reader:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first),
                              reader.metadata(storage.local(checkpoint)).item_metadata.tree)
        stored = trees.flatten(reader.restore(storage.local(checkpoint), shapes))
    return {format1.rename(path): leaf for path, leaf in stored.items()}


def _existing_step(folder: Path, step: int | None) -> int:
    """Returns `step`, or the newest step. Raises FileNotFoundError if it has no checkpoint."""
    steps = saved(folder)
    if not steps or step not in (None, *steps):
        raise FileNotFoundError(f"{folder} has no checkpoint"
                                + ("." if step is None else f" of step {step}; it has {steps}."))
    return steps[-1] if step is None else step


class _Sealing(ocp.StandardCheckpointHandler):
    """Orbax's handler, which also reads a checkpoint back and seals it before it is renamed."""

    progress: Progress
    run: str | None = None
    step: int | None = None

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        storage.read_back(directory)
        seal(Path(directory), self.progress, self.run, self.step)


@ocp.args.register_with_handler(_Sealing, for_save=True)
class _Save(ocp.args.StandardSave):
    pass


@ocp.args.register_with_handler(_Sealing, for_restore=True)
class _Restore(ocp.args.StandardRestore):
    pass


@contextlib.contextmanager
def suppress_duplicate_errors() -> Iterator[None]:
    """Suppresses the errors that Orbax logs from each of its threads while saving fails, and those of event loops that
    it has closed: `SaveError` reports the error once."""
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or "orbax" not in record.pathname

    logger.addFilter(keep)
    try:
        with files.ignore_closed_event_loop():
            yield
    finally:
        logger.removeFilter(keep)


class Checkpoints:
    """Saves and restores the checkpoints of a run: the newest `keep` of them, and that with the lowest `Progress.loss`
    if `keep_best`.

    Opening a folder removes unfinished checkpoints, so only one run at a time may have it open.

    run: id of the run; checkpoints of another one are not verified. None until it is known
    """

    run: str | None = None

    def __init__(self, folder: str | Path, keep: int = 2, keep_best: bool = False):
        self.folder, self._keep, self._keep_best = Path(folder).absolute(), keep, keep_best
        storage.local(folder)  # raises before anything is written
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        self._handler = _Sealing()
        self._writer = ocp.AsyncCheckpointer(self._handler)
        self._saving: int | None = None

    @property
    def steps(self) -> list[int]:
        """The steps of the saved checkpoints, in order, without the one that is being saved."""
        return saved(self.folder)

    @property
    def latest(self) -> int | None:
        """The newest step that is saved or being saved; None if there is none."""
        return max((*self.steps, *([] if self._saving is None else [self._saving])), default=None)

    def save(self, step: int, state: Any, progress: Progress) -> None:
        """Starts saving; the state's arrays may be reused when this returns.

        Raises `SaveError` if this or the previous checkpoint could not be saved.
        """
        if step == self.latest:
            return
        self.wait()
        self._handler.progress, self._saving = progress, step
        self._handler.run, self._handler.step = self.run, step
        with self._raise_save_error():
            self._writer.save(storage.local(self.folder) / str(step), args=_Save(_plain(state)))

    def check(self) -> None:
        """Raises `SaveError` if saving has failed, without waiting for it to end."""
        with self._raise_save_error():
            self._writer.check_for_errors()

    def wait(self) -> None:
        """Waits until everything is on the disk. Raises `SaveError`."""
        if self._saving is not None:
            with self._raise_save_error():
                self._writer.wait_until_finished()
            self._saving = None
            self._remove_old()

    @contextlib.contextmanager
    def _raise_save_error(self) -> Iterator[None]:
        """Raises `SaveError` in place of other errors."""
        try:
            yield
        except Exception as error:  # of TensorStore, Orbax or the file system
            step, self._saving = self._saving, None
            self._writer = ocp.AsyncCheckpointer(self._handler)  # the old one would raise the same error again
            self._remove_leftovers()  # makes room; what is still being written is removed when the run resumes
            saved = f"Those of steps {self.steps} are complete" if self.steps else "None had been saved before"
            raise SaveError(f"The checkpoint of step {step} could not be saved in {self.folder}: "
                            f"{storage.explained(error.__cause__ or error)}\n{saved}. Make sure that the folder can be "
                            "written and has room; the same command then resumes the run.") from error

    def progress(self, step: int | None = None) -> Progress:
        """Returns the progress of the run at `step` (default: the newest).

        Raises FileNotFoundError if that step has no checkpoint, `DamagedError` if its seal has changed.
        """
        return _progress(_read_seal(self.folder / str(self._saved_step(step))))

    def verify(self, step: int) -> None:
        """Raises `DamagedError` if the checkpoint of that step has changed since it was saved."""
        verify(self.folder / str(step), self.run)

    def set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint, which the run will write again, and returns its new path."""
        path = self.folder / f"{step}{DAMAGED}"
        shutil.rmtree(path, ignore_errors=True)
        return (self.folder / str(step)).rename(path)

    def restore(self, state: Any, step: int | None = None) -> Any:
        """Returns the state saved at `step` (default: the newest), with the shardings of `state`.

        Raises FileNotFoundError if that step has no checkpoint, ValueError naming what differs from `state`. Does not
        check for damage; see `verify`.
        """
        step = self._saved_step(step)
        path = storage.local(self.folder) / str(step)
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _plain(state))
        wanted, stored = trees.flatten(wanted), trees.flatten(self._writer.metadata(path).item_metadata.tree)
        names = format1.stored_names(stored)
        if differences := trees.compare(wanted, {today: stored[name] for today, name in names.items()}):
            raise ValueError(f"{path} was saved by a run with other trained parameters or another optimizer:\n  "
                             + "\n  ".join(differences))
        wanted = trees.unflatten({names[today]: leaf for today, leaf in wanted.items()})
        read = trees.flatten(self._writer.restore(path, args=_Restore(wanted)))
        return _restored(state, {today: read[name] for today, name in names.items()})

    def _saved_step(self, step: int | None) -> int:
        self.wait()  # the newest may still be written
        return _existing_step(self.folder, step)

    def _remove_old(self) -> None:
        """Removes all but the newest checkpoints and the best one, after flushing the folder to the disk."""
        if jax.process_index():
            return
        files.sync(self.folder)
        steps = self.steps
        kept = set(steps[-self._keep :])
        if self._keep_best and (losses := self._losses(steps)):
            kept.add(min(losses, key=losses.__getitem__))
        for step in set(steps) - kept:
            path = self.folder / f"{step}{REMOVED}"  # a partly removed checkpoint must not keep its name
            shutil.rmtree((self.folder / str(step)).rename(path), ignore_errors=True)

    def _losses(self, steps: list[int]) -> dict[int, float]:
        """Returns the losses at those of the steps at which `save_every` was due."""
        losses = {}
        for step in steps:
            with contextlib.suppress(DamagedError):
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
        """Waits until everything is on the disk. Raises `SaveError`."""
        try:
            self.wait()
        finally:
            self._writer.close()
