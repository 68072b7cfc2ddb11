import dataclasses
import json
from pathlib import Path

import pytest

from mmjax import config
from mmjax.cli.train import overridden
from mmjax.config import OptimConfig, RunConfig
from mmjax.training import run
from tests import small

SHIPPED = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_configs(path):
    """They load, can be written into a run's card, and say in their docstring how to run them."""
    loaded = config.load(str(path))
    for job in loaded.values() if isinstance(loaded, dict) else [loaded]:
        json.dumps(dataclasses.asdict(job))
    assert f"python train.py --config configs/{path.name}" in path.read_text(encoding="utf-8")


def test_a_config_file_may_import_and_compute(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import mmjax.config as c\n\ndef config():\n    return c.RunConfig(out='runs/' + 'x', seed=42)\n")
    assert config.load(str(file)) == RunConfig(out="runs/x", seed=42)


def test_several_runs_by_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from mmjax.config import RunConfig\n\n"
                    "def config():\n    return {'first': RunConfig(out='a'), 'second': RunConfig(out='b')}\n")
    assert config.load(str(file)) == {"first": RunConfig(out="a"), "second": RunConfig(out="b")}


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="configs/no_such.py"):
        config.load("configs/no_such.py")


@pytest.mark.parametrize("text", ["", "config = 3", "def config():\n    return {'out': 'x'}"])
def test_files_that_define_no_run(tmp_path, text):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ValueError, match="mine.py must define a function"):
        config.load(str(file))


@pytest.mark.parametrize(("text", "message"), [
    ("def config(:\n", r"mine\.py: SyntaxError: .*line 1"),
    ("import no_such_package\n", r"mine\.py, line 1: ModuleNotFoundError: .*no_such_package"),
    ("from mmjax.config import RunConfig\n\ndef config():\n    return RunConfig(outt='x')\n",
     r"mine\.py, line 4: TypeError: .*outt"),
])
def test_files_that_cannot_be_run(tmp_path, text, message):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        config.load(str(file))


def test_renamed_field_in_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from mmjax.config import DataConfig, RunConfig\n\n"
                    "def config():\n    return RunConfig(data=DataConfig(pack_pictures=4))\n")
    with pytest.raises(ValueError, match=r"mine\.py, line 4: pack_pictures is called pack_images now$"):
        config.load(str(file))


@pytest.mark.parametrize(("args", "message"), [
    (["--data.pack-pictures", "4"], "--data.pack-pictures is called --data.pack-images now"),
    (["--seed", "1", "--data.pack_pictures=4"], "--data.pack_pictures is called --data.pack-images now"),
    (["--finetune.data.pack-pictures", "4"],
     "--finetune.data.pack-pictures is called --finetune.data.pack-images now"),
])
def test_renamed_field_on_the_command_line(args, message):
    """`cli.main` prints a ValueError as one line and exits with status 2."""
    with pytest.raises(ValueError, match=f"^{message}$"):
        overridden("configs/tiny_minigpt4.py", args, "train")


@pytest.mark.parametrize(("args", "remat"), [
    ([], False), (["--remat"], "full"), (["--remat", "--seed", "1"], "full"), (["--no-remat"], "none"),
    (["--remat", "gate"], "gate"), (["--seed", "1", "--remat", "True"], True), (["--remat", "none"], "none")])
def test_remat_alone_and_with_what_is_recomputed(args, remat):
    assert overridden("configs/tiny_minigpt4.py", args, "train").remat == remat


@pytest.mark.parametrize(("changes", "message"), [
    ({"remat": "most"}, "remat = 'most': one of none, gate, feed_forward, full, False, True"),
    ({"attention": "flash"}, "attention = 'flash': one of auto, xla, splash")])
def test_unknown_ways_to_compute(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run.check(small.run_config(tmp_path, **changes))


def test_steps_of_a_run():
    assert OptimConfig(epochs=3, steps_per_epoch=7).steps == 21
