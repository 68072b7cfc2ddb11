"""MiniGPT-4 and MiniGPT-v2: pictures become soft tokens among the words (Zhu et al. 2023; Chen et al. 2023).

B rows   T tokens   F pictures a row   S picture tokens   Q soft tokens a picture   M = F·Q soft tokens a row
D language model   E projector input

    feature = qformer(ln_vision(vit(images)))  [B,F,Q,E]
    soft = projector(feature)        x = words, with soft tokens at the marked places

Without Q-Former (MiniGPT-4 on LLaMA-2, MiniGPT-v2) the class token is dropped and four neighbouring patches in raster
order are joined instead. Mirrors minigpt4/models/{minigpt_base,minigpt4,minigpt_v2}.py.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mmjax.batch import Batch
from mmjax.families.base import LanguageModel, example_batch
from mmjax.models import eva_vit, llama, qformer
from mmjax.models.eva_vit import EVA_VIT_G, EVA_VIT_G_448, EvaVit, VitConfig
from mmjax.models.layers import LayerNorm, Project
from mmjax.models.llama import LLAMA2_7B_CHAT, VICUNA_7B, VICUNA_13B, LlamaConfig
from mmjax.models.pixels import normalise
from mmjax.models.qformer import QFORMER_BASE, QFormer, QFormerConfig
from mmjax.trees import prefixed

JOINED = 4  # patches that become one soft token where there is no Q-Former


@dataclasses.dataclass(frozen=True)
class Config:
    vit: VitConfig = EVA_VIT_G
    qformer: QFormerConfig | None = QFORMER_BASE
    llama: LlamaConfig = VICUNA_7B

    senses = ()
    crops = False  # pictures are squashed into a square
    normalise = staticmethod(normalise)

    @property
    def image_size(self) -> int:
        return self.vit.image_size

    @property
    def image_tokens(self) -> int:
        """Soft tokens a picture becomes."""
        return self.qformer.queries if self.qformer else self.vit.grid**2 // JOINED

    @property
    def soft_width(self) -> int:
        """What the projector reads."""
        return self.qformer.dim if self.qformer else JOINED * self.vit.dim


_V2 = dataclasses.replace(LLAMA2_7B_CHAT, lora_rank=64, lora_alpha=16.0)
PRESETS = {
    "minigpt4-7b": Config(),
    "minigpt4-13b": Config(llama=VICUNA_13B),
    "minigpt4-llama2-7b": Config(qformer=None, llama=LLAMA2_7B_CHAT),
    "minigpt-v2-7b": Config(vit=EVA_VIT_G_448, qformer=None, llama=_V2),
    "tiny": Config(eva_vit.TINY, qformer.TINY, llama.TINY),
}
AXES = (
    *prefixed("vit", eva_vit.AXES),
    (r"ln_vision/(scale|bias)", ("embed",)),
    *prefixed("qformer", qformer.AXES),
    (r"projector/w", ("picture", "embed")),
    (r"projector/b", ("embed",)),
    *prefixed("llama", llama.AXES),
)
TRAINED = (r"projector/.*",)
PHASES: dict[str, tuple[str, ...]] = {}  # its stages differ in their data alone
ENCODER = {"vit": r"vit/.*", "qformer": r"(ln_vision|qformer)/.*"}


def place(words: jax.Array, soft: jax.Array, soft_index: jax.Array) -> jax.Array:
    """words [B,T,D], soft [B,M,D] -> [B,T,D]: the row's soft token number `soft_index` [B,T] wherever that is >= 0."""
    chosen = jnp.take_along_axis(soft, jnp.maximum(soft_index, 0)[..., None], axis=1)
    return jnp.where(soft_index[..., None] >= 0, chosen, words)


class Model(LanguageModel):
    cfg: Config

    def setup(self):
        super().setup()
        c = self.cfg
        self.vit = EvaVit(c.vit, self.dtype, self.remat)
        self.ln_vision = LayerNorm(eps=1e-5)
        if c.qformer:
            self.qformer = QFormer(c.qformer, self.dtype)
        self.projector = Project((c.soft_width, c.llama.dim), use_bias=True)

    def feature(self, batch: Batch) -> jax.Array:
        """What the projector reads of each picture, [B,F,Q,E]."""
        if batch.media is not None:
            return batch.media["feature"].astype(self.dtype)
        B, F = batch.images.shape[:2]
        images = normalise(batch.images)
        tokens = self.ln_vision(self.vit(images.reshape(-1, *images.shape[2:])))
        if self.cfg.qformer:
            tokens = self.qformer(tokens)
        else:
            tokens = tokens[:, 1:]
        return tokens.reshape(B, F, self.cfg.image_tokens, self.cfg.soft_width)

    def soft_tokens(self, batch: Batch) -> jax.Array:
        """Of all the batch's pictures, [B,M,D]."""
        soft = self.projector("BFQE,ED->BFQD", self.feature(batch))
        return soft.reshape(len(soft), -1, self.cfg.llama.dim)

    def encode(self, batch: Batch) -> tuple[jax.Array, None]:
        words = self.embed(batch.tokens)
        if batch.images is not None or batch.media is not None:
            words = place(words, self.soft_tokens(batch), batch.soft_index)
        return words, None


def example(cfg: Config) -> Batch:
    return example_batch(cfg.image_size)
