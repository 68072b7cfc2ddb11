"""Reads the tensors of a weight file or a folder, whatever wrote it: torch.save or safetensors, wrapped or not, with a
training state beside the weights or without.

Facts: minigpt4/runners/runner_base.py, LAVIS' runner_base.py, imagebind_LLM/util/misc.py, DeepSpeed's engine.py
(_save_checkpoint), Lightning's checkpoint_connector.py (dump_checkpoint), FSDP's and torch.compile's names.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mmjax.convert import safetensors, torch_file, weight_files
from mmjax.convert.lazy import LazyTensor, WeightFileError, kind
from mmjax.convert.notes import note
from mmjax.convert.tables import DTYPES, Problems, flat_tensors, shorten

WRAPPERS = ("model", "module", "state_dict", "model_state_dict")  # members with the weights
MEMBERS = frozenset({  # members with the state of a training, which are left out
    # the originals' runners, and common scripts
    "optimizer", "optimizers", "optimizer_state_dict", "optim", "scaler", "grad_scaler", "amp", "epoch", "epochs",
    "args", "config", "cfg", "opt", "iters", "iter", "iteration", "iterations", "step", "steps", "global_step",
    "num_steps", "lr_scheduler", "scheduler", "lr_sched", "lr_scheduler_state_dict", "scheduler_state_dict", "lr",
    "loss", "losses", "best_acc", "best_acc1", "best_metric", "best_loss", "metrics", "rng_state", "rng_states",
    "cuda_rng_state", "random_state", "seed", "date", "time", "version", "meta", "train_state", "history",
    # DeepSpeed
    "buffer_names", "param_shapes", "frozen_param_shapes", "shared_params", "data_sampler", "random_ltd",
    "sparse_tensor_module_names", "skipped_steps", "global_steps", "global_samples", "dp_world_size",
    "mp_world_size", "ds_config", "ds_version", "client_state", "autotp_config",
    # Lightning
    "pytorch-lightning_version", "loops", "callbacks", "optimizer_states", "lr_schedulers", "hparams_name",
    "hparams_type", "hyper_parameters", "datamodule_hparams_name", "datamodule_hyper_parameters", "MixedPrecision",
    "native_amp_scaling_state", "amp_scaling_state",
})
PREFIXES = ("module.", "_forward_module.", "_orig_mod.", "_fsdp_wrapped_module.", "state_dict.")
_PLAIN = re.compile(r"model\.(layers|embed_tokens|norm)\.")  # a language model's own names
_OPTIONAL = re.compile(r".*rotary_emb\.inv_freq|lm_head\.weight")  # in one of two forms of a model


def load(path: Path) -> Any:
    """Returns the content of a file by its first bytes, whatever its name. Raises WeightFileError."""
    if kind(path) == "safetensors":
        return safetensors.load(path)
    return torch_file.load(path, MEMBERS)


def read(path: Path, problems: Problems) -> dict[str, LazyTensor]:
    """Returns the tensors of a file by their names in the model; with a problem, {}.

    The tensors may be in a member of `WRAPPERS`, next to those of `MEMBERS`, which are left out; a prefix of
    `PREFIXES` that all names share is removed.
    """
    try:
        content = load(path)
    except WeightFileError as error:
        problems.append(str(error))
        return {}
    before = len(problems)
    content = _unwrap(content, path, problems)
    tensors = flat_tensors(path, content, problems)
    if tensors and all(0 in tensor.shape for tensor in tensors.values()):
        problems.append(f"{path.name} holds only empty tensors: DeepSpeed's ZeRO-3 keeps the weights in other files. "
                        "Join them with the zero_to_fp32.py that DeepSpeed puts beside them, and give its result.")
    return strip_prefixes(tensors) if len(problems) == before else {}


def _unwrap(content: Any, path: Path, problems: Problems) -> Any:
    if isinstance(content, dict) and any(isinstance(value, LazyTensor) for value in content.values()):
        return {name: value for name, value in content.items() if name not in MEMBERS}  # figures beside the tensors
    while isinstance(content, dict) and (wrapper := next(
            (name for name in WRAPPERS if isinstance(content.get(name), dict)), None)):
        unknown = [name for name in content if name not in MEMBERS and name != wrapper]
        problems.extend(f"{path.name} holds {name!r} besides {wrapper!r}, which is not known as a key to ignore."
                        for name in unknown)
        content = content[wrapper]
    return content


def strip_prefixes(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Returns the tensors without the prefixes that all names share because a model was wrapped while it was trained.

    "model." is one, as Lightning's modules have it, unless it belongs to a language model's own names.
    """
    tensors = dict(tensors)
    while tensors:
        prefix = next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in tensors)), None)
        if prefix is None and all(key.startswith("model.") for key in tensors) and not any(map(_PLAIN.match, tensors)):
            prefix = "model."
        if prefix is None:
            return tensors
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


# ---- folders ----


def read_folder(
    folder: Path, problems: Problems, wanted: Collection[str] = ()
) -> tuple[list[Path], dict[str, LazyTensor]]:
    """Returns (weight files, tensors) of the set that transformers would read; prints its name.

    wanted: keys that it should hold. If it is damaged or incomplete and another set of the folder is complete, a
            problem names that set; it is not read instead. If both are complete and differ, a line says so.

    With a problem returns no tensors, because those of a missing shard would be reported again one by one.
    """
    before = len(problems)
    names = weight_files.candidates(folder, problems)
    if not names:
        if len(problems) == before:
            problems.append(_no_weights(folder))
        return [], {}
    found = Problems()
    files, tensors = read_set(folder, names[0], found, report=True)
    if not found and tensors.keys() >= set(wanted):
        warn_of_other_sets(folder, names, tensors)
        return files, tensors
    hint = complete_set(folder, names, wanted)
    missing = weight_files.open_set(folder, names[0], Problems()).missing(hint)
    problems.extend([*(line for line in found if line not in problems), *missing])
    if hint and not missing:
        problems.append(hint)
    return files, tensors


def read_set(
    folder: Path, name: str, problems: Problems, report: bool = False
) -> tuple[list[Path], dict[str, LazyTensor]]:
    """Returns (weight files, tensors) of one file or of an index's shards; none if a file is missing.

    report: print which files are read
    """
    before = len(problems)
    chosen = weight_files.open_set(folder, name, problems)
    if len(problems) > before or chosen.missing(None):
        return [], {}
    if report:
        used = {name, *(file.name for file in chosen.files)}
        weight_files.report(folder, used, weight_files.why_ignored(folder, name))
    where = chosen.weight_map
    if not where:
        tensors = read(folder / name, problems)
        return chosen.files, tensors if len(problems) == before else {}
    tensors: dict[str, LazyTensor] = {}
    for file in chosen.files:
        found = _read_shard(file, problems)
        if found:  # a file that cannot be read has been reported
            problems.extend(shorten(
                [f"{file.name}: {key} is in this file, but not according to {name}"
                 for key in found if where.get(key) != file.name], f"{file.name}: {{}} more are not in {name}"))
            problems.extend(shorten(
                [f"{file.name}: {key} is missing, though {name} lists it"
                 for key in where if where[key] == file.name and key not in found], f"{file.name}: {{}} more"))
        tensors.update(found)
    return chosen.files, strip_prefixes(tensors) if len(problems) == before else {}


def _read_shard(path: Path, problems: Problems) -> dict[str, LazyTensor]:
    try:
        return flat_tensors(path, load(path), problems)
    except WeightFileError as error:
        problems.append(str(error))
        return {}


def complete_set(folder: Path, names: Sequence[str], wanted: Collection[str]) -> str | None:
    """Returns a hint if the first of the sets `names` is damaged and a later one is complete."""
    for index, name in enumerate(names[1:], 1):
        found = Problems()
        _, tensors = read_set(folder, name, found)
        if tensors and not found and tensors.keys() >= set(wanted):
            return (f"{folder} also holds a complete set: {name}. If it is the one you want, delete "
                    f"{' and '.join(names[:index])}, or move {'it' if index == 1 else 'them'} out of the folder.")
    return None


def warn_of_other_sets(folder: Path, names: Sequence[str], tensors: Mapping[str, LazyTensor]) -> None:
    """Prints a line for every other complete set of a folder that holds another model than the one that is read."""
    for name in names[1:]:
        found = Problems()
        _, others = read_set(folder, name, found)
        if others and not found and (what := difference(tensors, others)):
            note(f"Warning: {folder} holds two models. {names[0]} is read, and {name} differs: {what} If {name} is the "
                 f"one you want, move {names[0]} out of the folder.")


def difference(tensors: Mapping[str, LazyTensor], others: Mapping[str, LazyTensor]) -> str | None:
    """Returns the first difference between two sets of weights, in names, shapes, or a sample of every tensor's values
    beyond the rounding of its dtypes; None if there is none. Buffers and a repeated head do not count."""
    keys, more = ({key for key in held if not _OPTIONAL.fullmatch(key)} for held in (tensors, others))
    if keys != more:
        key = min(keys ^ more)
        return f"{key} is only in {'the former' if key in keys else 'the latter'}."
    for key in sorted(keys):
        one, other = tensors[key], others[key]
        if one.shape != other.shape:
            return f"{key} has shape {list(one.shape)} and {list(other.shape)}."
        if not _equal(one, other):
            return f"the values of {key} are others."
    return None


def _equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Returns whether samples of two tensors are equal, up to the rounding of the coarser of two dtypes."""
    a, b = one.sample(), other.sample()
    if a.dtype == b.dtype or not {str(a.dtype), str(b.dtype)} <= set(DTYPES):
        return a.tobytes() == b.tobytes() or np.array_equal(a, b)
    step = max(float(ml_dtypes.finfo(x.dtype).eps) for x in (a, b))
    smallest = max(float(ml_dtypes.finfo(x.dtype).smallest_subnormal) for x in (a, b))
    return np.allclose(a.astype(np.float32), b.astype(np.float32), rtol=step, atol=smallest, equal_nan=True)


def _no_weights(folder: Path) -> str:
    unread = weight_files.unread(folder)
    line = f"{folder} holds no weights: none of {', '.join(weight_files.ORDER)} is there."
    if unread:
        line += f" It holds {weight_files.listed(unread)}, which transformers would not read either."
    if any(re.fullmatch(r".+-\d+-of-\d+\.(safetensors|bin)", name) for name in unread):
        line += " Shards are read through their index: copy it beside them, too."
    if any(name.startswith("consolidated.") for name in unread):
        line += " To convert Meta's consolidated.NN.pth, give a folder without config.json."
    return line


def files_of(path: Path | None) -> tuple[Path, ...]:
    """Returns the files that `read_part` reads from a file or a folder; () for None."""
    if path is None or not os.path.isdir(path):
        return (path,) if path else ()
    names = weight_files.candidates(path, Problems())
    return tuple(weight_files.open_set(path, names[0], Problems()).files) if names else ()


def read_part(path: Path, problems: Problems) -> dict[str, LazyTensor]:
    """Returns the tensors of a file, or of a folder as transformers or peft saves it."""
    return read_folder(path, problems)[1] if os.path.isdir(path) else read(path, problems)
