"""Conversion of ImageBind (imagebind_huge.pth, imagebind_w3D.pth) and of ImageBind-LLM's bind network.

Towers: C channels   M frames   P, Q patch sides   A positions   V vocabulary   S q, k and v   D model   F feed-forward
        N heads   H head   E the shared space
Bind:   E the shared space   D language model   F feed-forward

Facts: imagebind/models/*.py and imagebind_LLM/llama/llama_adapter.py. The bind network has two sets of names: the
released adapter files' and the article's, where w2 and w3 are swapped in comparison with the release's f2 and f3.
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.convert.lazy import LazyTensor
from mmjax.convert.tables import Computed, Entry, Problems, Table, block_table, expand, sizes_from_shapes
from mmjax.models.bind import BindConfig
from mmjax.models.imagebind import (
    IMAGEBIND_HUGE,
    ImageBindConfig,
    MotionConfig,
    PatchesConfig,
    TextTowerConfig,
    TowerConfig,
    VisionConfig,
)
from mmjax.models.senses import SENSES

_CLASS = (("cls_token", "cls", "1 1 D -> D"),)
_HELPER = (*_CLASS, ("pos_embedding_helper.pos_embed", "pos", "1 A D -> A D"))


def _patches(stem: str) -> Table:
    return (
        *_HELPER,
        (f"{stem}.proj.weight", "patch/w", "D 1 P Q -> P Q D"),
        (f"{stem}.norm_layer.weight", "norm/scale", "D -> D"),
        (f"{stem}.norm_layer.bias", "norm/bias", "D -> D"),
    )


STEMS = {  # under modality_preprocessors.SENSE. and imagebind/SENSE/stem/
    "vision": (*_HELPER, ("rgbt_stem.proj.1.weight", "patch/w", "D C M P Q -> C M P Q D")),
    "text": (("token_embedding.weight", "embedding", "V D -> V D"), ("pos_embed", "pos", "1 A D -> A D")),
    "audio": _patches("rgbt_stem"),
    "depth": _patches("depth_stem"),
    "thermal": _patches("rgbt_stem"),
    "imu": (
        *_CLASS,
        ("pos_embed", "pos", "1 A D -> A D"),
        ("imu_stem.proj.weight", "window/w", "D (C P) -> C P D"),
        ("imu_stem.norm_layer.weight", "norm/scale", "D -> D"),
        ("imu_stem.norm_layer.bias", "norm/bias", "D -> D"),
    ),
}
# Under modality_trunks.SENSE. and imagebind/SENSE/
TRUNK = block_table("blocks", "blocks", norm="norm_", qkv="attn.in_proj_", o="attn.out_proj")
EXTRA_KEY = (
    ("blocks.{L}.attn.bias_k", "blocks/attn/bias_k", "1 1 (N H) -> N H"),
    ("blocks.{L}.attn.bias_v", "blocks/attn/bias_v", "1 1 (N H) -> N H"),
)
PRE_NORM = (
    ("pre_transformer_layer.0.weight", "pre_norm/scale", "D -> D"),
    ("pre_transformer_layer.0.bias", "pre_norm/bias", "D -> D"),
)
# Names of the head's norm and linear map. A dropout or a selection of a token between them takes a number.
HEADS = {"vision": ("0", "2"), "text": ("proj.0", "proj.1"), "audio": ("0", "2"), "depth": ("0", "2"),
         "thermal": ("0", "2"), "imu": ("0", "3")}
MASK = "modality_preprocessors.text.mask"
IGNORED = (
    (re.escape(MASK), "a buffer: the causal mask"),
    (r"(point_trunk|modality_(preprocessors|trunks|heads|postprocessors)\.point)\..*", "the point cloud branch"),
)

BIND = (
    ("image_bind_proj.weight", "bind/proj/w", "D E -> E D"),
    ("image_bind_proj.bias", "bind/proj/b", "D -> D"),
    ("image_bind_norm_{i}.weight", "bind/block_{i}/norm/scale", "D -> D"),
    ("image_bind_f1_{i}.weight", "bind/block_{i}/gate/w", "F D -> D F"),
    ("image_bind_f3_{i}.weight", "bind/block_{i}/up/w", "F D -> D F"),
    ("image_bind_f2_{i}.weight", "bind/block_{i}/down/w", "D F -> F D"),
)
BIND_LEGACY = (
    *BIND,
    ("image_bind_norm_{i}.bias", "bind/block_{i}/norm/bias", "D -> D"),
    ("image_bind_f1_{i}.bias", "bind/block_{i}/gate/b", "F -> F"),
    ("image_bind_f3_{i}.bias", "bind/block_{i}/up/b", "F -> F"),
    ("image_bind_f2_{i}.bias", "bind/block_{i}/down/b", "D -> D"),
)
BIND_ARTICLE = (
    ("linear_0.weight", "bind/proj/w", "D E -> E D"),
    ("linear_0.bias", "bind/proj/b", "D -> D"),
    ("feed_forward_{i}.norm.weight", "bind/block_{i}/norm/scale", "D -> D"),
    ("feed_forward_{i}.w1.weight", "bind/block_{i}/gate/w", "F D -> D F"),
    ("feed_forward_{i}.w2.weight", "bind/block_{i}/up/w", "F D -> D F"),
    ("feed_forward_{i}.w3.weight", "bind/block_{i}/down/w", "D F -> F D"),
)
BIND_IGNORED = (  # other keys of adapter files
    (r"image_bind\..*", "the frozen ImageBind, which has a file of its own"),
    (r"prefix_projector_norm\..*", "a norm of older code that nothing uses"),
)

# Tensors whose shapes give sizes, under modality_preprocessors.SENSE.; "" is an axis that is not used.
_POS = "pos_embedding_helper.pos_embed"
SIZES = {
    "vision": {"rgbt_stem.proj.1.weight": ("dim", "", "frames", "patch", ""), _POS: ("", "positions", "")},
    "text": {"token_embedding.weight": ("vocab", "dim"), "pos_embed": ("", "context", "")},
    "audio": {"rgbt_stem.proj.weight": ("dim", "", "patch", ""), _POS: ("", "positions", "")},
    "depth": {"depth_stem.proj.weight": ("dim", "", "patch", ""), _POS: ("", "positions", "")},
    "thermal": {"rgbt_stem.proj.weight": ("dim", "", "patch", ""), _POS: ("", "positions", "")},
    "imu": {"imu_stem.proj.weight": ("dim", "flat_window"), "pos_embed": ("", "positions", "")},
}
CLASSES = {"vision": VisionConfig, "text": TextTowerConfig, "audio": PatchesConfig, "depth": PatchesConfig,
           "thermal": PatchesConfig, "imu": MotionConfig}
CHANNELS, HEAD_DROPOUT = 6, 0.5  # of the imu tower; in no file

# --arch, part "imagebind": its names -> fields of the configs. A name may apply to several towers.
_COMMON = {"{}_embed_dim": "dim", "{}_num_blocks": "depth", "{}_num_heads": "heads", "{}_drop_path": "drop_path"}
ARCH = {sense: {name.format(sense): field for name, field in _COMMON.items()} for sense in SENSES}
ARCH["vision"] |= {"image_size": "image_size", "video_frames": "frames"}
ARCH["text"] |= {"text_vocab": "vocab", "text_context": "context"}
ARCH["audio"] |= {"audio_kernel_size": "patch", "audio_stride": "stride", "audio_num_mel_bins": "height",
                  "audio_target_len": "width"}
ARCH["depth"] |= {"depth_kernel_size": "patch", "depth_thermal_size": "height"}
ARCH["thermal"] |= {"thermal_kernel_size": "patch", "depth_thermal_size": "height"}
ARCH["imu"] |= {"imu_kernel_size": "window", "imu_len": "steps"}


def _under(key: str, path: str, table: Table) -> Table:
    return tuple((f"{key}.{source}", f"{path}/{target}", layout) for source, target, layout in table)


def tower_table(sense: str) -> Table:
    """Returns the table of one tower."""
    cls, (norm, out) = CLASSES[sense], HEADS[sense]
    trunk = (*TRUNK, *(EXTRA_KEY if cls.extra_key else ()), *(PRE_NORM if cls.pre_norm else ()))
    head = ((f"{norm}.weight", "head/norm/scale", "D -> D"), (f"{norm}.bias", "head/norm/bias", "D -> D"),
            (f"{out}.weight", "head/out/w", "E D -> D E"))
    post = (("1.log_logit_scale", "post/log_scale", "-> 1"),) if cls.scaled else ()
    path = f"imagebind/{sense}"
    return (
        *_under(f"modality_preprocessors.{sense}", f"{path}/stem", STEMS[sense]),
        *_under(f"modality_trunks.{sense}", path, trunk),
        *_under(f"modality_heads.{sense}", path, head),
        *_under(f"modality_postprocessors.{sense}", path, post),
    )


def entries(cfg: ImageBindConfig) -> list[Entry]:
    """Returns the entries of the released file, without `buffers` and IGNORED."""
    result = []
    for sense, tower in cfg.towers.items():
        sizes = {"A": tower.num_positions, "S": 3, "D": tower.dim, "F": tower.hidden, "N": tower.heads,
                 "H": tower.dim // tower.heads, "E": cfg.out}
        match tower:
            case VisionConfig():
                sizes |= {"C": 3, "M": tower.frames, "P": tower.patch, "Q": tower.patch}
            case TextTowerConfig():
                sizes |= {"V": tower.vocab}
            case PatchesConfig():
                sizes |= {"P": tower.patch, "Q": tower.patch}
            case MotionConfig():
                sizes |= {"C": tower.channels, "P": tower.window}
        result += expand(tower_table(sense), sizes, {"L": range(tower.depth)})
    return result


def buffers(cfg: ImageBindConfig) -> dict[str, Computed]:
    """Returns the buffers of the released file: the text tower's mask, -inf where a token is not seen."""
    if cfg.text is None:
        return {}
    side = cfg.text.context
    return {MASK: Computed(MASK, (side, side), np.float32,
                           lambda: np.triu(np.full((side, side), -np.inf, np.float32), 1))}


def bind_entries(cfg: BindConfig, article: bool = False) -> list[Entry]:
    """Returns the entries of the bind network in the release's names or the article's, which have no legacy form."""
    table = BIND_ARTICLE if article else BIND_LEGACY if cfg.legacy else BIND
    return expand(table, {"E": cfg.inputs, "D": cfg.dim, "F": cfg.hidden}, {"i": range(1, cfg.depth + 1)})


def is_article(tensors: Mapping[str, LazyTensor]) -> bool:
    return "linear_0.weight" in tensors


def bind_config(tensors: Mapping[str, LazyTensor], problems: Problems) -> BindConfig | None:
    """Returns the config of the bind network from the shapes of its tensors."""
    article = is_article(tensors)
    proj, gate, block = (("linear_0.weight", "feed_forward_1.w1.weight", r"feed_forward_(\d+)\.w1\.weight") if article
                         else ("image_bind_proj.weight", "image_bind_f1_1.weight", r"image_bind_f1_(\d+)\.weight"))
    sizes = {key: tensors[key].shape for key in (proj, gate) if key in tensors and len(tensors[key].shape) == 2}
    if len(sizes) < 2:
        problems.extend(f"bind network: {key} is missing or not a matrix; without it the sizes are unknown."
                        for key in (proj, gate) if key not in sizes)
        return None
    depth = max(int(match[1]) for match in (re.fullmatch(block, key) for key in tensors) if match)
    (dim, inputs), (hidden, _) = sizes[proj], sizes[gate]
    return BindConfig(inputs, dim, hidden, depth, legacy=not article and "image_bind_norm_1.bias" in tensors)


def config(tensors: Mapping[str, LazyTensor], arch: Mapping[str, Any], problems: Problems) -> ImageBindConfig | None:
    """Returns the config of the towers in the file: from its tensors, `arch`, or the released sizes.

    arch: the "imagebind" part of --arch, with any of the names of `ARCH`, and `kernel_size` and `out_embed_dim`
    """
    given = _read_arch(arch, problems)
    present = [sense for sense in SENSES if any(f".{sense}." in key for key in tensors)]
    if not present:
        problems.append("The file holds no tower of ImageBind (names such as modality_trunks.vision.blocks.0...).")
        return None
    towers = {sense: _tower(sense, tensors, given[sense], problems) if sense in present else None for sense in SENSES}
    heads = [f"modality_heads.{sense}.{HEADS[sense][1]}.weight" for sense in present]
    widths = {tensors[key].shape[0] for key in heads if key in tensors and tensors[key].shape}
    if isinstance(arch.get("out_embed_dim"), int):
        widths.add(arch["out_embed_dim"])
    if len(widths) != 1:
        problems.append("imagebind: the heads, and out_embed_dim if --arch gives it, must have one width, got "
                        f"{sorted(widths)}.")
        return None
    if any(towers[sense] is None for sense in present):
        return None
    return ImageBindConfig(**towers, out=widths.pop())


def _read_arch(arch: Mapping[str, Any], problems: Problems) -> dict[str, dict[str, Any]]:
    """Returns the values of --arch by tower and field; adds a problem for each invalid one."""
    given: dict[str, dict[str, Any]] = {sense: {} for sense in SENSES}
    known = {name for fields in ARCH.values() for name in fields} | {"kernel_size", "out_embed_dim"}
    for name, value in arch.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            problems.append(f"--arch: imagebind: unknown {name!r}; "
                            + (f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}."))
        elif name == "kernel_size":
            if not isinstance(value, list) or len(value) != 3 or value[1] != value[2]:
                problems.append(f"--arch: imagebind.kernel_size is {value!r}, expected [frames, patch, patch].")
            else:
                given["vision"] |= {"frames": value[0], "patch": value[1]}
        elif name.endswith("drop_path"):
            if not isinstance(value, int | float) or not 0 <= value < 1:
                problems.append(f"--arch: imagebind.{name} is {value!r}, expected a probability below 1.")
            else:
                given[name.removesuffix("_drop_path")]["drop_path"] = float(value)
        elif not isinstance(value, int) or value <= 0:
            problems.append(f"--arch: imagebind.{name} is {value!r}, expected a whole number above 0.")
        else:
            for sense in SENSES:
                if name in ARCH[sense]:
                    given[sense][ARCH[sense][name]] = value
    for sense in ("depth", "thermal"):
        if "height" in given[sense]:
            given[sense]["width"] = given[sense]["height"]
    return given


def _tower(sense: str, tensors: Mapping[str, LazyTensor], given: Mapping[str, Any],
           problems: Problems) -> TowerConfig | None:
    cls, released = CLASSES[sense], getattr(IMAGEBIND_HUGE, sense)
    found, assumed, positions = _sizes(sense, tensors)
    known = dataclasses.asdict(released) if found.get("dim") == released.dim else {}
    problems.extend(f"--arch: imagebind: {sense} {name} is {given[name]}, but in the tensors it is {found[name]}."
                    for name in found.keys() & given.keys() if found[name] != given[name])
    values = {**known, **assumed, **found, **given}
    names = [field.name for field in dataclasses.fields(cls) if field.name not in ("drop_path", "head_dropout")]
    absent = [name for name in names if name not in values]
    if absent:
        arch_names = {field: name for name, field in ARCH[sense].items()}
        example = json.dumps({"imagebind": {arch_names.get(name, name): "..." for name in absent}})
        problems.append(f"imagebind: the {sense} tower's sizes are not those of a released model, and the tensors do "
                        f"not determine {', '.join(absent)}. If it is the right file, set them: --arch FILE with "
                        f"{example}.")
        return None
    cfg = cls(**values)
    if cfg.dim % cfg.heads:
        problems.append(f"imagebind: {cfg.heads} heads do not divide the {sense} tower's width {cfg.dim}.")
        return None
    if positions and cfg.num_positions != positions:
        problems.append(f"imagebind: the {sense} tower's position table has {positions} rows, but inputs of shape "
                        f"{list(cfg.input_shape)} have {cfg.num_positions} tokens. Give their size with --arch.")
        return None
    return cfg


def _sizes(sense: str, tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, int], dict[str, Any], int | None]:
    """Returns (sizes that a tower's tensors determine, sizes assumed from them, rows of its position table)."""
    sizes = {f"modality_preprocessors.{sense}.{key}": names for key, names in SIZES[sense].items()}
    found = sizes_from_shapes(tensors, sizes, rf"modality_trunks\.{sense}\.blocks\.(\d+)\.")
    if "flat_window" in found:
        found |= {"channels": CHANNELS, "window": found.pop("flat_window") // CHANNELS}
    positions = found.pop("positions", None)
    assumed: dict[str, Any] = {"head_dropout": HEAD_DROPOUT} if sense == "imu" else {}
    if positions and "window" in found:
        assumed["steps"] = (positions - 1) * found["window"]
    elif positions and "patch" in found:  # a square image in adjacent patches, which audio is not
        side = math.isqrt(positions - 1) * found["patch"]
        squares = {"height": side, "width": side, "stride": found["patch"]}
        assumed |= {"vision": {"image_size": side}, "audio": {}}.get(sense, squares)
    return found, assumed, positions
