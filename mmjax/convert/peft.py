"""Reads LoRA as peft saves it: a folder, its adapter_model file, or the trained tensors in a MiniGPT-v2 checkpoint.

R LoRA rank   D model   F feed-forward   N query heads   K key and value heads   H head

Facts: peft's config.json and names, 0.2.0 (which MiniGPT-v2 was trained with) to today's; tuners/lora/layer.py for the
scale, lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax.convert import state_dict
from mmjax.convert.lazy import LazyTensor
from mmjax.convert.llama import axes, is_number, is_whole, shown
from mmjax.convert.notes import note
from mmjax.convert.tables import Entry, Problems, expand, read_json
from mmjax.convert.weight_files import PEFT_CONFIG
from mmjax.models.llama import LlamaConfig

PREFIX = "llama_model.base_model.model."  # of MiniGPT-v2's tensors
_LAYER = PREFIX + "model.layers.{L}."
TARGETS = {  # module -> its name in LlamaConfig.lora_on, layouts of A and B
    "self_attn.q_proj": ("q", "R D -> D R", "(N H) R -> R N H"),
    "self_attn.k_proj": ("k", "R D -> D R", "(K H) R -> R K H"),
    "self_attn.v_proj": ("v", "R D -> D R", "(K H) R -> R K H"),
    "self_attn.o_proj": ("o", "R (N H) -> N H R", "D R -> R D"),
    "mlp.gate_proj": ("gate", "R D -> D R", "F R -> R F"),
    "mlp.up_proj": ("up", "R D -> D R", "F R -> R F"),
    "mlp.down_proj": ("down", "R F -> F R", "D R -> R D"),
}
NAMES = {module.split(".")[1]: ours for module, (ours, *_) in TARGETS.items()}  # q_proj -> q
ALPHA = 16.0  # MiniGPT-v2's
MOST_RANK = 2**14
REFUSED = {  # further settings of adapter_config.json that change the result, and the only value that is read
    "peft_type": "LORA", "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False,
    "bias": "none", "modules_to_save": None, "layers_to_transform": None, "layer_replication": None,
    "trainable_token_indices": None, "target_parameters": None, "lora_bias": False,
}


def entries(cfg: LlamaConfig) -> list[Entry]:
    """Returns the entries of a config's LoRA, under MiniGPT-v2's names."""
    table = []
    for module, (ours, a, b) in TARGETS.items():
        if cfg.lora_rank and ours in cfg.lora_on:
            path = f"llm/layers/{module.split('.')[0].removeprefix('self_')}/{ours}/lora_"
            table += [(f"{_LAYER}{module}.lora_A.weight", path + "a", a),
                      (f"{_LAYER}{module}.lora_B.weight", path + "b", b)]
    return expand(table, axes(cfg) | {"R": cfg.lora_rank}, {"L": range(cfg.depth)})


def rename(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Returns tensors with MiniGPT-v2's names (peft 0.2.0's) for LoRA.

    peft's own files lack "llama_model.", newer ones name the adapter before ".weight", a model that is saved whole
    names the wrapped matrix "base_layer".
    """
    def renamed(key: str) -> str:
        key = re.sub(r"\.(lora_[AB])\.\w+\.weight$", r".\1.weight", key)
        key = key.replace(".base_layer.", ".")
        return re.sub(r"^base_model\.model\.(?:llama_model\.)?", PREFIX, key)

    return {renamed(key): tensor for key, tensor in tensors.items()}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What adapter_config.json says; None where it says nothing, or there is no such file."""

    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None


def read(path: Path, problems: Problems) -> tuple[dict[str, LazyTensor], Settings]:
    """Returns (tensors, settings) of a folder that peft has saved, or of one file with LoRA in it.

    adapter_config.json is read from the folder, or from beside a file that has peft's name.
    """
    tensors = rename(state_dict.read_part(path, problems))
    folder = path if path.is_dir() else path.parent if path.name.startswith("adapter_model.") else None
    if folder is None or not (folder / PEFT_CONFIG).is_file():
        if folder is not None and tensors:
            problems.append(f"{folder} has no {PEFT_CONFIG}, which holds lora_alpha. Copy it from where "
                            f"{'the weights' if path.is_dir() else path.name} came from.")
        return tensors, Settings()
    return tensors, read_settings(folder / PEFT_CONFIG, problems)


def read_settings(path: Path, problems: Problems) -> Settings:
    """Reads adapter_config.json. Adds a problem for every value that is invalid or not supported."""
    before = len(problems)
    values = {name: value for name, value in read_json(path, problems).items() if value is not None}
    if len(problems) > before:
        return Settings()
    problems.extend(f"{path}: {name} is {shown(values[name])}; only {only!r} is supported."
                    for name, only in REFUSED.items() if name in values and values[name] != only)
    rank, alpha, targets = values.get("r"), values.get("lora_alpha"), values.get("target_modules")
    if not is_whole(rank, MOST_RANK):
        problems.append(f"{path}: r is {shown(rank)}, expected a whole number from 1 to {MOST_RANK}.")
    if not is_number(alpha, 1e9):
        problems.append(f"{path}: lora_alpha is {shown(alpha)}, expected a number above 0.")
    if targets is not None and not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)):
        targets = None  # a pattern; the tensors show the modules
    unknown = [name for name in targets or () if name.split(".")[-1] not in NAMES]
    if unknown:
        problems.append(f"{path}: target_modules has {', '.join(unknown)}; LoRA is supported on {', '.join(NAMES)}.")
    if len(problems) > before:
        return Settings()
    scale = math.sqrt(rank) if values.get("use_rslora") else 1.0
    return Settings(rank, float(alpha) * scale, targets and tuple(NAMES[name.split(".")[-1]] for name in targets))


def with_lora(cfg: LlamaConfig, tensors: Mapping[str, LazyTensor], found: Settings, rank: int, given: Mapping[str, Any],
              problems: Problems) -> LlamaConfig:
    """Returns the language model's config with LoRA.

    The rank is that of the tensors if there are any, else `rank`; the modules are those of the tensors, else q and v.

    found: of adapter_config.json
    given: by --arch, "rank" and "alpha"
    """
    held = {match[1]: tensor for key, tensor in tensors.items()
            if (match := re.fullmatch(re.escape(PREFIX) + r".*\.(\w+)\.lora_A\.weight", key))
            and len(tensor.shape) == 2}
    if tensors and not held:
        problems.append("The file given as --lora has no LoRA (names that end in q_proj.lora_A.weight).")
    if unknown := sorted(held.keys() - NAMES.keys()):
        problems.append(f"The file given as --lora has LoRA on {', '.join(unknown)}; it is supported on "
                        f"{', '.join(NAMES)}.")
    ranks = {tensor.shape[0] for tensor in held.values()}
    if len(ranks) > 1:
        problems.append(f"The file given as --lora has LoRA of several ranks, {', '.join(map(str, sorted(ranks)))}; "
                        "only one rank is supported.")
    if ranks:
        if rank and ranks != {rank}:
            problems.append(f"--lora-rank is {rank}, but the LoRA file holds rank {max(ranks)}.")
        rank = max(ranks)
    if found.rank and ranks and found.rank != rank:
        problems.append(f"{PEFT_CONFIG} says r {found.rank}, but the LoRA file holds rank {rank}.")
    if rank and given.get("rank", rank) != rank:
        problems.append(f"--arch: minigpt_v2.lora_r is {given['rank']}, but LoRA has rank {rank}.")
    if found.alpha and given.get("alpha", found.alpha) != found.alpha:
        note(f"--arch says lora_alpha {given['alpha']}; {PEFT_CONFIG}, which belongs to the LoRA, says "
             f"{found.alpha:g}. The latter is taken.")
    targets = tuple(ours for name, ours in NAMES.items() if name in held)
    if found.targets and targets and set(found.targets) != set(targets):
        problems.append(f"{PEFT_CONFIG} names the modules {', '.join(sorted(found.targets))}, but the LoRA file holds "
                        f"{', '.join(targets)}.")
    return dataclasses.replace(cfg, lora_rank=rank, lora_alpha=found.alpha or float(given.get("alpha", ALPHA)),
                               lora_on=targets or cfg.lora_on)
