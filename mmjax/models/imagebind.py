"""ImageBind: six senses in one space (imagebind/models/{imagebind_model,transformer,multimodal_preprocessors}.py;
Girdhar et al. 2023).

B batch (clips folded in)   C colours or channels   M frames   P, Q patch sides   T tokens   V vocabulary   D model
S queries, keys, values     N heads   H head   F feed-forward   L blocks   E the shared space

    tower = stem (tokens with positions) -> pre-norm blocks -> head on one token -> unit length times a factor

The towers differ in their stems; in four of them attention has one more key and value, which are learned and not
projected. The point cloud branch of `imagebind_w3D.pth` is left out.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mmjax.models.kernels import XLA, Kernels, scan_rows
from mmjax.models.layers import FeedForward, LayerNorm, Project, in_float32, repeat_rows, resize_positions, unit
from mmjax.models.masks import AttentionMask
from mmjax.models.senses import SENSES

EPS = 1e-6  # of every norm but the stems'
STEM_EPS = 1e-5  # torch's default
MAX_FACTOR = 100.0  # upper limit of a tower's factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    dim: int
    depth: int
    heads: int
    drop_path: float = 0.0  # rate of the last block, rising linearly from 0; used only while the tower is trained
    head_dropout: float = 0.0  # likewise

    pre_norm: ClassVar[bool] = False  # a norm before the first block
    causal: ClassVar[bool] = False  # causal attention; the head reads the token with the highest id
    extra_key: ClassVar[bool] = True  # a learned key and value after those of the sequence
    scaled: ClassVar[bool] = True  # the factor is a parameter

    @property
    def hidden(self) -> int:
        return 4 * self.dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(TowerConfig):
    image_size: int = 224  # of the position table, which is resized for other square images
    patch: int = 14
    frames: int = 2

    pre_norm: ClassVar[bool] = True
    extra_key: ClassVar[bool] = False
    scaled: ClassVar[bool] = False

    @property
    def num_positions(self) -> int:
        return 1 + (self.image_size // self.patch) ** 2

    @property
    def input_shape(self) -> tuple[int, ...]:
        return 3, self.image_size, self.image_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTowerConfig(TowerConfig):
    vocab: int = 49_408
    context: int = 77

    causal: ClassVar[bool] = True
    extra_key: ClassVar[bool] = False

    @property
    def num_positions(self) -> int:
        return self.context

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.context,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchesConfig(TowerConfig):
    """A tower for spectrograms [1, mel bins, frames], depth maps and thermal images [1, rows, columns]."""

    height: int = 224
    width: int = 224
    patch: int = 16
    stride: int = 16

    @property
    def grid(self) -> tuple[int, int]:
        return (self.height - self.patch) // self.stride + 1, (self.width - self.patch) // self.stride + 1

    @property
    def num_positions(self) -> int:
        return 1 + self.grid[0] * self.grid[1]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return 1, self.height, self.width


@dataclasses.dataclass(frozen=True, kw_only=True)
class MotionConfig(TowerConfig):
    steps: int = 2_000
    window: int = 8
    channels: int = 6

    @property
    def num_positions(self) -> int:
        return 1 + self.steps // self.window

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.channels, self.steps


@dataclasses.dataclass(frozen=True)
class ImageBindConfig:
    """The configs of the towers (None: the model has no such tower), and the size of the space they share."""

    vision: VisionConfig | None = VisionConfig(dim=1_280, depth=32, heads=16)
    text: TextTowerConfig | None = TextTowerConfig(dim=1_024, depth=24, heads=16)
    audio: PatchesConfig | None = PatchesConfig(
        dim=768, depth=12, heads=12, height=128, width=204, stride=10, drop_path=0.1)
    depth: PatchesConfig | None = PatchesConfig(dim=384, depth=12, heads=8)
    thermal: PatchesConfig | None = PatchesConfig(dim=768, depth=12, heads=12)
    imu: MotionConfig | None = MotionConfig(dim=512, depth=6, heads=8, drop_path=0.7, head_dropout=0.5)
    out: int = 1_024

    @property
    def towers(self) -> dict[str, TowerConfig]:
        return {sense: getattr(self, sense) for sense in SENSES if getattr(self, sense) is not None}


IMAGEBIND_HUGE = ImageBindConfig()
TINY = ImageBindConfig(
    vision=VisionConfig(dim=24, depth=2, heads=4, image_size=28),
    text=TextTowerConfig(dim=16, depth=2, heads=2, vocab=40, context=12),
    audio=PatchesConfig(dim=16, depth=2, heads=2, height=26, width=36, stride=10, drop_path=0.1),
    depth=PatchesConfig(dim=12, depth=2, heads=2, height=32, width=32),
    thermal=PatchesConfig(dim=16, depth=2, heads=2, height=32, width=32),
    imu=MotionConfig(dim=16, depth=2, heads=2, steps=32, drop_path=0.7, head_dropout=0.5),
    out=20,
)

AXES = (
    (r"vision/stem/patch/w", ("colour", "frame", "patch", "patch_", "embed")),
    (r"(audio|depth|thermal)/stem/patch/w", ("patch", "patch_", "embed")),
    (r"imu/stem/window/w", ("channel", "patch", "embed")),
    (r"text/stem/embedding", ("vocab", "embed")),
    (r"\w+/stem/pos", ("position", "embed")),
    (r"\w+/(stem/(cls|norm/(scale|bias))|pre_norm/(scale|bias)|head/norm/(scale|bias))", ("embed",)),
    (r"\w+/blocks/norm[12]/(scale|bias)", ("layer", "embed")),
    (r"(vision|text)/blocks/attn/qkv/w", ("layer", "embed", "qkv", "heads", "head")),
    (r"(vision|text)/blocks/attn/qkv/b", ("layer", "qkv", "heads", "head")),
    (r"(vision|text)/blocks/attn/o/w", ("layer", "heads", "head", "embed")),
    (r"(audio|depth|thermal|imu)/blocks/attn/qkv/w", ("layer", "embed", "qkv", "sense_heads", "head")),
    (r"(audio|depth|thermal|imu)/blocks/attn/qkv/b", ("layer", "qkv", "sense_heads", "head")),
    (r"(audio|depth|thermal|imu)/blocks/attn/o/w", ("layer", "sense_heads", "head", "embed")),
    (r"\w+/blocks/attn/bias_[kv]", ("layer", "sense_heads", "head")),
    (r"\w+/blocks/mlp/fc1/w", ("layer", "embed", "ff")),
    (r"\w+/blocks/mlp/fc1/b", ("layer", "ff")),
    (r"\w+/blocks/mlp/fc2/w", ("layer", "ff", "embed")),
    (r"\w+/blocks/(attn/o|mlp/fc2)/b", ("layer", "embed")),
    (r"\w+/head/out/w", ("embed", "sense")),
    (r"\w+/post/log_scale", ("one",)),
)


def windows(x: jax.Array, size: int, stride: int) -> jax.Array:
    """Returns the whole patches in raster order: [..., rows, columns] -> [..., h, size, w, size]."""
    counts = ((side - size) // stride + 1 for side in x.shape[-2:])
    rows, columns = (np.arange(count)[:, None] * stride + np.arange(size) for count in counts)
    return x[..., rows, :][..., columns]


class Stem(nn.Module):
    """Base class of the stems: a learned class token before the others, and learned positions."""

    cfg: TowerConfig
    dtype: jnp.dtype = jnp.float32

    def pos(self):
        return self.param("pos", nn.initializers.normal(0.02), (self.cfg.num_positions, self.cfg.dim))

    def with_class(self, x):
        """[B,T,D] -> [B,1+T,D]."""
        cls = self.param("cls", nn.initializers.normal(0.02), (self.cfg.dim,))
        return jnp.concatenate([repeat_rows(cls[None], len(x), x.dtype), x], axis=1)


class VisionStem(Stem):
    """Tokens of images [B,3,Y,Y], which are repeated for all frames, or of short videos [B,3,M,Y,Y]."""

    @nn.compact
    def __call__(self, x):
        c = self.cfg
        side = x.shape[-1]
        if x.shape[1:] not in ((3, side, side), (3, c.frames, side, side)) or side < c.patch:
            raise ValueError(f"The vision tower takes square images [3, Y, Y] of at least {c.patch} pixels, or "
                             f"{c.frames} of them [3, {c.frames}, Y, Y]; got {list(x.shape[1:])}.")
        if x.ndim == 4:
            x = jnp.repeat(x[:, :, None], c.frames, axis=2)
        patch = Project((3, c.frames, c.patch, c.patch, c.dim), contracted=4, name="patch")
        x = patch("BCMhPwQ,CMPQD->BhwD", windows(x.astype(self.dtype), c.patch, c.patch))
        x = self.with_class(x.reshape(len(x), -1, c.dim))
        return in_float32(jnp.add, x, resize_positions(self.pos(), side // c.patch))


class PatchesStem(Stem):
    """Tokens of audio, depth and thermal inputs: one channel [B,1,height,width]; patches may overlap."""

    @nn.compact
    def __call__(self, x):
        c = self.cfg
        _check_shape(x, c)
        patch = Project((c.patch, c.patch, c.dim), contracted=2, name="patch")
        x = patch("BhPwQ,PQD->BhwD", windows(x[:, 0].astype(self.dtype), c.patch, c.stride))
        x = self.with_class(LayerNorm(STEM_EPS, name="norm")(x.reshape(len(x), -1, c.dim)))
        return in_float32(jnp.add, x, self.pos())


class MotionStem(Stem):
    """Tokens of acceleration and rotation [B,C,steps], one per window."""

    @nn.compact
    def __call__(self, x):
        c = self.cfg
        _check_shape(x, c)
        cut = x[..., :c.steps // c.window * c.window].astype(self.dtype).reshape(len(x), c.channels, -1, c.window)
        x = Project((c.channels, c.window, c.dim), contracted=2, name="window")("BCTP,CPD->BTD", cut)
        x = self.with_class(LayerNorm(STEM_EPS, name="norm")(x))
        return in_float32(jnp.add, x, self.pos())


class TextStem(Stem):
    """Embedded text tokens, int[B,context]; no class token."""

    @nn.compact
    def __call__(self, tokens):
        c = self.cfg
        _check_shape(tokens, c)
        embedding = self.param("embedding", nn.initializers.normal(0.02), (c.vocab, c.dim))
        return (embedding[tokens] + self.pos()).astype(self.dtype)


def _check_shape(x, cfg):
    if x.shape[1:] != cfg.input_shape:
        raise ValueError(f"This tower takes inputs of shape {list(cfg.input_shape)}, got {list(x.shape[1:])}.")


class TowerAttention(nn.Module):
    cfg: TowerConfig
    kernels: Kernels = XLA

    @nn.compact
    def __call__(self, x):
        D = x.shape[-1]
        N, H = self.cfg.heads, D // self.cfg.heads
        q, k, v = jnp.moveaxis(Project((D, 3, N, H), use_bias=True, name="qkv")("BTD,DSNH->BTSNH", x), 2, 0)
        if self.cfg.extra_key:
            k = self.append("bias_k", k)
            v = self.append("bias_v", v)
        out = self.kernels.attend(q, k, v, AttentionMask(self.cfg.causal))
        return Project((N, H, D), contracted=2, use_bias=True, name="o")("BTNH,NHD->BTD", out)

    def append(self, name, x):
        """Appends a learned vector: [B,T,N,H] -> [B,T+1,N,H]."""
        extra = self.param(name, nn.initializers.xavier_normal(), x.shape[2:])
        return jnp.concatenate([x, repeat_rows(extra[None], len(x), x.dtype)], axis=1)


class TowerBlock(nn.Module):
    """A pre-norm block; each branch of a sample is dropped with probability `drop_rate` (stochastic depth)."""

    cfg: TowerConfig
    kernels: Kernels = XLA

    @nn.compact
    def __call__(self, x, drop_rate):
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        attention = TowerAttention(self.cfg, self.kernels, name="attn")
        x = x + self.drop_path(attention(LayerNorm(EPS, name="norm1")(x)), drop_rate)
        x = x + self.drop_path(FeedForward(self.cfg.hidden, name="mlp")(LayerNorm(EPS, name="norm2")(x)), drop_rate)
        return x, None

    def drop_path(self, branch, rate):
        if self.cfg.drop_path == 0 or not self.has_rng("imagebind"):
            return branch
        kept = jax.random.bernoulli(self.make_rng("imagebind"), 1 - rate, (branch.shape[0], 1, 1))
        return jnp.where(kept, branch / (1 - rate).astype(branch.dtype), 0)


class Head(nn.Module):
    """Projects the token at `index` int[B] of each row: [B,T,D] -> [B,E]."""

    cfg: TowerConfig
    out: int

    @nn.compact
    def __call__(self, x, index):
        x = LayerNorm(EPS, name="norm")(jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0])
        rate = self.cfg.head_dropout
        if rate and self.has_rng("imagebind"):
            kept = jax.random.bernoulli(self.make_rng("imagebind"), 1 - rate, x.shape)
            x = jnp.where(kept, x / (1 - rate), 0)
        return Project((self.cfg.dim, self.out), name="out")("BD,DE->BE", x)


class Postprocess(nn.Module):
    """Scales [B,E] to length 1, then by the tower's factor: float32[B,E]. The parameter is the factor's logarithm."""

    cfg: TowerConfig

    @nn.compact
    def __call__(self, x):
        if not self.cfg.scaled:
            return unit(x)
        log_scale = self.param("log_scale", nn.initializers.constant(np.log(1 / 0.07)), (1,))
        return unit(x) * jnp.minimum(jnp.exp(log_scale.astype(jnp.float32)), MAX_FACTOR)


STEMS = {VisionConfig: VisionStem, TextTowerConfig: TextStem, PatchesConfig: PatchesStem, MotionConfig: MotionStem}


class Tower(nn.Module):
    """The tower of one sense: `[B, *cfg.input_shape]` -> float32[B,E]."""

    cfg: TowerConfig
    out: int
    dtype: jnp.dtype = jnp.float32
    kernels: Kernels = XLA

    @nn.compact
    def __call__(self, inputs):
        c = self.cfg
        x = STEMS[type(c)](c, self.dtype, name="stem")(inputs)
        if c.pre_norm:
            x = LayerNorm(EPS, name="pre_norm")(x)
        blocks = nn.scan(
            TowerBlock,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "imagebind": True},
            length=c.depth,
        )
        layers = blocks(c, self.kernels, name="blocks")
        x = scan_rows(layers, x, jnp.linspace(0, c.drop_path, c.depth), heads=c.heads, kernels=self.kernels)
        index = jnp.argmax(inputs, axis=-1) if c.causal else jnp.zeros(len(x), jnp.int32)
        return Postprocess(c, name="post")(Head(c, self.out, name="head")(x, index))


class ImageBind(nn.Module):
    """{sense: inputs} -> {sense: float32[B,E]}.

    Inputs are `[B, *input_shape]`. With five axes or more they are clips, `[B, clips, ...]`, and the features of the
    clips are averaged and not normalised again. For vision `[B,n,3,Y,Y]` is n images, and `[B,n,3,M,Y,Y]` is a video
    of n clips. A single short video is `[B,1,3,M,Y,Y]`.
    """

    cfg: ImageBindConfig
    dtype: jnp.dtype = jnp.float32
    kernels: Kernels = XLA

    def setup(self):
        for sense, cfg in self.cfg.towers.items():
            setattr(self, sense, Tower(cfg, self.cfg.out, self.dtype, self.kernels))

    def __call__(self, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        absent = sorted(inputs.keys() - self.cfg.towers.keys())
        if absent:
            raise ValueError(f"This model has no tower for {', '.join(absent)}; it has {', '.join(self.cfg.towers)}.")
        return {sense: self.feature(getattr(self, sense), x) for sense, x in inputs.items()}

    @staticmethod
    def feature(tower, x):
        if x.ndim < 5:
            return tower(x)
        return tower(x.reshape(-1, *x.shape[2:])).reshape(*x.shape[:2], -1).mean(1)


def example(cfg: ImageBindConfig, rows: int = 1) -> dict[str, jax.Array]:
    """Returns inputs of zeros for every tower, to initialize every parameter."""
    return {sense: jnp.zeros((rows, *tower.input_shape), jnp.int32 if tower.causal else jnp.float32)
            for sense, tower in cfg.towers.items()}
