"""Operations counted by hand and by `mmjax.cost.flops`."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import pallas
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from mmjax import trees
from mmjax.batch import Batch
from mmjax.cost import flops
from mmjax.families import FAMILIES, minigpt4, shapes
from mmjax.training import steps
from tests import tiny

B, T = 2, 12


def count(family, cfg, rules, batch, remat=False):
    params = trees.unflatten(shapes(family, cfg))
    trained, frozen = trees.split(params, trees.mask(params, rules))
    return flops.train_step(FAMILIES[family].Model(cfg, jnp.bfloat16, remat), trained, frozen, batch)


def layers(c, rows, length):
    """(products with weights, attention) of the forward pass of all layers."""
    weights = c.dim * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 3 * c.dim * c.hidden
    attention = 2 * rows * c.heads * length**2 * c.head_dim * 2
    return 2 * rows * length * weights * c.depth, attention * c.depth


def head(c, rows, length):
    return 2 * rows * length * c.dim * c.vocab


def operations(function, *shapes):
    arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return sum(number for _, number in flops.products(jax.make_jaxpr(function)(*arrays).jaxpr))


def test_products():
    assert operations(lambda x, w: jnp.tanh(x @ w), (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert operations(lambda x, w: jnp.einsum("bij,bjk->bik", x, w), (4, 3, 5), (4, 5, 7)) == 4 * 2 * 3 * 5 * 7
    assert operations(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], (3, 5), (6, 5, 5)) == 6 * 2 * 75
    assert operations(lambda x: jax.jit(jax.checkpoint(lambda x: x @ x))(x), (3, 3)) == 2 * 27


def test_the_longest_branch_counts():
    assert operations(lambda x: jax.lax.cond(x.sum() > 0, lambda: x @ x @ x, lambda: x @ x), (3, 3)) == 2 * 2 * 27


def test_what_cannot_be_counted_is_an_error():
    with pytest.raises(ValueError, match="conv_general_dilated"):
        operations(lambda x, w: jax.lax.conv(x, w, (1, 1), "VALID"), (1, 3, 8, 8), (4, 3, 2, 2))
    with pytest.raises(ValueError, match="depends on its condition"):
        operations(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x), (3, 3))
    assert operations(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x), (3, 3)) == 0


def splash(q, k, v):
    """Causal attention of [B,N,T,H] by JAX's kernel; only traced here."""
    heads, length = q.shape[1:3]
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads)
    kernel = splash_attention_kernel.make_splash_mha_single_device(mask)
    return jax.vmap(kernel)(q, k, v)


def dense(q, k, v):
    return jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(jnp.einsum("bnth,bnsh->bnts", q, k)), v)


def test_a_kernel_counts_as_the_dense_attention_that_it_replaces():
    shape = (3, 2, 256, 128)
    found = [operations(jax.grad(lambda q, k, v: attention(q, k, v).sum(), (0, 1, 2)), shape, shape, shape)  # noqa: B023
             for attention in (splash, dense)]
    assert found[1] == 6 * 2 * 3 * 2 * 256 * 256 * 128
    assert found[0] == found[1] + 2 * 3 * 2 * 256 * 128  # it sums out · dO, which the dense form does without a product


def test_shards_count_together():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "tensor"))
    spec = jax.sharding.PartitionSpec("data", "tensor")

    def sharded(x):
        return jax.shard_map(lambda x: x @ x.T @ x, mesh=mesh, in_specs=spec, out_specs=spec)(x)

    assert operations(sharded, (8, 32)) == 8 * 2 * 2 * 4 * 4 * 8


def test_an_unknown_kernel_is_an_error():
    def double(x):
        def kernel(source, target):
            target[...] = 2 * source[...]

        return pallas.pallas_call(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype), name="double")(x)

    with pytest.raises(ValueError, match="kernel double are not counted"):
        operations(double, (8, 128))


def test_a_trained_language_model_is_6N():
    c = FAMILIES["llama"].presets["tiny"]
    found = count("llama", c, ("llm/.*",), tiny.batch(B, T, image_count=0))
    forward = sum(layers(c.llm, B, T)) + head(c.llm, B, T)
    assert found.forward == {"llm": forward} and found.backward == {"llm": 2 * forward}
    assert found.model == 3 * forward
    # attention's scores are not kept for the backward pass, its output is
    assert found.executed == 3 * forward + layers(c.llm, B, T)[1] // 2


def test_a_frozen_language_model_is_4N_and_a_tower_below_it_2N():
    c = tiny.MINIGPT4
    found = count("minigpt4", c, minigpt4.TRAINED, tiny.batch(B, T))
    weights, attention = layers(c.llm, B, T)
    assert found.forward["llm"] == weights + attention + head(c.llm, B, T)
    assert found.backward["llm"] == weights + 2 * attention + head(c.llm, B, T)  # a score's both sides
    projector = 2 * B * c.image_tokens * c.soft_width * c.llm.dim
    assert found.forward["projector"] == found.backward["projector"] == projector  # nothing below it is trained
    v, S = c.vit, c.vit.grid**2
    patches = 2 * B * S * 3 * v.patch**2 * v.dim
    blocks = 2 * B * (S + 1) * (4 * v.dim**2 + 2 * v.dim * v.hidden) + 2 * 2 * B * (S + 1) ** 2 * v.dim
    assert found.forward["vit"] == patches + v.depth * blocks
    assert found.backward.keys() == {"llm", "projector"} and found.recomputed.keys() == {"llm"}
    assert found.parts[0] == "llm" and set(found.parts) == {"llm", "vit", "qformer", "projector"}


def test_a_trained_part_above_another_is_6N():
    c = tiny.MINIGPT4
    alone = count("minigpt4", c, minigpt4.TRAINED, tiny.batch(B, T))
    both = count("minigpt4", c, (*minigpt4.TRAINED, "qformer/.*"), tiny.batch(B, T))
    assert both.backward["projector"] == 2 * alone.backward["projector"]
    assert both.forward == alone.forward and "vit" not in both.backward


def test_what_is_computed_again_is_counted_apart():
    c = tiny.MINIGPT4
    plain, again = (count("minigpt4", c, minigpt4.TRAINED, tiny.batch(B, T), remat) for remat in (False, True))
    assert (again.forward, again.backward, again.model) == (plain.forward, plain.backward, plain.model)
    down = 2 * B * T * c.llm.hidden * c.llm.dim * c.llm.depth  # nobody needs the result of a layer's last product
    assert again.recomputed == {"llm": sum(layers(c.llm, B, T)) - down}
    assert again.executed == again.model + again.recomputed["llm"]


def test_full_size():
    """MiniGPT-4 7B, one row of 256 tokens: 4 operations a parameter and token, and attention."""
    c = minigpt4.PRESETS["minigpt4-7b"]
    ids = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    seen = jax.ShapeDtypeStruct((1, 256), jnp.bool_)
    images = jax.ShapeDtypeStruct((1, 1, 224, 224, 3), jnp.uint8)
    batch = Batch(ids, ids, seen, seen, ids, jax.ShapeDtypeStruct((1,), jnp.int32), images=images)
    found = count("minigpt4", c, minigpt4.TRAINED, batch, remat=True)
    N = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    attention = 32 * 2 * 2 * 256**2 * 4096
    assert found.forward["llm"] == 2 * N * 256 + attention
    assert found.forward["llm"] + found.backward["llm"] == 4 * N * 256 + 3 * attention


def test_packed_rows_and_features_are_counted():
    c = tiny.MINIGPT4
    batch = tiny.batch(B, T)
    packed = dataclasses.replace(batch, segments=batch.positions)
    assert count("minigpt4", c, minigpt4.TRAINED, packed).model == count("minigpt4", c, minigpt4.TRAINED, batch).model
    feature = jnp.zeros((B, 1, c.image_tokens, c.soft_width))
    ready = dataclasses.replace(batch, images=None, features=feature)
    assert count("minigpt4", c, minigpt4.TRAINED, ready).forward.keys() == {"llm", "projector"}


def test_only_the_logits_of_targets_are_useful():
    c = tiny.MINIGPT4
    found = count("minigpt4", c, minigpt4.TRAINED, tiny.batch(B, T))
    assert found.logits == 2 * head(c.llm, B, T) and found.slots == B * T
    assert found.useful(B * T) == found.model
    assert found.model - found.useful(6) == found.logits * (B * T - 6) // (B * T)
    tied = dataclasses.replace(FAMILIES["llama"].presets["tiny"].llm, tied=True)
    words = count("llama", dataclasses.replace(FAMILIES["llama"].presets["tiny"], llm=tied), ("llm/norm/.*",),
                  tiny.batch(B, T, image_count=0))
    assert words.logits == 2 * head(tied, B, T)


def by_shape(monkeypatch, trained=minigpt4.TRAINED):
    """(`flops.by_shape` of a training step, the step as a function of state and batch, a state, and what is traced)."""
    c, looked, mean_loss = tiny.MINIGPT4, [], steps.mean_loss
    monkeypatch.setattr(steps, "mean_loss", lambda *args: looked.append(args) or mean_loss(*args))
    params = trees.unflatten(shapes("minigpt4", c))
    trained, frozen = trees.split(params, trees.mask(params, trained))
    optimizer = optax.sgd(0.1)
    step = steps.train_step(minigpt4.MiniGPT4(c, jnp.bfloat16), optimizer)
    state = jax.eval_shape(lambda trained: steps.start(trained, optimizer, 0), trained)

    def trace(state, batch):
        return step.trace(state, frozen, batch)

    return flops.by_shape(trace, c.llm), trace, state, looked


def test_each_shape_of_batch_is_counted_once_and_traced_with_its_step(monkeypatch):
    counted, trace, state, looked = by_shape(monkeypatch)
    trace(state, tiny.batch(B, T))  # as calling the step does
    first, longer = counted(state, tiny.batch(B, T)), counted(state, tiny.batch(B, T + 4))
    assert counted(state, tiny.batch(B, T, seed=1)) is first and len(looked) == 2
    assert longer.model > first.model


@pytest.mark.parametrize(("length", "slots"), [(T, B * T), (200, 512)])  # chunks of 256 slots hold 400
def test_a_step_does_what_its_loss_does(monkeypatch, length, slots):
    counted, _, state, _ = by_shape(monkeypatch)
    batch = tiny.batch(B, length)
    found, expected = counted(state, batch), count("minigpt4", tiny.MINIGPT4, minigpt4.TRAINED, batch)
    assert (found.slots, expected.slots) == (slots, B * length)
    assert [found.useful(targets) for targets in (0, 6, B * length)] == [
        expected.useful(targets) for targets in (0, 6, B * length)]
    assert found.recomputed == expected.recomputed and found.forward["vit"] == expected.forward["vit"]


def test_what_cannot_be_counted_is_told_as_nothing():
    convolution = jax.jit(lambda x, w: jax.lax.conv(x, w, (1, 1), "VALID"))
    traced = convolution.trace(jnp.zeros((1, 3, 8, 8)), jnp.zeros((4, 3, 2, 2)))
    state = steps.TrainState(None, {"llm": {}}, None, None)
    assert flops.by_shape(lambda state, batch: traced, tiny.MINIGPT4.llm)(state, tiny.batch(B, T)) is None
