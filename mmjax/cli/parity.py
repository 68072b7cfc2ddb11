"""`mmjax parity`: a model against activations of its PyTorch original."""

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from mmjax.cli import options


def parity(args: Sequence[str]) -> None:
    """Compare a model stage by stage with its PyTorch original, and say where they first part; then exit status 1."""
    tyro.cli(options.local(hold_against), args=args, prog="mmjax parity")


def hold_against(
    checkpoint: tyro.conf.Positional[Path],
    reference: Path,
    dtype: str = "float32",
    tolerance: float | None = None,
    json: Path | None = None,
) -> None:
    """Compare a model stage by stage with its PyTorch original, and say where they first part; then exit status 1.

    Args:
        checkpoint: converted checkpoint or run folder
        reference: npz file with inputs and stages of the original; docs/parity.md has the format and a recipe
        dtype: that the model computes in here, float32 or bfloat16
        tolerance: largest relative difference of what agrees (default: what suits the coarser dtype of both)
        json: a file for all figures
    """
    import dataclasses
    from json import dumps

    from rich.console import Console

    from mmjax import compilation
    from mmjax import parity as comparing
    from mmjax.inference.loaded import load

    compilation.enable()
    rows = comparing.parity(load(checkpoint, dtype=dtype), reference, tolerance)
    comparing.show(rows, Console())
    if json:
        told = [{name: None if value != value else value for name, value in dataclasses.asdict(row).items()}
                | {"stage": row.stage.name} for row in rows]  # JSON has no NaN
        json.write_text(dumps({"verdict": comparing.verdict(rows), "stages": told}, indent=2) + "\n")
    if not comparing.all_agree(rows):
        sys.exit(1)
