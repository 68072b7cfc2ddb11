"""`mmjax train`, and a config file with the fields that the command line changes."""

import dataclasses
import re
import sys
from collections.abc import Sequence

import tyro

from mmjax import files
from mmjax.config import RENAMED, RunConfig
from mmjax.config import load as load_config


def train(args: Sequence[str]) -> None:
    """Train as a config file says; every field of it can be overridden: --config FILE [--optim.init-lr 1e-5 ...].

    Where a file has several phases, a field is behind its phase's name: --finetune.optim.init-lr 1e-5.
    Exit status 75: stopped by SIGTERM; the state is saved, and the same command resumes.
    """
    from mmjax import compilation
    from mmjax.evaluate.scenes import score_job
    from mmjax.training import run

    if args[:1] in (["--help"], ["-h"]):
        print("usage: train --config FILE [--FIELD VALUE ...]\n\n" + train.__doc__
              + "\n`--config FILE --help` lists the fields with the file's values; the shipped files are in configs/.")
        return
    if "--config" not in args[:1] or len(args) < 2:
        raise ValueError("Name a config file first: train --config configs/tiny_minigpt4.py [--FIELD VALUE ...]")
    built = overridden(args[1], args[2:], "train")
    compilation.enable()
    if isinstance(built, RunConfig):
        run.train(built, score_job)
    else:
        run.train_phases(built, score_job)


def overridden(path: str, args: Sequence[str], command: str) -> RunConfig | dict[str, RunConfig]:
    """Returns the config of a file, with the fields that the command line changes.

    Raises ValueError naming options that have another name now, or every path that is a URL but must be local.
    """
    files.refuse(_renamed_options(args))
    built, options = load_config(path), {"args": _with_values(args), "prog": f"{command} --config {path}",
                                         "config": (tyro.conf.AvoidSubcommands,)}
    if isinstance(built, RunConfig):
        built = _with_path_for_mixture(built, path, args)
        config = tyro.cli(RunConfig, default=built, **options)
        files.refuse(config.url_problems())
        return config
    # each phase's fields are behind its name: --pretrain.optim.init-lr
    built = {name: _with_path_for_mixture(config, path, args, f"{name}.") for name, config in built.items()}
    phases = dataclasses.make_dataclass("Phases", [(name, RunConfig) for name in built])
    configs = vars(tyro.cli(phases, default=phases(**built), **options))
    files.refuse([problem for name, config in configs.items() for problem in config.url_problems(f"{name}.")])
    return configs


def _with_path_for_mixture(config: RunConfig, path: str, args: Sequence[str], prefix: str = "") -> RunConfig:
    """Returns the config of a file without its mixture if the command line names other data, and prints that."""
    named = {arg.partition("=")[0] for arg in args}
    option = f"--{prefix}data.path"
    if not config.data.mixture or option not in named or f"--{prefix}data.mixture" in named:
        return config
    print(f"{option} replaces data.mixture of {path}.", file=sys.stderr)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, mixture=()))


def _with_values(args: Sequence[str]) -> list[str]:
    """Returns the arguments with the value that `--remat` and `--no-remat` have alone: "full" and "none"."""
    found: list[str] = []
    for arg, following in zip(args, [*args, "--"][1:], strict=True):
        if re.fullmatch(r"--(\w+\.)?remat", arg) and following.startswith("--"):
            found += [arg, "full"]
        elif match := re.fullmatch(r"--(\w+\.)?no-remat", arg):
            found += [f"--{match[1] or ''}remat", "none"]
        else:
            found.append(arg)
    return found


def _renamed_options(args: Sequence[str]) -> list[str]:
    """Returns a line for every option that is the former name of a field, such as --data.pack-pictures."""
    problems = []
    for arg in args:
        name = arg.partition("=")[0].removeprefix("--").replace("-", "_") if arg.startswith("--") else ""
        for old, new in RENAMED.items():
            if name == old or name.endswith(f".{old}"):  # after a phase's name
                option = f"--{name.removesuffix(old)}{new}".replace("_", "-")
                problems.append(f"{arg.partition('=')[0]} is called {option} now")
    return problems
