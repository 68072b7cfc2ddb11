"""LLaMA-Adapter: learned prompts in the upper LLaMA layers, behind gates that start closed (Zhang et al. 2023), and
v2, where a picture moves the prompts (Gao et al. 2023).

B rows   T tokens   P prompts a layer   A injected layers   L layers   D language model

    v1:  prompts of layer l = query[l]                                    v2:  ... + visual(clip(picture))

Attention reads them on the last A layers, through a gate a head. The gates of the layers below exist, as in the files,
and get gradients of zero. Mirrors alpaca_finetuning_v1/llama/model.py and
llama_adapter_v2_multimodal7b/llama/llama_adapter.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mmjax.batch import Batch
from mmjax.families.base import LanguageModel, example_batch, for_every_layer
from mmjax.models import clip, llama, pixels, visual
from mmjax.models.clip import CLIP_VIT_L14, Clip, ClipConfig
from mmjax.models.llama import LLAMA_7B, LlamaConfig
from mmjax.models.visual import VISUAL_7B, VisualConfig, VisualQuery
from mmjax.trees import prefixed


def normalise(images: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """uint8[...,H,W,3] -> float32[...,3,H,W] as v2 was trained; normalised pictures pass unchanged.

    The original reads pictures by OpenCV and leaves its order of colours, so blue passes as red: it is normalised by
    red's mean and deviation and meets red's weights. What is given here is RGB; already normalised pictures are taken
    to be in the original's order.
    """
    return pixels.normalise(images[..., ::-1] if images.dtype == np.uint8 else images)


@dataclasses.dataclass(frozen=True)
class Config:
    """v1 has neither `clip` nor `visual`, v2 has both; anything between raises ValueError."""

    llama: LlamaConfig = dataclasses.replace(LLAMA_7B, injection="head")
    query_layers: int = 30  # the last layers, which read prompts
    query_len: int = 10
    clip: ClipConfig | None = None
    visual: VisualConfig | None = None

    image_tokens = 0  # pictures take no places among the words
    senses = ()
    crops = True  # pictures keep their aspect ratio, a part is cut out
    normalise = staticmethod(normalise)

    def __post_init__(self):
        if (self.clip is None) != (self.visual is None):
            raise ValueError("LLaMA-Adapter v2 has both `clip` and `visual`, v1 has neither; "
                             f"only {'clip' if self.clip else 'visual'} is given.")

    @property
    def image_size(self) -> int | None:
        return self.clip.image_size if self.clip else None


PRESETS = {
    "llama-adapter-7b": Config(),
    "llama-adapter-v2-7b": Config(query_layers=31, clip=CLIP_VIT_L14, visual=VISUAL_7B),
    "tiny": Config(dataclasses.replace(llama.TINY, injection="head"), query_layers=1, query_len=3,
                   clip=clip.TINY, visual=visual.TINY),
}
AXES = (
    *prefixed("clip", clip.AXES),
    *prefixed("visual", visual.AXES),
    (r"query", ("layer", "prompt", "embed")),
    *prefixed("llama", llama.AXES),
)
PHASES = {
    "pretrain": (r"visual/.*|query|llama/layers/attn/(new_)?gate",),  # all of v1's training
    "finetune": (r"llama/(layers/(attn|mlp)_)?norm/scale", r"llama/layers/.*/b"),  # v2's; its LoRA is never trained
}
TRAINED = PHASES["pretrain"]
ENCODER = {"clip": r"clip/.*"}


def with_phase(cfg: Config, phase: str) -> Config:
    """The architecture that a phase trains: for "finetune" biases on five matrices, from zero.

    Raises ValueError for "finetune" of v1, which has one phase.
    """
    if phase != "finetune" or cfg.llama.bias_on:
        return cfg
    if cfg.visual is None:
        raise ValueError('LLaMA-Adapter v1 has one phase, "pretrain": it trains the prompts and their gates.')
    return dataclasses.replace(
        cfg, llama=dataclasses.replace(cfg.llama, bias_on=("q", "o", "gate", "up", "down")))


class Model(LanguageModel):
    cfg: Config

    def setup(self):
        super().setup()
        c = self.cfg
        if c.visual:
            self.clip = Clip(c.clip, self.dtype)
            self.visual = VisualQuery(c.visual, c.query_len, c.llama.dim, self.dtype)
        self.query = self.param("query", nn.initializers.normal(1.0), (c.query_layers, c.query_len, c.llama.dim))

    def feature(self, batch: Batch) -> jax.Array:
        """What CLIP sees in each row's picture, [B,S,E]; of v2.

        Text alone comes with a picture of zeros, as in the original. Raises ValueError for more than one a row.
        """
        if batch.media is not None:
            return batch.media["feature"].astype(self.dtype)
        size = self.cfg.clip.image_size
        images = jnp.zeros((len(batch.tokens), 1, 3, size, size)) if batch.images is None else batch.images
        if images.shape[1] != 1:
            raise ValueError(f"LLaMA-Adapter v2 reads one picture a row, got {images.shape[1]}.")
        return self.clip(normalise(images)[:, 0])

    def visual_query(self, batch: Batch) -> jax.Array:
        """What the pictures add to the prompts of every injected layer, [B,P,D]; of v2."""
        return self.visual(self.feature(batch))

    def encode(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        c = self.cfg
        prompts = self.query[:, None].astype(self.dtype)
        if c.visual:
            prompts = prompts + self.visual_query(batch)
        prompts = jnp.broadcast_to(prompts, (c.query_layers, len(batch.tokens), c.query_len, c.llama.dim))
        return self.embed(batch.tokens), for_every_layer(prompts, c.llama.depth)


def example(cfg: Config) -> Batch:
    return example_batch(cfg.image_size)
