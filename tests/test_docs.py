"""Every command of the README, the docs and the configs: its options and files exist, its rows fit its mesh."""

import ast
import functools
import importlib.util
import math
import re
import shlex
from pathlib import Path

import pytest
import tyro

from mmjax import cli, files
from mmjax.config import RunConfig
from mmjax.cost import hardware
from mmjax.training import run

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
START = re.compile(r"(?:\S*/)?(mmjax|python3?|pip|pytest)$")
LAUNCHERS = ("srun", "mpirun", "gcloud", "nohup", "nice", "timeout", "taskset")


class Parsed(Exception):
    """The options of a command were read; it is not run."""


def blocks(path):
    """The fenced shell blocks of a page, or the indented commands of a config's docstring, as lines of shell."""
    text = path.read_text()
    if path.suffix == ".py":
        found = re.findall(r"^    ((?:python|mmjax) (?:[^\\\n]|\\\n)*)", ast.get_docstring(ast.parse(text)) or "", re.M)
    else:
        found = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.M | re.S)
    return "\n".join(found).replace("\\\n", " ").splitlines()


def split(line):
    """The simple commands of a line: cut at `&&`, `|`, `;`, without comments; those in quotes of a launcher, too."""
    words = shlex.split(re.sub(r"\[--\w+ \w+ \.\.\.\]", "", line).replace(" ...", ""), comments=True)
    command = []
    for word in [*words, ";"]:
        if word in ("&&", "||", "|", ";", "&"):
            if command:
                yield command
            command = []
        elif "python " in word and " " in word:  # gcloud ... --command="cd mmjax && python train.py ..."
            yield from split(word.partition("=")[2] or word)
        elif word not in (">", "2>&1"):
            command.append(word)


def commands():
    for path in (*TEXTS, *CONFIGS):
        for line in blocks(path):
            for command in split(line):
                while command and (re.fullmatch(r"\w+=\S*", command[0])):
                    command = command[1:]
                start = next((i for i, word in enumerate(command) if START.fullmatch(word)), None)
                if start is not None and (start == 0 or command[0] in LAUNCHERS):
                    yield path.relative_to(ROOT), command[:start], command[start:]


COMMANDS = list(commands())


@pytest.fixture
def parse(monkeypatch):
    """Calls the command line until its options are read. Returns the configs of a run, if it takes a config."""
    real, real_subcommands = tyro.cli, tyro.extras.subcommand_cli_from_dict
    seen = []

    def without_call(function):
        @functools.wraps(function)
        def stop(*args, **kwargs):
            raise Parsed

        return stop

    def parse_only(what, **options):
        if not isinstance(what, type):
            return real(without_call(what), **options)
        result = real(what, **options)
        if isinstance(result, RunConfig) or what.__name__ == "Phases":
            return result
        raise Parsed

    def keep(config, *rest, **options):
        seen.append(config)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parse_only)
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", lambda commands, **options: real_subcommands(
        {name: without_call(function) for name, function in commands.items()}, **options))
    monkeypatch.setattr(run, "train", keep)
    monkeypatch.setattr(run, "train_phases", keep)
    monkeypatch.setattr("mmjax.cost.plan.plan", keep)
    monkeypatch.setattr("mmjax.compilation.enable", lambda: None)
    monkeypatch.setattr("jax.config.update", lambda *args: None)
    monkeypatch.chdir(ROOT)

    def call(command, args):
        seen.clear()
        with pytest.raises(Parsed):
            cli.COMMANDS[command](args)
        return seen

    return call


def cli_command(words):
    """The command of `mmjax` that the words call, and its arguments; None if they call something else."""
    name = Path(words[0]).name
    if name == "mmjax":
        return words[1], words[2:]
    scripts = {"train.py": "train", "convert_weights.py": "convert"}
    if name.startswith("python") and len(words) > 1 and words[1] in scripts:
        return scripts[words[1]], words[2:]
    return None


def devices(launcher, words):
    """The number of devices that a command is for, as far as it says."""
    if "--topology" in words:
        sizes = words[words.index("--topology") + 1].partition(":")[2]
        return math.prod(map(int, sizes.split("x"))) if sizes else None
    if "--gpus-per-node" in launcher:
        return int(launcher[launcher.index("--nodes") + 1]) * int(launcher[launcher.index("--gpus-per-node") + 1])
    return None


def shards(mesh, count):
    """The number of shards of a batch's rows, with as few devices as the command allows."""
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    known = math.prod(size for size in sizes if size != -1)
    assert count is None or count % known == 0, f"a mesh of {known} for {count} devices"
    sizes = [(count or known) // known if size == -1 else size for size in sizes]
    assert count is None or math.prod(sizes) == count, f"a mesh of {math.prod(sizes)} for {count} devices"
    return sizes[0] * sizes[1]


def test_there_are_commands():
    called = [cli_command(words) for _, _, words in COMMANDS]
    assert len(COMMANDS) > 40
    assert {"train", "convert", "generate", "evaluate", "chat", "data", "plan", "export"} <= {
        name for name, _ in filter(None, called)}


@pytest.mark.parametrize("path", sorted({path for path, _, _ in COMMANDS}), ids=str)
def test_commands_of(path, parse, capsys):
    problems = []
    for where, launcher, words in COMMANDS:
        if where == path:
            try:
                check(launcher, words, parse)
            except (AssertionError, ValueError, OSError, SystemExit) as error:
                problems.append(f"{shlex.join(words)}\n    {error} {capsys.readouterr().err}")
    assert not problems, "\n".join(problems)


def check(launcher, words, parse):
    """Raises an error if a command cannot work."""
    words = ["configs/tiny_minigpt4.py" if word == "CONFIG" else word for word in words]
    called = cli_command(words)
    if called is None:
        check_other(words)
        return
    for config in (configs for built in parse(*called) for configs in (
            built.values() if isinstance(built, dict) else [built])):
        run.check(config)
        rows = shards(config.mesh, devices(launcher, words))
        size = config.data.batch_size
        assert size % rows == 0, f"data.batch_size = {size}, {rows} shards"
    assert not [word for word in words if word.startswith("configs/") and not (ROOT / word).exists()]
    assert files.url_problems({}) == []
    if "--topology" in words and words[words.index("--topology") + 1] != hardware.LOCAL:
        name, _, sizes = words[words.index("--topology") + 1].partition(":")
        assert len(sizes.split("x")) == hardware.CHIPS[name].dimensions


def check_other(words):
    """Checks the files and modules of a command that is not mmjax's own."""
    if "-m" in words:
        module = words[words.index("-m") + 1]
        path = ROOT / Path(*module.split(".")).with_suffix(".py")
        if module.split(".")[0] in ("benchmarks", "scripts", "mmjax"):
            options = [word.partition("=")[0] for word in words if word.startswith("--")]
            unknown = [option for option in options if option not in path.read_text()]
            assert not unknown, f"{path} has no {unknown}"
        else:
            assert module in ("venv", "pip", "build", "http") or importlib.util.find_spec(module)
    for word in words:
        if re.fullmatch(r"(scripts|benchmarks|tests)/\S+", word):
            assert (ROOT / word.partition("::")[0]).exists(), f"there is no {word}"
