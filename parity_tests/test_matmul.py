"""`matmul`, whose gradients are written out for CPU, against what JAX itself derives."""

import jax
import numpy as np

from deepseek_jax.model.matmul import columns, matmul


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
