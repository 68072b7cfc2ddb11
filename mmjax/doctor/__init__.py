"""What is wrong with a checkpoint, in words: a minute of self-tests on a converted checkpoint or a run.

Every check gives `Finding`s. Those of the stored numbers read tensor by tensor, a slice at a time, so that a model of
any size is looked through in little memory; `quick` stops there. The others load the model, let it read plain English
and look at two images. docs/doctor.md says what each finding means.
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
            texts: Sequence[str] = TEXTS, tell: Callable[[str], None] = lambda doing: None) -> list[Finding]:
    """All findings about a converted checkpoint or a run folder.

    quick:  the files and the stored numbers alone; no model is loaded
    dtype, frozen_dtype: as in `loaded.load`
    texts:  sentences that the model should know, for one that was trained on something else than English
    tell:   called with what is being done

    Raises FileNotFoundError or ValueError if the folder holds no checkpoint at all, or its config.json is damaged.
    """
    tell("Opening")
    patient, found = inspect_folder(Path(folder))
    if "files" in [finding.name for finding in found]:
        return found
    tell("Reading every tensor")
    try:
        patient = dataclasses.replace(patient, tensors={
            path: statistics(path, rows) for path, rows in patient.read.items()})
    except Exception as error:
        return [*found, damaged(patient.source.folder, error)]
    for check in weights.CHECKS:
        found += check(patient)
    tell("Trying the tokenizer")
    found += tokenizer.check(patient)
    if quick:
        return found
    if blocked := [finding.name for finding in found
                   if finding.verdict == "wrong" and finding.name in ("run", "parameters", "tokenizer")]:
        return [*found, Finding("outputs", "warning", f"The model was not tried: see to {', '.join(blocked)} first.")]
    if patient.run:
        tell("Comparing the base weights with those the run was trained on")
        found += outputs.base_weights(patient)
    tell("Loading the model")
    model = loaded.load(folder, dtype=dtype, frozen_dtype=frozen_dtype, init_fresh=0)
    found += outputs.beginning(model)
    tell("Reading plain text")
    found += outputs.plain_text(model, texts, found)
    tell("Looking at images")
    found += outputs.images(model, patient)
    return found
