"""`mmjax doctor`: what is wrong with a checkpoint."""

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from mmjax.cli import options


def doctor(args: Sequence[str]) -> None:
    """Say in words what is wrong with a checkpoint or a run, after a minute of self-tests; then exit status 1."""
    tyro.cli(options.local(examine), args=args, prog="mmjax doctor")


def examine(
    checkpoint: tyro.conf.Positional[Path],
    quick: bool = False,
    json: Path | None = None,
    text: Path | None = None,
    dtype: str | None = None,
    frozen_dtype: str | None = None,
) -> None:
    """Say in words what is wrong with a checkpoint or a run, after a minute of self-tests; then exit status 1.

    Args:
        checkpoint: converted checkpoint or run folder
        quick: look at the files and the stored numbers alone, in little memory; the model is not loaded
        json: a file for all findings and figures
        text: a file with sentences, one a line, of what the model was trained on (default: plain English)
        dtype: float32 or bfloat16 (default: what suits the device)
        frozen_dtype: int8 holds the large matrices in half the memory of bfloat16
    """
    from rich.console import Console

    from mmjax import compilation
    from mmjax import doctor as at_work

    compilation.enable()
    texts = at_work.TEXTS
    if text:
        texts = tuple(line for line in text.read_text(encoding="utf-8").splitlines() if line.strip())
        if not texts:
            raise ValueError(f"{text} holds no sentence.")
    with Console(stderr=True).status("Opening") as status:
        found = at_work.examine(checkpoint, quick, dtype, frozen_dtype, texts, status.update)
    at_work.show(found, Console())
    if json:
        json.write_text(at_work.to_json(checkpoint, found))
    if at_work.worst(found) == "wrong":
        sys.exit(1)
