import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models import int8
from mmjax.models.layers import LayerNorm, Project, RMSNorm, einsum, gelu
from tests import tiny

RANDOM = np.random.default_rng(0)


def draw(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def apply(module, params, *inputs):
    return tiny.jit(lambda params, *inputs: module.apply({"params": params}, *inputs))(params, *inputs)


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_layer_norm(mean):
    """Far from zero too, where the difference of two squares would lose the variance."""
    x = draw(3, 16) + np.float32(mean)
    params = tiny.module_params(LayerNorm(1e-6), x)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    expected = expected * np.float64(params["scale"]) + np.float64(params["bias"])
    np.testing.assert_allclose(apply(LayerNorm(1e-6), params, x), expected, atol=2e-5 if mean else 1e-6)


def test_norms_use_their_eps():
    x = np.full((1, 4), 1e-3, np.float32) * [1, -1, 1, -1]
    for eps in (1e-6, 1e-2):
        ones = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
        expected = x / np.sqrt(1e-6 + eps)
        np.testing.assert_allclose(apply(LayerNorm(eps), ones, x), expected, rtol=1e-5)
        np.testing.assert_allclose(apply(RMSNorm(eps), {"scale": jnp.ones(4)}, x), expected, rtol=1e-5)


def test_rms_norm():
    x = draw(3, 16)
    params = tiny.module_params(RMSNorm(1e-6), x)
    expected = x / np.sqrt(np.square(x.astype(np.float64)).mean(-1, keepdims=True) + 1e-6) * params["scale"]
    np.testing.assert_allclose(apply(RMSNorm(1e-6), params, x), expected, rtol=1e-5)


def test_norms_keep_the_dtype_and_compute_in_float32():
    x = (draw(3, 64) * 1e4).astype(jnp.bfloat16)  # squares of these have lost everything in bfloat16
    ones = {"scale": jnp.ones(64)}
    wide = apply(RMSNorm(1e-6), ones, x.astype(jnp.float32))
    narrow = apply(RMSNorm(1e-6), ones, x)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))
    assert apply(LayerNorm(1e-6), ones | {"bias": jnp.zeros(64)}, x).dtype == jnp.bfloat16


def test_project_contracts_the_named_axes():
    x = draw(2, 3, 4, 5)
    project = Project((4, 5, 6), contracted=2, use_bias=True)
    params = {"w": draw(4, 5, 6), "b": draw(6)}
    expected = x.reshape(6, 20) @ params["w"].reshape(20, 6) + params["b"]
    found = project.apply({"params": params}, "BTNH,NHD->BTD", x)
    np.testing.assert_allclose(found.reshape(6, 6), expected, rtol=1e-4, atol=1e-6)


def test_fresh_projections_are_those_of_torch_linear():
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), weight and bias alike."""
    project = Project((8, 8, 50), contracted=2, use_bias=True)
    params = tiny.jit(lambda key: project.init(key, "BNH,NHD->BD", jnp.zeros((1, 8, 8))))(jax.random.key(0))["params"]
    for leaf in jax.tree.leaves(params):
        assert 0.9 / 8 < np.abs(leaf).max() <= 1 / 8
    assert abs(np.mean(params["w"])) < 0.01


def test_gelu_is_exact_in_bfloat16_too():
    x = np.linspace(-6, 6, 2_001, dtype=np.float32)
    exact = np.array([value * 0.5 * math.erfc(-value / 2**0.5) for value in x.astype(np.float64)])
    np.testing.assert_allclose(gelu(x), exact, atol=1e-6)
    narrow = jnp.asarray(x, jnp.bfloat16)
    exact = np.array([value * 0.5 * math.erfc(-value / 2**0.5) for value in np.float64(narrow)])
    error = np.abs(np.float64(gelu(narrow)) - exact) / np.maximum(np.abs(exact), 1e-3)
    assert error.max() < 0.004  # about half of the last place; by erfc in bfloat16 0.03


def test_a_result_in_float32_is_not_rounded_before():
    random = np.random.default_rng(0)
    x, w = (jnp.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in ((4, 64), (64, 8)))
    exact = np.float64(x) @ np.float64(w)
    for matrix in (w, int8.quantise(w, (0,))):
        found = einsum("BD,DF->BF", x, matrix, jnp.float32)
        expected = exact if matrix is w else np.float64(x) @ np.float64(int8.wide(matrix))
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        by_x, = jax.grad(lambda x, w=matrix: (einsum("BD,DF->BF", x, w, jnp.float32) ** 2).sum(), (0,))(x)
        assert by_x.dtype == jnp.bfloat16
        wide = np.float64(w if matrix is w else int8.wide(matrix))
        np.testing.assert_allclose(np.float64(by_x), 2 * expected @ wide.T, rtol=0.05, atol=0.5)


@pytest.mark.parametrize(("dtype", "precision"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "None")])
def test_products_keep_their_dtype_and_float32_its_digits(dtype, precision):
    x, w = jnp.ones((2, 3), dtype), jnp.ones((3, 4), jnp.float32)
    traced = jax.make_jaxpr(lambda x, w: einsum("BD,DF->BF", x, w))(x, w)
    (product,) = (equation for equation in tiny.equations(traced.jaxpr) if equation.primitive.name == "dot_general")
    assert traced.out_avals[0].dtype == dtype
    assert precision in str(product.params["precision"])


def test_a_cpu_sums_bfloat16_products_in_float32_without_widening_the_matrices():
    x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 6), jnp.bfloat16)

    def product(platform):
        device = jax.sharding.AbstractDevice(device_kind=platform, num_cores=1, platform=platform)
        mesh = jax.sharding.AbstractMesh((1,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.make_jaxpr(lambda x, w: einsum("BD,DF->BF", x, w))(x, w).eqns[0]

    assert {variable.aval.dtype for variable in product("cpu").invars} == {jnp.dtype(jnp.bfloat16)}
    assert product("cpu").outvars[0].aval.dtype == jnp.float32
    assert product("tpu").outvars[0].aval.dtype == jnp.bfloat16


def test_one_row_of_bfloat16_is_the_row_that_it_is_among_others():
    project = Project((32, 4, 8))
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16),
                             project.init(jax.random.key(0), "BTD,DNH->BTNH", jnp.ones((1, 2, 32))))
    x = jax.random.normal(jax.random.key(1), (3, 1, 32), jnp.bfloat16)
    alone = jnp.concatenate([project.apply(variables, "BTD,DNH->BTNH", row[None]) for row in x])
    together = project.apply(variables, "BTD,DNH->BTNH", x)
    assert alone.shape == together.shape == (3, 1, 4, 8)
    np.testing.assert_array_equal(alone, together)


def test_gradients_of_bfloat16_products_are_bfloat16_and_those_of_float32():
    random = np.random.default_rng(0)
    x, w = (random.standard_normal(shape, np.float32) for shape in ((4, 8), (8, 6)))

    def gradients(dtype):
        return jax.grad(lambda x, w: jnp.square(einsum("BD,DF->BF", x, w).astype(jnp.float32)).sum(), (0, 1))(
            jnp.asarray(x, dtype), jnp.asarray(w, dtype))

    for low, high in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert low.dtype == jnp.bfloat16
        np.testing.assert_allclose(low.astype(np.float32), high, rtol=0.05, atol=0.05 * np.abs(high).max())
