"""`mmjax data check | prepare | verify | features`: check and prepare the data of a run."""

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
    """Check and prepare the data of a run: data check, prepare, verify, features."""
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
    follow_links: bool = False,
    list_all: bool = False,
) -> None:
    """Count the records and problems of the data before a run; exit status 1 if there are too many problems.

    Args:
        config: config file of the run; the options below override it. All of its phases are checked
        format: layout of the data on disk (default: the config's)
        path: the folder or file of that format
        root: folder of the images, if it is not the folder of the data file
        tokenizer: folder of a tokenizer, to count captions in tokens without a config and its checkpoint; otherwise
            they are counted in words
        sample: number of random records of each source to check (default: all)
        max_bad_share: largest share of records with problems for exit status 0
        out: folder for data_check.json and data_check.png; has a folder for each phase if there are several
        follow_links: allow links that lead out of the folder of the images
        list_all: print every item that is left out or odd, not only their numbers
    """
    from rich.console import Console

    from mmjax.config import DataConfig
    from mmjax.data import check
    from mmjax.data.formats import FORMATS

    console = Console(markup=False)
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
        if follow_links:
            data = dataclasses.replace(data, follow_links=True, mixture=tuple(
                dataclasses.replace(source, follow_links=True) for source in data.mixture))
        if unknown := [source.format for source in data.sources if source.format not in FORMATS]:
            raise ValueError(f"There is no format {', '.join(unknown)}; there are {', '.join(FORMATS)}.")
        problems = data.url_problems("--" if changes.keys() & {"format", "path", "root"} else "data.")
        files.refuse(problems + files.url_problems({"weights.checkpoint": phase.weights.checkpoint}))
        if name:
            console.rule(name)
        _, worse = check.check(data, out / name, _rows(phase, tokenizer, console), sample, console, list_all)
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
    follow_links: bool = False,
    list_all: bool = False,
) -> None:
    """Write data of any format as a few large files with checksums, which the format `tfds` reads.

    After an interruption the same command continues. Records that cannot be used are listed in prepare_errors.jsonl.

    Args:
        format: layout of the data on disk, one of mmjax.data.formats.FORMATS
        source: the folder or file of that format
        out: the folder to write; FOLDER/NAME/1.0.0 is also found by TensorFlow Datasets as NAME, below data_dir=FOLDER
        name: name of the data set (default: the format's)
        root: folder of the images, if it is not the folder of the data file
        shard_size: records of the source in each file
        decode: decode every image, to find truncated ones; otherwise only its header is checked
        follow_links: allow links that lead out of the folder of the images
        list_all: print every item that is left out, not only their numbers
    """
    from rich.console import Console

    from mmjax.data import prepare

    files.refuse(Source(format, source, root=root).url_problems("SOURCE", "--root"))
    info = prepare.prepare(format, source, out, name, root, shard_size, decode, Console(markup=False), follow_links,
                           list_all)
    print(*prepare.summary(info, out), sep="\n")


def data_verify(folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]) -> None:
    """Verify the checksums of a prepared folder.

    Args:
        folder: output of data prepare
    """
    from rich.console import Console

    from mmjax.data import prepare

    info = prepare.verify(folder, Console(markup=False))
    print(f"All {len(info.shards):,} shards of {folder} are as they were written: {info.records:,} records.")


def data_features(
    config: Path,
    out: Path,
    crops: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    phase: str | None = None,
    batch_size: int = 64,
) -> None:
    """Compute the features of a run's images once; with data.features = OUT training reads them.

    After an interruption the same command continues; it also adds new images. Images that cannot be read are listed
    in features_errors.jsonl.

    Args:
        config: config file of the run
        out: folder for the features; has a folder for each phase if the config has several and `phase` is not given
        crops: random crops of every image, if the run uses data.random_crop (default: 4)
        dtype: dtype of the stored features (default: that of the run's frozen parameters)
        phase: name of a phase of the config
        batch_size: images in a batch
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
        manifest = encode_features.make(chosen, source, out / name if phase is None else out, crops, dtype, batch_size)
        print(*encode_features.summary(manifest), sep="\n")


def _rows(config: RunConfig, tokenizer: Path | None, console: Any) -> Any:
    """Returns the settings of a run's rows for `mmjax.data.check`; None without a tokenizer."""
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
