"""Reads and writes LLaMA, Vicuna and other models of that architecture in the format of transformers.

V vocabulary   D model   F feed-forward   N query heads   K key and value heads   H head   R LoRA rank

Facts: transformers' modeling_llama.py and configuration_llama.py, peft 0.2.0's key names, FastChat's apply_delta.py.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.convert import safetensors, torch_file, weight_files
from mmjax.convert.lazy import LazyTensor, WeightFileError
from mmjax.convert.tables import (
    Computed,
    Entry,
    Ignored,
    Problems,
    atomic_folder,
    expand,
    flat_tensors,
    read_json,
    reason,
)
from mmjax.convert.vocabulary import DELTA_SCALE, PADDED_VOCABULARY
from mmjax.models.llama import LlamaConfig
from mmjax.tokenizer import Tokenizer

LLAMA = (
    ("model.embed_tokens.weight", "llm/embedding", "V D -> V D"),
    ("model.layers.{L}.input_layernorm.weight", "llm/layers/attn_norm/scale", "D -> D"),
    ("model.layers.{L}.self_attn.q_proj.weight", "llm/layers/attn/q/w", "(N H) D -> D N H"),
    ("model.layers.{L}.self_attn.k_proj.weight", "llm/layers/attn/k/w", "(K H) D -> D K H"),
    ("model.layers.{L}.self_attn.v_proj.weight", "llm/layers/attn/v/w", "(K H) D -> D K H"),
    ("model.layers.{L}.self_attn.o_proj.weight", "llm/layers/attn/o/w", "D (N H) -> N H D"),
    ("model.layers.{L}.post_attention_layernorm.weight", "llm/layers/mlp_norm/scale", "D -> D"),
    ("model.layers.{L}.mlp.gate_proj.weight", "llm/layers/mlp/gate/w", "F D -> D F"),
    ("model.layers.{L}.mlp.up_proj.weight", "llm/layers/mlp/up/w", "F D -> D F"),
    ("model.layers.{L}.mlp.down_proj.weight", "llm/layers/mlp/down/w", "D F -> F D"),
    ("model.norm.weight", "llm/norm/scale", "D -> D"),
)
HEAD = (("lm_head.weight", "llm/head/w", "V D -> D V"),)
IGNORED = (
    (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "a buffer; rotary frequencies are computed from config"),
)
TIED = (("lm_head\\.weight", "the same matrix as the embedding (tie_word_embeddings)"),)
_PEFT = "llama_model.base_model.model.model.layers.{L}.self_attn."
LORA = (  # peft 0.2.0's names; newer ones have ".default" before ".weight", which `minigpt4.read_trained` removes
    (_PEFT + "q_proj.lora_A.weight", "llm/layers/attn/q/lora_a", "R D -> D R"),
    (_PEFT + "q_proj.lora_B.weight", "llm/layers/attn/q/lora_b", "(N H) R -> R N H"),
    (_PEFT + "v_proj.lora_A.weight", "llm/layers/attn/v/lora_a", "R D -> D R"),
    (_PEFT + "v_proj.lora_B.weight", "llm/layers/attn/v/lora_b", "(K H) R -> R K H"),
)

FIELDS = {  # config.json -> LlamaConfig
    "vocab_size": "vocab",
    "num_hidden_layers": "depth",
    "hidden_size": "dim",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
}
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SHARD_BYTES = 5 * 10**9  # of the files that an export writes


def entries(cfg: LlamaConfig) -> list[Entry]:
    """Returns the entries of a folder's tensors, without LoRA."""
    return expand(LLAMA if cfg.tied else LLAMA + HEAD, axes(cfg), {"L": range(cfg.depth)})


def lora_entries(cfg: LlamaConfig) -> list[Entry]:
    return expand(LORA, axes(cfg), {"L": range(cfg.depth)}) if cfg.lora_rank else []


def axes(cfg: LlamaConfig) -> dict[str, int]:
    return {"V": cfg.vocab, "D": cfg.dim, "F": cfg.hidden, "N": cfg.heads, "K": cfg.kv_heads, "H": cfg.head_dim,
            "R": cfg.lora_rank}


def ignored(cfg: LlamaConfig) -> tuple[tuple[str, str], ...]:
    return IGNORED + TIED if cfg.tied else IGNORED


@dataclasses.dataclass(frozen=True)
class Release:
    """A language model whose tensors are not read yet.

    files:      the weight files, for fingerprints
    tokenizer:  the folder with its tokenizer
    generation: {"bos_token_id", "eos_token_id", "pad_token_id"}
    entries:    table of its tensors
    ignored:    keys that are left out, and why
    """

    files: tuple[Path, ...]
    tensors: Mapping[str, LazyTensor]
    cfg: LlamaConfig
    generation: dict[str, Any]
    tokenizer: Path
    entries: list[Entry]
    ignored: Ignored


def open_release(folder: Path, delta: Path | None, problems: Problems) -> Release | None:
    """Opens a folder, and adds a delta if one is given.

    Adds to `problems`. With problems the release may have no tensors; without a valid config returns None.
    """
    cfg = read_config(folder, problems)
    wanted = [key for entry in entries(cfg) for key in entry.keys] if cfg else []
    files, tensors = read_tensors(folder, problems, wanted)
    if cfg is None:
        return None
    if is_delta(tensors):
        problems.append(f"{folder} holds a delta, not a model: its norm scales are near 0 (a model's are near 1). "
                        f"Give the base model as --llm and this folder as --delta.")
    tokenizer = folder
    if delta is not None:
        delta_files, changes = read_tensors(delta, problems, [key for key in tensors if reason(key, IGNORED) is None])
        if changes and not is_delta(changes):
            problems.append(f"{delta} was given as --delta, but it holds a whole model: its norm scales are not near "
                            "0. Give it as --llm, without --delta.")
        if tensors and changes:
            tensors = add_delta(tensors, changes, folder.name, delta.name, problems)
        files += delta_files
        if _has_tokenizer(delta):  # a delta may add tokens
            tokenizer = delta
        if "model.embed_tokens.weight" in tensors:
            rows = tensors["model.embed_tokens.weight"].shape[0]
            if rows > cfg.vocab:  # a delta may add tokens: config.json is the base's
                cfg = dataclasses.replace(cfg, vocab=rows)
    check_vocabulary(tokenizer, cfg.vocab, "model.embed_tokens.weight", tensors, "config.json", problems)
    if cfg.tied and "lm_head.weight" in tensors and "model.embed_tokens.weight" in tensors:
        if not np.array_equal(tensors["lm_head.weight"].read(), tensors["model.embed_tokens.weight"].read()):
            problems.append(f"{folder}: config.json says tie_word_embeddings, but lm_head.weight is not the same "
                            "matrix as model.embed_tokens.weight. Correct whichever is wrong.")
    return Release(tuple(files), tensors, cfg, generation_ids(folder, problems), tokenizer, entries(cfg), ignored(cfg))


def read_config(folder: Path, problems: Problems) -> LlamaConfig | None:
    """Reads config.json, in its old and new spelling. Adds a problem for every field that LLaMA does not support."""
    path = folder / "config.json"
    if not path.is_file():
        problems.append(f"{folder} has neither config.json nor params.json; --llm expects a folder as transformers "
                        "saves it, or as Meta ships it.")
        return None
    values = read_json(path, problems)
    missing = [name for name in FIELDS if not isinstance(values.get(name), int) or values[name] <= 0]
    if missing:
        problems.append(f"{path} has no valid {', '.join(missing)}; is it a LLaMA's config.json?")
        return None
    rope = dict(values.get("rope_parameters") or {})
    scaling = {**rope, **dict(values.get("rope_scaling") or {})}
    refused = {
        "model_type": (values.get("model_type", "llama"), "llama"),
        "hidden_act": (values.get("hidden_act", "silu"), "silu"),
        "attention_bias": (values.get("attention_bias", False), False),
        "mlp_bias": (values.get("mlp_bias", False), False),
        "quantization_config": (values.get("quantization_config"), None),
        "rope scaling": (scaling.get("rope_type", scaling.get("type", "default")), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)), 1.0),
    }
    problems.extend(f"{path}: {name} is {got!r}; only {wanted!r} is supported."
                    for name, (got, wanted) in refused.items() if got != wanted)
    heads = values["num_attention_heads"]
    kv_heads = values.get("num_key_value_heads") or heads
    if heads % kv_heads:
        problems.append(f"{path}: {kv_heads} key and value heads do not divide {heads} heads.")
    return LlamaConfig(
        **{ours: values[theirs] for theirs, ours in FIELDS.items()},
        kv_heads=kv_heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10_000.0),
        max_positions=values.get("max_position_embeddings", 2_048),
        tied=bool(values.get("tie_word_embeddings", False)),
    )


def generation_ids(folder: Path, problems: Problems) -> dict[str, Any]:
    """Returns the tokens that generation starts from, stops at (one or a list) and pads with.

    generation_config.json takes precedence, unless it says that it was derived from config.json. Without a pad token
    finished rows are padded with the end token, as transformers does.
    """
    config = read_json(folder / "config.json", problems)
    path = folder / "generation_config.json"
    chosen = read_json(path, problems) if path.is_file() else {"_from_model_config": True}
    names, defaults = ("bos_token_id", "eos_token_id", "pad_token_id"), (1, 2, None)
    if chosen.get("_from_model_config"):
        chosen = {}
    ids = {name: chosen.get(name, config.get(name, default)) for name, default in zip(names, defaults, strict=True)}
    if ids["pad_token_id"] is None:
        end = ids["eos_token_id"]
        ids["pad_token_id"] = end[0] if isinstance(end, list) else end
    return ids


def read_tensors(
    folder: Path, problems: Problems, wanted: Collection[str] = ()
) -> tuple[list[Path], dict[str, LazyTensor]]:
    """Returns (weight files, tensors) of the set that transformers would read; prints its name.

    wanted: keys that it should hold. If it is damaged or incomplete and another set of the folder is complete, a
            problem names that set; it is not read instead.

    With a problem returns no tensors, because those of a missing shard would be reported again one by one.
    """
    before = len(problems)
    names = weight_files.candidates(folder, problems)
    if not names:
        if len(problems) == before:
            problems.append(_no_weights(folder))
        return [], {}
    files, tensors = read_set(folder, names[0], problems, report=True)
    if len(problems) > before or not tensors.keys() >= set(wanted):
        problems.extend(_complete_set(folder, names, wanted))
    return files, tensors


def read_set(
    folder: Path, name: str, problems: Problems, report: bool = False
) -> tuple[list[Path], dict[str, LazyTensor]]:
    """Returns (weight files, tensors) of one file or of an index's shards. report: print which files are read."""
    before = len(problems)
    chosen = weight_files.open_set(folder, name, problems)
    if len(problems) > before:
        return [], {}
    if report:
        used = {name, *(file.name for file in chosen.files)}
        weight_files.report(folder, used, weight_files.why_ignored(folder, name))
    where = chosen.weight_map
    tensors: dict[str, LazyTensor] = {}
    for file in chosen.files:
        found = read_file(file, problems)
        if where and found:  # a file that cannot be read has been reported
            problems.extend(f"{file.name}: {key} is in this file, but not according to {name}"
                            for key in found if where.get(key) != file.name)
            problems.extend(f"{file.name}: {key} is missing, though {name} lists it"
                            for key in where if where[key] == file.name and key not in found)
        tensors.update(found)
    return chosen.files, tensors if len(problems) == before else {}


def _complete_set(folder: Path, names: Sequence[str], wanted: Collection[str]) -> list[str]:
    """Returns a hint if the first of the sets `names` is damaged and a later one is complete: at most one line."""
    for index, name in enumerate(names[1:], 1):
        found = Problems()
        _, tensors = read_set(folder, name, found)
        if not found and tensors.keys() >= set(wanted):
            return [f"{folder} also holds a complete set: {name}. If it is the one you want, delete "
                    f"{' and '.join(names[:index])}, or move {'it' if index == 1 else 'them'} out of the folder."]
    return []


def _no_weights(folder: Path) -> str:
    unread = weight_files.unread(folder)
    line = f"{folder} holds no weights: none of {', '.join(weight_files.ORDER)} is there."
    if unread:
        line += f" It holds {weight_files.listed(unread)}, which transformers would not read either."
    if any(re.fullmatch(r".+-\d+-of-\d+\.(safetensors|bin)", name) for name in unread):
        line += " Shards are read through their index: download it as well."
    if any(name.startswith("consolidated.") for name in unread):
        line += " To convert Meta's consolidated.NN.pth, give a folder without config.json."
    return line


def read_file(path: Path, problems: Problems) -> dict[str, LazyTensor]:
    """Reads a flat file of tensors, in either format."""
    try:
        content = safetensors.load(path) if path.suffix == ".safetensors" else torch_file.load(path)
    except WeightFileError as error:
        problems.append(str(error))
        return {}
    return flat_tensors(path, content, problems)


def is_delta(tensors: Mapping[str, Any]) -> bool:
    """Returns whether the norm scales are near 0, as in a difference of two models."""
    scales = [np.abs(tensor.read().astype(np.float32)).mean()
              for key, tensor in tensors.items() if key.endswith("norm.weight")]
    return bool(scales) and float(np.median(scales)) < DELTA_SCALE


def add_delta(
    base: Mapping[str, LazyTensor], delta: Mapping[str, LazyTensor], name: str, delta_name: str, problems: Problems
) -> dict[str, Computed]:
    """Returns base + delta, computed when a tensor is read: added in float32, rounded once to the base's dtype.

    For float16 files FastChat's apply_delta computes the same. If the delta's vocabulary is larger, the new rows are
    the delta's.
    """
    base = {key: tensor for key, tensor in base.items() if reason(key, IGNORED) is None}
    delta = {key: tensor for key, tensor in delta.items() if reason(key, IGNORED) is None}
    problems.extend(f"{key} is in {name} but not in the delta {delta_name}"
                    for key in sorted(base.keys() - delta.keys()))
    problems.extend(f"{key} is in the delta {delta_name} but not in {name}"
                    for key in sorted(delta.keys() - base.keys()))
    summed = {}
    for key in [key for key in base if key in delta]:
        small, large = tuple(base[key].shape), tuple(delta[key].shape)
        grows = key in ("model.embed_tokens.weight", "lm_head.weight") and large[0] > small[0]
        if small[int(grows):] != large[int(grows):]:
            problems.append(f"{key} has shape {list(small)} in {name} but {list(large)} in the delta {delta_name}: "
                            "they belong to different models.")
        summed[key] = Computed(key, large, base[key].dtype, lambda key=key: _sum(base[key], delta[key]))
    return summed


def _sum(base: LazyTensor, delta: LazyTensor) -> np.ndarray:
    old, change = base.read(), delta.read()
    result = old if old.shape == change.shape else change.astype(base.dtype)
    np.add(old, change[: len(old)], out=result[: len(old)], dtype=np.float32, casting="unsafe")
    return result


def check_vocabulary(folder: Path, expected: int, key: str, tensors: Mapping[str, Any], source: str,
                     problems: Problems) -> None:
    """Adds problems unless the rows of the embedding `key`, the vocab_size of `source` and the tokenizer agree.

    More rows than tokens are allowed only as padding to a multiple of 64. Fewer rows are not, because a token without
    a row would silently use another token's.
    """
    table = tensors.get(key)
    if table is None:
        return  # reported as missing
    rows = table.shape[0]
    hint = "Released models differ here (32000 or 32001 tokens): take all files from the same release."
    if rows != expected:
        problems.append(f"{key} has {rows} rows, {source} says vocab_size {expected}. {hint}")
    if not _has_tokenizer(folder):
        problems.append(f"{folder} has neither tokenizer.model nor tokenizer.json. Copy the tokenizer files of the "
                        "release into it.")
        return
    try:
        size = Tokenizer.from_folder(folder).vocab_size
    except ValueError as error:
        problems.append(str(error))
        return
    if rows < size:
        problems.append(f"{key} has {rows} rows, the tokenizer in {folder} has {size} tokens, "
                        f"including added ones. {hint}")
    elif rows > size and rows != -(-size // PADDED_VOCABULARY) * PADDED_VOCABULARY:
        problems.append(f"{key} has {rows} rows, the tokenizer in {folder} has only {size} tokens, "
                        f"including added ones. {hint}")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


# ---- export ----


def write_folder(
    cfg: LlamaConfig, generation: Mapping[str, Any], tokenizer: Path, out: Path, tensors: Mapping[str, LazyTensor]
) -> None:
    """Writes the weights in shards with their index, config.json, generation_config.json and the tokenizer."""
    shards: list[dict[str, LazyTensor]] = [{}]
    room = SHARD_BYTES
    for key, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][key] = tensor
        room -= tensor.nbytes
    names = [f"pytorch_model-{n:05}-of-{len(shards):05}.bin" for n in range(1, len(shards) + 1)]
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
             "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard}}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        **{theirs: getattr(cfg, ours) for theirs, ours in FIELDS.items()},
        "num_key_value_heads": cfg.kv_heads, "head_dim": cfg.head_dim, "rms_norm_eps": cfg.eps,
        "rope_theta": cfg.rope_theta, "max_position_embeddings": cfg.max_positions, "tie_word_embeddings": cfg.tied,
        "torch_dtype": str(next(iter(tensors.values())).dtype), **generation,
    }
    with atomic_folder(out) as folder:
        for name, shard in zip(names, shards, strict=True):
            torch_file.save(folder / name, shard)
        files = {"pytorch_model.bin.index.json": index, "config.json": config, "generation_config.json": generation}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        for file in TOKENIZER_FILES:
            if (tokenizer / file).is_file():
                shutil.copyfile(tokenizer / file, folder / file)
