"""ImageBind-LLM: features of six senses, injected into LLaMA's layers with gates that start at zero (Han et al. 2023).

B rows   T tokens   P = 1 prompt a layer   A injected layers   L layers   E ImageBind's space   D language model

    T_I = bind(mix of imagebind(media))
    released form:  prompts of layer l = T_I + query[l], read by attention with a gate per head, in the last A layers
    token form:     gate · T_I added to every token at the input of every layer (the paper's formula)

`LlamaConfig.injection` selects the form. Mirrors imagebind_LLM/llama/llama_adapter.py.
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
from mmjax.convert import imagebind as imagebind_source
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
from mmjax.models import bind, imagebind, llama
from mmjax.models.bind import BIND_7B, Bind, BindConfig, mix
from mmjax.models.imagebind import IMAGEBIND_HUGE, ImageBind, ImageBindConfig
from mmjax.models.layers import in_float32
from mmjax.models.llama import LLAMA_7B, LlamaConfig
from mmjax.models.senses import SENSES, sense_of
from mmjax.trees import prefixed

LORA_RANK = 16


@dataclasses.dataclass(frozen=True)
class ImageBindLLMConfig(FamilyConfig):
    imagebind: ImageBindConfig = IMAGEBIND_HUGE
    bind: BindConfig = BIND_7B
    llm: LlamaConfig = dataclasses.replace(LLAMA_7B, injection="head")
    query_layers: int = 32  # the last layers, which read prompts; unused in the token form, which uses every layer

    injects = True

    @property
    def images(self) -> ImageSpec | None:
        return ImageSpec(self.imagebind.vision.image_size, "center_crop") if self.imagebind.vision else None

    @property
    def injected_layers(self) -> int | None:
        return self.query_layers if self.llm.injection == "head" else None

    @property
    def media(self) -> ImageBindConfig:
        return self.imagebind


PRESETS = {
    "imagebind-llm-7b": ImageBindLLMConfig(),
    "imagebind-llm-7b-token": ImageBindLLMConfig(llm=dataclasses.replace(LLAMA_7B, injection="layer")),
    "tiny": ImageBindLLMConfig(imagebind.TINY, bind.BindConfig(imagebind.TINY.out, llama.TINY.dim, 24),
                               dataclasses.replace(llama.TINY, injection="head"), query_layers=1),
}
AXES = (
    *prefixed("imagebind", imagebind.AXES),
    *prefixed("bind", bind.AXES),
    (r"query", ("layer", "prompt", "embed")),
)
PHASES = {
    "pretrain": (r"bind/.*", r"query|llm/(layers/)?(attn/)?gate"),
    "finetune": (r"llm/(layers/(attn|mlp)_)?norm/scale", r"llm/layers/.*/(b|lora_[ab])"),
}
TRAINED = PHASES["pretrain"]
ENCODER = {"imagebind": r"imagebind/.*"}


def with_phase(cfg: ImageBindLLMConfig, phase: str) -> ImageBindLLMConfig:
    """Returns the architecture that a phase trains: for "finetune" with LoRA on every matrix and biases on five."""
    if phase != "finetune" or cfg.llm.lora_rank:
        return cfg
    return dataclasses.replace(cfg, llm=source.adapted(cfg.llm, LORA_RANK))


class ImageBindLLM(LanguageModel):
    cfg: ImageBindLLMConfig

    def setup(self):
        super().setup()
        c = self.cfg
        self.imagebind = ImageBind(c.imagebind, self.dtype, self.kernels)
        self.bind = Bind(c.bind, self.dtype)
        if c.llm.injection == "head":
            self.query = self.param("query", nn.initializers.normal(1.0), (c.query_layers, 1, c.llm.dim))

    def feature(self, batch: Batch) -> jax.Array:
        """Returns the mix of a batch's senses, float32[B,E]; see `mmjax.models.bind.mix`."""
        if batch.features is not None:
            return batch.features.astype(jnp.float32)
        inputs = dict(batch.media or {})
        if batch.images is not None:
            image = self.cfg.images.normalise(batch.images[:, 0])
            if batch.image_valid is not None:
                image = jnp.where(batch.image_valid[:, :1, None, None], image, 0)
            inputs["image"] = image
        names = sorted(inputs)  # the rounding of the sum depends on its order
        features = [self.imagebind({sense_of(name): inputs[name]})[sense_of(name)] for name in names]
        return mix(features, [batch.weights[name][:, None] for name in names])

    def encode(self, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """A batch without images, media and features gets no injection."""
        if batch.features is None and batch.images is None and batch.media is None:
            return self.embed(batch.tokens), None
        bound = self.bind(self.feature(batch)[:, None])
        return self.embed(batch.tokens), self.inject(bound)

    def inject(self, bound: jax.Array) -> jax.Array:
        """Returns the injection, [B,1,D] -> [L,B,P,D], with zeros for the layers that read no prompts."""
        depth = self.cfg.llm.depth
        if self.cfg.llm.injection != "head":
            return jnp.broadcast_to(bound, (depth, *bound.shape))
        return for_every_layer(in_float32(jnp.add, bound, self.query[:, None]), depth)


def example(cfg: ImageBindLLMConfig) -> Batch:
    return example_batch(media=imagebind.example(cfg.imagebind), mixed=True)


STAGES = (
    *(stage for sense in SENSES for stage in (
        Stage(f"{sense}_tokens", f"imagebind/{sense}/stem", f"imagebind/{sense}/stem",
              f"image_bind.modality_preprocessors.{sense}"),
        Stage(f"{sense}_block_{{i}}", f"imagebind/{sense}/blocks",
              f"imagebind/{sense}/blocks [{{i}}] (block 0 also pre_norm)",
              f"image_bind.modality_trunks.{sense}.blocks.{{i}}"),
        Stage(f"{sense}_head", f"imagebind/{sense}/head", f"imagebind/{sense}/head",
              f"image_bind.modality_heads.{sense}"),
        Stage(f"{sense}_out", f"imagebind/{sense}", f"imagebind/{sense}/post",
              f"image_bind.modality_postprocessors.{sense}"))),
    Stage("mixed", "", "nothing: the weighted mean of the senses, each of length 1", "forward_visual"),
    Stage("bind_proj", "bind/proj", "bind/proj", "image_bind_proj"),
    Stage("bind_block_{i}", "bind/block_{i}", "bind/block_{i}",
          "image_bind_norm_{i}, image_bind_f1_{i}, f2_{i}, f3_{i}"),
    Stage("bind_out", "bind", "bind", "forward_visual"),
    *parts.LLM_STAGES,
)


def _write_imagebind(out: Path, tensors: Mapping[str, Any], context: ExportContext) -> None:
    save_flat(out, {**tensors, **imagebind_source.buffers(context.config.imagebind)}, context)


FAMILY = register(Family(
    name="imagebind_llm", Config=ImageBindLLMConfig, Model=ImageBindLLM, axes=AXES, presets=PRESETS, example=example,
    trained=TRAINED, phases=PHASES, with_phase=with_phase, encoder=ENCODER, prompt=PromptStyle(source.TEXT),
    conversion=Conversion(source.inspect_imagebind_llm, origins=(
        (r"imagebind/.*", "imagebind"), (r"bind/.*|query|llm/.*/(lora_[ab]|b|gate|new_gate)|llm/gate", "adapter"),
        (r"llm/.*", "llm"))),
    exports=parts.LLM_EXPORTS | {
        "adapter": Export(source.imagebind_llm_entries),
        "bind": Export(lambda cfg, replaced: imagebind_source.bind_entries(cfg.bind, article=True), save_flat,
                       exists=lambda cfg: not cfg.bind.legacy),
        "imagebind": Export(lambda cfg, replaced: imagebind_source.entries(cfg.imagebind), _write_imagebind)},
    replaces=source.NORM_PATHS, stages=STAGES))
