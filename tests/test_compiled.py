"""`benchmarks.compiled`: choice of programs and slices, figures of a text, and messages. Nothing is compiled for a TPU;
where libtpu is installed, `pytest -m slow` compiles one program for it."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys

import jax
import pytest

from benchmarks import compiled, programs
from mmjax import config, sharding
from mmjax.config import MeshConfig
from mmjax.cost import hardware
from tests.cost.test_estimate import FUSED, LOOP, OUTSIDE, W, X, program
from tests.test_imports import ROOT

KEYS = ["program", "topology", "floor_flops", "floor_bytes", "flops", "bytes", "estimate_ms", "share_of_peak",
        "temporaries_bytes", "per_call_bytes", "fits"]
SEVEN = ', backend_config={"known_trip_count":{"n":"7"}}'
TEXT = program(X, W, *LOOP[:-1], LOOP[-1] + SEVEN, OUTSIDE, before=FUSED)
FACTS = {"program": "vit", "topology": "v5e", "slice": "v5e:1x1", "floor_flops": 10**9, "floor_bytes": 2_000,
         "fits": True, "temporaries_bytes": 5, "message": "", "seconds": 1.0}


@pytest.fixture(autouse=True)
def settings_of_jax():
    """The command changes them for its process."""
    before = jax.config.jax_platforms, jax.config.jax_enable_compilation_cache
    yield
    for name, value in zip(("jax_platforms", "jax_enable_compilation_cache"), before, strict=True):
        jax.config.update(name, value)


@pytest.fixture
def there(monkeypatch):
    """A v5e of which this machine's CPU plays the devices."""
    def find(name):
        chip = hardware.CHIPS["v5e"]
        return hardware.Topology(name, tuple(jax.devices()[:1]), chip, chip.memory, 100e9)

    monkeypatch.setattr(hardware, "find", find)


def test_programs_are_chosen_by_name():
    assert compiled.chosen(None) == list(programs.PROGRAMS)
    assert compiled.chosen(["vit", "vit"]) == ["vit"]
    assert compiled.chosen(["llm_train", "step"])[:2] == ["llm_train", "step:imagebind_llm_finetune"]
    assert set(compiled.chosen(["step"])) == {name for name in programs.PROGRAMS if name.startswith("step:")}


def test_every_config_for_a_pod_has_a_step():
    pods = {path.stem for path in (ROOT / "configs").glob("*.py") if not path.stem.startswith("tiny_")}
    assert {name.split(":")[1] for name in programs.PROGRAMS if name.startswith("step:")} == pods
    planned = programs.PROGRAMS["step:minigpt4_stage2"]
    assert (planned.devices, planned.mesh.fsdp) == (4, 4)
    assert programs.PROGRAMS["step:minigpt4_stage2:int8"].devices == 1


@pytest.mark.parametrize(("topology", "devices", "expected"), [
    ("v5e", 1, "v5e:1x1"), ("v5e", 4, "v5e:2x2"), ("v5e", 16, "v5e:4x4"), ("v5p", 4, "v5p:1x2x2"),
    ("v5p", 16, "v5p:2x2x4"), ("v6e", 8, "v6e:2x4"), ("v5e:2x4", 1, "v5e:2x4")])
def test_slices(topology, devices, expected):
    assert compiled.slice_of(topology, devices) == expected


def test_a_mesh_is_cut_to_the_slice(there):
    mesh = compiled.mesh_of(programs.PROGRAMS["step:minigpt4_stage1"], hardware.find("v5e:1x1"))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


def test_the_figures_of_a_text(there):
    row = compiled.judge(compiled.Compiled(FACTS, TEXT))
    assert list(row)[:len(KEYS)] == KEYS
    flops, clock = 7 * 2 * 16 * 64 * 32, hardware.CHIPS["v5e"].clock
    assert row["flops"] == flops and row["estimate_ms"] == pytest.approx(1e3 * 7_050 / clock)
    assert row["share_of_peak"] == pytest.approx(1e9 / 197e12 / (7_050 / clock))
    assert (row["temporaries_bytes"], row["per_call_bytes"], row["fits"], row["sent_bytes"]) == (5, 0, True, 0)
    assert row["parts"]["feed-forward"]["flops"] == flops and row["parts"]["recomputed"]["ms"] == 0
    assert json.loads(json.dumps(row)) == row
    *_, line = compiled.markdown([row]).splitlines()
    assert line.startswith("| `vit` | v5e:1x1 | 0.0 | 0.0 | 1.08 |") and "feed-forward" in line


def test_a_program_that_makes_tokens_counts_an_iteration_and_the_call_around_it(there, monkeypatch):
    """The loop ends when the model says so, so the text has no trip count."""
    monkeypatch.setitem(programs.PROGRAMS, "decode", programs.Program("tokens", None, per_token=True))
    row = compiled.judge(compiled.Compiled(FACTS | {"program": "decode"},
                                           program(X, W, *LOOP, OUTSIDE, before=FUSED)))
    assert row["flops"] == 2 * 16 * 64 * 32 and row["per_call_bytes"] == 2 * 64 * 32 * 2


REFUSED = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\n  Used 20.98G of 15.75G hbm.\nMore words"


def test_a_program_that_does_not_fit_is_a_row(there, monkeypatch, tmp_path, capsys):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(REFUSED)

    class Built:
        def lower(self):
            return Lowered()

        def count(self):
            return programs.Needed(10**9)

        def floor_bytes(self, needed):
            return 2_000

    monkeypatch.setitem(programs.PROGRAMS, "large", programs.Program("too large", lambda mesh: Built()))
    out = tmp_path / "found.json"
    compiled.main(["--program", "large", "--topology", "v5e", "--json", str(out)])
    (row,) = json.loads(out.read_text())
    assert list(row)[:len(KEYS)] == KEYS and row["fits"] is False and row["message"] == REFUSED
    assert row["floor_flops"] == 10**9 and row["flops"] is row["estimate_ms"] is None
    assert "Used 20.98G of 15.75G hbm" in capsys.readouterr().out


def test_compiled_programs_are_kept_and_read(there, monkeypatch, tmp_path, capsys):
    calls = []

    def compile_program(name, topology):
        calls.append(name)
        return compiled.Compiled(FACTS, TEXT)

    monkeypatch.setattr(compiled, "compile_program", compile_program)
    for _ in range(2):
        compiled.main(["--program", "vit", "--topology", "v5e", "--texts", str(tmp_path / "texts")])
    shown = capsys.readouterr().out
    assert calls == ["vit"] and "not compiled again, read from" in shown
    assert "Compiled, not run" in shown and "50%" in shown and "feed-forward" in shown


@pytest.mark.parametrize(("args", "message"), [
    (["--program", "vitt"], r"--program vitt: known are vit, imagebind, .*step for all steps"),
    (["--topology", "v9"], r"--topology v9: known are v5e, v5p, v6e"),
    (["--topology", "h100:2x2"], r"--topology h100:2x2: known are"),
    (["--json", "absent/x.json"], "the folder absent does not exist"),
    (["--json", "gs://bucket/x.json"], "gs://bucket/x.json")])
def test_mistakes_are_one_line(there, capsys, args, message):
    with pytest.raises(SystemExit) as stopped:
        compiled.main(["--program", "vit", *args] if args[0] != "--program" else args)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(message, error) and len(error.splitlines()) == 1


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_one_line_says_so(capsys):
    with pytest.raises(SystemExit):
        compiled.main(["--program", "vit", "--topology", "v5e"])
    assert re.fullmatch(r".*needs libtpu: pip install 'mmjax\[tpu\]'\.\n", capsys.readouterr().err)


def test_a_step_needs_its_weights_once_or_twice():
    """Forward alone for the frozen tower, forward and backward for what stands on the projector."""
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    settings = config.load("configs/minigpt4_stage2.py")
    settings = dataclasses.replace(settings, weights=dataclasses.replace(
        settings.weights, checkpoint="checkpoints/tiny", dtype="float32"))
    built = programs._step(settings, None, mesh)
    needed = built.count()
    assert needed.backward == {"llm", "projector"}
    once = programs.plan.nbytes(built.others) + sum(map(programs._gathered_bytes, built.weights.values()))
    twice = sum(programs._gathered_bytes(built.weights[part]) for part in needed.backward)
    assert built.floor_bytes(needed) == once + twice
    assert "embedding" not in built.weights["llm"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)")
def test_a_program_for_a_tpu(tmp_path):
    out = tmp_path / "found.json"
    done = subprocess.run([sys.executable, "-m", "benchmarks.compiled", "--program", "vit", "--topology", "v5e",
                           "--json", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(out.read_text())
    assert row["fits"] and row["floor_flops"] == pytest.approx(8.3315e12, rel=1e-3)
    assert row["flops"] == pytest.approx(row["floor_flops"], rel=0.01)
    assert row["floor_bytes"] <= row["bytes"] and 0.3 < row["share_of_peak"] < 1
