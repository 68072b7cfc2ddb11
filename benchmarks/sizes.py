"""The models that are timed, and their batches.

`small` is for a CPU. `7b` is the released MiniGPT-4 and ImageBind-LLM, in bfloat16 on one GPU. `toy` is for the tests
of the benchmarks.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmjax import trees
from mmjax.batch import Batch
from mmjax.families import imagebind_llm, minigpt4, shapes
from mmjax.models import bind, eva_vit, imagebind, llama, qformer


@dataclasses.dataclass(frozen=True)
class Size:
    """A set of model sizes.

    name:           value of --size
    rows, length:   of a batch of equal rows
    dtype:          of activations and frozen weights
    pack_...:       of packed rows
    matmul, stream: side of the matrices and bytes of the array that measure the ceilings
    turns:          number of repetitions
    """

    name: str
    minigpt4: minigpt4.MiniGPT4Config
    imagebind: imagebind_llm.ImageBindLLMConfig
    rows: int
    length: int
    dtype: str
    pack_length: int
    pack_rows: int
    matmul: int
    stream: int
    turns: int


def _bound(cfg: Any, feature: int) -> imagebind_llm.ImageBindLLMConfig:
    """Returns an ImageBind-LLM config for cached features: only the smallest tower, and gates on every layer."""
    towers = imagebind.ImageBindConfig(imagebind.TINY.vision, None, None, None, None, None, feature)
    return imagebind_llm.ImageBindLLMConfig(towers, bind.BindConfig(feature, cfg.dim, 4 * cfg.dim),
                                            dataclasses.replace(cfg, injection="head"), query_layers=cfg.depth)


_LLAMA = llama.LlamaConfig(depth=12, dim=768, heads=12, kv_heads=12, head_dim=64, hidden=2_048)
SIZES = {size.name: size for size in (
    Size(
        "small",
        minigpt4.MiniGPT4Config(eva_vit.VitConfig(dim=384, depth=12, heads=6, hidden=1_536),
                                qformer.QFormerConfig(dim=384, depth=6, heads=6, hidden=1_536), _LLAMA),
        _bound(_LLAMA, 1_024), rows=8, length=128, dtype="float32", pack_length=512, pack_rows=5,
        matmul=2_048, stream=2**28, turns=5),
    Size(
        "7b", minigpt4.PRESETS["minigpt4-7b"], imagebind_llm.PRESETS["imagebind-llm-7b"], rows=16, length=256,
        dtype="bfloat16", pack_length=1_024, pack_rows=8, matmul=8_192, stream=2**31, turns=20),
    Size(
        "toy", minigpt4.PRESETS["tiny"], _bound(llama.TINY, 20), rows=2, length=40, dtype="float32", pack_length=512,
        pack_rows=1, matmul=64, stream=2**16, turns=1),
)}


def params(family: str, cfg: Any, dtype: str, rules: tuple[str, ...], seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random weights by path: norm scales near 1, all others small; trained ones in float32."""
    random = np.random.default_rng(seed)

    def drawn(path: str, shape: Any) -> np.ndarray:
        values = random.standard_normal(shape.shape, np.float32)
        values *= 0.02
        if path.endswith("scale"):
            values += 1
        return values.astype(np.float32 if trees.matches(path, rules) else jnp.dtype(dtype))

    return {path: drawn(path, shape) for path, shape in shapes(family, cfg).items()}


BEFORE, PROMPT = 6, 16  # tokens before the image, and between it and the answer
PAD = 2


def batch(cfg: Any, rows: Sequence[Sequence[int]], length: int, image_count: int | None = None, seed: int = 0) -> Batch:
    """Returns a batch of samples `[tokens][soft tokens][tokens][answer]` of the given lengths, packed in rows that are
    padded to `length`. Tokens and images are random.

    cfg:         a family's; without `image_tokens` there are no images
    image_count: images of the list that packed rows share; None: one sample per row, not packed
    """
    random, Q = np.random.default_rng(seed), cfg.image_tokens
    shape, first_image = (len(rows), length), 0
    tokens, soft_index = np.full(shape, PAD, np.int32), np.full(shape, -1, np.int32)
    segments, positions = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    loss_mask = np.zeros(shape, bool)
    for row, samples in enumerate(rows):
        start = 0
        for number, size in enumerate(samples):
            here, image = slice(start, start + size), start + BEFORE
            tokens[row, here] = random.integers(PAD + 1, cfg.llm.vocab, size)
            soft_index[row, image:image + Q] = first_image + np.arange(Q)
            first_image += Q if image_count else 0
            loss_mask[row, image + Q + PROMPT:start + size] = True
            segments[row, here], positions[row, here] = number, np.arange(size)
            start += size
    tokens[soft_index >= 0] = PAD
    if image_count is None:
        positions = np.tile(np.arange(length, dtype=np.int32), (len(rows), 1))
    side = cfg.image_size
    lists = (1, image_count) if image_count else (len(rows), 1)
    images = random.integers(0, 256, (*lists, side, side, 3), np.uint8) if Q else None
    return Batch(tokens, soft_index, segments >= 0, loss_mask, positions, np.full(len(rows), length, np.int32), images,
                 segments=None if image_count is None else segments)


def lengths(cfg: Any, count: int, seed: int = 0) -> list[int]:
    """Returns the numbers of tokens of samples, with captions as in docs/decisions/0011-packing.md: log-normal with
    median 80 and deviation 0.6, 8 to 400. The lengths are quantiles, so a few vary as much as many."""
    normal = statistics.NormalDist(np.log(80), 0.6)
    captions = np.exp([normal.inv_cdf((number + 0.5) / count) for number in range(count)]).clip(8, 400).astype(int)
    return [int(caption) + BEFORE + PROMPT + cfg.image_tokens
            for caption in np.random.default_rng(seed).permutation(captions)]
