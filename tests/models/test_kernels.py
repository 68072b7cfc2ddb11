"""The kernels compute what the dense form computes, and no token of one segment reaches another. Fused kernels are
interpreted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models import eva_vit, kernels, remat
from mmjax.models.kernels import XLA, Kernels, attend
from mmjax.models.masks import AttentionMask, cached_mask, causal_mask
from tests import tiny

RANDOM = np.random.default_rng(0)
SPLASH = Kernels("splash", interpret=True)
NAMES = {"xla": XLA, "splash": SPLASH}


def draw(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def slow_attention(q, k, v, mask):
    B, T, N, H = q.shape
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        shared = n // (N // k.shape[2])  # key heads serve neighbouring query heads
        scores = np.array([q[b, t, n] @ k[b, s, shared] / H**0.5 for s in range(k.shape[1])], np.float64)
        scores[~mask[b, t]] = -np.inf
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, :, shared]
    return out


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_attention_with_shared_key_heads_and_a_mask(key_heads):
    q, k, v = draw(2, 3, 4, 8), draw(2, 5, key_heads, 8), draw(2, 5, key_heads, 8)
    mask = RANDOM.random((2, 3, 5)) < 0.6
    mask[:, :, 1] = True
    np.testing.assert_allclose(tiny.jit(attend)(q, k, v, mask), slow_attention(q, k, v, mask), atol=1e-6)


def test_a_query_that_sees_nothing_gets_the_mean():
    q, k, v = draw(1, 2, 2, 4), draw(1, 3, 2, 4), draw(1, 3, 2, 4)
    out = tiny.jit(attend)(q, k, v, np.zeros((1, 2, 3), bool))
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(1, keepdims=True), out.shape), rtol=1e-6)


def test_scores_are_float32_until_the_softmax():
    q = jnp.ones((1, 4, 2, 8), jnp.bfloat16)

    def scores(chosen):
        traced = jax.make_jaxpr(chosen.attend)(q, q, q).jaxpr
        return {str(each.aval.dtype) for equation in tiny.equations(traced) if equation.primitive.name == "dot_general"
                for each in equation.outvars if each.aval.shape[-2:] == (4, 4)}

    assert scores(XLA) == {"float32"}
    assert "bfloat16" in str(jax.make_jaxpr(Kernels(float32_scores=False).attend)(q, q, q))


# ---- masks ----


def test_a_mask_says_who_sees_whom():
    dense = AttentionMask(causal=True).dense(3, 3)[0]
    np.testing.assert_array_equal(dense, np.tri(3, dtype=bool))
    assert AttentionMask().dense(3, 3) is None
    valid = np.array([[0, 1, 1, 0, 1]], bool)
    np.testing.assert_array_equal(cached_mask(valid, 2).dense(2, 5)[0], [[0, 1, 1, 0, 0], [0, 1, 1, 0, 0]])


def test_a_token_in_a_hole_sees_those_before_it_and_padding_itself():
    valid = np.array([[0, 1, 0, 1, 0]], bool)
    seen = np.array([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 0, 1, 0], [0, 1, 0, 1, 0]], bool)
    np.testing.assert_array_equal(causal_mask(valid).dense(5, 5)[0], seen)


# ---- fused kernels against the dense form ----


def packed(rows, length):
    """Rows of three segments with a hole in the second, and padding at the end; the last row is one segment."""
    segments = np.full((rows, length), -1)
    for number, (start, stop) in enumerate(((0, length // 3), (length // 3, length // 2), (length // 2, length - 9))):
        segments[:, start:stop] = number
    segments[-1] = 0
    valid = segments >= 0
    valid[0, length // 3: length // 3 + 2] = False  # the segment begins with a hole
    valid[0, length // 2 + 5] = False
    return valid, segments


def with_gradients(chosen, mask):
    """(output, gradients by q, k and v) for an output gradient."""

    def call(q, k, v, by_output):
        out, pull = jax.vjp(functools.partial(chosen.attend, mask=mask), q, k, v)
        return out, *pull(by_output)

    return jax.jit(call)


@pytest.mark.parametrize(("head", "length"), [(64, 130), (80, 128), (88, 96), (128, 256)])
def test_splash_is_the_dense_form(head, length, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCKS", (128,))  # two blocks a row of 130 and of 256
    q, k, v, by_output = (draw(2, length, heads, head) for heads in (4, 2, 2, 4))
    mask = causal_mask(*packed(2, length))
    assert SPLASH._can_splash(jnp.asarray(q), jnp.asarray(k), mask)
    for found, expected in zip(with_gradients(SPLASH, mask)(q, k, v, by_output),
                               with_gradients(XLA, mask)(q, k, v, by_output), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_splash_in_bfloat16_is_as_near_as_the_dense_form():
    exact = [draw(2, 128, heads, 64) for heads in (4, 2, 2, 4)]
    mask = causal_mask(*packed(2, 128))
    rounded = [jnp.asarray(each, jnp.bfloat16) for each in exact]
    wanted = with_gradients(XLA, mask)(*[each.astype(jnp.float32) for each in rounded])
    for found, dense, expected in zip(with_gradients(SPLASH, mask)(*rounded), with_gradients(XLA, mask)(*rounded),
                                      wanted, strict=True):
        error, of_dense = (np.abs(np.float32(each) - expected).max() for each in (found, dense))
        assert error < max(1.5 * of_dense, 0.01 * np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_leaks_from_one_segment_to_another(name):
    """Whichever token of a segment changes, outputs and gradients of all others stay the same bits."""
    valid, segments = packed(2, 128)
    call = with_gradients(NAMES[name], causal_mask(valid, segments))
    inputs = [draw(2, 128, heads, 64) for heads in (2, 1, 1, 2)]
    before = call(*inputs)
    for row, segment in ((0, 0), (0, 1), (0, 2), (0, -1), (1, 0)):
        inside = np.zeros((2, 128), bool)
        inside[row] = segments[row] == segment
        changed = [np.where(inside[..., None, None], each + draw(*each.shape), each) for each in inputs]
        after = [np.asarray(each) for each in call(*changed)]
        for new, old in zip(after, before, strict=True):
            np.testing.assert_array_equal(new[~inside], np.asarray(old)[~inside])
        assert (after[0][inside] != np.asarray(before[0])[inside]).all()


# ---- where fused kernels are used ----


def test_what_is_selected():
    assert kernels.select("tpu") == kernels.select("tpu", "splash")
    assert kernels.select("tpu").attention == "splash" and kernels.select("tpu", "xla").attention == "xla"
    assert kernels.select("cpu") == XLA
    assert kernels.select("gpu") == Kernels(float32_scores=False)
    with pytest.raises(ValueError, match="'splash': this kernel is for TPUs, but .* platform 'cpu'"):
        kernels.select("cpu", "splash")
    with pytest.raises(ValueError, match="attention = 'flash': one of auto, xla, splash"):
        kernels.select("tpu", "flash")


def test_float32_caches_and_attention_that_is_not_causal_stay_with_xla():
    q, more = jnp.ones((1, 8, 2, 64), jnp.bfloat16), jnp.ones((1, 16, 2, 64), jnp.bfloat16)
    splash, mask = Kernels("splash"), AttentionMask(causal=True)
    assert splash._can_splash(q, q, mask)
    assert not splash._can_splash(q.astype(jnp.float32), q.astype(jnp.float32), mask)
    assert not splash._can_splash(q, more, cached_mask(jnp.ones((1, 16), bool), 0))
    assert not splash._can_splash(q, q, AttentionMask())


def test_an_encoder_processes_a_few_rows_at_a_time_and_returns_the_same():
    cfg = dataclasses.replace(eva_vit.TINY, drop_path=0.5)
    images = draw(6, 3, 28, 28)
    whole = eva_vit.EvaVit(cfg)
    few = whole.clone(kernels=Kernels(scores_bytes=3 * 4 * 4 * 24 * 128))
    assert few.kernels.rows_at_once(6, 17, 4) == 3
    assert Kernels(scores_bytes=1).rows_at_once(6, 17, 4) == 1 and XLA.rows_at_once(6, 17, 4) == 6
    params = tiny.module_params(whole, images)
    assert jax.tree.structure(params) == jax.tree.structure(tiny.module_params(few, images))
    found, expected = (tiny.jit(lambda images, module=module: module.apply({"params": params}, images))(images)
                       for module in (few, whole))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    same, rngs = np.tile(images[:1], (6, 1, 1, 1)), {"vit": jax.random.key(0)}
    dropped = tiny.jit(lambda images: few.apply({"params": params}, images, rngs=rngs))(same)
    assert len({np.asarray(row).tobytes() for row in dropped}) > 2  # each row draws its own


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_halves_are_swapped_without_rounding(dtype):
    x = jnp.asarray(draw(2, 3, 4, 16), dtype)
    for chosen in (XLA, Kernels(swap_by_product=True)):
        swapped, pull = jax.vjp(chosen.swap_halves, x)
        np.testing.assert_array_equal(swapped, np.concatenate(np.split(np.float32(x), 2, -1)[::-1], -1))
        np.testing.assert_array_equal(chosen.swap_halves(pull(swapped)[0]), swapped)


# ---- what is saved for the backward pass ----


def test_policies_keep_what_the_kernel_needs():
    """All but "full", which runs the forward kernel twice."""
    q = draw(1, 128, 2, 64)

    def layer(x):
        return jnp.sin(SPLASH.attend(jnp.sin(x), jnp.cos(x), 2 * x, AttentionMask(causal=True)))

    def loops(policy):
        saved = jax.checkpoint(layer, policy=remat.POLICIES[policy], prevent_cse=False)
        gradient = jax.grad(lambda x: jax.lax.scan(lambda x, _: (saved(x), None), x, None, length=2)[0].sum())
        return tiny.compiled(jax.jit(gradient), q).as_text().count(" while(")  # an interpreted kernel is a loop

    assert [loops(policy) for policy in remat.NAMES] == [4, 4, 4, 5]  # of the layers two
