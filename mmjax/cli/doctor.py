"""`mmjax doctor`: diagnose a checkpoint."""

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from mmjax.cli import options


def doctor(args: Sequence[str]) -> None:
    """Explain what is wrong with a checkpoint or a run, after a minute of self-tests; exit status 1 if something is."""
    tyro.cli(options.local(examine), args=args, prog="mmjax doctor")


def examine(
    checkpoint: tyro.conf.Positional[Path],
    quick: bool = False,
    json: Path | None = None,
    text: Path | None = None,
    dtype: str | None = None,
    frozen_dtype: str | None = None,
) -> None:
    """Explain what is wrong with a checkpoint or a run, after a minute of self-tests; exit status 1 if something is.

    Args:
        checkpoint: converted checkpoint or run folder
        quick: check only the files and the stored numbers, in little memory; the model is not loaded
        json: a file for all findings and figures
        text: a file with sentences like the training data, one a line (default: plain English)
        dtype: float32 or bfloat16 (default: depends on the device)
        frozen_dtype: int8 stores the large matrices in half the memory of bfloat16
    """
    from rich.console import Console

    from mmjax import compilation
    from mmjax import doctor as checks

    compilation.enable()
    texts = checks.TEXTS
    if text:
        texts = tuple(line for line in text.read_text(encoding="utf-8").splitlines() if line.strip())
        if not texts:
            raise ValueError(f"{text} has no sentence.")
    with Console(stderr=True, markup=False).status("Opening") as status:
        findings = checks.examine(checkpoint, quick, dtype, frozen_dtype, texts, status.update)
    checks.show(findings, Console(markup=False))
    if json:
        json.write_text(checks.to_json(checkpoint, findings))
    if checks.worst(findings) == "wrong":
        sys.exit(1)
