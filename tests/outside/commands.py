"""What the tests of families outside the package share."""

import json
from collections.abc import Callable
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


def check_killed_run(config: Callable[..., RunConfig], checkpoint: Path, trained: Path, folder: Path) -> None:
    """A run that is killed and resumed ends as `trained`, the same run that was left alone."""
    train_killed(config(checkpoint, folder / "killed"))
    expected, found = saved(trained), saved(folder / "killed")
    assert expected.keys() == found.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def check_data_and_features(config: Callable[..., RunConfig], checkpoint: Path, trained: Path, folder: Path) -> None:
    """The data are checked, and features that are computed once train as the encoder does in `trained`."""
    path = folder / "config.py"
    path.write_text(f"from {config.__module__} import config as settings\n\n\ndef config():\n"
                    f"    return settings({str(checkpoint)!r}, {str(folder / 'unused')!r})\n")
    call("data", "check", "--config", path, "--out", folder)
    assert json.loads((folder / "data_check.json").read_text())
    call("data", "features", "--config", path, "--out", folder / "features")
    run.train(config(checkpoint, folder / "cached", features=str(folder / "features")))
    for path, leaf in saved(trained).items():
        np.testing.assert_allclose(saved(folder / "cached")[path], leaf, rtol=0, atol=1e-5, err_msg=path)
