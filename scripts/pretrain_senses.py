"""Make the shipped towers of ImageBind-LLM's embedded default (mmjax/assets/scenes/imagebind.pth): pictures and depth.

    python scripts/pretrain_senses.py --out mmjax/assets/scenes

Both put a scene with one thing into a space of 128 numbers. The picture tower (16,000 pictures, 1,600 steps) learns to
let a throw-away head read size, colour, shape and place linearly off its vector. The depth tower (12,000 pairs, 600
steps) learns to give the vector of the same scene's picture; it never hears a word. Both see only scenes of the
`train` split: no pair of `NEW_PAIRS`, no held-out caption. Read by the head that was trained on picture vectors, of
1,000 scenes:

    split      sense     size    color   shape   place    cosine to the own picture, to others
    held_out   picture   0.999   1.000   0.977   1.000
               depth     1.000   0.044   0.993   1.000    0.846   0.113
    new_pairs  picture   0.974   1.000   0.804   1.000
               depth     1.000   0.194   0.983   1.000    0.756   0.113

A depth map has no colour: its vector is the mean over the colours that a scene could have, which is why the cosine
stays below 1 and colours are at chance (1/8 on held_out, 1/5 on new_pairs; below it on held_out, as the likeliest
colours are those that `train` has with this size, shape and place). On `new_pairs` the picture tower had 0.176 of the
shapes right before `untold` kept the absent pairs out of the loss.

Time: 8 + 3 minutes of two CPU cores' time, 9 + 3 on a clock that six programs shared.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pretrain_scenes import SLOTS, WORDS, patch_targets, sincos, train, write_json

from mmjax import trees
from mmjax.convert import imagebind as files
from mmjax.convert import torch_file
from mmjax.convert.tables import Problems, backward, forward
from mmjax.data import scenes as world
from mmjax.data import senses
from mmjax.models.imagebind import ImageBindConfig, PatchesConfig, Tower, VisionConfig
from mmjax.models.layers import unit

CONFIG = ImageBindConfig(
    vision=VisionConfig(dim=96, depth=3, heads=4, image_size=world.SIDE, patch=8),
    depth=PatchesConfig(dim=64, depth=3, heads=4, height=world.SIDE, width=world.SIDE, patch=8, stride=8),
    text=None, audio=None, thermal=None, imu=None, out=128)
VISION, DEPTH = (Tower(tower, CONFIG.out) for tower in (CONFIG.vision, CONFIG.depth))
DEPTH_FACTOR = 5.0  # of the released depth tower
SHOWN = np.array([slot != "color" for slot in SLOTS])  # by a depth map

entropy = optax.softmax_cross_entropy_with_integer_labels


def lone(split: str, count: int, seed: int) -> list[world.Scene]:
    return world.scenes(split, count, seed, most=1)


def words_of(scenes: list[world.Scene]) -> np.ndarray:
    """int[N,4]: the attribute words of lone things."""
    return np.array([[WORDS.index(getattr(scene.things[0], slot)) for slot in SLOTS] for scene in scenes])


def untold(scenes: list[world.Scene]) -> np.ndarray:
    """bool[N,4,W]: words that stay out of a slot's softmax, as the pictures of `train` can say nothing about them.

    No red thing of theirs is a star. Without this a tower learns that as a fact: it then takes a red star for another
    shape more often than by guessing.
    """
    barred = np.zeros((len(scenes), len(SLOTS), len(WORDS)), bool)
    for row, scene in enumerate(scenes):
        for color, shape in world.NEW_PAIRS:
            barred[row, SLOTS.index("shape"), WORDS.index(shape)] |= scene.things[0].color == color
            barred[row, SLOTS.index("color"), WORDS.index(color)] |= scene.things[0].shape == shape
    return barred


def read(head, vectors) -> jax.Array:
    """Unit vectors [B,E] -> logits [B,4,W], linearly."""
    return jnp.einsum("BE,EAW->BAW", np.sqrt(CONFIG.out) * vectors, head)


def with_sincos(params, cfg) -> dict:
    """Drawn at random, the positions take longer to sort out than the whole training has."""
    params["stem"]["pos"] = jnp.asarray(sincos(world.SIDE // cfg.patch, cfg.dim))
    return params


def vectors_of(tower: Tower, params, inputs) -> np.ndarray:
    """float32[N,E] of length 1."""
    apply = jax.jit(lambda x: unit(tower.apply({"params": params}, x)))
    return np.concatenate([apply(inputs[i : i + 250]) for i in range(0, len(inputs), 250)])


def orders(rng: np.random.Generator, count: int, steps: int, batch: int) -> np.ndarray:
    """int[steps,batch]: numbers below `count`, each once before any comes again."""
    rounds = [rng.permutation(count) for _ in range(-(-steps * batch // count))]
    return np.concatenate(rounds)[: steps * batch].reshape(steps, batch)


def train_vision(steps: int, image_count: int, batch: int, rate: float) -> tuple[dict, jax.Array]:
    """(the tower, its head): each attribute is read linearly off the vector, what a patch shows off its token.

    Half of the time the training crop of ImageBind-LLM is seen instead of the whole picture.
    """
    shown = lone("train", image_count, seed=11)
    images = [world.draw(scene) for scene in shown]
    named, barred = words_of(shown), untold(shown)
    patches = np.stack([patch_targets(scene) for scene in shown])

    keys = jax.random.split(jax.random.key(11), 3)
    init = jax.nn.initializers.normal(0.02)
    params = {
        "tower": with_sincos(VISION.init(keys[0], jnp.zeros((1, *CONFIG.vision.input_shape)))["params"], CONFIG.vision),
        "head": init(keys[1], (CONFIG.out, len(SLOTS), len(WORDS))),
        "patch_head": init(keys[2], (CONFIG.vision.dim, len(SLOTS) + 1, len(WORDS))),
    }

    def loss(params, images, named, barred, patches):
        vectors, state = VISION.apply({"params": params["tower"]}, images, mutable="intermediates",
                                      capture_intermediates=lambda module, _: module.name == "blocks")
        tokens = state["intermediates"]["blocks"]["__call__"][0][0][-1]
        local = jnp.einsum("BTD,DAW->BTAW", tokens[:, 1:], params["patch_head"])
        logits = read(params["head"], vectors)
        right = (logits.argmax(-1) == named).mean()
        local = local.at[:, :, :len(SLOTS)].add(jnp.where(barred, -jnp.inf, 0)[:, None])
        whole = entropy(jnp.where(barred, -jnp.inf, logits), named)
        return 4 * whole.mean() + 0.5 * entropy(local, patches).mean(), right

    rng = np.random.default_rng(11)
    order = orders(rng, image_count, steps, batch)

    def glance(image):
        return senses.image(image, world.SIDE, rng if rng.random() >= 0.5 else None)

    def feed(step):
        chosen = order[step]
        return np.stack([glance(images[i]) for i in chosen]), named[chosen], barred[chosen], patches[chosen]

    params = train("vision", loss, params, feed, steps, rate)
    return params["tower"], params["head"]


def images_of(scenes: list[world.Scene]) -> np.ndarray:
    return np.stack([senses.image(world.draw(scene), world.SIDE) for scene in scenes])


def depths_of(scenes: list[world.Scene]) -> np.ndarray:
    return np.stack([world.depth(scene) for scene in scenes])


def train_depth(vision, head, steps: int, pairs: int, batch: int, rate: float) -> dict:
    """A scene's depth map is to have its picture's vector; the picture tower and its head stay as they are.

    Near to the own picture, nearer than to the others of the batch, and the head reads what both show as strongly
    from one as from the other: a language model that learns from pictures alone is to take either.
    """
    shown = lone("train", pairs, seed=12)
    targets = vectors_of(VISION, vision, images_of(shown))
    maps = depths_of(shown)
    params = with_sincos(DEPTH.init(jax.random.key(12), jnp.zeros((1, *CONFIG.depth.input_shape)))["params"],
                         CONFIG.depth)

    def loss(params, maps, targets):
        vectors = unit(DEPTH.apply({"params": params}, maps))
        likeness = vectors @ targets.T / 0.07
        own = jnp.arange(len(maps))
        contrast = (entropy(likeness, own) + entropy(likeness.T, own)).mean() / 2
        said, meant = (read(head, x)[:, SHOWN] for x in (vectors, targets))
        missed = jnp.square(said - meant).mean() / jnp.square(meant - meant.mean(0)).mean()
        cosine = (vectors * targets).sum(-1).mean()
        return 5 * (1 - cosine) + 0.2 * contrast + 5 * missed, cosine

    order = orders(np.random.default_rng(12), pairs, steps, batch)
    params = train("depth", loss, params, lambda step: (maps[order[step]], targets[order[step]]), steps, rate)
    # The training looks at directions only.
    params["post"]["log_scale"] = jnp.log(jnp.full(1, DEPTH_FACTOR))
    return params


def report(name: str, split: str, head, vectors, named) -> None:
    right = np.asarray(read(head, vectors).argmax(-1)) == named
    by_slot = {slot: round(float(share), 4) for slot, share in zip(SLOTS, right.mean(0), strict=True)}
    print(f"{name}, {split}: read off the vectors {by_slot}", flush=True)


def measure(vision, depth, head) -> None:
    for split in world.SPLITS[1:]:
        held = lone(split, 1_000, seed=13)
        seen = vectors_of(VISION, vision, images_of(held))
        felt = vectors_of(DEPTH, depth, depths_of(held))
        report("vision", split, head, seen, words_of(held))
        report("depth", split, head, felt, words_of(held))
        likeness = felt @ seen.T
        others = (likeness.sum() - likeness.trace()) / (likeness.size - len(likeness))
        print(f"{split}: cosine of a depth map to its picture {likeness.trace() / len(likeness):.3f}, "
              f"to another {others:.3f}", flush=True)


def save(out: Path, params) -> None:
    """float16, under the released key names, and beside it the sizes that the tensors do not show."""
    half = {path: np.asarray(leaf, np.float16) for path, leaf in trees.flatten(params).items()}
    torch_file.save(out / "imagebind.pth", backward(files.entries(CONFIG), half) | files.buffers(CONFIG))
    write_json(out / "imagebind_arch.json", {"imagebind": {
        "vision_num_heads": CONFIG.vision.heads, "depth_num_heads": CONFIG.depth.heads}})


def check(out: Path) -> None:
    """Raises ConversionError or ValueError if the converter does not read `CONFIG` from the files."""
    problems = Problems()
    arch = json.loads((out / "imagebind_arch.json").read_text())["imagebind"]
    tensors = torch_file.load(out / "imagebind.pth")
    cfg = files.config(tensors, arch, problems)
    forward(files.entries(CONFIG), tensors, files.IGNORED, "imagebind.pth", problems)
    problems.check("Cannot read the file back")
    if cfg != CONFIG:
        raise ValueError(f"The file reads back as {cfg}, expected {CONFIG}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    vision, head = train_vision(steps=1_600, image_count=16_000, batch=64, rate=2e-3)
    depth = train_depth(vision, head, steps=600, pairs=12_000, batch=64, rate=2e-3)
    measure(vision, depth, head)
    save(out, {"imagebind": {"vision": vision, "depth": depth}})
    check(out)


if __name__ == "__main__":
    main()
