"""`mmjax parity`: compare a model with activations of its PyTorch original."""

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from mmjax.cli import options


def parity(args: Sequence[str]) -> None:
    """Compare a model stage by stage with its PyTorch original; exit status 1 if a stage differs."""
    tyro.cli(options.local(compare), args=args, prog="mmjax parity")


def compare(
    checkpoint: tyro.conf.Positional[Path],
    reference: Path,
    dtype: str = "float32",
    tolerance: float | None = None,
    json: Path | None = None,
) -> None:
    """Compare a model stage by stage with its PyTorch original; exit status 1 if a stage differs.

    Args:
        checkpoint: converted checkpoint or run folder
        reference: npz file with inputs and stages of the original; docs/parity.md has the format and a recipe
        dtype: compute dtype, float32 or bfloat16
        tolerance: largest relative difference (default: depends on the coarser dtype of both)
        json: a file for all figures
    """
    import dataclasses
    from json import dumps

    from rich.console import Console

    from mmjax import compilation
    from mmjax import parity as stages
    from mmjax.inference.loaded import load

    compilation.enable()
    rows = stages.parity(load(checkpoint, dtype=dtype), reference, tolerance)
    stages.show(rows, Console(markup=False))
    if json:
        results = [{name: None if value != value else value for name, value in dataclasses.asdict(row).items()}
                   | {"stage": row.stage.name} for row in rows]  # JSON has no NaN
        json.write_text(dumps({"verdict": stages.verdict(rows), "stages": results}, indent=2) + "\n")
    if not stages.all_agree(rows):
        sys.exit(1)
