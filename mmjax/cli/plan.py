"""`mmjax plan`: memory, operations and time of a run on given devices."""

import argparse
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

from mmjax import files
from mmjax.cli.train import overridden
from mmjax.config import RunConfig


def plan(args: Sequence[str]) -> None:
    """Report what a run needs on devices that need not be present, and whether it fits; exit status 1 if it does not.

    plan --config FILE --topology NAME [--preset NAME] [--length TOKENS] [--json FILE] [--FIELD VALUE ...]

    --topology  a TPU slice, chip:grid, such as v5e:4x4 or v5p:2x2x2; or local, the devices of this machine
    --preset    an architecture of the config's family (minigpt4-13b) instead of the checkpoint's, which need not exist
    --length    tokens of a row (default: the largest number that the text settings allow)
    --json      a file for all results
    Every field of the config can be overridden, as in `train`.
    """
    import json

    import jax
    from rich.console import Console
    from rich.markup import escape

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
    files.require_local({"--json": options.json})
    built = overridden(options.config, rest, "plan")
    if options.topology != "local":
        jax.config.update("jax_enable_compilation_cache", False)  # programs for other devices cannot be loaded
        if not jax.config.jax_platforms:
            jax.config.update("jax_platforms", "cpu")  # else JAX looks for a TPU because libtpu is there

    from mmjax.cost import plan as planning

    console, plans = Console(markup=False), {}
    for name, config in ({"": built} if isinstance(built, RunConfig) else built).items():
        if name:
            console.rule(name)
        with Console(stderr=True, markup=False).status(escape(f"Compiling for {options.topology}")):
            plans[name] = planning.plan(config, options.topology, options.preset, options.length)
        planning.show(plans[name], console)
    if options.json:
        results = {name: one.to_json() for name, one in plans.items()}
        options.json.write_text(json.dumps(results.get("", results), indent=2) + "\n")
    if not all(one.memory.fits for one in plans.values()):
        sys.exit(1)
