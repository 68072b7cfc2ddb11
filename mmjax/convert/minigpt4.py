"""Conversion of MiniGPT-4 and MiniGPT-v2: eva_vit.pth, blip2_pretrained*.pth and the trained checkpoints.

Vision: C colours   P, Q patch sides   A positions   S q, k and v   D model   F feed-forward   N heads   H head
Q-Former: A queries   D model   E image width   F feed-forward   N heads   H head
Projector: E input   D language model

A trained checkpoint may hold more than the projector and LoRA. What it holds replaces what the other files hold, as in
the original, which loads it last and without asking for every name (load_state_dict with strict=False).

Facts: minigpt4/models/{eva_vit,Qformer,minigpt_base}.py, and minigpt4/runners/runner_base.py for trained checkpoints.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.config import TextConfig
from mmjax.convert import kinds, language_model, llama, peft, state_dict
from mmjax.convert.lazy import LazyTensor
from mmjax.convert.notes import note
from mmjax.convert.tables import (
    Computed,
    Entry,
    Parameter,
    Problems,
    SourceCheckpoint,
    block_table,
    expand,
    forward,
    read_json,
    sizes_from_shapes,
    unknown_name,
)
from mmjax.models.eva_vit import JOINED, VitConfig
from mmjax.models.qformer import QFormerConfig

EVA_VIT = (
    ("cls_token", "vit/cls", "1 1 D -> D"),
    ("pos_embed", "vit/pos", "1 A D -> A D"),
    ("patch_embed.proj.weight", "vit/patch/w", "D C P Q -> C P Q D"),
    ("patch_embed.proj.bias", "vit/patch/b", "D -> D"),
    *block_table("blocks", "vit/blocks", qkv_bias=(  # keys have none
        ("attn.q_bias", "attn/qkv/q_b", "(N H) -> N H"),
        ("attn.v_bias", "attn/qkv/v_b", "(N H) -> N H"))),
)
EVA_VIT_IGNORED = (
    (r"norm\.(weight|bias)", "MiniGPT-4 uses the tokens before the final norm"),
    (r"head\.(weight|bias)", "the classifier"),
)

LN_VISION = (
    ("ln_vision.weight", "ln_vision/scale", "E -> E"),
    ("ln_vision.bias", "ln_vision/bias", "E -> E"),
)
_LAYER = "Qformer.bert.encoder.layer."
QFORMER = (  # {i}: every layer, {c}: every layer with cross-attention
    ("query_tokens", "qformer/query_tokens", "1 A D -> A D"),
    ("Qformer.bert.embeddings.LayerNorm.weight", "qformer/norm/scale", "D -> D"),
    ("Qformer.bert.embeddings.LayerNorm.bias", "qformer/norm/bias", "D -> D"),
    (_LAYER + "{i}.attention.self.query.weight", "qformer/layer_{i}/attn/q/w", "(N H) D -> D N H"),
    (_LAYER + "{i}.attention.self.query.bias", "qformer/layer_{i}/attn/q/b", "(N H) -> N H"),
    (_LAYER + "{i}.attention.self.key.weight", "qformer/layer_{i}/attn/k/w", "(N H) D -> D N H"),
    (_LAYER + "{i}.attention.self.key.bias", "qformer/layer_{i}/attn/k/b", "(N H) -> N H"),
    (_LAYER + "{i}.attention.self.value.weight", "qformer/layer_{i}/attn/v/w", "(N H) D -> D N H"),
    (_LAYER + "{i}.attention.self.value.bias", "qformer/layer_{i}/attn/v/b", "(N H) -> N H"),
    (_LAYER + "{i}.attention.output.dense.weight", "qformer/layer_{i}/attn/o/w", "D (N H) -> N H D"),
    (_LAYER + "{i}.attention.output.dense.bias", "qformer/layer_{i}/attn/o/b", "D -> D"),
    (_LAYER + "{i}.attention.output.LayerNorm.weight", "qformer/layer_{i}/attn_norm/scale", "D -> D"),
    (_LAYER + "{i}.attention.output.LayerNorm.bias", "qformer/layer_{i}/attn_norm/bias", "D -> D"),
    (_LAYER + "{c}.crossattention.self.query.weight", "qformer/layer_{c}/cross/q/w", "(N H) D -> D N H"),
    (_LAYER + "{c}.crossattention.self.query.bias", "qformer/layer_{c}/cross/q/b", "(N H) -> N H"),
    (_LAYER + "{c}.crossattention.self.key.weight", "qformer/layer_{c}/cross/k/w", "(N H) E -> E N H"),
    (_LAYER + "{c}.crossattention.self.key.bias", "qformer/layer_{c}/cross/k/b", "(N H) -> N H"),
    (_LAYER + "{c}.crossattention.self.value.weight", "qformer/layer_{c}/cross/v/w", "(N H) E -> E N H"),
    (_LAYER + "{c}.crossattention.self.value.bias", "qformer/layer_{c}/cross/v/b", "(N H) -> N H"),
    (_LAYER + "{c}.crossattention.output.dense.weight", "qformer/layer_{c}/cross/o/w", "D (N H) -> N H D"),
    (_LAYER + "{c}.crossattention.output.dense.bias", "qformer/layer_{c}/cross/o/b", "D -> D"),
    (_LAYER + "{c}.crossattention.output.LayerNorm.weight", "qformer/layer_{c}/cross_norm/scale", "D -> D"),
    (_LAYER + "{c}.crossattention.output.LayerNorm.bias", "qformer/layer_{c}/cross_norm/bias", "D -> D"),
    (_LAYER + "{i}.intermediate_query.dense.weight", "qformer/layer_{i}/mlp/fc1/w", "F D -> D F"),
    (_LAYER + "{i}.intermediate_query.dense.bias", "qformer/layer_{i}/mlp/fc1/b", "F -> F"),
    (_LAYER + "{i}.output_query.dense.weight", "qformer/layer_{i}/mlp/fc2/w", "D F -> F D"),
    (_LAYER + "{i}.output_query.dense.bias", "qformer/layer_{i}/mlp/fc2/b", "D -> D"),
    (_LAYER + "{i}.output_query.LayerNorm.weight", "qformer/layer_{i}/mlp_norm/scale", "D -> D"),
    (_LAYER + "{i}.output_query.LayerNorm.bias", "qformer/layer_{i}/mlp_norm/bias", "D -> D"),
)
_POSITIONS = (r"Qformer\.bert\.embeddings\.position_ids", "a buffer; the queries have no positions")
BLIP2_IGNORED = (
    _POSITIONS,
    (r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.weight", "text branch"),
    (r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*", "text branch's feed-forward"),
    (r"Qformer\.cls\..*", "text branch's word head"),
    (r"(t5_proj|llm_proj|opt_proj)\..*", "BLIP-2's projection to its own language model"),
    (r"(vision_proj|text_proj|itm_head)\..*|temp", "BLIP-2's first-stage losses"),
)

PROJECTOR = (
    ("llama_proj.weight", "projector/w", "D E -> E D"),
    ("llama_proj.bias", "projector/b", "D -> D"),
)
_TUNED = r"llama_model\.base_model\.model\."
TRAINED_IGNORED = (
    _POSITIONS,
    (r"(" + _TUNED + r"|llama_model\.)" + llama.IGNORED[0][0], llama.IGNORED[0][1]),
)
QFORMER_IGNORED = (*BLIP2_IGNORED, *TRAINED_IGNORED[1:])  # a trained checkpoint may be the Q-Former's file
TRAINED_KEYS = {"projector": r"llama_proj\..*", "lora": r".*\.lora_[AB]\..*"}  # by option
REPLACING = {  # by option, what a trained checkpoint may hold of another part: the beginning of its names
    "vit": r"visual_encoder\.", "qformer": r"(?=(Qformer|query_tokens|ln_vision)\b)(?!.*position_ids)",
    "llm": r"llama_model\.(base_model\.model\.)?(?=(model|lm_head)\.)(?!.*(\.lora_[AB]\.|rotary_emb\.inv_freq))",
}
OPTIONS = ("vit", "llm", "qformer", "projector", "lora")

# Tensors whose shapes give sizes; "" is an axis that is not used.
VIT_SIZES = {"patch_embed.proj.weight": ("dim", "", "patch", ""), "blocks.0.mlp.fc1.weight": ("hidden", "dim"),
             "pos_embed": ("", "positions", "")}
QFORMER_SIZES = {"query_tokens": ("", "queries", "dim"),
                 _LAYER + "0.intermediate_query.dense.weight": ("hidden", "dim")}
# Sizes that no shape gives, of the released models, by their width.
REAL_VIT = {1_408: {"heads": 16, "depth": 39}}
REAL_QFORMER = {768: {"heads": 12, "cross_every": 2}}
REAL_IMAGE_SIZE = {"minigpt4": 224, "minigpt_v2": 448}

# --arch: its names -> fields of the configs. None: a name that is only checked.
ARCH = {
    "vit": {"image_size": "image_size", "patch_size": "patch", "dim": "dim", "depth": "depth", "num_heads": "heads",
            "mlp_hidden": "hidden", "layer_norm_eps": "eps", "ln_vision_eps": None},
    "qformer": {"hidden": "dim", "num_layers": "depth", "num_heads": "heads", "intermediate": "hidden",
                "num_query_tokens": "queries", "cross_attention_freq": "cross_every", "layer_norm_eps": "eps",
                "encoder_width": None},
    "minigpt_v2": {"image_size": "image_size", "lora_r": "rank", "lora_alpha": "alpha", "lora_targets": None},
}
LN_VISION_EPS, LORA_TARGETS = 1e-5, ["q_proj", "v_proj"]


def vit_entries(cfg: VitConfig) -> list[Entry]:
    sizes = {"C": 3, "P": cfg.patch, "Q": cfg.patch, "A": 1 + cfg.table**2, "S": 3, "D": cfg.dim, "F": cfg.hidden,
             "N": cfg.heads, "H": cfg.dim // cfg.heads}
    return expand(EVA_VIT, sizes, {"L": range(cfg.depth)})


def vit_ignored(cfg: VitConfig) -> tuple[tuple[str, str], ...]:
    deeper = rf"blocks\.(?!({'|'.join(map(str, range(cfg.depth)))})\.)\d+\..*"
    return (*EVA_VIT_IGNORED, (deeper, f"blocks after the {cfg.depth} of the model"))


def qformer_entries(cfg: QFormerConfig, vit_dim: int) -> list[Entry]:
    sizes = {"A": cfg.queries, "D": cfg.dim, "E": vit_dim, "F": cfg.hidden, "N": cfg.heads, "H": cfg.dim // cfg.heads}
    layers = {"i": range(cfg.depth), "c": range(0, cfg.depth, cfg.cross_every)}
    return expand(LN_VISION + QFORMER, sizes, layers)


def projector_entries(inputs: int, outputs: int) -> list[Entry]:
    return expand(PROJECTOR, {"E": inputs, "D": outputs})


def read_arch(path: Path | None, problems: Problems) -> dict[str, dict[str, Any]]:
    """Reads --arch, a JSON file with any of the parts and fields of `ARCH`, as {part: {field: value}}."""
    given: dict[str, dict[str, Any]] = {part: {} for part in ARCH}
    for part, fields in (read_json(path, problems) if path else {}).items():
        if part not in ARCH:
            if part != "llama":  # described by its folder's config.json
                problems.append(f"--arch {path.name}: {unknown_name(part, ARCH)}")
            continue
        if not isinstance(fields, dict):
            problems.append(f"--arch {path.name}: {part} is {fields!r}, expected a table of fields.")
            continue
        for name, value in fields.items():
            if name not in ARCH[part]:
                problems.append(f"--arch {path.name}: {part}: {unknown_name(name, ARCH[part])}")
            elif name != "lora_targets" and (not isinstance(value, int | float) or value <= 0):
                problems.append(f"--arch {path.name}: {part}.{name} is {value!r}, expected a number above 0.")
            else:
                given[part][ARCH[part][name] or name] = value
    fixed = (("vit", "ln_vision_eps", LN_VISION_EPS), ("minigpt_v2", "lora_targets", LORA_TARGETS))
    problems.extend(f"--arch {path.name}: {part}.{name} is {given[part][name]!r}; only {only!r} is supported."
                    for part, name, only in fixed if given[part].get(name, only) != only)
    width = given["qformer"].get("encoder_width")
    if width is not None and given["vit"].get("dim", width) != width:
        problems.append(f"--arch {path.name}: qformer.encoder_width is {width}, vit.dim is {given['vit']['dim']}.")
    return given


def vit_config(tensors: Mapping[str, LazyTensor], arch: Mapping[str, Mapping[str, Any]], v2: bool,
               problems: Problems) -> VitConfig | None:
    """Returns the config of the vision tower: from its tensors, `--arch`, or the released sizes."""
    found = sizes_from_shapes(tensors, VIT_SIZES)
    if "positions" in found:  # if not a square, the table's line reports the wrong shape
        found["table"] = math.isqrt(max(found.pop("positions") - 1, 0))
    known = dict(REAL_VIT.get(found.get("dim"), {}))
    if known:
        known["image_size"] = REAL_IMAGE_SIZE["minigpt_v2" if v2 else "minigpt4"]
    given = {name: value for name, value in arch["vit"].items() if name != "ln_vision_eps"}
    if v2 and "image_size" in arch["minigpt_v2"]:
        given["image_size"] = arch["minigpt_v2"]["image_size"]
    cfg = _config(VitConfig, "vit", tensors, found, known, given, problems)
    if cfg and cfg.image_size % cfg.patch:
        problems.append(f"vit: images of {cfg.image_size} pixels do not divide into patches of {cfg.patch}.")
        return None
    return cfg


def qformer_config(tensors: Mapping[str, LazyTensor], arch: Mapping[str, Mapping[str, Any]],
                   problems: Problems) -> QFormerConfig | None:
    """Returns the config of the Q-Former: from its tensors, `--arch`, or the released sizes."""
    found = sizes_from_shapes(tensors, QFORMER_SIZES, re.escape(_LAYER) + r"(\d+)\.")
    given = {name: value for name, value in arch["qformer"].items() if name != "encoder_width"}
    return _config(QFormerConfig, "qformer", tensors, found, REAL_QFORMER.get(found.get("dim"), {}), given, problems)


def _config(cls, part: str, tensors: Mapping[str, LazyTensor], found: Mapping[str, int], known: Mapping[str, Any],
            given: Mapping[str, Any], problems: Problems):
    """Returns a config from the sizes of the tensors (`found`), of --arch (`given`) and of the release (`known`)."""
    if not tensors:
        return None  # the file has been reported
    arch_names = {ours: name for name, ours in ARCH[part].items() if ours and ours != "eps"}
    problems.extend(
        f"--arch: {part}.{arch_names[name]} is {given[name]}, but in the tensors it is {found[name]}."
        for name in found.keys() & given.keys() if found[name] != given[name])
    values = {**known, **found, **given}
    absent = [name for ours, name in arch_names.items() if ours not in values]
    if absent:
        example = json.dumps({part: {name: "..." for name in absent}})
        problems.append(f"{part}: the sizes are not those of a released model, and the tensors do not determine "
                        f"{', '.join(absent)}. If it is the right file, set them: --arch FILE with {example}.")
        return None
    cfg = cls(**values)
    if cfg.dim % cfg.heads:
        problems.append(f"{part}: {cfg.heads} heads do not divide the width {cfg.dim}.")
        return None
    return cfg


# The settings that the released models were trained with, without the template, which is in no weight file.
TEXT = TextConfig(end_sym="###", max_txt_len=160)
TEXT_NO_QFORMER = TextConfig(end_sym="</s>", max_txt_len=160)
TEXT_V2 = TextConfig(end_sym="</s>", max_txt_len=1024)


def inspect(
    vit: Path, llm: Path, *, qformer: Path | None = None, delta: Path | None = None,
    projector: Path | None = None, lora: Path | None = None, lora_rank: int = 0, arch: Path | None = None,
    prompt_template: str = "",
) -> SourceCheckpoint:
    """Converts MiniGPT-4 or MiniGPT-v2 from its parts.

    Args:
        vit: eva_vit_g.pth. This and the other files may be .pth, .bin, .safetensors, or a folder of transformers
        llm: folder of LLaMA, Vicuna or Llama-2 as transformers saves it, or as Meta ships it
        qformer: blip2_pretrained*.pth, or a trained checkpoint with a Q-Former; omit it for the models without one (on
            Llama-2, and MiniGPT-v2)
        delta: folder of a Vicuna delta to add to `llm`
        projector: trained checkpoint with llama_proj; without it training initializes the projector
        lora: trained checkpoint with LoRA, which may be the same file as `projector`, or a folder that peft saved
        lora_rank: rank of a new LoRA to train, without `lora`
        arch: JSON file with sizes that the tensors do not determine (number of heads, image size, ...); not needed for
            released sizes
        prompt_template: template with {} for the prompt, such as "###Human: {} ###Assistant: " (Vicuna),
            "[INST] {} [/INST] " (Llama-2) or "[INST] {} [/INST]" (MiniGPT-v2); default: the prompt alone
    """
    problems, parameters = Problems(), {}
    given = read_arch(arch, problems)
    is_v2 = lora is not None or lora_rank > 0
    options = {"vit": vit, "qformer": qformer, "projector": projector, "lora": lora}
    files, settings = _read_files(options, problems)
    held, trained = _split(files, options)
    vit_cfg, found = _read_vit(vit, held["vit"], given, is_v2, problems)
    parameters |= found
    qformer_cfg, found, constant = _read_qformer(qformer or projector or vit, held["qformer"], vit_cfg, given, problems)
    parameters |= found
    release, found = language_model.read(llm, delta, problems, held["llm"])
    parameters |= found
    fresh: list[str] = []
    if release:
        cfg = release.cfg
        if is_v2:
            cfg = peft.with_lora(cfg, trained.get(lora, {}), settings, lora_rank, given["minigpt_v2"], problems)
        if vit_cfg and (qformer_cfg or not (qformer or has_qformer(held["qformer"]))):
            inputs = qformer_cfg.dim if qformer_cfg else JOINED * vit_cfg.dim
            found, fresh = _read_trained_parts(
                trained, (("projector", projector, projector_entries(inputs, cfg.dim)),
                          ("lora", lora, peft.entries(cfg))), problems)
            parameters |= found
    problems.check("Cannot convert")
    text = TEXT_V2 if is_v2 else TEXT if qformer_cfg else TEXT_NO_QFORMER
    text = dataclasses.replace(text, prompt_template=prompt_template)
    sources = {"vit": vit, "qformer": qformer, "projector": projector, "lora": lora}
    sources = {name: state_dict.files_of(path) for name, path in sources.items() if path} | {"llm": release.files}
    parts = {"vit": vit_cfg, "qformer": qformer_cfg, "llm": cfg}
    return SourceCheckpoint(parts, parameters, text, release.generation, sources, release.tokenizer, tuple(fresh),
                            constant, left_out=problems.left_out)


def _read_files(
    options: Mapping[str, Path | None], problems: Problems
) -> tuple[dict[Path, dict[str, LazyTensor]], peft.Settings]:
    """Returns ({file: its tensors}, the settings of LoRA). A file that is something else is a problem, and empty."""
    files: dict[Path, dict[str, LazyTensor]] = {}
    settings = peft.Settings()
    for option, path in options.items():
        if path is None:
            continue
        if path not in files:
            tensors, found = peft.read(path, problems)
            files[path] = tensors
            settings = found if option == "lora" else settings
        if not kinds.expect(path, option, files[path], OPTIONS, problems):
            files[path] = {}
    return files, settings


def _split(
    files: Mapping[Path, Mapping[str, LazyTensor]], options: Mapping[str, Path | None]
) -> tuple[dict[str, dict[str, LazyTensor]], dict[Path, dict[str, LazyTensor]]]:
    """Returns ({"vit", "qformer", "llm": tensors by their own names}, {file: projector and LoRA}).

    files: in the order in which the original loads them; of a tensor that several hold, the last is taken, and a line
           says so
    """
    held: dict[str, dict[str, LazyTensor]] = {option: {} for option in REPLACING}
    trained: dict[Path, dict[str, LazyTensor]] = {}
    for path, tensors in files.items():
        rest = dict(tensors)
        for option, pattern in REPLACING.items():
            names = {key: re.sub(f"^{pattern}", "", key) for key in rest if re.match(pattern, key)}
            held[option] |= {name: rest.pop(key) for key, name in names.items()}
            if names and path != options.get(option):
                note(f"{path.name} also holds {len(names)} tensors of --{option}. They are taken, as the original "
                     "does, which loads all that a trained file holds.")
        own = {key: rest[key] for key in rest if any(re.fullmatch(pattern, key) for pattern in TRAINED_KEYS.values())}
        for option in ("vit", "qformer"):
            if path == options[option] and not (option == "vit" and len(rest) < len(tensors)):
                held[option] |= {key: tensor for key, tensor in rest.items() if key not in own}
                rest = own
        trained[path] = rest if path in (options["projector"], options["lora"]) else own
    return held, trained


def has_qformer(tensors: Mapping[str, LazyTensor]) -> bool:
    return any(key.startswith("Qformer.") for key in tensors)


def _read_vit(path: Path, tensors: Mapping[str, LazyTensor], given: Mapping[str, Any], is_v2: bool,
              problems: Problems) -> tuple[VitConfig | None, dict[str, Parameter]]:
    cfg = vit_config(tensors, given, is_v2, problems)
    return cfg, forward(vit_entries(cfg), tensors, vit_ignored(cfg), path.name, problems) if cfg else {}


def _read_qformer(
    path: Path | None, tensors: Mapping[str, LazyTensor], vit_cfg: VitConfig | None, given: Mapping[str, Any],
    problems: Problems,
) -> tuple[QFormerConfig | None, dict[str, Parameter], dict[str, float]]:
    """Returns (config, parameters, constant parameters). Without a Q-Former ln_vision is constant, because the original
    then keeps its initial values."""
    if has_qformer(tensors):
        cfg = qformer_config(tensors, given, problems)
        if not (cfg and vit_cfg):
            return cfg, {}, {}
        return cfg, forward(qformer_entries(cfg, vit_cfg.dim), tensors, QFORMER_IGNORED, path.name, problems), {}
    if not vit_cfg:
        return None, {}, {}
    if vit_cfg.grid**2 % JOINED:
        problems.append(f"Without a Q-Former {JOINED} patches become one token, but images of {vit_cfg.image_size} "
                        f"pixels have {vit_cfg.grid**2} patches.")
    if tensors:  # of a model without a Q-Former that was saved whole
        return None, forward(expand(LN_VISION, {"E": vit_cfg.dim}), tensors, QFORMER_IGNORED, path.name, problems), {}
    constant = {"ln_vision/scale": 1.0, "ln_vision/bias": 0.0}
    return None, {path: _filled(path, value, vit_cfg.dim) for path, value in constant.items()}, constant


def _read_trained_parts(
    files: Mapping[Path, Mapping[str, LazyTensor]], parts: Sequence[tuple[str, Path | None, list[Entry]]],
    problems: Problems,
) -> tuple[dict[str, Parameter], list[str]]:
    """Returns (parameters, fresh paths) of the trained parts, given as (option, its file, entries).

    One file may contain both. Adds a problem for a part that a file contains and no option selects, because the
    conversion would silently drop it.
    """
    parameters: dict[str, Parameter] = {}
    for path, tensors in files.items():
        entries, ignored = [], list(TRAINED_IGNORED)
        for option, given, wanted in parts:
            pattern = TRAINED_KEYS[option]
            if given == path:
                entries += wanted
                continue
            ignored.append((pattern, f"--{option} is another file"))
            if given is None and any(re.fullmatch(pattern, key) for key in tensors):
                problems.append(f"{path.name} also holds a trained {option}, which would be lost: give the same file "
                                f"as --{option}, too.")
        if tensors:
            parameters |= forward(entries, tensors, ignored, path.name, problems)
    return parameters, [entry.path for _, given, wanted in parts if given is None for entry in wanted]


def _filled(path: str, value: float, size: int) -> Parameter:
    tensor = Computed(path, (size,), np.float32, lambda: np.full(size, value, np.float32))
    return Parameter((size,), np.dtype(np.float32), "D -> D", {}, (tensor,), False)
