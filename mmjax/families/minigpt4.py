"""MiniGPT-4 and MiniGPT-v2: images become soft tokens in the text (Zhu et al. 2023; Chen et al. 2023).

B rows   T tokens   G lists of images   N images of a list   S image tokens   Q soft tokens an image   M = N·Q
D language model   E projector input

    feature = qformer(ln_vision(vit(images)))  [G,N,Q,E]
    soft = projector(feature)        x = embedded tokens, with soft tokens in their slots

Without a Q-Former (MiniGPT-4 on LLaMA-2, MiniGPT-v2) the class token is dropped and four neighbouring patches in raster
order are joined instead. Mirrors minigpt4/models/{minigpt_base,minigpt4,minigpt_v2}.py.
"""

import dataclasses

import jax

from mmjax.batch import Batch
from mmjax.convert import minigpt4 as source
from mmjax.convert import peft
from mmjax.families import parts
from mmjax.families.base import (
    Conversion,
    Export,
    Family,
    FamilyConfig,
    ImageSpec,
    PromptStyle,
    Stage,
    register,
    save_flat,
)
from mmjax.families.model import LanguageModel, example_batch, place_soft_tokens
from mmjax.models import eva_vit, llama, qformer
from mmjax.models.eva_vit import EVA_VIT_G, EVA_VIT_G_448, JOINED, EvaVit, VitConfig
from mmjax.models.layers import LayerNorm, Project
from mmjax.models.llama import LLAMA2_7B_CHAT, VICUNA_7B, VICUNA_13B, LlamaConfig
from mmjax.models.qformer import QFORMER_BASE, QFormer, QFormerConfig
from mmjax.trees import prefixed


@dataclasses.dataclass(frozen=True)
class MiniGPT4Config(FamilyConfig):
    vit: VitConfig = EVA_VIT_G
    qformer: QFormerConfig | None = QFORMER_BASE
    llm: LlamaConfig = VICUNA_7B

    @property
    def images(self) -> ImageSpec:
        tokens = self.qformer.queries if self.qformer else self.vit.grid**2 // JOINED
        return ImageSpec(self.vit.image_size, "stretch", tokens=tokens)

    @property
    def soft_width(self) -> int:
        """The size of the projector's input."""
        return self.qformer.dim if self.qformer else JOINED * self.vit.dim


_V2 = dataclasses.replace(LLAMA2_7B_CHAT, lora_rank=64, lora_alpha=16.0)
PRESETS = {
    "minigpt4-7b": MiniGPT4Config(),
    "minigpt4-13b": MiniGPT4Config(llm=VICUNA_13B),
    "minigpt4-llama2-7b": MiniGPT4Config(qformer=None, llm=LLAMA2_7B_CHAT),
    "minigpt-v2-7b": MiniGPT4Config(vit=EVA_VIT_G_448, qformer=None, llm=_V2),
    "tiny": MiniGPT4Config(eva_vit.TINY, qformer.TINY, llama.TINY),
}
AXES = (
    *prefixed("vit", eva_vit.AXES),
    (r"ln_vision/(scale|bias)", ("embed",)),
    *prefixed("qformer", qformer.AXES),
    (r"projector/w", ("image", "embed")),
    (r"projector/b", ("embed",)),
)
TRAINED = (r"projector/.*",)
ENCODER = {"vit": r"vit/.*", "qformer": r"(ln_vision|qformer)/.*"}


class MiniGPT4(LanguageModel):
    cfg: MiniGPT4Config

    def setup(self):
        super().setup()
        c = self.cfg
        self.vit = EvaVit(c.vit, self.dtype, self.remat not in (False, "none"), self.kernels)
        self.ln_vision = LayerNorm(eps=1e-5)
        if c.qformer:
            self.qformer = QFormer(c.qformer, self.dtype, self.kernels)
        self.projector = Project((c.soft_width, c.llm.dim), use_bias=True)

    def feature(self, batch: Batch) -> jax.Array:
        """Returns the projector's input for each image, [G,N,Q,E]."""
        if batch.features is not None:
            return batch.features.astype(self.dtype)
        G, N = batch.images.shape[:2]
        images = self.cfg.images.normalise(batch.images)
        tokens = self.ln_vision(self.vit(images.reshape(-1, *images.shape[2:])))
        if self.cfg.qformer:
            tokens = self.qformer(tokens)
        else:
            tokens = tokens[:, 1:]
        return tokens.reshape(G, N, self.cfg.image_tokens, self.cfg.soft_width)

    def soft_tokens(self, batch: Batch) -> jax.Array:
        """Returns the soft tokens of all images, [G,M,D]."""
        soft = self.projector("GNQE,ED->GNQD", self.feature(batch))
        return soft.reshape(len(soft), -1, self.cfg.llm.dim)

    def encode(self, batch: Batch) -> tuple[jax.Array, None]:
        x = self.embed(batch.tokens)
        if batch.images is not None or batch.features is not None:
            x = place_soft_tokens(x, self.soft_tokens(batch), batch.soft_index)
        return x, None


def example(cfg: MiniGPT4Config) -> Batch:
    return example_batch(cfg.image_size)


def resize(cfg: MiniGPT4Config, image_size: int | None, drop_path: float) -> MiniGPT4Config:
    """Returns the config for another image size. Raises ValueError for a size that the patches do not divide."""
    vit = dataclasses.replace(cfg.vit, image_size=image_size or cfg.vit.image_size, drop_path=drop_path)
    side = vit.patch if cfg.qformer else 2 * vit.patch  # four patches join without a Q-Former
    if vit.image_size <= 0 or vit.image_size % side:
        raise ValueError(f"image_size = {vit.image_size}: must be a multiple of {side}, the side of "
                         f"{'a patch' if cfg.qformer else 'two patches'}.")
    return dataclasses.replace(cfg, vit=vit)


STAGES = (
    Stage("vit_patches", "vit/patch", "vit/patch", "visual_encoder.patch_embed", flatten=(1, 3)),  # [N,h,w,D]
    Stage("vit_block_{i}", "vit/blocks", "vit/blocks [{i}] (block 0 also vit/cls and vit/pos)",
          "visual_encoder.blocks.{i} (pos_embed, cls_token)"),
    Stage("vit_out", "vit", "vit", "visual_encoder"),
    Stage("ln_vision_out", "ln_vision", "ln_vision", "ln_vision"),
    Stage("qformer_block_{i}", "qformer/layer_{i}", "qformer/layer_{i} (layer 0 also query_tokens and norm)",
          "Qformer.bert.encoder.layer.{i} (query_tokens)"),
    Stage("qformer_out", "qformer", "qformer", "Qformer.bert"),
    Stage("proj_out", "projector", "projector", "llama_proj", flatten=(0, 2)),  # [G,N,Q,D]
    *parts.LLM_STAGES,
)

FAMILY = register(Family(
    name="minigpt4", Config=MiniGPT4Config, Model=MiniGPT4, axes=AXES, presets=PRESETS, example=example,
    trained=TRAINED, resize=resize, encoder=ENCODER, prompt=PromptStyle(source.TEXT, "<Img><ImageHere></Img>"),
    conversion=Conversion(source.inspect, origins=(
        (r"vit/.*", "vit"), (r"(ln_vision|qformer)/.*", "qformer"), (r"projector/.*", "projector"),
        (r"llm/.*/lora_[ab]", "lora"), (r"llm/.*", "llm"))),
    exports=parts.LLM_EXPORTS | {
        "projector": Export(lambda cfg, replaced: [*source.projector_entries(cfg.soft_width, cfg.llm.dim),
                                                   *peft.entries(cfg.llm)]),
        "vit": Export(lambda cfg, replaced: source.vit_entries(cfg.vit), save_flat),
        "qformer": Export(lambda cfg, replaced: source.qformer_entries(cfg.qformer, cfg.vit.dim),
                          exists=lambda cfg: cfg.qformer is not None)},
    stages=STAGES))
