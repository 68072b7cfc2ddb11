"""LLaMA-Adapter v2's image side: CLIP's tower, and the visual query network of an adapter file.

CLIP:   C colours   P, Q patch sides   A places   S q, k and v   D model   F feed-forward   N heads   H head
        E the shared space
Visual: A queries   E CLIP's space   O language model   the rest as above

Facts: clip/model.py, llama_adapter_v2_multimodal7b/llama/llama_adapter.py, timm's vision_transformer.py. What the
adapter files hold beside this (queries, gates, LoRA, biases, norms) belongs to the language model's tables.
"""

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any

from mmjax.convert.lazy import LazyTensor
from mmjax.convert.tables import Entry, Problems, block_table, expand, sizes_from_shapes
from mmjax.models.clip import ClipConfig
from mmjax.models.visual import VisualConfig

CLIP = (
    ("visual.conv1.weight", "clip/patch/w", "D C P Q -> C P Q D"),
    ("visual.class_embedding", "clip/cls", "D -> D"),
    ("visual.positional_embedding", "clip/pos", "A D -> A D"),
    ("visual.ln_pre.weight", "clip/pre_norm/scale", "D -> D"),
    ("visual.ln_pre.bias", "clip/pre_norm/bias", "D -> D"),
    *block_table("visual.transformer.resblocks", "clip/blocks", norm="ln_", qkv="attn.in_proj_", o="attn.out_proj",
                 fc1="mlp.c_fc", fc2="mlp.c_proj"),
    ("visual.ln_post.weight", "clip/post_norm/scale", "D -> D"),
    ("visual.ln_post.bias", "clip/post_norm/bias", "D -> D"),
    ("visual.proj", "clip/out/w", "D E -> D E"),
)
CLIP_IGNORED = (
    (r"(transformer|token_embedding|ln_final)\..*|positional_embedding|text_projection", "the text tower"),
    (r"logit_scale", "the factor of CLIP's own loss"),
    (r"input_resolution|context_length|vocab_size", "sizes, which the tensors show as well"),
)
VISUAL = (
    ("clip_proj.weight", "visual/proj/w", "D E -> E D"),
    ("clip_proj.bias", "visual/proj/b", "D -> D"),
    ("clip_proj_norm.weight", "visual/proj_norm/scale", "D -> D"),
    ("clip_proj_norm.bias", "visual/proj_norm/bias", "D -> D"),
    ("visual_query.weight", "visual/query", "A D -> A D"),
    *block_table("visual_blocks", "visual/blocks"),
    ("visual_proj.weight", "visual/out/w", "O D -> D O"),
    ("visual_proj.bias", "visual/out/b", "O -> O"),
    ("visual_proj_norm.weight", "visual/out_norm/scale", "O -> O"),
    ("visual_proj_norm.bias", "visual/out_norm/bias", "O -> O"),
)
VISUAL_IGNORED = ((r"clip\..*", "the frozen CLIP, which has a file of its own"),)

# Where sizes show; "" is an axis that says nothing new.
CLIP_SIZES = {"visual.conv1.weight": ("dim", "", "patch", ""), "visual.positional_embedding": ("places", ""),
              "visual.transformer.resblocks.0.mlp.c_fc.weight": ("hidden", ""), "visual.proj": ("", "out")}
VISUAL_SIZES = {"clip_proj.weight": ("dim", ""), "visual_blocks.0.mlp.fc1.weight": ("hidden", "")}
# What shapes do not tell: CLIP's own loader takes heads of 64, and v2 has its heads in its code.
CLIP_HEAD, CLIP_RATIO = 64, 4
REAL_VISUAL_HEADS = {768: 16}

# --arch, part "adapter_v2": its names -> ours.
ARCH = {
    "clip": {"clip_img": "image_size", "clip_patch": "patch", "clip_width": "dim", "clip_layers": "depth",
             "clip_heads": "heads", "clip_out": "out"},
    "visual": {"v_embed_dim": "dim", "v_depth": "depth", "v_num_heads": "heads", "v_mlp_ratio": "hidden"},
}
LLAMA_ARCH = ("query_len", "query_layer", "lora_rank")  # in the same part, of the language model's side


def clip_entries(cfg: ClipConfig) -> list[Entry]:
    sizes = {"C": 3, "P": cfg.patch, "Q": cfg.patch, "A": 1 + cfg.grid**2, "S": 3, "D": cfg.dim, "F": cfg.hidden,
             "N": cfg.heads, "H": cfg.dim // cfg.heads, "E": cfg.out}
    return expand(CLIP, sizes, {"L": range(cfg.depth)})


def visual_entries(cfg: VisualConfig, queries: int, inputs: int, outputs: int) -> list[Entry]:
    """queries: of a layer   inputs: width of CLIP's features   outputs: of the language model"""
    sizes = {"A": queries, "S": 3, "D": cfg.dim, "F": cfg.hidden, "N": cfg.heads, "H": cfg.dim // cfg.heads,
             "E": inputs, "O": outputs}
    return expand(VISUAL, sizes, {"L": range(cfg.depth)})


def read_arch(arch: Mapping[str, Any], problems: Problems) -> dict[str, dict[str, int]]:
    """What --arch's part "adapter_v2" says of both networks, by our names; all of its names are checked."""
    found: dict[str, dict[str, int]] = {part: {} for part in ARCH}
    known = [*ARCH["clip"], *ARCH["visual"], *LLAMA_ARCH]
    for name, value in arch.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            problems.append(f"--arch: adapter_v2: unknown {name!r}; "
                            + (f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}."))
        elif not isinstance(value, int | float if name == "v_mlp_ratio" else int) or value <= 0:
            wanted = "a number" if name == "v_mlp_ratio" else "a whole number"
            problems.append(f"--arch: adapter_v2.{name} is {value!r}, expected {wanted} above 0.")
        else:
            for part, names in ARCH.items():
                if name in names:
                    found[part][names[name]] = value
    return found


def clip_config(tensors: Mapping[str, LazyTensor], told: Mapping[str, int], problems: Problems) -> ClipConfig | None:
    """Sizes of CLIP's image tower: from its tensors, `told`, or its loader's rule for heads."""
    found = sizes_from_shapes(tensors, CLIP_SIZES, r"visual\.transformer\.resblocks\.(\d+)\.")
    places = found.pop("places", None)
    if places and "patch" in found:  # not a square: a wrong shape, which the line of the positions reports
        found["image_size"] = math.isqrt(max(places - 1, 0)) * found["patch"]
    known = {}
    if dim := found.get("dim", told.get("dim")):
        known = {"hidden": CLIP_RATIO * dim} | ({} if dim % CLIP_HEAD else {"heads": dim // CLIP_HEAD})
    return _config(ClipConfig, "clip", found, known, told, problems)


def visual_config(tensors: Mapping[str, LazyTensor], told: Mapping[str, float],
                  problems: Problems) -> VisualConfig | None:
    """Sizes of the visual query network: from its tensors, `told`, or the released model's width."""
    found = sizes_from_shapes(tensors, VISUAL_SIZES, r"visual_blocks\.(\d+)\.")
    known = {"heads": REAL_VISUAL_HEADS[found["dim"]]} if found.get("dim") in REAL_VISUAL_HEADS else {}
    told = dict(told)
    if "hidden" in told:  # a ratio
        ratio, dim = told.pop("hidden"), found.get("dim", told.get("dim"))
        told |= {"hidden": int(ratio * dim)} if dim else {}
    return _config(VisualConfig, "visual", found, known, told, problems)


def _config(cls, part: str, found: Mapping[str, int], known: Mapping[str, int], told: Mapping[str, int],
            problems: Problems):
    theirs = {ours: name for name, ours in ARCH[part].items()}
    problems.extend(f"--arch: adapter_v2: {theirs[name]} makes {name} {told[name]}, but the tensors say {found[name]}."
                    for name in found.keys() & told.keys() if found[name] != told[name])
    values = {**known, **found, **told}
    absent = [name for name in cls.__dataclass_fields__ if name not in values]
    if absent:
        names = [theirs[name] for name in absent if name in theirs]
        example = json.dumps({"adapter_v2": {name: "..." for name in names}})
        problems.append(f"{part}: the sizes are not a released model's, and the tensors do not show "
                        f"{', '.join(absent)}. If it is the right file, give them: --arch FILE with {example}.")
        return None
    cfg = cls(**values)
    if cfg.dim % cfg.heads:
        problems.append(f"{part}: {cfg.heads} heads do not divide the width {cfg.dim}.")
        return None
    return cfg
