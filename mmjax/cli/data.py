"""`mmjax data check | prepare | verify | features`: look at what a run is to be trained on, and prepare it."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mmjax import files
from mmjax.cli import options
from mmjax.config import RunConfig, Source
from mmjax.config import load as load_config


def data(args: Sequence[str]) -> None:
    """Look at what a run is to be trained on, and prepare it: data check, prepare, verify, features."""
    commands = {"check": data_check, "prepare": data_prepare, "verify": data_verify, "features": data_features}
    if not args or args[0] not in commands:
        print("usage: mmjax data {" + ",".join(commands) + "} ...\n")
        for name, command in commands.items():
            print(f"  {name:9} {command.__doc__.splitlines()[0]}")
        sys.exit(0 if args[:1] in (["--help"], ["-h"]) else 2)
    tyro.cli(options.local(commands[args[0]]), args=args[1:], prog=f"mmjax data {args[0]}")


def data_check(
    config: Path | None = None,
    format: str | None = None,
    path: str | None = None,
    root: str | None = None,
    tokenizer: Path | None = None,
    sample: int | None = None,
    max_bad_share: float | None = None,
    out: Path = Path("."),
) -> None:
    """Count what is in the data and what is wrong with them, before a run; exit status 1 if too much is wrong.

    Args:
        config: config file of the run; what follows takes the place of what it says. Its phases are checked in turn
        format: how the data lie on disk, if not as the config says
        path: the folder or file of that format
        root: folder that the images lie below, where that is not the data file's own
        tokenizer: folder of a tokenizer, to count captions in tokens where there is no config with its checkpoint;
            otherwise they are counted in words
        sample: records of each source to look at, drawn at random; all of them if this is not given
        max_bad_share: share of records with something wrong above which the exit status is 1
        out: folder for data_check.json and data_check.png, by phase where there are several
    """
    from rich.console import Console

    from mmjax.config import DataConfig
    from mmjax.data import check
    from mmjax.data.formats import FORMATS

    console = Console()
    if config is None and (format is None or path is None):
        raise ValueError("Name a config file, or a format and a path: data check --config configs/minigpt4_stage2.py, "
                         f"or data check --format FORMAT --path PATH. The formats are {', '.join(FORMATS)}.")
    built = load_config(str(config)) if config else RunConfig(data=DataConfig(path=""))
    too_bad = False
    for name, phase in (built if isinstance(built, dict) else {"": built}).items():
        named = {"format": format, "path": path, "root": root, "max_bad_share": max_bad_share}
        changes = {field: value for field, value in named.items() if value is not None}
        if changes.keys() & {"format", "path", "root"}:
            changes["mixture"] = ()
        data = dataclasses.replace(phase.data, **changes)
        if unknown := [source.format for source in data.sources if source.format not in FORMATS]:
            raise ValueError(f"There is no format {', '.join(unknown)}; there are {', '.join(FORMATS)}.")
        problems = data.url_problems("--" if changes.keys() & {"format", "path", "root"} else "data.")
        files.refuse(problems + files.url_problems({"weights.checkpoint": phase.weights.checkpoint}))
        if name:
            console.rule(name)
        _, worse = check.check(data, out / name, _rows(phase, tokenizer, console), sample, console)
        too_bad |= worse
    if too_bad:
        sys.exit(1)


def data_prepare(
    format: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FORMAT")],
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Path,
    name: str | None = None,
    root: str | None = None,
    shard_size: int = 4_096,
    decode: bool = False,
) -> None:
    """Put data of any format into a few large files with checksums, read from then on by the format `tfds`.

    Stopped, the same command goes on. Records that cannot be used are left out and named in prepare_errors.jsonl.

    Args:
        format: how the data lie on disk, one of mmjax.data.formats.FORMATS
        source: the folder or file of that format
        out: the folder to write; FOLDER/NAME/1.0.0 is also found by TensorFlow Datasets as NAME, below data_dir=FOLDER
        name: of the data set (default: the format's)
        root: folder that the images lie below, where that is not the data file's own
        shard_size: records of the source that go into a file
        decode: decode every image, to find those that are cut off; otherwise a file's head tells whether it is one
    """
    from rich.console import Console

    from mmjax.data import prepare

    files.refuse(Source(format, source, root=root).url_problems("SOURCE", "--root"))
    made = prepare.prepare(format, source, out, name, root, shard_size, decode, Console())
    print(*prepare.summary(made, out), sep="\n")


def data_verify(folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]) -> None:
    """Compare the checksums of a prepared folder with what was written.

    Args:
        folder: made by data prepare
    """
    from rich.console import Console

    from mmjax.data import prepare

    made = prepare.verify(folder, Console())
    print(f"All {len(made.shards):,} shards of {folder} are as they were written: {made.records:,} records.")


def data_features(
    config: Path,
    out: Path,
    crops: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    phase: str | None = None,
    batch_size: int = 64,
) -> None:
    """Run a run's frozen encoder over its images once; with data.features = OUT training reads what came out.

    Stopped, the same command goes on; it also adds the images that are new. Those that cannot be read are left out
    and named in features_errors.jsonl.

    Args:
        config: config file of the run
        out: folder for the features, by phase where the file has several and none is named
        crops: of every image, if the run crops them at random (data.random_crop); 4 if this is not given
        dtype: of the stored numbers; that in which the run's frozen parts compute if this is not given
        phase: of those in the file
        batch_size: images that the encoder gets at once
    """
    from mmjax.checkpoints.converted import ConvertedCheckpoint
    from mmjax.training import encode_features, run

    built = load_config(str(config))
    phases = built if isinstance(built, dict) else {"": built}
    if phase not in (None, *phases):
        raise ValueError(f"phase = {phase!r}: {config} has {', '.join(filter(None, phases)) or 'no phases'}.")
    for name in phases if phase is None else [phase]:
        chosen = phases[name]
        run.check(chosen)
        run.prepare(chosen)
        source = ConvertedCheckpoint.open(chosen.weights.checkpoint)
        source = source.of(run.architecture(source, chosen))
        made = encode_features.make(chosen, source, out / name if phase is None else out, crops, dtype, batch_size)
        print(*encode_features.summary(made), sep="\n")


def _rows(config: RunConfig, tokenizer: Path | None, console: Any) -> Any:
    """How a run makes rows, as `mmjax.data.check` wants to know it; None without a tokenizer."""
    from mmjax.checkpoints.converted import ConvertedCheckpoint
    from mmjax.data.check import RowSettings
    from mmjax.tokenizer import Tokenizer
    from mmjax.training import run

    if tokenizer is not None:
        return RowSettings(Tokenizer.from_folder(tokenizer))
    if not config.weights.checkpoint:
        return None
    if not Path(config.weights.checkpoint).exists():
        console.print(f"There is no checkpoint {config.weights.checkpoint} yet, so captions are counted in words.",
                      highlight=False)
        return None
    source = ConvertedCheckpoint.open(config.weights.checkpoint)
    return RowSettings(source.tokenizer, config.text, run.architecture(source, config).image_tokens)
