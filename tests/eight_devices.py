"""What needs eight (virtual) devices; run by test_eight_devices.py."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 8)

import mmjax  # noqa: E402
from mmjax import sharding, trees  # noqa: E402
from mmjax.checkpoints import training as training_checkpoints  # noqa: E402
from mmjax.config import MeshConfig, OptimConfig  # noqa: E402
from mmjax.data import scenes  # noqa: E402
from mmjax.families import minigpt4  # noqa: E402
from mmjax.inference import generate  # noqa: E402
from mmjax.models import int8, kernels, masks  # noqa: E402
from mmjax.models.int8 import Int8  # noqa: E402
from mmjax.training import optim, steps  # noqa: E402
from tests import small, tiny  # noqa: E402
from tests.models.test_int8 import MATRICES, held, test_restoring_quantises_what_is_stored  # noqa: E402, F401

ADAMW = optim.optimizer(OptimConfig(init_lr=1e-3, min_lr=1e-3, warmup_steps=0))
MODULE = minigpt4.MiniGPT4(tiny.MINIGPT4)


def on(mesh, flat):
    places = sharding.shardings(flat, minigpt4.FAMILY.all_axes(tiny.MINIGPT4), mesh)

    def put(path, leaf):
        if not isinstance(leaf, Int8):
            return jax.device_put(leaf, places[path])
        wanted = int8.shapes(leaf.shape, places[path], int8.summed(path, leaf.values.ndim, MATRICES))
        return jax.tree.map(lambda part, shape: jax.device_put(part, shape.format), leaf, wanted)

    return trees.unflatten({path: put(path, leaf) for path, leaf in flat.items()})


def train(mesh, rules, batches, change=lambda params: params, module=MODULE):
    """(losses, last state)"""
    with sharding.use_mesh(mesh):
        params = on(mesh, trees.flatten(change(tiny.params("minigpt4", tiny.MINIGPT4))))
        trained, frozen = trees.split(params, trees.mask(params, rules))
        state = steps.start(trained, ADAMW, 0)
        step, losses = jax.jit(steps.train_step(module, ADAMW), compiler_options=tiny.quick_options()), []
        for batch in batches:
            state, metrics = step(state, frozen, jax.device_put(batch, sharding.batch_sharding(mesh)))
            losses.append(float(metrics["loss"]))
    return losses, state


@pytest.mark.parametrize(("cfg", "shape"), [
    (MeshConfig(), (8, 1, 1)), (MeshConfig(2, -1, 2), (2, 2, 2)), (MeshConfig(1, 8, 1), (1, 8, 1)),
    (MeshConfig(1, 4, -1), (1, 4, 2))])
def test_one_size_takes_what_is_left(cfg, shape):
    mesh = sharding.make_mesh(cfg)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape


def test_eight_devices_train_as_one():
    """Rows with different numbers of targets: the mean is over those of all devices. There the two rows of a shard have
    one list of images."""
    batches = [tiny.batch(8, seed=seed) for seed in (0, 1)]
    assert len(set(batches[0].loss_mask.sum(1).tolist())) > 1
    rules = (*minigpt4.TRAINED, "llm/norm/.*", "llm/layers/attn/[qv]/w")
    one = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    eight = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    expected, alone = train(one, rules, batches)
    losses, state = train(eight, rules, [tiny.share_images(batch, 4) for batch in batches])
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    for path, leaf in trees.flatten(state.params).items():
        if leaf is not None:
            np.testing.assert_allclose(leaf, trees.flatten(alone.params)[path], atol=1e-6, err_msg=path)
    assert state.params["projector"]["w"].sharding.spec == PartitionSpec(None, "fsdp")
    assert state.params["llm"]["layers"]["attn"]["q"]["w"].addressable_shards[0].data.shape == (2, 16, 2, 8)


@pytest.mark.parametrize("lists", [4, 8])
def test_images_lie_with_their_rows(lists):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    batch = tiny.share_images(tiny.batch(16), lists)
    placed = sharding.put_batch(batch, mesh, 16)
    for shard, rows in zip(placed.images.addressable_shards, placed.tokens.addressable_shards, strict=True):
        number = rows.index[0].start // 4
        np.testing.assert_array_equal(rows.data, batch.tokens[rows.index])
        size = lists // 4
        np.testing.assert_array_equal(shard.data, batch.images[number * size:(number + 1) * size])


@pytest.mark.extended
def test_eight_devices_train_as_one_on_int8():
    """Where the sum over a matrix is cut between devices, and where its channels and their scales are."""
    one = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    eight = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    expected, _ = train(one, minigpt4.TRAINED, [tiny.batch()] * 2, held)
    losses, _ = train(eight, minigpt4.TRAINED, [tiny.batch()] * 2, held)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(1, 4, 2), MeshConfig(2, 2, 2)])
def test_a_fused_kernel_on_eight_devices_is_that_on_one(mesh):
    """Rows on all of them, and heads on two."""
    random = np.random.default_rng(0)
    q, k, v, by_output = (random.normal(size=(8, 20, heads, 64)).astype(np.float32) for heads in (4, 2, 2, 4))
    segments = np.where(np.arange(20) < random.integers(5, 15, (8, 1)), 0, 1)

    @tiny.jit
    def both(q, k, v, by_output):
        mask = masks.causal_mask(segments >= 0, segments)
        out, pull = jax.vjp(lambda *each: kernels.Kernels("splash", interpret=True).attend(*each, mask), q, k, v)
        return out, *pull(by_output)

    alone = both(q, k, v, by_output)
    with sharding.use_mesh(sharding.make_mesh(mesh)):
        together = both(q, k, v, by_output)
    for found, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_eight_devices_train_with_a_fused_kernel_as_one_does_without():
    """Within the scan of the layers, of which each is computed again in the backward pass."""
    rules = (*minigpt4.TRAINED, "llm/layers/attn/[qv]/w")
    fused = MODULE.clone(kernels=kernels.Kernels("splash", interpret=True), remat="feed_forward")
    expected, alone = train(sharding.make_mesh(MeshConfig(), jax.devices()[:1]), rules, [tiny.batch()] * 2)
    losses, state = train(sharding.make_mesh(MeshConfig(2, 2, 2)), rules, [tiny.batch()] * 2, module=fused)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for path, leaf in trees.flatten(state.params).items():
        if leaf is not None:
            np.testing.assert_allclose(leaf, trees.flatten(alone.params)[path], atol=1e-5, err_msg=path)


def test_a_checkpoint_moves_to_another_mesh(tmp_path):
    flat = {path: leaf for path, leaf in trees.flatten(tiny.params("minigpt4", tiny.MINIGPT4)).items()
            if path.startswith("projector/")}
    meshes = [sharding.make_mesh(MeshConfig(data=1, fsdp=8)), sharding.make_mesh(MeshConfig(2, 2, 2)),
              sharding.make_mesh(MeshConfig(), jax.devices()[3:4])]

    def state(mesh, factor, seed):
        trained = on(mesh, {path: factor * leaf for path, leaf in flat.items()}) | {"llm": {"embedding": None}}
        made = steps.start(trained, ADAMW, seed)
        whole = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda leaf: leaf if leaf.ndim else jax.device_put(leaf, whole), made)

    saved = state(meshes[0], 1, 7)
    checkpoints = training_checkpoints.Checkpoints(tmp_path)
    checkpoints.save(3, saved, training_checkpoints.Progress())
    for mesh in meshes:
        wanted = state(mesh, 0, 0)
        restored = checkpoints.restore(wanted)
        for path, leaf in flat.items():
            found = trees.flatten(restored.params)[path]
            np.testing.assert_array_equal(found, leaf)
            assert found.sharding == trees.flatten(wanted.params)[path].sharding
        np.testing.assert_array_equal(*map(jax.random.key_data, (restored.key, saved.key)))
    checkpoints.close()
    np.testing.assert_array_equal(training_checkpoints.trained(tmp_path)["projector/w"], flat["projector/w"])


@pytest.mark.extended
def test_eight_devices_write_what_one_writes():
    """Greedy search, drawing and beams, of fewer rows than there are devices, from shards of the weights."""
    one = mmjax.load(small.checkpoint(), dtype="float32")
    eight = mmjax.load(small.checkpoint(), sharding.make_mesh(MeshConfig(2, 4, 1)), dtype="float32")
    samples = [mmjax.Sample(images=[scenes.draw(scene)], prompt=f"<Img><ImageHere></Img> {words}")
               for scene, words in zip(scenes.scenes("train", 3), ("Where?", "What is it?", "Which"), strict=True)]
    for settings in ({}, {"temperature": 1.0, "seed": 2}, {"num_beams": 2, "repetition_penalty": 1.3}):
        assert eight.generate(samples, 12, **settings) == one.generate(samples, 12, **settings)


@pytest.mark.extended
def test_heads_on_different_devices_write_what_one_writes():
    batch, made = tiny.batch(), []
    for cfg, devices in ((MeshConfig(), jax.devices()[:1]), (MeshConfig(2, 2, 2), jax.devices())):
        mesh = sharding.make_mesh(cfg, devices)
        with sharding.use_mesh(mesh):
            params = on(mesh, trees.flatten(tiny.params("minigpt4", tiny.MINIGPT4)))
            rows = jax.device_put(batch, sharding.batch_sharding(mesh))
            made.append([generate.generate(MODULE, params, rows, config).sequences for config in (
                generate.GenerateConfig(6, eos=-1), generate.GenerateConfig(6, eos=-1, num_beams=2))])
    np.testing.assert_array_equal(*made)
