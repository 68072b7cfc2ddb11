"""Conversion of ImageBind-LLM and LLaMA-Adapter, and the tables of their adapter files.

A injected layers   P prompts a layer   L layers   D model   F feed-forward   N query heads   K key and value heads
H head   I, T a head's pairs (see `mmjax.convert.meta`)   R LoRA rank

The names are those of imagebind_LLM and llama_adapter_v2_multimodal7b; LLaMA-Adapter v1's lack the first "llama.".
The paper's token form was never released; here its gates are named `gate`.

Facts: llama/{llama,llama_adapter}.py of those projects, imagebind_LLM/convert_ckpt.py (whose ignored keys are
ignored here), alpaca_finetuning_v1/{llama/model,extract_adapter_from_checkpoint}.py.
"""

import dataclasses
import gzip
import itertools
import re
import types
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from mmjax.config import ALPACA, ALPACA_INPUT, TextConfig
from mmjax.convert import imagebind, kinds, language_model, meta, state_dict
from mmjax.convert import llama_adapter as visual
from mmjax.convert.lazy import LazyTensor
from mmjax.convert.tables import (
    Entry,
    Ignored,
    Parameter,
    Problems,
    SourceCheckpoint,
    Table,
    expand,
    forward,
    read_json,
    unknown_name,
)
from mmjax.models.bind import BindConfig
from mmjax.models.clip import ClipConfig
from mmjax.models.imagebind import ImageBindConfig
from mmjax.models.llama import LlamaConfig
from mmjax.models.visual import VISUAL_7B

GATE = (("layers.{L}.attention.gate", "llm/layers/attn/gate", "1 N 1 1 -> N"),)
NEW_GATE = (("layers.{L}.attention.new_gate", "llm/layers/attn/new_gate", "1 1 1 1 -> 1"),)
LORA = (
    ("layers.{L}.attention.lora_wq_l1.weight", "llm/layers/attn/q/lora_a", "R D -> D R"),
    ("layers.{L}.attention.lora_wq_l2.weight", "llm/layers/attn/q/lora_b", "(N I T) R -> R N (T I)"),
    ("layers.{L}.attention.lora_wk_l1.weight", "llm/layers/attn/k/lora_a", "R D -> D R"),
    ("layers.{L}.attention.lora_wk_l2.weight", "llm/layers/attn/k/lora_b", "(K I T) R -> R K (T I)"),
    ("layers.{L}.attention.lora_wv_l1.weight", "llm/layers/attn/v/lora_a", "R D -> D R"),
    ("layers.{L}.attention.lora_wv_l2.weight", "llm/layers/attn/v/lora_b", "(K H) R -> R K H"),
    ("layers.{L}.attention.lora_wo_l1.weight", "llm/layers/attn/o/lora_a", "R (N H) -> N H R"),
    ("layers.{L}.attention.lora_wo_l2.weight", "llm/layers/attn/o/lora_b", "D R -> R D"),
    ("layers.{L}.feed_forward.lora_w1_l1.weight", "llm/layers/mlp/gate/lora_a", "R D -> D R"),
    ("layers.{L}.feed_forward.lora_w1_l2.weight", "llm/layers/mlp/gate/lora_b", "F R -> R F"),
    ("layers.{L}.feed_forward.lora_w3_l1.weight", "llm/layers/mlp/up/lora_a", "R D -> D R"),
    ("layers.{L}.feed_forward.lora_w3_l2.weight", "llm/layers/mlp/up/lora_b", "F R -> R F"),
    ("layers.{L}.feed_forward.lora_w2_l1.weight", "llm/layers/mlp/down/lora_a", "R F -> F R"),
    ("layers.{L}.feed_forward.lora_w2_l2.weight", "llm/layers/mlp/down/lora_b", "D R -> R D"),
)
BIAS = (
    ("layers.{L}.attention.wq.bias", "llm/layers/attn/q/b", "(N I T) -> N (T I)"),
    ("layers.{L}.attention.wo.bias", "llm/layers/attn/o/b", "D -> D"),
    ("layers.{L}.feed_forward.w1.bias", "llm/layers/mlp/gate/b", "F -> F"),
    ("layers.{L}.feed_forward.w3.bias", "llm/layers/mlp/up/b", "F -> F"),
    ("layers.{L}.feed_forward.w2.bias", "llm/layers/mlp/down/b", "D -> D"),
)
NORMS = (  # these replace the base model's
    ("layers.{L}.attention_norm.weight", "llm/layers/attn_norm/scale", "D -> D"),
    ("layers.{L}.ffn_norm.weight", "llm/layers/mlp_norm/scale", "D -> D"),
    ("norm.weight", "llm/norm/scale", "D -> D"),
)
TOKEN_GATES = {"layer": (("gate", "llm/layers/gate", "L -> L 1"),), "shared": (("gate", "llm/gate", "1 -> 1"),)}
INJECTIONS = {"released": "head", "token": "layer", "token-shared": "shared"}  # --injection -> LlamaConfig.injection

NORM_PATHS = tuple(path for _, path, _ in NORMS)
REPLACED = "replaced/"  # in a checkpoint, prefix of the paths of parameters that an adapter replaced
OPTIONS = ("imagebind", "llm", "adapter", "clip")
IGNORED = (
    *imagebind.BIND_IGNORED,
    (r"llama\.(?!.*(bias|gate|lora|norm)).*", "the base model's, which --llm gives"),
)
RELEASED_FORM = ((r"prefix_query\.weight|llama\.layers\.\d+\.attention\.gate",
                  "of the released form; the token form has other gates and no query"),)

V1_IGNORED = (
    (r"layers\.\d+\.(attention|feed_forward)\.w\w\.weight|layers\.\d+\.(attention|ffn)_norm\.weight|"
     r"(tok_embeddings|output|norm)\.weight", "the base model's, which --llm gives"),
    *meta.IGNORED,
)

ARCH_TABLES = ("imagebind", "adapter_v1", "adapter_v2")  # --arch: the parts of the models
ARCH_NUMBERS = ("query_layer", "query_len", "image_dim", "bind_hidden")  # of ImageBind-LLM
ARCH_OTHERS = ("llama", "lora_rank", "knn_vectors")  # determined by the files, and ignored
V1_ARCH = ("adapter_layer", "adapter_len")
BIND_RATIO = 4  # hidden size of a fresh bind network, relative to its width
# Injected layers of the released models, and prompts per layer.
RELEASED_LAYERS = {"imagebind_llm": (32, 1), "adapter_v1": (30, 10), "adapter_v2": (31, 10)}
TEXT = TextConfig(ALPACA, ALPACA_INPUT, end_sym="</s>", joint=True, max_txt_len=512)


@dataclasses.dataclass(frozen=True)
class AdapterNames:
    """A project's key of the query, and its prefix of the layers' keys."""

    query: str
    prefix: str = "llama."


IMAGEBIND_LLM = AdapterNames("prefix_query.weight")
LLAMA_ADAPTER = AdapterNames("adapter_query.weight")
LLAMA_ADAPTER_V1 = AdapterNames("adapter_query.weight", prefix="")


def entries(cfg: LlamaConfig, names: AdapterNames, layers: int, length: int,
            norms: Collection[str] = ()) -> list[Entry]:
    """Returns the entries of an adapter's tensors that act in the language model.

    layers, length: injected layers and prompts per layer
    norms:          paths of the norms that the adapter replaces
    """
    sizes = meta.meta_axes(cfg) | {"A": layers, "P": length, "L": cfg.depth}
    table = (*GATE * (cfg.injection == "head"), *NEW_GATE * cfg.new_gate, *LORA * (cfg.lora_rank > 0),
             *BIAS * bool(cfg.bias_on), *(line for line in NORMS if line[1] in norms))
    query = ((names.query, "query", "(A P) D -> A P D"),) if cfg.injection == "head" else TOKEN_GATES[cfg.injection]
    return expand((*query, *_prefixed(names.prefix, table)), sizes, {"L": range(cfg.depth)})


def _prefixed(prefix: str, table: Table) -> Table:
    return tuple((prefix + key, path, layout) for key, path, layout in table)


def adapted(cfg: LlamaConfig, rank: int) -> LlamaConfig:
    """Returns the config with LoRA (factor 1, no dropout) and biases as in the release: none on k and v."""
    return dataclasses.replace(
        cfg, lora_rank=rank, lora_alpha=float(rank), lora_dropout=0.0,
        lora_on=("q", "k", "v", "o", "gate", "up", "down"), bias_on=("q", "o", "gate", "up", "down"))


def with_adapter(cfg: LlamaConfig, tensors: Mapping[str, LazyTensor], problems: Problems) -> LlamaConfig:
    """Returns the config with the LoRA and the biases of an adapter file."""
    lora = [key for key in tensors if re.search(r"layers\.\d+\..*\.lora_", key)]
    biases = any(re.search(r"layers\.\d+\..*\.w[qo123]\.bias$", key) for key in tensors)
    rank = next((tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_wq_l1.weight")
                 and len(tensor.shape) == 2), 0)
    if lora and not rank:
        problems.append(f"The adapter has LoRA ({lora[0]}, ...), but no matrix layers.N.attention.lora_wq_l1.weight; "
                        "without it the rank is unknown.")
    if cfg.bias_on:
        problems.append("--llm has biases (attention_bias or mlp_bias in its config.json); the adapters are made for "
                        "models without.")
    full = adapted(cfg, rank)
    return dataclasses.replace(full if rank else cfg, bias_on=full.bias_on if biases else ())


def norms(tensors: Mapping[str, LazyTensor], names: AdapterNames) -> list[str]:
    """Returns the paths of the norms that an adapter file holds, at least for some layers."""
    patterns = {path: re.escape(names.prefix + key).replace(re.escape("{L}"), r"\d+") for key, path, _ in NORMS}
    return [path for path, pattern in patterns.items() if any(re.fullmatch(pattern, key) for key in tensors)]


def read(path: Path, problems: Problems) -> dict[str, LazyTensor]:
    """Reads an adapter file or a training checkpoint; renames `llma.` of older files."""
    tensors = state_dict.read_part(path, problems)
    if not kinds.expect(path, "adapter", tensors, OPTIONS, problems):
        return {}
    return {re.sub(r"^llma\.", "llama.", key): tensor for key, tensor in tensors.items()}


def read_arch(path: Path | None, problems: Problems) -> dict[str, Any]:
    """Reads --arch, a JSON file with any of ARCH_TABLES and ARCH_NUMBERS, as {name: value}; missing tables are {}."""
    given: dict[str, Any] = {name: {} for name in ARCH_TABLES}
    known = (*ARCH_TABLES, *ARCH_NUMBERS, *ARCH_OTHERS)
    for name, value in (read_json(path, problems) if path else {}).items():
        if name not in known:
            problems.append(f"--arch {path.name}: {unknown_name(name, known)}")
        elif name in ARCH_NUMBERS and (not isinstance(value, int) or value <= 0):
            problems.append(f"--arch {path.name}: {name} is {value!r}, expected a whole number above 0.")
        elif name in ARCH_TABLES and not isinstance(value, dict):
            problems.append(f"--arch {path.name}: {name} is {value!r}, expected a table of fields.")
        elif name not in ARCH_OTHERS:
            given[name] = value
    return given


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The contents of an adapter file in terms of a model.

    parts:   fields of the family's config
    entries: table of the file
    fresh:   paths of the parameters that are not in the file
    """

    parts: dict[str, Any]
    entries: list[Entry]
    ignored: Ignored
    fresh: list[str]


def imagebind_llm(
    towers: ImageBindConfig, cfg: LlamaConfig, tensors: Mapping[str, LazyTensor] | None, given: Mapping[str, Any],
    problems: Problems,
) -> Adapter | None:
    """Returns the ImageBind-LLM adapter for a base with that `injection`; without a file (None) it is fresh.

    The query and gates are fresh with the article's bind network alone, the gates with a released file in the token
    form.
    """
    present = tensors or {}
    if LLAMA_ADAPTER.query in present:
        problems.append(f"The adapter has {LLAMA_ADAPTER.query}: it is LLaMA-Adapter's. Convert it with llama-adapter.")
        return None
    cfg = with_adapter(cfg, present, problems)
    if tensors is None:
        bind = BindConfig(towers.out, cfg.dim, given.get("bind_hidden", BIND_RATIO * cfg.dim))
    else:
        bind = imagebind.bind_config(tensors, problems)
    if given.get("query_len", 1) != 1:
        problems.append(f"--arch: query_len is {given['query_len']}; ImageBind-LLM has one prompt per layer.")
    layers = _query_layers(IMAGEBIND_LLM, present, cfg, 1, given.get("query_layer"),
                           RELEASED_LAYERS["imagebind_llm"][0], problems)
    if bind is None:
        return None
    _check_bind(bind, towers.out, cfg.dim, given, problems)
    article = imagebind.is_article(present)
    wanted = [*imagebind.bind_entries(bind, article),
              *entries(cfg, IMAGEBIND_LLM, layers, 1, norms(present, IMAGEBIND_LLM))]
    optional = {"llm/layers/gate", "llm/gate"} | ({"query", "llm/layers/attn/gate"} if article else set())
    fresh = [entry for entry in wanted if tensors is None
             or entry.path in optional and not present.keys() & set(entry.keys)]
    parts = {"imagebind": towers, "bind": bind, "llm": cfg, "query_layers": layers}
    return Adapter(parts, [entry for entry in wanted if entry not in fresh],
                   IGNORED if cfg.injection == "head" else IGNORED + RELEASED_FORM, [entry.path for entry in fresh])


def _check_bind(bind: BindConfig, features: int, width: int, given: Mapping[str, Any], problems: Problems) -> None:
    mismatch = "these files do not belong together."
    if bind.inputs != features:
        problems.append(f"The adapter's bind network reads features of {bind.inputs}, but --imagebind makes features "
                        f"of {features}: {mismatch}")
    if bind.dim != width:
        problems.append(f"The adapter's bind network makes vectors of {bind.dim}, but --llm has a width of {width}: "
                        f"{mismatch}")
    problems.extend(f"--arch: {name} is {given[name]}, but the bind network's is {size}."
                    for name, size in (("image_dim", bind.inputs), ("bind_hidden", bind.hidden))
                    if given.get(name, size) != size)


def _query_layers(names: AdapterNames, tensors: Mapping[str, LazyTensor], cfg: LlamaConfig, length: int,
                  given: int | None, released: int, problems: Problems) -> int:
    """Returns the number of injected layers: from the query's rows, else `given` by --arch, else `released`."""
    if cfg.injection != "head":
        return cfg.depth
    query = tensors.get(names.query)
    layers = given or min(released, cfg.depth)
    if query is not None and query.shape:
        rows, layers = query.shape[0], query.shape[0] // length
        if rows != length * (given or layers):
            problems.append(f"{names.query} has {rows} rows; expected {given or 'a whole number of'} layers of "
                            f"{length} prompts. Set the right numbers with --arch.")
    if layers > cfg.depth:
        problems.append(f"The adapter injects into {layers} layers, but --llm has only {cfg.depth}: these files do "
                        "not belong together.")
    return layers


def imagebind_llm_entries(cfg: Any, norms: Collection[str]) -> list[Entry]:
    """Returns all entries of a model's adapter file; `norms` as in `entries`."""
    return [*imagebind.bind_entries(cfg.bind), *entries(cfg.llm, IMAGEBIND_LLM, cfg.query_layers, 1, norms)]


def llama_adapter(
    clip: ClipConfig | None, cfg: LlamaConfig, tensors: Mapping[str, LazyTensor] | None, given: Mapping[str, Any],
    problems: Problems,
) -> Adapter | None:
    """Returns the LLaMA-Adapter v1 or v2 for a base; without a file (None) it is fresh, and v2 if there is a CLIP."""
    present = tensors or {}
    is_v2 = any(key.startswith("visual_") for key in present) if tensors else clip is not None
    if is_v2 != (clip is not None):
        problems.append("The adapter is LLaMA-Adapter v2's, which reads images: give its CLIP as --clip." if is_v2 else
                        "The adapter is LLaMA-Adapter v1's, which reads no images: omit --clip.")
    if tensors and LLAMA_ADAPTER.query not in tensors:
        problems.append(f"The adapter has no {LLAMA_ADAPTER.query}."
                        + " It is ImageBind-LLM's: convert it with imagebind-llm." * (IMAGEBIND_LLM.query in tensors))
        return None
    if not is_v2:
        return _v1(cfg, tensors, given["adapter_v1"], problems)
    return _v2(clip, cfg, tensors, given["adapter_v2"], problems) if clip else None


def _v1(cfg: LlamaConfig, tensors: Mapping[str, LazyTensor] | None, given: Mapping[str, Any],
        problems: Problems) -> Adapter | None:
    before, (released_layers, released_length) = len(problems), RELEASED_LAYERS["adapter_v1"]
    problems.extend(f"--arch: adapter_v1: {unknown_name(name, V1_ARCH)}" for name in given if name not in V1_ARCH)
    problems.extend(f"--arch: adapter_v1.{name} is {value!r}, expected a whole number above 0."
                    for name, value in given.items() if not isinstance(value, int) or value <= 0)
    if len(problems) > before:
        return None
    length = given.get("adapter_len", released_length)
    layers = _query_layers(LLAMA_ADAPTER_V1, tensors or {}, cfg, length, given.get("adapter_layer"),
                           released_layers, problems)
    wanted = entries(cfg, LLAMA_ADAPTER_V1, layers, length)
    return _adapter({"llm": cfg, "query_layers": layers, "query_len": length}, wanted, V1_IGNORED, tensors)


def _v2(clip: ClipConfig, cfg: LlamaConfig, tensors: Mapping[str, LazyTensor] | None, given: Mapping[str, Any],
        problems: Problems) -> Adapter | None:
    present, wrong = tensors or {}, Problems()
    released_layers, released_length = RELEASED_LAYERS["adapter_v2"]
    sizes = visual.read_arch(given, wrong)["visual"]
    if wrong:  # reported with CLIP's
        return None
    visual_cfg = VISUAL_7B if tensors is None and not sizes else visual.visual_config(present, sizes, problems)
    if visual_cfg is None:
        return None
    cfg = dataclasses.replace(with_adapter(cfg, present, problems), new_gate=any("new_gate" in key for key in present))
    query = present.get("visual_query.weight")
    length = query.shape[0] if query is not None and query.shape else given.get("query_len", released_length)
    layers = _query_layers(LLAMA_ADAPTER, present, cfg, length, given.get("query_layer"), released_layers, problems)
    problems.extend(f"--arch: adapter_v2.{name} is {given[name]}, but the adapter's tensors say {shown}."
                    for name, shown in (("query_len", length), ("lora_rank", cfg.lora_rank or None))
                    if shown and given.get(name, shown) != shown)
    parts = {"llm": cfg, "query_layers": layers, "query_len": length, "clip": clip, "visual": visual_cfg}
    wanted = llama_adapter_entries(types.SimpleNamespace(**parts), norms(present, LLAMA_ADAPTER))
    return _adapter(parts, wanted, IGNORED + visual.VISUAL_IGNORED, tensors)


def _adapter(parts: dict[str, Any], wanted: list[Entry], ignored: Ignored,
             tensors: Mapping[str, LazyTensor] | None) -> Adapter:
    if tensors is None:
        return Adapter(parts, [], (), [entry.path for entry in wanted])
    return Adapter(parts, wanted, ignored, [])


def llama_adapter_entries(cfg: Any, norms: Collection[str]) -> list[Entry]:
    """Returns all entries of a model's adapter file; `norms` as in `entries`."""
    if cfg.visual is None:
        return entries(cfg.llm, LLAMA_ADAPTER_V1, cfg.query_layers, cfg.query_len, norms)
    return [*visual.visual_entries(cfg.visual, cfg.query_len, cfg.clip.out, cfg.llm.dim),
            *entries(cfg.llm, LLAMA_ADAPTER, cfg.query_layers, cfg.query_len, norms)]


# ---- the conversions ----


def inspect_imagebind_llm(
    imagebind: Path, llm: Path, *, adapter: Path | None = None,
    injection: Literal["released", "token", "token-shared"] = "released", arch: Path | None = None,
    words: Path | None = None, prompt_template: str = ALPACA,
) -> SourceCheckpoint:
    """Converts ImageBind-LLM from its parts.

    Args:
        imagebind: imagebind_huge.pth or imagebind_w3D.pth
        llm: folder of LLaMA as Meta ships it (params.json, consolidated.NN.pth) or as transformers saves it
        adapter: released adapter or training checkpoint of either phase, or a bind network alone (bind_network.pth);
            training initializes the trained parameters that it does not hold
        injection: how features are injected: with a gate per head as in the release, or added to every token with a
            gate per layer (token) or one gate for all layers (token-shared)
        arch: JSON file with sizes that the tensors do not determine (number of heads, image size, ...); not needed for
            released sizes
        words: merges of the text sense (CLIP's bpe_simple_vocab_16e6.txt.gz); without it that sense cannot be read
        prompt_template: template with {} for the prompt; the default is Alpaca's, as in the release's training
    """
    problems = Problems()
    given = read_arch(arch, problems)
    form = INJECTIONS.get(injection)
    if form is None:
        problems.append(f"--injection is {injection!r}, expected one of {', '.join(INJECTIONS)}.")
    towers, parameters = _read_imagebind(imagebind, given["imagebind"], words, problems)

    def fit(cfg: LlamaConfig, tensors: Mapping[str, LazyTensor] | None) -> Adapter | None:
        if towers is None or form is None:
            return None
        return imagebind_llm(towers, dataclasses.replace(cfg, injection=form), tensors, given, problems)

    sources = {"imagebind": imagebind, "adapter": adapter, "words": words, "llm": llm}
    return _inspect(sources, parameters, fit, prompt_template, problems)


def inspect_llama_adapter(
    llm: Path, *, adapter: Path | None = None, clip: Path | None = None, arch: Path | None = None,
    raw_gates: bool = False, prompt_template: str = ALPACA,
) -> SourceCheckpoint:
    """Converts LLaMA-Adapter, v1 (text) or v2 (images), from its parts.

    Args:
        llm: folder of LLaMA as Meta ships it (params.json, consolidated.NN.pth) or as transformers saves it
        adapter: released adapter or training checkpoint; without it training initializes the trained parameters, of v2
            if `clip` is given
        clip: state dict of CLIP, of which v2 reads the image tower (released: ViT-L/14)
        arch: JSON file with sizes that the tensors do not determine (adapter_v1: adapter_layer, adapter_len;
            adapter_v2: clip_heads, v_num_heads, ...); not needed for released sizes
        raw_gates: multiply by the gates without tanh, as v1's inference code does
        prompt_template: template with {} for the prompt; the default is Alpaca's, as in the release's training
    """
    problems = Problems()
    given = read_arch(arch, problems)
    tower, parameters = _read_clip(clip, given["adapter_v2"], problems)

    def fit(cfg: LlamaConfig, tensors: Mapping[str, LazyTensor] | None) -> Adapter | None:
        if clip and tower is None:
            return None
        cfg = dataclasses.replace(cfg, injection="head", gate_tanh=not raw_gates)
        return llama_adapter(tower, cfg, tensors, given, problems)

    sources = {"adapter": adapter, "clip": clip, "llm": llm}
    return _inspect(sources, parameters, fit, prompt_template, problems)


def _read_imagebind(
    path: Path, given: Mapping[str, Any], words: Path | None, problems: Problems
) -> tuple[ImageBindConfig | None, dict[str, Parameter]]:
    tensors = state_dict.read_part(path, problems)
    if not kinds.expect(path, "imagebind", tensors, OPTIONS, problems):
        return None, {}
    towers = imagebind.config(tensors, given, problems) if tensors else None
    if towers is None:
        return None, {}
    if words:
        _check_words(words, towers.text and towers.text.vocab, problems)
    return towers, forward(imagebind.entries(towers), tensors, imagebind.IGNORED, path.name, problems)


def _read_clip(
    path: Path | None, arch: Mapping[str, Any], problems: Problems
) -> tuple[ClipConfig | None, dict[str, Parameter]]:
    given = visual.read_arch(arch, problems)["clip"]
    tensors = state_dict.read_part(path, problems) if path else {}
    if path and not kinds.expect(path, "clip", tensors, OPTIONS, problems):
        return None, {}
    cfg = visual.clip_config(tensors, given, problems) if tensors else None
    if cfg is None:
        return None, {}
    return cfg, forward(
        visual.clip_entries(cfg), tensors, visual.CLIP_IGNORED, path.name, problems)


def _inspect(
    sources: Mapping[str, Path | None], towers: dict[str, Parameter],
    fit: Callable[[LlamaConfig, Mapping[str, LazyTensor] | None], Adapter | None], prompt_template: str,
    problems: Problems,
) -> SourceCheckpoint:
    """Returns a language model with an adapter, which may replace norms of the base.

    sources: files by option; "llm" is a folder; without an "adapter" the adapter is fresh
    towers:  all other parameters
    fit:     returns the `Adapter` of an adapter's tensors (None: no file) for a base; None after a problem
    """
    adapter = sources["adapter"]
    release, base = language_model.read(sources["llm"], None, problems)
    tensors = read(adapter, problems) if adapter else None
    found = fit(release.cfg, tensors) if release and (tensors or not adapter) else None
    added = forward(found.entries, tensors, found.ignored, adapter.name, problems) if found and tensors else {}
    problems.check("Cannot convert")
    files = {name: state_dict.files_of(path) for name, path in sources.items() if path} | {"llm": release.files}
    replaced = {path: base[path] for path in base.keys() & added.keys()}
    text = dataclasses.replace(TEXT, prompt_template=prompt_template)
    return SourceCheckpoint(found.parts, towers | base | added, text, release.generation, files, release.tokenizer,
                            tuple(found.fresh), replaced=replaced, words=sources.get("words"),
                            left_out=problems.left_out)


def _check_words(path: Path, vocab: int | None, problems: Problems) -> None:
    """Adds a problem unless a merges file fits the vocabulary: 2 · 256 bytes, the merges, and 2 special tokens."""
    if vocab is None:
        problems.append(f"{path.name} was given as --words, but ImageBind's file has no text tower.")
        return
    count = vocab - 2 * 256 - 2
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            merges = [line.split() for line in itertools.islice(file, 1, count + 1)]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        problems.append(f"--words {path} cannot be read as a gzip file of merges: {error}")
        return
    if (found := sum(len(merge) == 2 for merge in merges)) != count:
        problems.append(f"--words {path} holds {found} merges, but the text tower's {vocab} tokens need {count}.")
