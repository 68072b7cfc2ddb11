"""`mmjax train | convert | export | generate | data | plan`: the same functions as from Python, behind typed options.

A mistake in what the user gave ends with one message and exit status 2, without a traceback.
"""

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mmjax.config import RunConfig
from mmjax.config import load as load_config


def train(args: Sequence[str]) -> None:
    """Train as a config file says; every field of it can be overridden: --config FILE [--optim.init-lr 1e-5 ...].

    Where a file has several phases, a field is behind its phase's name: --finetune.optim.init-lr 1e-5.
    Exit status 75: told to end (SIGTERM); its state is saved, and the same command goes on.
    """
    from mmjax import compilation, run

    if args[:1] in (["--help"], ["-h"]):
        print("usage: train --config FILE [--FIELD VALUE ...]\n\n" + train.__doc__
              + "\n`--config FILE --help` lists the fields with the file's values; the shipped files are in configs/.")
        return
    if "--config" not in args[:1] or len(args) < 2:
        raise ValueError("Name a config file first: train --config configs/tiny_minigpt4.py [--FIELD VALUE ...]")
    built = _overridden(args[1], args[2:], "train")
    compilation.enable()
    if isinstance(built, RunConfig):
        run.train(built)
    else:
        run.train_phases(built)


def _overridden(path: str, args: Sequence[str], command: str) -> RunConfig | dict[str, RunConfig]:
    """What a config file says, with the fields that the command line changes."""
    built, options = load_config(path), {"args": args, "prog": f"{command} --config {path}",
                                         "config": (tyro.conf.AvoidSubcommands,)}
    if isinstance(built, RunConfig):
        return tyro.cli(RunConfig, default=built, **options)
    # each phase's fields are behind its name: --pretrain.optim.init-lr
    phases = dataclasses.make_dataclass("Phases", [(name, RunConfig) for name in built])
    return vars(tyro.cli(phases, default=phases(**built), **options))


def convert(args: Sequence[str]) -> None:
    """Convert released PyTorch files into a checkpoint: minigpt4, imagebind-llm, llama-adapter or llama."""
    from mmjax.convert import convert as conversions

    commands = {"minigpt4": conversions.minigpt4, "imagebind-llm": conversions.imagebind_llm,
                "llama-adapter": conversions.llama_adapter, "llama": conversions.llama}
    tyro.extras.subcommand_cli_from_dict(commands, args=args, prog="convert")


def export(args: Sequence[str]) -> None:
    """Write a part of a checkpoint or of a finished run in its released PyTorch format."""
    from mmjax.loaded import export as write

    tyro.cli(write, args=args, prog="mmjax export")


def generate(
    checkpoint: Path,
    prompt: str,
    image: tuple[Path, ...] = (),
    media: dict[str, str] | None = None,
    weights: dict[str, float] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    num_beams: int = 1,
    stop: tuple[str, ...] | None = None,
    prompt_template: str | None = None,
    dtype: str | None = None,
    frozen_dtype: Literal["int8"] | None = None,
    seed: int = 0,
) -> None:
    """Print the model's answer to a prompt, with or without pictures and other senses.

    Args:
        checkpoint: converted checkpoint or run folder
        prompt: the question; MiniGPT-4's pictures are put in front of it unless it says where with <ImageHere>
        image: picture files
        media: other senses of ImageBind-LLM by name: audio FILE.wav, text WORDS, or an array in a FILE.npy (video,
            depth, thermal, imu)
        weights: of the senses in their mix, by name: image 1.0 audio 0.5
        max_new_tokens: longest answer
        temperature: 0 takes the best word, above 0 draws
        num_beams: above 1 searches with beams
        stop: strings that end the answer (default: the end symbol the model was trained with)
        prompt_template: put around the prompt at its {} (default: the checkpoint's)
        dtype: float32 or bfloat16 (default: what suits the device)
        frozen_dtype: int8 holds the large matrices in half the memory of bfloat16
        seed: of the draws
    """
    import numpy as np

    from mmjax import compilation
    from mmjax.batch import Sample
    from mmjax.data.conversation import PICTURE
    from mmjax.loaded import load

    compilation.enable()
    model = load(checkpoint, dtype=dtype, frozen_dtype=frozen_dtype)
    if image and model.config.image_tokens and "<ImageHere>" not in prompt:
        prompt = PICTURE * len(image) + " " + prompt
    sample = Sample(images=list(image), prompt=prompt, weights=weights or {}, media={
        name: np.load(value, allow_pickle=False) if value.endswith(".npy") else value
        for name, value in (media or {}).items()})
    settings = {} if prompt_template is None else {"prompt_template": prompt_template}
    words = model.generate(
        [sample], max_new_tokens, temperature, num_beams, [model.text.end_sym] if stop is None else stop, seed=seed,
        **settings)
    print(words[0])


def data(args: Sequence[str]) -> None:
    """Look at what a run is to be trained on, and prepare it: data check, prepare, verify, features."""
    commands = {"check": data_check, "prepare": data_prepare, "verify": data_verify, "features": data_features}
    if not args or args[0] not in commands:
        print("usage: mmjax data {" + ",".join(commands) + "} ...\n")
        for name, command in commands.items():
            print(f"  {name:9} {command.__doc__.splitlines()[0]}")
        sys.exit(0 if args[:1] in (["--help"], ["-h"]) else 2)
    tyro.cli(commands[args[0]], args=args[1:], prog=f"mmjax data {args[0]}")


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
        root: folder that the pictures lie below, where that is not the data file's own
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
        root: folder that the pictures lie below, where that is not the data file's own
        shard_size: records of the source that go into a file
        decode: decode every picture, to find those that are cut off; otherwise a file's head tells whether it is one
    """
    from rich.console import Console

    from mmjax.data import prepare

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
    """Run a run's frozen encoder over its pictures once; with data.features = OUT training reads what came out.

    Stopped, the same command goes on; it also adds the pictures that are new. Those that cannot be read are left out
    and named in features_errors.jsonl.

    Args:
        config: config file of the run
        out: folder for the features, by phase where the file has several and none is named
        crops: of every picture, if the run crops them at random (data.random_crop); 4 if this is not given
        dtype: of the stored numbers; that in which the run's frozen parts compute if this is not given
        phase: of those in the file
        batch_size: pictures that the encoder gets at once
    """
    from mmjax import features, run
    from mmjax.loaded import Checkpoint

    built = load_config(str(config))
    phases = built if isinstance(built, dict) else {"": built}
    if phase not in (None, *phases):
        raise ValueError(f"phase = {phase!r}: {config} has {', '.join(filter(None, phases)) or 'no phases'}.")
    for name in phases if phase is None else [phase]:
        chosen = phases[name]
        run.check(chosen)
        run.prepare(chosen)
        source = Checkpoint.open(chosen.weights.checkpoint)
        source = source.of(run.architecture(source, chosen))
        made = features.make(chosen, source, out / name if phase is None else out, crops, dtype, batch_size)
        print(*features.summary(made), sep="\n")


def _rows(config: RunConfig, tokenizer: Path | None, console: Any) -> Any:
    """How a run makes rows, as `mmjax.data.check` wants to know it; None without a tokenizer."""
    from mmjax import run
    from mmjax.data.check import Rows
    from mmjax.loaded import Checkpoint
    from mmjax.tokenizer import Tokenizer

    if tokenizer is not None:
        return Rows(Tokenizer.from_folder(tokenizer))
    if not config.weights.checkpoint:
        return None
    if not Path(config.weights.checkpoint).exists():
        console.print(f"There is no checkpoint {config.weights.checkpoint} yet, so captions are counted in words.",
                      highlight=False)
        return None
    source = Checkpoint.open(config.weights.checkpoint)
    return Rows(source.tokenizer, config.text, run.architecture(source, config).image_tokens)


def plan(args: Sequence[str]) -> None:
    """Say what a run needs of devices that nobody has rented yet, and whether it fits; exit status 1 if it does not.

    plan --config FILE --topology NAME [--preset NAME] [--length TOKENS] [--json FILE] [--FIELD VALUE ...]

    --topology  a TPU slice, chip:grid, such as v5e:4x4 or v5p:2x2x2; or local, the devices of this machine
    --preset    an architecture of the config's family (minigpt4-13b) in place of the checkpoint's, which need not exist
    --length    tokens of a row; otherwise the longest that the text settings allow
    --json      a file for everything that was found
    Every field of the config can be overridden, as in `train`.
    """
    import json

    import jax
    from rich.console import Console

    if args[:1] in ([], ["--help"], ["-h"]):
        print(inspect.cleandoc(plan.__doc__))
        return
    parser = argparse.ArgumentParser(prog="plan", add_help=False, allow_abbrev=False)
    for name in ("--config", "--topology"):
        parser.add_argument(name, required=True)
    for name, kind in (("--preset", str), ("--length", int), ("--json", Path)):
        parser.add_argument(name, type=kind)
    options, rest = parser.parse_known_args(args)
    if options.length is not None and options.length < 2:
        raise ValueError(f"--length {options.length}: a number of tokens, at least 2")
    built = _overridden(options.config, rest, "plan")
    if options.topology != "local":
        jax.config.update("jax_enable_compilation_cache", False)  # a program for devices elsewhere is never read back
        if not jax.config.jax_platforms:
            jax.config.update("jax_platforms", "cpu")  # else JAX looks for a TPU because libtpu is there

    from mmjax import plan as planning

    console, made = Console(), {}
    for name, config in ({"": built} if isinstance(built, RunConfig) else built).items():
        if name:
            console.rule(name)
        with Console(stderr=True).status(f"Compiling for {options.topology}"):
            made[name] = planning.plan(config, options.topology, options.preset, options.length)
        planning.show(made[name], console)
    if options.json:
        told = {name: one.to_json() for name, one in made.items()}
        options.json.write_text(json.dumps(told.get("", told), indent=2) + "\n")
    if not all(one.memory.fits for one in made.values()):
        sys.exit(1)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "convert": convert,
    "export": export,
    "generate": lambda args: tyro.cli(generate, args=args, prog="mmjax generate"),
    "data": data,
    "plan": plan,
}


def main(command: str | None = None) -> None:
    """The entry point; `command` is given by the scripts that stand for one."""
    args = sys.argv[1:]
    if command is None:
        command, args = (args[0], args[1:]) if args else ("--help", [])
    if command not in COMMANDS:
        print("usage: mmjax {" + ",".join(COMMANDS) + "} ...\n")
        for name, what in (("train", train), ("convert", convert), ("export", export), ("generate", generate),
                           ("data", data), ("plan", plan)):
            print(f"  {name:9} {what.__doc__.splitlines()[0]}")
        print("\nmmjax COMMAND --help tells more.")
        sys.exit(0 if command in ("--help", "-h") else 2)
    from mmjax.run import TrainingStopped

    try:
        COMMANDS[command](args)
    except (ValueError, OSError, TrainingStopped) as error:
        print(f"mmjax {command}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted. A training run goes on from its last checkpoint with the same command.", file=sys.stderr)
        sys.exit(130)
