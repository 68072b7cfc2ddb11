"""Conversion of LLaMA-Adapter v2's encoder: CLIP's image tower, and the visual query network of an adapter file.

CLIP:   C colours   P, Q patch sides   A positions   S q, k and v   D model   F feed-forward   N heads   H head
        E the shared space
Visual: A queries   E CLIP's space   O language model   the rest as above

Facts: clip/model.py, llama_adapter_v2_multimodal7b/llama/llama_adapter.py, timm's vision_transformer.py. The other
tensors of adapter files (queries, gates, LoRA, biases, norms) are in `mmjax.convert.adapter`.
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

# Tensors whose shapes give sizes; "" is an axis that is not used.
CLIP_SIZES = {"visual.conv1.weight": ("dim", "", "patch", ""), "visual.positional_embedding": ("positions", ""),
              "visual.transformer.resblocks.0.mlp.c_fc.weight": ("hidden", ""), "visual.proj": ("", "out")}
VISUAL_SIZES = {"clip_proj.weight": ("dim", ""), "visual_blocks.0.mlp.fc1.weight": ("hidden", "")}
# Sizes that no shape gives: CLIP's loader assumes heads of 64, and v2's code sets its number of heads.
CLIP_HEAD, CLIP_RATIO = 64, 4
REAL_VISUAL_HEADS = {768: 16}

# --arch, part "adapter_v2": its names -> fields of the configs.
ARCH = {
    "clip": {"clip_img": "image_size", "clip_patch": "patch", "clip_width": "dim", "clip_layers": "depth",
             "clip_heads": "heads", "clip_out": "out"},
    "visual": {"v_embed_dim": "dim", "v_depth": "depth", "v_num_heads": "heads", "v_mlp_ratio": "hidden"},
}
LLAMA_ARCH = ("query_len", "query_layer", "lora_rank")  # in the same part, of the language model


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
    """Returns the values of --arch's part "adapter_v2" by network and field; adds a problem for each invalid one."""
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


def clip_config(tensors: Mapping[str, LazyTensor], given: Mapping[str, int], problems: Problems) -> ClipConfig | None:
    """Returns the config of CLIP's image tower: from its tensors, `given` by --arch, or its loader's rule for heads."""
    found = sizes_from_shapes(tensors, CLIP_SIZES, r"visual\.transformer\.resblocks\.(\d+)\.")
    positions = found.pop("positions", None)
    if positions and "patch" in found:  # if not a square, the table's line reports the wrong shape
        found["image_size"] = math.isqrt(max(positions - 1, 0)) * found["patch"]
    known = {}
    if dim := found.get("dim", given.get("dim")):
        known = {"hidden": CLIP_RATIO * dim} | ({} if dim % CLIP_HEAD else {"heads": dim // CLIP_HEAD})
    return _config(ClipConfig, "clip", found, known, given, problems)


def visual_config(tensors: Mapping[str, LazyTensor], given: Mapping[str, float],
                  problems: Problems) -> VisualConfig | None:
    """Returns the config of the visual query network: from its tensors, `given` by --arch, or the released sizes."""
    found = sizes_from_shapes(tensors, VISUAL_SIZES, r"visual_blocks\.(\d+)\.")
    known = {"heads": REAL_VISUAL_HEADS[found["dim"]]} if found.get("dim") in REAL_VISUAL_HEADS else {}
    given = dict(given)
    if "hidden" in given:  # a ratio
        ratio, dim = given.pop("hidden"), found.get("dim", given.get("dim"))
        given |= {"hidden": int(ratio * dim)} if dim else {}
    return _config(VisualConfig, "visual", found, known, given, problems)


def _config(cls, part: str, found: Mapping[str, int], known: Mapping[str, int], given: Mapping[str, int],
            problems: Problems):
    arch_names = {ours: name for name, ours in ARCH[part].items()}
    problems.extend(f"--arch: adapter_v2: {arch_names[name]} makes {name} {given[name]}, but in the tensors it is "
                    f"{found[name]}."
                    for name in found.keys() & given.keys() if found[name] != given[name])
    values = {**known, **found, **given}
    absent = [name for name in cls.__dataclass_fields__ if name not in values]
    if absent:
        names = [arch_names[name] for name in absent if name in arch_names]
        example = json.dumps({"adapter_v2": {name: "..." for name in names}})
        problems.append(f"{part}: the sizes are not those of a released model, and the tensors do not determine "
                        f"{', '.join(absent)}. If it is the right file, set them: --arch FILE with {example}.")
        return None
    cfg = cls(**values)
    if cfg.dim % cfg.heads:
        problems.append(f"{part}: {cfg.heads} heads do not divide the width {cfg.dim}.")
        return None
    return cfg
