"""Reads and writes LLaMA in Meta's format: params.json and consolidated.00.pth, .01.pth, ... (model-parallel shards).
LLaMA2-Accessory's consolidated.00-of-01.model.pth and Mistral's consolidated.safetensors are read, too.

V vocabulary   D model   F feed-forward   N query heads   K key and value heads   H head   I, T a head's pairs (I T) = H

Meta rotates neighbouring elements of a head (2i, 2i+1), mmjax rotates i against i + H/2, as Hugging Face does: the rows
of the query and key matrices are permuted in each head. A shard holds a part of each matrix, and a copy of each norm.

Facts: llama/model.py and llama/generation.py of facebookresearch/llama, for LLaMA-1 and Llama-2, and of llama3, which
splits the embedding by rows; accessory/util/tensor_parallel.py of LLaMA2-Accessory; mistral-inference's args.py.
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

from mmjax.convert import state_dict, torch_file, vocabulary, weight_files
from mmjax.convert.lazy import LazyTensor
from mmjax.convert.llama import RANGES, Release, axes, is_number, is_whole, shown
from mmjax.convert.notes import note
from mmjax.convert.tables import (
    Computed,
    ConversionError,
    Entry,
    Problems,
    atomic_folder,
    expand,
    read_json,
    reason,
)
from mmjax.models.llama import LlamaConfig
from mmjax.tokenizer import SentencePieceTokenizer, Tokenizer

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

SIZES = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}  # as in config.json
WHOLE = {  # further whole numbers of params.json, and the largest that are plausible
    "multiple_of": 2**22, "n_kv_heads": RANGES["num_key_value_heads"], "vocab_size": RANGES["vocab_size"],
    "head_dim": RANGES["head_dim"], "hidden_dim": RANGES["intermediate_size"], "sliding_window": 2**28,
    "max_seq_len": 2**28, "max_batch_size": 2**28,  # these two are not used
}
NUMBERS = {"norm_eps": 1.0, "ffn_dim_multiplier": 1_000.0, "rope_theta": 1e18}
EPS = 1e-5  # Meta's defaults
MULTIPLE_OF = 256
GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # of every sentencepiece model by Meta
MAX_LISTED = 64  # missing shards in a message; Llama-2 70B has 8
ROUNDING = 2.0**-7  # relative difference of the copies of a norm in the shards of Llama-3 70B
SHARD = re.compile(r"consolidated\.(\d+)(?:-of-(\d+)\.model)?\.pth")
MISTRAL, ACCESSORY = "consolidated.safetensors", "llma."  # a file, and a prefix of LLaMA2-Accessory's keys


def entries(cfg: LlamaConfig) -> list[Entry]:
    return expand(META, meta_axes(cfg), {"L": range(cfg.depth)})


def meta_axes(cfg: LlamaConfig) -> dict[str, int]:
    return axes(cfg) | {"I": cfg.head_dim // 2, "T": 2}


def recognised(folder: Path) -> bool:
    """Returns whether a folder is in Meta's format. With a config.json it is read as transformers does."""
    meta = (folder / "params.json").is_file() or any(folder.glob("consolidated*"))
    return meta and not (folder / "config.json").is_file()


def open_release(folder: Path, problems: Problems) -> Release | None:
    """Opens a folder; the tokenizer is in it or in its parent.

    Adds to `problems`. With problems the release may have no tensors; without valid sizes returns None.
    """
    home = next((path for path in (folder, folder.parent) if vocabulary.has_tokenizer(path)), None)
    if home is None:
        problems.append(f"There is no tokenizer.model in {folder} or its parent; Meta ships it with the weights.")
    cfg = read_params(folder, home, problems)
    shards = read_shards(folder, problems)
    if cfg is None or home is None:
        return None
    tensors = joined(list(shards.values()), cfg, folder, problems)
    generation = {}
    if tensors:
        words = vocabulary.check_vocabulary(home, cfg.vocab, "tok_embeddings.weight", tensors, "params.json", problems)
        known = [("Meta's code", GENERATION)] if isinstance(words, SentencePieceTokenizer) else []
        generation = vocabulary.settle_ids(known, words, cfg.vocab) if words else {}
    return Release(tuple(folder / name for name in shards), tensors, cfg, generation, home, entries(cfg), IGNORED)


def read_params(folder: Path, tokenizer: Path | None, problems: Problems) -> LlamaConfig | None:
    """Reads params.json. A vocab_size of -1 is replaced by the tokenizer's. Adds a problem for every value that is of a
    wrong type, out of range, or not supported; then returns None."""
    path = folder / "params.json"
    if not path.is_file():
        problems.append(f"{folder} has consolidated*, but no params.json. Copy it from where the weights came from.")
        return None
    before = len(problems)
    values = read_json(path, problems)
    if len(problems) > before:
        return None
    problems.extend(f"{path}: {name} is {shown(values.get(name))}, expected a whole number from 1 to {RANGES[most]}."
                    for name, most in SIZES.items() if not is_whole(values.get(name), RANGES[most]))
    given = {name: value for name, value in values.items() if value is not None}
    if given.get("vocab_size") == -1:
        del given["vocab_size"]
    problems.extend(f"{path}: {name} is {shown(given[name])}, expected a whole number from 1 to {most}."
                    for name, most in WHOLE.items() if name in given and not is_whole(given[name], most))
    problems.extend(f"{path}: {name} is {shown(given[name])}, expected a number above 0 and at most {most:g}."
                    for name, most in NUMBERS.items() if name in given and not is_number(given[name], most))
    problems.extend(f"{path}: {name[:80]} = {shown(given[name])} is not LLaMA-1's or Llama-2's; only these are "
                    "supported." for name in given if name not in {*SIZES, *WHOLE, *NUMBERS}
                    and (name, given[name]) != ("use_scaled_rope", False))
    if len(problems) > before:
        return None
    return _config(given, path, tokenizer, problems)


def _config(given: Mapping[str, Any], path: Path, tokenizer: Path | None, problems: Problems) -> LlamaConfig | None:
    """Returns the config of checked values; None with a problem if heads and width do not fit each other."""
    dim, heads, kv_heads = given["dim"], given["n_heads"], given.get("n_kv_heads", given["n_heads"])
    if heads % kv_heads or "head_dim" not in given and dim % heads or given.get("head_dim", dim // heads) % 2:
        problems.append(f"{path}: {heads} heads ({kv_heads} of keys and values) do not divide a width of {dim}.")
        return None
    vocab = given.get("vocab_size") or _vocab_size(tokenizer, problems)
    if vocab is None:
        return None
    hidden = given.get("hidden_dim") or hidden_size(
        dim, given.get("multiple_of", MULTIPLE_OF), given.get("ffn_dim_multiplier"))
    positions = LlamaConfig.max_positions
    if given.get("sliding_window", positions) < positions:  # a shorter text never reaches the end of the window
        positions = given["sliding_window"]
        note(f"{path}: sliding_window is {positions}: mmjax reads texts up to that length, without sliding.")
    return LlamaConfig(
        vocab=vocab, depth=given["n_layers"], dim=dim, heads=heads, kv_heads=kv_heads,
        head_dim=given.get("head_dim", dim // heads), hidden=hidden, eps=float(given.get("norm_eps", EPS)),
        rope_theta=float(given.get("rope_theta", LlamaConfig.rope_theta)), max_positions=positions)


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
    """Returns {file name: tensors} in the order of the shards; {} if a number is missing or occurs twice.

    A folder with no shards but `MISTRAL` has that one.
    """
    before = len(problems)
    numbers, expected = _numbered(folder, problems)
    gaps = (number for number in range(max(expected, 1 + max(numbers, default=-1))) if number not in numbers)
    absent = [*itertools.islice(gaps, MAX_LISTED)]  # the number in a name may be any number
    if not numbers and (folder / MISTRAL).is_file():
        numbers = {0: MISTRAL}
    if not numbers:
        unread = weight_files.listed(weight_files.unread(folder))
        problems.append(f"{folder} has no consolidated.00.pth"
                        + f"; it holds {unread}, which cannot be read" * bool(unread)
                        + ". Give a folder with Meta's consolidated.NN.pth, or one as transformers saves it, with its "
                          "config.json.")
    if absent:
        names = ", ".join(f"consolidated.{number:02}.pth" for number in absent)
        problems.append(f"{folder} has {weight_files.listed(numbers.values())}, but not {names}. Download what is "
                        "missing.")
    weight_files.check_finished([folder / name for name in numbers.values()], problems)
    if len(problems) > before:
        return {}
    weight_files.report(folder, numbers.values(), "A folder without config.json is read as Meta ships it.")
    shards = {}
    for number in sorted(numbers):
        path = folder / numbers[number]
        tensors = state_dict.read(path, problems)
        if tensors and all(key.startswith(ACCESSORY) for key in tensors):
            tensors = {key.removeprefix(ACCESSORY): tensor for key, tensor in tensors.items()}
        shards[path.name] = tensors
    return shards if len(problems) == before else {}


def _numbered(folder: Path, problems: Problems) -> tuple[dict[int, str], int]:
    """Returns ({number: file name} of a folder's shards, how many the names say that there are, or 0)."""
    numbers: dict[int, str] = {}
    counts = {0}
    for name in sorted(path.name for path in folder.iterdir() if SHARD.fullmatch(path.name)):
        match = SHARD.fullmatch(name)
        number = int(match[1])
        counts.add(int(match[2] or 0))
        if number in numbers:
            problems.append(f"{folder} has shard {number} twice: {numbers[number]} and {name}. Move the wrong one "
                            "out of the folder.")
        numbers[number] = name
    return numbers, max(counts)


def joined(shards: Sequence[Mapping[str, LazyTensor]], cfg: LlamaConfig, folder: Path,
           problems: Problems) -> dict[str, LazyTensor]:
    """Returns the whole tensors, each of which is read from all shards on demand.

    With a problem returns {}, because mismatched shards would be reported again for every tensor.
    """
    if not shards:
        return {}
    before = len(problems)
    part = shards[0].get("tok_embeddings.weight")
    rows, columns = part.shape if part is not None and len(part.shape) == 2 else (cfg.vocab, cfg.dim // len(shards))
    by_rows = columns == cfg.dim and rows * len(shards) == cfg.vocab  # Llama-3 70B
    if columns * len(shards) != cfg.dim and not by_rows:
        problems.append(
            f"{folder}: params.json says dim {cfg.dim} and vocab_size {cfg.vocab}, and a shard holds {columns} columns "
            f"of {rows} rows of tok_embeddings.weight, so there should be {cfg.dim / max(columns, 1):g} shards; there "
            f"are {len(shards)}. Take all shards, and those of one model.")
    keys = dict.fromkeys(key for shard in shards for key in shard if reason(key, IGNORED) is None)
    tensors = {key: _join(key, [shard.get(key) for shard in shards], folder, problems, by_rows) for key in keys}
    return tensors if len(problems) == before else {}


def _join(key: str, parts: Sequence[LazyTensor | None], folder: Path, problems: Problems,
          by_rows: bool) -> LazyTensor | None:
    """Returns one whole tensor. by_rows: the embedding is split by rows, as Llama 3's is"""
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
    if axis is None:
        _check_copies(key, parts, folder, problems)
    if axis is None or axis < 0:  # a key that is not in SPLIT is in no line of the table
        return parts[0]
    axis = 0 if by_rows and key == "tok_embeddings.weight" else axis
    shape = tuple(size * len(parts) if number == axis else size for number, size in enumerate(parts[0].shape))
    return Computed(key, shape, parts[0].dtype, functools.partial(_whole, parts, axis, shape))


def _check_copies(key: str, parts: Sequence[LazyTensor], folder: Path, problems: Problems) -> None:
    """Adds a problem if the copies of a norm differ by more than rounding; a line says that they differ by less."""
    first, *others = [part.read().astype(np.float32) for part in parts]
    if all(np.array_equal(first, other) for other in others):
        return
    if all(np.allclose(first, other, rtol=ROUNDING, atol=0) for other in others):
        note(f"{folder}: {key} differs a little between the shards, as in Llama-3 70B; the first shard's is taken.")
    else:
        problems.append(f"{folder}: {key} differs between the shards, but should be the same in all: they belong to "
                        "different models.")


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


