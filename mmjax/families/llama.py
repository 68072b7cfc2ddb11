"""A plain language model: text in, text out. For parity, for generation, and as the base of the others."""

import dataclasses

import jax

from mmjax.batch import Batch
from mmjax.convert import language_model as source
from mmjax.families import parts
from mmjax.families.base import Conversion, Family, FamilyConfig, register
from mmjax.families.model import LanguageModel, example_batch
from mmjax.models import llama
from mmjax.models.llama import LLAMA2_7B_CHAT, LLAMA_7B, LLAMA_13B, LlamaConfig


@dataclasses.dataclass(frozen=True)
class Config(FamilyConfig):
    llm: LlamaConfig = LLAMA_7B


PRESETS = {
    "llama-7b": Config(),
    "llama-13b": Config(LLAMA_13B),
    "llama2-7b-chat": Config(LLAMA2_7B_CHAT),
    "tiny": Config(llama.TINY),
}


class Model(LanguageModel):
    cfg: Config

    def encode(self, batch: Batch) -> tuple[jax.Array, None]:
        return self.embed(batch.tokens), None


def example(cfg: Config) -> Batch:
    return example_batch()


FAMILY = register(Family(
    name="llama", Config=Config, Model=Model, axes=(), presets=PRESETS, example=example,
    conversion=Conversion(source.inspect, origins=((r"llm/.*", "llm"),)),
    exports=parts.LLM_EXPORTS, stages=parts.LLM_STAGES))
