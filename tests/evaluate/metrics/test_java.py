"""METEOR and SPICE: what is handed to the Java programs' wrappers, and what is missing without them."""

import shutil
import sys
import types

import numpy as np
import pytest

from mmjax.evaluate.metrics.java import java_scores

SAID, RIGHT = [["a", "dog", "runs"], ["a", "cat"]], [[["a", "dog", "is", "running"], ["dogs", "run"]], [["a", "cat"]]]


def test_without_java(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="no `java` on the PATH"):
        java_scores("METEOR", SAID, RIGHT)


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor.meteor", None)
    with pytest.raises(ValueError, match=r"pip install 'mmjax\[captions\]'"):
        java_scores("METEOR", SAID, RIGHT)


@pytest.mark.parametrize(("name", "module", "each"), [
    ("METEOR", "pycocoevalcap.meteor.meteor", [0.5, 1.0]),
    ("SPICE", "pycocoevalcap.spice.spice", [{"All": {"f": 0.5}}, {"All": {"f": 1.0}}]),
])
def test_what_the_wrappers_get_and_give(monkeypatch, name, module, each):
    calls = []

    class Scorer:
        def compute_score(self, right, said):
            calls.append((right, said))
            return 0.7, each

    stub = types.ModuleType(module)
    setattr(stub, name.capitalize(), Scorer)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    for part in ("pycocoevalcap", module.rpartition(".")[0]):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, module, stub)
    score, scores = java_scores(name, SAID, RIGHT)
    assert calls == [({0: ["a dog is running", "dogs run"], 1: ["a cat"]}, {0: ["a dog runs"], 1: ["a cat"]})]
    assert score == 0.7
    np.testing.assert_array_equal(scores, [0.5, 1.0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the wrapper leaves pipes open
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_meteor_itself():
    pytest.importorskip("pycocoevalcap.meteor.meteor", reason="needs the extra captions")
    _, scores = java_scores("METEOR", SAID, RIGHT)
    assert scores[1] == 1 and 0.3 < scores[0] < 0.9
