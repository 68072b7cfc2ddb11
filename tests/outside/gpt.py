"""A language model that is no LLaMA, behind Patchwork's encoder: GPT-2 (Radford et al. 2019), with names of its own.

B batch   T query tokens   S key tokens   L layers   D model   F feed-forward   C queries, keys, values
N heads   H head   V vocabulary   M positions
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.convert import llama, vocabulary
from mmjax.convert.state_dict import read
from mmjax.convert.tables import Problems, SourceCheckpoint, expand, forward
from mmjax.families.base import EMBEDDING, LOGITS, LOSS, Export, Stage, register
from mmjax.models.kernels import XLA, Kernels
from mmjax.models.language_model import LanguageModelConfig
from mmjax.models.layers import LayerNorm, Project, einsum, embedding_lookup
from mmjax.tokenizer import Tokenizer
from tests.outside import patchwork

AXES = (
    (r"tokens/embedding", ("vocab", "embed")), (r"pos", ("length", "embed")),
    (r"ln_f/.*", ("embed",)), (r"h/ln_[12]/.*", ("layer", "embed")), (r"h/mlp_in/b", ("layer", "ff")),
    (r"h/c_attn/w", ("layer", "embed", "qkv", "heads", "head")), (r"h/c_attn/b", ("layer", "qkv", "heads", "head")),
    (r"h/c_proj/w", ("layer", "heads", "head", "embed")), (r"h/(c_proj|mlp_out)/b", ("layer", "embed")),
    (r"h/mlp_in/w", ("layer", "embed", "ff")), (r"h/mlp_out/w", ("layer", "ff", "embed")),
)


@dataclasses.dataclass(frozen=True)
class GptConfig(LanguageModelConfig):
    vocab: int = 600
    depth: int = 2
    dim: int = 32
    n_head: int = 4
    max_positions: int = 160

    learned_positions = True
    axes = AXES
    matrices = ((r"tokens/embedding", (-1,)), (r"h/c_attn/w", (-4,)), (r"h/c_proj/w", (-3, -2)),
                (r"h/mlp_(in|out)/w", (-2,)))

    def build(self, **fields: Any) -> "Gpt":
        return Gpt(self, **fields)


class Table(nn.Module):
    shape: tuple[int, int]

    def setup(self):
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), self.shape)


class Block(nn.Module):
    cfg: GptConfig
    kernels: Kernels

    @nn.compact
    def __call__(self, x, cache, mask, start):
        D, N = self.cfg.dim, self.cfg.n_head
        H, F = D // N, 4 * D
        normed = LayerNorm(1e-5, name="ln_1")(x)
        q, k, v = jnp.moveaxis(Project((D, 3, N, H), use_bias=True, name="c_attn")("BTD,DCNH->BTCNH", normed), 2, 0)
        if cache is not None:
            cache = [jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, 1)
                     for old, new in zip(cache, (k, v), strict=True)]
            k, v = cache
        out = self.kernels.attend(q, k, v, mask)
        x = x + Project((N, H, D), contracted=2, use_bias=True, name="c_proj")("BTNH,NHD->BTD", out)
        hidden = Project((D, F), use_bias=True, name="mlp_in")("BTD,DF->BTF", LayerNorm(1e-5, name="ln_2")(x))
        return x + Project((F, D), use_bias=True, name="mlp_out")("BTF,FD->BTD", jax.nn.gelu(hidden)), cache


class Gpt(nn.Module):
    cfg: GptConfig
    dtype: Any = jnp.float32
    remat: bool | str = False
    kernels: Kernels = XLA

    def setup(self):
        self.tokens = Table((self.cfg.vocab, self.cfg.dim))
        self.pos = self.param("pos", nn.initializers.normal(0.01), (self.cfg.max_positions, self.cfg.dim))
        self.h = nn.scan(Block if self.remat in (False, "none") else nn.remat(Block, prevent_cse=False),
                         variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True},
                         in_axes=(0, nn.broadcast, nn.broadcast), length=self.cfg.depth)(self.cfg, self.kernels)
        self.ln_f = LayerNorm(1e-5)

    def embed(self, tokens):
        return embedding_lookup(self.tokens.embedding, tokens, self.dtype)

    def __call__(self, x, positions, mask, cache=None, start=0, injection=None):
        if injection is not None:
            raise TypeError("GPT-2 has no injection.")
        x, cache = self.h(x + embedding_lookup(self.pos, positions, self.dtype), cache, mask, start)
        return self.ln_f(x), cache

    def logits(self, hidden):
        return einsum("BTD,VD->BTV", hidden, self.tokens.embedding).astype(jnp.float32)

    def empty_cache(self, rows, length):
        shape = self.cfg.depth, rows, length, self.cfg.n_head, self.cfg.dim // self.cfg.n_head
        return [jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)]


NORMS = ("ln_f", "ln_f"), ("h.{L}.ln_1", "h/ln_1"), ("h.{L}.ln_2", "h/ln_2")
GPT2 = (  # of transformers' modeling_gpt2.py, whose Conv1D holds [inputs, outputs]
    ("wte.weight", "llm/tokens/embedding", "V D -> V D"), ("wpe.weight", "llm/pos", "M D -> M D"),
    *((f"{theirs}.weight", f"llm/{ours}/scale", "D -> D") for theirs, ours in NORMS),
    *((f"{theirs}.bias", f"llm/{ours}/bias", "D -> D") for theirs, ours in NORMS),
    ("h.{L}.attn.c_attn.weight", "llm/h/c_attn/w", "D (C N H) -> D C N H"),
    ("h.{L}.attn.c_attn.bias", "llm/h/c_attn/b", "(C N H) -> C N H"),
    ("h.{L}.attn.c_proj.weight", "llm/h/c_proj/w", "(N H) D -> N H D"),
    ("h.{L}.attn.c_proj.bias", "llm/h/c_proj/b", "D -> D"),
    ("h.{L}.mlp.c_fc.weight", "llm/h/mlp_in/w", "D F -> D F"), ("h.{L}.mlp.c_fc.bias", "llm/h/mlp_in/b", "F -> F"),
    ("h.{L}.mlp.c_proj.weight", "llm/h/mlp_out/w", "F D -> F D"),
    ("h.{L}.mlp.c_proj.bias", "llm/h/mlp_out/b", "D -> D"),
)


def entries(c: GptConfig) -> list:
    sizes = {"V": c.vocab, "M": c.max_positions, "D": c.dim, "F": 4 * c.dim, "C": 3, "N": c.n_head,
             "H": c.dim // c.n_head}
    return expand(GPT2, sizes, {"L": range(c.depth)})


@dataclasses.dataclass(frozen=True)
class Config(patchwork.Config):
    llm: GptConfig = GptConfig()


def inspect(patches: Path, llm: Path, *, hidden: int = Config.hidden) -> SourceCheckpoint:
    """Converts Patchwork's encoder (patches) and the folder of a GPT-2 (llm); hidden: width of the projector."""
    problems, card, file = Problems(), json.loads((llm / "config.json").read_text()), llm / "pytorch_model.bin"
    cfg = GptConfig(card["vocab_size"], card["n_layer"], card["n_embd"], card["n_head"], card["n_positions"])
    encoder, found = patchwork.encoder(patches, problems)
    ids = vocabulary.settle_ids(llama.generation_sources(llm, problems), Tokenizer.from_folder(llm), cfg.vocab)
    found |= forward(entries(cfg), read(file, problems), (), llm.name, problems)
    problems.check("Cannot convert")
    return SourceCheckpoint({"patches": encoder, "llm": cfg, "hidden": hidden}, found, patchwork.TEXT, ids,
                            {"patches": (patches,), "llm": (file,)}, llm, fresh=patchwork.FRESH)


FAMILY = register(dataclasses.replace(
    patchwork.FAMILY, name="patchwork-gpt", Config=Config, presets={"patchwork-gpt-tiny": Config()},
    conversion=dataclasses.replace(patchwork.FAMILY.conversion, inspect=inspect),
    exports={**{name: patchwork.FAMILY.exports[name] for name in ("patches", "projector")},
             "llm": Export(lambda cfg, replaced: entries(cfg.llm), patchwork.save_flat)},
    stages=(*patchwork.STAGES, EMBEDDING, Stage("h.{i}", "llm/h", "llm/h/… [{i}]", "h.{i}", "decoder"), LOGITS, LOSS)))
