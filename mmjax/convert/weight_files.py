"""Selects the weight files of a folder as transformers does, and prints which files are read and which are not.

Facts: transformers' modeling_utils.py, _get_resolved_checkpoint_files; peft's save_and_load.py, load_peft_weights.
"""

import dataclasses
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from mmjax.convert.notes import note
from mmjax.convert.tables import Problems, read_json

ORDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PEFT_ORDER, PEFT_CONFIG = ("adapter_model.safetensors", "adapter_model.bin"), "adapter_config.json"
INDEX = ".index.json"
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".onnx", INDEX)
UNFINISHED = (".aria2", ".part", ".partial", ".incomplete", ".crdownload", ".download", ".tmp")  # downloads
NUMBERED = re.compile(r"(.+-)\d+(-of-\d+.*)|(consolidated\.)\d+(\.pth)")


@dataclasses.dataclass(frozen=True)
class WeightSet:
    """One file with all tensors, or an index and its shards.

    name:       the file, or the index
    weight_map: {key: file name} of the index; {} for one file
    """

    folder: Path
    name: str
    weight_map: Mapping[str, str]

    @property
    def files(self) -> list[Path]:
        """The files with tensors."""
        names = [self.name] if not self.name.endswith(INDEX) else sorted(set(self.weight_map.values()))
        return [self.folder / name for name in names]

    def missing(self, complete: str | None) -> list[str]:
        """Returns a line if files of the set are missing. complete: what to do instead of downloading them"""
        absent = [file.name for file in self.files if not os.path.lexists(file)]
        if not absent or not os.path.lexists(self.folder / self.name):
            return []
        is_missing, them = ("are missing", "them") if len(absent) > 1 else ("is missing", "it")
        return [f"{self.folder}: {listed(absent) if len(absent) > 8 else ', '.join(absent)} {is_missing}, though "
                f"{self.name} lists {them}. {complete or f'Download {them}.'}"]


def candidates(folder: Path, problems: Problems) -> list[str]:
    """Returns the names of the folder's sets; transformers, or peft for a folder of its own, reads the first.

    A broken link counts as a set: transformers would read the next set, which may be an older one.
    """
    found = Problems()
    config = read_json(folder / "config.json", found) if os.path.isfile(folder / "config.json") else {}
    problems.extend(line for line in found if line not in problems)
    named = config.get("transformers_weights")
    if named is None:
        if os.path.lexists(folder / PEFT_CONFIG):
            return [name for name in PEFT_ORDER if os.path.lexists(folder / name)]
        return [name for name in ORDER if os.path.lexists(folder / name)]
    if not _is_file_name(named) or not named.endswith((".safetensors", ".safetensors" + INDEX)):
        problems.append(f"{folder / 'config.json'}: transformers_weights is {named!r}; expected the name of a "
                        f".safetensors or .safetensors{INDEX} file in that folder.")
        return []
    return [named]


def open_set(folder: Path, name: str, problems: Problems) -> WeightSet:
    """Returns the set of that name. Adds a problem for each unfinished file, and if there is no such set."""
    if not os.path.lexists(folder / name):
        problems.append(f"{folder}: {name} is missing, though config.json names it as transformers_weights. Download "
                        "it, or take that field out of config.json.")
        return WeightSet(folder, name, {})
    chosen = WeightSet(folder, name, _weight_map(folder / name, problems) if name.endswith(INDEX) else {})
    check_finished(chosen.files, problems)
    return chosen


def check_finished(files: Iterable[Path], problems: Problems) -> None:
    """Adds problems for broken links and for files that aria2 has not finished (they have their full size at once)."""
    for file in files:
        if os.path.islink(file) and not os.path.exists(file):
            problems.append(f"{file} is a link to {os.readlink(file)}, which does not exist. Download it again.")
        if os.path.lexists(f"{file}.aria2"):
            problems.append(f"{file} is not complete: {file.name}.aria2 exists, which aria2 deletes at the end of the "
                            "download. Start the download again to resume it.")


def _weight_map(index: Path, problems: Problems) -> dict[str, str]:
    """Returns {key: file name} of an index; with a problem, {}."""
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
    """Returns whether this is a file name without a folder. `Path` would also accept "" and "a/"."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def unread(folder: Path, used: Collection[str] = ()) -> list[str]:
    """Returns the other weight files and indexes of a folder, including unfinished downloads."""
    if not os.path.isdir(folder):
        return []
    names = sorted(name for name in os.listdir(folder) if name not in used and not os.path.isdir(folder / name))
    return [name for name in names if _without(name.lower()).endswith(SUFFIXES)]


def _without(name: str) -> str:
    return next((name.removesuffix(ending) for ending in UNFINISHED if name.endswith(ending)), name)


def report(folder: Path, used: Collection[str], why: str) -> None:
    """Prints which files are read and which weight files are ignored. why: the reason for the latter."""
    note(f"{folder}: reading {listed(used)}.")
    if ignored := unread(folder, used):
        note(f"{folder}: ignoring {listed(ignored)}. {why}")


def why_ignored(folder: Path, name: str) -> str:
    """Returns why a folder's weight files other than the set `name` are not read."""
    if name in PEFT_ORDER:
        return f"As in peft, {name} is read, the first that exists of {', '.join(PEFT_ORDER)}."
    if name != next(known for known in (*ORDER, name) if os.path.lexists(folder / known)):
        return f"config.json names {name} as transformers_weights."
    meta = any(name.startswith("consolidated.") for name in unread(folder))
    return (f"As in transformers, {name} is read, the first that exists of {', '.join(ORDER)}."
            + " Meta's consolidated.NN.pth are read only in a folder without config.json." * meta)


def listed(names: Iterable[str]) -> str:
    """Returns names in one line; the shards of a set are one name with a star."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(NUMBERED.sub(r"\1\3*\2\4", name), []).append(name)
    return ", ".join(found[0] if len(found) == 1 else f"{group} ({len(found)} files)"
                     for group, found in groups.items())
