"""A family that mmjax does not know: image patches through one layer, a projector of two layers, a language model.

B rows   F images a row   N = B·F   C colors   P, Q patch sides   S patches   E encoder   D language model
"""

import dataclasses
from pathlib import Path

import jax
from flax import linen as nn

from mmjax.batch import Batch
from mmjax.config import TextConfig
from mmjax.convert import language_model
from mmjax.convert.state_dict import read
from mmjax.convert.tables import Parameter, Problems, SourceCheckpoint, expand, forward
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
from mmjax.models import llama
from mmjax.models.layers import LayerNorm, Project

TEXT = TextConfig(prompt_template="Q: {} A: ", end_sym="</s>", max_txt_len=40)


@dataclasses.dataclass(frozen=True)
class PatchConfig:
    size: int = 32
    patch: int = 16
    dim: int = 24


@dataclasses.dataclass(frozen=True)
class Config(FamilyConfig):
    patches: PatchConfig = PatchConfig()
    llm: llama.LlamaConfig = llama.TINY
    hidden: int = 20  # of the projector

    @property
    def images(self) -> ImageSpec:
        return ImageSpec(self.patches.size, "pad", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25),
                         tokens=(self.patches.size // self.patches.patch) ** 2)


class Patches(nn.Module):
    cfg: PatchConfig

    @nn.compact
    def __call__(self, images):  # [N,C,H,W] -> [N,S,E]
        P, grid = self.cfg.patch, self.cfg.size // self.cfg.patch
        cut = images.reshape(len(images), 3, grid, P, grid, P).transpose(0, 2, 4, 1, 3, 5)
        cut = cut.reshape(len(images), grid * grid, 3, P, P)
        x = Project((3, P, P, self.cfg.dim), contracted=3, use_bias=True, name="embed")("NSCPQ,CPQE->NSE", cut)
        return LayerNorm(eps=1e-5, name="norm")(jax.nn.relu(x))


class Model(LanguageModel):
    cfg: Config

    def setup(self):
        super().setup()
        self.patches = Patches(self.cfg.patches)
        self.fc1 = Project((self.cfg.patches.dim, self.cfg.hidden), use_bias=True)
        self.fc2 = Project((self.cfg.hidden, self.cfg.llm.dim), use_bias=True)

    def feature(self, batch: Batch) -> jax.Array:  # [B,F,S,E]
        if batch.features is not None:
            return batch.features.astype(self.dtype)
        pixels = self.cfg.images.normalise(batch.images)
        return self.patches(pixels.reshape(-1, *pixels.shape[2:])).reshape(*pixels.shape[:2], -1, self.cfg.patches.dim)

    def encode(self, batch: Batch) -> tuple[jax.Array, None]:
        x = self.embed(batch.tokens)
        if batch.images is not None or batch.features is not None:
            hidden = jax.nn.gelu(self.fc1("BFSE,EH->BFSH", self.feature(batch)), approximate=False)
            soft = self.fc2("BFSH,HD->BFSD", hidden)
            x = place_soft_tokens(x, soft.reshape(len(soft), -1, soft.shape[-1]), batch.soft_index)
        return x, None


ENCODER = (
    ("embed.weight", "patches/embed/w", "E C P Q -> C P Q E"),
    ("embed.bias", "patches/embed/b", "E -> E"),
    ("norm.weight", "patches/norm/scale", "E -> E"),
    ("norm.bias", "patches/norm/bias", "E -> E"),
)
PROJECTOR = (
    ("0.weight", "fc1/w", "H E -> E H"),
    ("0.bias", "fc1/b", "H -> H"),
    ("2.weight", "fc2/w", "D H -> H D"),
    ("2.bias", "fc2/b", "D -> D"),
)
FRESH = tuple(path for _, path, _ in PROJECTOR)
STAGES = (Stage("patches_out", "patches", "patches", "encoder"),
          Stage("fc2_out", "fc2", "fc1, fc2", "projector", flatten=(0, 2)))


def sizes(cfg: PatchConfig, hidden: int = 0, dim: int = 0) -> dict[str, int]:
    return {"C": 3, "P": cfg.patch, "Q": cfg.patch, "E": cfg.dim, "H": hidden, "D": dim}


def encoder(path: Path, problems: Problems) -> tuple[PatchConfig, dict[str, Parameter]]:
    """Config and parameters of the encoder in a file."""
    tensors = read(path, problems)
    problems.check("Cannot convert")
    dim, _, patch, _ = tensors["embed.weight"].shape
    cfg = PatchConfig(2 * patch, patch, dim)
    return cfg, forward(expand(ENCODER, sizes(cfg)), tensors, (), path.name, problems)


def inspect(patches: Path, llm: Path, *, hidden: int = Config.hidden) -> SourceCheckpoint:
    """Converts a Patchwork.

    Args:
        patches: its encoder
        llm: folder of the language model
        hidden: width of the projector
    """
    problems = Problems()
    cfg, found = encoder(patches, problems)
    release, of_llm = language_model.read(llm, None, problems)
    problems.check("Cannot convert")
    return SourceCheckpoint({"patches": cfg, "llm": release.cfg, "hidden": hidden}, found | of_llm, TEXT,
                            release.generation, {"patches": (patches,), "llm": release.files}, release.tokenizer, FRESH)


FAMILY = register(Family(
    name="patchwork", Config=Config, Model=Model,
    axes=((r"patches/embed/w", ("color", "patch", "patch_", "embed")), (r"patches/(embed/b|norm/.*)", ("embed",)),
          (r"fc1/w", ("feature", "ff")), (r"fc1/b", ("ff",)), (r"fc2/w", ("ff", "embed")), (r"fc2/b", ("embed",))),
    presets={"patchwork-tiny": Config()}, example=lambda cfg: example_batch(cfg.image_size),
    trained=(r"fc[12]/.*",), encoder={"patches": r"patches/.*"}, prompt=PromptStyle(TEXT, "<ImageHere>"),
    conversion=Conversion(inspect, origins=((r"patches/.*", "patches"), (r"llm/.*", "llm"))),
    exports=parts.LLM_EXPORTS | {
        "patches": Export(lambda cfg, replaced: expand(ENCODER, sizes(cfg.patches)), save_flat),
        "projector": Export(lambda cfg, replaced: expand(PROJECTOR, sizes(cfg.patches, cfg.hidden, cfg.llm.dim)),
                            save_flat)},
    stages=(*STAGES, *parts.LLM_STAGES)))
