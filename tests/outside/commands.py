"""What the tests of families outside the package share."""

from pathlib import Path

import numpy as np
import pytest

from mmjax import cli
from mmjax.checkpoints import training as training_checkpoints
from mmjax.config import RunConfig
from mmjax.convert import torch_file
from mmjax.families import FAMILIES, Family
from mmjax.training import metrics_log, run


def call(*args) -> None:
    """A command line, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mmjax", *map(str, args)])
        cli.main()


def forget(*families: Family) -> None:
    """Removes families from the registry."""
    for family in families:
        if family.name in FAMILIES:
            FAMILIES.remove(family)


def encoder_file(path: Path) -> Path:
    """Writes random weights of Patchwork's encoder."""
    random = np.random.default_rng(0)

    def drawn(*shape):
        return random.normal(0, 0.2, shape).astype(np.float32)

    torch_file.save(path, {"embed.weight": drawn(24, 3, 16, 16), "embed.bias": drawn(24), "norm.weight": 1 + drawn(24),
                           "norm.bias": drawn(24)})
    return path


def saved(run_folder: Path) -> dict[str, np.ndarray]:
    """The newest checkpoint of a run."""
    step = training_checkpoints.saved(run_folder / "checkpoints")[-1]
    return {path: np.asarray(leaf) for path, leaf in
            training_checkpoints.arrays((run_folder / "checkpoints" / str(step)).absolute()).items()}


class Killed(BaseException):
    """Ends a run at once, as SIGKILL does: nothing is saved."""


def train_killed(config: RunConfig) -> None:
    """Trains, ends the run after its third step, and resumes it."""
    add = metrics_log.MetricsLog.add

    def killed(self, item, *rest):
        add(self, item, *rest)
        if item.number == 2:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_log.MetricsLog, "add", killed)
        with pytest.raises(Killed):
            run.train(config)
    run.train(config)
