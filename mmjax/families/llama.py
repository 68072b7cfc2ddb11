"""A language model without an encoder: text in, text out."""

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
class TextLlamaConfig(FamilyConfig):
    llm: LlamaConfig = LLAMA_7B


PRESETS = {
    "llama-7b": TextLlamaConfig(),
    "llama-13b": TextLlamaConfig(LLAMA_13B),
    "llama2-7b-chat": TextLlamaConfig(LLAMA2_7B_CHAT),
    "tiny": TextLlamaConfig(llama.TINY),
}


class TextLlama(LanguageModel):
    cfg: TextLlamaConfig

    def encode(self, batch: Batch) -> tuple[jax.Array, None]:
        return self.embed(batch.tokens), None


def example(cfg: TextLlamaConfig) -> Batch:
    return example_batch()


FAMILY = register(Family(
    name="llama", Config=TextLlamaConfig, Model=TextLlama, axes=(), presets=PRESETS, example=example,
    conversion=Conversion(source.inspect, origins=((r"llm/.*", "llm"),)),
    exports=parts.LLM_EXPORTS, stages=parts.LLM_STAGES))
