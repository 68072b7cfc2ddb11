"""Checkpoints of a training run: the trained part, the optimizer and the step, saved while training goes on.

The frozen weights are not in them: they are in the converted checkpoint that the run's card names.
"""

from pathlib import Path
from typing import Any

import jax

from mmjax import trees


def _plain(state: Any) -> Any:
    """The state as nested dicts of arrays: what stays readable without mmjax's classes."""
    flat = {}

    def add(path: str, leaf: Any) -> None:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        flat[path] = jax.random.key_data(leaf) if is_key else leaf

    trees.map_with_path(add, state)
    return trees.unflatten(flat)


def _restored(state: Any, plain: Any) -> Any:
    """`state` with its leaves taken from what `_plain` made."""
    flat = trees.flatten(plain)

    def pick(path: str, leaf: Any) -> Any:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(flat[path]) if is_key else flat[path]

    return trees.map_with_path(pick, state)


def trained(folder: str | Path, step: int | None = None) -> dict[str, Any]:
    """`{path: array}`: the trained parameters of a run's newest checkpoint, or of that `step`.

    Raises FileNotFoundError if there is none.
    """
    if not Path(folder).is_dir():  # opening it would make it
        raise FileNotFoundError(f"There is no folder of training checkpoints at {folder}.")
    checkpoints = Checkpoints(folder)
    try:
        return trees.flatten(checkpoints.read(step)["params"])
    finally:
        checkpoints.close()


class Checkpoints:
    """The training checkpoints of one run folder, newest `keep` of them."""

    def __init__(self, folder: str, keep: int = 2):
        import orbax.checkpoint as ocp

        self._args = ocp.args
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(
            Path(folder).absolute(), item_handlers=ocp.StandardCheckpointHandler(), options=options)

    @property
    def latest(self) -> int | None:
        """The newest step that was saved, or is just being saved; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Starts saving; the state's arrays may be reused as soon as this returns."""
        if step != self.latest:
            self._manager.save(step, args=self._args.StandardSave(_plain(state)))

    def restore(self, state: Any, step: int | None = None) -> Any:
        """The state saved at `step` (default the newest), on the devices where `state`'s leaves are.

        Raises FileNotFoundError if that step was never saved, ValueError naming what differs from `state`
        or that it is damaged.
        """
        step = self._saved(step)
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _plain(state))
        saved = trees.flatten(self._manager.item_metadata(step).tree)
        if differences := trees.compare(trees.flatten(wanted), saved):
            raise ValueError(
                f"The checkpoint of step {step} in {self._manager.directory} was saved by a run with other trained "
                "parameters or another optimizer:\n  " + "\n  ".join(differences))
        return _restored(state, self._read(step, wanted))

    def read(self, step: int | None = None) -> dict[str, Any]:
        """Everything saved at `step` (default the newest) as nested dicts, on the first device."""
        step = self._saved(step)
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        saved = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                             self._manager.item_metadata(step).tree)
        return self._read(step, saved)

    def _read(self, step: int, wanted: Any) -> Any:
        try:
            return self._manager.restore(step, args=self._args.StandardRestore(wanted))
        except Exception as error:  # Orbax wraps TensorStore's ValueError in a bare Exception
            cause = error.__cause__ or error
            if not isinstance(cause, ValueError):
                raise
            folder = self._manager.directory / str(step)
            raise ValueError(f"{folder} is damaged; delete it to go on from the checkpoint before it. "
                             f"{cause}") from error

    def _saved(self, step: int | None) -> int:
        self._manager.wait_until_finished()  # the newest may still be on its way to the disk
        steps = sorted(self._manager.all_steps())
        if not steps or step not in (None, *steps):
            raise FileNotFoundError(f"{self._manager.directory} has no checkpoint"
                                    + ("." if step is None else f" of step {step}; it has {steps}."))
        return steps[-1] if step is None else step

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
