"""Products that are arranged for CPU, of many rows with their gradients and of few rows, against plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.matmul import columns, matmul
from deepseek_jax.model.panels import cut, times, whole


def test_gradients_are_those_of_plain_products(x64):
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((3, 5, 7)), [rng.standard_normal((7, width)) for width in (4, 9)]
    gradients = [rng.standard_normal((3, 5, width)) for width in (4, 9)]

    def results(multiply):
        products, pull_back = jax.vjp(multiply, x, weights)
        return products, pull_back(gradients)

    ours, plain = results(matmul), results(lambda x, weights: [x @ weight for weight in weights])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype == "float64"
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-14 * np.abs(b).max())


def test_columns_keep_batch_axes():
    x = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(columns(x), x.transpose(0, 2, 1))


@pytest.mark.parametrize("shape", [(24, 160), (5, 24, 64), (600, 1024)])
def test_a_cut_weight_multiplies_as_the_whole_one(shape, x64):
    """One piece and several, one weight and five side by side."""
    rng = np.random.default_rng(0)
    weight, x = jnp.asarray(rng.standard_normal(shape)), rng.standard_normal((3, 2, shape[-2]))
    panels = cut(weight)
    assert len(panels.pieces) == -(-weight.size // 2**17)
    np.testing.assert_array_equal(whole(panels, shape[0] if len(shape) == 3 else None), weight)
    expected = jnp.concatenate([x @ each for each in weight.reshape(-1, *shape[-2:])], axis=-1)
    np.testing.assert_allclose(times(x, panels), expected, rtol=0, atol=1e-13 * np.abs(expected).max())


def test_few_rows_in_bfloat16():
    """Cut and whole, the product has the input's type, or the wider one that is asked for."""
    weight, x = jax.random.normal(jax.random.key(0), (64, 96)), jnp.ones((2, 64), jnp.bfloat16)
    rounded = x.astype(jnp.float32) @ weight.astype(jnp.bfloat16).astype(jnp.float32)
    for each in (weight, cut(weight)):
        assert times(x, each).dtype == jnp.bfloat16
        np.testing.assert_allclose(times(x, each, jnp.float32), rounded, rtol=0, atol=1e-5)
