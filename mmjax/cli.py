"""`mmjax train | convert | export | generate | data`: the same functions as from Python, behind typed options.

A mistake in what the user gave ends with one message and exit status 2, without a traceback.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from mmjax.config import RunConfig
from mmjax.config import load as load_config


def train(args: Sequence[str]) -> None:
    """Train as a config file says; every field of it can be overridden: --config FILE [--optim.init-lr 1e-5 ...].

    Where a file has several phases, a field is behind its phase's name: --finetune.optim.init-lr 1e-5.
    """
    from mmjax import run

    if args[:1] in (["--help"], ["-h"]):
        print("usage: train --config FILE [--FIELD VALUE ...]\n\n" + train.__doc__
              + "\n`--config FILE --help` lists the fields with the file's values; the shipped files are in configs/.")
        return
    if "--config" not in args[:1] or len(args) < 2:
        raise ValueError("Name a config file first: train --config configs/tiny_minigpt4.py [--FIELD VALUE ...]")
    built, options = load_config(args[1]), {"args": args[2:], "prog": f"train --config {args[1]}",
                                            "config": (tyro.conf.AvoidSubcommands,)}
    if isinstance(built, RunConfig):
        run.train(tyro.cli(RunConfig, default=built, **options))
    else:  # each phase's fields are behind its name: --pretrain.optim.init-lr
        phases = dataclasses.make_dataclass("Phases", [(name, RunConfig) for name in built])
        run.train_phases(vars(tyro.cli(phases, default=phases(**built), **options)))


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
        seed: of the draws
    """
    import numpy as np

    from mmjax.batch import Sample
    from mmjax.data.conversation import PICTURE
    from mmjax.loaded import load

    model = load(checkpoint, dtype=dtype)
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
    """Look at what a run is to be trained on: data check."""
    commands = {"check": data_check}
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
        named = {"format": format, "path": path, "max_bad_share": max_bad_share}
        changes = {field: value for field, value in named.items() if value is not None}
        if changes.keys() & {"format", "path"}:
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


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "convert": convert,
    "export": export,
    "generate": lambda args: tyro.cli(generate, args=args, prog="mmjax generate"),
    "data": data,
}


def main(command: str | None = None) -> None:
    """The entry point; `command` is given by the scripts that stand for one."""
    args = sys.argv[1:]
    if command is None:
        command, args = (args[0], args[1:]) if args else ("--help", [])
    if command not in COMMANDS:
        print("usage: mmjax {" + ",".join(COMMANDS) + "} ...\n")
        for name, what in (("train", train), ("convert", convert), ("export", export), ("generate", generate),
                           ("data", data)):
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
