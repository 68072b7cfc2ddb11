"""A plain language model: text in, text out. For parity, for generation, and as the base of the others."""

import dataclasses

import jax

from mmjax.batch import Batch
from mmjax.families.base import LanguageModel, example_batch
from mmjax.models import llama
from mmjax.models.llama import LLAMA2_7B_CHAT, LLAMA_7B, LLAMA_13B, LlamaConfig
from mmjax.trees import prefixed


@dataclasses.dataclass(frozen=True)
class Config:
    llama: LlamaConfig = LLAMA_7B

    image_tokens = 0
    image_size = None
    senses = ()


PRESETS = {
    "llama-7b": Config(),
    "llama-13b": Config(LLAMA_13B),
    "llama2-7b-chat": Config(LLAMA2_7B_CHAT),
    "tiny": Config(llama.TINY),
}
AXES = prefixed("llama", llama.AXES)
TRAINED: tuple[str, ...] = ()
PHASES: dict[str, tuple[str, ...]] = {}
ENCODER: dict[str, str] = {}


class Model(LanguageModel):
    cfg: Config

    def encode(self, batch: Batch) -> tuple[jax.Array, None]:
        return self.embed(batch.tokens), None


def example(cfg: Config) -> Batch:
    return example_batch()
