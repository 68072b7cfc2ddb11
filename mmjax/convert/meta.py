"""Reads and writes LLaMA in Meta's format: params.json and consolidated.00.pth, .01.pth, ... (model-parallel shards).

V vocabulary   D model   F feed-forward   N query heads   K key and value heads   H head   I, T a head's pairs (I T) = H

Meta rotates neighbouring elements of a head (2i, 2i+1), mmjax rotates i against i + H/2, as Hugging Face does: the rows
of the query and key matrices are permuted in each head. A shard holds a part of each matrix, and a copy of each norm.

Facts: llama/model.py and llama/generation.py of facebookresearch/llama, for LLaMA-1 and Llama-2.
"""

import functools
import itertools
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.convert import torch_file, weight_files
from mmjax.convert.lazy import LazyTensor, WeightFileError
from mmjax.convert.llama import Release, axes, check_vocabulary
from mmjax.convert.tables import (
    Computed,
    ConversionError,
    Entry,
    Problems,
    atomic_folder,
    expand,
    flat_tensors,
    read_json,
    reason,
)
from mmjax.models.llama import LlamaConfig
from mmjax.tokenizer import Tokenizer

META = (
    ("tok_embeddings.weight", "llm/embedding", "V D -> V D"),
    ("layers.{L}.attention_norm.weight", "llm/layers/attn_norm/scale", "D -> D"),
    ("layers.{L}.attention.wq.weight", "llm/layers/attn/q/w", "(N I T) D -> D N (T I)"),
    ("layers.{L}.attention.wk.weight", "llm/layers/attn/k/w", "(K I T) D -> D K (T I)"),
    ("layers.{L}.attention.wv.weight", "llm/layers/attn/v/w", "(K H) D -> D K H"),
    ("layers.{L}.attention.wo.weight", "llm/layers/attn/o/w", "D (N H) -> N H D"),
    ("layers.{L}.ffn_norm.weight", "llm/layers/mlp_norm/scale", "D -> D"),
    ("layers.{L}.feed_forward.w1.weight", "llm/layers/mlp/gate/w", "F D -> D F"),
    ("layers.{L}.feed_forward.w3.weight", "llm/layers/mlp/up/w", "F D -> D F"),
    ("layers.{L}.feed_forward.w2.weight", "llm/layers/mlp/down/w", "D F -> F D"),
    ("norm.weight", "llm/norm/scale", "D -> D"),
    ("output.weight", "llm/head/w", "V D -> D V"),
)
IGNORED = ((r"(.*\.)?rope\..*", "a buffer; rotary frequencies are computed from params.json"),)
SPLIT = (  # the axis along which a tensor is split into shards; None: every shard holds a copy
    (r"layers\.\d+\.attention\.w[qkv]\.weight|layers\.\d+\.feed_forward\.w[13]\.weight|output\.weight", 0),
    (r"layers\.\d+\.attention\.wo\.weight|layers\.\d+\.feed_forward\.w2\.weight|tok_embeddings\.weight", 1),
    (r"layers\.\d+\.(attention|ffn)_norm\.weight|norm\.weight", None),
)

SIZES = ("dim", "n_layers", "n_heads")
OPTIONS = {  # further fields of params.json, and their types
    "multiple_of": int, "n_kv_heads": int, "vocab_size": int, "norm_eps": float, "ffn_dim_multiplier": float,
    "rope_theta": float, "max_seq_len": int, "max_batch_size": int,  # the last two are not used
}
EPS = 1e-5  # Meta's defaults
MULTIPLE_OF = 256
GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # of every tokenizer.model by Meta
MAX_LISTED = 64  # missing shards in a message; Llama-2 70B has 8
SHARD = re.compile(r"consolidated\.(\d+)\.pth")


def entries(cfg: LlamaConfig) -> list[Entry]:
    return expand(META, meta_axes(cfg), {"L": range(cfg.depth)})


def meta_axes(cfg: LlamaConfig) -> dict[str, int]:
    return axes(cfg) | {"I": cfg.head_dim // 2, "T": 2}


def recognised(folder: Path) -> bool:
    """Returns whether a folder is in Meta's format. With a config.json it is read as transformers does."""
    meta = (folder / "params.json").is_file() or any(folder.glob("consolidated*.pth"))
    return meta and not (folder / "config.json").is_file()


def open_release(folder: Path, problems: Problems) -> Release | None:
    """Opens a folder; tokenizer.model is in it or in its parent.

    Adds to `problems`. With problems the release may have no tensors; without valid sizes returns None.
    """
    home = next((path for path in (folder, folder.parent) if (path / "tokenizer.model").is_file()), None)
    if home is None:
        problems.append(f"There is no tokenizer.model in {folder} or its parent; Meta ships it with the weights.")
    cfg = read_params(folder, home, problems)
    shards = read_shards(folder, problems)
    if cfg is None or home is None:
        return None
    tensors = joined(list(shards.values()), cfg, folder, problems)
    if tensors:
        check_vocabulary(home, cfg.vocab, "tok_embeddings.weight", tensors, "params.json", problems)
    return Release(tuple(folder / name for name in shards), tensors, cfg, dict(GENERATION), home, entries(cfg), IGNORED)


def read_params(folder: Path, tokenizer: Path | None, problems: Problems) -> LlamaConfig | None:
    """Reads params.json. A vocab_size of -1 is replaced by the tokenizer's."""
    path = folder / "params.json"
    if not path.is_file():
        problems.append(f"{folder} has consolidated*.pth, but no params.json. Copy it from where the weights came "
                        "from.")
        return None
    before = len(problems)
    values = read_json(path, problems)
    if len(problems) > before:
        return None
    problems.extend(f"{path}: {name} is {values.get(name)!r}, expected a whole number above 0." for name in SIZES
                    if not _is(int, values.get(name)))
    problems.extend(f"{path}: {name} is {values[name]!r}, expected a number above 0." for name, kind in OPTIONS.items()
                    if values.get(name) is not None and not _is(kind, values[name])
                    and (name, values[name]) != ("vocab_size", -1))
    problems.extend(f"{path}: {name} = {values[name]!r} is not LLaMA-1's or Llama-2's; only these are supported."
                    for name in values if name not in (*SIZES, *OPTIONS))
    if len(problems) > before:
        return None
    given = {name: value for name, value in values.items() if value is not None}
    dim, heads, kv_heads = given["dim"], given["n_heads"], given.get("n_kv_heads", given["n_heads"])
    if dim % (2 * heads) or heads % kv_heads:
        problems.append(f"{path}: {heads} heads ({kv_heads} of keys and values) do not divide a width of {dim}.")
        return None
    vocab = given.get("vocab_size", -1)
    if vocab == -1:
        vocab = _vocab_size(tokenizer, problems)
    return vocab and LlamaConfig(
        vocab=vocab, depth=given["n_layers"], dim=dim, heads=heads, kv_heads=kv_heads, head_dim=dim // heads,
        hidden=hidden_size(dim, given.get("multiple_of", MULTIPLE_OF), given.get("ffn_dim_multiplier")),
        eps=given.get("norm_eps", EPS), rope_theta=float(given.get("rope_theta", LlamaConfig.rope_theta)))


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, (int, kind)) and not isinstance(value, bool) and value > 0


def _vocab_size(folder: Path | None, problems: Problems) -> int | None:
    if folder is None:
        return None
    try:
        return Tokenizer.from_folder(folder).vocab_size
    except ValueError as error:
        problems.append(str(error))
        return None


def hidden_size(dim: int, multiple_of: int, multiplier: float | None = None) -> int:
    """llama/model.py: FeedForward.__init__."""
    hidden = int(2 * 4 * dim / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of


def read_shards(folder: Path, problems: Problems) -> dict[str, dict[str, LazyTensor]]:
    """Returns {file name: tensors} in the order of the shards; {} if a number is missing or occurs twice."""
    numbers: dict[int, str] = {}
    before = len(problems)
    for name in sorted(path.name for path in folder.iterdir() if SHARD.fullmatch(path.name)):
        number = int(SHARD.fullmatch(name)[1])
        if number in numbers:
            problems.append(f"{folder} has shard {number} twice: {numbers[number]} and {name}. Move the wrong one "
                            "out of the folder.")
        numbers[number] = name
    gaps = (number for number in range(max(numbers, default=0)) if number not in numbers)
    # The number in a name may be any number, so the list is limited.
    absent = [f"consolidated.{number:02}.pth" for number in itertools.islice(gaps, MAX_LISTED)]
    if not numbers:
        unread = weight_files.listed(weight_files.unread(folder))
        problems.append(f"{folder} has no consolidated.00.pth"
                        + f"; it holds {unread}, which cannot be read" * bool(unread)
                        + ". Give a folder with Meta's consolidated.NN.pth, or one as transformers saves it, with its "
                          "config.json.")
    if absent:
        problems.append(f"{folder} has {weight_files.listed(numbers.values())}, but not {', '.join(absent)}. Download "
                        "what is missing.")
    weight_files.check_finished([folder / name for name in numbers.values()], problems)
    if len(problems) > before:
        return {}
    weight_files.report(folder, numbers.values(), "A folder without config.json is read as Meta ships it.")
    shards = {}
    for number in sorted(numbers):
        path = folder / numbers[number]
        try:
            shards[path.name] = flat_tensors(path, torch_file.load(path), problems)
        except WeightFileError as error:
            problems.append(str(error))
    return shards if len(problems) == before else {}


def joined(shards: Sequence[Mapping[str, LazyTensor]], cfg: LlamaConfig, folder: Path,
           problems: Problems) -> dict[str, LazyTensor]:
    """Returns the whole tensors, each of which is read from all shards on demand.

    With a problem returns {}, because mismatched shards would be reported again for every tensor.
    """
    if not shards:
        return {}
    before = len(problems)
    part = shards[0].get("tok_embeddings.weight")
    columns = part.shape[1] if part is not None and len(part.shape) == 2 else cfg.dim
    if columns * len(shards) != cfg.dim:
        problems.append(
            f"{folder}: params.json says dim {cfg.dim}, and a shard holds {columns} of the columns of "
            f"tok_embeddings.weight, so there should be {cfg.dim / columns:g} shards; there are {len(shards)}. "
            "Download the missing shards, and use those of one model.")
    keys = dict.fromkeys(key for shard in shards for key in shard if reason(key, IGNORED) is None)
    tensors = {key: _join(key, [shard.get(key) for shard in shards], folder, problems) for key in keys}
    return tensors if len(problems) == before else {}


def _join(key: str, parts: Sequence[LazyTensor | None], folder: Path, problems: Problems) -> LazyTensor | None:
    if len(parts) == 1:
        return parts[0]
    if absent := [number for number, part in enumerate(parts) if part is None]:
        problems.append(f"{folder}: {key} is missing in the shards {absent}, but not in the others.")
        return None
    kinds = {(str(part.dtype), tuple(part.shape)) for part in parts}
    if len(kinds) > 1:
        problems.append(f"{folder}: {key} has different dtypes or shapes in the shards: "
                        + ", ".join(f"{kind} {list(shape)}" for kind, shape in sorted(kinds)) + ".")
        return None
    axis = next((axis for pattern, axis in SPLIT if re.fullmatch(pattern, key)), -1)
    if axis is None and any(not np.array_equal(parts[0].read(), part.read()) for part in parts[1:]):
        problems.append(f"{folder}: {key} differs between the shards, but should be the same in all: they belong to "
                        "different models.")
    if axis is None or axis < 0:  # a key that is not in SPLIT is in no line of the table
        return parts[0]
    shape = tuple(size * len(parts) if number == axis else size for number, size in enumerate(parts[0].shape))
    return Computed(key, shape, parts[0].dtype, functools.partial(_whole, parts, axis, shape))


def _whole(parts: Sequence[LazyTensor], axis: int, shape: tuple[int, ...]) -> np.ndarray:
    """Reads the parts one after the other, so that only one is in memory in addition to the result."""
    whole = np.empty(shape, parts[0].dtype)
    for view, part in zip(np.split(whole, len(parts), axis), parts, strict=True):
        view[...] = part.read()
    return whole


def params(cfg: LlamaConfig) -> dict[str, Any]:
    """Returns the params.json of a config, the inverse of `read_params`."""
    plain = next((2**n for n in range(8, -1, -1) if hidden_size(cfg.dim, 2**n) == cfg.hidden), None)
    hidden = ({"multiple_of": plain} if plain else
              {"multiple_of": 1, "ffn_dim_multiplier": (cfg.hidden + 0.5) / hidden_size(cfg.dim, 1)})
    return {
        "dim": cfg.dim, "n_layers": cfg.depth, "n_heads": cfg.heads, **hidden, "norm_eps": cfg.eps,
        "vocab_size": cfg.vocab,
        **({"n_kv_heads": cfg.kv_heads} if cfg.kv_heads != cfg.heads else {}),
        **({"rope_theta": cfg.rope_theta} if cfg.rope_theta != LlamaConfig.rope_theta else {}),
    }


def write_folder(cfg: LlamaConfig, tokenizer: Path, out: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes params.json, all tensors in consolidated.00.pth, and tokenizer.model."""
    if not (tokenizer / "tokenizer.model").is_file():
        raise ConversionError(f"{tokenizer} has no tokenizer.model, which Meta's format requires. Export the part "
                              "`llm` instead.")
    with atomic_folder(out) as folder:
        torch_file.save(folder / "consolidated.00.pth", tensors)
        (folder / "params.json").write_text(json.dumps(params(cfg)) + "\n")
        shutil.copyfile(tokenizer / "tokenizer.model", folder / "tokenizer.model")


