"""Training steps of both sides, on the same weights and batches.

    python -m benchmarks.run --only step captions imagebind vit

mmjax trains as `mmjax train` does: `mmjax.training.steps.train_step` and its AdamW. PyTorch trains as the original
(`baseline.py`), with torch's AdamW. Before the timing both compute the loss of the same batch, and must agree.
`python -m benchmarks.training --peak ours` is the process whose memory is measured.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine, sizes
from benchmarks.rows import Row
from benchmarks.sizes import SIZES, Size
from mmjax import trees
from mmjax.batch import Batch
from mmjax.config import OptimConfig
from mmjax.cost import flops
from mmjax.data import packing
from mmjax.families import FAMILIES
from mmjax.models import eva_vit
from mmjax.models.pixels import normalise
from mmjax.training import optim, steps

AGREE = 1e-4  # of the loss; in bfloat16 100 times that
OPTIM = OptimConfig(init_lr=1e-4, min_lr=1e-5, warmup_steps=0)
Step = Callable[[Batch], float]


@dataclasses.dataclass(frozen=True)
class Model:
    """What both sides train."""

    family: str
    cfg: Any
    dtype: str
    remat: bool = False

    @property
    def rules(self) -> tuple[str, ...]:
        return FAMILIES[self.family].trained

    def params(self) -> dict[str, np.ndarray]:
        return sizes.params(self.family, self.cfg, self.dtype, self.rules)

    @property
    def module(self) -> Any:
        return FAMILIES[self.family].Model(self.cfg, jnp.dtype(self.dtype), self.remat)


class Ours:
    """mmjax's training step: a batch -> the loss before the update."""

    def __init__(self, model: Model, params: Mapping[str, np.ndarray]):
        tree = trees.unflatten({path: jnp.asarray(leaf) for path, leaf in params.items()})
        self.trained, self.frozen = trees.split(tree, trees.mask(tree, model.rules))
        self.model, optimizer = model, optim.optimizer(OPTIM, model.cfg.llm)
        self.state = steps.start(jax.tree.map(jnp.copy, self.trained), optimizer, seed=0)
        self.step = steps.train_step(model.module, optimizer)

    def __call__(self, batch: Batch) -> float:
        self.state, metrics = self.step(self.state, self.frozen, batch)
        return float(metrics["loss"])

    def flops(self, batch: Batch) -> int:
        """Returns the operations of a step, those of the head only where there are targets."""
        count = flops.train_step(self.model.module, self.trained, self.frozen, batch)
        return count.useful(int(batch.loss_mask[:, 1:].sum()))


class Theirs:
    """PyTorch's training step: a batch -> the loss before the update."""

    def __init__(self, model: Model, params: Mapping[str, np.ndarray]):
        import torch

        from benchmarks import baseline

        torch.set_num_threads(machine.cores())
        self.torch, self.device = torch, device()
        kind = {"minigpt4": baseline.MiniGPT4, "imagebind_llm": baseline.ImageBindLLM}[model.family]
        self.module = baseline.build(kind, model.cfg, params, model.dtype, self.device)
        trained = [one for one in self.module.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=OPTIM.init_lr, betas=(OPTIM.beta1, OPTIM.beta2),
                                           eps=OPTIM.eps, weight_decay=OPTIM.weight_decay)

    def __call__(self, batch: Batch) -> float:
        loss = self.module(self.tensors(batch))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def tensors(self, batch: Batch) -> dict[str, Any]:
        """Returns the module's inputs; images are normalised, as in the original's data loader."""
        found = {name: np.array(getattr(batch, name), np.int64) for name in ("tokens", "soft_index", "positions")}
        found |= {"valid": np.array(batch.valid), "loss_mask": np.array(batch.loss_mask)}
        if batch.images is not None:
            found["images"] = np.array(normalise(np.asarray(batch.images).reshape(-1, *batch.images.shape[2:])))
        if batch.features is not None:
            found["feature"] = np.array(batch.features, np.float32)
        return {name: self.torch.from_numpy(array).to(self.device) for name, array in found.items()}


def device() -> str:
    """Returns torch's name of JAX's device."""
    return "cpu" if jax.default_backend() == "cpu" else "cuda"


def agree(model: Model, sides: Mapping[str, Any], batch: Batch) -> None:
    """Raises ValueError if the sides give different losses."""
    losses = {name: side(batch) for name, side in sides.items()}
    allowed = AGREE if model.dtype == "float32" else 100 * AGREE
    if max(losses.values()) - min(losses.values()) > allowed:
        raise ValueError(f"The sides do not compute the same: their first losses are {losses}, which must agree within "
                         f"{allowed}. Nothing was timed.")


def sides(model: Model, names: Sequence[str]) -> dict[str, Any]:
    """Returns {"ours", "theirs"}, or one of them, with the same weights."""
    params, kinds = model.params(), {"ours": Ours, "theirs": Theirs}
    return {name: kinds[name](model, params) for name in names}


PRODUCTS = 5  # one after the other, in each turn


def race(size: Size, calls: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Returns (median seconds of each call, operations per second of the best product by side). The products alternate
    with the calls, because a shared machine is not always equally fast. PyTorch's call is named "theirs"."""
    names = ("ours", "theirs") if "theirs" in calls else ("ours",)
    single = machine.products(size.matmul, size.dtype, device(), names)
    best = dict.fromkeys(names, float("inf"))

    def several(name: str) -> Callable[[], None]:
        def multiply() -> None:
            best[name] = min(best[name], *(machine.seconds(single[name]) for _ in range(PRODUCTS)))

        return multiply

    took = machine.medians(machine.turns({**calls, **{f"product, {name}": several(name) for name in names}}, rounds))
    return {name: took[name] for name in calls}, {name: 2 * size.matmul**3 / best[name] for name in names}


def train(size: Size, model: Model, ours: Mapping[str, Batch], theirs: Sequence[Batch], names: Sequence[str],
          rounds: int, count: int, **further: Any) -> list[Row]:
    """Returns a row for each batch of `ours`, by its name, compared with PyTorch's batches of the same `count` samples.
    First checks that both sides compute the same loss.

    further: fields of the rows, by the row's name
    """
    racing = sides(model, names)
    agree(model, racing, theirs[0])

    def epoch(side: str, batches: Sequence[Batch]) -> Callable[[], None]:
        def all_batches() -> None:
            for batch in batches:
                racing[side](batch)

        return all_batches

    calls = {name: epoch("ours", [batch]) for name, batch in ours.items()}
    if "theirs" in names:
        calls["theirs"] = epoch("theirs", theirs)
    took, top = race(size, calls, rounds)

    def share(name: str, batches: Sequence[Batch]) -> float:
        return sum(map(racing["ours"].flops, batches)) / took[name] / top["theirs" if name == "theirs" else "ours"]

    ceiling = {"theirs": share("theirs", theirs)} if "theirs" in names else {}
    return [Row(name, "samples/s", count / took[name], count / took["theirs"] if "theirs" in names else None,
                ceiling={"ours": share(name, [batch])} | ceiling, **{key: of[name] for key, of in further.items()})
            for name, batch in ours.items()]


# ---- the benchmarks ----


def equal_rows(size: Size, cfg: Any) -> Batch:
    """Returns a batch of full rows of equal length."""
    return sizes.batch(cfg, [[size.length]] * size.rows, size.length)


def with_features(batch: Batch, cfg: Any, seed: int = 0) -> Batch:
    """Returns the batch with random features instead of images."""
    shape = (*batch.images.shape[:2], cfg.image_tokens, cfg.soft_width)
    feature = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return dataclasses.replace(batch, images=None, features=feature)


def step(size: Size, rounds: int, names: Sequence[str]) -> list[Row]:
    """MiniGPT-4, equal rows, with the encoder and with cached features; the original encodes in every step."""
    model = Model("minigpt4", size.minigpt4, size.dtype)
    batch = equal_rows(size, model.cfg)
    memory = {name: machine.run_module("benchmarks.training", "--peak", name, "--size", size.name)["peak"]
              for name in names}
    whole, cached = "training step", "training step, cached features"
    return train(size, model, {whole: batch, cached: with_features(batch, model.cfg)}, [batch], names, rounds,
                 size.rows, target={whole: 1.0, cached: None}, memory={whole: memory, cached: {}})


def natural(size: Size, rounds: int, names: Sequence[str]) -> list[Row]:
    """Captions of natural lengths: packed rows, with images and with cached features, compared with one sample per row,
    padded to the longest of the batch."""
    model = Model("minigpt4", size.minigpt4, size.dtype)
    cfg, taken = model.cfg, sizes.lengths(model.cfg, size.pack_rows * size.pack_length // packing.TOKENS_PER_IMAGE)
    room = packing.Size(size.pack_length, math.ceil(size.pack_rows * size.pack_length / packing.TOKENS_PER_IMAGE))
    packed_rows = packing.pack([packing.Size(length, 1) for length in taken], room, size.pack_rows, size.pack_rows)
    taken = taken[:sum(map(len, packed_rows))]
    packed = sizes.batch(cfg, [[taken[number] for number in row] for row in packed_rows], size.pack_length, room.images)
    padded = [sizes.batch(cfg, [[length] for length in group], max(group))
              for group in (taken[start:start + size.rows] for start in range(0, len(taken), size.rows))]
    note = (f"{len(taken)} captions, {room.images} images encoded; "
            f"real tokens {packed.valid.mean():.2f} of packed rows, "
            f"{np.mean(np.concatenate([batch.valid.ravel() for batch in padded])):.2f} of padded ones")
    whole, cached = "captions, packed", "captions, packed, cached features"
    return train(size, model, {whole: packed, cached: with_features(packed, cfg)}, padded, names, rounds, len(taken),
                 target={whole: 1.6, cached: 3.0}, note=dict.fromkeys((whole, cached), note))


def bound(size: Size, rounds: int, names: Sequence[str]) -> list[Row]:
    """ImageBind-LLM: bind network, query and gates trained, with cached features."""
    model = Model("imagebind_llm", size.imagebind, size.dtype)
    batch = equal_rows(size, model.cfg)
    feature = np.random.default_rng(0).standard_normal((size.rows, model.cfg.bind.inputs), np.float32)
    feature /= np.linalg.norm(feature, axis=-1, keepdims=True)
    batch = dataclasses.replace(batch, features=feature)
    name = "ImageBind-LLM step"
    return train(size, model, {name: batch}, [batch], names, rounds, size.rows, target={name: 1.0})


def block(size: Size, rounds: int, names: Sequence[str]) -> list[Row]:
    """The forward pass of one block of EVA ViT-G at full size."""
    cfg = dataclasses.replace(eva_vit.EVA_VIT_G if size.name != "toy" else eva_vit.TINY, depth=1)
    random = np.random.default_rng(0)
    params = {path: leaf for path, leaf in sizes.params(
        "minigpt4", dataclasses.replace(size.minigpt4, vit=cfg), size.dtype, ()).items() if path.startswith("vit/")}
    x = random.standard_normal((size.rows, 1 + cfg.grid**2, cfg.dim), np.float32)
    calls = {"ours": _our_block(cfg, params, x, size.dtype)}
    if "theirs" in names:
        calls["theirs"] = _their_block(cfg, params, x, size.dtype)
        ours, theirs = (np.asarray(call(), np.float32) for call in calls.values())
        allowed = AGREE if size.dtype == "float32" else 100 * AGREE
        if (off := np.abs(ours - theirs).max()) > allowed * np.abs(theirs).max():
            raise ValueError(f"A block of ViT-G gives other numbers in PyTorch: they differ by {off}.")
    took, top = race(size, calls, rounds)
    tokens = x.shape[0] * x.shape[1]
    count = 2 * tokens * (4 * cfg.dim**2 + 2 * cfg.dim * cfg.hidden) + 4 * tokens * x.shape[1] * cfg.dim
    ceiling = {name: count / seconds / top[name] for name, seconds in took.items()}
    return [Row("ViT-G block, forward", "images/s", size.rows / took["ours"],
                size.rows / took["theirs"] if "theirs" in names else None, ceiling=ceiling)]


def _our_block(cfg: Any, params: Mapping[str, np.ndarray], x: np.ndarray, dtype: str) -> Callable[[], Any]:
    variables = {"params": trees.unflatten({path.removeprefix("vit/blocks/"): jnp.asarray(leaf[0])
                                            for path, leaf in params.items() if "/blocks/" in path})}
    module, x = eva_vit.VitBlock(cfg), jnp.asarray(x, dtype)
    forward = jax.jit(lambda variables, x: module.apply(variables, x, jnp.float32(0))[0])
    return lambda: forward(variables, x).block_until_ready()


def _their_block(cfg: Any, params: Mapping[str, np.ndarray], x: np.ndarray, dtype: str) -> Callable[[], Any]:
    import torch

    from benchmarks import baseline

    torch.set_num_threads(machine.cores())
    module, tensor = baseline.vision_block(cfg, params, dtype, device()), torch.from_numpy(x).to(device())
    tensor = tensor.to(getattr(torch, dtype))

    @torch.no_grad()
    def forward() -> np.ndarray:
        return module(tensor).float().cpu().numpy()

    return forward


PARTS = {"step": step, "captions": natural, "imagebind": bound, "vit": block}


def peak(size: Size, name: str) -> int:
    """Returns the peak bytes of two steps of a side, after a first one, in which mmjax compiles."""
    model = Model("minigpt4", size.minigpt4, size.dtype)
    batch = equal_rows(size, model.cfg)
    side = sides(model, [name])[name]
    side(batch)
    machine.forget_peak()
    for _ in range(2):
        side(batch)
    return machine.peak() if device() == "cpu" else _device_peak(name)


def _device_peak(name: str) -> int:
    if name == "ours":
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    import torch

    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--peak", choices=("ours", "theirs"), required=True)
    args = parser.parse_args()
    print(json.dumps({"peak": peak(SIZES[args.size], args.peak)}))


if __name__ == "__main__":
    main()
