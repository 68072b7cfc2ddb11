"""ImageBind-LLM: what six senses see, bound into every LLaMA layer through gates that start closed (Han et al. 2023).

B rows   T tokens   P = 1 prompt a layer   A injected layers   L layers   E ImageBind's space   D language model

    T_I = bind(mix of imagebind(media))
    released form:  prompts of layer l = T_I + query[l], read by attention through a gate a head, on the last A layers
    token form:     T_I added to every token at the input of every layer, times a gate (the paper's formula)

The form is the language model's: `LlamaConfig.injection`. Mirrors imagebind_LLM/llama/llama_adapter.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.batch import Batch
from mmjax.families.base import LanguageModel, example_batch, for_every_layer
from mmjax.models import bind, imagebind, llama
from mmjax.models.bind import BIND_7B, Bind, BindConfig, mix
from mmjax.models.imagebind import IMAGEBIND_HUGE, ImageBind, ImageBindConfig, sense_of
from mmjax.models.llama import LLAMA_7B, LlamaConfig
from mmjax.models.pixels import normalise
from mmjax.trees import prefixed

LORA_RANK = 16


@dataclasses.dataclass(frozen=True)
class Config:
    imagebind: ImageBindConfig = IMAGEBIND_HUGE
    bind: BindConfig = BIND_7B
    llama: LlamaConfig = dataclasses.replace(LLAMA_7B, injection="head")
    query_layers: int = 32  # the last layers, which read prompts; of the token form: unused, every layer takes part

    image_tokens = 0  # pictures take no places among the words
    crops = True  # they keep their aspect ratio, a part is cut out

    @property
    def image_size(self) -> int | None:
        return self.imagebind.vision.image_size if self.imagebind.vision else None

    @property
    def senses(self) -> tuple[str, ...]:
        return tuple(self.imagebind.towers)


PRESETS = {
    "imagebind-llm-7b": Config(),
    "imagebind-llm-7b-token": Config(llama=dataclasses.replace(LLAMA_7B, injection="layer")),
    "tiny": Config(imagebind.TINY, bind.BindConfig(imagebind.TINY.out, llama.TINY.dim, 24),
                   dataclasses.replace(llama.TINY, injection="head"), query_layers=1),
}
AXES = (
    *prefixed("imagebind", imagebind.AXES),
    *prefixed("bind", bind.AXES),
    (r"query", ("layer", "prompt", "embed")),
    *prefixed("llama", llama.AXES),
)
PHASES = {
    "pretrain": (r"bind/.*", r"query|llama/(layers/)?(attn/)?gate"),
    "finetune": (r"llama/(layers/(attn|mlp)_)?norm/scale", r"llama/layers/.*/(b|lora_[ab])"),
}
TRAINED = PHASES["pretrain"]
ENCODER = {"imagebind": r"imagebind/.*"}


def with_phase(cfg: Config, phase: str) -> Config:
    """The architecture that a phase trains: for "finetune" LoRA on every matrix and biases on five, from zero."""
    if phase != "finetune" or cfg.llama.lora_rank:
        return cfg
    return dataclasses.replace(cfg, llama=adapted(cfg.llama, LORA_RANK))


def adapted(cfg: LlamaConfig, rank: int) -> LlamaConfig:
    """With LoRA (its factor is 1, without dropout) and biases as in the release: none on k and v."""
    return dataclasses.replace(
        cfg, lora_rank=rank, lora_alpha=float(rank), lora_dropout=0.0,
        lora_on=("q", "k", "v", "o", "gate", "up", "down"), bias_on=("q", "o", "gate", "up", "down"))


class Model(LanguageModel):
    cfg: Config

    def setup(self):
        super().setup()
        c = self.cfg
        self.imagebind = ImageBind(c.imagebind, self.dtype)
        self.bind = Bind(c.bind, self.dtype)
        if c.llama.injection == "head":
            self.query = self.param("query", nn.initializers.normal(1.0), (c.query_layers, 1, c.llama.dim))

    def feature(self, batch: Batch) -> jax.Array:
        """The mix of a batch's senses, float32[B,E]; see `mmjax.models.bind.mix`."""
        if "feature" in batch.media:
            return batch.media["feature"].astype(jnp.float32)
        media = {name: x for name, x in batch.media.items() if name != "blank"}
        if "blank" in batch.media:  # zeros are no pixels, so they are made here
            media["image"] = jnp.where(batch.media["blank"][:, None, None, None], 0, normalise(media["image"]))
        features = [self.imagebind({sense_of(name): x})[sense_of(name)] for name, x in media.items()]
        return mix(features, [batch.weights[name][:, None] for name in media])

    def encode(self, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """A batch without media is plain LLaMA's."""
        if batch.media is None:
            return self.embed(batch.tokens), None
        bound = self.bind(self.feature(batch)[:, None])
        return self.embed(batch.tokens), self.inject(bound)

    def inject(self, bound: jax.Array) -> jax.Array:
        """[B,1,D] -> [L,B,P,D], zeros for the layers that read no prompts."""
        depth = self.cfg.llama.depth
        if self.cfg.llama.injection != "head":
            return jnp.broadcast_to(bound, (depth, *bound.shape))
        return for_every_layer(bound + self.query[:, None].astype(bound.dtype), depth)


def example(cfg: Config) -> Batch:
    return example_batch(media=imagebind.example(cfg.imagebind))
