"""Programs that were compiled once come from the cache; here in processes of their own, as the cache is JAX's."""

import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from rich.console import Console

from mmjax import compilation

ROOT = Path(__file__).parents[1]
CODE = """
import sys, jax
from rich.console import Console
from mmjax import compilation
print(compilation.enable())
with compilation.announce("the step", Console(file=sys.stdout, width=300)):
    jax.jit(lambda x: x * 2 + 1)(3.0).block_until_ready()
"""


def run(**environment: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_COMPILATION_CACHE_DIR",)}
    done = subprocess.run([sys.executable, "-c", CODE], env=kept | {"JAX_PLATFORMS": "cpu"} | environment, cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_second_time_it_comes_from_the_cache(tmp_path):
    folder = tmp_path / "mmjax" / "compiled"
    here = {"XDG_CACHE_HOME": str(tmp_path), "MMJAX_COMPILATION_CACHE": ""}  # which is as if it were not set
    first, second = run(**here), run(**here)
    assert first[0] == second[0] == str(folder)
    assert first[1] == f"Compiling the step. Compiled programs are cached in {folder}."
    assert first[2].startswith("The step took ") and second[2].startswith("The step came from the cache in ")
    assert list(folder.iterdir())


def test_it_can_be_switched_off(tmp_path):
    lines = run(XDG_CACHE_HOME=str(tmp_path), MMJAX_COMPILATION_CACHE="off")
    assert lines[0] == "None"
    assert lines[1].startswith("Compiling the step. Compiled programs are not cached; MMJAX_COMPILATION_CACHE names")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def as_before():
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(("variable", "before", "expected"), [
    ("", "", "cache/mmjax/compiled"), ("mine", "", "mine"), ("", "jax", "jax"), ("mine", "jax", "mine"),
    ("off", "jax", None)])
def test_whose_word_counts(monkeypatch, tmp_path, as_before, variable, before, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv(compilation.VARIABLE, variable)
    jax.config.update("jax_compilation_cache_dir", before or None)
    assert compilation.enable() == (expected and Path(expected))
    assert jax.config.jax_enable_compilation_cache == (expected is not None)
    assert jax.config.jax_compilation_cache_dir == expected


@pytest.fixture
def below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return str(tmp_path / "file" / "below")


def test_without_a_cache_folder_it_stays_off(monkeypatch, below_a_file, as_before):
    monkeypatch.delenv(compilation.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", below_a_file)
    jax.config.update("jax_compilation_cache_dir", None)
    assert compilation.enable() is None
    said = io.StringIO()
    with compilation.announce("the step", Console(file=said, width=300)):
        pass
    assert "not cached" in said.getvalue()


def test_a_named_folder_must_be_writable(monkeypatch, below_a_file, as_before):
    monkeypatch.setenv(compilation.VARIABLE, below_a_file)
    with pytest.raises(ValueError, match="MMJAX_COMPILATION_CACHE = .*below: this folder cannot be written"):
        compilation.enable()
