"""Self-tests that explain what is wrong with a converted checkpoint or a run; they take about a minute.

Every check returns `Finding`s. The checks of stored numbers read tensor by tensor, one slice at a time, so a model of
any size needs little memory; `quick` stops after them. The others load the model and run it on English sentences and
on two images. docs/doctor.md explains each finding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from mmjax.doctor import outputs, tokenizer, weights
from mmjax.doctor.finding import Finding, show, to_json, worst
from mmjax.doctor.inspection import damaged, inspect_folder, statistics
from mmjax.doctor.outputs import TEXTS
from mmjax.inference import loaded

__all__ = ["TEXTS", "Finding", "examine", "show", "to_json", "worst"]


def examine(folder: str | Path, quick: bool = False, dtype: str | None = None, frozen_dtype: str | None = None,
            texts: Sequence[str] = TEXTS, progress: Callable[[str], None] = lambda step: None) -> list[Finding]:
    """Returns all findings about a converted checkpoint or a run folder.

    quick:    checks only the files and the stored numbers; no model is loaded
    dtype, frozen_dtype: as in `loaded.load`
    texts:    sentences like those the model was trained on, for models that were not trained on English
    progress: called with the name of each step

    Raises FileNotFoundError or ValueError if the folder has no checkpoint, or its config.json is damaged.
    """
    progress("Opening")
    inspection, findings = inspect_folder(Path(folder))
    if "files" in [finding.name for finding in findings]:
        return findings
    progress("Reading every tensor")
    try:
        inspection = dataclasses.replace(inspection, tensors={
            path: statistics(path, rows) for path, rows in inspection.read.items()})
    except Exception as error:
        return [*findings, damaged(inspection.source.folder, error)]
    for check in weights.CHECKS:
        findings += check(inspection)
    progress("Trying the tokenizer")
    findings += tokenizer.check(inspection)
    if quick:
        return findings
    if blocked := [finding.name for finding in findings
                   if finding.verdict == "wrong" and finding.name in ("run", "parameters", "tokenizer")]:
        return [*findings, Finding("outputs", "warning", f"The model was not run: repair {', '.join(blocked)} first.")]
    if inspection.run:
        progress("Comparing the base weights with those the run was trained on")
        findings += outputs.base_weights(inspection)
    progress("Loading the model")
    model = loaded.load(folder, dtype=dtype, frozen_dtype=frozen_dtype, init_fresh=0)
    findings += outputs.beginning(model)
    progress("Reading plain text")
    findings += outputs.plain_text(model, texts, findings)
    progress("Looking at images")
    findings += outputs.images(model, inspection)
    return findings
