"""LLaMA-Adapter: learned prompts in the upper LLaMA layers, with gates that start at zero (Zhang et al. 2023),
and v2, which adds the features of an image to the prompts (Gao et al. 2023).

B rows   T tokens   P prompts a layer   A injected layers   L layers   D language model

    v1:  prompts of layer l = query[l]                                    v2:  ... + visual(clip(image))

Attention reads them in the last A layers, with a gate per head. The gates of the layers below exist, as in the files,
and get gradients of zero. Mirrors alpaca_finetuning_v1/llama/model.py and
llama_adapter_v2_multimodal7b/llama/llama_adapter.py.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.batch import Batch
from mmjax.convert import adapter as source
from mmjax.convert import llama_adapter as clip_source
from mmjax.convert import torch_file
from mmjax.families import parts
from mmjax.families.base import (
    Conversion,
    Export,
    ExportContext,
    Family,
    FamilyConfig,
    ImageSpec,
    PromptStyle,
    Stage,
    register,
    save_flat,
)
from mmjax.families.model import LanguageModel, example_batch, for_every_layer
from mmjax.models import clip, llama, visual
from mmjax.models.clip import CLIP_VIT_L14, Clip, ClipConfig
from mmjax.models.layers import in_float32
from mmjax.models.llama import LLAMA_7B, LlamaConfig
from mmjax.models.visual import VISUAL_7B, VisualConfig, VisualQuery
from mmjax.trees import prefixed


@dataclasses.dataclass(frozen=True)
class LlamaAdapterConfig(FamilyConfig):
    """The config of v1 (neither `clip` nor `visual`) or v2 (both). Raises ValueError if only one is given."""

    llm: LlamaConfig = dataclasses.replace(LLAMA_7B, injection="head")
    query_layers: int = 30  # the last layers, which read prompts
    query_len: int = 10
    clip: ClipConfig | None = None
    visual: VisualConfig | None = None

    injects = True

    def __post_init__(self):
        if (self.clip is None) != (self.visual is None):
            raise ValueError("LLaMA-Adapter v2 has both `clip` and `visual`, v1 has neither; "
                             f"only {'clip' if self.clip else 'visual'} is given.")

    @property
    def injected_layers(self) -> int:
        return self.query_layers

    @property
    def images(self) -> ImageSpec | None:
        """The original reads images with OpenCV and does not reorder the channels: blue is normalised with red's
        mean and deviation and multiplied by red's weights."""
        return ImageSpec(self.clip.image_size, "center_crop", reverse=True) if self.clip else None


PRESETS = {
    "llama-adapter-7b": LlamaAdapterConfig(),
    "llama-adapter-v2-7b": LlamaAdapterConfig(query_layers=31, clip=CLIP_VIT_L14, visual=VISUAL_7B),
    "tiny": LlamaAdapterConfig(dataclasses.replace(llama.TINY, injection="head"), query_layers=1, query_len=3,
                               clip=clip.TINY, visual=visual.TINY),
}
AXES = (
    *prefixed("clip", clip.AXES),
    *prefixed("visual", visual.AXES),
    (r"query", ("layer", "prompt", "embed")),
)
PHASES = {
    "pretrain": (r"visual/.*|query|llm/layers/attn/(new_)?gate",),  # all of v1's training
    "finetune": (r"llm/(layers/(attn|mlp)_)?norm/scale", r"llm/layers/.*/b"),  # v2's; its LoRA is never trained
}
TRAINED = PHASES["pretrain"]
ENCODER = {"clip": r"clip/.*"}


def with_phase(cfg: LlamaAdapterConfig, phase: str) -> LlamaAdapterConfig:
    """Returns the architecture that a phase trains: for "finetune" with biases on five matrices, initialized to zero.

    Raises ValueError for "finetune" of v1, which has one phase.
    """
    if phase != "finetune" or cfg.llm.bias_on:
        return cfg
    if cfg.visual is None:
        raise ValueError('LLaMA-Adapter v1 has one phase, "pretrain": it trains the prompts and their gates.')
    return dataclasses.replace(
        cfg, llm=dataclasses.replace(cfg.llm, bias_on=("q", "o", "gate", "up", "down")))


class LlamaAdapter(LanguageModel):
    cfg: LlamaAdapterConfig

    def setup(self):
        super().setup()
        c = self.cfg
        if c.visual:
            self.clip = Clip(c.clip, self.dtype, self.kernels)
            self.visual = VisualQuery(c.visual, c.query_len, c.llm.dim, self.dtype, self.kernels)
        self.query = self.param("query", nn.initializers.normal(1.0), (c.query_layers, c.query_len, c.llm.dim))

    def feature(self, batch: Batch) -> jax.Array:
        """Returns CLIP's features of each row's image, [B,S,E]; for v2.

        A batch without images uses images of zeros, as in the original. Raises ValueError for more than one per row.
        """
        if batch.features is not None:
            return batch.features.astype(self.dtype)
        size = self.cfg.clip.image_size
        images = jnp.zeros((len(batch.tokens), 1, 3, size, size)) if batch.images is None else batch.images
        if images.shape[1] != 1:
            raise ValueError(f"LLaMA-Adapter v2 reads one image per row, got {images.shape[1]}.")
        return self.clip(self.cfg.images.normalise(images)[:, 0])

    def visual_query(self, batch: Batch) -> jax.Array:
        """Returns the vectors that v2 adds to the prompts of every injected layer, [B,P,D]."""
        return self.visual(self.feature(batch))

    def encode(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        c = self.cfg
        B = len(batch.tokens)
        added = self.visual_query(batch) if c.visual else jnp.zeros((B, c.query_len, c.llm.dim), self.dtype)
        prompts = in_float32(jnp.add, added, self.query[:, None])
        return self.embed(batch.tokens), for_every_layer(prompts, c.llm.depth)


def example(cfg: LlamaAdapterConfig) -> Batch:
    return example_batch(cfg.image_size)


STAGES = (
    Stage("clip_block_{i}", "clip/blocks", "clip/blocks [{i}] (block 0 also clip/patch, cls, pos, pre_norm)",
          "clip.visual.transformer.resblocks.{i}"),
    Stage("clip_out", "clip", "clip/post_norm, clip/out", "clip.visual.ln_post, clip.visual.proj"),
    Stage("visual_block_{i}", "visual/blocks", "visual/blocks [{i}] (block 0 also visual/proj and visual/query)",
          "visual_blocks.{i} (clip_proj, visual_query)"),
    Stage("visual_out", "visual", "visual/out, visual/out_norm", "visual_proj, visual_proj_norm"),
    *parts.LLM_STAGES,
)


def _write_adapter(out: Path, tensors: Mapping[str, Any], context: ExportContext) -> None:
    """Writes v2's tensors with the "config" that its project reads first, and v1's tensors and safetensors alone."""
    if context.config.visual is None or context.safetensors:
        return save_flat(out, tensors, context)
    llm = context.config.llm
    lora = {"w_lora": True, "lora_rank": llm.lora_rank} if llm.lora_rank else {"w_lora": False}
    torch_file.save(out, {"model": tensors, "config": {"w_bias": bool(llm.bias_on), **lora}})


FAMILY = register(Family(
    name="llama_adapter", Config=LlamaAdapterConfig, Model=LlamaAdapter, axes=AXES, presets=PRESETS, example=example,
    trained=TRAINED, phases=PHASES, with_phase=with_phase, encoder=ENCODER, prompt=PromptStyle(source.TEXT),
    conversion=Conversion(source.inspect_llama_adapter, origins=(
        (r"clip/.*", "clip"), (r"visual/.*|query|llm/.*/(lora_[ab]|b|gate|new_gate)|llm/gate", "adapter"),
        (r"llm/.*", "llm"))),
    exports=parts.LLM_EXPORTS | {
        "adapter": Export(source.llama_adapter_entries, _write_adapter),
        "clip": Export(lambda cfg, replaced: clip_source.clip_entries(cfg.clip), save_flat,
                       exists=lambda cfg: cfg.clip is not None)},
    replaces=source.NORM_PATHS, stages=STAGES))
