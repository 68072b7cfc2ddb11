"""METEOR and SPICE of captions, by the Java programs of pycocoevalcap (extra `captions`)."""

import importlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.evaluate.metrics.captions import Words

SCORERS = {"METEOR": ("pycocoevalcap.meteor.meteor", "Meteor"), "SPICE": ("pycocoevalcap.spice.spice", "Spice")}


def scorer(name: str) -> type[Any]:
    """Returns pycocoevalcap's class for "METEOR" or "SPICE". Raises ValueError if the extra or Java is missing."""
    if shutil.which("java") is None:
        raise ValueError(f"{name} is a Java program, and there is no `java` on the PATH. Install a Java runtime, or "
                         f"leave {name} out: BLEU, ROUGE-L and CIDEr-D need none.")
    module, scorer_name = SCORERS[name]
    try:
        return getattr(importlib.import_module(module), scorer_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} needs pycocoevalcap: pip install 'mmjax[captions]'.") from error


def java_scores(name: str, answers: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[float, np.ndarray]:
    """Returns (score of the data set, float64[N] of each caption) by "METEOR" or "SPICE", from tokens.

    METEOR's score of a data set is not the mean over its captions. SPICE downloads its parser's models when it is first
    used, and needs Java 8. Raises ValueError if the extra or Java is missing.
    """
    right = {number: [" ".join(words) for words in each] for number, each in enumerate(references)}
    given = {number: [" ".join(words)] for number, words in enumerate(answers)}
    score, each = scorer(name)().compute_score(right, given)
    return float(score), np.array([one["All"]["f"] if isinstance(one, dict) else one for one in each], np.float64)
