"""Which files of a folder are its weights: those that transformers takes. What is read and what is not is printed.

Facts: transformers' modeling_utils.py, _get_resolved_checkpoint_files.
"""

import dataclasses
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from rich.console import Console

from mmjax.convert.tables import Problems, read_json

ORDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
INDEX = ".index.json"
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".onnx", INDEX)
UNFINISHED = (".aria2", ".part", ".partial", ".incomplete", ".crdownload", ".download", ".tmp")  # of a download
NUMBERED = re.compile(r"(.+-)\d+(-of-\d+.*)|(consolidated\.)\d+(\.pth)")

console = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class WeightSet:
    """One file with all tensors, or an index and its shards.

    name:       the file, or the index
    weight_map: {key: file name}, as the index says; nothing for one file
    """

    folder: Path
    name: str
    weight_map: Mapping[str, str]

    @property
    def files(self) -> list[Path]:
        """The files with tensors."""
        names = [self.name] if not self.name.endswith(INDEX) else sorted(set(self.weight_map.values()))
        return [self.folder / name for name in names]


def candidates(folder: Path, problems: Problems) -> list[str]:
    """Names of the folder's sets, the one that transformers takes first.

    A link to nothing counts: transformers would go on to the next set, which may be an older one.
    """
    found = Problems()
    config = read_json(folder / "config.json", found) if os.path.isfile(folder / "config.json") else {}
    problems.extend(line for line in found if line not in problems)
    named = config.get("transformers_weights")
    if named is None:
        return [name for name in ORDER if os.path.lexists(folder / name)]
    if not _is_file_name(named) or not named.endswith((".safetensors", ".safetensors" + INDEX)):
        problems.append(f"{folder / 'config.json'}: transformers_weights is {named!r}; expected the name of a "
                        f".safetensors or .safetensors{INDEX} file in that folder.")
        return []
    return [named]


def open_set(folder: Path, name: str, problems: Problems) -> WeightSet:
    """The set with that name. Files of it that are missing, or not finished, are problems."""
    if not os.path.lexists(folder / name):
        problems.append(f"{folder}: {name} is missing, though config.json names it as transformers_weights. Download "
                        "it, or take that field out of config.json.")
        return WeightSet(folder, name, {})
    chosen = WeightSet(folder, name, _weight_map(folder / name, problems) if name.endswith(INDEX) else {})
    absent = [file.name for file in chosen.files if not os.path.lexists(file)]
    if absent:
        is_missing, them = ("are missing", "them") if len(absent) > 1 else ("is missing", "it")
        problems.append(f"{folder}: {', '.join(absent)} {is_missing}, though {name} lists {them}. Download {them}.")
    check_finished(chosen.files, problems)
    return chosen


def check_finished(files: Iterable[Path], problems: Problems) -> None:
    """A link to nothing, and a file that aria2 is still filling (it has its full size from the start), are problems."""
    for file in files:
        if os.path.islink(file) and not os.path.exists(file):
            problems.append(f"{file} is a link to {os.readlink(file)}, which is not there. Download it again.")
        if os.path.lexists(f"{file}.aria2"):
            problems.append(f"{file} is not complete: {file.name}.aria2 is beside it, as aria2 leaves it until a "
                            "download has ended. Start the download again; it goes on.")


def _weight_map(index: Path, problems: Problems) -> dict[str, str]:
    """{key: file name} of an index; with a problem, nothing."""
    before = len(problems)
    found = read_json(index, problems).get("weight_map")
    if len(problems) > before:
        return {}
    wanted = f"{index} has no weight_map that names files of its own folder"
    if not isinstance(found, dict) or not found:
        problems.append(f"{wanted}: it is {str(found)[:100]}.")
        return {}
    wrong = next((key for key, name in found.items() if not _is_file_name(name)), None)
    if wrong is not None:
        problems.append(f"{wanted}: {wrong} is said to be in {str(found[wrong])[:200]!r}.")
        return {}
    return found


def _is_file_name(name: object) -> bool:
    """A name without a folder. `Path` alone would take "" and "a/" for one."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def unread(folder: Path, used: Collection[str] = ()) -> list[str]:
    """Names of the weight files and indexes in a folder beside the `used` ones, unfinished downloads included."""
    if not os.path.isdir(folder):
        return []
    names = sorted(name for name in os.listdir(folder) if name not in used and not os.path.isdir(folder / name))
    return [name for name in names if _without(name.lower()).endswith(SUFFIXES)]


def _without(name: str) -> str:
    return next((name.removesuffix(ending) for ending in UNFINISHED if name.endswith(ending)), name)


def report(folder: Path, used: Collection[str], why: str) -> None:
    """Prints which files are read and, if there are any, which weight files are not. why: a sentence for the latter."""
    _say(f"{folder}: reading {listed(used)}.")
    if others := unread(folder, used):
        _say(f"{folder}: ignoring {listed(others)}. {why}")


def why_ignored(folder: Path, name: str) -> str:
    """Why a folder's other weight files are not read, beside the set `name`."""
    if name != next(known for known in (*ORDER, name) if os.path.lexists(folder / known)):
        return f"config.json names {name} as transformers_weights."
    meta = any(name.startswith("consolidated.") for name in unread(folder))
    return (f"As in transformers, {name} is taken: the first that is there of {', '.join(ORDER)}."
            + " Meta's consolidated.NN.pth are read only in a folder without config.json." * meta)


def listed(names: Iterable[str]) -> str:
    """Names in one line; shards of one set as one name with a star."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(NUMBERED.sub(r"\1\3*\2\4", name), []).append(name)
    return ", ".join(found[0] if len(found) == 1 else f"{group} ({len(found)} files)"
                     for group, found in groups.items())


def _say(line: str) -> None:
    line = "".join(character if character.isprintable() else "?" for character in line)
    console.print(line, markup=False, highlight=False, soft_wrap=True)
