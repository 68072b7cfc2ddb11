"""Reads and writes LLaMA, Vicuna and other models of that architecture in the format of transformers.

V vocabulary   D model   F feed-forward   N query heads   K key and value heads   H head

Facts: transformers' modeling_llama.py and configuration_llama.py, FastChat's apply_delta.py.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.convert import safetensors, state_dict, torch_file, vocabulary
from mmjax.convert.lazy import LazyTensor
from mmjax.convert.notes import note
from mmjax.convert.tables import (
    Computed,
    Entry,
    Ignored,
    Problems,
    atomic_folder,
    expand,
    read_json,
    reason,
    widest,
)
from mmjax.convert.vocabulary import DELTA_SCALE
from mmjax.models.llama import LlamaConfig

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
ATTENTION_BIAS = (
    ("model.layers.{L}.self_attn.q_proj.bias", "llm/layers/attn/q/b", "(N H) -> N H"),
    ("model.layers.{L}.self_attn.k_proj.bias", "llm/layers/attn/k/b", "(K H) -> K H"),
    ("model.layers.{L}.self_attn.v_proj.bias", "llm/layers/attn/v/b", "(K H) -> K H"),
    ("model.layers.{L}.self_attn.o_proj.bias", "llm/layers/attn/o/b", "D -> D"),
)
MLP_BIAS = (
    ("model.layers.{L}.mlp.gate_proj.bias", "llm/layers/mlp/gate/b", "F -> F"),
    ("model.layers.{L}.mlp.up_proj.bias", "llm/layers/mlp/up/b", "F -> F"),
    ("model.layers.{L}.mlp.down_proj.bias", "llm/layers/mlp/down/b", "D -> D"),
)
IGNORED = (
    (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "a buffer; rotary frequencies are computed from config"),
)
TIED = (("lm_head\\.weight", "the same matrix as the embedding (tie_word_embeddings)"),)
FIELDS = {  # config.json -> LlamaConfig
    "vocab_size": "vocab",
    "num_hidden_layers": "depth",
    "hidden_size": "dim",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
}
RANGES = {  # the largest plausible value of whole numbers in config.json
    "vocab_size": 2**24, "num_hidden_layers": 4_096, "hidden_size": 2**20, "num_attention_heads": 2**16,
    "intermediate_size": 2**22, "num_key_value_heads": 2**16, "head_dim": 2**14, "max_position_embeddings": 2**28,
}
NUMBERS = {"rms_norm_eps": 1.0, "rope_theta": 1e18}
FLAGS = {"tie_word_embeddings": (), "attention_bias": ("q", "k", "v", "o"), "mlp_bias": ("gate", "up", "down")}
EMBEDDING = "model.embed_tokens.weight"
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SHARD_BYTES = 5 * 10**9  # of the files that an export writes


def entries(cfg: LlamaConfig) -> list[Entry]:
    """Returns the entries of a folder's tensors, without LoRA and without the biases of an adapter."""
    attention, mlp = base_biases(cfg)
    table = (*LLAMA, *ATTENTION_BIAS * attention, *MLP_BIAS * mlp, *HEAD * (not cfg.tied))
    return expand(table, axes(cfg), {"L": range(cfg.depth)})


def base_biases(cfg: LlamaConfig) -> tuple[bool, bool]:
    """Returns (attention_bias, mlp_bias) of config.json. Adapters have biases too, but none on k."""
    attention = "k" in cfg.bias_on
    return attention, "gate" in cfg.bias_on and (attention or "q" not in cfg.bias_on)


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
    files, tensors = state_dict.read_folder(folder, problems, wanted)
    if cfg is None:
        return None
    tensors = _with_embedding(tensors, cfg)
    if is_delta(tensors):
        problems.append(f"{folder} holds a delta, not a model: its norm scales are near 0 (a model's are near 1). "
                        f"Give the base model as --llm and this folder as --delta.")
    tokenizer = folder
    if delta is not None:
        delta_files, changes = state_dict.read_folder(
            delta, problems, [key for key in tensors if reason(key, IGNORED) is None])
        if changes and not is_delta(changes):
            problems.append(f"{delta} was given as --delta, but it holds a whole model: its norm scales are not near "
                            "0. Give it as --llm, without --delta.")
        if tensors and changes:
            tensors = add_delta(tensors, changes, folder.name, delta.name, problems)
        files += delta_files
        if vocabulary.has_tokenizer(delta):  # a delta may add tokens
            tokenizer = delta
        if EMBEDDING in tensors:
            rows = tensors[EMBEDDING].shape[0]
            if rows > cfg.vocab:  # a delta may add tokens: config.json is the base's
                cfg = dataclasses.replace(cfg, vocab=rows)
    words = vocabulary.check_vocabulary(tokenizer, cfg.vocab, EMBEDDING, tensors, "config.json", problems)
    if cfg.tied and "lm_head.weight" in tensors and EMBEDDING in tensors:
        if not np.array_equal(tensors["lm_head.weight"].read(), tensors[EMBEDDING].read()):
            problems.append(f"{folder}: config.json says tie_word_embeddings, but lm_head.weight is not the same "
                            f"matrix as {EMBEDDING}. Correct whichever is wrong.")
    generation = vocabulary.settle_ids(generation_sources(folder, problems), words, cfg.vocab) if words else {}
    return Release(tuple(files), tensors, cfg, generation, tokenizer, entries(cfg), ignored(cfg))


def _with_embedding(tensors: Mapping[str, LazyTensor], cfg: LlamaConfig) -> dict[str, LazyTensor]:
    """Returns a tied model's tensors with the embedding if only the head, the same matrix, was saved."""
    if cfg.tied and "lm_head.weight" in tensors and EMBEDDING not in tensors:
        note(f"lm_head.weight stands for {EMBEDDING}, too: config.json says tie_word_embeddings.")
        return {**tensors, EMBEDDING: tensors["lm_head.weight"]}
    return dict(tensors)


def read_config(folder: Path, problems: Problems) -> LlamaConfig | None:
    """Reads config.json, in its old and new spelling. Adds a problem for every value that is of a wrong type, out of
    range, or not supported; then returns None."""
    path = folder / "config.json"
    if not path.is_file():
        problems.append(f"{folder} has neither config.json nor params.json; --llm expects a folder as transformers "
                        "saves it, or as Meta ships it.")
        return None
    before = len(problems)
    values = {name: value for name, value in read_json(path, problems).items() if value is not None}
    if len(problems) > before:
        return None
    if "family" in values and "architecture" in values:
        problems.append(f"{folder} is a converted checkpoint; --llm expects the released folder. To get one back, run "
                        f"`mmjax export --checkpoint {folder} --part llm --out FOLDER`.")
        return None
    missing = [name for name in FIELDS if not is_whole(values.get(name), RANGES[name])]
    if missing:
        problems.append(f"{path} has no valid {', '.join(missing)}; is it a LLaMA's config.json? Expected "
                        + ", ".join(f"{name} from 1 to {RANGES[name]}" for name in missing) + ".")
    tables = {name: values.get(name, {}) for name in ("rope_parameters", "rope_scaling")}
    problems.extend(f"{path}: {name} is {shown(value)}; expected an object." for name, value in tables.items()
                    if not isinstance(value, dict))
    rope = tables["rope_parameters"] if isinstance(tables["rope_parameters"], dict) else {}
    scaling = {**rope, **(tables["rope_scaling"] if isinstance(tables["rope_scaling"], dict) else {})}
    values = {"rope_theta": 10_000.0} | values | {name: rope[name] for name in ("rope_theta",)
                                                   if rope.get(name) is not None}
    refused = {
        "model_type": (values.get("model_type", "llama"), "llama"),
        "hidden_act": (values.get("hidden_act", "silu"), "silu"),
        "quantization_config": (values.get("quantization_config"), None),
        "rope scaling": (scaling.get("rope_type", scaling.get("type", "default")), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)), 1.0),
    }
    problems.extend(f"{path}: {name} is {shown(got)}; only {wanted!r} is supported."
                    for name, (got, wanted) in refused.items() if got != wanted)
    problems.extend(f"{path}: {name} is {shown(values[name])}, expected a whole number from 1 to {most}."
                    for name, most in RANGES.items() if name not in FIELDS and name in values
                    and not is_whole(values[name], most))
    problems.extend(f"{path}: {name} is {shown(values[name])}, expected a number above 0 and at most {most:g}."
                    for name, most in NUMBERS.items() if name in values and not is_number(values[name], most))
    problems.extend(f"{path}: {name} is {shown(values[name])}, expected true or false."
                    for name in FLAGS if name in values and not isinstance(values[name], bool))
    if len(problems) > before:
        return None
    return _config(values, path, problems)


def _config(values: Mapping[str, Any], path: Path, problems: Problems) -> LlamaConfig | None:
    """Returns the config of checked values; None with a problem if heads and widths do not fit each other."""
    heads = values["num_attention_heads"]
    kv_heads, head_dim = values.get("num_key_value_heads", heads), values.get("head_dim")
    if heads % kv_heads:
        problems.append(f"{path}: {kv_heads} key and value heads do not divide {heads} heads.")
        return None
    if head_dim is None and values["hidden_size"] % heads:
        problems.append(f"{path}: {heads} heads do not divide hidden_size {values['hidden_size']}, and there is no "
                        "head_dim.")
        return None
    head_dim = head_dim or values["hidden_size"] // heads
    if head_dim % 2:
        problems.append(f"{path}: heads of size {head_dim} cannot be rotated: the size must be even.")
        return None
    biases = [name for flag, names in FLAGS.items() if values.get(flag) for name in names]
    return LlamaConfig(
        **{ours: values[theirs] for theirs, ours in FIELDS.items()},
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=float(values.get("rms_norm_eps", 1e-6)),
        rope_theta=float(values["rope_theta"]),
        max_positions=values.get("max_position_embeddings", 2_048),
        tied=values.get("tie_word_embeddings", False),
        bias_on=tuple(biases),
    )


def is_whole(value: Any, most: int) -> bool:
    """Returns whether a value of a JSON file is a whole number from 1 to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def is_number(value: Any, most: float) -> bool:
    """Returns whether a value of a JSON file is a number above 0 and at most `most`; NaN is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most


def shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a number of more than 30 digits"
    return text if len(text) <= 80 else f"{text[:80]}..."


def generation_sources(folder: Path, problems: Problems) -> list[tuple[str, dict[str, Any]]]:
    """Returns [(file, its values)] of the files that name the ids of generation, the one that takes precedence first.

    generation_config.json does, unless it says that it was derived from config.json.
    """
    config = ("config.json", read_json(folder / "config.json", problems))
    path = folder / "generation_config.json"
    chosen = read_json(path, problems) if path.is_file() else {"_from_model_config": True}
    return [config] if chosen.get("_from_model_config") else [(path.name, chosen), config]


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


# ---- export ----


def write_folder(
    cfg: LlamaConfig, generation: Mapping[str, Any], tokenizer: Path, out: Path, tensors: Mapping[str, LazyTensor],
    safe: bool = False,
) -> None:
    """Writes the weights in shards with their index, config.json, generation_config.json and the tokenizer.

    safe: write safetensors, which need no index if one file is enough, instead of .bin files
    """
    shards: list[dict[str, LazyTensor]] = [{}]
    room = SHARD_BYTES
    for key, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][key] = tensor
        room -= tensor.nbytes
    stem, suffix, save = ("model", "safetensors", safetensors.save) if safe else ("pytorch_model", "bin",
                                                                                  torch_file.save)
    names = [f"{stem}-{n:05}-of-{len(shards):05}.{suffix}" for n in range(1, len(shards) + 1)]
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
             "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard}}
    files = {f"{stem}.{suffix}.index.json": index}
    if safe and len(shards) == 1:
        names, files = [f"{stem}.{suffix}"], {}
    files |= {"config.json": _config_json(cfg, generation, tensors), "generation_config.json": dict(generation)}
    with atomic_folder(out) as folder:
        for name, shard in zip(names, shards, strict=True):
            save(folder / name, shard)
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        for file in TOKENIZER_FILES:
            if (tokenizer / file).is_file():
                shutil.copyfile(tokenizer / file, folder / file)


def _config_json(cfg: LlamaConfig, generation: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """Returns the config.json of a config, the inverse of `read_config`."""
    attention, mlp = base_biases(cfg)
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        **{theirs: getattr(cfg, ours) for theirs, ours in FIELDS.items()},
        "num_key_value_heads": cfg.kv_heads, "head_dim": cfg.head_dim, "rms_norm_eps": cfg.eps,
        "rope_theta": cfg.rope_theta, "max_position_embeddings": cfg.max_positions, "tie_word_embeddings": cfg.tied,
        "attention_bias": attention, "mlp_bias": mlp,
        "torch_dtype": str(widest(tensor.dtype for tensor in tensors.values())), **generation,
    }
