"""Adapter files: what ImageBind-LLM and LLaMA-Adapter train on the side of the language model.

A injected layers   P prompts a layer   L layers   D model   F feed-forward   N query heads   K key and value heads
H head   I, T a head's pairs (see `mmjax.convert.meta`)   R LoRA rank

The names are those of imagebind_LLM and llama_adapter_v2_multimodal7b; LLaMA-Adapter v1's lack the first "llama.".
The paper's token form was never released: its gates go by the name `gate`, beside a bind network.

Facts: llama/{llama,llama_adapter}.py of those projects, imagebind_LLM/convert_ckpt.py (what it drops of a training
checkpoint is dropped here), alpaca_finetuning_v1/{llama/model,extract_adapter_from_checkpoint}.py.
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
from mmjax.convert import imagebind, language_model, meta, minigpt4
from mmjax.convert import llama_adapter as visual
from mmjax.convert.lazy import LazyTensor
from mmjax.convert.tables import (
    Entry,
    Ignored,
    Inspected,
    Parameter,
    Problems,
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
NORMS = (  # they take the place of the base model's
    ("layers.{L}.attention_norm.weight", "llm/layers/attn_norm/scale", "D -> D"),
    ("layers.{L}.ffn_norm.weight", "llm/layers/mlp_norm/scale", "D -> D"),
    ("norm.weight", "llm/norm/scale", "D -> D"),
)
TOKEN_GATES = {"layer": (("gate", "llm/layers/gate", "L -> L 1"),), "shared": (("gate", "llm/gate", "1 -> 1"),)}
INJECTIONS = {"released": "head", "token": "layer", "token-shared": "shared"}  # --injection -> LlamaConfig.injection

NORM_PATHS = tuple(path for _, path, _ in NORMS)
REPLACED = "replaced/"  # in a checkpoint, before the path of what an adapter has another one for
MEMBERS = {"optimizer", "scaler", "epoch", "args", "config"}  # beside "model"; training state that no model needs
IGNORED = (
    *imagebind.BIND_IGNORED,
    (r"llama\.(?!.*(bias|gate|lora|norm)).*", "the base model's, which --llama gives"),
)
RELEASED_FORM = ((r"prefix_query\.weight|llama\.layers\.\d+\.attention\.gate",
                  "of the released form; the token form has gates of its own and no query"),)

V1_IGNORED = (
    (r"layers\.\d+\.(attention|feed_forward)\.w\w\.weight|layers\.\d+\.(attention|ffn)_norm\.weight|"
     r"(tok_embeddings|output|norm)\.weight", "the base model's, which --llama gives"),
    *meta.IGNORED,
)

ARCH_TABLES = ("imagebind", "adapter_v1", "adapter_v2")  # --arch: a set's description, of which each model has its part
ARCH_NUMBERS = ("query_layer", "query_len", "image_dim", "bind_hidden")  # of ImageBind-LLM
ARCH_OTHERS = ("llama", "lora_rank", "knn_vectors")  # what the files themselves tell
V1_ARCH = ("adapter_layer", "adapter_len")
BIND_RATIO = 4  # of a fresh bind network's feed-forward
# Of the released models: injected layers, and the prompts of each.
RELEASED_LAYERS = {"imagebind_llm": (32, 1), "adapter_v1": (30, 10), "adapter_v2": (31, 10)}
TEXT = TextConfig(ALPACA, ALPACA_INPUT, end_sym="</s>", joint=True, max_txt_len=512)


@dataclasses.dataclass(frozen=True)
class AdapterNames:
    """How a project names what lies outside the layers, and what precedes the layers' own names."""

    query: str
    prefix: str = "llama."


IMAGEBIND_LLM = AdapterNames("prefix_query.weight")
LLAMA_ADAPTER = AdapterNames("adapter_query.weight")
LLAMA_ADAPTER_V1 = AdapterNames("adapter_query.weight", prefix="")


def entries(cfg: LlamaConfig, names: AdapterNames, layers: int, length: int, norms: Collection[str] = ()) -> list[Entry]:
    """The language model's side of an adapter.

    layers, length: injected layers and the prompts of each
    norms:          paths of the norms that the adapter brings
    """
    sizes = meta.meta_axes(cfg) | {"A": layers, "P": length, "L": cfg.depth}
    table = (*GATE * (cfg.injection == "head"), *NEW_GATE * cfg.new_gate, *LORA * (cfg.lora_rank > 0),
             *BIAS * bool(cfg.bias_on), *(line for line in NORMS if line[1] in norms))
    query = ((names.query, "query", "(A P) D -> A P D"),) if cfg.injection == "head" else TOKEN_GATES[cfg.injection]
    return expand((*query, *_prefixed(names.prefix, table)), sizes, {"L": range(cfg.depth)})


def _prefixed(prefix: str, table: Table) -> Table:
    return tuple((prefix + key, path, layout) for key, path, layout in table)


def adapted(cfg: LlamaConfig, rank: int) -> LlamaConfig:
    """The language model with LoRA (its factor is 1, without dropout) and biases as in the release: none on k and v."""
    return dataclasses.replace(
        cfg, lora_rank=rank, lora_alpha=float(rank), lora_dropout=0.0,
        lora_on=("q", "k", "v", "o", "gate", "up", "down"), bias_on=("q", "o", "gate", "up", "down"))


def with_adapter(cfg: LlamaConfig, tensors: Mapping[str, LazyTensor], problems: Problems) -> LlamaConfig:
    """The language model with the LoRA and the biases that an adapter file holds."""
    lora = [key for key in tensors if re.search(r"layers\.\d+\..*\.lora_", key)]
    biases = any(re.search(r"layers\.\d+\..*\.w[qo123]\.bias$", key) for key in tensors)
    rank = next((tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_wq_l1.weight")
                 and len(tensor.shape) == 2), 0)
    if lora and not rank:
        problems.append(f"The adapter holds LoRA ({lora[0]}, ...), but no matrix layers.N.attention.lora_wq_l1.weight; "
                        "without it the rank is unknown.")
    full = adapted(cfg, rank)
    return dataclasses.replace(full if rank else cfg, bias_on=full.bias_on if biases else ())


def norms(tensors: Mapping[str, LazyTensor], names: AdapterNames) -> list[str]:
    """Paths of the norms that an adapter file holds, or holds some layers of."""
    patterns = {path: re.escape(names.prefix + key).replace(re.escape("{L}"), r"\d+") for key, path, _ in NORMS}
    return [path for path, pattern in patterns.items() if any(re.fullmatch(pattern, key) for key in tensors)]


def read(path: Path, problems: Problems) -> dict[str, LazyTensor]:
    """An adapter file or a training checkpoint: flat, or under "model". Older ones say `llma.` for `llama.`."""
    return {re.sub(r"^llma\.", "llama.", key): tensor
            for key, tensor in minigpt4.read(path, problems, MEMBERS).items()}


def read_arch(path: Path | None, problems: Problems) -> dict[str, Any]:
    """--arch: a JSON file with any of ARCH_TABLES and ARCH_NUMBERS, as {name: value}; tables it lacks are empty."""
    told: dict[str, Any] = {name: {} for name in ARCH_TABLES}
    known = (*ARCH_TABLES, *ARCH_NUMBERS, *ARCH_OTHERS)
    for name, value in (read_json(path, problems) if path else {}).items():
        if name not in known:
            problems.append(f"--arch {path.name}: {unknown_name(name, known)}")
        elif name in ARCH_NUMBERS and (not isinstance(value, int) or value <= 0):
            problems.append(f"--arch {path.name}: {name} is {value!r}, expected a whole number above 0.")
        elif name in ARCH_TABLES and not isinstance(value, dict):
            problems.append(f"--arch {path.name}: {name} is {value!r}, expected a table of fields.")
        elif name not in ARCH_OTHERS:
            told[name] = value
    return told


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What an adapter file is to a model.

    parts:   the fields of the family's config
    entries: the file's table
    fresh:   paths of the parameters that start fresh
    """

    parts: dict[str, Any]
    entries: list[Entry]
    ignored: Ignored
    fresh: list[str]


def imagebind_llm(
    towers: ImageBindConfig, cfg: LlamaConfig, tensors: Mapping[str, LazyTensor] | None, told: Mapping[str, Any],
    problems: Problems,
) -> Adapter | None:
    """An ImageBind-LLM adapter for a base with that `injection`, or without a file (None) a fresh one.

    An article's bind network alone leaves query and gates fresh, a released file for the token form its gates.
    """
    held = tensors or {}
    if LLAMA_ADAPTER.query in held:
        problems.append(f"The adapter has {LLAMA_ADAPTER.query}: it is LLaMA-Adapter's. Convert it with llama-adapter.")
        return None
    cfg = with_adapter(cfg, held, problems)
    if tensors is None:
        bind = BindConfig(towers.out, cfg.dim, told.get("bind_hidden", BIND_RATIO * cfg.dim))
    else:
        bind = imagebind.bind_config(tensors, problems)
    if told.get("query_len", 1) != 1:
        problems.append(f"--arch: query_len is {told['query_len']}; ImageBind-LLM has one prompt a layer.")
    layers = _query_layers(IMAGEBIND_LLM, held, cfg, 1, told.get("query_layer"),
                           RELEASED_LAYERS["imagebind_llm"][0], problems)
    if bind is None:
        return None
    _check_bind(bind, towers.out, cfg.dim, told, problems)
    article = imagebind.is_article(held)
    own = entries(cfg, IMAGEBIND_LLM, layers, 1, norms(held, IMAGEBIND_LLM))
    wanted = [*imagebind.bind_entries(bind, article), *own]
    optional = {"llm/layers/gate", "llm/gate"} | ({"query", "llm/layers/attn/gate"} if article else set())
    fresh = [entry for entry in wanted if tensors is None
             or entry.path in optional and not held.keys() & set(entry.keys)]
    parts = {"imagebind": towers, "bind": bind, "llm": cfg, "query_layers": layers}
    return Adapter(parts, [entry for entry in wanted if entry not in fresh],
                   IGNORED if cfg.injection == "head" else IGNORED + RELEASED_FORM, [entry.path for entry in fresh])


def _check_bind(bind: BindConfig, features: int, width: int, told: Mapping[str, Any], problems: Problems) -> None:
    apart = "these files do not belong together."
    if bind.inputs != features:
        problems.append(f"The adapter's bind network reads features of {bind.inputs}, but --imagebind makes features "
                        f"of {features}: {apart}")
    if bind.dim != width:
        problems.append(f"The adapter's bind network makes vectors of {bind.dim}, but --llama has a width of {width}: "
                        f"{apart}")
    problems.extend(f"--arch: {name} is {told[name]}, but the bind network's is {size}."
                    for name, size in (("image_dim", bind.inputs), ("bind_hidden", bind.hidden))
                    if told.get(name, size) != size)


def _query_layers(names: AdapterNames, tensors: Mapping[str, LazyTensor], cfg: LlamaConfig, length: int, said: int | None,
                  released: int, problems: Problems) -> int:
    """Injected layers: as the query has rows, else as --arch says, else as many as in the release."""
    if cfg.injection != "head":
        return cfg.depth
    query = tensors.get(names.query)
    layers = said or min(released, cfg.depth)
    if query is not None and query.shape:
        rows, layers = query.shape[0], query.shape[0] // length
        if rows != length * (said or layers):
            problems.append(f"{names.query} has {rows} rows; expected {said or 'a whole number of'} layers of {length} "
                            "prompts. Give the right numbers with --arch.")
    if layers > cfg.depth:
        problems.append(f"The adapter injects into {layers} layers, but --llama has only {cfg.depth}: these files do "
                        "not belong together.")
    return layers


def imagebind_llm_entries(cfg: Any, norms: Collection[str]) -> list[Entry]:
    """Everything that the adapter file of a model holds; `norms` as in `entries`."""
    return [*imagebind.bind_entries(cfg.bind), *entries(cfg.llm, IMAGEBIND_LLM, cfg.query_layers, 1, norms)]


def llama_adapter(
    clip: ClipConfig | None, cfg: LlamaConfig, tensors: Mapping[str, LazyTensor] | None, told: Mapping[str, Any],
    problems: Problems,
) -> Adapter | None:
    """A LLaMA-Adapter file of v1 or v2 for a base, or without a file (None) a fresh one: v2 if there is a CLIP."""
    held = tensors or {}
    is_v2 = any(key.startswith("visual_") for key in held) if tensors else clip is not None
    if is_v2 != (clip is not None):
        problems.append("The adapter is LLaMA-Adapter v2's, which sees images: give its CLIP as --clip." if is_v2 else
                        "The adapter is LLaMA-Adapter v1's, which has no images: leave out --clip.")
    if tensors and LLAMA_ADAPTER.query not in tensors:
        problems.append(f"The adapter has no {LLAMA_ADAPTER.query}."
                        + " It is ImageBind-LLM's: convert it with imagebind-llm." * (IMAGEBIND_LLM.query in tensors))
        return None
    if not is_v2:
        return _v1(cfg, tensors, told["adapter_v1"], problems)
    return _v2(clip, cfg, tensors, told["adapter_v2"], problems) if clip else None


def _v1(cfg: LlamaConfig, tensors: Mapping[str, LazyTensor] | None, told: Mapping[str, Any],
        problems: Problems) -> Adapter | None:
    before, (released_layers, released_length) = len(problems), RELEASED_LAYERS["adapter_v1"]
    problems.extend(f"--arch: adapter_v1: {unknown_name(name, V1_ARCH)}" for name in told if name not in V1_ARCH)
    problems.extend(f"--arch: adapter_v1.{name} is {value!r}, expected a whole number above 0."
                    for name, value in told.items() if not isinstance(value, int) or value <= 0)
    if len(problems) > before:
        return None
    length = told.get("adapter_len", released_length)
    layers = _query_layers(LLAMA_ADAPTER_V1, tensors or {}, cfg, length, told.get("adapter_layer"),
                           released_layers, problems)
    wanted = entries(cfg, LLAMA_ADAPTER_V1, layers, length)
    return _adapter({"llm": cfg, "query_layers": layers, "query_len": length}, wanted, V1_IGNORED, tensors)


def _v2(clip: ClipConfig, cfg: LlamaConfig, tensors: Mapping[str, LazyTensor] | None, told: Mapping[str, Any],
        problems: Problems) -> Adapter | None:
    held, wrong = tensors or {}, Problems()
    released_layers, released_length = RELEASED_LAYERS["adapter_v2"]
    sizes = visual.read_arch(told, wrong)["visual"]
    if wrong:  # reported with CLIP's
        return None
    visual_cfg = VISUAL_7B if tensors is None and not sizes else visual.visual_config(held, sizes, problems)
    if visual_cfg is None:
        return None
    cfg = dataclasses.replace(with_adapter(cfg, held, problems), new_gate=any("new_gate" in key for key in held))
    query = held.get("visual_query.weight")
    length = query.shape[0] if query is not None and query.shape else told.get("query_len", released_length)
    layers = _query_layers(LLAMA_ADAPTER, held, cfg, length, told.get("query_layer"), released_layers, problems)
    problems.extend(f"--arch: adapter_v2.{name} is {told[name]}, but the adapter's tensors say {shown}."
                    for name, shown in (("query_len", length), ("lora_rank", cfg.lora_rank or None))
                    if shown and told.get(name, shown) != shown)
    parts = {"llm": cfg, "query_layers": layers, "query_len": length, "clip": clip, "visual": visual_cfg}
    wanted = llama_adapter_entries(types.SimpleNamespace(**parts), norms(held, LLAMA_ADAPTER))
    return _adapter(parts, wanted, IGNORED + visual.VISUAL_IGNORED, tensors)


def _adapter(parts: dict[str, Any], wanted: list[Entry], ignored: Ignored,
             tensors: Mapping[str, LazyTensor] | None) -> Adapter:
    if tensors is None:
        return Adapter(parts, [], (), [entry.path for entry in wanted])
    return Adapter(parts, wanted, ignored, [])


def llama_adapter_entries(cfg: Any, norms: Collection[str]) -> list[Entry]:
    """Everything that the adapter file of a model holds; `norms` as in `entries`."""
    if cfg.visual is None:
        return entries(cfg.llm, LLAMA_ADAPTER_V1, cfg.query_layers, cfg.query_len, norms)
    return [*visual.visual_entries(cfg.visual, cfg.query_len, cfg.clip.out, cfg.llm.dim),
            *entries(cfg.llm, LLAMA_ADAPTER, cfg.query_layers, cfg.query_len, norms)]


# ---- the conversions ----


def inspect_imagebind_llm(
    imagebind: Path, llm: Path, *, adapter: Path | None = None,
    injection: Literal["released", "token", "token-shared"] = "released", arch: Path | None = None,
    words: Path | None = None, prompt_template: str = ALPACA,
) -> Inspected:
    """Converts ImageBind-LLM from its parts.

    Args:
        imagebind: imagebind_huge.pth or imagebind_w3D.pth
        llm: folder of LLaMA as Meta ships it (params.json, consolidated.NN.pth) or as transformers saves it
        adapter: released adapter or training checkpoint of either phase, or a bind network alone (bind_network.pth);
            what it does not hold, and without it everything that is trained, starts fresh
        injection: how features reach the layers: through each head's gate as in the release, or added to every token
            through a gate of each layer (token) or one gate for all (token-shared)
        arch: JSON file with what tensors do not show (head counts, image size, ...); released sizes need none
        words: merges of the text sense (CLIP's bpe_simple_vocab_16e6.txt.gz); without it that sense cannot be read
        prompt_template: put around every prompt at its {}; the default is Alpaca's, which the release was trained with
    """
    problems = Problems()
    told = read_arch(arch, problems)
    form = INJECTIONS.get(injection)
    if form is None:
        problems.append(f"--injection is {injection!r}; there are {', '.join(INJECTIONS)}.")
    towers, parameters = _read_imagebind(imagebind, told["imagebind"], words, problems)

    def fit(cfg: LlamaConfig, tensors: Mapping[str, LazyTensor] | None) -> Adapter | None:
        if towers is None or form is None:
            return None
        return imagebind_llm(towers, dataclasses.replace(cfg, injection=form), tensors, told, problems)

    sources = {"imagebind": imagebind, "adapter": adapter, "words": words, "llm": llm}
    return _inspect(sources, parameters, fit, prompt_template, problems)


def inspect_llama_adapter(
    llm: Path, *, adapter: Path | None = None, clip: Path | None = None, arch: Path | None = None,
    raw_gates: bool = False, prompt_template: str = ALPACA,
) -> Inspected:
    """Converts LLaMA-Adapter, v1 (text) or v2 (images), from its parts.

    Args:
        llm: folder of LLaMA as Meta ships it (params.json, consolidated.NN.pth) or as transformers saves it
        adapter: released adapter or training checkpoint; without it everything that is trained starts fresh, of v2 if
            `clip` is given
        clip: state dict of CLIP, of which v2 reads the image tower (released: ViT-L/14)
        arch: JSON file with what tensors do not show (adapter_v1: adapter_layer, adapter_len; adapter_v2: clip_heads,
            v_num_heads, ...); released sizes need none
        raw_gates: multiply by the gates themselves and not by their tanh, as v1's inference code does
        prompt_template: put around every prompt at its {}; the default is Alpaca's, which the release was trained with
    """
    problems = Problems()
    told = read_arch(arch, problems)
    tower, parameters = _read_clip(clip, told["adapter_v2"], problems)

    def fit(cfg: LlamaConfig, tensors: Mapping[str, LazyTensor] | None) -> Adapter | None:
        if clip and tower is None:
            return None
        cfg = dataclasses.replace(cfg, injection="head", gate_tanh=not raw_gates)
        return llama_adapter(tower, cfg, tensors, told, problems)

    sources = {"adapter": adapter, "clip": clip, "llm": llm}
    return _inspect(sources, parameters, fit, prompt_template, problems)


def _read_imagebind(
    path: Path, told: Mapping[str, Any], words: Path | None, problems: Problems
) -> tuple[ImageBindConfig | None, dict[str, Parameter]]:
    tensors = minigpt4.read(path, problems)
    towers = imagebind.config(tensors, told, problems) if tensors else None
    if towers is None:
        return None, {}
    if words:
        _check_words(words, towers.text and towers.text.vocab, problems)
    return towers, forward(imagebind.entries(towers), tensors, imagebind.IGNORED, path.name, problems)


def _read_clip(
    path: Path | None, arch: Mapping[str, Any], problems: Problems
) -> tuple[ClipConfig | None, dict[str, Parameter]]:
    told = visual.read_arch(arch, problems)["clip"]
    tensors = minigpt4.read(path, problems) if path else {}
    cfg = visual.clip_config(tensors, told, problems) if tensors else None
    if cfg is None:
        return None, {}
    return cfg, forward(
        visual.clip_entries(cfg), tensors, visual.CLIP_IGNORED, path.name, problems)


def _inspect(
    sources: Mapping[str, Path | None], towers: dict[str, Parameter],
    fit: Callable[[LlamaConfig, Mapping[str, LazyTensor] | None], Adapter | None], prompt_template: str,
    problems: Problems,
) -> Inspected:
    """A language model with an adapter, which may bring norms in place of the base's.

    sources: by option; "llm" is a folder, and without an "adapter" it starts fresh
    towers:  all other parameters
    fit:     what the adapter's tensors (None: no file) are to a base; None if that cannot be said
    """
    adapter = sources["adapter"]
    release, base = language_model.read(sources["llm"], None, problems)
    tensors = read(adapter, problems) if adapter else None
    found = fit(release.cfg, tensors) if release and (tensors or not adapter) else None
    own = forward(found.entries, tensors, found.ignored, adapter.name, problems) if found and tensors else {}
    problems.check("Cannot convert")
    files = {name: (path,) for name, path in sources.items() if path} | {"llm": release.files}
    replaced = {path: base[path] for path in base.keys() & own.keys()}
    text = dataclasses.replace(TEXT, prompt_template=prompt_template)
    return Inspected(found.parts, towers | base | own, text, release.generation, files, release.tokenizer,
                     tuple(found.fresh), replaced=replaced, words=sources.get("words"))


def _check_words(path: Path, vocab: int | None, problems: Problems) -> None:
    """Has a merges file as many merges as the text sense's embedding wants? Bytes, twice, and two marks go before."""
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
        problems.append(f"--words {path} holds {found} merges, but the text tower's {vocab} words need {count}.")
