"""Writes inspected files to a checkpoint folder: first to a temporary folder, which is then renamed.

    OUT/weights/      an Orbax checkpoint with every parameter in its source's dtype; under `replaced/` the parameters
                      that an adapter replaced (the language model's norms), for export
    OUT/config.json   family, architecture, text settings, generation ids, and the sources' sizes and SHA-256
    OUT/tokenizer/    copies of the language model's tokenizer files
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from mmjax import files, trees
from mmjax.checkpoints import frozen as frozen_weights
from mmjax.checkpoints import storage
from mmjax.checkpoints.converted import CARD, FORMAT
from mmjax.convert import weight_files
from mmjax.convert.adapter import REPLACED
from mmjax.convert.llama import TOKENIZER_FILES
from mmjax.convert.notes import note
from mmjax.convert.tables import Problems, SourceCheckpoint
from mmjax.families.base import Family, find, shapes
from mmjax.tokenizer import WORDS

OLD = "-old"  # ending of the name of a checkpoint that is being replaced
ALIASES = {"--llama": "--llm"}  # options of earlier versions


def renamed(arg: str) -> str:
    """Returns an argument of the command line with the current name of its option."""
    name, equals, value = arg.partition("=")
    return ALIASES.get(name, name) + equals + value


def command(name: str | Family) -> Callable[..., None]:
    """Returns the conversion of a family as a function of the options of `Conversion.inspect`, `out` and `overwrite`.

    It raises ConversionError listing all problems; then nothing is written.
    """
    family = find(name)
    if family.conversion is None:
        raise ValueError(f"The family {family} declares no conversion.")
    signature = inspect.signature(family.conversion.inspect)
    positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    out = inspect.Parameter("out", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Path)
    overwrite = inspect.Parameter("overwrite", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    signature = inspect.Signature([*positional, out, *named, overwrite])

    def convert(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs).arguments
        target, replace = _path(given.pop("out")), given.pop("overwrite", False)
        _check_out(target, replace)
        paths = {name for name, p in signature.parameters.items() if files.is_path(p.annotation)}
        given = {name: _path(value) if name in paths else value for name, value in given.items()}
        recover(Path(os.path.realpath(target)))
        begun = time.monotonic()
        found = family.conversion.inspect(**given)
        write(family, found, target, replace)
        for line in summary(family, found, target, time.monotonic() - begun):
            note(line)

    convert.__signature__ = signature
    convert.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    convert.__name__ = family.name
    convert.__doc__ = (
        inspect.cleandoc(family.conversion.inspect.__doc__)
        + "\n    out: checkpoint folder to write; must not exist, or be empty"
        + "\n    overwrite: replace `out` if it exists\n")
    return convert


def write(family: Family, found: SourceCheckpoint, out: Path, overwrite: bool = False) -> None:
    """Writes a checkpoint. After an error or an interrupt nothing is left behind and `out` is unchanged."""
    problems, architecture = Problems(), family.Config(**found.parts)
    out = Path(os.path.realpath(out))  # a link keeps pointing to the checkpoint
    wanted = shapes(family, architecture)
    covered = {**found.parameters, **{path: wanted[path] for path in found.fresh if path in wanted}}
    stored = found.parameters | {REPLACED + path: parameter for path, parameter in found.replaced.items()}
    nbytes = sum(parameter.nbytes for parameter in stored.values())
    problems.extend(trees.compare(wanted, covered))
    problems.extend(f"fresh       {path} is not a parameter of the model" for path in found.fresh if path not in wanted)
    free = shutil.disk_usage(next(parent for parent in out.parents if parent.exists())).free
    if free < nbytes * 1.02:
        problems.append(f"{out.parent} has {free / 1e9:.1f} GB free, the checkpoint needs {nbytes / 1e9:.1f} GB.")
    problems.check("Cannot convert")

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f"{_partial_name(out)}{socket.gethostname()[:40]}-{os.getpid()}"
    fingerprints = Fingerprints({path for paths in found.sources.values() for path in paths})
    try:
        partial.mkdir()
        with progress_bar("Converting", nbytes) as advance:
            frozen_weights.save(partial / "weights", stored, advance)
        _copy_tokenizer(found.tokenizer, partial / "tokenizer")
        if found.words:
            shutil.copyfile(found.words, partial / "tokenizer" / WORDS)
        card = _config(family, architecture, found, fingerprints.join())
        (partial / CARD).write_text(json.dumps(card, indent=2) + "\n")
        _move(partial, out, overwrite)
    finally:
        fingerprints.stop()
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def progress_bar(task: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows bytes, speed and time left on stderr; yields the function that advances the bar by some bytes."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True, markup=False)) as bar:
        number = bar.add_task(task, total=total)
        yield lambda size: bar.advance(number, size)


class Fingerprints:
    """Computes the SHA-256 of files in a thread during the conversion."""

    def __init__(self, paths: set[Path]):
        self._files: dict[Path, dict[str, Any]] = {}
        self._error: OSError | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(sorted(paths),), daemon=True)
        self._thread.start()

    def _run(self, paths: Sequence[Path]) -> None:
        try:
            for path in paths:
                digest = hashlib.sha256()
                with open(path, "rb") as file:
                    while (block := file.read(2**20)) and not self._stopped.is_set():
                        digest.update(block)
                self._files[path] = {"file": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}
        except OSError as error:
            self._error = error

    def join(self) -> Mapping[Path, dict[str, Any]]:
        """Waits and returns {path: {"file", "bytes", "sha256"}}. Raises OSError if a file could not be read."""
        self._thread.join()
        if self._error:
            raise self._error
        return self._files

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def _config(family: Family, architecture: Any, found: SourceCheckpoint,
            files: Mapping[Path, dict[str, Any]]) -> dict[str, Any]:
    sources = {name: [files[path] for path in paths] for name, paths in found.sources.items()}
    return {
        "format": FORMAT,
        "family": family.name,
        "architecture": dataclasses.asdict(architecture),
        "text": dataclasses.asdict(found.text),
        "generation": found.generation,
        "sources": {name: each if name == "llm" else each[0] for name, each in sources.items()},
        "fresh": list(found.fresh),
        "constant": found.constant,
    }


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _path(path: str | Path | None) -> Path | None:
    """Returns the absolute path of a file with its folder resolved; a link itself is not (its target may be a hash).

    Raises ValueError for a URL.
    """
    files.refuse([problem] if (problem := files.url_problem(path)) else [])
    if not path:
        return None
    path = Path(path).absolute()
    return path.parent.resolve() / path.name


def _check_out(out: Path, overwrite: bool) -> None:
    storage.local(out)  # raise here rather than after everything has been read
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty. Choose another folder, or replace it with --overwrite.")


def _move(partial: Path, out: Path, overwrite: bool) -> None:
    """Renames a finished checkpoint to `out`. Between the two renames of a replacement only `recover` finds the old
    one."""
    _check_out(out, overwrite)  # it may have been created meanwhile
    old = partial.with_name(partial.name + OLD)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    _remove(old)


def _partial_name(out: Path) -> str:
    """Returns the beginning of the names of unfinished checkpoints; file names have a maximum length."""
    return f".{out.name[:40]}.partial-"


def recover(out: Path) -> None:
    """Restores the checkpoint that a killed `--overwrite` had moved away, and removes what killed conversions left.

    Only leftovers of this machine's ended processes are touched: another machine may be converting.
    """
    pattern = re.compile(rf"{re.escape(_partial_name(out))}(.+)-(\d+)({re.escape(OLD)})?")
    found = [] if not out.parent.is_dir() else sorted(out.parent.iterdir())
    for path in found:
        match = pattern.fullmatch(path.name)
        if match is None or match[1] != socket.gethostname()[:40] or _alive(int(match[2])):
            continue
        if match[3] and not out.exists():
            path.rename(out)
            note(f"A conversion was killed while it replaced {out}. The former checkpoint is there again.")
        else:
            _remove(path)
            note(f"Removed {path}, which a killed conversion left.")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return process != os.getpid()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ---- the summary ----


def summary(family: Family, found: SourceCheckpoint, out: Path, seconds: float) -> list[str]:
    """Returns the lines at the end of a conversion: what was taken from where, what was left out, what is fresh."""
    groups: dict[str, list[tuple[str, Any]]] = {}
    for path, parameter in found.parameters.items():
        option = next((option for pattern, option in family.conversion.origins if re.fullmatch(pattern, path)), "")
        option = "computed" if path in found.constant else option
        groups.setdefault(option, []).append((path, parameter))
    lines = []
    for option, held in groups.items():
        files = [file.name for file in found.sources.get(option, ())]
        dtypes = sorted({str(parameter.dtype) for _, parameter in held})
        size = sum(parameter.nbytes for _, parameter in held)
        source = weight_files.listed(files) or ("constants" if option == "computed" else "the given files")
        lines.append(f"  {option or 'parameters'}: {len(held)} parameters, {', '.join(dtypes)}, {_size(size)}, from "
                     f"{source}")
    for (file, why), count in found.left_out.items():
        lines.append(f"  left out of {file}: {count} tensor{'s' * (count > 1)} ({why})")
    if found.fresh:
        options = {option for path in found.fresh for pattern, option in family.conversion.origins
                   if re.fullmatch(pattern, path)}
        missing = ", ".join(f"--{option}" for option in sorted(options) if option not in found.sources)
        names = ", ".join(found.fresh[:4]) + (f", ... ({len(found.fresh)} in all)" if len(found.fresh) > 4 else "")
        lines.append(f"  starts fresh, and is useless until it is trained: {names}"
                     + f" (no {missing} was given)" * bool(missing))
    total = sum(parameter.nbytes for parameter in found.parameters.values())
    return [f"Converted {family.name} in {seconds:.1f} s:", *lines, f"  {_size(total)} in {out}"]


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
