"""Who may import whom: a module may import those of lower levels, and those beside it in its own package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = (
    {"files"},
    {"batch", "compilation", "config", "tokenizer", "trees"},
    {"sharding", "models.pixels", "models.int8", "models.masks", "models.remat", "models.senses"},
    {"models.layers"},
    {"models.kernels"},
    {"models.blocks", "models.language_model"},
    {"models"},
    {"convert"},  # readers of weight files, tables, and one module a source of weights
    {"families"},
    {"checkpoints", "data"},
    {"convert.write", "convert.export"},
    {"training", "inference"},
    {"cost"},
    {"training.loop", "training.run"},
    {"evaluate", "parity", "cost.plan"},
    {"doctor"},
    {"cli"},
    {"train", "convert_weights"},  # the scripts
)
FILES = [path for path in sorted((ROOT / "mmjax").rglob("*.py")) if path != ROOT / "mmjax" / "__init__.py"]
MODULES = {path: ".".join(path.relative_to(ROOT / "mmjax").with_suffix("").parts).removesuffix(".__init__")
           for path in FILES}
MODULES |= {ROOT / f"{name}.py": name for name in sorted(LEVELS[-1])}


def level(module: str) -> int:
    """Of the longest listed name that the module's begins with."""
    levels = {name: number for number, names in enumerate(LEVELS) for name in names}
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in levels:
            return levels[name]
    raise AssertionError(f"mmjax/{module.replace('.', '/')}.py has no level: add it to LEVELS")


def imported(path: Path) -> set[str]:
    """The modules of mmjax that a file imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    known = set(MODULES.values())
    inside = {name.removeprefix("mmjax.") for name in names if name.startswith("mmjax.")}
    # `from mmjax.trees import prefixed` names something in a module, `from mmjax import trees` the module itself
    return {name if name in known else name.rpartition(".")[0] for name in inside} - {""}


@pytest.mark.parametrize("path", MODULES, ids=MODULES.values())
def test_imports_go_down(path):
    name = MODULES[path]
    package = name.split(".")[0]
    for other in imported(path):
        beside = other.split(".")[0] == package != "models"  # models do not know each other
        assert level(other) < level(name) + beside, f"mmjax.{name} may not import mmjax.{other}"


def test_the_rule_sees_what_is_imported():
    assert imported(ROOT / "mmjax" / "data" / "text.py") == {"batch", "config", "tokenizer"}
    assert imported(ROOT / "mmjax" / "cli" / "data.py") >= {
        "training.run", "config", "checkpoints.converted", "tokenizer"}


def test_every_level_is_of_a_module():
    listed = {name for names in LEVELS for name in names}
    assert listed <= {".".join(name.split(".")[:end]) for name in MODULES.values() for end in (1, 2)}


def test_importing_mmjax_brings_no_heavy_package():
    heavy = ("torch", "tensorflow", "grain", "tensorflow_datasets", "gradio", "matplotlib", "transformers")
    code = f"import sys, mmjax; print(*sorted(set({heavy}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []
