"""How the package is built, counted on the syntax tree: who names a family or a language model, sizes, and circles.

A name counts where it is an identifier, an attribute, a module, a keyword, or a string that is a name or a path.
Comments, docstrings and sentences do not count.
"""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.test_imports import MODULES, ROOT, imported

PACKAGE = ROOT / "mmjax"
FAMILIES = re.compile(r"minigpt_?4|imagebind|llama_?adapter|llava", re.IGNORECASE)
LANGUAGE_MODELS = re.compile("llama", re.IGNORECASE)
MODEL_FILES = {"models/imagebind.py"}  # the encoder ImageBind, which a family uses
FORMATS = {"imagebind_llm", "imagebind_llm_pretrain", "imagebind_llm_finetune", "llava_instruct"}  # of data on disk
TEMPLATES = {"llama2"}  # of `mmjax chat --template`
NAME = re.compile(r"[\w\-./*+?|()\[\]{}\\^$<>:]+")  # an identifier, an option, a path or a pattern of paths
MOST_MODULES, LONGEST_FUNCTION = 12, 60

SOURCES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8"))
           for path in sorted(PACKAGE.rglob("*.py"))}


def names(tree: ast.AST) -> Iterator[str]:
    """All that names something in a file."""
    documentation = {id(node.body[0].value) for node in ast.walk(tree)
                     if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
                     and node.body and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.FunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.alias(name=name, asname=other):
                yield from (*name.split("."), *([other] if other else []))
            case ast.ImportFrom(module=str(name)):
                yield from name.split(".")
            case ast.Constant(value=str(text)) if id(node) not in documentation and NAME.fullmatch(text):
                yield text


def naming(pattern: re.Pattern, exempt: set[str]) -> dict[str, set[str]]:
    """{file: names in it that the pattern finds}, of the files that do not begin with one of `exempt`."""
    found = {file: {name for name in names(tree) if pattern.search(name)} for file, tree in SOURCES.items()
             if not file.startswith(tuple(exempt))}
    return {file: held for file, held in found.items() if held}


def test_no_family_is_named_outside_families_and_conversions():
    found = naming(FAMILIES, {"families/", "convert/", *MODEL_FILES})
    assert {file: held - FORMATS for file, held in found.items() if held - FORMATS} == {}


def test_no_language_model_is_named_outside_models_families_and_conversions():
    found = naming(LANGUAGE_MODELS, {"models/", "families/", "convert/", "checkpoints/format1.py"})
    assert {file: held - TEMPLATES for file, held in found.items() if held - TEMPLATES} == {}


def test_every_exemption_is_needed():
    used = set().union(*naming(FAMILIES, {"families/", "convert/", *MODEL_FILES}).values())
    assert used >= FORMATS
    assert used | set().union(*naming(LANGUAGE_MODELS, {"models/", "families/", "convert/"}).values()) >= TEMPLATES
    assert naming(FAMILIES, set()).keys() >= MODEL_FILES


@pytest.mark.parametrize(("code", "found"), [
    ("import mmjax.families.minigpt4", {"minigpt4"}),
    ("from mmjax.models import imagebind as towers", {"imagebind"}),
    ("cfg.llama.vocab", {"llama"}),
    ("def f(llama): pass", {"llama"}),
    ("f(llama=1)", {"llama"}),
    ("path.startswith('llama/')", {"llama/"}),
    ("family.name == 'llama_adapter'", {"llama_adapter"}),
    ("class MiniGPT4: pass", {"MiniGPT4"}),
    ("raise ValueError('Of LLaMA, or of MiniGPT-4.')", set()),
    ("raise ValueError(f'{x} llama')", set()),
    ("f'llama/{x}'", {"llama/"}),
    ("def f():\n    'llama'", set()),
    ("x = 1  # llama", set()),
])
def test_what_counts_as_a_name(code, found):
    either = re.compile(f"{FAMILIES.pattern}|llama", re.IGNORECASE)
    assert {name for name in names(ast.parse(code)) if either.search(name)} == found


def test_few_modules_stay_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_MODULES


def test_functions_are_short():
    lengths = {f"{file}: {node.name}": node.end_lineno - node.lineno + 1 for file, tree in SOURCES.items()
               for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def test_no_console_reads_paths_as_markup():
    """In rich's markup a path with [1] loses it, and one with [/] is an error."""
    consoles = [(file, node) for file, tree in SOURCES.items() for node in ast.walk(tree) if isinstance(node, ast.Call)
                and (getattr(node.func, "id", "") or getattr(node.func, "attr", "")) == "Console"]
    plain = ("markup", False)
    assert len(consoles) > 10
    assert [f"{file}:{node.lineno}" for file, node in consoles
            if plain not in ((each.arg, getattr(each.value, "value", None)) for each in node.keywords)] == []


def test_no_imports_go_in_circles():
    """A module is removed once all it imports is; what is left then waits for itself."""
    left = {name: imported(path) - {name} for path, name in MODULES.items()}
    while leaves := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in leaves}
    assert left == {}
